"""A run can be cut anywhere: it goes on from its last checkpoint and ends as if it had never been cut."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.data import integrity
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.events import DataError
from supermoe_jax.layers.routing import BalanceBias
from supermoe_jax.training import loop, profiler
from supermoe_jax.training.errors import RunError
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import compiled


def rows(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_speed(row: dict) -> dict:
  return {k: v for k, v in row.items() if k != "speed"}


def parameters(run: Run) -> list[np.ndarray]:
  return [np.asarray(leaf) for leaf in jax.tree.leaves(run.variables)]


def test_metrics_have_a_row_every_few_steps_with_every_task(workdir: pathlib.Path, cfg: config.Config) -> None:
  assert [r["step"] for r in rows(workdir)] == [2, 4, 6, 8, 10, 12]
  last = rows(workdir)[-1]
  assert set(last["tasks"]) == set(cfg.active_tasks)
  assert sum(last["load"][0]) == pytest.approx(1, abs=1e-3)
  assert 0 <= last["dropped_share"] < 1
  assert list((workdir / "tensorboard").iterdir())


def test_training_lowers_the_loss(workdir: pathlib.Path) -> None:
  first, *_, last = rows(workdir)
  assert last["loss"] < first["loss"]


@pytest.fixture
def killed(cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path) -> pathlib.Path:
  """A run killed by SIGKILL, in a process of its own, after its first checkpoint and before its last step."""
  config.save(cfg, tmp_path / "wanted.json")
  workdir = tmp_path / "run"
  slow = (
    "import pathlib, sys, time\n"
    "from supermoe_jax import config\n"
    "from supermoe_jax.training import loop\n"
    "place = loop.place_batch\n"
    "def slow(*a, **n):\n  time.sleep(0.4)\n  return place(*a, **n)\n"
    "loop.place_batch = slow\n"
    "loop.train(config.load_json(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))\n"
  )
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
  process = subprocess.Popen(
    [sys.executable, "-c", slow, str(tmp_path / "wanted.json"), str(workdir)],
    env=environment,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 180
  while not (workdir / "checkpoints" / "4").is_dir():
    assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  return workdir


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_bitwise_as_if_it_had_not_been(
  killed: pathlib.Path, cfg: config.Config, workdir: pathlib.Path
) -> None:
  steps = {int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdigit()}
  assert 12 not in steps
  said: list[str] = []
  assert loop.train(cfg, killed, say=said.append) == 12
  assert any(f"resuming {killed} at step" in line for line in said)
  for mine, wanted in zip(parameters(Run(killed)), parameters(Run(workdir)), strict=True):
    np.testing.assert_array_equal(mine, wanted)
  assert [without_speed(r) for r in rows(killed)] == [without_speed(r) for r in rows(workdir)]


def test_a_finished_run_is_left_alone(workdir: pathlib.Path, cfg: config.Config) -> None:
  before = (workdir / "metrics.jsonl").read_bytes()
  said: list[str] = []
  assert loop.train(cfg, workdir, say=said.append) == 12
  assert "already trained" in said[-1]
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_run_directory_is_an_error(workdir: pathlib.Path, cfg: config.Config) -> None:
  other = config.override(cfg, ["--config.train.learning_rate=0.5"])
  with pytest.raises(RunError, match=r"config\.train\.learning_rate: 0\.001 → 0\.5.*Name another --workdir"):
    loop.train(other, workdir)


def test_training_without_a_dataset_is_an_error(cfg: config.Config, tmp_path: pathlib.Path) -> None:
  gone = config.override(cfg, [f"--config.data.path={tmp_path / 'nothing'}"])
  with pytest.raises(DataError, match="run 'supermoe prepare' first"):
    loop.train(gone, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_training_on_a_dataset_of_another_config_is_an_error(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  other = config.override(cfg, ["--config.tasks.quiet.horizon_days=3"])
  with pytest.raises(DataError, match="was prepared with another configuration"):
    loop.train(other, tmp_path / "run")


def test_a_run_without_a_checkpoint_cannot_be_opened(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  config.save(cfg, tmp_path / "config.json")
  with pytest.raises(RunError, match="holds no checkpoint yet"):
    Run(tmp_path)


def test_a_checkpoint_of_another_model_is_an_error(
  workdir: pathlib.Path, cfg: config.Config, tmp_path: pathlib.Path
) -> None:
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  config.save(config.override(cfg, ["--config.model.d_expert=24"]), copy / "config.json")
  with pytest.raises(RunError, match="does not fit this model"):
    Run(copy)


def test_a_dataset_that_came_out_otherwise_does_not_fit_a_trained_run(
  workdir: pathlib.Path, cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  copy, data = tmp_path / "copy", tmp_path / "dataset"
  shutil.copytree(workdir, copy)
  shutil.copytree(dataset.path, data)
  moved = config.override(cfg, [f"--config.data.path={data}"])
  config.save(moved, copy / "config.json")
  Run(copy)
  integrity.write_manifest(data, {**Dataset(data).manifest, "encoding_hash": "another"})
  with pytest.raises(RunError, match="was prepared again since"):
    Run(copy)
  with pytest.raises(RunError, match="was prepared again since"):
    loop.train(moved, copy)


def test_parameters_that_are_not_finite_are_never_saved(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(loop, "_all_finite", lambda params: False)
  with pytest.raises(RunError, match="no longer finite at step 4; nothing was saved"):
    loop.train(cfg, tmp_path / "run")
  assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]


def test_a_run_of_many_devices_opens_and_goes_on_on_one(
  workdir: pathlib.Path, cfg: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  wide = config.override(cfg, ["--config.train.mesh.data=8"])
  assert loop.train(wide, copy, say=lambda _: None) == 12
  config.save(
    config.override(cfg, ["--config.train.mesh.data=8", "--config.train.mesh.tensor=2"]), copy / "config.json"
  )
  assert dict(Run(copy).mesh.shape) == {"data": 1, "expert": 1, "tensor": 1}


def cut_and_resumed(cfg: config.Config, folder: pathlib.Path) -> pathlib.Path:
  """Trains a run of 8 steps whole, and another that is cut after step 4 and resumed; they must be bitwise equal."""
  once, twice = folder / "once", folder / "twice"
  assert loop.train(cfg, once, say=lambda _: None) == 8
  shutil.copytree(once, twice)
  shutil.rmtree(twice / "checkpoints" / "8")
  assert loop.train(cfg, twice, say=lambda _: None) == 8
  for mine, wanted in zip(parameters(Run(twice)), parameters(Run(once)), strict=True):
    np.testing.assert_array_equal(mine, wanted)
  assert [without_speed(r) for r in rows(twice)] == [without_speed(r) for r in rows(once)]
  return once


@pytest.mark.slow
def test_every_setting_of_the_experts_trains_resumes_and_opens_on_a_mesh(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  other = config.override(
    cfg,
    [
      "--config.model.layers=4",
      "--config.model.activation=swiglu",
      "--config.model.shared_experts=1",
      "--config.model.router_jitter=0.1",
      "--config.model.dtype=bfloat16",
      "--config.model.remat=dots",
      "--config.train.balance_rate=0.01",
      "--config.train.steps=8",
      "--config.train.mesh.data=2",
      "--config.train.mesh.expert=2",
      "--config.train.mesh.tensor=2",
    ],
  )
  once = cut_and_resumed(other, tmp_path)
  assert all(np.isfinite(r["loss"]) and len(r["load"]) == 2 for r in rows(once))
  (bias,) = jax.tree.leaves(nnx.filter_state(Run(once).variables, BalanceBias))
  assert bias.shape == (2, 4)
  steps = np.asarray(bias) / 0.01  # up or down by the rate in each of 8 steps
  np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
  assert 0 < np.abs(steps).max() <= 8


@pytest.mark.slow
def test_a_packed_run_has_little_padding_and_resumes_with_worker_processes_or_without(
  cfg: config.Config, dataset: Dataset, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  settings = ["encoder=gru", "conditioning=mmoe", "max_events=60"]
  packed = config.override(
    cfg,
    [f"--config.model.{s}" for s in settings]
    + ["--config.train.packing=True", "--config.train.snapshots_per_row=12", "--config.train.steps=8"],
  )
  once = cut_and_resumed(packed, tmp_path)
  assert max(r["padding_share"] for r in rows(once)) < 0.12 < min(r["padding_share"] for r in rows(workdir))
  worked = tmp_path / "worked"
  shutil.copytree(once, worked)
  shutil.rmtree(worked / "checkpoints" / "8")
  said: list[str] = []
  assert loop.train(config.override(packed, ["--config.train.workers=1"]), worked, say=said.append) == 8
  assert said[0].startswith("packing: ") and "of the positions are padding" in said[0]
  for mine, wanted in zip(parameters(Run(worked)), parameters(Run(once)), strict=True):
    np.testing.assert_array_equal(mine, wanted)


@pytest.mark.slow
def test_a_run_of_every_kind_of_task_resumes_with_the_state_of_its_weights(
  every_task: config.Config, every_task_dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  cfg = config.override(
    every_task,
    [
      "--config.model.layers=1",
      "--config.model.moe_every=1",
      "--config.model.conditioning=token",
      "--config.train.task_information=0.01",
      "--config.train.weighting.method=seesaw",
      "--config.train.weighting.warmup_steps=3",
      "--config.train.steps=8",
    ],
  )
  once = cut_and_resumed(cfg, tmp_path)
  last = rows(once)[-1]
  assert set(last["weights"]) == set(cfg.active_tasks)
  assert sum(last["weights"].values()) == pytest.approx(len(cfg.active_tasks), abs=1e-3)
  assert len(set(last["weights"].values())) > 1
  assert set(last["task_dropped"]) == set(cfg.active_views)
  assert all(np.isfinite(r["loss"]) for r in rows(once))


def test_several_steps_a_call_are_the_same_steps(
  cfg: config.Config, dataset: Dataset, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  several = config.override(cfg, ["--config.train.steps_per_call=2"])
  assert loop.train(several, tmp_path / "run", say=lambda _: None) == 12
  for mine, wanted in zip(rows(tmp_path / "run"), rows(workdir), strict=True):
    assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert (mine["step"], mine["events"], mine["tables"]) == (wanted["step"], wanted["events"], wanted["tables"])
  for mine, wanted in zip(parameters(Run(tmp_path / "run")), parameters(Run(workdir)), strict=True):
    np.testing.assert_allclose(mine, wanted, atol=1e-5)


def test_a_run_compiles_its_step_once(cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path) -> None:
  mesh = sharding.make_mesh(cfg.train.mesh)
  step = compiled(cfg, dataset.schema, mesh).step
  assert loop.train(cfg, tmp_path / "run", say=lambda _: None) == 12
  assert step._cache_size() == 1


def test_a_profile_is_a_trace_of_some_steps(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(profiler, "SKIPPED", 2)
  loop.train(cfg, tmp_path / "run", say=lambda _: None, profile=True)
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
