"""Builds transformer blocks, and stacks of them whose compile time does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers import time_gaps
from supermoe_jax.layers.attention import Attention, Visibility
from supermoe_jax.layers.moe import Mlp, MoE, MoEOutput

# Names of what the backward pass recomputes: nothing, everything but matrix products, everything.
REMAT = ("none", "dots", "full")


class Context(NamedTuple):
  """Inputs that all blocks of a stack share, for rows of T positions.

  Attributes:
    position: int32 `[B, T]`, place in the user's history, for rotary embedding.
    time: float32 `[B, T]`, hours since any fixed moment of the row.
    visible: the positions that each position sees.
    valid: bool `[B, T]`; False is padding.
    task: int32 `[B, T]`, the task of a task token, -1 elsewhere; None where there are no task tokens.
    urgent: bool `[B, T]`, the positions that full experts serve first; None: all positions are alike.
  """

  position: jax.Array
  time: jax.Array
  visible: Visibility
  valid: jax.Array
  task: jax.Array | None = None
  urgent: jax.Array | None = None


class Block(nnx.Module):
  """Transformer block: `x + attention(norm x)`, then `x + mlp(norm x)`, where the MLP may be a Mixture of Experts."""

  def __init__(
    self,
    d_model: int,
    heads: int,
    feed_forward: Mlp | MoE,
    *,
    time_unit: time_gaps.Unit = "seconds",
    dropout: float = 0.0,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Creates the block; `dtype` is for the attention's products (None: dtype of x), `feed_forward` has its own."""
    self.attention_norm = nnx.RMSNorm(d_model, rngs=rngs)
    self.attention = Attention(d_model, heads, time_unit=time_unit, dtype=dtype, rngs=rngs)
    self.feed_forward_norm = nnx.RMSNorm(d_model, rngs=rngs)
    self.feed_forward = feed_forward
    self.dropout = nnx.Dropout(dropout)

  def __call__(
    self, x: jax.Array, context: Context, *, dropless: bool = False, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, MoEOutput | None]:
    """Applies the block to `x [B, T, D]`; with `rngs`, dropout and jitter are on.

    Returns: x, and the experts' `MoEOutput`; None for a block without experts.
    """
    h = x + self._drop(self.attention(self.attention_norm(x), context.position, context.time, context.visible), rngs)
    normed = self.feed_forward_norm(h)
    if isinstance(self.feed_forward, MoE):
      out = self.feed_forward(normed, context.valid, context.task, urgent=context.urgent, dropless=dropless, rngs=rngs)
      return h + self._drop(out.y, rngs), out
    return h + self._drop(self.feed_forward(normed), rngs), None

  def _drop(self, y: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
    return self.dropout(y, deterministic=rngs is None, rngs=rngs)


class _Group(nnx.Module):
  """Consecutive blocks, the unit that a stack repeats."""

  def __init__(self, make: Callable[[int, nnx.Rngs], Block], first: int, size: int, *, rngs: nnx.Rngs):
    self.blocks = nnx.List([make(first + i, rngs) for i in range(size)])
    if any(isinstance(block.feed_forward, MoE) for block in self.blocks[:-1]):
      raise ValueError(
        "only the last block of a group may hold experts: what the others do would be lost; set moe_every"
      )

  def __call__(
    self, x: jax.Array, context: Context, *, dropless: bool, rngs: nnx.Rngs | None
  ) -> tuple[jax.Array, MoEOutput | None]:
    """Returns x, and the `MoEOutput` of the last block's experts, if any."""
    for block in self.blocks[:-1]:
      x, _ = block(x, context, dropless=dropless, rngs=rngs)
    return self.blocks[-1](x, context, dropless=dropless, rngs=rngs)


class Stack(nnx.Module):
  """Stack of `layers` blocks, where every `moe_every`-th holds experts.

  The blocks up to and including one with experts form a group. Groups are alike, so their parameters are stacked
  `[groups, …]` and one compiled body is scanned over them: compile time does not grow with depth. Blocks left over
  after the last group (fewer than a group, none with experts) follow one by one.
  """

  def __init__(
    self,
    make: Callable[[int, nnx.Rngs], Block],
    layers: int,
    moe_every: int,
    *,
    remat: str = "none",
    rngs: nnx.Rngs,
  ):
    """Creates the stack.

    Args:
      make: `make(i, rngs)` creates a block for place i of a group; the last one, `moe_every - 1`, holds experts.
      layers: number of all blocks.
      moe_every: blocks in a group; 0: no block holds experts, and `make` is called with 0 only.
      remat: what the backward pass recomputes, one of `REMAT`; less memory, more time.
      rngs: keys of the initial parameters.

    Raises:
      ValueError: an unknown `remat`; experts in another block than every `moe_every`-th.
    """
    if remat not in REMAT:
      raise ValueError(f"remat={remat!r} must be one of {', '.join(map(repr, REMAT))}")
    self.remat = remat
    size = moe_every or 1
    self.groups = layers // size
    self.scanned = _stacked(lambda r: _Group(make, 0, size, rngs=r), self.groups, rngs) if self.groups else None
    self.rest = nnx.List([_Group(make, i, 1, rngs=rngs) for i in range(layers % size)])
    if any(isinstance(group.blocks[0].feed_forward, MoE) for group in self.rest):
      raise ValueError("a block after the last whole group holds experts: what they do would be lost; set moe_every")

  def __call__(
    self, x: jax.Array, context: Context, *, dropless: bool = False, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, MoEOutput | None]:
    """Applies the blocks to `x [B, T, D]`; with `rngs`, dropout and jitter are on.

    Returns: x, and the record of the M layers that hold experts, in order: a `MoEOutput` whose `y` is empty and whose
    arrays have a leading dimension of M; None without such layers.
    """
    record = None
    if self.scanned is not None:
      graph, state = nnx.split(self.scanned)
      keys = None if rngs is None else jax.random.split(rngs.dropout(), self.groups)
      # The backward pass of a loop is a separate loop, so nothing needs prevent_cse.
      x, record = jax.lax.scan(self._body(graph, context, dropless, prevent_cse=False), x, (state, keys))
    for group in self.rest:
      graph, state = nnx.split(group)
      key = None if rngs is None else rngs.dropout()
      x, _ = self._body(graph, context, dropless, prevent_cse=True)(x, (state, key))
    return x, record

  def _body(
    self, graph: nnx.GraphDef, context: Context, dropless: bool, *, prevent_cse: bool
  ) -> Callable[..., tuple[jax.Array, MoEOutput | None]]:
    """Returns one group as a function `(x, (variables, key)) → (x, record)`."""

    def body(x: jax.Array, layer: tuple[nnx.State, jax.Array | None]) -> tuple[jax.Array, MoEOutput | None]:
      state, key = layer
      rngs = None if key is None else nnx.Rngs(key)
      x, out = nnx.merge(graph, state)(x, context, dropless=dropless, rngs=rngs)
      return x, None if out is None else out._replace(y=jnp.zeros(0))

    if self.remat == "none":
      return body
    policy = jax.checkpoint_policies.dots_saveable if self.remat == "dots" else None
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)


def _stacked(make: Callable[[nnx.Rngs], _Group], count: int, rngs: nnx.Rngs) -> _Group:
  """Creates `count` modules as one, whose variables have a leading dimension of layers."""
  keys = jax.random.split(rngs.params(), count)
  graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  state = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(params=key))))(keys)
  return nnx.merge(graph, sharding.stacked(state))
