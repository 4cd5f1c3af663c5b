"""Makes the labels of the task kind `future_event`."""

from __future__ import annotations

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.data.tasks.event_condition import event_condition
from supermoe_jax.data.tasks.kind import TaskKind
from supermoe_jax.data.tasks.labels import LabelInputs, Labels, Snapshots, TaskLabels, future_window
from supermoe_jax.data.tasks.listing import where


def label_future_event(
  block: UserBlock, snapshots: Snapshots, times: Calendar, asked: np.ndarray, days: float, negate: bool
) -> Labels:
  """Returns whether an event with `asked [N]` happens in [τ, τ + days); with `negate`, whether none happens."""
  start, stop, known = future_window(block, snapshots, times, days)
  count = np.append(0, np.cumsum(asked))
  happens = count[stop] > count[start]
  return Labels((happens != negate).astype(np.float32), known)


class FutureEventKind(TaskKind[config.FutureEvent]):
  """See `config.FutureEvent`."""

  def __init__(self, name: str, task: config.FutureEvent, data: config.Data, encoders: Encoders):
    """See `TaskKind`."""
    super().__init__(name, task, data, encoders)
    self._asked = event_condition(f"config.tasks.{name}", task.where, task.source, data, encoders)

  @classmethod
  def question(cls, task: config.FutureEvent) -> str:
    """See `TaskKind`."""
    of = f" of {task.source}" if task.source else ""
    return f"{'no' if task.negate else 'any'} event{of}{where(task.where)} within {task.horizon_days:g} days"

  def label(self, inputs: LabelInputs) -> TaskLabels:
    """See `TaskKind`."""
    block, task, times = inputs.block, self.task, inputs.times
    assert times is not None  # config.resolve rejects tasks about the future without a calendar
    asked = np.ones(len(block.time), bool) if self._asked is None else self._asked(block)
    return TaskLabels(label_future_event(block, inputs.snapshots, times, asked, task.horizon_days, task.negate))
