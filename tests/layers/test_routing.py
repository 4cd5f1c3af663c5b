"""What a router may and may not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax.layers.routing import BalanceBias, Router, auxiliary, count_tokens, rebalanced
from tests.fixtures.small_model import noise

N, D, E, T = 32, 8, 4, 3


ALL = np.ones(N, bool)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


@functools.cache
def routed(k: int, tasks: int = 0, balance_bias: bool = False):
  """A jitted router as a function of its state, and the state: of noise, but task kernel and bias are still 0."""
  graph, state = nnx.split(noise(lambda: Router(D, E, k, tasks=tasks, balance_bias=balance_bias, rngs=nnx.Rngs(0))))
  for name in {"task_kernel", "balance_bias"} & set(state):
    state[name].set_value(np.zeros(state[name].shape, np.float32))
  return jax.jit(lambda s, *inputs: nnx.merge(graph, s)(*inputs)), state


def with_value(state: nnx.State, name: str, value: np.ndarray) -> nnx.State:
  """The state with another value of a variable."""
  copied = jax.tree.map(lambda leaf: leaf, state)
  copied[name].set_value(value)
  return copied


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
    Router(D, E, 2, rngs=nnx.Rngs(0))(x, ALL, np.zeros(N, int))


def test_with_one_choice_the_probability_is_the_weight_and_the_router_learns(x: jax.Array) -> None:
  run, state = routed(1)
  routing = run(state, x, ALL)
  probability = jax.nn.softmax(x @ np.asarray(state["kernel"].get_value()), axis=-1)
  np.testing.assert_allclose(routing.weight[:, 0], np.max(probability, axis=-1), rtol=1e-5)
  np.testing.assert_array_equal(routing.expert[:, 0], np.argmax(probability, axis=-1))
  gradient = jax.jit(jax.grad(lambda s: jnp.sum(run(s, x, ALL).weight)))(state)
  assert float(np.abs(gradient["kernel"].get_value()).max()) > 0


def test_with_several_choices_the_weights_sum_to_one(x: jax.Array) -> None:
  run, state = routed(2)
  routing = run(state, x, ALL)
  np.testing.assert_allclose(routing.weight.sum(-1), 1, rtol=1e-6)
  assert routing.weight.dtype == jnp.float32


def test_the_router_stays_float32_under_bfloat16(x: jax.Array) -> None:
  run, state = routed(2)
  half = x.astype(jnp.bfloat16)
  low, exact = run(state, half, ALL), run(state, half.astype(np.float32), ALL)
  for mine, wanted in zip(jax.tree.leaves(low), jax.tree.leaves(exact)):
    np.testing.assert_array_equal(mine, wanted)


@functools.cache
def gradient_of_everything():
  """The compiled gradient of all that a router gives for the tokens that are valid, by state and tokens, and that."""
  run, _ = routed(2)

  def loss(state: nnx.State, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, tuple]:
    out = run(state, x, mask)
    kept = jnp.sum(jnp.where(mask[:, None], out.weight, 0) ** 2)
    return out.aux.balance_loss + out.aux.z_loss + kept, (out.aux, out.sums.load, out.sums.mean_entropy)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=N, max_size=N), st.sampled_from([7.0, np.nan, np.inf]))
def test_what_padding_holds_changes_nothing_nor_any_gradient(valid: list[bool], held: float) -> None:
  x = np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)
  mask, state, gradient = np.array(valid), routed(2)[1], gradient_of_everything()
  one, other = gradient(state, x, mask), gradient(state, np.where(mask[:, None], x, np.float32(held)), mask)
  for mine, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    np.testing.assert_array_equal(mine, wanted)


def test_balance_is_one_at_uniform_routing_and_e_at_collapse() -> None:
  one_hot = np.eye(E, dtype=np.float32)
  balance = jax.jit(lambda logits, chosen: auxiliary(count_tokens(logits, chosen, ALL)).balance_loss)
  assert float(balance(np.zeros((N, E), np.float32), one_hot[np.arange(N) % E])) == pytest.approx(1)
  one = np.broadcast_to(one_hot[0], (N, E))
  assert float(balance(100 * one, one)) == pytest.approx(E)


def test_the_sums_of_parts_of_a_batch_give_the_terms_of_the_batch() -> None:
  rng = np.random.default_rng(0)
  logits, valid = rng.normal(size=(N, E)).astype(np.float32), rng.random(N) < 0.7
  chosen, task = np.eye(E, dtype=np.float32)[rng.integers(0, E, N)], np.eye(T + 1, T)[rng.integers(0, T + 1, N)]
  first = np.arange(N) < 5
  whole, *parts = (count_tokens(logits, chosen, valid & some, task) for some in (ALL, first, ~first))
  for mine, wanted in zip(auxiliary(jax.tree.map(np.add, *parts)), auxiliary(whole), strict=True):
    np.testing.assert_allclose(mine, wanted, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=N, max_size=N), st.integers(0, 99))
def test_the_load_counts_valid_tokens_only_and_sums_to_one(valid: list[bool], seed: int) -> None:
  x = np.random.default_rng(seed).normal(size=(N, D)).astype(np.float32)
  run, state = routed(2)
  routing = run(state, x, np.array(valid))
  chosen = np.asarray(routing.expert)[np.array(valid)]
  np.testing.assert_allclose(
    routing.sums.load, np.bincount(chosen.reshape(-1), minlength=E) / max(chosen.size, 1), atol=1e-6
  )
  assert 0 <= float(routing.sums.mean_entropy) <= np.log(E) + 1e-5


@jax.jit
def informed(probability: jax.Array, task: jax.Array, valid: jax.Array) -> jax.Array:
  sums = count_tokens(jnp.log(probability), jnp.zeros_like(probability), valid, task)
  return auxiliary(sums).mutual_information


softmax = jax.jit(functools.partial(jax.nn.softmax, axis=-1))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(0.01, 20))
def test_mutual_information_lies_between_zero_and_the_log_of_the_fewer(seed: int, sharpness: float) -> None:
  rng = np.random.default_rng(seed)
  probability = softmax((rng.normal(size=(N, E)) * sharpness).astype(np.float32))
  task = np.eye(T + 1, T, dtype=np.float32)[rng.integers(0, T + 1, N)]  # some have none
  information = float(informed(probability, task, rng.random(N) < 0.8))
  assert -1e-6 <= information <= np.log(min(T, E)) + 1e-5


def test_mutual_information_is_zero_when_tasks_route_alike_and_largest_when_each_has_its_expert() -> None:
  n, task = N // T * T, np.arange(N) % T
  of_task, of_expert = np.eye(T, dtype=np.float32)[task], np.eye(E, dtype=np.float32)[task]
  alike = informed(np.full((N, E), 1 / E, np.float32), of_task, np.arange(N) < n)
  apart = informed(of_expert, of_task, np.arange(N) < n)
  assert float(alike) == pytest.approx(0, abs=1e-6)
  assert float(apart) == pytest.approx(np.log(T), rel=1e-5)


def test_a_new_router_does_not_tell_tasks_apart_but_learns_to(x: jax.Array) -> None:
  run, state = routed(2, T)
  made = jax.jit(lambda: Router(D, E, 2, tasks=T, rngs=nnx.Rngs(0)).task_kernel.get_value())()
  np.testing.assert_array_equal(made, np.zeros((T, E)))
  task = np.arange(N) % T
  with_task, without = run(state, x, ALL, task), run(state, x, ALL)
  np.testing.assert_array_equal(with_task.weight, without.weight)
  assert float(without.aux.mutual_information) == 0.0
  coefficient = np.random.default_rng(3).normal(size=(N, 2)).astype(np.float32)
  gradient = jax.jit(jax.grad(lambda s: jnp.sum(run(s, x, ALL, task).weight * coefficient)))(state)
  assert float(np.abs(gradient["task_kernel"].get_value()).max()) > 0


def test_permuting_tasks_with_their_rows_changes_nothing(x: jax.Array) -> None:
  run, state = routed(2, T)
  task = np.arange(N) % T - (np.arange(N) % 7 == 0)  # some without a task
  kernel = np.random.default_rng(5).normal(size=(T, E)).astype(np.float32)
  order = np.array([2, 0, 1])
  renamed = np.where(task < 0, -1, np.argsort(order)[task])
  one = run(with_value(state, "task_kernel", kernel), x, ALL, task)
  other = run(with_value(state, "task_kernel", kernel[order]), x, ALL, renamed)
  assert not np.array_equal(one.weight, run(state, x, ALL, task).weight)
  np.testing.assert_allclose(one.weight, other.weight, atol=1e-6)
  np.testing.assert_array_equal(one.expert, other.expert)
  np.testing.assert_allclose(one.aux.mutual_information, other.aux.mutual_information, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=E, max_size=E))
def test_the_bias_changes_who_is_chosen_never_the_weights(bias: list[float]) -> None:
  x = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
  run, state = routed(2, 0, True)
  routing = run(with_value(state, "balance_bias", np.array(bias, np.float32)), x, ALL)
  probability = np.asarray(softmax(x @ np.asarray(state["kernel"].get_value())))
  chosen = np.take_along_axis(probability, np.asarray(routing.expert), axis=-1)
  np.testing.assert_allclose(routing.weight, chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)
  score = probability + np.array(bias, np.float32)
  lowest_chosen = np.take_along_axis(score, np.asarray(routing.expert), axis=-1).min(-1)
  rest = score.copy()
  np.put_along_axis(rest, np.asarray(routing.expert), -np.inf, axis=-1)
  assert (rest.max(-1) <= lowest_chosen + 1e-6).all()


def test_a_bias_that_chooses_the_hopeless_leaves_the_weights_finite() -> None:
  run, state = routed(2, 0, True)
  state = with_value(state, "kernel", np.eye(D, E, dtype=np.float32))
  x = np.zeros((N, D), np.float32)
  x[0, :E] = [200.0, 0.0, 0.0, 1.0]  # the chosen ones' probabilities are 0
  routing = run(with_value(state, "balance_bias", np.array([-2, -2, 0, 0], np.float32)), x, ALL)
  assert sorted(routing.expert[0].tolist()) == [2, 3]
  np.testing.assert_allclose(sorted(routing.weight[0]), [1 / (1 + np.e), np.e / (1 + np.e)], rtol=1e-5)


def test_the_routers_products_are_of_full_precision_on_every_backend() -> None:
  run, state = routed(2, T)
  text = run.lower(state, np.ones((N, D), jnp.bfloat16), ALL, np.zeros(N, np.int32)).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  assert products
  assert all("precision = [HIGHEST, HIGHEST]" in line and "bf16" not in line for line in products)


def test_the_bias_is_no_parameter_and_has_no_gradient(x: jax.Array) -> None:
  run, state = routed(2, 0, True)
  assert [type(v) for _, v in nnx.to_flat_state(nnx.filter_state(state, BalanceBias))] == [BalanceBias]
  assert "balance_bias" not in nnx.filter_state(state, nnx.Param)
  gradient = jax.jit(jax.grad(lambda s: jnp.sum(run(s, x, ALL).weight[:, 0])))(state)
  assert not np.asarray(gradient["balance_bias"].get_value()).any()


def test_rebalancing_evens_out_a_lopsided_router(x: jax.Array) -> None:
  run, state = routed(2, 0, True)
  state = with_value(state, "kernel", np.eye(D, E, dtype=np.float32))
  x = x.copy()
  x[:, 0] += 3.0  # the first expert is everyone's favourite
  loads, move = [], jax.jit(functools.partial(rebalanced, rate=0.005))
  for _ in range(200):
    load = run(state, x, ALL).sums.load
    loads.append(float(load.max()))
    state = with_value(state, "balance_bias", move(state["balance_bias"].get_value(), load))
  assert loads[0] > 0.45
  assert np.mean(loads[-20:]) < 1.25 / E


def test_jitter_is_on_with_rngs_only_and_the_same_for_the_same_seed(x: jax.Array) -> None:
  graph, state = nnx.split(noise(lambda: Router(D, E, 2, jitter=0.3, rngs=nnx.Rngs(0))))
  jittered = jax.jit(lambda s, x, key: nnx.merge(graph, s)(x, ALL, rngs=nnx.Rngs(key)).weight)
  one, same, other = (jittered(state, x, jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)
  run, steady = routed(2)  # of the same numbers
  plain = run(steady, x, ALL).weight
  np.testing.assert_allclose(jax.jit(lambda s, x: nnx.merge(graph, s)(x, ALL).weight)(state, x), plain, atol=1e-6)
  assert np.abs(np.asarray(one) - plain).max() > 1e-3


def test_jit_equals_eager(x: jax.Array) -> None:
  run, state = routed(2)
  eager = noise(lambda: Router(D, E, 2, rngs=nnx.Rngs(0)))(x, ALL)
  for mine, wanted in zip(jax.tree.leaves(run(state, x, ALL)), jax.tree.leaves(eager)):
    np.testing.assert_allclose(mine, wanted, atol=1e-6)


def test_jitter_makes_tokens_smaller_and_larger_alike() -> None:
  router = Router(1, 2, 1, jitter=0.3, rngs=nnx.Rngs(0))
  router.kernel[...] = jnp.array([[1.0, 0.0]])
  weight = np.asarray(router(jnp.ones((2000, 1)), jnp.ones(2000, bool), rngs=nnx.Rngs(1)).weight, np.float64)
  factor = np.log(weight / (1 - weight))  # the logit of a token of 1
  assert 0.7 <= factor.min() + 1e-5 < 0.71 and 1.29 < factor.max() <= 1.3 + 1e-5
  assert factor.mean() == pytest.approx(1, abs=0.02)
