"""Makes the labels of the task kind `future_event`."""

from __future__ import annotations

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.data.tasks.kind import TaskKind
from supermoe_jax.data.tasks.labels import LabelInputs, Labels, Snapshots, TaskLabels, future_window


def label_future_event(
  block: UserBlock, snapshots: Snapshots, times: Calendar, source: int, days: float, negate: bool
) -> Labels:
  """Returns whether an event of `source` happens in [τ, τ + days); with `negate`, whether none happens."""
  start, stop, known = future_window(block, snapshots, times, days)
  count = np.append(0, np.cumsum(block.source == source))
  happens = count[stop] > count[start]
  return Labels((happens != negate).astype(np.float32), known)


class FutureEventKind(TaskKind[config.FutureEvent]):
  """See `config.FutureEvent`."""

  @classmethod
  def question(cls, task: config.FutureEvent) -> str:
    """See `TaskKind`."""
    return f"{'no' if task.negate else 'any'} event of {task.source} within {task.horizon_days:g} days"

  def label(self, inputs: LabelInputs) -> TaskLabels:
    """See `TaskKind`."""
    block, snapshots, times, task = inputs.block, inputs.snapshots, inputs.times, self.task
    assert times is not None  # config.resolve rejects tasks about the future without a calendar
    source = list(self.data.sources).index(task.source)
    return TaskLabels(label_future_event(block, snapshots, times, source, task.horizon_days, task.negate))
