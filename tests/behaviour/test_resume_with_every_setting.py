"""Runs with settings of every kind end bitwise alike, whether or not they were cut; the quick tier has one of them.

See `test_step_on_meshes.py`.
"""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.layers.routing import BalanceBias
from supermoe_jax.training import loop
from supermoe_jax.training.run import Run
from tests.fixtures.messages import messages
from tests.fixtures.short_runs import ONE_BLOCK, cut_and_resumed, only, parameters, rows

pytestmark = [pytest.mark.nightly, pytest.mark.slow, pytest.mark.usefixtures("compiled_afresh")]

STEPS = ("--config.train.steps=8", "--config.train.checkpoint_every=4", "--config.train.log_every=2")


def trained(cfg: config.Config, folder: pathlib.Path) -> pathlib.Path:
  """Trains a run whole, and another that is cut after step 4 and resumed; returns the first."""
  assert loop.train(cfg, folder / "once") == 8
  cut_and_resumed(cfg, folder / "once", folder / "twice", after=4)
  return folder / "once"


def test_every_setting_of_the_experts_trains_resumes_and_opens_on_a_mesh(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  other = config.override(
    cfg,
    [
      only(cfg, "next_page", "quiet"),
      "--config.model.layers=4",
      "--config.model.activation=swiglu",
      "--config.model.shared_experts=1",
      "--config.model.router_jitter=0.1",
      "--config.model.dtype=bfloat16",
      "--config.model.remat=dots",
      "--config.train.balance_rate=0.01",
      "--config.train.mesh.data=2",
      "--config.train.mesh.expert=2",
      "--config.train.mesh.tensor=2",
      *STEPS,
    ],
  )
  once = trained(other, tmp_path)
  assert all(np.isfinite(r["loss"]) and len(r["load"]) == 2 for r in rows(once))
  (bias,) = jax.tree.leaves(nnx.filter_state(Run(once).variables, BalanceBias))
  assert bias.shape == (2, 4)
  steps = np.asarray(bias) / 0.01  # up or down by the rate in each of 8 steps
  np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
  assert 0 < np.abs(steps).max() <= 8


def test_a_packed_run_has_little_padding_and_resumes_with_worker_processes_or_without(
  cfg: config.Config, dataset: Dataset, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  settings = ["encoder=gru", "conditioning=mmoe", "max_events=60"]
  packed = config.override(
    cfg,
    [f"--config.model.{s}" for s in settings]
    + ["--config.train.packing=True", "--config.train.snapshots_per_row=12", *STEPS],
  )
  once = trained(packed, tmp_path)
  assert max(r["padding_share"] for r in rows(once)) < 0.12 < min(r["padding_share"] for r in rows(workdir))
  worked = tmp_path / "worked"
  shutil.copytree(once, worked)
  shutil.rmtree(worked / "checkpoints" / "8")
  with messages() as said:
    assert loop.train(config.override(packed, ["--config.train.workers=1"]), worked) == 8
  assert said[0].startswith("packing: ") and "of the positions are padding" in said[0]
  for mine, wanted in zip(parameters(worked), parameters(once), strict=True):
    np.testing.assert_array_equal(mine, wanted)


def test_a_run_of_every_kind_of_task_resumes_with_the_state_of_its_weights(
  every_task: config.Config, every_task_dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  cfg = config.override(
    every_task,
    [
      *ONE_BLOCK,
      "--config.model.conditioning=token",
      "--config.train.task_information=0.01",
      "--config.train.weighting.method=seesaw",
      *STEPS,
    ],
  )
  once = trained(cfg, tmp_path)
  last = rows(once)[-1]
  assert set(last["weights"]) == set(cfg.active_tasks)
  assert sum(last["weights"].values()) == pytest.approx(len(cfg.active_tasks), abs=1e-3)
  assert len(set(last["weights"].values())) > 1
  assert set(last["task_dropped"]) == set(cfg.active_views)
  assert all(np.isfinite(r["loss"]) for r in rows(once))
