"""Snapshots at moments of a user's own, gaps between periods, and users divided, on histories small enough to read."""

from __future__ import annotations

import duckdb
import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY as DAY
from supermoe_jax.data.encoding import splits
from supermoe_jax.data.encoding.histories import UserHistory
from supermoe_jax.data.encoding.splits import TEST, TRAIN, VALIDATION
from supermoe_jax.data.preparation import snapshots
from supermoe_jax.data.tasks.calendar import make_calendar
from supermoe_jax.data.tasks.future_event import label_future_event
from supermoe_jax.data.tasks.next_event import label_next_event

TEMPORAL = {"train_end": "1970-02-10", "validation": ("1970-02-12",), "test": ("1970-02-20",)}


def history(*days: float) -> UserHistory:
  n = len(days)
  time = (np.array(days) * DAY).astype(np.int64)
  return UserHistory("u", time, np.zeros(n, np.int32), np.full((n, 1), 2, np.int32), np.zeros((n, 0), np.float32), n)


def found(
  split: config.Split, h: UserHistory, owner: int = TRAIN
) -> tuple[list[tuple[int, int, int]], snapshots.LeftOut]:
  times = make_calendar(split, 0, 80 * DAY)
  of_user, left_out = snapshots.user_snapshots(split, h.block, times, np.array([owner]))
  return list(zip(*(part.tolist() for part in of_user[1:]))), left_out


def test_every_second_event_gives_a_snapshot_just_after_it() -> None:
  split = config.Split(**TEMPORAL, snapshots="every_events", every_events=2)
  got, left_out = found(split, history(1, 2, 3, 4, 5, 60, 61))
  assert got[:2] == [(2 * DAY + 1, 2, TRAIN), (4 * DAY + 1, 4, TRAIN)]
  assert got[2:] == [(42 * DAY, 5, VALIDATION), (50 * DAY, 5, TEST)]  # events after train_end give none
  assert left_out == (0, 0)


def test_of_events_at_equal_times_all_are_seen_and_repeated_snapshots_are_counted() -> None:
  split = config.Split(**TEMPORAL, snapshots="every_events", every_events=2)
  got, left_out = found(split, history(1, 3, 3, 3, 3, 9))
  assert got[:2] == [(3 * DAY + 1, 5, TRAIN), (9 * DAY + 1, 6, TRAIN)]
  assert left_out.repeated == 1


def test_the_end_is_one_snapshot_after_the_last_training_event() -> None:
  split = config.Split(**TEMPORAL, snapshots="end", min_events=2)
  assert found(split, history(1, 7, 45))[0][0] == (7 * DAY + 1, 2, TRAIN)
  got, left_out = found(split, history(7, 45, 46))
  assert got == [(50 * DAY, 3, TEST)] and left_out.too_early == 2
  assert found(split, history(45))[0] == []


def test_train_start_is_the_first_moment_of_a_users_own_too() -> None:
  split = config.Split(**TEMPORAL, train_start="1970-01-04", snapshots="every_events", every_events=1)
  assert [t for t, _, s in found(split, history(1, 2, 3, 4))[0] if s == TRAIN] == [3 * DAY + 1, 4 * DAY + 1]


@pytest.mark.parametrize("policy", ["calendar", "every_events", "end"])
def test_all_snapshots_of_a_user_belong_to_the_users_split(policy: str) -> None:
  split = config.Split(mode="user", snapshots=policy, every_days=20.0, every_events=2)  # type: ignore[arg-type]
  for owner in (TRAIN, VALIDATION, TEST):
    got, _ = found(split, history(1, 30, 70, 75), owner)
    assert {s for *_, s in got} == {owner}
    moments = {"calendar": [20, 40, 60], "every_events": [30, 75], "end": [75]}[policy]
    assert [t // DAY for t, *_ in got] == moments


def test_validation_windows_end_a_gap_before_the_first_test_snapshot() -> None:
  split = config.Split(**TEMPORAL, gap_days=1.5)
  times = make_calendar(split, 0, 80 * DAY)
  assert times.observed_until == (40 * DAY, int(48.5 * DAY), 80 * DAY)
  h = history(41, 48.75, 49)
  found, _ = snapshots.user_snapshots(split, h.block, times, np.array([TRAIN]))
  at = found.split == VALIDATION
  assert label_future_event(h.block, found, times, h.block.source == 0, 6.5, False).known[at].all()
  assert not label_future_event(h.block, found, times, h.block.source == 0, 6.51, False).known[at].any()
  assert (
    not label_next_event(h.block, found, h.block.codes[:, 0], times).known[at].any()
  )  # the next one lies in the gap
  assert found.n_events[found.split == TEST].tolist() == [3]  # which test snapshots see all the same


def test_users_are_divided_alike_in_python_and_sql() -> None:
  split = config.Split(mode="user", user_validation=0.15, user_test=0.25)
  users = [*(str(i) for i in range(3000)), "ü", "a b", "'", ""]
  sql = f"SELECT {splits.training_user_sql('u', split)} FROM unnest(?) t(u)"
  got = [row for (row,) in duckdb.execute(sql, [users]).fetchall()]
  assert got == [splits.user_split(u, split) == TRAIN for u in users]
