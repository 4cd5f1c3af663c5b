"""Makes the labels of the task kind `future_values`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import ABSENT, FIRST_VALUE
from supermoe_jax.data.encoding.histories import UserBlock, counts_before
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.data.tasks.event_condition import event_condition
from supermoe_jax.data.tasks.kind import TaskKind
from supermoe_jax.data.tasks.labels import LabelInputs, Labels, Snapshots, TaskLabels, future_window
from supermoe_jax.data.tasks.listing import where
from supermoe_jax.errors import ConfigError


def label_future_values(
  block: UserBlock, snapshots: Snapshots, times: Calendar, codes: np.ndarray, top: int, days: float
) -> Labels:
  """Returns whether each of the codes 2 … top + 1, a field's most frequent values, occurs in [τ, τ + days).

  `codes [N]` holds the code of each event that counts.
  """
  start, stop, known = future_window(block, snapshots, times, days)
  before = counts_before(codes, top, np.stack([start, stop]))
  return Labels((before[1] > before[0]).astype(np.float32), known)


class FutureValuesKind(TaskKind[config.FutureValues]):
  """See `config.FutureValues`."""

  def __init__(self, name: str, task: config.FutureValues, data: config.Data, encoders: Encoders):
    """See `TaskKind`."""
    super().__init__(name, task, data, encoders)
    self._column = list(encoders.categorical).index(task.field)
    self._asked = event_condition(f"config.tasks.{name}", task.where, "", data, encoders)

  @classmethod
  def outputs(cls, name: str, task: config.FutureValues, codes: Mapping[str, int], classes: Mapping[str, int]) -> int:
    """See `TaskKind`."""
    return task.top

  @classmethod
  def question(cls, task: config.FutureValues) -> str:
    """See `TaskKind`."""
    asked = f"which of the {task.top} most frequent values of {task.field} occur{where(task.where)}"
    return f"{asked} within {task.horizon_days:g} days"

  def check(self) -> None:
    """See `TaskKind`."""
    values = self.encoders.categorical[self.task.field].n_codes - FIRST_VALUE
    if self.task.top > values:
      raise ConfigError(
        f"config.tasks.{self.name}.top={self.task.top}, but {self.task.field} has only {values} values in training."
      )

  def label(self, inputs: LabelInputs) -> TaskLabels:
    """See `TaskKind`."""
    block, snapshots, times, task = inputs.block, inputs.snapshots, inputs.times, self.task
    assert times is not None  # config.resolve rejects tasks about the future without a calendar
    codes = block.codes[:, self._column]
    if self._asked is not None:
      codes = np.where(self._asked(block), codes, ABSENT)
    return TaskLabels(label_future_values(block, snapshots, times, codes, task.top, task.horizon_days))
