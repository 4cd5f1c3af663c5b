"""A stack of blocks: one compiled body however deep it is, and the numbers of the blocks one by one."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.layers.attention import visibility
from supermoe_jax.layers.moe import Mlp, MoE
from supermoe_jax.layers.transformer import Block, Context, Stack

B, T, D, HEADS, H = 2, 20, 16, 2, 24


def make_block(moe_every: int, dropout: float, place: int, rngs: nnx.Rngs) -> Block:
  sparse = place + 1 == moe_every
  feed_forward = MoE(D, H, 4, 2, balance_bias=True, rngs=rngs) if sparse else Mlp(D, H, rngs=rngs)
  return Block(D, HEADS, feed_forward, dropout=dropout, rngs=rngs)


def make_stack(layers: int, moe_every: int, *, remat: str = "none", dropout: float = 0.0) -> Stack:
  make = functools.partial(make_block, moe_every, dropout)
  return Stack(make, layers, moe_every, remat=remat, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def context() -> Context:
  event = jnp.arange(T - 2) < jnp.array([[18], [11]])
  snapshot = jnp.ones((B, 2), bool)
  visible, position = visibility(event.astype(int), snapshot.astype(int), jnp.array([[18, 5], [11, 3]]))
  time = jnp.sort(jax.random.uniform(jax.random.key(1), (B, T)) * 500, axis=1)
  return Context(position, time, visible, jnp.concatenate([event, snapshot], axis=1))


@pytest.fixture(scope="module")
def x() -> jax.Array:
  return jax.random.normal(jax.random.key(0), (B, T, D))


def gradient(stack: Stack, x: jax.Array, context: Context, rngs: nnx.Rngs | None = None):
  """The gradient of a function of all that the stack returns, and that: `((value, (x, experts, before)), gradient)`."""
  graph, state = nnx.split(stack)
  snapshots = slice(T - 2, T) if stack.holds_experts else None
  key = None if rngs is None else rngs.dropout()

  @jax.jit
  def run(state: nnx.State, x: jax.Array):
    def loss(state: nnx.State, x: jax.Array):
      rngs = None if key is None else nnx.Rngs(key)
      out = nnx.merge(graph, state)(x, context, before_experts=snapshots, rngs=rngs)
      total = jnp.sum(jnp.sin(out.x))
      return total if out.before is None else total + jnp.sum(jnp.cos(out.before)), out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

  return run(state, x)


@pytest.mark.parametrize(("layers", "moe_every"), [(4, 2), (5, 2), (3, 1), (2, 0), (1, 2)])
def test_a_stack_equals_its_blocks_one_by_one(layers: int, moe_every: int, x: jax.Array, context: Context) -> None:
  stack = make_stack(layers, moe_every)
  (_, (y, record, before)), _ = gradient(stack, x, context)
  wanted, wanted_before, records = x, None, []
  size = moe_every or 1
  for i in range(layers // size):
    graph, state = nnx.split(stack.scanned)
    for block in nnx.merge(graph, jax.tree.map(operator.itemgetter(i), state)).blocks:
      h = block.attended(wanted, context)
      wanted, out = block(wanted, context)
      wanted_before = h if out is not None else wanted_before
      records += [out] if out is not None else []
  for rest in stack.rest:
    for block in rest.blocks:
      wanted, out = block(wanted, context)
      assert out is None
  np.testing.assert_allclose(y, wanted, atol=2e-5)
  assert (record is None) == (before is None) == (not records)
  if before is not None:
    np.testing.assert_allclose(before, wanted_before[:, -2:], atol=2e-5)
  for i, out in enumerate(records):
    np.testing.assert_allclose(record.stats.load[i], out.stats.load, atol=1e-6)
    np.testing.assert_array_equal(record.stats.expert[i], out.stats.expert)
    np.testing.assert_allclose(record.aux.balance_loss[i], out.aux.balance_loss, rtol=1e-5)


def test_the_last_block_with_experts_is_that_of_the_last_group() -> None:
  stack = make_stack(5, 2)
  block = stack.last_expert_block()
  np.testing.assert_array_equal(block.feed_forward.up[...], stack.scanned.blocks[1].feed_forward.up[1])
  np.testing.assert_array_equal(block.attention.qkv.kernel[...], stack.scanned.blocks[1].attention.qkv.kernel[1])


def test_a_stack_without_experts_has_no_state_before_them(x: jax.Array, context: Context) -> None:
  stack = make_stack(2, 0)
  with pytest.raises(ValueError, match="no block of this stack holds experts"):
    stack(x, context, before_experts=slice(0, 1))
  with pytest.raises(ValueError, match="no block of this stack holds experts"):
    stack.last_expert_block()


def test_layers_start_different() -> None:
  up = make_stack(4, 2).scanned.blocks[1].feed_forward.up
  assert up.shape == (2, 4, D, H)
  assert not np.array_equal(up[0], up[1])


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_computing_again_in_the_backward_pass_changes_no_number(remat: str, x: jax.Array, context: Context) -> None:
  one = gradient(make_stack(4, 2), x, context)
  other = gradient(make_stack(4, 2, remat=remat), x, context)
  for mine, wanted in zip(jax.tree.leaves(other), jax.tree.leaves(one)):
    if mine.size:
      np.testing.assert_allclose(mine, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))


def test_computing_again_takes_less_memory(x: jax.Array, context: Context) -> None:
  def temporary(remat: str) -> int:
    graph, state = nnx.split(make_stack(12, 2, remat=remat))
    run = jax.jit(jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(x, context)[0] ** 2)))
    return run.lower(state).compile().memory_analysis().temp_size_in_bytes

  assert temporary("full") < 0.6 * temporary("none")


def test_the_program_does_not_grow_with_depth(x: jax.Array, context: Context) -> None:
  def program(layers: int) -> str:
    graph, state = nnx.split(make_stack(layers, 2))
    return jax.jit(jax.grad(lambda s: jnp.sum(nnx.merge(graph, s)(x, context)[0]))).lower(state).as_text()

  assert len(program(24)) < 1.02 * len(program(4))


def test_dropout_differs_between_layers_and_follows_the_seed(x: jax.Array, context: Context) -> None:
  stack = make_stack(4, 2, dropout=0.5)
  one, same, other = (gradient(stack, x, context, nnx.Rngs(seed))[0][1][0] for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)
  assert not np.array_equal(one, gradient(stack, x, context)[0][1][0])


def test_experts_whose_record_would_be_lost_are_an_error() -> None:
  def everywhere(place: int, rngs: nnx.Rngs) -> Block:
    return Block(D, HEADS, MoE(D, H, 4, 2, rngs=rngs), rngs=rngs)

  with pytest.raises(ValueError, match="only the last block of a group may hold experts"):
    Stack(everywhere, 4, 2, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="after the last whole group holds experts"):
    Stack(everywhere, 1, 2, rngs=nnx.Rngs(0))


def test_an_unknown_remat_is_an_error() -> None:
  with pytest.raises(ValueError, match="remat='some' must be one of 'none', 'dots', 'full'"):
    make_stack(2, 2, remat="some")


def test_stacked_parameters_are_laid_out_by_their_own_names() -> None:
  mesh = sharding.make_mesh(config.Mesh(data=2, expert=2, tensor=2))
  stack = sharding.create(lambda: make_stack(4, 2), mesh)
  up = stack.scanned.blocks[1].feed_forward.up.get_value()
  assert up.shape == (2, 4, D, H)
  assert up.sharding.spec == jax.sharding.PartitionSpec(None, "expert", None, "tensor")
