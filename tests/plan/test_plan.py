"""A plan's numbers add up, and are those of the run."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import jax
import pytest
from jax.sharding import Mesh

from supermoe_jax import cli, config, device_mesh
from supermoe_jax.batch import Schema
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ConfigError
from supermoe_jax.plan import chips, plan, program, render, sweep
from tests.fixtures import grids, scripts

CPUS = chips.topology("cpu:8")


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
  """Plans that compile the same step for the same devices share the program."""
  real, kept = program.compile_step, {}

  def step(cfg: config.Config, schema: Schema, mesh: Mesh, *how: float) -> program.CompiledStep:
    key = repr(dataclasses.replace(cfg, evaluate=config.Evaluate())), mesh, how  # a step evaluates nothing
    if key not in kept:
      kept[key] = real(cfg, schema, mesh, *how)
    return kept[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(program, "compile_step", step)
    yield


@pytest.fixture(scope="module")
def wide(cfg: config.Config) -> config.Config:
  """The small config, of one layer and two tasks, with experts over two devices, and rows for eight."""
  cfg = dataclasses.replace(cfg, exclude_tasks=("pages", "paid"))
  settings = ("train.mesh.expert=2", "train.batch_rows=16", "evaluate.batch_rows=16")
  return config.override(cfg, [f"--config.{s}" for s in (*settings, "model.layers=1", "model.moe_every=1")])


@pytest.fixture(scope="module")
def planned(wide: config.Config, dataset: Dataset) -> dict:
  return plan.plan_step(wide, CPUS)


def test_parameters_and_bytes_add_up(wide: config.Config, dataset: Dataset, planned: dict) -> None:
  fitted, said = program.fitted_config(wide, CPUS)
  assert said == ["config.train.mesh.data=1 became 4, to use all 8 devices"]
  found = program.compile_step(fitted, dataset.schema, device_mesh.make_mesh(fitted.train.mesh))
  parameters, memory = planned["parameters"], planned["memory"]
  assert parameters["total"] == parameters["tables"] + parameters["experts"] + parameters["dense"]
  d, tables = wide.model.d_model, dataset.schema.categorical
  assert parameters["tables"] == d * sum(tables[n] for n in dataset.schema.inputs)
  model = jax.tree.leaves(found.state.model)
  held = sum(math.prod(x.shape) for x in model)
  assert parameters["total"] <= held < 2 * parameters["total"]  # rows that fill up stripes
  sizes = sum(program.shard_bytes(x) for x in (*jax.tree.leaves(found.state), *jax.tree.leaves(found.inputs)))
  assert sum(memory["parts"].values()) == sizes
  told = found.executable.memory_analysis()
  assert sizes + memory["padding"] - memory["not_read"] == told.argument_size_in_bytes
  assert 0 <= memory["not_read"] < 4096  # weights that static weighting does not look at
  assert memory["total"] == sum(memory[k] for k in ("arguments", "temporary", "outputs", "program"))


def test_what_is_expected_to_travel_does(planned: dict) -> None:
  kinds = {row["kind"]: row for row in planned["collectives"]}
  assert kinds["all-to-all"]["axes"] and kinds["all-reduce"]["sent"] > 0
  assert all(row["bytes"] >= row["largest"] > 0 for row in planned["collectives"])
  assert planned["flops"] > 0 and planned["memory_traffic"] > planned["memory"]["arguments"] / 4


@pytest.mark.nightly
@pytest.mark.slow
def test_the_memory_of_a_run_on_eight_devices_is_as_planned(tmp_path: pathlib.Path) -> None:
  script = scripts.PROGRAMS / "memory_of_a_run.py"
  search = os.pathsep.join([str(scripts.ROOT), os.environ.get("PYTHONPATH", "")])
  line, environment = [sys.executable, script, tmp_path], {**os.environ, "PYTHONPATH": search}
  out = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stderr
  found = json.loads(out.stdout.splitlines()[-1])
  assert found["measured"] == pytest.approx(found["planned"], rel=0.25), found


def test_a_plan_is_printed_and_saved(
  wide: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setattr(config, "load", lambda *_: wide)
  file = tmp_path / "plan.json"
  assert cli.main(["plan", "--config", "any", "--topology", "cpu:8", "--json", str(file)]) == 0
  said = capsys.readouterr().out
  saved = json.loads(file.read_text())
  assert f"{saved['parameters']['total']:,}" in said and render.bytes_text(saved["memory"]["total"]) in said
  assert "XLA:CPU stands in for the compiler of these devices" in said


def test_gpus_are_estimated_and_told_where_they_do_not_fit(
  wide: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  found = plan.plan_step(wide, chips.topology("h100:2x4"))
  assert found["fits"] and found["seconds"]["bound"] in found["seconds"] and 0 < found["mfu"] < 1
  assert any(row["network_seconds"] > 0 for row in found["collectives"])  # two nodes
  small = dict(chips.CHIPS)
  small["h100"] = dataclasses.replace(small["h100"], memory=1000)
  monkeypatch.setattr(chips, "CHIPS", small)
  found = plan.plan_step(wide, chips.topology("h100:2x4"))
  assert not found["fits"]
  said = "\n".join(render.plan_text(found))
  assert "does not fit" in said and "try --config.train.tables.dtype=bfloat16: may save about" in said


SWEEPS = [("strong", "h100:1x8", "h100:2x4"), ("strong", "h100:1x2", "h100:2x4"), ("weak", "h100:1x2", "h100:2x4")]


@pytest.mark.parametrize(("scaling", "one", "other"), grids.quick_few(SWEEPS[:1], SWEEPS))
def test_a_sweep_compares_topologies(
  scaling: str, one: str, other: str, wide: config.Config, tmp_path: pathlib.Path
) -> None:
  found = sweep.sweep_topologies(wide, [chips.topology(one), chips.topology(other)], scaling)
  few, many = found["plans"]
  assert [p["topology"]["name"] for p in (few, many)] == [one, other]
  larger = many["topology"]["devices"] / few["topology"]["devices"]
  times = larger if scaling == "weak" else 1
  assert many["tokens"] == times * few["tokens"]
  steps = few["seconds"]["step"] / many["seconds"]["step"]
  assert sweep.efficiency(found) == {one: 1.0, other: pytest.approx(steps * times / larger)}
  assert sweep.sweep_table(found)[0].startswith(f"{scaling} scaling: ") and "100%" in sweep.sweep_table(found)[2]
  sweep.draw_sweep(found, tmp_path / "sweep.svg")
  assert (tmp_path / "sweep.svg").read_text().count("<path") > 20


def test_the_efficiency_of_a_sweep_is_by_tokens_a_second_of_a_device() -> None:
  plans = [
    {"topology": {"name": name, "devices": devices}, "seconds": {}, "tokens_per_second": speed}
    for name, devices, speed in (("two", 2, 10.0), ("eight", 8, 30.0))
  ]
  untimed = {"topology": {"name": "too small", "devices": 1}}
  assert sweep.efficiency({"plans": [untimed, *plans]}) == {"two": 1.0, "eight": 0.75}


@pytest.mark.parametrize(("scaling", "rows"), [("weak", [16, 32, 64]), ("strong", [16, 16, 16])])
def test_a_sweep_asks_for_rows_a_device_or_in_all_and_keeps_experts_where_they_divide(
  scaling: str, rows: list[int], wide: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  asked = []
  monkeypatch.setattr(sweep, "plan_step", lambda cfg, topology, _: asked.append((cfg, topology)))
  wide = config.override(wide, ["--config.train.mesh.data=2", "--config.train.mesh.expert=4"])
  wide = config.override(wide, ["--config.train.batch_rows=64", "--config.evaluate.batch_rows=64"])
  wide = config.override(wide, [] if scaling == "weak" else ["--config.train.batch_rows=16"])
  sweep.sweep_topologies(wide, [chips.topology(t) for t in ("h100:1x8", "h100:1x4", "h100:1x2")], scaling)
  assert [str(topology) for _, topology in asked] == ["h100:1x2", "h100:1x4", "h100:1x8"]
  assert [cfg.train.batch_rows for cfg, _ in asked] == rows
  assert [(cfg.train.mesh.data, cfg.train.mesh.expert) for cfg, _ in asked] == [(1, 2), (1, 4), (2, 4)]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("v9:4x4", r"no such chip as 'v9'; (did you mean|valid)"),
    ("v5e:4", "write the sizes of v5e as v5e:16x16"),
    ("v5p:4x4", "write the sizes of v5p as v5p:4x4x8"),
    ("v5e:0x4", "write the sizes of v5e"),
    ("cpu", "write the sizes of cpu as cpu:8"),
  ],
)
def test_a_wrong_topology_is_told(text: str, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    chips.topology(text)


def test_a_mesh_or_batch_that_does_not_divide_is_told(wide: config.Config) -> None:
  with pytest.raises(ConfigError, match=r"expert × tensor = 2, which does not divide .*3 devices, 1 slice"):
    program.fitted_config(wide, chips.topology("cpu:3"))
  with pytest.raises(ConfigError, match=r"config.train.batch_rows=16 must divide over the 32 devices.*=32"):
    program.fitted_config(wide, chips.topology("v5e:4x8"))
  with pytest.raises(ConfigError, match="only TPUs have slices"):
    chips.topology("h100:1x8", 2)
