import dataclasses
import pathlib

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.batch import Batch
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.windows import window
from supermoe_jax.data.encoding.splits import TRAIN
from supermoe_jax.data.preparation import prepare
from tests.fixtures.small_log import raw_config, write_log


@pytest.fixture(scope="module")
def first(dataset: Dataset, cfg: config.Config) -> list[Batch]:
  stream = iter(training_batches.training_batches(dataset, cfg))
  return [next(stream) for _ in range(12)]


def test_a_training_row_holds_only_the_training_period(
  first: list[Batch], dataset: Dataset, cfg: config.Config
) -> None:
  most = max(int(dataset[i]["n_train"]) for i in range(len(dataset)))
  for batch in first:
    assert batch.features.length.max() <= min(most, cfg.model.max_events)
    assert (batch.features.query_events <= batch.features.length[:, None]).all()


def test_a_training_rows_targets_are_the_records_labels(dataset: Dataset, cfg: config.Config) -> None:
  """Rows are found again in their records by the times between their events."""
  stream = iter(training_batches.training_batches(dataset, cfg))
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
  first: list[Batch], dataset: Dataset, cfg: config.Config
) -> None:
  again = next(iter(training_batches.training_batches(dataset, cfg)))
  other = next(iter(training_batches.training_batches(dataset, cfg, seed=7)))
  np.testing.assert_array_equal(first[0].features.time, again.features.time)
  assert not np.array_equal(first[0].features.time, other.features.time)
  of_config = next(iter(training_batches.training_batches(dataset, config.override(cfg, ["--config.train.seed=7"]))))
  np.testing.assert_array_equal(of_config.features.time, other.features.time)


def test_a_saved_position_continues_with_the_same_batches(
  first: list[Batch], dataset: Dataset, cfg: config.Config
) -> None:
  stream = iter(training_batches.training_batches(dataset, cfg))
  for _ in range(5):
    next(stream)
  position = stream.get_state()
  fresh = iter(training_batches.training_batches(dataset, cfg))
  fresh.set_state(position)
  np.testing.assert_array_equal(next(fresh).features.codes, first[5].features.codes)


def test_an_epoch_shows_every_user_once(dataset: Dataset, cfg: config.Config) -> None:
  whole = dataclasses.replace(
    cfg, train=dataclasses.replace(cfg.train, batch_rows=1), model=dataclasses.replace(cfg.model, max_events=200)
  )
  stream = iter(training_batches.training_batches(dataset, whole))
  shown = sorted(int(next(stream).features.length[0]) for _ in range(len(dataset)))
  assert shown == sorted(int(dataset[i]["n_train"]) for i in range(len(dataset)))


def test_a_window_ends_at_a_random_snapshot_and_its_snapshots_see_a_quarter_or_all(
  dataset: Dataset, cfg: config.Config
) -> None:
  """A long history is cut; each row asks at all of the snapshots that see enough of the window, as far as they fit."""
  most, places = cfg.model.max_events, cfg.train.snapshots_per_row
  row_of, rng = training_batches._TrainingRow(dataset, cfg), np.random.default_rng(0)
  cut = elsewhere = left_out = 0
  for index in range(len(dataset)):
    record, n_train = dataset[index], int(dataset[index]["n_train"])
    seen = record["snapshot_events"][record["snapshot_split"] == TRAIN]
    stops = set()
    for _ in range(4):
      features = row_of.random_map(index, rng).features
      n = int(features.length)
      assert n == min(n_train, most)
      held = [i for i in range(n_train - n + 1) if np.array_equal(record["codes"][i : i + n], features.codes[:n])]
      (start,) = [i for i in held if np.array_equal(record["numeric"][i : i + n], features.numeric[:n], equal_nan=True)]
      stop = start + n
      assert n_train <= most or stop in {*np.clip(seen, most, n_train).tolist(), n_train}
      enough = [k - start for k in seen.tolist() if start < k <= stop and k - start >= min(k, most // 4)]
      asked = features.query_events[features.query_valid].tolist()
      assert len(asked) == min(len(enough), places) and asked == sorted(asked)
      assert set(asked) <= set(enough)
      left_out += len(enough) < len(seen)
      stops.add(stop)
    cut, elsewhere = cut + (n_train > most), elsewhere + (len(stops) > 1)
  assert cut > 5 and elsewhere > cut / 2 and left_out > 5


def test_a_row_that_does_not_fit_is_an_error(dataset: Dataset) -> None:
  history = dataset.history(dataset[0])
  none = np.zeros(0, np.int64)
  with pytest.raises(ValueError, match="do not fit a row of 1"):
    window(dataset, history, 0, 3, none, none, 1, 1)


def test_held_out_users_are_not_among_the_training_rows(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path, users=30)
  raw = raw_config(tmp_path)
  raw["data"]["split"] = {"mode": "user", "every_days": 30.0, "user_validation": 0.3, "user_test": 0.3}
  prepare.prepare(config.resolve(raw))
  for packing in (False, True):
    raw["train"]["packing"] = packing
    cfg = config.resolve(raw)
    data = Dataset(cfg.data.path)
    training = [i for i in range(len(data)) if data[i]["user_split"] == TRAIN]
    assert data.training_users.tolist() == training and 0 < len(training) < 20
    stream = iter(training_batches.training_batches(data, cfg))
    rows = [next(stream).features for _ in range(-(-4 * len(training) // cfg.train.batch_rows))]
    assert min(int(row.length.min()) for row in rows) > 0  # a held-out user has no event that training may see
