"""A run whose dataset has been appended to since: its tables have rows for the new values, which say nothing yet."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config, device_mesh
from supermoe_jax.data.append import append
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.splits import TEST
from supermoe_jax.data.preparation import prepare
from supermoe_jax.evaluation import evaluate
from supermoe_jax.training import loop
from supermoe_jax.training.checkpoints.checkpoint import CheckpointWriter
from supermoe_jax.training.run import Run
from supermoe_jax.training.run_directory import check_encoding, claim_directory
from supermoe_jax.training.step import create_state
from supermoe_jax.training.task_losses import TaskStatistics
from tests.fixtures.short_runs import short
from tests.fixtures.small_log import raw_config, write_log


def prepared(folder: pathlib.Path) -> config.Config:
  """A config of a short run, and a dataset that can be appended to."""
  write_log(folder, users=12)
  raw = raw_config(folder)
  raw["data"]["sources"]["visits"]["files"] = [str(folder / "visits*.parquet")]
  raw["data"]["aggregates"] = {"enabled": False}
  cfg = short(config.resolve(raw))
  prepare.prepare(cfg)
  return cfg


def untrained(cfg: config.Config, workdir: pathlib.Path) -> None:
  """Writes the run directory of a run that stands at its beginning."""
  claim_directory(workdir, cfg)
  dataset = Dataset(cfg.data.path)
  check_encoding(workdir, dataset, create=True)
  _, state = create_state(cfg, dataset.schema, device_mesh.make_mesh(cfg.train.mesh))
  measured = dict.fromkeys(cfg.active_tasks, TaskStatistics(1.0, 1.0))
  with CheckpointWriter(workdir, cfg.train) as writer:
    writer.save(1, state, {}, measured)


def assert_grown(cfg: config.Config, folder: pathlib.Path) -> Run:
  """Appends a day with a new value to the dataset of the run in `folder / "run"`; returns the run as it reads it."""
  before = Run(folder / "run")
  table = before.catalogue("next_page")
  asked = [next(snapshot_batches.query_batches(before.dataset, cfg, split=TEST))]
  told = before.answer(asked[0].features, asked[0].given)

  pages = ["page0", "brand new", "brand new"]
  time = np.datetime64("2024-04-20", "us") + np.arange(3)
  columns = {"user": [3] * 3, "time": time, "page": pages, "device": ["web"] * 3, "seconds": [1.0] * 3}
  pq.write_table(pa.table(columns), folder / "visits-day.parquet")
  append.append(pathlib.Path(cfg.data.path))

  after = Run(folder / "run")
  grown = after.catalogue("next_page")
  assert grown.size == table.size + 1
  old, new = (np.asarray(c.rows).reshape(-1, c.rows.shape[-1]) for c in (table, grown))
  np.testing.assert_array_equal(new[: table.size], old[: table.size])
  assert old[2 : table.size].any(axis=1).all() and not new[table.size].any()
  again = after.answer(asked[0].features, asked[0].given)  # the same histories, encoded as they were
  np.testing.assert_array_equal(again.z, told.z)
  return after


@pytest.mark.slow
def test_a_run_reads_its_tables_after_an_append(tmp_path: pathlib.Path) -> None:
  cfg = prepared(tmp_path)
  untrained(cfg, tmp_path / "run")
  assert_grown(cfg, tmp_path)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_trained_run_is_evaluated_after_an_append(tmp_path: pathlib.Path) -> None:
  cfg = prepared(tmp_path)
  loop.train(cfg, tmp_path / "run", progress=False)
  found = evaluate.evaluate(assert_grown(cfg, tmp_path), progress=False, compare=False)
  assert np.isfinite(found["splits"]["test"]["next_page"]["metrics"]["ndcg@10"])
