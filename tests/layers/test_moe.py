import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.layers.moe import Mlp, MoE, MoEOutput

B, L, D, H = 2, 24, 8, 16


@pytest.fixture(scope="module")
def x() -> jax.Array:
  return jax.random.normal(jax.random.key(0), (B, L, D))


@pytest.fixture(scope="module")
def valid() -> jax.Array:
  return jnp.arange(L)[None] < jnp.array([24, 10])[:, None]


def apply(moe: MoE, x: jax.Array, valid: jax.Array, *, dropless: bool = False) -> MoEOutput:
  graph, state = nnx.split(moe)
  return jax.jit(lambda s, x, v: nnx.merge(graph, s)(x, v, dropless=dropless))(state, x, valid)


def copied(mlp: Mlp, experts: int, k: int) -> MoE:
  """An MoE whose experts are all the same dense MLP."""
  moe = MoE(D, H, experts, k, capacity_factor=float(experts), rngs=nnx.Rngs(1))
  for target, source in (
    (moe.up, mlp.up.kernel),
    (moe.down, mlp.down.kernel),
    (moe.up_bias, mlp.up.bias),
    (moe.down_bias, mlp.down.bias),
  ):
    target[...] = jnp.broadcast_to(source[...], target.shape)
  return moe


@pytest.mark.parametrize("dropless", [True, False])
def test_experts_copied_from_a_dense_mlp_reproduce_it(x: jax.Array, valid: jax.Array, dropless: bool) -> None:
  mlp = Mlp(D, H, rngs=nnx.Rngs(0))
  out = apply(copied(mlp, 4, 2), x, valid, dropless=dropless)
  np.testing.assert_allclose(out.y, jnp.where(valid[..., None], mlp(x), 0.0), atol=1e-5)


def test_one_expert_with_its_gate_at_one_is_the_dense_mlp(x: jax.Array, valid: jax.Array) -> None:
  mlp = Mlp(D, H, rngs=nnx.Rngs(0))
  out = apply(copied(mlp, 1, 1), x, valid)  # the softmax over one expert is 1
  np.testing.assert_allclose(out.y, jnp.where(valid[..., None], mlp(x), 0.0), atol=1e-5)
  assert float(out.balance_loss) == pytest.approx(1)


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_routed_and_dropped_add_up_to_k_times_the_valid_tokens(x: jax.Array, valid: jax.Array, factor: float) -> None:
  moe = MoE(D, H, 4, 2, capacity_factor=factor, rngs=nnx.Rngs(0))
  out = apply(moe, x, valid)
  assert int(out.routed + out.dropped) == 2 * int(valid.sum())
  assert (int(out.dropped) > 0) == (factor < 1)
  assert int(apply(moe, x, valid, dropless=True).dropped) == 0


def test_jit_equals_eager(x: jax.Array, valid: jax.Array) -> None:
  moe = MoE(D, H, 4, 2, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(apply(moe, x, valid).y, moe(x, valid).y, atol=1e-6)
