"""Whole preparations against a slow reference in plain Python; and what comes later, or of others, changes nothing."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import tempfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from supermoe_jax.batch import Features
from supermoe_jax.data.dataset import windows
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import record_counts
from tests.fixtures.plain_reference import SPLITS, Record, Reference, check_manifest, check_record
from tests.fixtures.random_logs import (
  CASES,
  FIRST,
  FOLLOWING,
  USERS,
  WAYS,
  Case,
  cases,
  moment,
  owner,
  prepared,
  prepared_once,
  random_rows,
)

WITH_EVENTS = USERS[:8]  # `random_rows` draws rows of these users only


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


def records(dataset: Dataset) -> dict[str, Record]:
  return {r["user"]: r for r in map(dataset.__getitem__, range(len(dataset)))}


def check_aggregates(dataset: Dataset, found: dict[str, Record]) -> float:
  """The training snapshots' aggregates are standardised, but that none is divided by less than the least scale.

  Returns the share of them that are divided by more.
  """
  rows = []
  for record in found.values():
    train = np.flatnonzero(record["snapshot_split"] == 0)
    asked = (record["snapshot_time"][train], record["snapshot_events"][train])
    rows.append(dataset.aggregates(dataset.history(record).block, np.zeros(len(train), np.int64), *asked))
  standardised, scale = np.concatenate(rows), dataset.aggregate_scale
  assert len(standardised) == dataset.manifest["snapshots"]["train"]
  if not len(standardised):
    return 0.0
  np.testing.assert_allclose(standardised.mean(0), 0.0, atol=1e-4)
  wide, constant = scale > record_counts.SMALLEST_SCALE, scale > 1e9
  np.testing.assert_allclose(standardised.std(0)[wide & ~constant], 1.0, rtol=1e-3)
  assert (standardised.std(0)[~wide] <= 1.0 + 1e-3).all() and (np.abs(standardised[:, constant]) < 1e-20).all()
  assert scale.min() >= np.float32(record_counts.SMALLEST_SCALE)
  return float(wide.mean())


class Found:
  """Compares whole datasets of one way to split, and counts what they held."""

  def __init__(self, way: str):
    self.split, self.tasks = WAYS[way]
    self.known: Counter[tuple[str, str]] = Counter()
    self.repeated = self.unseen = 0
    self.varied = 0.0

  def compare(self, dataset: Dataset, case: Case) -> None:
    found, wanted = records(dataset), Reference(case, self.split, self.tasks)
    assert found.keys() == wanted.histories.keys()
    for user, record in found.items():
      check_record(record, user, wanted)
    check_manifest(dataset.manifest, wanted)
    self.varied = max(self.varied, check_aggregates(dataset, found))
    with_value = {u["user"] for u in case.users if u["plan"] or u["age"] or u["tier"] in wanted.tiers}
    assert dataset.manifest["user_table"]["labelled_users_without_events"] == len(with_value - found.keys())
    if self.split.get("mode") != "leave_one_out":
      moments = [wanted.moments(u) for u in found]
      assert dataset.manifest["repeated_snapshots"] == sum(len(m) - len(set(m)) for m in moments)
      self.repeated += dataset.manifest["repeated_snapshots"]
    self.unseen += sum(c.get("unseen_value", 0) for of in dataset.manifest["labels"].values() for c in of.values())
    self.known.update({(n, s): c["known"] for n, of in dataset.manifest["labels"].items() for s, c in of.items()})

  def assert_all_were_met(self, way: str) -> None:
    """Every task had labels in every split, but that nothing of the training period follows its end."""
    never = {(n, s) for n in self.tasks for s in SPLITS if not self.known[n, s]}
    assert self.varied > 0.5
    assert bool(self.unseen) == ("next_item" in self.tasks)
    assert bool(self.repeated) == (self.split.get("snapshots") == "every_events")
    assert never == ({(n, "train") for n in FOLLOWING} if way == "end" else set())


@pytest.mark.parametrize("way", WAYS)
def test_every_record_equals_a_plain_reference(tmp_path_factory: pytest.TempPathFactory, way: str) -> None:
  found = Found(way)
  for name, case in CASES.items():
    found.compare(prepared_once(tmp_path_factory, name, way), case)
  found.assert_all_were_met(way)


@pytest.mark.nightly
@pytest.mark.parametrize("way", WAYS)
def test_every_record_of_random_logs_equals_a_plain_reference(way: str) -> None:
  found = Found(way)

  @few(5)
  @given(case=cases())
  def compare(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
      found.compare(prepared(folder, case, way), case)

  compare()
  found.assert_all_were_met(way)


# ------------------------------------------------------------------------------------------------------------- leakage


def features(dataset: Dataset, record: Record, chosen: np.ndarray) -> list[Features]:
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
  changed = dataclasses.replace(case, views=parts[0], buys=parts[1])
  assert changed != case and case.log_end
  return changed


def cut_at(way: str, cut: int) -> int:
  """The end of training, or the first test snapshot."""
  split, _ = WAYS[way]
  return (moment(split["train_end"]), moment(min(split["test"])))[cut]


def assert_the_past_is_the_same(one: Dataset, other: Dataset, way: str, cut: int) -> None:
  """Neither features differ, nor the labels of the periods that end before."""
  time, found, changed = cut_at(way, cut), records(one), records(other)
  encoders = [d.path / "encoders" / "encoders.json" for d in (one, other)]
  assert encoders[0].read_bytes() == encoders[1].read_bytes()
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
    for name in WAYS[way][1]:
      known = a[f"known_{name}"][over].astype(bool)
      np.testing.assert_array_equal(known, b[f"known_{name}"][over])
      np.testing.assert_array_equal(a[f"label_{name}"][over][known], b[f"label_{name}"][over][known])
  assert compared


@pytest.mark.parametrize("way", ["gap", "every_events", "dated"])
@pytest.mark.parametrize("cut", [0, 1])
def test_rows_at_or_after_a_snapshot_change_nothing_of_it(
  tmp_path_factory: pytest.TempPathFactory, tmp_path: pathlib.Path, way: str, cut: int
) -> None:
  case = another_future(CASES["text"], cut_at(way, cut), list(WITH_EVENTS), random.Random(cut))
  other = prepared(tmp_path, case, way)
  assert_the_past_is_the_same(prepared_once(tmp_path_factory, "text", way), other, way, cut)


@pytest.mark.nightly
@few(6)
@given(case=cases(), seed=st.integers(0, 999), way=st.sampled_from(["gap", "every_events"]), cut=st.integers(0, 1))
def test_rows_at_or_after_a_snapshot_of_a_random_log_change_nothing_of_it(
  case: Case, seed: int, way: str, cut: int
) -> None:
  case = dataclasses.replace(case, log_end="2024-05-01")
  changed = another_future(case, cut_at(way, cut), list(WITH_EVENTS), random.Random(seed))
  with tempfile.TemporaryDirectory() as folder:
    assert_the_past_is_the_same(prepared(folder, case, way), prepared(folder, changed, way, "two"), way, cut)


def other_held_out_users(case: Case, seed: int) -> Case:
  held_out = [u for u in WITH_EVENTS if owner(u) != "train"]
  return another_future(case, FIRST, held_out, random.Random(seed))


def assert_training_users_are_the_same(one: Dataset, other: Dataset) -> None:
  """No vocabulary, statistic or record of a training user differs."""
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


def test_held_out_users_change_nothing_of_the_training_users(
  tmp_path_factory: pytest.TempPathFactory, tmp_path: pathlib.Path
) -> None:
  other = prepared(tmp_path, other_held_out_users(CASES["text"], 3), "user")
  assert_training_users_are_the_same(prepared_once(tmp_path_factory, "text", "user"), other)


@pytest.mark.nightly
@few(4)
@given(case=cases(), seed=st.integers(0, 999))
def test_held_out_users_of_a_random_log_change_nothing_of_the_training_users(case: Case, seed: int) -> None:
  case = dataclasses.replace(case, log_end="2024-05-01")
  with tempfile.TemporaryDirectory() as folder:
    one = prepared(folder, case, "user")
    assert_training_users_are_the_same(one, prepared(folder, other_held_out_users(case, seed), "user", "two"))
