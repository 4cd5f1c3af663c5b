"""Users laid end to end: nothing of a user depends on which others share the block."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY as DAY
from supermoe_jax.data.encoding import histories
from supermoe_jax.data.encoding.aggregates import Aggregator, Amount, DistinctField, EventCount
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory
from supermoe_jax.data.encoding.numeric import Numeric
from supermoe_jax.data.preparation import record_counts
from supermoe_jax.data.preparation.snapshots import user_snapshots
from supermoe_jax.data.tasks import labels
from supermoe_jax.data.tasks.calendar import make_calendar
from supermoe_jax.data.tasks.event_label import EventAnswer, following_events
from supermoe_jax.data.tasks.future_event import label_future_event
from supermoe_jax.data.tasks.future_values import label_future_values
from supermoe_jax.data.tasks.labels import Snapshots
from supermoe_jax.data.tasks.next_event import label_next_event
from supermoe_jax.data.tasks.user_label import label_user

TEMPORAL = {"train_end": "1970-02-10", "validation": ("1970-02-12",), "test": ("1970-02-20",), "min_events": 2}
POLICIES = {
  "calendar": config.Split(**TEMPORAL),  # type: ignore[arg-type]
  "every": config.Split(**TEMPORAL, snapshots="every_events", every_events=3),  # type: ignore[arg-type]
  "end": config.Split(**TEMPORAL, snapshots="end"),  # type: ignore[arg-type]
  "user": config.Split(mode="user", every_days=9.0),
  "leave_one_out": config.Split(mode="leave_one_out", min_events=2),
}
AGGREGATOR = Aggregator(
  (2.0, 10.0),
  ("a", "b"),
  {"x": 0, "y": 1},
  {"c": (0, ("p", "q", "r"))},
  {"x": Amount(0, Numeric(5.0, 2.0), "standardise")},
  sums=("x",),
  means=("x",),
  trends=("x",),
  distinct={"c": DistinctField((0, 1)), "y": DistinctField((1,), numeric=True)},
  conditions={"of b": EventCount("", lambda block: block.source == 1)},
)
ANSWER = EventAnswer(1, np.array([False, False, True, False, True, True]))


@st.composite
def many(draw: st.DrawFn) -> list[UserHistory]:
  rng = np.random.default_rng(draw(st.integers(0, 99_999)))
  out = []
  for i, n in enumerate(draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))):
    time = np.sort(rng.integers(0, 80 * 4, n)) * (DAY // 4) // draw(st.sampled_from([1, 1, 40]))
    numeric = np.where(rng.random((n, 2)) < 0.2, np.nan, rng.normal(size=(n, 2)) * draw(st.sampled_from([1.0, 1e12])))
    codes = rng.integers(0, 6, (n, 2)).astype(np.int32)
    n_train = int(rng.integers(0, n + 1))
    history = UserHistory(
      f"u{i}", time, rng.integers(0, 2, n).astype(np.int32), codes, numeric.astype(np.float32), n_train
    )
    out.append(history)
  return out


def end_to_end(users: list[UserHistory]) -> UserBlock:
  offsets = np.append(0, np.cumsum([len(u.time) for u in users]))
  parts = (np.concatenate([getattr(u, part) for u in users]) for part in ("time", "source", "codes", "numeric"))
  return UserBlock([u.user for u in users], offsets, *parts, np.array([u.n_train for u in users]))


def everything(split: config.Split, block: UserBlock) -> tuple[Snapshots, list[np.ndarray], tuple[int, int]]:
  """Snapshots, and all that is worked out at them, with a row a snapshot."""
  times = None if split.mode == "leave_one_out" else make_calendar(split, 0, 80 * DAY)
  owner = np.array([int(u[1:]) % 3 for u in block.users])
  found, left_out = user_snapshots(split, block, times, owner)
  event = following_events(ANSWER.carried(block), block, found, 3, times)
  asked = [
    label_next_event(block, found, block.codes[:, 1], times),
    label_user(np.where(owner == 1, np.nan, owner), found, owner),
    labels.at_events(ANSWER(block), event),
  ]
  if times is not None:
    asked += [
      label_future_event(block, found, times, block.source == 1, 7.0, True),
      label_future_values(block, found, times, block.codes[:, 0], 3, 7.0),
    ]
  rows = [part for label in asked for part in label]
  of_user = np.where(event < 0, -1, event - block.offsets[found.user][:, None])
  return found, [*rows, of_user, AGGREGATOR(block, *found[:3])], left_out


@settings(max_examples=150, deadline=None)
@given(many(), st.sampled_from(sorted(POLICIES)))
def test_a_user_in_a_block_is_as_a_user_alone(users: list[UserHistory], policy: str) -> None:
  split, whole = POLICIES[policy], end_to_end(users)
  found, rows, left_out = everything(split, whole)
  alone = [everything(split, u.block) for u in users]
  for i, (its, its_rows, _) in enumerate(alone):
    here = found.user == i
    for mine, of_block in zip([*its[1:], *its_rows], [*found[1:], *rows], strict=True):
      np.testing.assert_array_equal(mine, of_block[here])
  assert tuple(left_out) == tuple(np.sum([lost for *_, lost in alone], axis=0))


@settings(max_examples=100, deadline=None)
@given(many(), st.integers(-2, 82 * 4), st.integers(1, 30), st.sampled_from([2**62, 3 * 80 * DAY, 1]))
def test_a_block_is_cut_between_users_and_counts_events_before_a_time(
  users: list[UserHistory], quarter: int, events: int, largest: int
) -> None:
  whole = end_to_end(users)
  before = histories.BLOCK_EVENTS, histories.LARGEST_KEY
  histories.BLOCK_EVENTS, histories.LARGEST_KEY = events, largest
  try:
    parts = list(whole.halves())
  finally:
    histories.BLOCK_EVENTS, histories.LARGEST_KEY = before
  assert [u for part in parts for u in part.users] == [u.user for u in users]
  assert all(len(part.users) == 1 or len(part.time) <= events for part in parts)
  time = quarter * (DAY // 4)
  for part in parts:
    for i in range(len(part.users)):
      mine, (theirs,) = part.history(i), [u for u in users if u.user == part.users[i]]
      np.testing.assert_array_equal(mine.time, theirs.time)
      np.testing.assert_array_equal(mine.codes, theirs.codes)
      assert mine.n_train == theirs.n_train
      assert part.before(np.array(i), time) == int(np.sum(theirs.time < time))


def test_users_with_wide_snapshots_share_a_block_with_fewer() -> None:
  users = [UserHistory(f"u{i}", *np.zeros((2, 1), np.int64), *np.zeros((2, 1, 0)), 1) for i in range(1000)]
  sizes = [len(block.users) for block in end_to_end(users).halves(1.0, 1 << 10)]
  assert sum(sizes) == 1000 and max(sizes) <= 128 and min(sizes) > 50
  assert [len(block.users) for block in end_to_end(users).halves(float(1 << 10))] == sizes


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(-1e38, 1e38) | st.floats(-9, 9), min_size=1, max_size=4), max_size=8))
def test_exact_sums_do_not_depend_on_the_order_of_users(users: list[list[float]]) -> None:
  def sums(users: list[list[float]]) -> list[int]:
    values = np.array([v for of_user in users for v in of_user], np.float64).reshape(-1, 1)
    return record_counts.exact_sums(values, np.cumsum([0, *map(len, users)])[:-1])

  assert sums(users) == sums(users[::-1])
  apart = [sums([of_user]) for of_user in users]
  assert sums(users) == [sum(total for (total,) in apart)]
  wanted = float(np.sum([v for u in users for v in u]))
  assert sums(users)[0] / record_counts.UNIT == np.float64(wanted) or abs(
    sums(users)[0] / record_counts.UNIT - wanted
  ) <= 1e-9 * (1 + sum(abs(v) for u in users for v in u))
