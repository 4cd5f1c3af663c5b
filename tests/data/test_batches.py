import dataclasses
import pathlib

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.data import batches, prepare
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data.dataset import Dataset
from tests.fixtures.small_log import raw_config, write_log


@pytest.fixture(scope="module")
def first(dataset: Dataset, cfg: config.Config) -> list[batches.Batch]:
  stream = iter(batches.training(dataset, cfg))
  return [next(stream) for _ in range(12)]


def test_a_training_row_holds_only_the_training_period(
  first: list[batches.Batch], dataset: Dataset, cfg: config.Config
) -> None:
  most = max(int(dataset[i]["n_train"]) for i in range(len(dataset)))
  for batch in first:
    assert batch.features.length.max() <= min(most, cfg.model.max_events)
    assert (batch.features.query_events <= batch.features.length[:, None]).all()


def test_a_training_rows_targets_are_the_records_labels(dataset: Dataset, cfg: config.Config) -> None:
  """Rows are found again in their records by the times between their events."""
  stream = iter(batches.training(dataset, cfg))
  batch = next(stream)
  records = [dataset[i] for i in range(len(dataset))]
  end = config.parse_time(cfg.data.split.train_end, "")
  found = 0
  for row in range(cfg.train.batch_rows):
    n = batch.features.length[row]
    hours = batch.features.time[row, :n]
    for record in records:
      train = record["time"][: record["n_train"]]
      for start in range(len(train) - n + 1):
        if n and np.allclose((train[start : start + n] - train[start]) / 3.6e9, hours, atol=1e-3):
          found += 1
          following = batch.targets["next_page"].value[row, : n - 1]
          pages = record["codes"][start : start + n, 0]
          known = batch.targets["next_page"].known[row, : n - 1]
          later = [next((p for p in pages[i + 1 :] if p), 0) for i in range(n - 1)]
          assert all(f == w for f, w, k in zip(following, later, known) if k and w)
          for s in np.flatnonzero(batch.features.query_valid[row]):
            at = train[start] + round(float(batch.features.query_time[row, s]) * 3.6e9)
            assert at < end
            assert batch.features.query_events[row, s] == np.sum(record["time"] < at - 30_000_000) - start
          break
  assert found >= cfg.train.batch_rows - 1


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(
  first: list[batches.Batch], dataset: Dataset, cfg: config.Config
) -> None:
  again = next(iter(batches.training(dataset, cfg)))
  other = next(iter(batches.training(dataset, cfg, seed=7)))
  np.testing.assert_array_equal(first[0].features.time, again.features.time)
  assert not np.array_equal(first[0].features.time, other.features.time)


def test_a_saved_position_continues_with_the_same_batches(
  first: list[batches.Batch], dataset: Dataset, cfg: config.Config
) -> None:
  stream = iter(batches.training(dataset, cfg))
  for _ in range(5):
    next(stream)
  position = stream.get_state()
  fresh = iter(batches.training(dataset, cfg))
  fresh.set_state(position)
  np.testing.assert_array_equal(next(fresh).features.codes, first[5].features.codes)


def test_an_epoch_shows_every_user_once(dataset: Dataset, cfg: config.Config) -> None:
  whole = dataclasses.replace(
    cfg, train=dataclasses.replace(cfg.train, batch_rows=1), model=dataclasses.replace(cfg.model, max_events=200)
  )
  stream = iter(batches.training(dataset, whole))
  shown = sorted(int(next(stream).features.length[0]) for _ in range(len(dataset)))
  assert shown == sorted(int(dataset[i]["n_train"]) for i in range(len(dataset)))


def test_a_row_that_does_not_fit_is_an_error(dataset: Dataset) -> None:
  history = dataset.history(dataset[0])
  none = np.zeros(0, np.int64)
  with pytest.raises(ValueError, match="do not fit a row of 1"):
    batches.window(dataset, history, 0, 3, none, none, 1, 1)


@pytest.mark.parametrize("packing", [False, True])
def test_held_out_users_are_not_among_the_training_rows(tmp_path: pathlib.Path, packing: bool) -> None:
  write_log(tmp_path, users=30)
  raw = raw_config(tmp_path)
  raw["data"]["split"] = {"mode": "user", "every_days": 30.0, "user_validation": 0.3, "user_test": 0.3}
  raw["train"]["packing"] = packing
  cfg = config.resolve(raw)
  prepare.prepare(cfg, say=lambda text: None)
  data = Dataset(cfg.data.path)
  training = [i for i in range(len(data)) if data[i]["user_split"] == labels_lib.TRAIN]
  assert data.training_users.tolist() == training and 0 < len(training) < 20
  stream = iter(batches.training(data, cfg))
  rows = [next(stream).features for _ in range(-(-4 * len(training) // cfg.train.batch_rows))]
  assert min(int(row.length.min()) for row in rows) > 0  # a held-out user has no event that training may see
