import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax.layers.routing import Router, balance_loss

N, D, E = 32, 8, 4


@pytest.fixture(scope="module")
def x() -> jax.Array:
  return jax.random.normal(jax.random.key(0), (N, D))


@pytest.mark.parametrize("k", [0, 5])
def test_more_choices_than_experts_or_none_are_an_error(k: int) -> None:
  with pytest.raises(ValueError, match="between 1 and experts=4"):
    Router(D, E, k, rngs=nnx.Rngs(0))


def test_with_one_choice_the_probability_is_the_weight_and_the_router_learns(x: jax.Array) -> None:
  router = Router(D, E, 1, rngs=nnx.Rngs(0))
  graph, state = nnx.split(router)
  routing = router(x, jnp.ones(N, bool))
  assert bool(jnp.all(routing.weight < 1))
  gradient = jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(x, jnp.ones(N, bool)).weight))(state)
  assert float(jnp.abs(gradient["kernel"].get_value()).max()) > 0


def test_with_several_choices_the_weights_sum_to_one(x: jax.Array) -> None:
  routing = Router(D, E, 2, rngs=nnx.Rngs(0))(x, jnp.ones(N, bool))
  np.testing.assert_allclose(routing.weight.sum(-1), 1, rtol=1e-6)
  assert routing.weight.dtype == jnp.float32


def test_the_router_stays_float32_under_bfloat16(x: jax.Array) -> None:
  router = Router(D, E, 2, rngs=nnx.Rngs(0))
  low = router(x.astype(jnp.bfloat16), jnp.ones(N, bool))
  exact = router(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.ones(N, bool))
  np.testing.assert_array_equal(low.weight, exact.weight)


def test_what_padding_holds_changes_nothing(x: jax.Array) -> None:
  router = Router(D, E, 2, rngs=nnx.Rngs(0))
  valid = jnp.arange(N) < 20
  one, other = router(x, valid), router(jnp.where(valid[:, None], x, 1e3), valid)
  for name in ("balance_loss", "z_loss", "load"):
    np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_balance_is_one_at_uniform_routing_and_e_at_collapse() -> None:
  valid = jnp.ones(N, bool)
  uniform = balance_loss(jnp.full((N, E), 1 / E), (jnp.arange(N) % E)[:, None], valid)
  collapsed = balance_loss(jax.nn.one_hot(jnp.zeros(N, int), E), jnp.zeros((N, 1), int), valid)
  assert float(uniform[1]) == pytest.approx(1)
  assert float(collapsed[1]) == pytest.approx(E)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=N, max_size=N), st.integers(0, 99))
def test_the_load_counts_valid_tokens_only_and_sums_to_one(valid: list[bool], seed: int) -> None:
  rng = np.random.default_rng(seed)
  probability = rng.dirichlet(np.ones(E), N).astype(np.float32)
  expert = np.argsort(-probability, axis=1)[:, :2]
  load, _ = balance_loss(jnp.asarray(probability), jnp.asarray(expert), jnp.asarray(valid))
  chosen = expert[np.array(valid)]
  wanted = np.bincount(chosen.reshape(-1), minlength=E) / max(chosen.size, 1)
  np.testing.assert_allclose(load, wanted, atol=1e-6)
