"""Finds users whose labels may change when a log grows: a label window may be wholly observed only now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.encoding.splits import TRAIN
from supermoe_jax.data.tasks.calendar import Calendar


class ChangedUsers(NamedTuple):
  """Users without new events whose labels may have changed.

  Attributes:
    everyone: the labels of all users without new events may have changed.
    since: if not everyone's: the labels of users with an event at or after this microsecond may have changed. An
      observed period of the earlier calendar ended there. None if no user's labels can have changed.
  """

  everyone: bool
  since: int | None


def users_with_changed_labels(
  split: config.Split, tasks: Mapping[str, config.LabelledTask], then: Calendar | None, now: Calendar | None
) -> ChangedUsers:
  """Returns the users whose labels may change when the calendar changes from `then` to `now`.

  None stands for a leave-one-out split, whose snapshots depend on a user's own events only.
  """
  if then is None or now is None:
    return ChangedUsers(False, None)
  if not np.array_equal(then.snapshots, now.snapshots):
    return ChangedUsers(True, None)
  if then.earliest != now.earliest and split.snapshots != "calendar":
    return ChangedUsers(True, None)  # users' own snapshots may lie between
  lengths = {days for t in tasks.values() for days in t.label_ends}
  since = []
  for index, (before, after) in enumerate(zip(then.observed_until, now.observed_until, strict=True)):
    if before == after:
      continue
    since.append(before)
    if split.snapshots != "calendar" and (split.mode == "user" or index == TRAIN):
      return ChangedUsers(True, None)  # users' own snapshots may lie anywhere
    shared = then.snapshots if split.mode == "user" else then.snapshots[then.split == index]
    for days in lengths:
      end = shared + int(days * config.MICROSECONDS_PER_DAY)
      if ((end > before) & (end <= after)).any():
        return ChangedUsers(True, None)
  return ChangedUsers(False, min(since, default=None))
