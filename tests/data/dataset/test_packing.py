"""Several users in a row: who shares one, what lies in it, and that nothing of a user is lost or changed."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.data.dataset import packing, training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.supervision import Supervision, join_targets
from supermoe_jax.data.dataset.windows import window
from tests.fixtures.unpacking import alone

ROOM = 70  # events of a row; most histories of the log are shorter, some are not
SNAPSHOTS = 12


def packed(cfg: config.Config, **train: object) -> config.Config:
  values = {"packing": True, "snapshots_per_row": SNAPSHOTS, **train}
  return dataclasses.replace(
    cfg,
    model=dataclasses.replace(cfg.model, max_events=ROOM),
    train=dataclasses.replace(cfg.train, **values),
  )


@settings(deadline=None)
@given(
  sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60),
  room=st.integers(20, 40),
  most=st.integers(1, 8),
)
def test_rows_are_filled_within_their_room_and_two_are_never_both_half_empty(
  sizes: list[int], room: int, most: int
) -> None:
  ordered = np.sort(np.array(sizes))[::-1]
  row = packing.fill_rows(ordered, room, most)
  held, filled = np.bincount(row), np.bincount(row, weights=ordered)
  assert held.min() > 0 and held.max() <= most
  assert filled.max() <= room
  # Whoever opened a later row would have fitted otherwise.
  assert np.sum((2 * filled <= room) & (held < most)) <= 1


def test_short_histories_leave_less_than_a_twelfth_of_the_positions_empty() -> None:
  rng = np.random.default_rng(0)
  for mean in (8, 30, 90):
    sizes = np.sort(np.clip(rng.geometric(1 / mean, 20_000), 1, 256))[::-1]
    rows = packing.fill_rows(sizes, 256, 64).max() + 1
    assert 1 - sizes.sum() / (rows * 256) < 0.08


@settings(deadline=None)
@given(wanted=st.lists(st.integers(0, 9), min_size=1, max_size=8), room=st.integers(8, 20), seed=st.integers(0, 9))
def test_snapshots_are_shared_evenly_and_everyone_gets_one(wanted: list[int], room: int, seed: int) -> None:
  given = packing.share_snapshots(np.array(wanted), room, np.random.default_rng(seed))
  assert given.sum() == min(room, sum(wanted))
  assert (given <= wanted).all() and (given[np.array(wanted) > 0] > 0).all()
  unmet = given[given < wanted]
  assert unmet.size == 0 or given.max() - unmet.min() <= 1


def test_a_plan_places_every_user_once_an_epoch_with_other_neighbours_each(
  dataset: Dataset, cfg: config.Config
) -> None:
  sizes = packing.row_sizes(dataset, packed(cfg))
  plan, again = (packing.PackingPlan(sizes, packed(cfg), seed=3) for _ in range(2))
  with_events = {i for i in range(len(dataset)) if dataset[i]["n_train"] > 0}
  assert len(plan) < 0.7 * len(with_events)
  shared = []
  for epoch in (0, 1, 7):
    rows = [plan.users(epoch, row) for row in range(len(plan))]
    assert sorted(np.concatenate(rows)) == sorted(with_events)
    assert all(sizes.events[users].sum() <= ROOM and len(users) <= SNAPSHOTS for users in rows)
    shared.append({frozenset(pair) for users in rows for pair in itertools.combinations(users.tolist(), 2)})
    for row in (0, len(plan) - 1):
      np.testing.assert_array_equal(again.users(epoch, row), rows[row])
  assert shared[0] != shared[1] != shared[2]
  other = packing.PackingPlan(sizes, packed(cfg), seed=4)
  assert any(plan.users(0, row).tolist() != other.users(0, row).tolist() for row in range(len(plan)))


def test_a_plan_says_what_an_epoch_holds(dataset: Dataset, cfg: config.Config) -> None:
  few = packed(cfg, snapshots_per_row=4, batch_rows=1)
  few = dataclasses.replace(few, model=dataclasses.replace(few.model, max_events=100))
  stream = training_batches.training_batches(dataset, few)
  rows = len(packing.PackingPlan(packing.row_sizes(dataset, few), few, 0))
  asked = events = 0
  for batch in itertools.islice(stream, rows):
    asked += int(batch.features.query_valid.sum())
    events += int(batch.features.length.sum())
  text = stream.description
  assert f" in {rows:,} rows of 100 events; {1 - events / (100 * rows):.1%} of the positions are padding" in text
  assert f"an epoch asks at {asked:,} of the " in text and "raise config.train.snapshots_per_row for more" in text


def test_a_packed_row_holds_whole_windows_of_its_users_and_their_own_targets(
  data: Dataset, rich: config.Config
) -> None:
  """Every kind of task; the log's histories are short enough to lie in a row whole."""
  cfg = packed(rich, batch_rows=1, seed=2)
  cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, max_events=200))
  records = {}
  for index in range(len(data)):
    record = data[index]
    history = data.history(record)
    records[history.time[: history.n_train].tobytes()] = (record, history)
  by_hours = {
    ((history.time[: history.n_train] - history.time[0]) / 3.6e9).astype(np.float32).tobytes(): key
    for key, (_, history) in records.items()
    if history.n_train
  }
  supervision = Supervision(data, cfg, training=True)
  met = []
  several = 0
  for batch in itertools.islice(
    training_batches.training_batches(data, cfg), len(packing.PackingPlan(packing.row_sizes(data, cfg), cfg, 2))
  ):
    own = alone(batch, cfg.tasks)
    several += len(own.features.length) > 1
    for i, n in enumerate(own.features.length):
      key = by_hours[own.features.time[i, :n].tobytes()]
      met.append(key)
      record, history = records[key]
      origin = history.time[0]
      hours = ((record["snapshot_time"] - origin) / 3.6e9).astype(np.float32)
      asked = own.features.query_time[i][own.features.query_valid[i]]
      chosen = np.flatnonzero(np.isin(hours, asked))
      assert len(chosen) == len(asked)
      time, seen = record["snapshot_time"][chosen], record["snapshot_events"][chosen]
      wanted = window(data, history, 0, history.n_train, time, seen, 200, SNAPSHOTS)
      for name, mine, other in zip(wanted._fields, (part[i] for part in own.features), wanted):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6, err_msg=name)
      for name, part in supervision.part(record, history, 0, history.n_train, chosen).items():
        for mine, other in zip((x[i] for x in own.targets[name]), join_targets([part], 200, SNAPSHOTS), strict=True):
          np.testing.assert_array_equal(mine, other, err_msg=name)
  assert several >= 3 and len(met) == len(set(met)) == len(by_hours)


def test_a_packed_row_has_one_pair_of_slices_of_one_of_its_users(data: Dataset, rich: config.Config) -> None:
  cfg = packed(rich)
  (batch,) = itertools.islice(training_batches.training_batches(data, cfg), 1)
  slices = batch.slices["same"]
  assert slices.known.shape == (cfg.train.batch_rows,) and slices.known.any()
  assert slices.features.codes.shape[:2] == (cfg.train.batch_rows, 2)
  for row in np.flatnonzero(slices.known):
    segment = batch.features.segment[row]
    owners = [batch.features.codes[row][segment == user, 1] for user in np.unique(segment[segment > 0])]
    for k in range(2):
      n = int(slices.features.length[row, k])
      drawn = slices.features.codes[row, k, :n, 1]
      whole = any(
        np.array_equal(codes[at : at + n], drawn) for codes in owners for at in range(max(len(codes) - n + 1, 0))
      )
      assert whole or len(owners) == 1  # a long history may have been cut for the row, but not for its slices


def test_a_dataset_without_training_events_cannot_be_packed(cfg: config.Config) -> None:
  none = np.zeros(3, np.int32)
  with pytest.raises(ValueError, match="no user has training events"):
    packing.PackingPlan(packing.RowSizes(none, none), packed(cfg), 0)
