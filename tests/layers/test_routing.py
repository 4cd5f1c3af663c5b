"""What a router may and may not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax.layers.routing import BalanceBias, Router, balance_loss, mutual_information, rebalanced

N, D, E, T = 32, 8, 4, 3


@pytest.fixture(scope="module")
def x() -> jax.Array:
  return jax.random.normal(jax.random.key(0), (N, D))


@functools.cache
def routed(k: int, tasks: int = 0, balance_bias: bool = False):
  """A jitted router as a function of its state, and the state."""
  graph, state = nnx.split(Router(D, E, k, tasks=tasks, balance_bias=balance_bias, rngs=nnx.Rngs(0)))
  return jax.jit(lambda s, *inputs: nnx.merge(graph, s)(*inputs)), state


@pytest.mark.parametrize("k", [0, 5])
def test_more_choices_than_experts_or_none_are_an_error(k: int) -> None:
  with pytest.raises(ValueError, match="between 1 and experts=4"):
    Router(D, E, k, rngs=nnx.Rngs(0))


def test_renormalising_a_single_choice_is_an_error() -> None:
  with pytest.raises(ValueError, match="the router would get no gradient"):
    Router(D, E, 1, renormalise=True, rngs=nnx.Rngs(0))


def test_jitter_out_of_range_is_an_error() -> None:
  with pytest.raises(ValueError, match=r"jitter=1\.5"):
    Router(D, E, 2, jitter=1.5, rngs=nnx.Rngs(0))


def test_a_task_for_a_router_that_sees_none_is_an_error(x: jax.Array) -> None:
  with pytest.raises(ValueError, match="create it with tasks=T"):
    Router(D, E, 2, rngs=nnx.Rngs(0))(x, jnp.ones(N, bool), jnp.zeros(N, int))


def test_with_one_choice_the_probability_is_the_weight_and_the_router_learns(x: jax.Array) -> None:
  run, state = routed(1)
  assert bool(jnp.all(run(state, x, jnp.ones(N, bool)).weight < 1))
  gradient = jax.grad(lambda s: jnp.sum(run(s, x, jnp.ones(N, bool)).weight))(state)
  assert float(jnp.abs(gradient["kernel"].get_value()).max()) > 0


def test_with_several_choices_the_weights_sum_to_one(x: jax.Array) -> None:
  run, state = routed(2)
  routing = run(state, x, jnp.ones(N, bool))
  np.testing.assert_allclose(routing.weight.sum(-1), 1, rtol=1e-6)
  assert routing.weight.dtype == jnp.float32


def test_the_router_stays_float32_under_bfloat16(x: jax.Array) -> None:
  run, state = routed(2)
  low = run(state, x.astype(jnp.bfloat16), jnp.ones(N, bool))
  exact = run(state, x.astype(jnp.bfloat16).astype(jnp.float32), jnp.ones(N, bool))
  for mine, wanted in zip(jax.tree.leaves(low), jax.tree.leaves(exact)):
    np.testing.assert_array_equal(mine, wanted)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.booleans(), min_size=N, max_size=N), st.sampled_from([7.0, np.nan, np.inf]))
def test_what_padding_holds_changes_nothing_nor_any_gradient(valid: list[bool], held: float) -> None:
  x = jax.random.normal(jax.random.key(1), (N, D))
  mask = jnp.asarray(valid)
  run, state = routed(2)

  def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, tuple]:
    out = run(state, x, mask)
    kept = jnp.sum(jnp.where(mask[:, None], out.weight, 0) ** 2)
    return out.aux.balance_loss + out.aux.z_loss + kept, (out.aux, out.load, out.entropy)

  gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  one, other = gradient(state, x), gradient(state, jnp.where(mask[:, None], x, held))
  for mine, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    np.testing.assert_array_equal(mine, wanted)


def test_balance_is_one_at_uniform_routing_and_e_at_collapse() -> None:
  valid = jnp.ones(N, bool)
  uniform = balance_loss(jnp.full((N, E), 1 / E), jax.nn.one_hot(jnp.arange(N) % E, E), valid)
  one = jax.nn.one_hot(jnp.zeros(N, int), E)
  assert float(uniform[1]) == pytest.approx(1)
  assert float(balance_loss(one, one, valid)[1]) == pytest.approx(E)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=N, max_size=N), st.integers(0, 99))
def test_the_load_counts_valid_tokens_only_and_sums_to_one(valid: list[bool], seed: int) -> None:
  x = np.random.default_rng(seed).normal(size=(N, D)).astype(np.float32)
  run, state = routed(2)
  routing = run(state, x, jnp.asarray(valid))
  chosen = np.asarray(routing.expert)[np.array(valid)]
  np.testing.assert_allclose(
    routing.load, np.bincount(chosen.reshape(-1), minlength=E) / max(chosen.size, 1), atol=1e-6
  )
  assert 0 <= float(routing.entropy) <= np.log(E) + 1e-5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(0.01, 20))
def test_mutual_information_lies_between_zero_and_the_log_of_the_fewer(seed: int, sharpness: float) -> None:
  rng = np.random.default_rng(seed)
  probability = jax.nn.softmax(jnp.asarray(rng.normal(size=(N, E)) * sharpness), axis=-1)
  task = jax.nn.one_hot(rng.integers(-1, T, N), T)
  information = float(mutual_information(probability, task, jnp.asarray(rng.random(N) < 0.8)))
  assert -1e-6 <= information <= np.log(min(T, E)) + 1e-5


def test_mutual_information_is_zero_when_tasks_route_alike_and_largest_when_each_has_its_expert() -> None:
  task, valid = jnp.arange(30) % T, jnp.ones(30, bool)
  alike = mutual_information(jnp.full((30, E), 1 / E), jax.nn.one_hot(task, T), valid)
  apart = mutual_information(jax.nn.one_hot(task, E), jax.nn.one_hot(task, T), valid)
  assert float(alike) == pytest.approx(0, abs=1e-6)
  assert float(apart) == pytest.approx(np.log(T), rel=1e-5)


def test_a_new_router_does_not_tell_tasks_apart_but_learns_to(x: jax.Array) -> None:
  run, state = routed(2, T)
  valid, task = jnp.ones(N, bool), jnp.arange(N) % T
  with_task, without = run(state, x, valid, task), run(state, x, valid)
  np.testing.assert_array_equal(with_task.weight, without.weight)
  assert float(without.aux.mutual_information) == 0.0
  coefficient = jax.random.normal(jax.random.key(3), (N, 2))
  gradient = jax.grad(lambda s: jnp.sum(run(s, x, valid, task).weight * coefficient))(state)
  assert float(jnp.abs(gradient["task_kernel"].get_value()).max()) > 0


def test_permuting_tasks_with_their_rows_changes_nothing(x: jax.Array) -> None:
  run, state = routed(2, T)
  valid, task = jnp.ones(N, bool), jnp.arange(N) % T - (jnp.arange(N) % 7 == 0)  # some without a task
  state["task_kernel"].set_value(jax.random.normal(jax.random.key(5), (T, E)))
  order = jnp.array([2, 0, 1])
  permuted = jax.tree.map(lambda leaf: leaf, state)
  permuted["task_kernel"].set_value(state["task_kernel"].get_value()[order])
  renamed = jnp.where(task < 0, -1, jnp.argsort(order)[task])
  one, other = run(state, x, valid, task), run(permuted, x, valid, renamed)
  np.testing.assert_allclose(one.weight, other.weight, atol=1e-6)
  np.testing.assert_array_equal(one.expert, other.expert)
  np.testing.assert_allclose(one.aux.mutual_information, other.aux.mutual_information, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=E, max_size=E))
def test_the_bias_changes_who_is_chosen_never_the_weights(bias: list[float]) -> None:
  x = jax.random.normal(jax.random.key(0), (N, D))
  run, state = routed(2, 0, True)
  state["balance_bias"].set_value(jnp.asarray(bias, jnp.float32))
  routing = run(state, x, jnp.ones(N, bool))
  probability = jax.nn.softmax(x @ state["kernel"].get_value(), axis=-1)
  chosen = jnp.take_along_axis(probability, routing.expert, axis=-1)
  np.testing.assert_allclose(routing.weight, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)
  score = np.asarray(probability) + np.asarray(bias, np.float32)
  lowest_chosen = np.take_along_axis(score, np.asarray(routing.expert), axis=-1).min(-1)
  rest = score.copy()
  np.put_along_axis(rest, np.asarray(routing.expert), -np.inf, axis=-1)
  assert (rest.max(-1) <= lowest_chosen + 1e-6).all()


def test_a_bias_that_chooses_the_hopeless_leaves_the_weights_finite() -> None:
  router = Router(D, E, 2, balance_bias=True, rngs=nnx.Rngs(0))
  router.kernel[...] = jnp.eye(D, E)
  router.balance_bias[...] = jnp.array([-2.0, -2.0, 0.0, 0.0])
  x = jnp.zeros((1, D)).at[0, :E].set(jnp.array([200.0, 0.0, 0.0, 1.0]))  # the chosen ones' probabilities are 0
  routing = router(x, jnp.ones(1, bool))
  assert sorted(routing.expert[0].tolist()) == [2, 3]
  np.testing.assert_allclose(sorted(routing.weight[0]), [1 / (1 + np.e), np.e / (1 + np.e)], rtol=1e-5)


def test_the_routers_products_are_of_full_precision_on_every_backend() -> None:
  run, state = routed(2, T)
  text = run.lower(state, jnp.ones((N, D), jnp.bfloat16), jnp.ones(N, bool), jnp.zeros(N, jnp.int32)).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  assert products
  assert all("precision = [HIGHEST, HIGHEST]" in line and "bf16" not in line for line in products)


def test_the_bias_is_no_parameter_and_has_no_gradient(x: jax.Array) -> None:
  run, state = routed(2, 0, True)
  assert [type(v) for _, v in nnx.to_flat_state(nnx.filter_state(state, BalanceBias))] == [BalanceBias]
  assert "balance_bias" not in nnx.filter_state(state, nnx.Param)
  gradient = jax.grad(lambda s: jnp.sum(run(s, x, jnp.ones(N, bool)).weight[:, 0]))(state)
  assert not np.asarray(gradient["balance_bias"].get_value()).any()


def test_rebalancing_evens_out_a_lopsided_router(x: jax.Array) -> None:
  run, state = routed(2, 0, True)
  state["kernel"].set_value(jnp.eye(D, E))
  x = x.at[:, 0].add(3.0)  # the first expert is everyone's favourite
  state["balance_bias"].set_value(jnp.zeros(E))
  loads = []
  for _ in range(200):
    load = run(state, x, jnp.ones(N, bool)).load
    loads.append(float(load.max()))
    state["balance_bias"].set_value(rebalanced(state["balance_bias"].get_value(), load, 0.005))
  assert loads[0] > 0.45
  assert np.mean(loads[-20:]) < 1.25 / E


def test_jitter_is_on_with_rngs_only_and_the_same_for_the_same_seed(x: jax.Array) -> None:
  router = Router(D, E, 2, jitter=0.3, rngs=nnx.Rngs(0))
  valid = jnp.ones(N, bool)
  plain, one, same, other = (
    router(x, valid, rngs=rngs).weight for rngs in (None, nnx.Rngs(1), nnx.Rngs(1), nnx.Rngs(2))
  )
  np.testing.assert_array_equal(plain, router(x, valid).weight)
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)
  assert not np.array_equal(one, plain)


def test_jit_equals_eager(x: jax.Array) -> None:
  run, state = routed(2)
  eager = Router(D, E, 2, rngs=nnx.Rngs(0))(x, jnp.ones(N, bool))
  for mine, wanted in zip(jax.tree.leaves(run(state, x, jnp.ones(N, bool))), jax.tree.leaves(eager)):
    np.testing.assert_allclose(mine, wanted, atol=1e-6)
