"""Snapshots of a user, and what is known and asked at each: labels, supervision indicators, aggregates.

Everything here is a pure function of one user's history, and strictly point in time: a snapshot sees the events before
it and no other; its labels look at [τ, τ + horizon), or at the next event, only; a label that is not wholly observed
within the period of the snapshot's split is masked by its indicator, not guessed.

Shapes: N events of the user, S snapshots, F categorical and G numeric fields, A aggregates.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.events import UserHistory

TRAIN, VALIDATION, TEST = 0, 1, 2
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


class Snapshots(NamedTuple):
  """The moments at which a user is looked at.

  Attributes:
    time: int64 `[S]`, τ in microseconds since 1970 UTC.
    n_events: int32 `[S]`, how many of the user's events are visible.
    split: int32 `[S]`, TRAIN, VALIDATION or TEST.
  """

  time: np.ndarray
  n_events: np.ndarray
  split: np.ndarray


class Labels(NamedTuple):
  """A task's answers at S snapshots.

  Attributes:
    value: float32 `[S]` or `[S, values]` of 0 and 1, or int32 `[S]` codes for a next event.
    known: bool `[S]`, the supervision indicator δ: there is a label, and it may be used in the snapshot's split.
  """

  value: np.ndarray
  known: np.ndarray


@dataclasses.dataclass(frozen=True)
class Calendar:
  """The times of a temporal split, in microseconds since 1970 UTC.

  Attributes:
    snapshots: τ of each snapshot, ascending.
    split: the split of each.
    observed_until: for each split, the end of the period that its label windows must lie in.
  """

  snapshots: np.ndarray
  split: np.ndarray
  observed_until: tuple[int, int, int]


def calendar(split: config.Split, log_start: int, log_end: int) -> Calendar:
  """Lays out a temporal split over a log that starts and ends (exclusively) at these microseconds.

  Training snapshots lie `every_days` apart, counted back from the end of the training period. Validation windows end
  at the first test snapshot, so that choosing a model by validation uses nothing of the test period.

  Raises:
    ConfigError: a snapshot lies outside the log, or there is no room for a training snapshot.
  """
  train_end = config.parse_time(split.train_end, "config.data.split.train_end")
  step = int(split.every_days * MICROSECONDS_PER_DAY)
  first = (
    config.parse_time(split.train_start, "config.data.split.train_start") if split.train_start else log_start + step
  )
  train = np.arange(train_end - step, first - 1, -step, dtype=np.int64)[::-1]
  if not len(train):
    raise config.ConfigError(
      f"config.data.split: no training snapshot fits between {iso(first)} and train_end={split.train_end} every "
      f"{split.every_days:g} days; lower every_days or set train_start earlier."
    )
  validation, test = (
    np.array([config.parse_time(t, f"config.data.split.{k}") for t in getattr(split, k)], np.int64)
    for k in ("validation", "test")
  )
  for text, time in zip((*split.validation, *split.test), (*validation, *test)):
    if not log_start < time <= log_end:
      raise config.ConfigError(
        f"config.data.split: the snapshot {text} lies outside the log, which runs from {iso(log_start)} to "
        f"{iso(log_end)}."
      )
  validation, test = np.sort(validation), np.sort(test)
  return Calendar(
    np.concatenate([train, validation, test]),
    np.repeat(np.array([TRAIN, VALIDATION, TEST], np.int32), [len(train), len(validation), len(test)]),
    (train_end, int(test.min()), log_end),
  )


def iso(microseconds: int) -> str:
  """Writes a time as ISO 8601 in UTC, to the second."""
  return str(np.datetime64(int(microseconds), "us").astype("datetime64[s]"))


def user_split(user: str, split: config.Split) -> int:
  """Assigns a user to TRAIN, VALIDATION or TEST for user labels, by a hash that is the same everywhere."""
  share = int.from_bytes(hashlib.md5(user.encode()).digest()[:8], "little") / 2**64
  if share < split.user_test:
    return TEST
  return VALIDATION if share < split.user_test + split.user_validation else TRAIN


def temporal_snapshots(history: UserHistory, times: Calendar, min_events: int) -> tuple[Snapshots, int]:
  """Returns the user's snapshots, and how many were left out for fewer than `min_events` events before them."""
  n_events = np.searchsorted(history.time, times.snapshots, side="left").astype(np.int32)
  enough = n_events >= min_events
  return Snapshots(times.snapshots[enough], n_events[enough], times.split[enough]), int(np.sum(~enough))


def leave_one_out_snapshots(history: UserHistory, min_events: int) -> tuple[Snapshots, int]:
  """Returns a snapshot before each event (the last is for test, the last but one for validation), and how many are left
  out.

  A snapshot's τ is the time of the last event it sees, so that not even the time of the next event is known. Users with
  fewer than three events have training snapshots only.
  """
  n = len(history.time)
  n_events = np.arange(min_events, n, dtype=np.int32)
  split = np.full(len(n_events), TRAIN, np.int32)
  if n >= 3:
    split[n_events == n - 2] = VALIDATION
    split[n_events == n - 1] = TEST
  return Snapshots(history.time[n_events - 1], n_events, split), min(n, min_events) - 1


def next_code(codes: np.ndarray) -> np.ndarray:
  """For each position n in 0…N, the index of the first event at or after n whose code is present; N if none.

  Shapes: `codes [N]` → int64 `[N + 1]`.
  """
  n = len(codes)
  index = np.where(codes > 0, np.arange(n), n)
  return np.append(np.minimum.accumulate(index[::-1])[::-1], n)


def next_event(history: UserHistory, snapshots: Snapshots, field: int, times: Calendar | None) -> Labels:
  """The code of the next event that carries the field; without a calendar (leave one out) of the very next event, or
  none.

  The answer must itself lie in the period of the snapshot's split: of training in the training period, of validation
  before the first test snapshot.
  """
  codes = history.codes[:, field]
  n = len(codes)
  if times is None:
    at = snapshots.n_events.astype(np.int64)
    limit = np.where(snapshots.split == TRAIN, history.n_train, n)
  else:
    at = next_code(codes)[snapshots.n_events]
    limit = np.searchsorted(history.time, times.observed_until, side="left")[snapshots.split]
  known = at < limit
  value = np.where(known, codes[np.minimum(at, n - 1)], 0)
  return Labels(value.astype(np.int32), known & (value > 0))


def _window(history: UserHistory, snapshots: Snapshots, times: Calendar, days: float) -> tuple[np.ndarray, np.ndarray]:
  end = snapshots.time + int(days * MICROSECONDS_PER_DAY)
  known = end <= np.array(times.observed_until)[snapshots.split]
  return np.searchsorted(history.time, end, side="left"), known


def future_event(
  history: UserHistory, snapshots: Snapshots, times: Calendar, source: int, days: float, negate: bool
) -> Labels:
  """Whether an event of `source` happens in [τ, τ + days); with `negate`, whether none does."""
  stop, known = _window(history, snapshots, times, days)
  count = np.append(0, np.cumsum(history.source == source))
  happens = count[stop] > count[snapshots.n_events]
  return Labels((happens != negate).astype(np.float32), known)


def future_values(
  history: UserHistory, snapshots: Snapshots, times: Calendar, field: int, top: int, days: float
) -> Labels:
  """Which of the `top` most frequent values of the field (codes 2 … top + 1) occur in [τ, τ + days)."""
  stop, known = _window(history, snapshots, times, days)
  count = cumulative_counts(history.codes[:, field], top)
  return Labels((count[stop] > count[snapshots.n_events]).astype(np.float32), known)


def user_label(value: float | None, snapshots: Snapshots, split_of_user: int) -> Labels:
  """A label of the user, used only at the snapshots of the split that the user belongs to."""
  known = (snapshots.split == split_of_user) & (value is not None)
  return Labels(np.full(len(snapshots.time), value or 0.0, np.float32), known)


def cumulative_counts(codes: np.ndarray, top: int) -> np.ndarray:
  """Counts of the codes 2 … top + 1 among the first n events, for n in 0…N: int32 `[N + 1, top]`."""
  count = np.zeros((len(codes) + 1, top), np.int32)
  chosen = np.flatnonzero((codes >= 2) & (codes < top + 2))
  count[chosen + 1, codes[chosen] - 2] = 1
  return np.cumsum(count, axis=0, out=count)


@dataclasses.dataclass(frozen=True)
class Aggregator:
  """Point-in-time counts of a user, strictly before τ.

  Of every trailing window and of the whole history: log1p of the events of each source, of the distinct event times,
  and of the most frequent values of the chosen fields; the mean of each numeric field. Besides: log1p hours since the
  last and since the first event, and log1p of the distinct values of each chosen field.
  """

  windows_days: tuple[float, ...]
  sources: tuple[str, ...]
  numeric: tuple[str, ...]
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
    starts = [np.minimum(s, n_events) for s in starts] + [np.zeros_like(n_events)]

    def windowed(cumulative: np.ndarray) -> np.ndarray:  # [N + 1, X] → [S, windows, X]
      return np.stack([cumulative[n_events] - cumulative[s] for s in starts], axis=1)

    def flat(x: np.ndarray) -> np.ndarray:
      return x.reshape(len(time), x.shape[1] * x.shape[2])

    n = len(history.time)
    per_source = np.zeros((n + 1, len(self.sources)), np.int64)
    per_source[np.arange(1, n + 1), history.source] = 1
    moments = np.append(0, np.cumsum(np.diff(history.time, prepend=history.time[0] - 1) > 0))
    columns = [flat(np.log1p(windowed(np.cumsum(per_source, axis=0)))), flat(np.log1p(windowed(moments[:, None])))]
    present = np.isfinite(history.numeric)
    total = _running_sum(np.where(present, history.numeric, 0.0))
    count = _running_sum(present)
    columns.append(flat(windowed(total) / np.maximum(windowed(count), 1)))
    for column, values in self.values.values():
      codes = history.codes[:, column]
      columns.append(flat(np.log1p(windowed(cumulative_counts(codes, len(values))))))
      first = np.zeros(n + 1, np.int64)
      value, index = np.unique(codes, return_index=True)
      first[index[value > 0] + 1] = 1
      columns.append(np.log1p(np.cumsum(first)[n_events])[:, None])
    hour = MICROSECONDS_PER_DAY / 24
    columns.append(np.log1p((time - history.time[n_events - 1]) / hour)[:, None])
    columns.append(np.log1p((time - history.time[0]) / hour)[:, None])
    return np.concatenate(columns, axis=1).astype(np.float32)


def _running_sum(x: np.ndarray) -> np.ndarray:
  return np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(x, axis=0, dtype=np.float64)])
