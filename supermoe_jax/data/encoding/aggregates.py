"""Computes point-in-time aggregates of users' histories, an optional input of every query token.

Shapes: N events of a block of users, S snapshots of all of them, A aggregates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.encoding.histories import UserBlock, counts_before


@dataclasses.dataclass(frozen=True)
class Aggregator:
  """Calculator of aggregates of a user's events strictly before a snapshot's time τ.

  For each trailing window and the whole history: log1p of the number of events of each source, of distinct event times,
  and of occurrences of the most frequent values of the chosen fields; the mean of each numeric field. For the whole
  history only: log1p hours since the last and the first event, and log1p of the number of distinct values of each
  chosen field.
  """

  windows_days: tuple[float, ...]
  sources: tuple[str, ...]
  numeric: Mapping[str, int]  # field → its column in `numeric`
  values: Mapping[str, tuple[int, tuple[str, ...]]]  # field → its column in `codes`, its counted values

  @property
  def names(self) -> list[str]:
    """Returns the names of the A aggregates."""
    windows = [*(f"{d:g}d" for d in self.windows_days), "all"]
    names = [f"events {s} {w}" for w in windows for s in self.sources] + [f"moments {w}" for w in windows]
    names += [f"mean {n} {w}" for w in windows for n in self.numeric]
    for field, (_, values) in self.values.items():
      names += [f"{field} {v} {w}" for w in windows for v in values] + [f"distinct {field}"]
    return [*names, "recency", "tenure"]

  def __call__(self, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    """Returns the aggregates of snapshots, float32 `[S, A]`.

    Args:
      block: the histories of users.
      user: `[S]`, the snapshot's user in the block.
      time: `[S]`, microseconds since 1970 UTC.
      n_events: `[S]`, the number of visible events, at least one.
    """
    first = block.offsets[user]
    starts = [block.before(user, time - int(d * MICROSECONDS_PER_DAY)) for d in self.windows_days]
    # The events of window w of snapshot s are [bounds[w, s], bounds[-1, s]) of the block.
    bounds = first + np.stack([*(np.minimum(s, n_events) for s in starts), np.zeros_like(n_events), n_events])

    def windowed(before: np.ndarray) -> np.ndarray:  # sums over the events before each bound → [S, windows, X]
      return np.swapaxes(before[-1] - before[:-1], 0, 1)

    def flat(x: np.ndarray) -> np.ndarray:
      return x.reshape(len(time), x.shape[1] * x.shape[2])

    n = len(block.time)
    per_source = np.zeros((n + 1, len(self.sources)), np.int64)
    per_source[np.arange(1, n + 1), block.source] = 1
    begins = np.diff(block.time, prepend=0) != 0  # an event at another time than the one before
    begins[block.offsets[:-1]] = True
    columns = [
      flat(np.log1p(windowed(np.cumsum(per_source, axis=0)[bounds]))),
      flat(np.log1p(windowed(_count(begins)[bounds][..., None]))),
    ]
    numeric = block.numeric[:, list(self.numeric.values())]
    present = np.isfinite(numeric)
    total = _sums_before(block, np.where(present, numeric, 0.0), bounds, first)
    count = np.concatenate([np.zeros((1, numeric.shape[1]), np.int64), np.cumsum(present, axis=0)])
    columns.append(flat(windowed(total) / np.maximum(windowed(count[bounds]), 1)))
    for column, values in self.values.values():
      codes = block.codes[:, column]
      columns.append(flat(np.log1p(windowed(counts_before(codes, len(values), bounds)))))
      new = np.zeros(n, bool)  # the user's first event with this value
      new[np.unique(block.owner * (int(codes.max(initial=0)) + 1) + codes, return_index=True)[1]] = True
      distinct = _count(new & (codes > 0))
      columns.append(np.log1p(distinct[bounds[-1]] - distinct[first])[:, None])
    hour = MICROSECONDS_PER_DAY / 24
    columns.append(np.log1p((time - block.time[bounds[-1] - 1]) / hour)[:, None])
    columns.append(np.log1p((time - block.time[first]) / hour)[:, None])
    return np.concatenate(columns, axis=1).astype(np.float32)


def _count(which: np.ndarray) -> np.ndarray:
  """Returns the number of true values before each position: bool `[N]` → int64 `[N + 1]`."""
  return np.append(0, np.cumsum(which))


def _sums_before(block: UserBlock, x: np.ndarray, bounds: np.ndarray, first: np.ndarray) -> np.ndarray:
  """Returns the sums of a user's rows of `x [N, X]` before each bound: float64 `[…, S, X]`.

  The sums start at 0 for each user, so that a huge number of one user causes no rounding for another.
  """
  sums = np.zeros((len(x) + 1, x.shape[1]))
  if x.shape[1]:
    x = x.astype(np.float64)
    for start, stop in zip(block.offsets[:-1].tolist(), block.offsets[1:].tolist()):
      np.cumsum(x[start:stop], axis=0, out=sums[start + 1 : stop + 1])
  return np.where((bounds > first)[..., None], sums[bounds], 0.0)
