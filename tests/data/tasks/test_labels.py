"""Labels and aggregates against a slow reference in plain Python, and against the future."""

import dataclasses
import datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY as DAY
from supermoe_jax.config import format_time
from supermoe_jax.data.encoding.aggregates import Aggregator
from supermoe_jax.data.encoding.histories import UserHistory
from supermoe_jax.data.encoding.splits import TEST, TRAIN, VALIDATION, user_split
from supermoe_jax.data.preparation.snapshots import leave_one_out_snapshots, user_snapshots
from supermoe_jax.data.tasks import labels
from supermoe_jax.data.tasks.calendar import make_calendar
from supermoe_jax.data.tasks.event_label import EventAnswer, following_events
from supermoe_jax.data.tasks.future_event import label_future_event
from supermoe_jax.data.tasks.future_values import label_future_values
from supermoe_jax.data.tasks.next_event import label_next_event
from supermoe_jax.data.tasks.sample_space import LabelComparison, supervision
from supermoe_jax.data.tasks.user_label import label_user
from supermoe_jax.errors import ConfigError

SPLIT = config.Split(
  train_end="1970-02-10", every_days=5.0, validation=("1970-02-10",), test=("1970-02-20", "1970-03-01")
)
TRAIN_END, FIRST_TEST, LOG_END = 40 * DAY, 50 * DAY, 80 * DAY
TIMES = make_calendar(SPLIT, 0, LOG_END)


@st.composite
def histories(draw: st.DrawFn) -> UserHistory:
  n = draw(st.integers(1, 25))
  hours = sorted(draw(st.lists(st.integers(0, 24 * 80 - 1), min_size=n, max_size=n)))  # many ties
  time = np.array(hours, np.int64) // 6 * 6 * (DAY // 24)
  rng = np.random.default_rng(draw(st.integers(0, 9999)))
  numeric = np.where(rng.random((n, 1)) < 0.2, np.nan, rng.normal(size=(n, 1))).astype(np.float32)
  codes = rng.integers(0, 6, (n, 2)).astype(np.int32)
  source = rng.integers(0, 2, n).astype(np.int32)
  return UserHistory("u", time, source, codes, numeric, int(np.sum(time < TRAIN_END)))


def looks(history: UserHistory) -> labels.Snapshots:
  return user_snapshots(SPLIT, history.block, TIMES, np.array([TRAIN]))[0]


def cut(history: UserHistory, n: int) -> UserHistory:
  arrays = (history.time[:n], history.source[:n], history.codes[:n], history.numeric[:n])
  return UserHistory(history.user, *arrays, min(history.n_train, n))


def test_training_snapshots_count_back_from_the_end_of_training() -> None:
  train = TIMES.snapshots[TIMES.split == TRAIN] // DAY
  assert train.tolist() == [5, 10, 15, 20, 25, 30, 35]
  assert TIMES.observed_until == (TRAIN_END, FIRST_TEST, LOG_END)


def test_a_snapshot_outside_the_log_is_an_error() -> None:
  with pytest.raises(ConfigError, match="1970-03-01 lies outside the log, which runs from 1970-01-01"):
    make_calendar(SPLIT, 0, 55 * DAY)


def test_no_room_for_a_training_snapshot_is_an_error() -> None:
  with pytest.raises(ConfigError, match="no training snapshot fits"):
    make_calendar(SPLIT, 38 * DAY, LOG_END)


@settings(max_examples=150, deadline=None)
@given(histories(), st.sampled_from([3.0, 7.0, 12.0]))
def test_labels_equal_a_plain_reference(history: UserHistory, days: float) -> None:
  snapshots, left_out = user_snapshots(SPLIT, history.block, TIMES, np.array([TRAIN]))
  assert left_out.too_early + len(snapshots.time) == len(TIMES.snapshots)
  event = label_future_event(history.block, snapshots, TIMES, history.source == 1, days, False)
  churn = label_future_event(history.block, snapshots, TIMES, history.source == 1, days, True)
  values = label_future_values(history.block, snapshots, TIMES, history.codes[:, 0], 3, days)
  following = label_next_event(history.block, snapshots, history.codes[:, 1], TIMES)
  limits = {TRAIN: TRAIN_END, VALIDATION: FIRST_TEST, TEST: LOG_END}
  events = list(zip(history.time.tolist(), history.source.tolist(), history.codes.tolist()))
  for s, (_, time, n, split) in enumerate(zip(*snapshots)):
    assert n == sum(t < time for t, _, _ in events) >= 1
    end = int(time) + int(days * DAY)
    inside = [e for e in events if time <= e[0] < end]
    observed = end <= limits[split]
    assert bool(event.known[s]) == bool(churn.known[s]) == bool(values.known[s]) == observed
    if observed:
      assert bool(event.value[s]) == any(e[1] == 1 for e in inside) == (not churn.value[s])
      assert values.value[s].tolist() == [float(any(e[2][0] == v for e in inside)) for v in (2, 3, 4)]
    later = [e[2][1] for e in events if time <= e[0] < limits[split] and e[2][1] > 0]
    assert bool(following.known[s]) == bool(later)
    assert int(following.value[s]) == (later[0] if later else 0)


@st.composite
def event_answers(draw: st.DrawFn) -> EventAnswer:
  if draw(st.booleans()):
    return EventAnswer(1, np.isin(np.arange(6), draw(st.sets(st.integers(2, 5)))))
  return EventAnswer(0, at_least=draw(st.sampled_from([None, np.float32(0.3)])))


def says(answer: EventAnswer, history: UserHistory, i: int) -> float | None:
  """What an event says, None if nothing, in plain Python."""
  if answer.positive is not None:
    code = int(history.codes[i, answer.column])
    return None if code < 2 else float(answer.positive[code])
  number = float(history.numeric[i, answer.column])
  if np.isnan(number):
    return None
  return number if answer.at_least is None else float(number >= answer.at_least)


def has_field(answer: EventAnswer, history: UserHistory, i: int) -> bool:
  out_of_vocabulary = answer.positive is not None and history.codes[i, answer.column] == 1
  return out_of_vocabulary or says(answer, history, i) is not None


@settings(max_examples=150, deadline=None)
@given(histories(), event_answers(), st.integers(1, 4))
def test_event_labels_equal_a_plain_reference(history: UserHistory, answer: EventAnswer, m: int) -> None:
  snapshots = looks(history)
  event = following_events(answer.carried(history), history.block, snapshots, m, TIMES)
  got = labels.at_events(answer(history), event)
  assert event.shape == got.value.shape == got.known.shape == (len(snapshots.time), m)
  limits = {TRAIN: TRAIN_END, VALIDATION: FIRST_TEST, TEST: LOG_END}
  for s, (_, time, _, split) in enumerate(zip(*snapshots)):
    period = [i for i, t in enumerate(history.time) if time <= t < limits[split]]
    wanted = [i for i in period if has_field(answer, history, i)][:m]
    assert event[s].tolist() == wanted + [-1] * (m - len(wanted))
    said = [says(answer, history, i) for i in wanted] + [None] * (m - len(wanted))
    assert [v if k else None for v, k in zip(got.value[s].tolist(), got.known[s])] == said
    assert not got.value[s][~got.known[s]].any()


@settings(max_examples=100, deadline=None)
@given(histories(), event_answers())
def test_leave_one_out_asks_about_the_very_next_event_only(history: UserHistory, answer: EventAnswer) -> None:
  n = len(history.time)
  history = dataclasses.replace(history, n_train=n if n < 3 else n - 2)
  snapshots, _ = leave_one_out_snapshots(history.block, 1)
  event = following_events(answer.carried(history), history.block, snapshots, 3, None)
  for s, (_, _, n_events, split) in enumerate(zip(*snapshots)):
    asked = (split != TRAIN or n_events < history.n_train) and has_field(answer, history, int(n_events))
    assert event[s].tolist() == [int(n_events) if asked else -1, -1, -1]


@settings(max_examples=100, deadline=None)
@given(histories(), event_answers())
def test_events_after_a_period_do_not_change_its_event_labels(history: UserHistory, answer: EventAnswer) -> None:
  """Cut at the end of training, or of validation, the labels of the snapshots in it stay as they are."""
  for end, splits in ((TRAIN_END, (TRAIN,)), (FIRST_TEST, (TRAIN, VALIDATION))):
    past = cut(history, int(np.sum(history.time < end)))
    if not len(past.time):
      continue
    both = []
    for h in (history, past):
      snapshots = looks(h)
      event = following_events(answer.carried(h), h.block, snapshots, 2, TIMES)
      here = np.isin(snapshots.split, splits)
      both.append((event[here], *(part[here] for part in labels.at_events(answer(h), event))))
    for a, b in zip(*both):
      np.testing.assert_array_equal(a, b)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=12))
def test_the_next_carrier_is_the_first_at_or_after_each_position(carried: list[bool]) -> None:
  wanted = [next((j for j in range(i, len(carried)) if carried[j]), len(carried)) for i in range(len(carried) + 1)]
  assert labels.next_carrier(np.array(carried, bool)).tolist() == wanted


COMPARED = {"==": "__eq__", "!=": "__ne__", "<": "__lt__", "<=": "__le__", ">": "__gt__", ">=": "__ge__"}


@settings(max_examples=150, deadline=None)
@given(
  st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([-1.5, 0.0, 1.0, 2.0])), min_size=1, max_size=8),
  st.sampled_from(sorted(COMPARED)),
  st.sampled_from([0.0, 1.0]),
  st.sampled_from([0.0, 0.25]),
)
def test_sample_spaces_equal_a_plain_reference(
  samples: list[tuple[bool, bool, float]], operator: str, number: float, outside: float
) -> None:
  known, other_known, other = (np.array(x) for x in zip(*samples))
  inside = LabelComparison("other", operator, number)(labels.Labels(other.astype(np.float32), other_known))
  delta, omega = supervision(known, inside, (3.0, outside))
  for i, (mine, theirs, value) in enumerate(samples):
    weight = 0.0  # without a label, or with membership unknown
    if mine and theirs:
      weight = 3.0 if getattr(value, COMPARED[operator])(number) else outside
    assert (bool(delta[i]), float(omega[i])) == (weight > 0, weight)


def test_without_a_sample_space_every_known_sample_lies_inside() -> None:
  delta, omega = supervision(np.array([True, False]), None, (2.0, 0.5))
  assert delta.tolist() == [True, False] and omega.tolist() == [2.0, 0.0] and omega.dtype == np.float32


AGGREGATOR = Aggregator((2.0, 10.0), ("a", "b"), {"x": 0}, {"c": (0, ("p", "q", "r"))})


@settings(max_examples=100, deadline=None)
@given(histories())
def test_aggregates_equal_a_plain_reference(history: UserHistory) -> None:
  snapshots = looks(history)
  rows = AGGREGATOR(history.block, *snapshots[:3])
  assert rows.shape == (len(snapshots.time), len(AGGREGATOR.names))
  for row, time, n in zip(rows, snapshots.time, snapshots.n_events):
    got = dict(zip(AGGREGATOR.names, row))
    past = cut(history, int(n))
    for name, days in (("2d", 2), ("10d", 10), ("all", 10_000)):
      inside = past.time >= time - days * DAY
      # Event times that begin inside the window; a time is counted at its first event.
      assert got[f"moments {name}"] == pytest.approx(np.log1p(len(set(past.time[inside]))), abs=1e-5)
      for i, source in enumerate("ab"):
        assert got[f"events {source} {name}"] == pytest.approx(np.log1p(np.sum(past.source[inside] == i)), abs=1e-5)
      x = past.numeric[inside, 0]
      wanted = np.nanmean(x) if np.isfinite(x).any() else 0.0
      assert got[f"mean x {name}"] == pytest.approx(wanted, abs=1e-4)
      for code, value in ((2, "p"), (3, "q"), (4, "r")):
        assert got[f"c {value} {name}"] == pytest.approx(np.log1p(np.sum(past.codes[inside, 0] == code)), abs=1e-5)
    assert got["distinct c"] == pytest.approx(np.log1p(len(set(past.codes[:, 0]) - {0})), abs=1e-5)
    assert got["recency"] == pytest.approx(np.log1p((time - past.time[-1]) / (DAY / 24)), rel=1e-5)
    assert got["tenure"] == pytest.approx(np.log1p((time - past.time[0]) / (DAY / 24)), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(histories(), st.integers(1, 24))
def test_aggregates_do_not_change_when_later_events_are_removed(history: UserHistory, n: int) -> None:
  n = min(n, len(history.time))
  time = np.array([history.time[n - 1] + 1], np.int64)
  seen = np.array([n], np.int32)
  whole, past = (AGGREGATOR(h.block, np.array([0]), time, seen) for h in (history, cut(history, n)))
  np.testing.assert_array_equal(whole, past)


def test_distinct_values_are_counted_of_a_field_none_of_whose_values_is() -> None:
  codes = np.array([[2], [3], [2]], np.int32)
  history = UserHistory("u", np.array([0, DAY, 2 * DAY]), np.zeros(3, np.int32), codes, np.ones((3, 1), np.float32), 3)
  only = Aggregator((), ("a",), {}, {"c": (0, ())})
  row = only(history.block, np.array([0]), np.array([3 * DAY]), np.array([3]))[0]
  assert dict(zip(only.names, row))["distinct c"] == np.log1p(np.float32(2)) and len(row) == len(only.names)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_leave_one_out_keeps_the_last_two_events_from_training(n: int) -> None:
  codes = np.arange(2, n + 2, dtype=np.int32)[:, None]
  n_train = n if n < 3 else n - 2
  history = UserHistory("u", np.zeros(n, np.int64), np.zeros(n, np.int32), codes, np.zeros((n, 0), np.float32), n_train)
  snapshots, left_out = leave_one_out_snapshots(history.block, 1)
  assert left_out == 0
  target = label_next_event(history.block, snapshots, history.codes[:, 0], None)
  by_split = {s: target.value[(snapshots.split == s) & target.known].tolist() for s in (TRAIN, VALIDATION, TEST)}
  if n >= 3:
    assert (by_split[VALIDATION], by_split[TEST]) == ([n], [n + 1])
    assert by_split[TRAIN] == list(range(3, n))
  else:
    assert by_split == {TRAIN: list(range(3, n + 2)), VALIDATION: [], TEST: []}


def test_a_user_label_counts_only_in_the_split_of_its_user() -> None:
  history = UserHistory("u", np.array([0]), np.zeros(1, np.int32), np.zeros((1, 0), np.int32), np.zeros((1, 0)), 1)
  snapshots = looks(history)
  for owner in (TRAIN, VALIDATION, TEST):
    label = label_user(np.array([1.0]), snapshots, np.array([owner]))
    assert (label.known == (snapshots.split == owner)).all() and label.value.all()
  assert not label_user(np.array([np.nan]), snapshots, np.array([TRAIN])).known.any()


def test_users_are_divided_by_hash_in_the_stated_shares() -> None:
  split = config.Split(user_validation=0.1, user_test=0.2)
  share = np.bincount([user_split(f"user{i}", split) for i in range(5000)], minlength=3) / 5000
  np.testing.assert_allclose(share, [0.7, 0.1, 0.2], atol=0.02)


def test_iso_writes_utc() -> None:
  moment = datetime.datetime(2024, 2, 29, 23, 59, 59, tzinfo=datetime.UTC)
  assert format_time(int(moment.timestamp() * 1_000_000)) == "2024-02-29T23:59:59"
