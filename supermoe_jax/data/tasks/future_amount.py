"""Makes the labels of the task kind `future_amount`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.numeric import Numeric
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.tasks.event_condition import event_condition
from supermoe_jax.data.tasks.kind import TaskKind
from supermoe_jax.data.tasks.labels import LabelInputs, Labels, TaskLabels, future_window
from supermoe_jax.data.tasks.listing import where

_WORDS = {
  "sum": "sum of {field} over the events",
  "mean": "mean of {field} over the events",
  "max": "maximum of {field} over the events",
  "count": "number of events",
  "moments": "number of moments with events",
}


def amounts_between(values: np.ndarray, start: np.ndarray, stop: np.ndarray, of: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the amount of the events [start, stop) and their number, float64 and int64 `[S]`.

  `values [N]` are the events' numbers, NaN for events that do not count. Without an event the amount is 0. A window's
  amount does not depend on events outside of it, not even in its last bits.
  """
  counts = np.append(0, np.cumsum(np.isfinite(values)))
  number = counts[stop] - counts[start]
  if of in ("count", "moments"):
    return number.astype(np.float64), number
  add = np.maximum if of == "max" else np.add
  neutral = -np.inf if of == "max" else 0.0
  filled = np.append(np.where(np.isfinite(values), values, neutral), neutral)
  pairs = np.stack([start, np.maximum(stop, start)], axis=1).reshape(-1)
  total = add.reduceat(filled, pairs)[::2] if len(start) else np.zeros(0)
  if of == "mean":
    total = total / np.maximum(number, 1)
  return np.where(number > 0, total, 0.0), number


def first_of_moments(block: UserBlock, asked: np.ndarray) -> np.ndarray:
  """Returns the first of the events `asked [N]` of each user and time: bool `[N]`."""
  events = np.flatnonzero(asked)
  new = (np.diff(block.time[events], prepend=-1) != 0) | (np.diff(block.owner[events], prepend=-1) != 0)
  out = np.zeros(len(asked), bool)
  out[events[new]] = True
  return out


class FutureAmountKind(TaskKind[config.FutureAmount]):
  """See `config.FutureAmount`."""

  def __init__(self, name: str, task: config.FutureAmount, data: config.Data, encoders: Encoders):
    """See `TaskKind`."""
    super().__init__(name, task, data, encoders)
    self._asked = event_condition(f"config.tasks.{name}", task.where, task.source, data, encoders)

  @classmethod
  def outputs(cls, name: str, task: config.FutureAmount, codes: Mapping[str, int], classes: Mapping[str, int]) -> int:
    """See `TaskKind`; a zero-inflated log-normal has three parameters."""
    return 3 if task.loss == "zero_inflated" else 1

  @classmethod
  def question(cls, task: config.FutureAmount) -> str:
    """See `TaskKind`."""
    what = _WORDS[task.of].format(field=task.field)
    of = f" of {task.source}" if task.source else ""
    return f"the {what}{of}{where(task.where)} within {task.horizon_days:g} days"

  def values(self, block: UserBlock) -> np.ndarray:
    """Returns the number that each event counts with: float64 `[N]`, NaN for events that do not count."""
    asked = np.ones(len(block.time), bool) if self._asked is None else self._asked(block)
    if self.task.of in ("count", "moments"):
      numbers = np.ones(len(block.time))
      if self.task.of == "moments":
        asked = first_of_moments(block, asked)
    else:
      encoder = self.encoders.numeric[self.task.field]
      assert isinstance(encoder, Numeric)  # config.resolve checked
      column = list(self.encoders.numeric).index(self.task.field)
      numbers = encoder.decode_all(block.numeric[:, column], self.data.fields[self.task.field].encoding)
    return np.where(asked, numbers, np.nan)

  def label(self, inputs: LabelInputs) -> TaskLabels:
    """See `TaskKind`; the mean and the maximum of no event are unknown."""
    block, task, times = inputs.block, self.task, inputs.times
    assert times is not None  # config.resolve rejects tasks about the future without a calendar
    start, stop, known = future_window(block, inputs.snapshots, times, task.horizon_days)
    amount, number = amounts_between(self.values(block), start, stop, task.of)
    if task.of in ("mean", "max"):
      known = known & (number > 0)
    return TaskLabels(Labels(np.where(known, amount, 0).astype(np.float32), known))

  def before(self, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    """Returns the amount of the last window before each moment, [time − horizon, time): float64 `[S]`.

    `user`, `time` and `n_events [S]` are the moments' users in the block, times in µs, and numbers of events before.
    """
    length = int(self.task.horizon_days * config.MICROSECONDS_PER_DAY)
    stop = block.offsets[user] + n_events
    start = np.minimum(block.offsets[user] + block.before(user, time - length), stop)
    return amounts_between(self.values(block), start, stop, self.task.of)[0]
