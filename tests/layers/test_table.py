"""Tables used as layers: what they look up, and what they give a plain optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.layers import exchange, table
from supermoe_jax.layers.table import EmbeddingTable, Layout

SIZE, D = 50, 4
CODES = np.array([[3, 0, 3, 49], [1, 50, -1, 7], [2, 2, 2, 2], [0, 0, 0, 0]] * 2, np.int32)


def make(mesh: jax.sharding.Mesh, **layout) -> EmbeddingTable:
  return sharding.create(lambda: EmbeddingTable(SIZE, D, layout=Layout(8, **layout), rngs=nnx.Rngs(0)), mesh)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # on TPUs 32 of these rows share a line
@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (2, 2, 2)], ids=lambda s: "x".join(map(str, s)))
def test_rows_are_looked_up_and_differentiated_on_every_mesh(sizes: tuple[int, int, int], platform: str) -> None:
  one = EmbeddingTable(SIZE, D, rngs=nnx.Rngs(0))
  whole = np.asarray(one.natural())
  assert np.abs(whole[2:]).min() > 0 and not whole[:2].any()
  inside = (CODES > 0) & (CODES < SIZE)
  wanted = np.where(inside[..., None], whole[np.where(inside, CODES, 0)], 0)
  mesh = sharding.make_mesh(config.Mesh(*sizes))
  graph, state = nnx.split(make(mesh, cells=0.1, platform=platform))  # few cells: several rounds
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(jax.jit(lambda s: nnx.merge(graph, s)(CODES))(state), wanted)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(jnp.sin(nnx.merge(graph, s)(CODES)))))(state)
  dense = np.zeros((SIZE, D))
  np.add.at(dense, CODES[inside], np.cos(whole[CODES[inside]]))
  rows = np.asarray(gradient["rows"].get_value()).reshape(-1, D)
  np.testing.assert_allclose(rows[:SIZE], dense, atol=1e-6)
  assert not rows[SIZE:].any()


def test_without_a_mesh_a_table_is_a_layer_like_any_other() -> None:
  one = EmbeddingTable(SIZE, D, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(one(jnp.array([[3, 0]]))[0, 0], one.natural()[3])
  assert one(jnp.zeros((2, 3, 5), int)).shape == (2, 3, 5, D)
  assert not nnx.state(one, nnx.Param)  # no optimizer over all parameters holds it


def test_rows_of_bfloat16_are_looked_up_as_float32() -> None:
  one = EmbeddingTable(SIZE, D, layout=Layout(dtype="bfloat16"), rngs=nnx.Rngs(0))
  found = one(jnp.array([[3]]))
  assert one.rows.dtype == jnp.bfloat16 and found.dtype == jnp.float32
  np.testing.assert_array_equal(found[0, 0], one.natural()[3].astype(jnp.float32))


def test_fetched_rows_answer_for_what_was_asked_only() -> None:
  one = EmbeddingTable(SIZE, D, rngs=nnx.Rngs(0))
  place, outside = table.distinct(jnp.asarray(CODES), one.extent)  # of one device, so places are codes
  assert place.tolist()[:5] == [1, 2, 3, 7, 49] and set(place.tolist()[5:]) == {exchange.NONE}
  assert outside.tolist() == [4]  # 50 and -1, twice each
  found = table.fetch(one.rows.get_value(), place, one.extent)
  one.rows.set_value(found)
  np.testing.assert_array_equal(one(jnp.array([[7, 8]]))[0, 1], np.zeros(D))
  assert np.abs(one(jnp.array([[7, 8]]))[0, 0]).min() > 0


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
