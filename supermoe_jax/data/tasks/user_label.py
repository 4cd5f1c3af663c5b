"""Makes the labels of the task kind `user_label`."""

from __future__ import annotations

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.tasks.column_label import ColumnLabelKind
from supermoe_jax.data.tasks.labels import LabelInputs, Labels, Snapshots, TaskLabels
from supermoe_jax.data.tasks.listing import listed


def label_user(value: np.ndarray, snapshots: Snapshots, split_of_user: np.ndarray) -> Labels:
  """Returns users' labels at the snapshots of each user's own split.

  Shapes: `value [U]` float, NaN where unknown; `split_of_user [U]` → `[S]`.
  """
  of_user = value[snapshots.user]
  known = (snapshots.split == split_of_user[snapshots.user]) & ~np.isnan(of_user)
  return Labels(np.nan_to_num(of_user).astype(np.float32), known)


class UserLabelKind(ColumnLabelKind[config.UserLabel]):
  """See `config.UserLabel`."""

  @classmethod
  def question(cls, task: config.UserLabel) -> str:
    """See `TaskKind`."""
    if task.type == "multiclass":
      return f"which value {task.column} has"
    if task.type == "regression":
      return f"the number {task.column}, in standard deviations from its mean"
    return f"{task.column} is {listed(task.positive)}"

  def label(self, inputs: LabelInputs) -> TaskLabels:
    """See `TaskKind`."""
    return TaskLabels(label_user(inputs.user_labels[self.name], inputs.snapshots, inputs.split_of_user))
