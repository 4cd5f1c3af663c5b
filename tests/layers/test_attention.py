import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.layers import attention
from supermoe_jax.layers.attention import Attention, rotate, visibility

L, S, D = 150, 3, 8  # more than one block of queries


@pytest.fixture(scope="module")
def layer() -> Attention:
  layer = Attention(D, 2, rngs=nnx.Rngs(0))
  layer.gap[...] = jax.random.normal(jax.random.key(9), layer.gap.shape) * 0.1
  return layer


@pytest.fixture(scope="module")
def attend(layer: Attention):
  """The jitted layer."""
  graph, state = nnx.split(layer)
  jitted = jax.jit(lambda s, *inputs: nnx.merge(graph, s)(*inputs))
  return lambda *inputs: np.asarray(jitted(state, *inputs))


def inputs(seed: int = 0) -> tuple[jax.Array, ...]:
  keys = jax.random.split(jax.random.key(seed), 2)
  x = jax.random.normal(keys[0], (2, L + S, D))
  time = jnp.sort(jax.random.uniform(keys[1], (2, L + S)) * 1000, axis=1)
  n_events = jnp.array([[10, 100, 150], [0, 40, 90]])
  position = jnp.concatenate([jnp.broadcast_to(jnp.arange(L), (2, L)), n_events], axis=1)
  return x, position, time, visibility(jnp.array([150, 90]), n_events, L)


def test_who_sees_whom() -> None:
  seen = np.asarray(visibility(jnp.array([3]), jnp.array([[0, 2, 9]]), 4))[0]
  wanted = [
    "1000000",
    "1100000",
    "1110000",
    "1110000",  # padding sees what is real; nobody sees it
    "0000100",
    "1100010",
    "1110001",  # never more events than there are
  ]
  assert ["".join(str(int(v)) for v in row) for row in seen] == wanted


def test_blocks_of_queries_equal_the_plain_formula(layer: Attention, attend) -> None:
  x, position, time, visible = inputs()
  q, k, v = jnp.split(layer.qkv(x).reshape(2, L + S, 6, D // 2), 3, axis=2)
  plain = jax.nn.dot_product_attention(
    rotate(q, position), rotate(k, position), v, bias=layer._gap_bias(time, time), mask=visible[:, None]
  )
  wanted = layer.out(plain.reshape(2, L + S, D))
  some = np.asarray(visible.any(-1))
  np.testing.assert_allclose(attend(x, position, time, visible)[some], wanted[some], atol=1e-5)


def test_what_is_not_visible_changes_nothing(attend) -> None:
  x, position, time, visible = inputs()
  other = x.at[:, 40:].set(5.0).at[:, L:].set(x[:, L:])
  one, two = attend(x, position, time, visible), attend(other, position, time, visible)
  np.testing.assert_array_equal(one[0, :40], two[0, :40])
  np.testing.assert_array_equal(one[0, L], two[0, L])
  np.testing.assert_array_equal(one[1, L : L + 2], two[1, L : L + 2])
  assert not np.array_equal(one[0, L + 1], two[0, L + 1])


def test_rotary_scores_depend_on_distance_only() -> None:
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
  score = [jnp.vdot(rotate(q, jnp.array([[p + 7]])), rotate(k, jnp.array([[p]]))) for p in (0, 30)]
  assert float(score[0]) == pytest.approx(float(score[1]), rel=1e-4)


def test_the_gap_bias_is_piecewise_linear_in_log_time(layer: Attention) -> None:
  time = jnp.array([[0.0, 0.5, 30.0, 900.0]])
  bias = layer._gap_bias(time, time)[0]
  gap = np.log1p(np.abs(np.subtract.outer(time[0], time[0])))
  wanted = sum(
    np.asarray(layer.gap[...])[i][:, None, None] * np.maximum(gap - knot, 0)
    for i, knot in enumerate(attention.GAP_KNOTS)
  )
  np.testing.assert_allclose(bias, wanted, atol=1e-5)


def test_a_width_that_cannot_be_rotated_is_an_error() -> None:
  with pytest.raises(ValueError, match="multiple of 2 × heads=6"):
    Attention(8, 3, rngs=nnx.Rngs(0))
