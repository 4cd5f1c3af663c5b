"""Makes the labels of the task kind `time_to_event`, and predicts them from a user's own gaps.

A label is a time that may be censored: `(days, observed)`, two float32. With `observed` 1 the event happens after these
days. With 0 none happened within them, and nothing is known about later. The intervals of these times are in
`data.encoding.censored_times`.

Shapes: N events of a block, S snapshots.
"""

from __future__ import annotations

import numpy as np

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.tasks.event_condition import event_condition
from supermoe_jax.data.tasks.future_amount import first_of_moments
from supermoe_jax.data.tasks.kind import TaskKind
from supermoe_jax.data.tasks.labels import LabelInputs, Labels, TaskLabels, first_unseen, next_carrier
from supermoe_jax.data.tasks.listing import where


class TimeToEventKind(TaskKind[config.TimeToEvent]):
  """See `config.TimeToEvent`."""

  def __init__(self, name: str, task: config.TimeToEvent, data: config.Data, encoders: Encoders):
    """See `TaskKind`."""
    super().__init__(name, task, data, encoders)
    self._condition = event_condition(f"config.tasks.{name}", task.where, task.source, data, encoders)

  @classmethod
  def outputs(cls, name: str, task: config.TimeToEvent, codes: object, classes: object) -> int:
    """See `TaskKind`; a hazard for each interval."""
    return len(task.edges)

  @classmethod
  def question(cls, task: config.TimeToEvent) -> str:
    """See `TaskKind`."""
    of = f" of {task.source}" if task.source else ""
    return f"the days until the next event{of}{where(task.where)}, up to {task.horizon_days:g} days"

  def _asked(self, block: UserBlock) -> np.ndarray:
    return np.ones(len(block.time), bool) if self._condition is None else self._condition(block)

  def label(self, inputs: LabelInputs) -> TaskLabels:
    """See `TaskKind`; an interval that the period does not wholly hold counts for nothing."""
    block, snapshots, times = inputs.block, inputs.snapshots, inputs.times
    assert times is not None  # config.resolve rejects tasks about the future without a calendar
    ends = np.array([int(edge * MICROSECONDS_PER_DAY) for edge in (0.0, *self.task.edges)])
    left = np.array(times.observed_until)[snapshots.split] - snapshots.time
    followed = np.maximum(np.searchsorted(ends, left, side="right") - 1, 0)  # intervals that lie within the period
    event = next_carrier(self._asked(block))[first_unseen(block, snapshots)]
    time = np.append(block.time, 0)[event] - snapshots.time
    observed = (event < block.offsets[snapshots.user + 1]) & (time < ends[followed])
    days = np.where(observed, time / MICROSECONDS_PER_DAY, np.array([0.0, *self.task.edges])[followed])
    known = followed > 0
    value = np.where(known[:, None], np.stack([days, observed], axis=1), 0)
    return TaskLabels(Labels(value.astype(np.float32), known))

  def by_own_gaps(self, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    """Returns the days to the next event by a user's mean gap between its events so far: float64 `[S]`.

    It is the longer of the mean gap and the time since the last event: a user who is overdue stays away for as long
    again. A user with one event has that time alone, and a user with none has the horizon, which no answer exceeds.
    Events at one moment count once. `user`, `time` and `n_events [S]` are the moments' users in the block, times in µs,
    and numbers of events before.
    """
    moments = first_of_moments(block, self._asked(block))
    place, count = np.arange(len(moments)), np.append(0, np.cumsum(moments))
    first, stop = block.offsets[user], block.offsets[user] + n_events
    number = count[stop] - count[first]
    # The last of the moments before each place, and the first at or after it; they count where there is one.
    last = np.append(0, np.maximum.accumulate(np.where(moments, place, 0)))[stop]
    start = np.minimum(next_carrier(moments)[first], len(moments) - 1)
    gap = (block.time[last] - block.time[start]) / np.maximum(number - 1, 1)
    days = np.maximum(gap, time - block.time[last]) / MICROSECONDS_PER_DAY
    return np.where(number > 0, np.minimum(days, self.task.horizon_days), self.task.horizon_days)
