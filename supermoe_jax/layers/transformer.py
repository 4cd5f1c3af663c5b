"""Builds transformer blocks, and stacks of them whose compile time does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
    return self.fed(self.attended(x, context, rngs=rngs), context, dropless=dropless, rngs=rngs)

  def attended(self, x: jax.Array, context: Context, *, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Returns the first half of the block, `x + attention(norm x)`."""
    return x + self.drop(self.attention(self.attention_norm(x), context.position, context.time, context.visible), rngs)

  def fed(
    self, h: jax.Array, context: Context, *, dropless: bool = False, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, MoEOutput | None]:
    """Returns the second half, `h + mlp(norm h)` for h from `attended`, and the experts' `MoEOutput`, if any."""
    normed = self.feed_forward_norm(h)
    if isinstance(self.feed_forward, MoE):
      out = self.feed_forward(normed, context.valid, context.task, urgent=context.urgent, dropless=dropless, rngs=rngs)
      return h + self.drop(out.y, rngs), out
    return h + self.drop(self.feed_forward(normed), rngs), None

  def drop(self, y: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
    """Applies dropout, which is on with `rngs`."""
    return self.dropout(y, deterministic=rngs is None, rngs=rngs)


class StackOutput(NamedTuple):
  """Output of a stack of blocks.

  Attributes:
    x: `[B, T, D]`.
    experts: the record of the M layers that hold experts, in order: a `MoEOutput` whose `y` is empty and whose arrays
      have a leading dimension of M; None without such layers.
    before: `[B, n, D]`, the state before the feed-forward part of the last layer that holds experts, at the requested
      positions; None when none were requested.
  """

  x: jax.Array
  experts: MoEOutput | None
  before: jax.Array | None


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
  ) -> tuple[jax.Array, jax.Array, MoEOutput | None]:
    """Returns x, the state before the last block's feed-forward part, and its experts' `MoEOutput`, if any."""
    for block in self.blocks[:-1]:
      x, _ = block(x, context, dropless=dropless, rngs=rngs)
    before = self.blocks[-1].attended(x, context, rngs=rngs)
    x, out = self.blocks[-1].fed(before, context, dropless=dropless, rngs=rngs)
    return x, before, out


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
    self,
    x: jax.Array,
    context: Context,
    *,
    dropless: bool = False,
    before_experts: slice | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> StackOutput:
    """Applies the blocks to `x [B, T, D]`; with `rngs`, dropout and jitter are on.

    `before_experts` selects the positions whose state before the last experts is returned too.

    Raises:
      ValueError: `before_experts` of a stack without experts.
    """
    if before_experts is not None and not self.holds_experts:
      raise ValueError("no block of this stack holds experts, so there is no state before them; set moe_every")
    record, before = None, None
    if self.scanned is not None:
      graph, state = nnx.split(self.scanned)
      keys = None if rngs is None else jax.random.split(rngs.dropout(), self.groups)
      # Each group replaces this part of the carry, so that only the last group's state is kept.
      before = jnp.zeros_like(x[:, before_experts]) if before_experts is not None else None

      # The backward pass of a loop is a separate loop, so nothing needs prevent_cse.
      body = self._body(graph, context, dropless, before_experts, prevent_cse=False)
      (x, before), record = jax.lax.scan(body, (x, before), (state, keys))
    for group in self.rest:
      graph, state = nnx.split(group)
      key = None if rngs is None else rngs.dropout()
      body = self._body(graph, context, dropless, None, prevent_cse=True)
      (x, _), _ = body((x, None), (state, key))
    return StackOutput(x, record, before)

  @property
  def holds_experts(self) -> bool:
    """Returns whether any block holds experts."""
    return self.scanned is not None and isinstance(self.scanned.blocks[-1].feed_forward, MoE)

  def last_expert_block(self) -> Block:
    """Returns the last block that holds experts, with its parameters from the stack.

    Raises:
      ValueError: no block holds experts.
    """
    if self.scanned is None or not self.holds_experts:
      raise ValueError("no block of this stack holds experts; set moe_every")
    graph, state = nnx.split(self.scanned.blocks[-1])
    return nnx.merge(graph, jax.tree.map(lambda a: a[-1], state))

  def _body(
    self, graph: nnx.GraphDef, context: Context, dropless: bool, before_experts: slice | None, *, prevent_cse: bool
  ) -> Callable[..., Any]:
    """Returns one group as a function `((x, before), (variables, key)) → ((x, before), record)`."""

    def body(carry: Any, layer: tuple[nnx.State, jax.Array | None]) -> tuple[Any, MoEOutput | None]:
      state, key = layer
      rngs = None if key is None else nnx.Rngs(key)
      x, before, out = nnx.merge(graph, state)(carry[0], context, dropless=dropless, rngs=rngs)
      before = before[:, before_experts] if before_experts is not None else None
      return (x, before), None if out is None else out._replace(y=jnp.zeros(0))

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
