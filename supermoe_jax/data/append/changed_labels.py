"""Whose labels may change when a log goes on: what was not wholly observed may be now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.encoding.splits import TRAIN
from supermoe_jax.data.tasks.labels import Calendar


class ChangedUsers(NamedTuple):
  """The users without new events whose labels may be others by now.

  Attributes:
    everyone: all of them.
    since: only those with an event at or after this microsecond, which no period held before; None: nobody.
  """

  everyone: bool
  since: int | None


def users_with_changed_labels(
  split: config.Split, tasks: Mapping[str, config.LabelledTask], then: Calendar | None, now: Calendar | None
) -> ChangedUsers:
  """Says whom another calendar concerns; None stands for leave one out, where a user's own events decide."""
  if then is None or now is None:
    return ChangedUsers(False, None)
  if not np.array_equal(then.snapshots, now.snapshots):
    return ChangedUsers(True, None)
  horizons = [t.horizon_days for t in tasks.values() if isinstance(t, config.FutureEvent | config.FutureValues)]
  since = []
  for index, (before, after) in enumerate(zip(then.observed_until, now.observed_until, strict=True)):
    if before == after:
      continue
    since.append(before)
    if split.snapshots != "calendar" and (split.mode == "user" or index == TRAIN):
      return ChangedUsers(True, None)  # snapshots of the users' own, anywhere
    shared = then.snapshots if split.mode == "user" else then.snapshots[then.split == index]
    for days in horizons:
      end = shared + int(days * config.MICROSECONDS_PER_DAY)
      if ((end > before) & (end <= after)).any():
        return ChangedUsers(True, None)
  return ChangedUsers(False, min(since, default=None))
