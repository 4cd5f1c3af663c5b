"""Basic numbers of households whose baskets are written by hand, and how well vectors that hold them score."""

import datetime
import pathlib
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax.probing.vectors import UserVectors
from tests.fixtures import scripts

DAY = datetime.datetime(2017, 10, 1)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> types.ModuleType:
  monkeypatch.syspath_prepend(str(scripts.BENCHMARKS))
  script = scripts.load(scripts.BENCHMARKS / "numbers_in_z.py")
  monkeypatch.setattr(script, "tables_folder", lambda: tmp_path)
  return script


@pytest.mark.nightly
def test_baskets_and_spend_of_a_window_are_those_before_the_day(
  benchmark: types.ModuleType, tmp_path: pathlib.Path
) -> None:
  lines = [(1, 10, -40.5, 30.0), (1, 11, -6.0, 20.0), (1, 11, -6.0, 5.0), (1, 12, 0.0, 6.0), (2, 20, 12.0, 9.0)]
  times = [DAY + datetime.timedelta(days=days) for _, _, days, _ in lines]
  names = ("household_id", "basket_id", "sales_value")
  columns = {name: [line[i] for line in lines] for name, i in zip(names, (0, 1, 3))}
  pq.write_table(pa.table(columns | {"transaction_timestamp": times}), tmp_path / "transactions.parquet")
  users, days, targets = benchmark.basic_numbers()
  assert users.tolist() == ["1", "1", "2"]
  assert days.tolist() == [DAY, DAY.replace(month=11), DAY.replace(month=11)]
  found = {name: np.expm1(values).round(9).tolist() for name, values in targets.items()}
  assert found["recency"] == [6.0, 31.0, 19.0]
  assert found["baskets, 7 days"] == [1, 0, 0] and found["spend, 7 days"] == [25, 0, 0]
  assert found["baskets, 84 days"] == [2, 3, 1] and found["spend, all"] == [55, 61, 9]


@pytest.mark.nightly
def test_a_number_that_a_vector_holds_scores_1_and_another_0(benchmark: types.ModuleType) -> None:
  rng = np.random.default_rng(0)
  users = np.repeat([str(i) for i in range(200)], 2).astype(object)
  days = np.tile(np.array([DAY, DAY.replace(month=11)], "datetime64[us]"), 200)
  x = rng.normal(size=(400, 8)).astype(np.float32)
  vectors = UserVectors("z", users, days.astype(np.int64), x, {})
  targets = {"held": x @ np.arange(8.0) + 1, "noise": rng.normal(size=400)}
  found = benchmark.linear_scores(vectors, users, days, targets)
  assert found["held"] > 0.99 and found["noise"] < 0.1
  table = benchmark.markdown([{"z": found}])
  assert "| held | 1.000 |" in table and "below 0.9 |" in table
