"""A training step gives the same numbers on every mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.data import batches
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.layers.routing import BalanceBias
from supermoe_jax.training import statistics
from supermoe_jax.training.step import StepMetrics, TrainState, compiled, create_state, initial_weights, place

STEPS = 3


@pytest.fixture(scope="module")
def dropless(cfg: config.Config) -> config.Config:
  """A capacity that no choice exceeds, so that how tokens are spread over devices makes no difference."""
  return config.override(cfg, ["--config.model.capacity_factor=2.0", "--config.train.balance_rate=0.01"])


def trained(cfg: config.Config, dataset: Dataset, sizes: tuple[int, int, int]) -> tuple[TrainState, list[StepMetrics]]:
  mesh = sharding.make_mesh(config.Mesh(*sizes))
  _, state = create_state(cfg, dataset.schema, mesh)
  stream = batches.training(dataset, cfg)
  measured = statistics.measure(cfg.active_tasks, dataset.schema.outputs, stream, 8)
  metrics = []
  with jax.set_mesh(mesh):
    step = compiled(cfg, dataset.schema, mesh).step
    for batch, _ in zip(batches.training(dataset, cfg), range(STEPS)):
      state, out = step(state, place(batch, mesh), measured)
      metrics.append(jax.device_get(out))
    return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def on_one_device(dropless: config.Config, dataset: Dataset) -> tuple[TrainState, list[StepMetrics]]:
  return trained(dropless, dataset, (1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=lambda s: "x".join(map(str, s)))
def test_steps_and_their_metrics_are_the_same_on_every_mesh(
  dropless: config.Config, dataset: Dataset, on_one_device: tuple, sizes: tuple[int, int, int]
) -> None:
  wanted_state, wanted_metrics = on_one_device
  state, metrics = trained(dropless, dataset, sizes)
  for mine, wanted in zip(metrics, wanted_metrics, strict=True):
    assert int(wanted.dropped.sum()) == 0
    for name in StepMetrics._fields:
      for a, b in zip(jax.tree.leaves(getattr(mine, name)), jax.tree.leaves(getattr(wanted, name)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5, err_msg=name)
  for mine, wanted in zip(jax.tree.leaves(state.model), jax.tree.leaves(wanted_state.model), strict=True):
    np.testing.assert_allclose(mine, wanted, atol=2e-4)
  (bias,) = jax.tree.leaves(nnx.filter_state(state.model, BalanceBias))
  assert np.abs(bias).max() >= 0.009  # it moved


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
