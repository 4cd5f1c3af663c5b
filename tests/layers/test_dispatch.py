"""Every way of carrying tokens to experts agrees with the dense one, on every mesh."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.layers import dispatch, experts
from supermoe_jax.layers.experts import Experts
from tests.fixtures import dispatch_oracle as oracle
from tests.fixtures import grids, two_processes

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
ON_ONE, OVER_ROWS = (1, 1, 1), (8, 1, 1)  # meshes without an axis of experts: all_to_all and gather are sorted there
OVER_EXPERTS, OVER_BOTH, OVER_ALL = (1, 8, 1), (2, 4, 1), (2, 2, 2)

QUICK = [
  ("dense", OVER_ALL, AUTO, "swiglu"),
  ("sorted", OVER_ROWS, AUTO, "gelu"),
  ("sorted", OVER_ALL, EXPLICIT, "swiglu"),
  ("all_to_all", OVER_ROWS, AUTO, "gelu"),
  ("all_to_all", OVER_BOTH, AUTO, "gelu"),
  ("all_to_all", OVER_ALL, EXPLICIT, "swiglu"),
  ("gather", OVER_ROWS, AUTO, "gelu"),
  ("gather", OVER_ALL, AUTO, "gelu"),
  ("gather", OVER_BOTH, EXPLICIT, "swiglu"),
]
EVERY = [
  *itertools.product(["dense", "sorted"], [ON_ONE, OVER_ROWS], [AUTO, EXPLICIT], ["gelu"]),
  *itertools.product(
    ["dense", "sorted", "all_to_all", "gather"], [OVER_EXPERTS, OVER_BOTH, OVER_ALL], [AUTO, EXPLICIT], ["gelu"]
  ),
  *itertools.product(["sorted", "all_to_all", "gather"], [OVER_ALL], [AUTO, EXPLICIT], ["swiglu", "k=1"]),
]
SETTINGS = {"gelu": oracle.GELU, "swiglu": oracle.SWIGLU, "k=1": oracle.SINGLE}


def named(value: object) -> str:
  if isinstance(value, tuple):
    return "x".join(map(str, value))
  return value.name.lower() if isinstance(value, AxisType) else str(value)


def assert_dense(
  name: str,
  sizes: tuple[int, int, int],
  settings: dict = oracle.PLAIN,
  axis_type: AxisType = AUTO,
  *,
  dropless: bool = False,
) -> None:
  """Compares a strategy on a mesh with `dense` on one device, in outputs, gradients, losses and statistics."""
  mesh = device_mesh.make_mesh(config.Mesh(*sizes), axis_type=axis_type)
  answer = oracle.on_mesh(mesh, name, settings, dropless=dropless)
  for case in oracle.CASES:
    oracle.assert_equal(answer(case), oracle.on_one_device(settings)(case))


@pytest.mark.parametrize(
  ("name", "sizes", "axis_type", "setting"),
  grids.quick_few(QUICK, [*QUICK, *(case for case in EVERY if case not in QUICK)]),
  ids=named,
)
def test_a_strategy_equals_dense_in_outputs_gradients_and_losses_on_every_mesh(
  name: str, sizes: tuple[int, int, int], axis_type: AxisType, setting: str
) -> None:
  assert_dense(name, sizes, SETTINGS[setting], axis_type)


@pytest.mark.parametrize(
  ("platform", "axis_type"),
  grids.quick_few([("cpu", AUTO), ("tpu", EXPLICIT)], itertools.product(["cpu", "tpu"], [AUTO, EXPLICIT])),
  ids=named,
)
def test_dropless_equals_dense_on_a_mesh(platform: str, axis_type: AxisType, monkeypatch: pytest.MonkeyPatch) -> None:
  """In blocks, and by the grouped product that TPUs take."""
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  assert_dense("auto", OVER_ALL, oracle.SWIGLU, axis_type, dropless=True)


@pytest.mark.nightly  # in the quick tier with a grouped product whose undefined rows are poisoned
@pytest.mark.parametrize("sizes", [(2, 1, 4), ON_ONE, OVER_ROWS], ids=named)
def test_the_local_part_of_ragged_equals_dense(sizes: tuple[int, int, int]) -> None:
  assert_dense("ragged", sizes, oracle.GELU)


@pytest.mark.parametrize(
  "sizes", grids.quick_few([((1, 4, 2),)], [((1, 4, 2),), (OVER_EXPERTS,), (OVER_ALL,)]), ids=named
)
def test_the_exchange_of_ragged_equals_dense(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
  """XLA:CPU has no ragged all-to-all, so here an equal one stands in, made of gathers and a scatter."""
  monkeypatch.setattr(dispatch, "_ragged_all_to_all", gathered_ragged_all_to_all)
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  assert_dense("ragged", sizes, oracle.GELU)


@pytest.mark.parametrize("factor", grids.quick_few([0.5], [0.5, 1.0]))
def test_ragged_drops_what_finds_no_room_and_tells(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
  """Each sender keeps the same share of its choices of each expert, those that are served first.

  The rest is what dense gives when the other choices weigh nothing.
  """
  monkeypatch.setattr(dispatch, "_ragged_all_to_all", gathered_ragged_all_to_all)
  weights, names = oracle.weights(), ("batch", None)
  ways, here = 4, N // 4

  def run(x, expert, weight, valid, urgent, weights):
    out = dispatch.ragged(dispatch.Tokens(x, expert, weight, valid, urgent), Experts(weights, oracle.E), factor)
    return jax.lax.psum(out.y, sharding.axes("mlp")), out.kept

  x, weight, expert, valid, urgent = example(11, "all to two", 80)
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(expert=ways))):
    y, kept = jax.jit(
      lambda *a: sharding.on_shards(
        run, (*(names,) * 3, *(("batch",),) * 2, {n: experts.NAMES[n] for n in weights}), (names, names), *a
      )
    )(x, expert, weight, valid, urgent, weights)
  room = math.ceil(factor * oracle.K * here)  # of each device
  asked = np.array([np.bincount(expert[s][valid[s]].reshape(-1), minlength=oracle.E) for s in senders(ways, here)])
  arriving = np.repeat(asked.sum(0).reshape(ways, -1).sum(1), oracle.E // ways)
  sent = np.where(arriving <= room, asked, np.floor(asked * (room / np.maximum(arriving, 1)) * (1 - 1e-6))).astype(int)
  wanted = np.concatenate(
    [oracle.first_served(expert[s], valid[s], urgent[s], sent[i]) for i, s in enumerate(senders(ways, here))]
  )
  assert (arriving > room).any() and sent.sum(0).reshape(ways, -1).sum(1).max() <= room
  assert 0 < wanted.sum() < oracle.K * 80
  np.testing.assert_array_equal(kept, wanted)
  np.testing.assert_allclose(y, strategy("dense", None)(x, weight * wanted, expert, valid, urgent).y, atol=1e-5)


def senders(ways: int, here: int) -> list[slice]:
  """The tokens of each device."""
  return [slice(i * here, (i + 1) * here) for i in range(ways)]


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
  assert_dense("ragged", (2, 1, 4), oracle.GELU)


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


@pytest.mark.nightly
@pytest.mark.slow
def test_a_mesh_of_two_processes_gives_the_same_numbers() -> None:
  outputs = two_processes.run("dispatch_of_two_processes")
  assert all("16 comparisons equal" in out for out in outputs), "\n".join(outputs)


N = 96


@functools.cache
def strategy(name: str, capacity_factor: float | None):
  """The jitted strategy on one device."""

  def run(x, weight, expert, valid, urgent):
    held = Experts(oracle.weights(), oracle.E)
    return dispatch.STRATEGIES[name](dispatch.Tokens(x, expert, weight, valid, urgent), held, capacity_factor)

  return jax.jit(run)


def example(seed: int, skew: str = "random", n_valid: int = N) -> tuple[np.ndarray, ...]:
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(N, oracle.D)).astype(np.float32)
  expert = np.stack([rng.permutation(oracle.E)[: oracle.K] for _ in range(N)]).astype(np.int32)
  if skew == "all to two":
    expert[:] = [1, 3]
  weight = rng.dirichlet(np.ones(oracle.K), N).astype(np.float32)
  valid = rng.permutation(np.arange(N) < n_valid)
  return x, weight, expert, valid, rng.random(N) < 0.2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["random", "all to two"]), st.integers(0, N))
def test_what_exceeds_the_capacity_is_dropped_and_told(seed: int, skew: str, n_valid: int) -> None:
  factor = 0.5
  x, weight, expert, valid, urgent = example(seed, skew, n_valid)
  out = strategy("sorted", factor)(x, weight, expert, valid, urgent)
  kept = oracle.first_served(expert, valid, urgent, math.ceil(factor * oracle.K * N / oracle.E))
  np.testing.assert_array_equal(out.kept, kept)
  wanted = strategy("dense", None)(x, weight * kept, expert, valid, urgent)
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
  x, weight, expert, valid, urgent = example(7)
  run = strategy("sorted", None)
  alone = run(x, weight, expert, np.arange(N) < 8, urgent)
  together = run(x, weight, expert, valid, ~urgent)
  other_experts = run(x, weight, np.where((np.arange(N) < 8)[:, None], expert, 0), valid, urgent)
  np.testing.assert_array_equal(alone.y[:8], together.y[:8])
  np.testing.assert_array_equal(alone.y[:8], other_experts.y[:8])


@pytest.mark.parametrize("name", ["sorted", "all_to_all", "gather"])
def test_on_a_mesh_a_group_of_tokens_fills_an_experts_capacity_and_the_rest_is_dropped_and_told(name: str) -> None:
  """A group are the tokens of a device, with `gather` those of the devices that share the experts."""
  mesh = device_mesh.make_mesh(config.Mesh(*OVER_BOTH))
  group = 4 if name == "gather" else 1  # devices, of which each holds one row
  factor = 0.5
  moe = oracle.make(name, {"capacity_factor": factor, "tasks": 3})
  graph, state = nnx.split(moe)
  x, valid, kernel = oracle.inputs("random")
  task = np.broadcast_to(np.arange(oracle.L) % 4 - 1, valid.shape)
  state = oracle.with_kernel(state, kernel)
  with jax.set_mesh(mesh):
    urgent = np.random.default_rng(1).random(valid.shape) < 0.2
    out = jax.jit(lambda s, x, v, t, u: nnx.merge(graph, s)(x, v, t, urgent=u))(state, x, valid, task, urgent)

  logits = x @ kernel + (task >= 0)[..., None] * np.asarray(state["router"]["task_kernel"].get_value())[task]
  expert = np.argsort(-logits, axis=-1, kind="stable")[..., : oracle.K].reshape(-1, oracle.K)
  weight = np.array(jax.nn.softmax(-np.sort(-logits, axis=-1)[..., : oracle.K], axis=-1)).reshape(-1, oracle.K)
  groups = zip(*(np.split(part, oracle.B // group) for part in (expert, valid.reshape(-1), urgent.reshape(-1))))
  capacity = math.ceil(factor * oracle.K * group * oracle.L / oracle.E)
  kept = np.concatenate([oracle.first_served(e, v, u, capacity) for e, v, u in groups])
  dropped = valid.reshape(-1, 1) & ~kept
  np.testing.assert_array_equal(out.stats.expert.reshape(expert.shape)[valid.reshape(-1)], expert[valid.reshape(-1)])
  assert int(out.stats.dropped) == dropped.sum() > 0
  assert int(out.stats.routed) == kept.sum() > 0
  of_task = [dropped[task.reshape(-1) == t].sum() for t in range(3)]
  np.testing.assert_array_equal(out.stats.task_dropped, of_task)
  flat = x.reshape(-1, oracle.D), weight * kept, expert, valid.reshape(-1), urgent.reshape(-1)
  wanted = strategy("dense", None)(*flat).y
  np.testing.assert_allclose(out.y.reshape(-1, oracle.D), wanted, atol=1e-5)


def test_drops_are_fair_to_rows_and_spare_first_choices_and_snapshots() -> None:
  """The batch has 32 rows of 64 events and 8 snapshots, and random tokens."""
  rows, places, rng = 32, 72, np.random.default_rng(0)
  moe = oracle.make("sorted", {"capacity_factor": 0.9})
  graph, state = nnx.split(moe)
  x = rng.normal(size=(rows, places, oracle.D)).astype(np.float32)
  urgent = np.broadcast_to(np.arange(places) >= places - 8, (rows, places))

  def drops(urgent: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Returns whether each token lost a choice, by its output without a capacity, and the number of drops."""
    valid = np.ones((rows, places), bool)

    @jax.jit
    def run(state: nnx.State) -> tuple[jax.Array, jax.Array]:
      layer = nnx.merge(graph, state)
      out = layer(x, valid, urgent=urgent)
      return jnp.linalg.norm(layer(x, valid, dropless=True).y - out.y, axis=-1) > 1e-4, out.stats.dropped

    lost, dropped = run(state)
    return np.asarray(lost), int(dropped)

  for first in (None, urgent):
    lost, dropped = drops(first)
    assert dropped > 0.09 * oracle.K * rows * places
    quarters = lost.reshape(4, -1).mean(axis=1)
    assert quarters.max() < 1.25 * quarters.min()  # in the order of the tokens they are 0, 0, 0 and .7
    of_rows = lost[:, : places - 8].reshape(rows, 4, -1).mean(axis=(0, 2))  # the quarters of all rows' events
    assert of_rows.max() < 1.3 * of_rows.min()
  assert not lost[urgent].any()


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
  with jax.set_mesh(device_mesh.make_mesh(config.Mesh(*sizes))):
    assert dispatch.choose_strategy(name, 2, factor, jnp.dtype(dtype)) == wanted


def test_without_a_mesh_auto_sorts() -> None:
  assert dispatch.choose_strategy("auto", 2, 1.25, jnp.dtype("float32")) == "sorted"


def test_ragged_over_several_cpu_devices_is_an_error_that_says_why() -> None:
  with (
    jax.set_mesh(device_mesh.make_mesh(config.Mesh(expert=8))),
    pytest.raises(ValueError, match="XLA:CPU has no ragged all-to-all"),
  ):
    dispatch.choose_strategy("ragged", 2, 1.25, jnp.dtype("float32"))


def test_tokens_that_do_not_divide_over_the_devices_are_an_error() -> None:
  moe = oracle.make("sorted")
  with (
    jax.set_mesh(device_mesh.make_mesh(config.Mesh(data=8))),
    pytest.raises(ValueError, match=r"spread over 8 devices .* and must be a multiple of that"),
  ):
    moe(jnp.ones((3, 4, oracle.D)), jnp.ones((3, 4), bool))


def test_tokens_stay_where_they_are_on_a_data_mesh() -> None:
  """No collective but the sums of gradients and statistics: nothing of the size of the tokens travels."""
  mesh = device_mesh.make_mesh(config.Mesh(data=8))
  graph, state = nnx.split(oracle.make("auto"))
  state = jax.device_put(state, sharding.shardings(mesh, state))
  x, valid, _ = oracle.inputs("random")
  where = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
  with jax.set_mesh(mesh):
    run = jax.jit(jax.grad(lambda s, x, v: jnp.sum(nnx.merge(graph, s)(x, v).y ** 2)))
    compiled = run.lower(state, jax.device_put(x, where), jax.device_put(valid, where)).compile().as_text()
  assert "all-reduce" in compiled
  assert not any(word in compiled for word in ("all-gather", "all-to-all", "collective-permute"))
