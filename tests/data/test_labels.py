"""Labels and aggregates against a slow reference in plain Python, and against the future."""

import datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY as DAY
from supermoe_jax.data import labels
from supermoe_jax.data.events import UserHistory
from supermoe_jax.data.labels import TEST, TRAIN, VALIDATION, Aggregator

SPLIT = config.Split(
  train_end="1970-02-10", every_days=5.0, validation=("1970-02-10",), test=("1970-02-20", "1970-03-01")
)
TRAIN_END, FIRST_TEST, LOG_END = 40 * DAY, 50 * DAY, 80 * DAY
TIMES = labels.calendar(SPLIT, 0, LOG_END)


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


def cut(history: UserHistory, n: int) -> UserHistory:
  arrays = (history.time[:n], history.source[:n], history.codes[:n], history.numeric[:n])
  return UserHistory(history.user, *arrays, min(history.n_train, n))


def test_training_snapshots_count_back_from_the_end_of_training() -> None:
  train = TIMES.snapshots[TIMES.split == TRAIN] // DAY
  assert train.tolist() == [5, 10, 15, 20, 25, 30, 35]
  assert TIMES.observed_until == (TRAIN_END, FIRST_TEST, LOG_END)


def test_a_snapshot_outside_the_log_is_an_error() -> None:
  with pytest.raises(config.ConfigError, match="1970-03-01 lies outside the log, which runs from 1970-01-01"):
    labels.calendar(SPLIT, 0, 55 * DAY)


def test_no_room_for_a_training_snapshot_is_an_error() -> None:
  with pytest.raises(config.ConfigError, match="no training snapshot fits"):
    labels.calendar(SPLIT, 38 * DAY, LOG_END)


@settings(max_examples=150, deadline=None)
@given(histories(), st.sampled_from([3.0, 7.0, 12.0]))
def test_labels_equal_a_plain_reference(history: UserHistory, days: float) -> None:
  snapshots, left_out = labels.temporal_snapshots(history, TIMES, 1)
  assert left_out + len(snapshots.time) == len(TIMES.snapshots)
  event = labels.future_event(history, snapshots, TIMES, 1, days, False)
  churn = labels.future_event(history, snapshots, TIMES, 1, days, True)
  values = labels.future_values(history, snapshots, TIMES, 0, 3, days)
  following = labels.next_event(history, snapshots, 1, TIMES)
  limits = {TRAIN: TRAIN_END, VALIDATION: FIRST_TEST, TEST: LOG_END}
  events = list(zip(history.time.tolist(), history.source.tolist(), history.codes.tolist()))
  for s, (time, n, split) in enumerate(zip(*snapshots)):
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


AGGREGATOR = Aggregator((2.0, 10.0), ("a", "b"), ("x",), {"c": (0, ("p", "q", "r"))})


@settings(max_examples=100, deadline=None)
@given(histories())
def test_aggregates_equal_a_plain_reference(history: UserHistory) -> None:
  snapshots, _ = labels.temporal_snapshots(history, TIMES, 1)
  rows = AGGREGATOR(history, snapshots.time, snapshots.n_events)
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
  np.testing.assert_array_equal(AGGREGATOR(history, time, seen), AGGREGATOR(cut(history, n), time, seen))


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_leave_one_out_keeps_the_last_two_events_from_training(n: int) -> None:
  codes = np.arange(2, n + 2, dtype=np.int32)[:, None]
  n_train = n if n < 3 else n - 2
  history = UserHistory("u", np.zeros(n, np.int64), np.zeros(n, np.int32), codes, np.zeros((n, 0), np.float32), n_train)
  snapshots, left_out = labels.leave_one_out_snapshots(history, 1)
  assert left_out == 0
  target = labels.next_event(history, snapshots, 0, None)
  by_split = {s: target.value[(snapshots.split == s) & target.known].tolist() for s in (TRAIN, VALIDATION, TEST)}
  if n >= 3:
    assert (by_split[VALIDATION], by_split[TEST]) == ([n], [n + 1])
    assert by_split[TRAIN] == list(range(3, n))
  else:
    assert by_split == {TRAIN: list(range(3, n + 2)), VALIDATION: [], TEST: []}


def test_a_user_label_counts_only_in_the_split_of_its_user() -> None:
  history = UserHistory("u", np.array([0]), np.zeros(1, np.int32), np.zeros((1, 0), np.int32), np.zeros((1, 0)), 1)
  snapshots, _ = labels.temporal_snapshots(history, TIMES, 1)
  for owner in (TRAIN, VALIDATION, TEST):
    label = labels.user_label(1.0, snapshots, owner)
    assert (label.known == (snapshots.split == owner)).all() and label.value.all()
  assert not labels.user_label(None, snapshots, TRAIN).known.any()


def test_users_are_divided_by_hash_in_the_stated_shares() -> None:
  split = config.Split(user_validation=0.1, user_test=0.2)
  share = np.bincount([labels.user_split(f"user{i}", split) for i in range(5000)], minlength=3) / 5000
  np.testing.assert_allclose(share, [0.7, 0.1, 0.2], atol=0.02)


def test_iso_writes_utc() -> None:
  moment = datetime.datetime(2024, 2, 29, 23, 59, 59, tzinfo=datetime.UTC)
  assert labels.iso(int(moment.timestamp() * 1_000_000)) == "2024-02-29T23:59:59"
