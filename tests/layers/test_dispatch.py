"""Every way of carrying tokens to experts agrees with the dense one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax.layers import dispatch
from supermoe_jax.layers.moe import MoE

N, D, H, E, K = 96, 8, 12, 4, 2


@functools.cache
def layer() -> MoE:
  moe = MoE(D, H, E, K, rngs=nnx.Rngs(0))
  moe.up_bias[...] = jax.random.normal(jax.random.key(1), (E, H))
  moe.down_bias[...] = jax.random.normal(jax.random.key(2), (E, D))
  return moe


@functools.cache
def strategy(name: str, capacity_factor: float = float(E)):
  """The jitted strategy and its jitted gradient with respect to tokens, weights and experts."""
  graph, state = nnx.split(layer())

  def run(x, weight, state, expert, valid):
    arguments = (x, expert, weight, valid, nnx.merge(graph, state).apply_experts, E)
    if name == "sorted_capacity":
      return dispatch.sorted_capacity(*arguments, capacity_factor)
    return getattr(dispatch, name)(*arguments)

  def loss(*arguments):
    y = run(*arguments).y
    return jnp.sum(jnp.sin(y) * jnp.arange(D))

  return functools.partial(_with_state, jax.jit(run), state), functools.partial(
    _with_state, jax.jit(jax.grad(loss, argnums=(0, 1, 2))), state
  )


def _with_state(function, state, x, weight, expert, valid):
  return function(x, weight, state, expert, valid)


def example(seed: int, skew: str = "random", n_valid: int = N) -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(N, D)).astype(np.float32)
  expert = np.stack([rng.permutation(E)[:K] for _ in range(N)])
  if skew == "all to two":
    expert[:] = [1, 3]
  if skew == "one unused":
    expert = np.stack([rng.permutation(E - 1)[:K] for _ in range(N)])
  weight = rng.dirichlet(np.ones(K), N).astype(np.float32)
  valid = rng.permutation(np.arange(N) < n_valid)
  return jnp.asarray(x), jnp.asarray(weight), jnp.asarray(expert, jnp.int32), jnp.asarray(valid)


@pytest.mark.parametrize("name", ["sorted_capacity", "sorted_dropless"])
@pytest.mark.parametrize("skew", ["random", "all to two", "one unused"])
@pytest.mark.parametrize("n_valid", [N, 50, 0])
def test_a_strategy_equals_dense_in_outputs_and_gradients(name: str, skew: str, n_valid: int) -> None:
  arguments = example(3, skew, n_valid)
  (run, gradient), (oracle, oracle_gradient) = strategy(name), strategy("dense")
  out = run(*arguments)
  np.testing.assert_allclose(out.y, oracle(*arguments).y, atol=1e-5)
  assert int(out.dropped) == 0
  for mine, wanted in zip(jax.tree.leaves(gradient(*arguments)), jax.tree.leaves(oracle_gradient(*arguments))):
    np.testing.assert_allclose(mine, wanted, atol=2e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["random", "all to two", "one unused"]), st.integers(0, N))
def test_what_exceeds_the_capacity_is_dropped_and_counted(seed: int, skew: str, n_valid: int) -> None:
  factor = 0.5
  x, weight, expert, valid = example(seed, skew, n_valid)
  out = strategy("sorted_capacity", factor)[0](x, weight, expert, valid)
  capacity = math.ceil(factor * K * N / E)
  taken = np.zeros(E, int)
  kept = np.zeros((N, K), bool)
  for n in range(N):
    for k in range(K):
      if valid[n]:
        kept[n, k] = taken[expert[n, k]] < capacity
        taken[expert[n, k]] += 1
  assert int(out.dropped) == K * int(valid.sum()) - kept.sum()
  oracle = strategy("dense")[0](x, weight * kept, expert, valid)
  np.testing.assert_allclose(out.y, oracle.y, atol=1e-5)


def test_padding_gets_zero_and_changes_nothing() -> None:
  x, weight, expert, valid = example(5, n_valid=60)
  for name in ("dense", "sorted_capacity", "sorted_dropless"):
    run = strategy(name)[0]
    one = run(x, weight, expert, valid)
    other = run(jnp.where(valid[:, None], x, 7.0), weight, expert, valid)
    np.testing.assert_array_equal(one.y, other.y)
    assert not np.asarray(one.y)[~np.asarray(valid)].any()


def test_dropless_gives_a_token_the_same_result_whoever_shares_the_batch() -> None:
  x, weight, expert, valid = example(7)
  run = strategy("sorted_dropless")[0]
  alone = run(x, weight, expert, jnp.arange(N) < 8)
  together = run(x, weight, expert, valid)
  other_experts = run(x, weight, jnp.where((jnp.arange(N) < 8)[:, None], expert, 0), valid)
  np.testing.assert_array_equal(alone.y[:8], together.y[:8])
  np.testing.assert_array_equal(alone.y[:8], other_experts.y[:8])
