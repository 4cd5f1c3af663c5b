"""Simultaneous events as a set: any value of the next moment is right, whatever order the files give."""

from __future__ import annotations

import dataclasses
import pathlib
import random
from typing import Any

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.batch import UNKNOWN, Targets
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.supervision import Supervision
from supermoe_jax.data.tasks.labels import values_of_moments
from tests.fixtures.grids import quick_few
from tests.fixtures.plain_reference import Reference
from tests.fixtures.random_logs import CASES, WAYS, Case, prepared, prepared_once

ASKING = [way for way, (_, tasks) in WAYS.items() if "next_item" in tasks]


def asks(dataset: Dataset, **settings: Any) -> config.Config:
  """The dataset's config with only the task about the next item."""
  task = dataclasses.replace(dataset.config.tasks["next_item"], **settings)
  return dataclasses.replace(dataset.config, tasks={"next_item": task})


def right(targets: Targets) -> list[list[int]]:
  """At each site the codes that are right, those out of vocabulary aside; none where no label is known."""
  assert not targets.also[~targets.known].any()
  codes = np.concatenate([targets.value[:, None], targets.also], axis=1)
  return [[c for c in row if c > UNKNOWN] if known else [] for row, known in zip(codes.tolist(), targets.known)]


def of_moment(wanted: Reference, events: list[tuple[int, Any]]) -> list[int]:
  """The different codes, in the order of the files, of the first moment of events that has a value."""
  carried = [r for _, r in events if r.item is not None]
  codes = [wanted._code(wanted.items, r.item) for r in carried if r.time == carried[0].time]
  return list(dict.fromkeys(c for c in codes if c > UNKNOWN))


@pytest.mark.parametrize("way", ASKING)
@pytest.mark.parametrize("name", quick_few(["text"], list(CASES)))
def test_moments_equal_a_plain_reference_at_snapshots_and_events(
  tmp_path_factory: pytest.TempPathFactory, name: str, way: str
) -> None:
  dataset = prepared_once(tmp_path_factory, name, way)
  wanted = Reference(CASES[name], *WAYS[way])
  several = 0
  for training in (True, False):
    supervision = Supervision(dataset, asks(dataset, ties="set", most_values=6), training=training)
    for record in map(dataset.__getitem__, range(len(dataset))):
      user, history = record["user"], dataset.history(record)
      snapshots = wanted.snapshots(user)
      found = right(supervision.at_snapshots(record, history, np.arange(len(snapshots)))["next_item"])
      assert found == [[] if s.dated else of_moment(wanted, wanted._following(user, s)) for s in snapshots]
      several += sum(len(codes) > 1 for codes in found)
      n = history.n_train
      events = list(enumerate(wanted.histories[user]))[:n]
      expected = []
      for i, row in events:
        later = [(j, r) for j, r in events[i + 1 :] if r.item is not None]
        expected.append(of_moment(wanted, later) if later and later[0][1].time > row.time else [])
      assert right(supervision.at_events(history, 0, n)["next_item"]) == expected
  assert (several > 0) == (way != "leave_one_out")


def shuffled(case: Case) -> Case:
  rng = random.Random(0)
  return dataclasses.replace(case, views=tuple(rng.sample(case.views, len(case.views))), buys=case.buys)


@pytest.mark.parametrize("way", ["calendar", "user"])
def test_the_order_of_simultaneous_events_in_the_files_asks_nothing_else(tmp_path: pathlib.Path, way: str) -> None:
  """By default, as ties are common here."""
  one, other = (prepared(tmp_path, case, way, n) for n, case in (("a", CASES["text"]), ("b", shuffled(CASES["text"]))))
  found = []
  for dataset in (one, other):
    supervision = Supervision(dataset, asks(dataset), training=True)
    records = {r["user"]: r for r in map(dataset.__getitem__, range(len(dataset)))}
    of_users = {}
    for user, record in sorted(records.items()):
      chosen = np.arange(len(record["snapshot_time"]))
      targets = supervision.at_snapshots(record, dataset.history(record), chosen)["next_item"]
      of_users[user] = [sorted(codes) for codes in right(targets)]
    found.append(of_users)
  assert found[0] == found[1]
  assert sum(len(codes) > 1 for of_user in found[0].values() for codes in of_user) > 5


def test_moments_are_asked_about_where_ties_are_common() -> None:
  task = config.NextEvent(field="item", most_values=5)
  assert task.values_of_a_moment(0.5, "temporal") == task.values_of_a_moment(0.1, "user") == 5
  assert task.values_of_a_moment(0.09, "temporal") == task.values_of_a_moment(0.5, "leave_one_out") == 0
  assert dataclasses.replace(task, ties="set").values_of_a_moment(0.0, "leave_one_out") == 5
  assert dataclasses.replace(task, ties="order").values_of_a_moment(1.0, "temporal") == 0


def test_the_first_values_of_a_large_moment_stay() -> None:
  codes, time = np.array([3, 9, 0, 1, 9, 4, 2, 7], np.int32), np.array([0, 5, 5, 5, 5, 5, 5, 8])
  found = values_of_moments(codes, time, np.array([[1, 2], [-1, 7]]), 8, 2)
  assert found.tolist() == [[[9, 4], [9, 4]], [[0, 0], [7, 0]]]
  assert values_of_moments(codes, time, np.array([1]), np.array([5]), 4).tolist() == [[9, 0, 0, 0]]
