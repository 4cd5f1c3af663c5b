"""Makes the calendar of a split: the times of the snapshots, and the ends of the periods that label windows lie in.

Training snapshots lie in the training period, and no label looks beyond the period of its snapshot's split.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY, format_time
from supermoe_jax.data.encoding.splits import TEST, TRAIN, VALIDATION
from supermoe_jax.errors import ConfigError

NO_BOUND = -(2**63)  # a time before any other


@dataclasses.dataclass(frozen=True)
class Calendar:
  """The times of a temporal split or of a split by users, in microseconds since 1970 UTC.

  Attributes:
    snapshots: τ of each snapshot that all users share, ascending; `snapshots.user_snapshots` adds each user's own.
    split: the split of each shared snapshot. In a split by users it is TRAIN, which each user's own split replaces.
    observed_until: for each split, the end of the period that its label windows must lie in.
    earliest: the time before which no user's own snapshot lies.
  """

  snapshots: np.ndarray
  split: np.ndarray
  observed_until: tuple[int, int, int]
  earliest: int = NO_BOUND


def make_calendar(split: config.Split, log_start: int, log_end: int, *, stray_before: bool = False) -> Calendar:
  """Returns the calendar of a temporal split or a split by users.

  `log_start` and `log_end` (exclusive) are microseconds since 1970 UTC; with `stray_before` the log has stray rows
  before its start. Training snapshots lie `every_days` apart,
  counted back from the end of the training period; in a split by users that is the end of the log. With a policy other
  than `calendar` the training snapshots are each user's own, and this calendar lacks them. Validation windows end
  `gap_days` before the first test snapshot, so choosing a model by validation uses nothing of the test period. Without
  test snapshots they end with the log.

  Raises:
    ConfigError: a snapshot lies outside the log, or there is no room for a training snapshot.
  """
  earliest = log_start if stray_before else NO_BOUND
  if split.train_start:
    earliest = config.parse_time(split.train_start, "config.data.split.train_start")
  if split.mode == "user":
    shared = _regular(split, log_start, log_end, f"the end of the log, {format_time(log_end)},")
    return Calendar(shared, np.full(len(shared), TRAIN, np.int32), (log_end,) * 3, earliest)
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
        f"{format_time(log_end)}. Set a time within it, or config.data.split.log_end if the log is complete up to then."
      )
  validation, test = np.sort(validation), np.sort(test)
  return Calendar(
    np.concatenate([train, validation, test]),
    np.repeat(np.array([TRAIN, VALIDATION, TEST], np.int32), [len(train), len(validation), len(test)]),
    (train_end, int(test[0]) - int(split.gap_days * MICROSECONDS_PER_DAY) if len(test) else log_end, log_end),
    earliest,
  )


def log_end(split: config.Split, last: int) -> int:
  """Returns the microsecond up to which a log is complete, given the time `last` of its last event.

  In a split by users it lies just after that event, where a user's own snapshot may lie.
  """
  if split.log_end:
    return config.parse_time(split.log_end, "config.data.split.log_end")
  return last + 1 if split.mode == "user" else last


def _regular(split: config.Split, log_start: int, end: int, end_text: str) -> np.ndarray:
  """Returns the snapshots `every_days` apart, counted back from `end`; none for a policy other than `calendar`."""
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
