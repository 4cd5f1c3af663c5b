"""Checkpoints of tables: written on one mesh, read on another, with other stripes and with more rows."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.layers.heads import NextValueHead
from supermoe_jax.layers.table import EmbeddingTable, Layout
from supermoe_jax.training.checkpoint import Checkpoints, RunError
from supermoe_jax.training.row_optimizers import LazyAdam
from supermoe_jax.training.step import TrainState

D = 4


class Model(nnx.Module):
  def __init__(self, size: int, d: int, ways: int, seed: int):
    rngs = nnx.Rngs(seed)
    self.items = EmbeddingTable(size, d, name="items", layout=Layout(ways), rngs=rngs)
    self.head = NextValueHead(d, self.items, rngs=rngs)


def state(size: int, sizes: tuple[int, int, int], seed: int, d: int = D) -> TrainState:
  """A state whose every number is its own, on a mesh."""
  mesh = sharding.make_mesh(config.Mesh(*sizes))
  model = nnx.state(sharding.create(lambda: Model(size, d, mesh.size, seed), mesh))
  rows = model["items"]["rows"].get_value()
  layout = jax.sharding.NamedSharding(mesh, sharding.spec(None, "rows"))
  slots = {k: jax.device_put(s + seed, layout) for k, s in LazyAdam().slots(rows).items()}
  bias = model["head"]["bias"]
  if seed:
    natural = jnp.arange(rows.shape[0] * rows.shape[1], dtype=jnp.float32).reshape(rows.shape[:2])
    bias.set_value(jax.device_put(natural, bias.get_value().sharding))
  params = nnx.filter_state(model, nnx.Param)
  moments = jax.jit(optax.adam(1.0).init, out_shardings=None)(params)
  mu = jax.tree.map(lambda m, p: jax.device_put(p + 0.0, p.sharding), moments[0].mu, params)
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  moments = (moments[0]._replace(mu=mu, nu=mu, count=jax.device_put(moments[0].count, where)), moments[1])
  step, key = jax.device_put((jnp.int32(seed), jax.random.PRNGKey(seed)), where)
  return TrainState(step, model, moments, {"items": slots}, {}, key)


def natural(value: jax.Array, size: int) -> np.ndarray:
  value = np.asarray(value)
  return value.reshape(-1, *value.shape[2:])[:size]


def entries(of: TrainState, size: int) -> dict[str, np.ndarray]:
  """All that has an entry a row, by code."""
  head, mu = of.model["head"]["bias"], of.optimizer[0].mu["head"]["bias"]
  found = {"rows": of.model["items"]["rows"].get_value(), "bias": head.get_value(), "mu": mu.get_value()}
  return {n: natural(v, size) for n, v in {**found, **of.slots["items"]}.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, TrainState]:
  folder, written = tmp_path_factory.mktemp("run"), state(37, (2, 2, 2), 1)
  with Checkpoints(folder, config.Train()) as checkpoints:
    checkpoints.save(1, written, {"at": 5}, {})
  return folder, written


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 4, 2), (3, 1, 1), (5, 1, 1)])
def test_a_table_is_read_onto_any_mesh(saved: tuple[pathlib.Path, TrainState], sizes: tuple[int, int, int]) -> None:
  folder, written = saved
  mine = state(37, sizes, 0)
  with Checkpoints(folder, config.Train()) as checkpoints:
    read = checkpoints.restore(1, mine)
  assert read.position == {"at": 5} and int(read.state.step) == 1
  for name, wanted in entries(written, 37).items():
    np.testing.assert_array_equal(entries(read.state, 37)[name], wanted, err_msg=name)
  for leaf, like in zip(jax.tree.leaves(read.state), jax.tree.leaves(mine), strict=True):
    assert leaf.shape == like.shape and leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1)])
def test_a_table_grows_by_rows_and_keeps_those_that_it_had(
  saved: tuple[pathlib.Path, TrainState], sizes: tuple[int, int, int]
) -> None:
  folder, written = saved
  mine = state(300, sizes, 0)
  with Checkpoints(folder, config.Train()) as checkpoints:
    read = checkpoints.restore(1, mine).state
    model = checkpoints.restore_model(1, mine.model)
  wanted, fresh, got = (entries(*of) for of in ((written, 37), (mine, 300), (read, 300)))
  for name in wanted:
    np.testing.assert_array_equal(got[name][:37], wanted[name], err_msg=name)
  np.testing.assert_array_equal(got["rows"][37:], fresh["rows"][37:])  # as they began
  assert np.abs(got["rows"][37:]).min() > 0
  assert not any(got[name][37 + 3 :].any() for name in ("mean", "square", "steps"))  # beyond the padding of the 37
  rows = natural(model["items"]["rows"].get_value(), 300)
  np.testing.assert_array_equal(rows[:37], wanted["rows"])
  assert not rows[37:].any()  # an untrained value says nothing


def test_another_width_is_an_error(saved: tuple[pathlib.Path, TrainState]) -> None:
  with Checkpoints(saved[0], config.Train()) as checkpoints, pytest.raises(RunError, match="does not fit this model"):
    checkpoints.restore(1, state(37, (1, 1, 1), 0, d=8))


def test_a_larger_table_begins_as_a_smaller_one_whatever_its_stripes() -> None:
  small, large = (EmbeddingTable(size, D, layout=Layout(ways), rngs=nnx.Rngs(0)) for size, ways in ((37, 1), (5000, 8)))
  assert small.rows.shape[1] != large.rows.shape[1]
  np.testing.assert_array_equal(small.natural(), large.natural()[:37])
