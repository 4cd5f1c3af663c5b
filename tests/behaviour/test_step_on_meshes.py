"""A step gives the same numbers on every mesh, and a run on a mesh, cut or not, ends bitwise as ever."""

import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from supermoe_jax import config, device_mesh
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.layers.routing import BalanceBias
from supermoe_jax.training import loop, task_statistics
from supermoe_jax.training.checkpoints.checkpoint import Checkpoints, CheckpointWriter
from supermoe_jax.training.memory_counts import count_followers
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import TrainState, abstract_state, compiled_program, create_state, place_on_mesh
from supermoe_jax.training.step_metrics import StepMetrics
from tests.fixtures.messages import messages
from tests.fixtures.short_runs import ONE_BLOCK, cut_and_resumed, only, rows

STEPS = 3

# What keeps a state from step to step.
KEPT = (
  "--config.train.packing=True",
  "--config.train.balance_rate=0.01",
  "--config.train.tables.optimizer=adam",
  "--config.train.tables.weight_decay=0.1",
  "--config.train.weighting.method=seesaw",
)

# Further settings that change no number by more than the order of a sum.
EXACT = (
  "--config.model.activation=swiglu",
  "--config.model.shared_experts=1",
  "--config.model.remat=dots",
  "--config.model.conditioning=token",
  "--config.train.task_information=0.01",
)


def settled(every_task: config.Config, *settings: str) -> config.Config:
  """A capacity that no choice exceeds, so that how tokens are spread over devices makes no difference."""
  lengths = ("--config.train.steps=6", "--config.train.checkpoint_every=3", "--config.train.log_every=2")
  least = ("--config.model.capacity_factor=2.0", "--config.model.router_jitter=0.1")
  return config.override(every_task, [*ONE_BLOCK, *lengths, *least, *KEPT, *settings])


@pytest.fixture(scope="module")
def few(every_task: config.Config) -> config.Config:
  """A full and a sampled softmax, both with a memory, and a task about snapshots."""
  memory = (
    "--config.tasks.next_page.memory=('repeat', 'follow')",
    "--config.tasks.sampled.memory=('follow', 'recent')",
  )
  return settled(every_task, only(every_task, "next_page", "sampled", "quiet"), *memory)


@pytest.fixture(scope="module")
def every(every_task: config.Config) -> config.Config:
  """More settings, and a task of every form of loss."""
  kept = ("sampled", "long", "pages", "tier", "age", "alike")
  return settled(every_task, only(every_task, *kept), *EXACT)


def on(cfg: config.Config, sizes: tuple[int, int, int]) -> config.Config:
  """The config on a mesh."""
  return config.override(
    cfg, [f"--config.train.mesh.{a}={n}" for a, n in zip(("data", "expert", "tensor"), sizes, strict=True)]
  )


class Trained(NamedTuple):
  """The states before the first step and after each, on the host, and the metrics of each step."""

  states: list[TrainState]
  metrics: list[StepMetrics]


def trained(
  cfg: config.Config, dataset: Dataset, sizes: tuple[int, int, int], saved: pathlib.Path | None = None
) -> Trained:
  """Trains on a mesh from the start, or from a checkpoint on."""
  cfg = on(cfg, sizes)
  mesh = device_mesh.make_mesh(cfg.train.mesh)
  if saved is None:
    _, state = create_state(cfg, dataset.schema, mesh, followers=count_followers(dataset, cfg))
  else:
    found = Checkpoints(saved).restore(abstract_state(cfg, dataset.schema, mesh))
    assert found is not None
    state = found.state
  done = int(state.step)
  measured = task_statistics.measure_tasks(
    cfg.active_tasks, dataset.schema.outputs, training_batches.training_batches(dataset, cfg), 8
  ).statistics
  everywhere = NamedSharding(mesh, PartitionSpec())
  constants = jax.device_put(jax.tree.map(np.float32, measured), everywhere)  # as in a run, whose program is this one
  states, metrics = [jax.device_get(state)], []
  with jax.set_mesh(mesh):
    step = compiled_program(cfg, dataset.schema, mesh).step
    for batch in itertools.islice(training_batches.training_batches(dataset, cfg), done, STEPS):
      state, out = step(state, place_on_mesh(batch, mesh), constants)
      states.append(jax.device_get(state))
      metrics.append(jax.device_get(out))
  return Trained(states, metrics)


@pytest.fixture(scope="module")
def on_one_device(few: config.Config, every_task_dataset: Dataset) -> Trained:
  return trained(few, every_task_dataset, (1, 1, 1))


@pytest.fixture(scope="module")
def on_eight(few: config.Config, every_task_dataset: Dataset) -> Trained:
  return trained(few, every_task_dataset, (2, 2, 2))


def saved(cfg: config.Config, dataset: Dataset, on_eight: Trained, folder: pathlib.Path) -> pathlib.Path:
  """Writes a checkpoint of 2×2×2 devices after the first step."""
  cfg = on(cfg, (2, 2, 2))
  layouts = compiled_program(cfg, dataset.schema, device_mesh.make_mesh(cfg.train.mesh)).layouts
  with CheckpointWriter(folder, cfg.train) as writer:
    writer.save(1, jax.device_put(on_eight.states[1], layouts), {}, {})
  return folder


def alike(one: object, other: object) -> list[tuple[np.ndarray, np.ndarray]]:
  """Pairs of leaves; of what has a row a value, as many rows as both have: they are padded as the mesh asks for."""
  pairs = []
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
      assert a.ndim == b.ndim > 1
      size = min(a.size, b.size)
      a, b = a.reshape(-1)[:size], b.reshape(-1)[:size]
    pairs.append((a, b))
  return pairs


def assert_close(mine: StepMetrics, wanted: StepMetrics, **tolerance: float) -> None:
  for name in StepMetrics._fields:
    for a, b in alike(getattr(mine, name), getattr(wanted, name)):
      np.testing.assert_allclose(a, b, err_msg=name, **tolerance)


def assert_same(
  cfg: config.Config,
  dataset: Dataset,
  sizes: tuple[int, int, int],
  mine: Trained,
  on_eight: Trained,
  folder: pathlib.Path,
) -> None:
  """Steps on a mesh are those on eight devices, also from a checkpoint of theirs on."""
  for a, b in zip(mine.metrics, on_eight.metrics, strict=True):
    assert int(a.dropped.sum()) == 0
    assert_close(a, b, rtol=2e-4, atol=1e-5)
  for a, b in alike(mine.states[-1].model, on_eight.states[-1].model):
    np.testing.assert_allclose(a, b, atol=2e-4)
  (bias,) = jax.tree.leaves(nnx.filter_state(mine.states[-1].model, BalanceBias))
  assert np.abs(bias).max() >= 0.009  # it moved

  resumed = trained(cfg, dataset, sizes, saved(cfg, dataset, on_eight, folder))
  for a, b in alike(resumed.states[0], on_eight.states[1]):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(resumed.metrics, on_eight.metrics[1:], strict=True):
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
    assert_close(a, b, rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_a_step_is_the_same_on_eight_devices_and_on_one_which_goes_on_from_their_checkpoint(
  few: config.Config, every_task_dataset: Dataset, on_one_device: Trained, on_eight: Trained, tmp_path: pathlib.Path
) -> None:
  assert_same(few, every_task_dataset, (1, 1, 1), on_one_device, on_eight, tmp_path)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2)], ids=lambda s: "x".join(map(str, s)))
def test_a_step_is_the_same_on_every_mesh_and_goes_on_from_a_checkpoint_of_another(
  few: config.Config,
  every_task_dataset: Dataset,
  on_eight: Trained,
  tmp_path: pathlib.Path,
  sizes: tuple[int, int, int],
) -> None:
  mine = trained(few, every_task_dataset, sizes)
  assert_same(few, every_task_dataset, sizes, mine, on_eight, tmp_path)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_step_with_every_setting_is_the_same_on_eight_devices_and_on_one(
  every: config.Config, every_task_dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  mine, on_eight = (trained(every, every_task_dataset, sizes) for sizes in ((1, 1, 1), (2, 2, 2)))
  assert_same(every, every_task_dataset, (1, 1, 1), mine, on_eight, tmp_path)
  assert set(mine.metrics[0].task_dropped) == set(every.active_views)


@pytest.mark.slow
def test_a_run_whose_every_part_has_a_state_resumes_and_opens_on_a_mesh(
  few: config.Config, every_task_dataset: Dataset, compiled_afresh: None, tmp_path: pathlib.Path
) -> None:
  once, cfg = tmp_path / "once", on(few, (2, 2, 2))
  with messages() as said:
    assert loop.train(cfg, once) == 6
  assert said[0].startswith("packing: ") and "of the positions are padding" in said[0]
  cut_and_resumed(cfg, once, tmp_path / "twice", after=3)
  found = rows(once)
  assert all(np.isfinite(r["loss"]) and len(r["load"]) == 1 and r["padding_share"] < 0.4 for r in found)
  (bias,) = jax.tree.leaves(nnx.filter_state(Run(once, 3).variables, BalanceBias))
  assert bias.shape == (1, 4)
  steps = np.asarray(bias) / 0.01  # up or down by the rate in each of 3 steps, an odd number: not back at 0
  np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
  assert 0 < np.abs(steps).max() <= 3
  weights = found[-1]["weights"]
  assert set(weights) == set(cfg.active_tasks) and sum(weights.values()) == pytest.approx(len(weights), abs=1e-3)
  assert len(set(weights.values())) > 1


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
  few: config.Config, every_task_dataset: Dataset, on_one_device: Trained
) -> None:
  mesh = device_mesh.make_mesh(few.train.mesh)
  program = compiled_program(few, every_task_dataset.schema, mesh)
  stream = iter(training_batches.training_batches(every_task_dataset, few))
  measured = task_statistics.measure_tasks(few.active_tasks, every_task_dataset.schema.outputs, stream, 8).statistics
  constants = jax.device_put(jax.tree.map(np.float32, measured), NamedSharding(mesh, PartitionSpec()))
  before = on_one_device.states[-1]
  with jax.set_mesh(mesh):
    batch = place_on_mesh(next(stream), mesh)
    for bad in (jnp.inf, jnp.nan):
      targets = {n: t._replace(weight=t.weight * bad) for n, t in batch.targets.items()}
      state, metrics = program.step(jax.device_put(before, program.layouts), batch._replace(targets=targets), constants)
      assert int(metrics.skipped) == 1
      assert (int(state.step), int(state.skipped)) == (STEPS + 1, 1)
      after: TrainState = jax.device_get(state)
      for (path, mine), wanted in zip(
        jax.tree_util.tree_flatten_with_path(after._replace(step=0, skipped=0))[0],
        jax.tree.leaves(before._replace(step=0, skipped=0)),
        strict=True,
      ):
        np.testing.assert_array_equal(mine, wanted, err_msg=str(path))
    state, metrics = program.step(state, place_on_mesh(next(stream), mesh), constants)
  assert int(metrics.skipped) == 0 and (int(state.step), int(state.skipped)) == (STEPS + 2, 1)
  assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(after.model)))


@pytest.mark.nightly
@pytest.mark.slow
def test_parts_of_a_batch_one_after_the_other_are_the_batch(cfg: config.Config, dataset: Dataset) -> None:
  off = ("model.dropout",)  # which each part draws with a key of its own
  linear = config.override(
    cfg,
    [
      only(cfg, "next_page", "quiet"),
      *ONE_BLOCK,
      "--config.model.capacity_factor=2.0",
      *(f"--config.{name}=0.0" for name in off),
      "--config.train.weighting.method=famo",
      "--config.train.balance_weight=1.0",
      "--config.train.balance_rate=0.01",
    ],
  )
  whole = trained(linear, dataset, (1, 1, 1))
  parts = trained(config.override(linear, ["--config.train.accumulate=2"]), dataset, (2, 2, 1))
  for mine, wanted in zip(parts.metrics, whole.metrics, strict=True):
    np.testing.assert_allclose(mine.loss, wanted.loss, rtol=1e-5)
    np.testing.assert_allclose(mine.gradient_norm, wanted.gradient_norm, rtol=1e-4)
    for name in ("tasks", "weights", "routed", "events", "tables", "balance_loss", "z_loss", "load", "entropy"):
      for a, b in alike(getattr(mine, name), getattr(wanted, name)):
        np.testing.assert_allclose(a, b, rtol=1e-4, err_msg=name)
  for a, b in alike(parts.states[-1].model, whole.states[-1].model):
    np.testing.assert_allclose(a, b, atol=2e-4)
