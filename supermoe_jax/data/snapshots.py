"""At which moments a user is looked at: the calendar of a split, or moments of the user's own history.

Shapes: N events of the user, S snapshots.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data.events import UserHistory
from supermoe_jax.data.labels import TRAIN, Calendar, Snapshots


class LeftOut(NamedTuple):
  """Snapshots of a user that there are not.

  Attributes:
    too_early: how many have fewer than `min_events` events before them.
    repeated: how many are at the moment of another, as events at equal times give them.
  """

  too_early: int
  repeated: int


def user_snapshots(
  split: config.Split, history: UserHistory, times: Calendar | None, owner: int
) -> tuple[Snapshots, LeftOut]:
  """Returns the snapshots of a user who belongs to the split `owner`; `times` is None for leave one out."""
  if times is None:
    found, too_early = labels_lib.leave_one_out_snapshots(history, split.min_events)
    return found, LeftOut(too_early, 0)
  repeated = 0
  if split.snapshots != "calendar":
    own, repeated = _own_moments(split, history, times)
    moments = np.concatenate([own, times.snapshots])
    splits = np.concatenate([np.full(len(own), TRAIN, np.int32), times.split])
    times = dataclasses.replace(times, snapshots=moments, split=splits)
  found, too_early = labels_lib.temporal_snapshots(history, times, split.min_events)
  if split.mode == "user":
    found = found._replace(split=np.full(len(found.time), owner, np.int32))
  return found, LeftOut(too_early, repeated)


def _own_moments(split: config.Split, history: UserHistory, times: Calendar) -> tuple[np.ndarray, int]:
  """Moments just after events of the training period (with mode `user`: of the log): int64 `[S]`, ascending.

  A snapshot sees the events strictly before it, so a moment is one microsecond after its event, and sees all events at
  that event's time or none. Also returns how many moments there are more than once.
  """
  n = int(np.searchsorted(history.time, times.observed_until[TRAIN], side="left"))
  if split.snapshots == "end":
    chosen = np.arange(n)[-1:]
  else:
    chosen = np.arange(split.every_events - 1, n, split.every_events)
  moments = history.time[chosen] + 1
  if split.train_start:
    moments = moments[moments >= config.parse_time(split.train_start, "config.data.split.train_start")]
  distinct = np.unique(moments)
  return distinct, len(moments) - len(distinct)
