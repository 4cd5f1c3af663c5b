"""Snapshots of a user, and what is known and asked at each: labels and supervision indicators.

Everything here is a pure function of one user's history, and strictly point in time: a snapshot sees the events before
it and no other; its labels look at [τ, τ + horizon), or at the next event, only; a label that is not wholly observed
within the period of the snapshot's split is masked by its indicator, not guessed.

Shapes: N events of the user, S snapshots, F categorical and G numeric fields.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.events import UserHistory
from supermoe_jax.data.splits import SPLITS, TEST, TRAIN, VALIDATION, user_split
from supermoe_jax.data.vocabulary import ABSENT, UNKNOWN

__all__ = [
  "SPLITS",
  "TEST",
  "TRAIN",
  "VALIDATION",
  "Calendar",
  "Comparison",
  "EventAnswer",
  "Labels",
  "Snapshots",
  "at_events",
  "calendar",
  "cumulative_counts",
  "following_events",
  "future_event",
  "future_values",
  "iso",
  "leave_one_out_snapshots",
  "next_carrier",
  "next_event",
  "supervision",
  "temporal_snapshots",
  "user_label",
  "user_split",
]


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
    value: float32 `[S]` of 0 and 1 or standardised numbers, `[S, values]` of 0 and 1, or int32 `[S]` codes of a next
      event or indices of classes.
    known: bool `[S]`: there is a label, and it may be used in the snapshot's split.
  """

  value: np.ndarray
  known: np.ndarray


@dataclasses.dataclass(frozen=True)
class Calendar:
  """The times of a temporal split or of one by users, in microseconds since 1970 UTC.

  Attributes:
    snapshots: τ of each snapshot that all users share, ascending; `snapshots.user_snapshots` adds those of their own.
    split: the split of each; of a split by users TRAIN, in whose place every user's own comes.
    observed_until: for each split, the end of the period that its label windows must lie in.
  """

  snapshots: np.ndarray
  split: np.ndarray
  observed_until: tuple[int, int, int]


def calendar(split: config.Split, log_start: int, log_end: int) -> Calendar:
  """Lays out a temporal split, or one by users, over a log that starts and ends (exclusively) at these microseconds.

  Training snapshots lie `every_days` apart, counted back from the end of the training period, which is the end of the
  log where users are divided. With another policy than `calendar` they are each user's own and not among these.
  Validation windows end `gap_days` before the first test snapshot, so that choosing a model by validation uses nothing
  of the test period.

  Raises:
    ConfigError: a snapshot lies outside the log, or there is no room for a training snapshot.
  """
  if split.mode == "user":
    shared = _regular(split, log_start, log_end, f"the end of the log, {iso(log_end)},")
    return Calendar(shared, np.full(len(shared), TRAIN, np.int32), (log_end,) * 3)
  train_end = config.parse_time(split.train_end, "config.data.split.train_end")
  train = _regular(split, log_start, train_end, f"train_end={split.train_end}")
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
    (train_end, int(test.min()) - int(split.gap_days * MICROSECONDS_PER_DAY), log_end),
  )


def _regular(split: config.Split, log_start: int, end: int, end_text: str) -> np.ndarray:
  """The snapshots `every_days` apart, back from `end`; none where the policy is another one."""
  if split.snapshots != "calendar":
    return np.zeros(0, np.int64)
  step = int(split.every_days * MICROSECONDS_PER_DAY)
  first = (
    config.parse_time(split.train_start, "config.data.split.train_start") if split.train_start else log_start + step
  )
  found = np.arange(end - step, first - 1, -step, dtype=np.int64)[::-1]
  if not len(found):
    raise config.ConfigError(
      f"config.data.split: no training snapshot fits between {iso(first)} and {end_text} every "
      f"{split.every_days:g} days; lower every_days or set train_start earlier."
    )
  return found


def iso(microseconds: int) -> str:
  """Writes a time as ISO 8601 in UTC, to the second."""
  return str(np.datetime64(int(microseconds), "us").astype("datetime64[s]"))


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


def next_carrier(carried: np.ndarray) -> np.ndarray:
  """For each position n in 0…N, the index of the first event at or after n that carries a field; N if none.

  Shapes: `carried [N]` bool → int64 `[N + 1]`.
  """
  n = len(carried)
  index = np.where(carried, np.arange(n), n)
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
    at = next_carrier(codes > ABSENT)[snapshots.n_events]
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


@dataclasses.dataclass(frozen=True, eq=False)
class EventAnswer:
  """What an event label says of single events: yes or no, or the standardised number.

  Attributes:
    column: of the field, among the codes if `positive` is given, else among the numbers.
    positive: bool `[codes]`, the codes of the field that count as positive.
    at_least: the standardised number from which on a number counts as positive.
  """

  column: int
  positive: np.ndarray | None = None
  at_least: np.float32 | None = None

  def carried(self, history: UserHistory) -> np.ndarray:
    """Whether each event has the field: bool `[N]`."""
    if self.positive is not None:
      return history.codes[:, self.column] > ABSENT
    return np.isfinite(history.numeric[:, self.column])

  def __call__(self, history: UserHistory) -> Labels:
    """The labels of all events, `[N]`; unknown where the field is absent, or its value out of vocabulary."""
    if self.positive is not None:
      codes = history.codes[:, self.column]
      return Labels(self.positive[codes].astype(np.float32), codes > UNKNOWN)
    number, known = history.numeric[:, self.column], self.carried(history)
    value = number if self.at_least is None else number >= self.at_least
    return Labels(np.where(known, value, 0).astype(np.float32), known)


def following_events(
  carried: np.ndarray, history: UserHistory, snapshots: Snapshots, per_snapshot: int, times: Calendar | None
) -> np.ndarray:
  """The next events that carry a field; without a calendar (leave one out) the very next event only, if it does.

  They lie in the period of the snapshot's split, as for `next_event`.

  Shapes: `carried [N]` → int32 `[S, per_snapshot]`, indices of events; -1 none.
  """
  n = len(history.time)
  out = np.full((len(snapshots.time), per_snapshot), -1, np.int32)
  if times is None:
    limit = np.where(snapshots.split == TRAIN, history.n_train, n)
    at = snapshots.n_events.astype(np.int64)
    out[:, 0] = np.where((at < limit) & carried[np.minimum(at, n - 1)], at, -1)
    return out
  limit = np.searchsorted(history.time, times.observed_until, side="left")[snapshots.split]
  carriers = np.flatnonzero(carried)
  place = np.searchsorted(carriers, snapshots.n_events)[:, None] + np.arange(per_snapshot)
  event = np.append(carriers, n)[np.minimum(place, len(carriers))]
  return np.where(event < limit[:, None], event, -1).astype(np.int32)


def at_events(labels: Labels, event: np.ndarray) -> Labels:
  """Gathers the labels `[N]` of a user's events at the indices `event [...]`; -1 is unknown."""
  known = (event >= 0) & labels.known[np.maximum(event, 0)]
  return Labels(np.where(known, labels.value[np.maximum(event, 0)], 0), known)


class Comparison(NamedTuple):
  """A sample space, its number in the units of the label that is compared.

  Attributes:
    task: whose label is compared.
    operator: one of `==`, `!=`, `<`, `<=`, `>`, `>=`.
    number: what with.
    classes: float32 `[classes]`, the number that each class stands for; None where the label is compared itself.
  """

  task: str
  operator: str
  number: float
  classes: np.ndarray | None = None

  def __call__(self, other: Labels) -> Labels:
    """Whether samples lie in the space, bool, from the labels of the task that is compared at the same samples."""
    value = other.value if self.classes is None else self.classes[other.value.astype(np.int64)]
    return Labels(_OPERATORS[self.operator](value, np.float32(self.number)), other.known)


_OPERATORS = {
  "==": np.equal,
  "!=": np.not_equal,
  "<": np.less,
  "<=": np.less_equal,
  ">": np.greater,
  ">=": np.greater_equal,
}


def supervision(
  known: np.ndarray, inside: Labels | None, weights: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
  """The supervision indicators δ (bool) and the sample weights ω (float32) of samples; all arrays have one shape.

  Args:
    known: whether there is a label.
    inside: whether the sample lies in the task's sample space, where that is known; None without a space, when every
      sample lies inside.
    weights: of the samples inside and outside; where it is 0, or the membership unknown, the sample is left out.
  """
  if inside is None:
    return known, known * np.float32(weights[0])
  weight = (known & inside.known) * np.where(inside.value, *weights)
  return weight > 0, weight.astype(np.float32)
