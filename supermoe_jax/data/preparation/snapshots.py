"""Finds the snapshots of users: at the times of a split's calendar, or at moments of each user's own history.

Shapes: U users of a block, with N events and S snapshots in total.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.splits import TEST, TRAIN, VALIDATION
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.data.tasks.labels import DatedRows, Snapshots


class LeftOut(NamedTuple):
  """The numbers of snapshots that were left out.

  Attributes:
    too_early: snapshots with fewer than `min_events` events before them.
    repeated: snapshots at the moment of another, which events at equal times cause.
  """

  too_early: int
  repeated: int


def user_snapshots(
  split: config.Split, block: UserBlock, times: Calendar | None, owner: np.ndarray
) -> tuple[Snapshots, LeftOut]:
  """Returns the snapshots of a block's users, and the numbers left out; `times` is None for leave one out.

  `owner [U]` holds the split of each user.
  """
  if times is None:
    found, too_early = leave_one_out_snapshots(block, split.min_events)
    return found, LeftOut(too_early, 0)
  found, repeated = temporal_snapshots(block, times), 0
  if split.snapshots != "calendar":
    own, repeated = _own_moments(split, block, times)
    both = Snapshots(*(np.concatenate(parts) for parts in zip(own, found)))
    order = np.argsort(both.user, kind="stable")  # each user's own moments come first
    found = Snapshots(*(part[order] for part in both))
  enough = found.n_events >= split.min_events
  too_early = int(np.sum(~enough))
  found = Snapshots(*(part[enough] for part in found))
  if split.mode == "user":
    found = found._replace(split=owner[found.user].astype(np.int32))
  return found, LeftOut(too_early, repeated)


def with_dated_rows(
  found: Snapshots, block: UserBlock, rows: DatedRows, min_events: int
) -> tuple[Snapshots, np.ndarray, int]:
  """Returns snapshots with those of dated labels added, the row of each, and how many see too few events.

  A row's snapshot sees the events strictly before the row's time. The snapshots of a user ascend by time; at one moment
  the row's snapshot comes last.

  Returns: the snapshots; int64 `[S]`, the index of each snapshot's row in `rows`, -1 for none; the number of rows with
    fewer than `min_events` events before them, which are left out.
  """
  seen = block.before(rows.user, rows.time).astype(np.int32)
  kept = np.flatnonzero(seen >= min_events)
  added = Snapshots(rows.user[kept], rows.time[kept], seen[kept], rows.split[kept])
  both = Snapshots(*(np.concatenate(parts) for parts in zip(found, added)))
  row = np.concatenate([np.full(len(found.time), -1, np.int64), kept])
  order = np.lexsort((row >= 0, both.time, both.user))
  return Snapshots(*(part[order] for part in both)), row[order], len(seen) - len(kept)


def temporal_snapshots(block: UserBlock, times: Calendar) -> Snapshots:
  """Returns the calendar's snapshots of every user, also snapshots that see no event."""
  users, n = len(block.users), len(times.snapshots)
  user, time = np.repeat(np.arange(users), n), np.tile(times.snapshots, users)
  return Snapshots(user, time, block.before(user, time).astype(np.int32), np.tile(times.split, users))


def leave_one_out_snapshots(block: UserBlock, min_events: int) -> tuple[Snapshots, int]:
  """Returns a snapshot before each event, and how many are left out for fewer than `min_events` events before them.

  The snapshot before a user's last event is for test, the one before the last but one for validation. A snapshot's τ is
  the time of the last event it sees, so that not even the time of the next event is known. Users with fewer than three
  events have training snapshots only.
  """
  lengths = block.lengths
  n_events = np.arange(len(block.time)) - block.offsets[block.owner]
  event = np.flatnonzero(n_events >= min_events)
  user, n_events = block.owner[event], n_events[event]
  left, enough = lengths[user] - n_events, lengths[user] >= 3
  split = np.where(enough & (left == 1), TEST, np.where(enough & (left == 2), VALIDATION, TRAIN))
  too_early = int(np.sum(np.minimum(lengths, min_events) - 1))
  return Snapshots(user, block.time[event - 1], n_events.astype(np.int32), split.astype(np.int32)), too_early


def _own_moments(split: config.Split, block: UserBlock, times: Calendar) -> tuple[Snapshots, int]:
  """Returns snapshots just after events of the training period (mode `user`: of the log), and how many repeat a moment.

  The snapshots ascend. A snapshot sees the events strictly before it, so its moment is one microsecond after its event:
  it sees all events at that event's time or none.
  """
  n = block.before(np.arange(len(block.users)), times.observed_until[TRAIN])
  place = np.arange(len(block.time)) - block.offsets[block.owner]
  left = n[block.owner] - place  # number of training events from this one on
  chosen = (
    left == 1 if split.snapshots == "end" else (place % split.every_events == split.every_events - 1) & (left > 0)
  )
  event = np.flatnonzero(chosen)
  user, moment = block.owner[event], block.time[event] + 1
  late = moment >= times.earliest
  user, moment = user[late], moment[late]
  again = np.zeros(len(user), bool)
  again[1:] = (user[1:] == user[:-1]) & (moment[1:] == moment[:-1])
  user, moment = user[~again], moment[~again]
  seen = block.before(user, moment).astype(np.int32)
  return Snapshots(user, moment, seen, np.full(len(user), TRAIN, np.int32)), int(again.sum())
