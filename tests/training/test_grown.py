"""A run whose dataset has been appended to since: its tables have rows for the new values, which say nothing yet."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data import append, labels, prepare
from supermoe_jax.data import questions as questions_lib
from supermoe_jax.evaluation import evaluate
from supermoe_jax.training import loop
from supermoe_jax.training.run import Run
from tests.fixtures.small_log import raw_config, write_log


@pytest.mark.slow
def test_a_run_reads_its_tables_after_an_append(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path, users=12)
  raw = raw_config(tmp_path)
  raw["data"]["sources"]["visits"]["files"] = [str(tmp_path / "visits*.parquet")]
  raw["data"]["aggregates"] = {"enabled": False}
  cfg = config.override(config.resolve(raw), ["--config.train.steps=3"])
  prepare.prepare(cfg)
  loop.train(cfg, tmp_path / "run", progress=False)
  before = Run(tmp_path / "run")
  table = before.catalogue("next_page")
  asked = [next(questions_lib.questions(before.dataset, cfg, split=labels.TEST))]
  told = before.answer(asked[0].features, asked[0].given)

  pages = ["page0", "brand new", "brand new"]
  time = np.datetime64("2024-04-20", "us") + np.arange(3)
  columns = {"user": [3] * 3, "time": time, "page": pages, "device": ["web"] * 3, "seconds": [1.0] * 3}
  pq.write_table(pa.table(columns), tmp_path / "visits-day.parquet")
  append.append(pathlib.Path(cfg.data.path), say=lambda text: None)

  after = Run(tmp_path / "run")
  grown = after.catalogue("next_page")
  assert grown.size == table.size + 1
  old, new = (np.asarray(c.rows).reshape(-1, c.rows.shape[-1]) for c in (table, grown))
  np.testing.assert_array_equal(new[: table.size], old[: table.size])
  assert not new[table.size].any()
  again = after.answer(asked[0].features, asked[0].given)  # the same histories, encoded as they were
  np.testing.assert_array_equal(again.z, told.z)
  found = evaluate.evaluate(after, progress=False, compare=False)
  assert np.isfinite(found["splits"]["test"]["next_page"]["metrics"]["ndcg@10"])
