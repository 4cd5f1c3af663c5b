"""Whole preparations against a slow reference in plain Python, straight from the rows of the raw files."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import statistics
import tempfile
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from supermoe_jax.data import windows
from supermoe_jax.data.dataset import Dataset
from tests.fixtures.random_logs import (
  AT_LEAST,
  DAY,
  EITHER,
  FIRST,
  FOLLOWING,
  TOP,
  USERS,
  WAYS,
  Case,
  M,
  Row,
  cases,
  moment,
  owner,
  prepared,
  random_rows,
)

SPLITS = ("train", "validation", "test")


# ------------------------------------------------------------------------------------------------------ the reference


class Reference:
  """What `prepare` should write, by loops over the rows."""

  def __init__(self, case: Case, split: dict[str, Any], tasks: dict[str, Any]):
    self.case, self.split, self.tasks = case, split, tasks
    self.mode = split.get("mode", "temporal")
    rows: list[Row] = []
    seen = set()
    for row in (*case.views, *case.buys):
      told = dataclasses.replace(row, zone=None)
      if case.duplicates == "drop" and told in seen:
        continue
      seen.add(told)
      rows.append(row)
    self.histories: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.time):  # Python sorts stably
      self.histories.setdefault(row.user, []).append(row)
    self.first, last = min(r.time for r in rows), max(r.time for r in rows)
    if case.log_end and self.mode != "leave_one_out":
      self.log_end = moment(case.log_end)
    else:
      self.log_end = last + 1 if self.mode == "user" else last
    self.training = {u: self._n_training(u, h) for u, h in self.histories.items()}
    trained = [r for u, h in self.histories.items() for r in h[: self.training[u]]]
    self.items = self._vocabulary([r.item for r in trained], case.min_count)
    self.frequent = self._vocabulary([r.item for r in trained], EITHER)
    self.clicks = self._vocabulary([r.click for r in trained], 1)
    self.prices = self._moments([self._bent(r.price) for r in trained if r.price is not None])
    of_training = [u for u in case.users if owner(u["user"]) == "train"]
    self.of_user = {u["user"]: u for u in case.users}
    self.towns = self._vocabulary([self._known(r, "town") for r in trained], 1)
    heights = [self._known(r, "height") for r in trained if r.source == "buys"]
    self.heights = self._moments([h for h in heights if h is not None])
    self.tiers = self._vocabulary([u["tier"] for u in of_training], 1)
    self.ages = self._moments([u["age"] for u in of_training if u["age"] is not None])

  def _n_training(self, user: str, history: list[Row]) -> int:
    if self.mode == "leave_one_out":
      return len(history) - 2 if len(history) >= 3 else len(history)
    if self.mode == "user":
      return sum(r.time < self.log_end for r in history) if owner(user) == "train" else 0
    return sum(r.time < moment(self.split["train_end"]) for r in history)

  @staticmethod
  def _vocabulary(values: list[str | None], least: int) -> list[str]:
    counted = Counter(v for v in values if v is not None)
    return sorted((v for v, n in counted.items() if n >= least), key=lambda v: (-counted[v], v.encode()))

  @staticmethod
  def _moments(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.pstdev(values) or 1.0

  def _bent(self, price: float) -> float:
    return math.copysign(math.log1p(abs(price)), price) if self.case.encoding == "log1p" else price

  @staticmethod
  def _code(vocabulary: list[str], value: str | None) -> int:
    return 0 if value is None else (vocabulary.index(value) + 2 if value in vocabulary else 1)

  def _known(self, row: Row, column: str) -> Any:
    """What the table of users holds of an event's user."""
    return self.of_user.get(row.user, {}).get(column)

  def event(self, row: Row) -> tuple[list[int], list[float | None]]:
    """The codes of an event's fields, and its standardised numbers."""
    bucket, either = 0, self._code(self.frequent, row.item)
    if row.item is not None:
      hashed = int.from_bytes(hashlib.md5(row.item.encode()).digest()[8:], "little")
      bucket, either = 2 + hashed % 3, 2 + len(self.frequent) + hashed % 2 if either == 1 else either
    price = None if row.price is None else (self._bent(row.price) - self.prices[0]) / self.prices[1]
    height = self._known(row, "height") if row.source == "buys" else None
    height = None if height is None else (height - self.heights[0]) / self.heights[1]
    codes = [(self.items, row.item), (self.clicks, row.click), (self.towns, self._known(row, "town"))]
    item, *rest = [self._code(*of) for of in codes]
    return [item, bucket, either, *rest], [price, height]

  # ---------------------------------------------------------------------------------------------------- snapshots

  def snapshots(self, user: str) -> list[tuple[str, int, int]]:
    """Of each snapshot its split, its τ, and how many events it sees."""
    history, split = self.histories[user], self.split
    if self.mode == "leave_one_out":
      n = len(history)
      return [
        ("train" if n < 3 or i < n - 2 else ("validation" if i == n - 2 else "test"), history[i - 1].time, i)
        for i in range(1, n)
      ]
    found = [("train" if self.mode == "temporal" else owner(user), t) for t in sorted(set(self.moments(user)))]
    if self.mode == "temporal":
      found += [(name, t) for name in SPLITS[1:] for t in sorted(moment(t) for t in split[name])]
    seen = [(name, t, sum(r.time < t for r in history)) for name, t in found]
    return [s for s in seen if s[2] >= split.get("min_events", 1)]

  def moments(self, user: str) -> list[int]:
    """Where the policy puts snapshots, repeated ones too."""
    history, split = self.histories[user], self.split
    end = self.log_end if self.mode == "user" else moment(split["train_end"])
    start = moment(split["train_start"]) if "train_start" in split else None
    within = [r.time for r in history if r.time < end]
    moments = []
    policy = split.get("snapshots", "calendar")
    if policy == "calendar":
      step = int(split["every_days"] * DAY)
      time = end - step
      while time >= self.first + step:
        moments.append(time)
        time -= step
    elif policy == "every_events":
      for i, time in enumerate(within, 1):
        if i % split["every_events"] == 0 and (start is None or time + 1 >= start):
          moments.append(time + 1)
    elif within and (start is None or within[-1] + 1 >= start):
      moments.append(within[-1] + 1)
    return moments

  # ------------------------------------------------------------------------------------------------------- labels

  def _until(self, split: str) -> int:
    if self.mode == "user" or split == "test":
      return self.log_end
    if split == "train":
      return moment(self.split["train_end"])
    return min(moment(t) for t in self.split["test"]) - int(self.split.get("gap_days", 0) * DAY)

  def _following(self, user: str, snapshot: tuple[str, int, int]) -> list[tuple[int, Row]]:
    """The events that come next, with their places, as far as the snapshot may be asked about them."""
    split, time, n = snapshot
    events = list(enumerate(self.histories[user]))
    if self.mode == "leave_one_out":
      return [] if split == "train" and n >= self.training[user] else events[n : n + 1]
    return [(i, r) for i, r in events if time <= r.time < self._until(split)]

  def label(self, name: str, user: str, snapshot: tuple[str, int, int]) -> Any:
    """A task's label: None if unknown; of an event label a list of pairs (event's place or -1, label)."""
    task, (split, time, _) = self.tasks[name], snapshot
    if task["kind"] == "next_event":
      known = [r.item for _, r in self._following(user, snapshot) if r.item is not None]
      return self._code(self.items, known[0]) if known else None
    if task["kind"] == "event_label":
      carried = [(i, r) for i, r in self._following(user, snapshot) if getattr(r, task["field"]) is not None][:M]
      said = [(i, self._said(name, r)) for i, r in carried]
      return said + [(-1, None)] * (M - len(said))
    if task["kind"] == "user_label":
      return self._of_user(name, user) if split == owner(user) else None
    end = time + int(task["horizon_days"] * DAY)
    if end > self._until(split):
      return None
    inside = [r for r in self.histories[user] if time <= r.time < end]
    if task["kind"] == "future_event":
      return int(any(r.source == task["source"] for r in inside) != task.get("negate", False))
    return [int(any(r.item == v for r in inside)) for v in self.items[:TOP]]

  def _said(self, name: str, row: Row) -> float | None:
    if name == "click":
      return float(row.click == "yes") if row.click in self.clicks else None
    assert row.price is not None
    return float(row.price >= AT_LEAST) if name == "dear" else self.event(row)[1][0]

  def _of_user(self, name: str, user: str) -> float | None:
    (row,) = [u for u in self.case.users if u["user"] == user] or [None]
    if row is None or row[self.tasks[name]["column"]] is None:
      return None
    if name == "paid":
      return float(row["plan"] == "paid")
    if name == "tier":
      return float(self.tiers.index(row["tier"])) if row["tier"] in self.tiers else None
    return (row["age"] - self.ages[0]) / self.ages[1]


# ---------------------------------------------------------------------------------------------------------- the tests


def close(a: float | None, b: float | None) -> bool:
  return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5)


def check_record(record: dict[str, Any], user: str, wanted: Reference) -> None:
  history = wanted.histories[user]
  assert record["time"].tolist() == [r.time for r in history]
  assert record["source"].tolist() == [("views", "buys").index(r.source) for r in history]
  for row, codes, numbers in zip(history, record["codes"].tolist(), record["numeric"].tolist(), strict=True):
    own_codes, own_numbers = wanted.event(row)
    assert codes == own_codes
    assert all(close(None if math.isnan(a) else a, b) for a, b in zip(numbers, own_numbers, strict=True))
  assert record["n_train"] == wanted.training[user] and SPLITS[record["user_split"]] == owner(user)
  snapshots = wanted.snapshots(user)
  columns = (record["snapshot_split"], record["snapshot_time"], record["snapshot_events"])
  assert [(SPLITS[s], t, n) for s, t, n in zip(*(c.tolist() for c in columns), strict=True)] == snapshots
  for name in wanted.tasks:
    for s, snapshot in enumerate(snapshots):
      label, known = record[f"label_{name}"][s].tolist(), record[f"known_{name}"][s].tolist()
      expected, where = wanted.label(name, user, snapshot), (name, user, snapshot)
      if wanted.tasks[name]["kind"] == "event_label":
        assert record[f"event_{name}"][s].tolist() == [i for i, _ in expected], where
        assert known == [v is not None for _, v in expected], where
        assert all(close(a, b) for a, (_, b) in zip(label, expected) if b is not None), where
        continue
      assert known == (expected is not None), where
      if expected is not None:
        assert label == expected if isinstance(expected, list) else close(label, expected), where


def records(dataset: Dataset) -> dict[str, dict[str, Any]]:
  return {r["user"]: r for r in map(dataset.__getitem__, range(len(dataset)))}


def few(examples: int) -> settings:
  """Each example prepares datasets, so they are few, and a failure is not reduced; they are the same in every run."""
  return settings(
    max_examples=examples,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
  )


@pytest.mark.parametrize("way", WAYS)
def test_every_record_equals_a_plain_reference(way: str) -> None:
  split, tasks = WAYS[way]
  known: Counter[tuple[str, str]] = Counter()
  repeated: list[int] = []

  @few(3)
  @given(case=cases())
  def compare(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
      dataset = prepared(folder, case, way)
      found, wanted = records(dataset), Reference(case, split, tasks)
      assert found.keys() == wanted.histories.keys()
      for user, record in found.items():
        check_record(record, user, wanted)
      with_value = {u["user"] for u in case.users if u["plan"] or u["age"] or u["tier"] in wanted.tiers}
      assert dataset.manifest["user_table"]["labelled_users_without_events"] == len(with_value - found.keys())
      if split.get("mode") != "leave_one_out":
        moments = [wanted.moments(u) for u in found]
        assert dataset.manifest["repeated_snapshots"] == sum(len(m) - len(set(m)) for m in moments)
        repeated.append(dataset.manifest["repeated_snapshots"])
      known.update({(n, s): c["known"] for n, of in dataset.manifest["labels"].items() for s, c in of.items()})

  compare()
  never = {(n, s) for n in tasks for s in SPLITS if not known[n, s]}
  assert any(repeated) == (split.get("snapshots") == "every_events")
  # Nothing of the training period follows its end.
  assert never == ({(n, "train") for n in FOLLOWING} if way == "end" else set())


# ------------------------------------------------------------------------------------------------------------- leakage


def features(dataset: Dataset, record: dict[str, Any], chosen: np.ndarray) -> list[windows.Features]:
  """What the encoder would see at each of the snapshots, each as a row of its own."""
  history, times, seen = dataset.history(record), record["snapshot_time"], record["snapshot_events"]
  n = max([1, *seen[chosen].tolist()])
  at = [slice(i, i + 1) for i in chosen]
  return [windows.window(dataset, history, 0, int(seen[i][0]), times[i], seen[i], n, 1) for i in at]


def another_future(case: Case, from_time: int, users: list[str], rng: random.Random) -> Case:
  """Other rows of the users at and after a time, and more of them; the log's own end stays."""
  parts = []
  for source, rows in (("views", case.views), ("buys", case.buys)):
    kept = [r for r in rows if r.user not in users or r.time < from_time]
    new = [r for r in random_rows(rng, source, 60, users) if r.time >= from_time]
    parts.append((*kept, *new))
  return dataclasses.replace(case, views=parts[0], buys=parts[1], log_end="2024-05-01")


@few(3)
@given(case=cases(), seed=st.integers(0, 999), way=st.sampled_from(["gap", "every_events"]), cut=st.integers(0, 1))
def test_rows_at_or_after_a_snapshot_change_nothing_of_it(case: Case, seed: int, way: str, cut: int) -> None:
  """Neither its features, nor the labels of the periods that end before."""
  split, tasks = WAYS[way]
  time = (moment(split["train_end"]), moment(min(split["test"])))[cut]
  case = dataclasses.replace(case, log_end="2024-05-01")
  with tempfile.TemporaryDirectory() as folder:
    one = prepared(folder, case, way)
    other = prepared(folder, another_future(case, time, list(USERS[:8]), random.Random(seed)), way, "two")
    found, changed = records(one), records(other)
    assert (one.path / "encoders" / "encoders.json").read_bytes() == (
      other.path / "encoders" / "encoders.json"
    ).read_bytes()
    compared = 0
    for user in found.keys() & changed.keys():
      a, b = found[user], changed[user]
      until = np.flatnonzero(a["snapshot_time"] <= time)
      compared += len(until)
      for key in ("snapshot_time", "snapshot_split", "snapshot_events"):
        np.testing.assert_array_equal(a[key][until], b[key][until])
      for x, y in zip(features(one, a, until), features(other, b, until), strict=True):
        for part, same in zip(x, y, strict=True):
          np.testing.assert_array_equal(part, same)
      over = until[a["snapshot_split"][until] <= cut]  # training ends at train_end, validation before the first test
      for name in tasks:
        known = a[f"known_{name}"][over].astype(bool)
        np.testing.assert_array_equal(known, b[f"known_{name}"][over])
        np.testing.assert_array_equal(a[f"label_{name}"][over][known], b[f"label_{name}"][over][known])
    assert compared


@few(2)
@given(case=cases(), seed=st.integers(0, 999))
def test_held_out_users_change_nothing_of_the_training_users(case: Case, seed: int) -> None:
  """Other events of theirs: no vocabulary, statistic or record of a training user differs."""
  case = dataclasses.replace(case, log_end="2024-05-01")
  held_out = [u for u in USERS[:8] if owner(u) != "train"]
  changed = another_future(case, FIRST, held_out, random.Random(seed))
  assert changed != case
  with tempfile.TemporaryDirectory() as folder:
    one, other = prepared(folder, case, "user"), prepared(folder, changed, "user", "two")
    assert one.manifest["encoding_hash"] == other.manifest["encoding_hash"]
    assert one.manifest["label_rates"] == other.manifest["label_rates"]
    a, b = records(one), records(other)
    training = {u for u in a if owner(u) == "train"}
    assert training and training == {u for u in b if owner(u) == "train"}
    for user in training:
      for key in a[user]:
        np.testing.assert_array_equal(a[user][key], b[user][key])
    for user in a.keys() - training:
      assert a[user]["n_train"] == 0 and not (a[user]["snapshot_split"] == 0).any()
