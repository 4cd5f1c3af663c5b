"""Makes the labels of the task kind `user_label`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.encoding.vocabulary import Classes, Numeric
from supermoe_jax.data.tasks.kind import TaskKind
from supermoe_jax.data.tasks.labels import LabelInputs, Labels, Snapshots, TaskLabels
from supermoe_jax.data.tasks.listing import listed
from supermoe_jax.errors import ConfigError


def label_user(value: np.ndarray, snapshots: Snapshots, split_of_user: np.ndarray) -> Labels:
  """Returns users' labels at the snapshots of each user's own split.

  Shapes: `value [U]` float, NaN where unknown; `split_of_user [U]` → `[S]`.
  """
  of_user = value[snapshots.user]
  known = (snapshots.split == split_of_user[snapshots.user]) & ~np.isnan(of_user)
  return Labels(np.nan_to_num(of_user).astype(np.float32), known)


class UserLabelKind(TaskKind[config.UserLabel]):
  """See `config.UserLabel`."""

  @classmethod
  def outputs(cls, name: str, task: config.UserLabel, codes: Mapping[str, int], classes: Mapping[str, int]) -> int:
    """See `TaskKind`."""
    if task.type != "multiclass":
      return 1
    if name not in classes:
      raise ConfigError(
        f"config.tasks.{name}: how many classes column {task.column!r} has is known once the dataset is prepared; run "
        f"'supermoe prepare' first, or leave the task out by --config.exclude_tasks={name}"
      )
    return classes[name]

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

  def encoded(self, number: float) -> float:
    """See `TaskKind`."""
    if self.task.type != "regression":
      return number
    statistics = self.encoders.labels[self.name]
    assert isinstance(statistics, Numeric)  # `reading.user_table` encodes numbers so
    return float(statistics.encode(number))

  def class_values(self) -> tuple[str, ...] | None:
    """See `TaskKind`."""
    if self.task.type != "multiclass":
      return None
    classes = self.encoders.labels[self.name]
    assert isinstance(classes, Classes)  # `reading.user_table` encodes multi-class labels so
    return tuple(classes.values)
