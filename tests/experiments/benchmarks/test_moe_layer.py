"""The benchmark of the MoE layer measures what it says, at sizes that take seconds."""

import json
import math
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx
from tqdm import tqdm

from supermoe_jax import config, device_mesh
from supermoe_jax.layers import dispatch
from supermoe_jax.layers.moe import MoE, MoEOutput
from tests.fixtures import grids, scripts
from tests.fixtures.small_model import noise


def benchmark() -> types.ModuleType:
  return scripts.load(scripts.BENCHMARKS / "moe_layer.py")


@pytest.mark.nightly
@pytest.mark.slow
def test_every_strategy_has_figures() -> None:
  moe_layer = benchmark()
  mesh = device_mesh.make_mesh(config.Mesh(expert=1))
  rows = moe_layer.measure(moe_layer.Size(64, 4, d=8, hidden=16, length=8), mesh, 2, tqdm(disable=True))
  on_one_device = set(dispatch.STRATEGIES) - {"all_to_all", "gather"}
  assert {r["strategy"] for r in rows} == {"mlp", "sorted, dropless", *on_one_device, *moe_layer.RIVALS}
  table = moe_layer.table(rows)
  for row in json.loads(json.dumps(rows)):
    figures = [row[f"{kind}_{unit}"] for kind in ("forward", "train") for unit in ("ms", "ratio")]
    assert all(math.isfinite(f) and f > 0 for f in figures)
    assert row["strategy"] in table


def test_what_is_not_measured_has_a_reason_in_the_table() -> None:
  moe_layer = benchmark()
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(expert=2))):
    reasons = {v: moe_layer.why_not(v, moe_layer.Size(64, 4)) for v in moe_layer.VARIANTS}
  assert {v for v, reason in reasons.items() if reason} == {"ragged"}
  row = {"strategy": "ragged", "experts": 4, "not_measured": reasons["ragged"]}
  assert "XLA:CPU has no ragged all-to-all" in moe_layer.table([row])


def run(strategy: str, capacity_factor: float) -> MoEOutput:
  moe = noise(lambda: MoE(8, 16, 4, 2, dispatch=strategy, capacity_factor=capacity_factor, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  x, valid = rng.normal(size=(8, 8, 8)).astype(np.float32), rng.random((8, 8)) < 0.8
  graph, state = nnx.split(moe)
  return jax.jit(lambda state, *arguments: nnx.merge(graph, state)(*arguments))(state, x, valid)


@pytest.mark.parametrize("rival", grids.quick_few(["one_hot_groups"], ["one_hot", "one_hot_groups"]))
def test_the_one_hot_rival_equals_dense_when_nothing_drops(rival: str, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(benchmark(), "GROUP", 16)
  monkeypatch.setitem(dispatch.STRATEGIES, rival, getattr(benchmark(), rival))
  out = run(rival, 4.0)
  assert int(out.stats.dropped) == 0
  np.testing.assert_allclose(out.y, run("dense", 4.0).y, atol=1e-5)


def test_the_one_hot_rival_drops_as_much_as_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(dispatch.STRATEGIES, "rival", benchmark().one_hot)
  out, rival = run("sorted", 0.6), run("rival", 0.6)
  assert int(out.stats.dropped) == int(rival.stats.dropped) > 0
  same = np.isclose(rival.y, out.y, atol=1e-5).all(axis=-1)  # the rival serves earlier tokens first
  assert 0.2 < same.mean() < 1


def test_a_file_that_cannot_be_written_is_told_before_the_work(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setattr(sys, "argv", ["moe_layer.py", "--json", str(tmp_path / "missing" / "figures.json")])
  with pytest.raises(SystemExit) as stop:
    benchmark().main()
  assert stop.value.code == 2
  assert "figures.json cannot be written: No such file or directory" in capsys.readouterr().err
