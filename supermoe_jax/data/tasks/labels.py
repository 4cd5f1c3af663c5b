"""Snapshots of a user, and what is known and asked at each: labels and supervision indicators.

Everything here is a pure function of each user's history, worked out for a block of users at once, and strictly point
in time: a snapshot sees the events before it and no other; its labels look at [τ, τ + horizon), or at the next event,
only; a label that is not wholly observed within the period of the snapshot's split is masked by its indicator, not
guessed.

Shapes: U users, N events of all of them, S snapshots of all of them, F categorical and G numeric fields.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY, format_time
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory, counts_before
from supermoe_jax.data.encoding.splits import TEST, TRAIN, VALIDATION
from supermoe_jax.data.encoding.vocabulary import ABSENT, UNKNOWN
from supermoe_jax.errors import ConfigError


class Snapshots(NamedTuple):
  """The moments at which users are looked at, the users of a block in order.

  Attributes:
    user: int64 `[S]`, the index of the user in the block, ascending.
    time: int64 `[S]`, τ in microseconds since 1970 UTC.
    n_events: int32 `[S]`, how many of the user's events are visible.
    split: int32 `[S]`, TRAIN, VALIDATION or TEST.
  """

  user: np.ndarray
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
    shared = _regular(split, log_start, log_end, f"the end of the log, {format_time(log_end)},")
    return Calendar(shared, np.full(len(shared), TRAIN, np.int32), (log_end,) * 3)
  train_end = config.parse_time(split.train_end, "config.data.split.train_end")
  train = _regular(split, log_start, train_end, f"train_end={split.train_end}")
  validation, test = (
    np.array([config.parse_time(t, f"config.data.split.{k}") for t in getattr(split, k)], np.int64)
    for k in ("validation", "test")
  )
  for text, time in zip((*split.validation, *split.test), (*validation, *test)):
    if not log_start < time <= log_end:
      raise ConfigError(
        f"config.data.split: the snapshot {text} lies outside the log, which runs from {format_time(log_start)} to "
        f"{format_time(log_end)}."
      )
  validation, test = np.sort(validation), np.sort(test)
  return Calendar(
    np.concatenate([train, validation, test]),
    np.repeat(np.array([TRAIN, VALIDATION, TEST], np.int32), [len(train), len(validation), len(test)]),
    (train_end, int(test.min()) - int(split.gap_days * MICROSECONDS_PER_DAY), log_end),
  )


def log_end(split: config.Split, last: int) -> int:
  """The microsecond up to which a log is complete whose last event is at `last`; users' own snapshots may follow it at
  once."""
  if split.log_end:
    return config.parse_time(split.log_end, "config.data.split.log_end")
  return last + 1 if split.mode == "user" else last


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
    raise ConfigError(
      f"config.data.split: no training snapshot fits between {format_time(first)} and {end_text} every "
      f"{split.every_days:g} days; lower every_days or set train_start earlier."
    )
  return found


def temporal_snapshots(block: UserBlock, times: Calendar) -> Snapshots:
  """The calendar's snapshots of every user, also those that see no event."""
  users, n = len(block.users), len(times.snapshots)
  user, time = np.repeat(np.arange(users), n), np.tile(times.snapshots, users)
  return Snapshots(user, time, block.before(user, time).astype(np.int32), np.tile(times.split, users))


def leave_one_out_snapshots(block: UserBlock, min_events: int) -> tuple[Snapshots, int]:
  """Returns a snapshot before each event (the last is for test, the last but one for validation), and how many are left
  out for fewer than `min_events` events before them.

  A snapshot's τ is the time of the last event it sees, so that not even the time of the next event is known. Users with
  fewer than three events have training snapshots only.
  """
  lengths = block.lengths
  n_events = np.arange(len(block.time)) - block.offsets[block.owner]
  event = np.flatnonzero(n_events >= min_events)
  user, n_events = block.owner[event], n_events[event]
  left, enough = lengths[user] - n_events, lengths[user] >= 3
  split = np.where(enough & (left == 1), TEST, np.where(enough & (left == 2), VALIDATION, TRAIN))
  too_early = int(np.sum(np.minimum(lengths, min_events) - 1))
  return Snapshots(user, block.time[event - 1], n_events.astype(np.int32), split.astype(np.int32)), too_early


def next_carrier(carried: np.ndarray) -> np.ndarray:
  """For each position n in 0…N, the index of the first event at or after n that carries a field; N if none.

  Shapes: `carried [N]` bool → int64 `[N + 1]`.
  """
  n = len(carried)
  index = np.where(carried, np.arange(n), n)
  return np.append(np.minimum.accumulate(index[::-1])[::-1], n)


def _limit(block: UserBlock, snapshots: Snapshots, times: Calendar | None) -> np.ndarray:
  """The place in the block up to which the answers of each snapshot may lie: int64 `[S]`.

  An answer must itself lie in the period of the snapshot's split: of training in the training period, of validation
  before the first test snapshot.
  """
  user = snapshots.user
  if times is None:
    within = np.where(snapshots.split == TRAIN, block.n_train[user], block.lengths[user])
  else:
    within = block.before(user, np.array(times.observed_until)[snapshots.split])
  return block.offsets[user] + within


def _start(block: UserBlock, snapshots: Snapshots) -> np.ndarray:
  """The place in the block of the first event that each snapshot does not see: int64 `[S]`."""
  return block.offsets[snapshots.user] + snapshots.n_events


def next_event(block: UserBlock, snapshots: Snapshots, field: int, times: Calendar | None) -> Labels:
  """The code of the next event that carries the field; without a calendar (leave one out) of the very next event, or
  none. It must lie in the period of the snapshot's split."""
  codes = block.codes[:, field]
  at = _start(block, snapshots)
  if times is not None:
    at = next_carrier(codes > ABSENT)[at]
  known = at < _limit(block, snapshots, times)
  value = np.where(known, codes[np.minimum(at, len(codes) - 1)], 0)
  return Labels(value.astype(np.int32), known & (value > 0))


def _window(
  block: UserBlock, snapshots: Snapshots, times: Calendar, days: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The places in the block where [τ, τ + days) starts and stops, and whether it is wholly observed: each `[S]`."""
  end = snapshots.time + int(days * MICROSECONDS_PER_DAY)
  known = end <= np.array(times.observed_until)[snapshots.split]
  stop = block.offsets[snapshots.user] + block.before(snapshots.user, end)
  return _start(block, snapshots), stop, known


def future_event(
  block: UserBlock, snapshots: Snapshots, times: Calendar, source: int, days: float, negate: bool
) -> Labels:
  """Whether an event of `source` happens in [τ, τ + days); with `negate`, whether none does."""
  start, stop, known = _window(block, snapshots, times, days)
  count = np.append(0, np.cumsum(block.source == source))
  happens = count[stop] > count[start]
  return Labels((happens != negate).astype(np.float32), known)


def future_values(block: UserBlock, snapshots: Snapshots, times: Calendar, field: int, top: int, days: float) -> Labels:
  """Which of the `top` most frequent values of the field (codes 2 … top + 1) occur in [τ, τ + days)."""
  start, stop, known = _window(block, snapshots, times, days)
  before = counts_before(block.codes[:, field], top, np.stack([start, stop]))
  return Labels((before[1] > before[0]).astype(np.float32), known)


def user_label(value: np.ndarray, snapshots: Snapshots, split_of_user: np.ndarray) -> Labels:
  """Labels of users, float `[U]`, NaN unknown, used only at the snapshots of the split `[U]` that each belongs to."""
  of_user = value[snapshots.user]
  known = (snapshots.split == split_of_user[snapshots.user]) & ~np.isnan(of_user)
  return Labels(np.nan_to_num(of_user).astype(np.float32), known)


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

  def carried(self, history: UserHistory | UserBlock) -> np.ndarray:
    """Whether each event has the field: bool `[N]`."""
    if self.positive is not None:
      return history.codes[:, self.column] > ABSENT
    return np.isfinite(history.numeric[:, self.column])

  def __call__(self, history: UserHistory | UserBlock) -> Labels:
    """The labels of all events, `[N]`; unknown where the field is absent, or its value out of vocabulary."""
    if self.positive is not None:
      codes = history.codes[:, self.column]
      return Labels(self.positive[codes].astype(np.float32), codes > UNKNOWN)
    number, known = history.numeric[:, self.column], self.carried(history)
    value = number if self.at_least is None else number >= self.at_least
    return Labels(np.where(known, value, 0).astype(np.float32), known)


def following_events(
  carried: np.ndarray, block: UserBlock, snapshots: Snapshots, per_snapshot: int, times: Calendar | None
) -> np.ndarray:
  """The next events that carry a field; without a calendar (leave one out) the very next event only, if it does.

  They lie in the period of the snapshot's split, as for `next_event`.

  Shapes: `carried [N]` → int64 `[S, per_snapshot]`, places in the block; -1 none.
  """
  n = len(block.time)
  start, limit = _start(block, snapshots), _limit(block, snapshots, times)
  if times is None:
    out = np.full((len(start), per_snapshot), -1, np.int64)
    out[:, 0] = np.where((start < limit) & carried[np.minimum(start, n - 1)], start, -1)
    return out
  carriers = np.flatnonzero(carried)
  place = np.searchsorted(carriers, start)[:, None] + np.arange(per_snapshot)
  event = np.append(carriers, n)[np.minimum(place, len(carriers))]
  return np.where(event < limit[:, None], event, -1)


def at_events(labels: Labels, event: np.ndarray) -> Labels:
  """Gathers the labels `[N]` of events at the indices `event [...]`; -1 is unknown."""
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
