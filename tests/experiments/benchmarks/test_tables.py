"""The benchmark of tables measures what it says, at sizes that take seconds."""

import json
import time
import types

import jax
import numpy as np
import pytest

from tests.fixtures import scripts


@pytest.fixture(scope="module")
def benchmark() -> types.ModuleType:
  return scripts.load(scripts.BENCHMARKS / "tables.py")


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", ["adagrad", "dense adam"])
def test_a_step_learns_and_its_table_is_counted(benchmark: types.ModuleType, optimizer: str) -> None:
  size = 4096
  target = jax.random.normal(jax.random.key(0), (benchmark.BATCH, benchmark.IDS // benchmark.BATCH, benchmark.WIDTH))
  kind = benchmark.dense if optimizer == "dense adam" else benchmark.sparse
  create, step = map(jax.jit, kind(size, optimizer, target))
  state = create()
  kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  numbers = 3 * benchmark.WIDTH if optimizer == "dense adam" else benchmark.WIDTH + 1
  assert kept == pytest.approx(4 * size * numbers, abs=8)
  codes = benchmark.ids(size, "even", 0)
  assert codes.shape == target.shape[:2] and codes.min() > 1 and codes.max() < size
  losses = []
  for _ in range(4):
    *state, loss = step(*state, codes)
    losses.append(float(loss))
  assert losses[0] > losses[1] > losses[2] > losses[3]
  # At least the gradients of all ids; XLA counts what lies beside rows and slots.
  assert benchmark.buffers(kind, optimizer, target) >= target.nbytes


def test_a_peak_is_of_what_comes_inside(benchmark: types.ModuleType) -> None:
  before = np.ones(1 << 24)  # 128 MiB
  del before
  held = np.ones(1 << 21)
  with benchmark.Peak() as peak:
    inside = np.ones(1 << 22)  # 32 MiB
    time.sleep(0.1)
    del inside
  assert peak.allocated == pytest.approx(1 << 25, rel=0.05)
  assert 1 << 24 < peak.resident < 1 << 26
  assert held.nbytes == 1 << 24


def test_figures_are_written_for_people_and_programs(benchmark: types.ModuleType) -> None:
  row = {
    "optimizer": "adagrad",
    "rows": 100,
    "bytes": 2**30,
    "step": 2**21,
    "peak_ratio": 1.05,
    "peak_resident_ratio": 1.25,
  }
  row |= {f"{draw}_{what}": value for draw in benchmark.DRAWS for what, value in (("ms", 3.25), ("ratio", 1.125))}
  rows = [row, {"optimizer": "dense adam", "rows": 10**9, "not_measured": "does not fit into memory"}]
  text = benchmark.table_of(json.loads(json.dumps(rows)))
  assert (
    all(figure in text for figure in ("3.25", "1024.0", "2.0", "1.050", "1.250")) and "does not fit into memory" in text
  )
  assert np.mean(benchmark.ids(10**6, "zipf", 0) < 100) > 0.4
