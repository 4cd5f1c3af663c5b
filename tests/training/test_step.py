"""A training step gives the same numbers on every mesh."""

import dataclasses
import itertools
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.data import batches
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.layers.routing import BalanceBias
from supermoe_jax.training import statistics
from supermoe_jax.training.checkpoint import Checkpoints, Writer
from supermoe_jax.training.step import (
  StepMetrics,
  TrainState,
  abstract_state,
  compiled,
  create_state,
  initial_weights,
  place,
)

STEPS = 3


@pytest.fixture(scope="module")
def dropless(cfg: config.Config) -> config.Config:
  """A capacity that no choice exceeds, so that how tokens are spread over devices makes no difference."""
  return config.override(cfg, ["--config.model.capacity_factor=2.0", "--config.train.balance_rate=0.01"])


class Trained(NamedTuple):
  """The states before the first step and after each, on the host, and the metrics of each step."""

  states: list[TrainState]
  metrics: list[StepMetrics]


def trained(
  cfg: config.Config, dataset: Dataset, sizes: tuple[int, int, int], saved: pathlib.Path | None = None
) -> Trained:
  """Trains on a mesh from the start, or from a checkpoint on."""
  mesh = sharding.make_mesh(config.Mesh(*sizes))
  if saved is None:
    _, state = create_state(cfg, dataset.schema, mesh)
  else:
    found = Checkpoints(saved).restore(abstract_state(cfg, dataset.schema, mesh))
    assert found is not None
    state = found.state
  done = int(state.step)
  measured = statistics.measure(cfg.active_tasks, dataset.schema.outputs, batches.training(dataset, cfg), 8)
  states, metrics = [jax.device_get(state)], []
  with jax.set_mesh(mesh):
    step = compiled(cfg, dataset.schema, mesh).step
    for batch in itertools.islice(batches.training(dataset, cfg), done, STEPS):
      state, out = step(state, place(batch, mesh), measured)
      states.append(jax.device_get(state))
      metrics.append(jax.device_get(out))
  return Trained(states, metrics)


@pytest.fixture(scope="module")
def on_one_device(dropless: config.Config, dataset: Dataset) -> Trained:
  return trained(dropless, dataset, (1, 1, 1))


@pytest.fixture(scope="module")
def on_eight(dropless: config.Config, dataset: Dataset) -> Trained:
  return trained(dropless, dataset, (2, 2, 2))


@pytest.fixture(scope="module")
def saved(
  dropless: config.Config, dataset: Dataset, on_eight: Trained, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """A checkpoint of 2×2×2 devices after the first step."""
  folder, mesh = tmp_path_factory.mktemp("saved"), sharding.make_mesh(config.Mesh(2, 2, 2))
  layouts = compiled(dropless, dataset.schema, mesh).layouts
  with Writer(folder, dropless.train) as writer:
    writer.save(1, jax.device_put(on_eight.states[1], layouts), {}, {})
  return folder


def assert_close(mine: StepMetrics, wanted: StepMetrics, **tolerance: float) -> None:
  for name in StepMetrics._fields:
    for a, b in zip(jax.tree.leaves(getattr(mine, name)), jax.tree.leaves(getattr(wanted, name)), strict=True):
      np.testing.assert_allclose(a, b, err_msg=name, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 4, 2)], ids=lambda s: "x".join(map(str, s)))
def test_a_step_is_the_same_on_every_mesh_and_goes_on_from_a_checkpoint_of_another(
  dropless: config.Config,
  dataset: Dataset,
  on_one_device: Trained,
  on_eight: Trained,
  saved: pathlib.Path,
  sizes: tuple[int, int, int],
) -> None:
  mine = on_one_device if sizes == (1, 1, 1) else trained(dropless, dataset, sizes)
  for a, b in zip(mine.metrics, on_eight.metrics, strict=True):
    assert int(a.dropped.sum()) == 0
    assert_close(a, b, rtol=2e-4, atol=1e-5)
  for a, b in zip(jax.tree.leaves(mine.states[-1].model), jax.tree.leaves(on_eight.states[-1].model), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)
  (bias,) = jax.tree.leaves(nnx.filter_state(mine.states[-1].model, BalanceBias))
  assert np.abs(bias).max() >= 0.009  # it moved

  resumed = trained(dropless, dataset, sizes, saved)
  for a, b in zip(jax.tree.leaves(resumed.states[0]), jax.tree.leaves(on_eight.states[1]), strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(resumed.metrics, on_eight.metrics[1:], strict=True):
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
    assert_close(a, b, rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_parts_of_a_batch_one_after_the_other_are_the_batch(dropless: config.Config, dataset: Dataset) -> None:
  # What is not linear in the rows is off: the balance of loads and the mean of z-losses are those of a part.
  off = ("model.dropout", "train.balance_weight", "train.z_weight", "train.balance_rate")
  linear = config.override(
    dropless, [*(f"--config.{name}=0.0" for name in off), "--config.train.weighting.method=famo"]
  )
  whole = trained(linear, dataset, (1, 1, 1))
  parts = trained(config.override(linear, ["--config.train.accumulate=2"]), dataset, (2, 2, 1))
  for mine, wanted in zip(parts.metrics, whole.metrics, strict=True):
    np.testing.assert_allclose(mine.loss, wanted.loss, rtol=1e-5)
    np.testing.assert_allclose(mine.gradient_norm, wanted.gradient_norm, rtol=1e-4)
    for name in ("tasks", "weights", "routed", "events", "tables"):
      for a, b in zip(jax.tree.leaves(getattr(mine, name)), jax.tree.leaves(getattr(wanted, name)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, err_msg=name)
  for a, b in zip(jax.tree.leaves(parts.states[-1].model), jax.tree.leaves(whole.states[-1].model), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("method", ["equal", "static", "uncertainty", "dwa", "famo", "seesaw", "pcgrad", "cagrad"])
def test_no_two_parts_of_the_weights_state_share_a_buffer(cfg: config.Config, dataset: Dataset, method: str) -> None:
  """A step is given its state's buffers for good, and can be given each only once."""
  weighing = dataclasses.replace(cfg.train.weighting, method=method)
  state = initial_weights(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, weighting=weighing)))
  leaves = jax.tree.leaves(state)
  assert leaves and len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_runs_that_differ_in_seed_and_numbers_of_the_weighting_share_a_program(
  cfg: config.Config, dataset: Dataset
) -> None:
  mesh = sharding.make_mesh(cfg.train.mesh)
  same = config.override(cfg, ["--config.train.seed=5", "--config.tasks.quiet.weight=3.0"])
  assert compiled(same, dataset.schema, mesh) is compiled(cfg, dataset.schema, mesh)
  other = config.override(cfg, ["--config.train.weighting.method=dwa"])
  assert compiled(other, dataset.schema, mesh) is not compiled(cfg, dataset.schema, mesh)
