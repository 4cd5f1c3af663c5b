"""A stack of blocks: one compiled body however deep it is, and the numbers of the blocks one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.layers.attention import visibility
from supermoe_jax.layers.moe import Mlp, MoE
from supermoe_jax.layers.transformer import Block, Context, Stack
from tests.fixtures import grids
from tests.fixtures.small_model import noise

B, T, D, HEADS, H = 2, 20, 16, 2, 24


def make_block(moe_every: int, dropout: float, place: int, rngs: nnx.Rngs) -> Block:
  sparse = place + 1 == moe_every
  feed_forward = MoE(D, H, 4, 2, balance_bias=True, rngs=rngs) if sparse else Mlp(D, H, rngs=rngs)
  return Block(D, HEADS, feed_forward, dropout=dropout, rngs=rngs)


def make_stack(layers: int, moe_every: int, *, remat: str = "none", dropout: float = 0.0) -> Stack:
  """A stack of noise."""
  make = functools.partial(make_block, moe_every, dropout)
  return noise(lambda: Stack(make, layers, moe_every, remat=remat, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def context() -> Context:
  event = np.arange(T - 2) < np.array([[18], [11]])
  snapshot = np.ones((B, 2), np.int32)
  visible, position = jax.jit(visibility)(event.astype(np.int32), snapshot, np.array([[18, 5], [11, 3]]))
  time = np.sort(np.random.default_rng(1).uniform(0, 500, (B, T)), axis=1).astype(np.float32)
  return Context(position, time, visible, np.concatenate([event, snapshot > 0], axis=1))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(graph: nnx.GraphDef, state: nnx.State, x: jax.Array, context: Context, key: jax.Array | None = None):
  return nnx.merge(graph, state)(x, context, rngs=None if key is None else nnx.Rngs(key))


@functools.partial(jax.jit, static_argnums=0)
def block(graph: nnx.GraphDef, state: nnx.State, x: jax.Array, context: Context):
  return nnx.merge(graph, state)(x, context)


STACKS = [(5, 2), (2, 0), (4, 2), (3, 1), (1, 2)]


@pytest.mark.parametrize(("layers", "moe_every"), grids.quick_few(STACKS[:2], STACKS))
def test_a_stack_equals_its_blocks_one_by_one(layers: int, moe_every: int, x: np.ndarray, context: Context) -> None:
  stack = make_stack(layers, moe_every)
  y, record = run(*nnx.split(stack), x, context)
  wanted, records = x, []
  size = moe_every or 1
  for i in range(layers // size):
    for each in stack.scanned.blocks:
      graph, state = nnx.split(each)
      wanted, out = block(graph, jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], state), wanted, context)
      records += [out] if out is not None else []
  for rest in stack.rest:
    for each in rest.blocks:
      wanted, out = block(*nnx.split(each), wanted, context)
      assert out is None
  np.testing.assert_allclose(y, wanted, atol=2e-5 * np.abs(wanted).max())
  assert (record is None) == (not records)
  for i, out in enumerate(records):
    np.testing.assert_allclose(record.stats.load[i], out.stats.load, atol=1e-6)
    np.testing.assert_array_equal(record.stats.expert[i], out.stats.expert)
    np.testing.assert_allclose(record.aux.balance_loss[i], out.aux.balance_loss, rtol=1e-5)


def test_layers_start_different() -> None:
  make = functools.partial(make_block, 2, 0.0)
  up = jax.jit(lambda: Stack(make, 4, 2, rngs=nnx.Rngs(0)).scanned.blocks[1].feed_forward.up.get_value())()
  assert up.shape == (2, 4, D, H)
  assert not np.array_equal(up[0], up[1])


@pytest.fixture(scope="module")
def learned(x: np.ndarray, context: Context):
  """By what is computed again: a deep stack's outputs and gradients, and the bytes that its program needs besides."""

  @functools.cache
  def of(remat: str):
    graph, state = nnx.split(make_stack(12, 2, remat=remat))

    def loss(state: nnx.State, x: jax.Array):
      y, _ = nnx.merge(graph, state)(x, context)
      return jnp.mean(jnp.sin(y)), y

    program = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(state, x).compile()
    return program(state, x), program.memory_analysis().temp_size_in_bytes

  return of


@pytest.mark.parametrize("remat", grids.quick_few(["full"], ["full", "dots"]))
def test_computing_again_in_the_backward_pass_changes_no_number(remat: str, learned) -> None:
  for mine, wanted in zip(jax.tree.leaves(learned(remat)[0]), jax.tree.leaves(learned("none")[0]), strict=True):
    if mine.size:
      np.testing.assert_allclose(mine, wanted, atol=1e-5 * np.abs(wanted).max())


def test_computing_again_takes_less_memory(learned) -> None:
  assert learned("full")[1] < 0.6 * learned("none")[1]


def test_the_program_does_not_grow_with_depth(x: np.ndarray, context: Context) -> None:
  def program(layers: int) -> str:
    make = functools.partial(make_block, 2, 0.0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Stack(make, layers, 2, rngs=nnx.Rngs(0))))
    return str(jax.make_jaxpr(jax.grad(lambda s, x: jnp.sum(nnx.merge(graph, s)(x, context)[0])))(state, x))

  assert len(program(24)) < 1.02 * len(program(4))


def test_dropout_follows_the_seed_and_differs_between_layers(x: np.ndarray, context: Context) -> None:
  """In layers that add 1 to everything, dropout of a half makes of it 0 or 2, of both together 0, 2 or 4."""
  graph, state = nnx.split(make_stack(2, 0, dropout=0.5))
  for path, variable in nnx.to_flat_state(state):
    if path[-2:] in (("out", "kernel"), ("down", "kernel"), ("down", "bias")):
      variable.set_value(np.full(variable.shape, float(path[-1] == "bias"), np.float32))
  one, same, other = (run(graph, state, x, context, jax.random.key(seed))[0] - x for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)
  share = np.bincount(np.rint(one).astype(int).reshape(-1), minlength=5) / one.size
  np.testing.assert_allclose(share, [0.25, 0, 0.5, 0, 0.25], atol=0.1)
  np.testing.assert_allclose(run(graph, state, x, context)[0] - x, 2.0, atol=1e-5)  # without a seed it is off


def test_experts_whose_record_would_be_lost_are_an_error() -> None:
  def everywhere(place: int, rngs: nnx.Rngs) -> Block:
    return Block(D, HEADS, MoE(D, H, 4, 2, rngs=rngs), rngs=rngs)

  with pytest.raises(ValueError, match="only the last block of a group may hold experts"):
    nnx.eval_shape(lambda: Stack(everywhere, 4, 2, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="after the last whole group holds experts"):
    nnx.eval_shape(lambda: Stack(everywhere, 1, 2, rngs=nnx.Rngs(0)))


def test_an_unknown_remat_is_an_error() -> None:
  with pytest.raises(ValueError, match="remat='some' must be one of 'none', 'dots', 'full'"):
    make_stack(2, 2, remat="some")


def test_stacked_parameters_are_laid_out_by_their_own_names() -> None:
  mesh = device_mesh.make_mesh(config.Mesh(data=2, expert=2, tensor=2))
  state = nnx.state(make_stack(4, 2))
  up = state["scanned"]["blocks"][1]["feed_forward"]["up"].get_value()
  where = sharding.shardings(mesh, state)["scanned"]["blocks"][1]["feed_forward"]["up"].get_value()
  assert up.shape == (2, 4, D, H)
  assert where.spec == jax.sharding.PartitionSpec(None, "expert", None, "tensor")
