"""A plan's numbers add up, and are those of the run."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from supermoe_jax import cli, config, sharding
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.plan import chips, plan, program, render, sweep
from tests.fixtures import scripts

CPUS = chips.topology("cpu:8")


@pytest.fixture(scope="module")
def wide(cfg: config.Config) -> config.Config:
  """The small config with experts over two devices, and rows for eight."""
  settings = ("train.mesh.expert=2", "train.batch_rows=16", "evaluate.batch_rows=16")
  return config.override(cfg, [f"--config.{s}" for s in settings])


@pytest.fixture(scope="module")
def planned(wide: config.Config, dataset: Dataset) -> dict:
  return plan.plan(wide, CPUS)


def test_parameters_and_bytes_add_up(wide: config.Config, dataset: Dataset, planned: dict) -> None:
  fitted, said = program.fitted(wide, CPUS)
  assert said == ["config.train.mesh.data=1 became 4, to take all 8 devices"]
  found = program.step(fitted, dataset.schema, sharding.make_mesh(fitted.train.mesh))
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


def test_the_memory_of_a_run_on_eight_devices_is_as_planned(tmp_path: pathlib.Path) -> None:
  script = scripts.PROGRAMS / "memory_of_a_run.py"
  out = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
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
  assert f"{saved['parameters']['total']:,}" in said and render.size(saved["memory"]["total"]) in said
  assert "XLA:CPU stands in for the compiler of these devices" in said


def test_gpus_are_estimated_and_told_where_they_do_not_fit(
  wide: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  found = plan.plan(wide, chips.topology("h100:2x4"))
  assert found["fits"] and found["seconds"]["bound"] in found["seconds"] and 0 < found["mfu"] < 1
  assert any(row["network_seconds"] > 0 for row in found["collectives"])  # two nodes
  small = dict(chips.CHIPS)
  small["h100"] = dataclasses.replace(small["h100"], memory=1000)
  monkeypatch.setattr(chips, "CHIPS", small)
  found = plan.plan(wide, chips.topology("h100:2x4"))
  assert not found["fits"]
  said = "\n".join(render.lines(found))
  assert "does not fit" in said and "try --config.train.tables.dtype=bfloat16: may spare about" in said


@pytest.mark.parametrize(("scaling", "times"), [("weak", 4), ("strong", 1)])
def test_a_sweep_compares_topologies(scaling: str, times: int, wide: config.Config, tmp_path: pathlib.Path) -> None:
  found = sweep.sweep(wide, [chips.topology("h100:2x4"), chips.topology("h100:1x2")], scaling)
  few, many = found["plans"]
  assert [p["topology"]["devices"] for p in (few, many)] == [2, 8]
  assert many["tokens"] == times * few["tokens"]
  steps = few["seconds"]["step"] / many["seconds"]["step"]
  assert sweep.efficiency(found) == {"h100:1x2": 1.0, "h100:2x4": pytest.approx(steps * times / 4)}
  assert sweep.lines(found)[0].startswith(f"{scaling} scaling: ") and "100%" in sweep.lines(found)[2]
  sweep.draw(found, tmp_path / "sweep.svg")
  assert (tmp_path / "sweep.svg").read_text().count("<path") > 20


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
  with pytest.raises(config.ConfigError, match=message):
    chips.topology(text)


def test_a_mesh_or_batch_that_does_not_divide_is_told(wide: config.Config) -> None:
  with pytest.raises(config.ConfigError, match="expert × tensor = 2, of which 3 devices in 1"):
    program.fitted(wide, chips.topology("cpu:3"))
  with pytest.raises(config.ConfigError, match=r"config.train.batch_rows=16 must divide over the 32 devices.*=32"):
    program.fitted(wide, chips.topology("v5e:4x8"))
  with pytest.raises(config.ConfigError, match="slices are of TPUs"):
    chips.topology("h100:1x8", 2)
