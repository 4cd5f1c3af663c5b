"""Tables used as layers: what they look up, and what they give a plain optimizer."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.layers import exchange, table
from supermoe_jax.layers.table import EmbeddingTable, Layout
from supermoe_jax.layers.tpu_lines import NONE
from tests.fixtures import grids

SIZE, D = 50, 4
CODES = np.array([[3, 0, 3, 49], [1, 50, -1, 7], [2, 2, 2, 2], [0, 0, 0, 0]] * 2, np.int32)


ON_ONE, OVER_ROWS, OVER_ALL = (1, 1, 1), (8, 1, 1), (2, 2, 2)


def make(**layout) -> EmbeddingTable:
  return EmbeddingTable(SIZE, D, layout=Layout(**layout), rngs=nnx.Rngs(0))


@functools.cache
def natural(**layout) -> np.ndarray:
  """The rows of a new table by code."""
  return np.asarray(jax.jit(lambda: make(**layout).natural())())


def looked_up(codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
  inside = (codes > 0) & (codes < SIZE)
  return np.where(inside[..., None], rows[np.where(inside, codes, 0)], 0)


def test_a_new_table_is_the_same_on_every_mesh_and_what_has_no_value_is_nought() -> None:
  assert np.abs(natural()[2:]).min() > 0 and not natural()[:2].any()
  mesh = device_mesh.make_mesh(config.Mesh(*OVER_ALL))
  placed = sharding.create(lambda: make(ways=8, platform="tpu"), mesh)
  rows = np.asarray(placed.rows.get_value()).reshape(-1, D)
  np.testing.assert_array_equal(rows[:SIZE], natural())
  assert not rows[SIZE:].any()


@pytest.mark.parametrize(
  ("sizes", "platform"),  # on TPUs 32 of these rows share a line
  grids.quick_few(
    [(ON_ONE, "tpu"), (OVER_ROWS, "cpu"), (OVER_ALL, "tpu")],
    itertools.product([ON_ONE, OVER_ROWS, OVER_ALL], ["cpu", "tpu"]),
  ),
  ids=lambda s: "x".join(map(str, s)) if isinstance(s, tuple) else s,
)
def test_rows_are_looked_up_and_differentiated_on_every_mesh(sizes: tuple[int, int, int], platform: str) -> None:
  mesh = device_mesh.make_mesh(config.Mesh(*sizes))
  with jax.set_mesh(mesh):
    abstract = nnx.eval_shape(lambda: make(ways=8, cells=0.1, platform=platform))  # few cells: several rounds
  graph, state = nnx.split(abstract)
  shape = state["rows"].shape
  whole = np.random.default_rng(0).normal(size=(math.prod(shape) // D, D)).astype(np.float32)
  state["rows"].set_value(whole.reshape(shape))
  state = jax.device_put(state, sharding.shardings(mesh, state))

  def loss(state: nnx.State) -> tuple[jax.Array, jax.Array]:
    found = nnx.merge(graph, state)(CODES)
    return jnp.sum(jnp.sin(found)), found

  with jax.set_mesh(mesh):
    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(state)
  np.testing.assert_array_equal(found, looked_up(CODES, whole))
  dense, inside = np.zeros((SIZE, D)), (CODES > 0) & (CODES < SIZE)
  np.add.at(dense, CODES[inside], np.cos(whole[CODES[inside]]))
  rows = np.asarray(gradient["rows"].get_value()).reshape(-1, D)
  np.testing.assert_allclose(rows[:SIZE], dense, atol=1e-6)
  assert not rows[SIZE:].any()


def test_without_a_mesh_a_table_is_a_layer_like_any_other() -> None:
  codes = np.array([[3, 0]])
  np.testing.assert_array_equal(jax.jit(lambda c: make()(c))(codes), looked_up(codes, natural()))
  one = nnx.eval_shape(make)
  assert jax.eval_shape(lambda: make()(jnp.zeros((2, 3, 5), int))).shape == (2, 3, 5, D)
  assert not nnx.state(one, nnx.Param)  # no optimizer over all parameters holds it


def test_rows_of_bfloat16_are_looked_up_as_float32() -> None:
  found = jax.jit(lambda c: make(dtype="bfloat16")(c))(np.array([[3]]))
  assert nnx.eval_shape(lambda: make(dtype="bfloat16")).rows.dtype == jnp.bfloat16 and found.dtype == jnp.float32
  np.testing.assert_array_equal(found[0, 0], natural(dtype="bfloat16")[3].astype(np.float32))


def test_fetched_rows_answer_for_what_was_asked_only() -> None:
  @jax.jit
  def run(codes: np.ndarray, further: np.ndarray) -> tuple[jax.Array, ...]:
    one = make()
    place, outside = table.distinct_codes(codes, one.extent)  # of one device, so places are codes
    one.rows.set_value(table.fetch(one.rows.get_value(), place, one.extent))
    return place, outside, one(further)

  place, outside, found = run(CODES, np.array([[7, 8]]))
  assert place.tolist()[:5] == [1, 2, 3, 7, 49] and set(place.tolist()[5:]) == {NONE}
  assert outside.tolist() == [4]  # 50 and -1, twice each
  np.testing.assert_array_equal(found, [[natural()[7], np.zeros(D)]])


def test_more_rows_than_codes_can_name_are_an_error() -> None:
  with pytest.raises(ValueError, match="codes are int32; spread the ids over several tables"):
    nnx.eval_shape(lambda: EmbeddingTable(2**31, D, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("rows", [1, 9, 300, 5000, 10**6, 10**9])
@pytest.mark.parametrize("ways", [1, 3, 8, 256, 6144])
def test_stripes_divide_over_the_devices_and_cost_little(rows: int, ways: int) -> None:
  m = exchange.stripes(rows, ways)
  assert m % ways == 0
  padding = -rows % m
  assert padding < max(rows / 8, 24, 8 * ways)
