"""Point-in-time aggregates of a user's history: an optional input of every query token.

Shapes: N events of the user, S snapshots, A aggregates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.events import UserHistory
from supermoe_jax.data.vocabulary import FIRST_VALUE


@dataclasses.dataclass(frozen=True)
class Aggregator:
  """Point-in-time counts of a user, strictly before τ.

  Of every trailing window and of the whole history: log1p of the events of each source, of the distinct event times,
  and of the most frequent values of the chosen fields; the mean of each numeric field. Besides: log1p hours since the
  last and since the first event, and log1p of the distinct values of each chosen field.
  """

  windows_days: tuple[float, ...]
  sources: tuple[str, ...]
  numeric: Mapping[str, int]  # field → its column in `numeric`
  values: Mapping[str, tuple[int, tuple[str, ...]]]  # field → its column in `codes`, its counted values

  @property
  def names(self) -> list[str]:
    """What each of the A aggregates is."""
    windows = [*(f"{d:g}d" for d in self.windows_days), "all"]
    names = [f"events {s} {w}" for w in windows for s in self.sources] + [f"moments {w}" for w in windows]
    names += [f"mean {n} {w}" for w in windows for n in self.numeric]
    for field, (_, values) in self.values.items():
      names += [f"{field} {v} {w}" for w in windows for v in values] + [f"distinct {field}"]
    return [*names, "recency", "tenure"]

  def __call__(self, history: UserHistory, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    """Returns float32 `[S, A]` for the snapshots at `time [S]` that see `n_events [S]` (at least one) events."""
    starts = [
      np.searchsorted(history.time, time - int(d * MICROSECONDS_PER_DAY), side="left") for d in self.windows_days
    ]
    # The events of window w of snapshot s are [bounds[w, s], bounds[-1, s]).
    bounds = np.stack([*(np.minimum(s, n_events) for s in starts), np.zeros_like(n_events), n_events])

    def windowed(before: np.ndarray) -> np.ndarray:  # sums over the events before each bound → [S, windows, X]
      return np.swapaxes(before[-1] - before[:-1], 0, 1)

    def flat(x: np.ndarray) -> np.ndarray:
      return x.reshape(len(time), x.shape[1] * x.shape[2])

    n = len(history.time)
    per_source = np.zeros((n + 1, len(self.sources)), np.int64)
    per_source[np.arange(1, n + 1), history.source] = 1
    moments = np.append(0, np.cumsum(np.diff(history.time, prepend=history.time[0] - 1) > 0))
    columns = [
      flat(np.log1p(windowed(np.cumsum(per_source, axis=0)[bounds]))),
      flat(np.log1p(windowed(moments[bounds][..., None]))),
    ]
    numeric = history.numeric[:, list(self.numeric.values())]
    present = np.isfinite(numeric)
    total = _running_sum(np.where(present, numeric, 0.0))
    count = _running_sum(present)
    columns.append(flat(windowed(total[bounds]) / np.maximum(windowed(count[bounds]), 1)))
    for column, values in self.values.values():
      codes = history.codes[:, column]
      columns.append(flat(np.log1p(windowed(_counts_before(codes, len(values), bounds)))))
      value, first = np.unique(codes, return_index=True)
      columns.append(np.log1p(np.searchsorted(np.sort(first[value > 0]), n_events))[:, None])
    hour = MICROSECONDS_PER_DAY / 24
    columns.append(np.log1p((time - history.time[n_events - 1]) / hour)[:, None])
    columns.append(np.log1p((time - history.time[0]) / hour)[:, None])
    return np.concatenate(columns, axis=1).astype(np.float32)


def _counts_before(codes: np.ndarray, top: int, bounds: np.ndarray) -> np.ndarray:
  """How often the codes 2 … top + 1 occur among the events before each bound: int64 `[…, top]` of bounds `[…]`."""
  distinct, place = np.unique(bounds, return_inverse=True)
  chosen = np.flatnonzero((codes >= FIRST_VALUE) & (codes < top + FIRST_VALUE))
  first = np.searchsorted(distinct, chosen, side="right")  # the first bound that each event lies before
  cells = np.bincount(first * top + codes[chosen] - FIRST_VALUE, minlength=(len(distinct) + 1) * top)
  return np.cumsum(cells.reshape(len(distinct) + 1, top)[:-1], axis=0)[place.reshape(bounds.shape)]


def _running_sum(x: np.ndarray) -> np.ndarray:
  return np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(x, axis=0, dtype=np.float64)])
