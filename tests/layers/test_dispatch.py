"""Every way of carrying tokens to experts agrees with the dense one, on every mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from supermoe_jax import config, sharding
from supermoe_jax.layers import dispatch
from supermoe_jax.layers.moe import MoE
from tests.fixtures import dispatch_oracle as oracle
from tests.fixtures import two_processes

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("sizes", MESHES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", ["dense", "sorted", "all_to_all", "gather"])
def test_a_strategy_equals_dense_in_outputs_gradients_and_losses_on_every_mesh(
  name: str, sizes: tuple[int, int, int], axis_type: AxisType
) -> None:
  answer = oracle.on_mesh(sharding.make_mesh(config.Mesh(*sizes), axis_type=axis_type), name)
  for case in oracle.CASES:
    oracle.assert_equal(answer(case), oracle.on_one_device()(case))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["sorted", "all_to_all", "gather"])
@pytest.mark.parametrize("settings", [oracle.RICH, oracle.SINGLE], ids=["rich", "k=1"])
def test_every_setting_of_the_layer_gives_the_same_numbers_on_a_mesh(
  settings: dict, name: str, axis_type: AxisType
) -> None:
  answer = oracle.on_mesh(sharding.make_mesh(config.Mesh(2, 2, 2), axis_type=axis_type), name, settings)
  for case in oracle.CASES:
    oracle.assert_equal(answer(case), oracle.on_one_device(settings)(case))


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_dropless_equals_dense_on_a_mesh(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
  """In blocks, and by the grouped product that TPUs take."""
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  answer = oracle.on_mesh(sharding.make_mesh(config.Mesh(2, 2, 2)), "auto", oracle.RICH, dropless=True)
  for case in oracle.CASES:
    oracle.assert_equal(answer(case), oracle.on_one_device(oracle.RICH)(case))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (2, 1, 4)], ids=lambda s: "x".join(map(str, s)))
def test_the_local_part_of_ragged_equals_dense(sizes: tuple[int, int, int]) -> None:
  answer = oracle.on_mesh(sharding.make_mesh(config.Mesh(*sizes)), "ragged")
  for case in oracle.CASES:
    oracle.assert_equal(answer(case), oracle.on_one_device()(case))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=lambda s: "x".join(map(str, s)))
def test_the_exchange_of_ragged_equals_dense(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
  """XLA:CPU has no ragged all-to-all, so here an equal one stands in, made of gathers and a scatter."""
  monkeypatch.setattr(dispatch, "_ragged_all_to_all", gathered_ragged_all_to_all)
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  answer = oracle.on_mesh(sharding.make_mesh(config.Mesh(*sizes)), "ragged")
  for case in oracle.CASES:
    oracle.assert_equal(answer(case), oracle.on_one_device()(case))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_ragged_drops_what_finds_no_room_and_tells(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
  """What it says was kept is what dense gives when the other choices weigh nothing."""
  monkeypatch.setattr(dispatch, "_ragged_all_to_all", gathered_ragged_all_to_all)
  moe = oracle.make("dense")
  weights = {n: getattr(moe, n).get_value() for n in moe.names}

  def run(x, expert, weight, valid, weights):
    out = dispatch.ragged(dispatch.Tokens(x, expert, weight, valid), dispatch.Experts(weights, oracle.E), factor)
    return jax.lax.psum(out.y, sharding.axes("mlp")), out.kept

  x, weight, expert, valid = example(11, "all to two", 80)
  names = ("batch", None)
  with jax.set_mesh(sharding.make_mesh(config.Mesh(expert=4))):
    y, kept = jax.jit(lambda *a: sharding.on_shards(run, (*(names,) * 3, ("batch",), moe.names), (names, names), *a))(
      x, expert, weight, valid, weights
    )
  assert 0 < int(kept.sum()) < oracle.K * 80
  wanted = strategy("dense", None)(x, weight * np.asarray(kept), expert, valid)
  np.testing.assert_allclose(y, wanted.y, atol=1e-5)


def test_what_a_grouped_product_leaves_undefined_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
  """On some backends the rows beyond the groups hold anything, in the product and in its gradient."""
  plain = jax.lax.ragged_dot

  @jax.custom_vjp
  def poisoned(x, w, sizes):
    beyond = jnp.arange(len(x))[:, None] >= jnp.sum(sizes)
    return jnp.where(beyond, jnp.nan, plain(x, w, sizes))

  def backward(saved, g):
    x, w, sizes = saved
    beyond = jnp.arange(len(x))[:, None] >= jnp.sum(sizes)
    dx, dw = jax.vjp(lambda x, w: plain(x, w, sizes), x, w)[1](g)
    return jnp.where(beyond, jnp.nan, dx), dw, None

  poisoned.defvjp(lambda x, w, sizes: (poisoned(x, w, sizes), (x, w, sizes)), backward)
  monkeypatch.setattr(jax.lax, "ragged_dot", lambda x, w, sizes, **_: poisoned(x, w, sizes))
  answer = oracle.on_mesh(sharding.make_mesh(config.Mesh()), "ragged")
  oracle.assert_equal(answer("random"), oracle.on_one_device()("random"))


def gathered_ragged_all_to_all(rows, into, start, sent, arrive_start, received, axis):
  """Every device looks at what every other sends, and takes what is for it."""
  me = jax.lax.axis_index(axis)
  everyone = jax.lax.all_gather(rows, axis)
  begins, count, lands = (jax.lax.all_gather(a, axis)[:, me] for a in (start, sent, arrive_start))
  row = jnp.arange(len(rows))
  for sender in range(len(received)):
    for_me = (row >= begins[sender]) & (row < begins[sender] + count[sender])
    place = jnp.where(for_me, lands[sender] + row - begins[sender], len(into))
    into = into.at[place].set(everyone[sender], mode="drop")
  return into


@pytest.mark.slow
def test_a_mesh_of_two_processes_gives_the_same_numbers() -> None:
  outputs = two_processes.run("dispatch_of_two_processes")
  assert all("16 comparisons equal" in out for out in outputs), "\n".join(outputs)


N = 96


@functools.cache
def strategy(name: str, capacity_factor: float | None):
  """The jitted strategy on one device."""
  moe = oracle.make("dense")

  def run(x, weight, expert, valid):
    held = dispatch.Experts({n: getattr(moe, n).get_value() for n in moe.names}, oracle.E)
    return dispatch.STRATEGIES[name](dispatch.Tokens(x, expert, weight, valid), held, capacity_factor)

  return jax.jit(run)


def example(seed: int, skew: str = "random", n_valid: int = N) -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(N, oracle.D)).astype(np.float32)
  expert = np.stack([rng.permutation(oracle.E)[: oracle.K] for _ in range(N)])
  if skew == "all to two":
    expert[:] = [1, 3]
  weight = rng.dirichlet(np.ones(oracle.K), N).astype(np.float32)
  valid = rng.permutation(np.arange(N) < n_valid)
  return jnp.asarray(x), jnp.asarray(weight), jnp.asarray(expert, jnp.int32), jnp.asarray(valid)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["random", "all to two"]), st.integers(0, N))
def test_what_exceeds_the_capacity_is_dropped_and_told(seed: int, skew: str, n_valid: int) -> None:
  factor = 0.5
  x, weight, expert, valid = example(seed, skew, n_valid)
  out = strategy("sorted", factor)(x, weight, expert, valid)
  capacity = math.ceil(factor * oracle.K * N / oracle.E)
  taken = np.zeros(oracle.E, int)
  kept = np.zeros((N, oracle.K), bool)
  for n in range(N):
    for k in range(oracle.K):
      if valid[n]:
        kept[n, k] = taken[expert[n, k]] < capacity
        taken[expert[n, k]] += 1
  np.testing.assert_array_equal(out.kept, kept)
  wanted = strategy("dense", None)(x, weight * kept, expert, valid)
  np.testing.assert_allclose(out.y, wanted.y, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["random", "all to two"]), st.integers(0, N))
def test_without_a_capacity_nothing_drops_and_the_result_is_dense(seed: int, skew: str, n_valid: int) -> None:
  arguments = example(seed, skew, n_valid)
  for name in ("sorted", "ragged"):
    out = strategy(name, None)(*arguments)
    np.testing.assert_allclose(out.y, strategy("dense", None)(*arguments).y, atol=1e-5)
    assert int(out.kept.sum()) == oracle.K * n_valid


def test_dropless_gives_a_token_the_same_result_whoever_shares_the_batch() -> None:
  x, weight, expert, valid = example(7)
  run = strategy("sorted", None)
  alone = run(x, weight, expert, jnp.arange(N) < 8)
  together = run(x, weight, expert, valid)
  other_experts = run(x, weight, jnp.where((jnp.arange(N) < 8)[:, None], expert, 0), valid)
  np.testing.assert_array_equal(alone.y[:8], together.y[:8])
  np.testing.assert_array_equal(alone.y[:8], other_experts.y[:8])


@pytest.mark.parametrize("name", ["all_to_all", "gather"])
def test_drops_are_counted_on_a_mesh_too(name: str) -> None:
  mesh = sharding.make_mesh(config.Mesh(data=2, expert=4))
  moe = sharding.create(lambda: oracle.make(name, {"capacity_factor": 0.3}), mesh)
  graph, state = nnx.split(moe)
  x, valid, kernel = oracle.inputs("an expert gets everything")
  with jax.set_mesh(mesh):
    run = jax.jit(lambda s, x, v: nnx.merge(graph, s)(x, v))
    stats = run(oracle.with_kernel(state, jnp.asarray(kernel)), x, valid).stats
  assert int(stats.dropped) > 0
  assert int(stats.routed + stats.dropped) == oracle.K * valid.sum()


@pytest.mark.parametrize(
  ("sizes", "name", "factor", "dtype", "wanted"),
  [
    ((8, 1, 1), "auto", 1.25, "float32", "sorted"),
    ((2, 2, 2), "auto", 1.25, "float32", "gather"),
    ((2, 2, 2), "auto", 1.25, "bfloat16", "all_to_all"),  # gather sums float32, all_to_all sends bfloat16 back
    ((2, 4, 1), "auto", 1.25, "float32", "all_to_all"),
    ((2, 4, 1), "auto", None, "float32", "sorted"),
    ((2, 4, 1), "gather", 1.25, "float32", "gather"),
  ],
)
def test_auto_takes_the_least_traffic(
  sizes: tuple[int, int, int], name: str, factor: float | None, dtype: str, wanted: str
) -> None:
  with jax.set_mesh(sharding.make_mesh(config.Mesh(*sizes))):
    assert dispatch.choose(name, 2, factor, jnp.dtype(dtype)) == wanted


def test_without_a_mesh_auto_sorts() -> None:
  assert dispatch.choose("auto", 2, 1.25, jnp.dtype("float32")) == "sorted"


def test_ragged_over_several_cpu_devices_is_an_error_that_says_why() -> None:
  with (
    jax.set_mesh(sharding.make_mesh(config.Mesh(expert=8))),
    pytest.raises(ValueError, match="XLA:CPU has no ragged all-to-all"),
  ):
    dispatch.choose("ragged", 2, 1.25, jnp.dtype("float32"))


def test_an_unknown_strategy_is_an_error_that_names_them() -> None:
  with pytest.raises(ValueError, match=r"dispatch='sort' must be 'auto' or one of 'dense', 'sorted', 'all_to_all'"):
    MoE(oracle.D, oracle.H, oracle.E, oracle.K, dispatch="sort", rngs=nnx.Rngs(0))


def test_tokens_that_do_not_divide_over_the_devices_are_an_error() -> None:
  moe = oracle.make("sorted")
  with (
    jax.set_mesh(sharding.make_mesh(config.Mesh(data=8))),
    pytest.raises(ValueError, match=r"spread over 8 devices .* and must be a multiple of that"),
  ):
    moe(jnp.ones((3, 4, oracle.D)), jnp.ones((3, 4), bool))


def test_tokens_stay_where_they_are_on_a_data_mesh() -> None:
  """No collective but the sums of gradients and statistics: nothing of the size of the tokens travels."""
  mesh = sharding.make_mesh(config.Mesh(data=8))
  graph, state = nnx.split(sharding.create(lambda: oracle.make("auto"), mesh))
  x, valid, _ = oracle.inputs("random")
  where = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
  with jax.set_mesh(mesh):
    run = jax.jit(jax.grad(lambda s, x, v: jnp.sum(nnx.merge(graph, s)(x, v).y ** 2)))
    compiled = run.lower(state, jax.device_put(x, where), jax.device_put(valid, where)).compile().as_text()
  assert "all-reduce" in compiled
  assert not any(word in compiled for word in ("all-gather", "all-to-all", "collective-permute"))
