"""Makes the labels of the task kind `dated_label`."""

from __future__ import annotations

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.tasks.column_label import ColumnLabelKind
from supermoe_jax.data.tasks.labels import LabelInputs, Labels, TaskLabels
from supermoe_jax.data.tasks.listing import listed


class DatedLabelKind(ColumnLabelKind[config.DatedLabel]):
  """See `config.DatedLabel`."""

  @classmethod
  def question(cls, task: config.DatedLabel) -> str:
    """See `TaskKind`."""
    when = "at the time of a row of its table"
    if task.type == "multiclass":
      return f"which value {task.column} has {when}"
    if task.type == "regression":
      return f"the number {task.column} {when}, in standard deviations from its mean"
    return f"{task.column} is {listed(task.positive) if task.positive else '1'} {when}"

  def label(self, inputs: LabelInputs) -> TaskLabels:
    """See `TaskKind`."""
    value = inputs.dated_labels[self.name]
    return TaskLabels(Labels(np.nan_to_num(value).astype(np.float32), ~np.isnan(value)))
