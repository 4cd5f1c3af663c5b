"""Implements multi-head attention over rows of events and snapshots.

Events attend to earlier events of their user, snapshots attend to events, and no event attends to a snapshot. A learned
bias makes the scores depend on time gaps.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers import time_gaps
from supermoe_jax.sharding import linear

# Queries per block. No position sees a later one, so a block of queries needs only the keys up to its own end: half the
# work. Times here are forward + backward in float32 on 2 CPU cores. B 32, T 264, H 2, d 32 takes 27 ms in blocks, 36 ms
# in the loops below, 46 ms with jax.nn.dot_product_attention and the same mask and bias.
QUERY_BLOCK = 96

# Unrolled blocks keep all their scores for the backward pass, and more blocks take longer to compile. A row of more
# than LONG positions goes through LONG_GROUPS loops instead, each with the keys up to its own end. A loop step takes
# LONG_BLOCK queries, and the backward pass recomputes its scores. At B 1, T 2048, H 4, d 32 the loops need 21 MiB and
# 86 ms, the blocks 240 MiB and 76 ms (the scores of all pairs are 64 MiB). At B 8, T 1032, H 2, the loops need 42 MiB
# and 80 ms, the blocks 221 MiB and 65 ms. Blocks under jax.checkpoint save nothing on the CPU, where XLA merges the
# recomputation with the forward pass.
LONG = 512
LONG_BLOCK = 32
LONG_GROUPS = 4

# Score of a position that is not visible; its exponential is 0.
HIDDEN = -1e30


class Visibility(NamedTuple):
  """Positions that each position sees: position i sees positions start_i ≤ j < end_i, position `also_i`, and itself.

  All arrays are int32 `[B, T]`, with end_i ≤ i + 1 and also_i ≤ i. `also` is None when there is no further position.
  """

  start: jax.Array
  end: jax.Array
  also: jax.Array | None = None


def visibility(segment: jax.Array, query_segment: jax.Array, query_events: jax.Array) -> tuple[Visibility, jax.Array]:
  """Returns the visible and the rotary positions in rows of L events followed by S snapshots.

  An event sees its user's events up to and including itself. A snapshot sees the first `query_events` events of its
  user, and itself. No other position sees a snapshot. Padding sees only itself and is seen only by itself. No position
  sees another user's positions.

  Args:
    segment: int32 `[B, L]`, the user of each event: users contiguous, numbered from 1; 0 is padding.
    query_segment: int32 `[B, S]`, the user of each snapshot; 0 is padding.
    query_events: int32 `[B, S]`, the number of its user's events that the snapshot sees; more than exist means all.

  Returns: the `Visibility [B, L + S]`, and the rotary position int32 `[B, L + S]`, which is the place within the user's
    own history: an event's index from 0, a snapshot's number of visible events, 0 for padding.
  """
  event = jnp.arange(segment.shape[1], dtype=jnp.int32)
  begins = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  first = jax.lax.cummax(jnp.where(begins, event, 0), axis=1)
  real = segment > 0
  start = jnp.where(real, first, event)

  own = (query_segment[:, :, None] == segment[:, None, :]) & real[:, None, :]  # [B, S, L]
  seen = jnp.clip(query_events, 0, jnp.sum(own, axis=2)).astype(jnp.int32)
  query_start = jnp.argmax(own, axis=2).astype(jnp.int32)
  visible = Visibility(
    start=jnp.concatenate([start, query_start], axis=1),
    end=jnp.concatenate([event + real, query_start + seen], axis=1),
  )
  return visible, jnp.concatenate([event - start, seen], axis=1)


def with_task_tokens(
  visible: Visibility, position: jax.Array, snapshots: int, tasks: int
) -> tuple[Visibility, jax.Array]:
  """Appends T task tokens for each snapshot to rows of L events and S snapshots, in the order of the snapshots.

  A task token sees its snapshot, what the snapshot sees, and itself; no other position sees it. Its rotary position is
  the snapshot's.

  Args:
    visible: `[B, L + S]`, of events and snapshots; see `visibility`.
    position: int32 `[B, L + S]`.
    snapshots: S.
    tasks: T.

  Returns: the `Visibility` and the rotary position of `[B, L + S + S·T]`.
  """
  place = jnp.broadcast_to(jnp.arange(position.shape[1], dtype=jnp.int32), position.shape)

  def extended(a: jax.Array) -> jax.Array:
    return jnp.concatenate([a, jnp.repeat(a[:, a.shape[1] - snapshots :], tasks, axis=1)], axis=1)

  start, end, also, position = (extended(a) for a in (visible.start, visible.end, place, position))
  return Visibility(start, end, also), position


def rotate(x: jax.Array, position: jax.Array) -> jax.Array:
  """Applies the rotary embedding to `x [B, T, H, d]` at `position [B, T]`, in float32 (arXiv 2104.09864)."""
  half = x.shape[-1] // 2
  frequency = 10_000.0 ** (-jnp.arange(half) / half)
  angle = position[:, :, None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
  """Multi-head attention with rotary positions and a learned, piecewise linear bias on log time gaps.

  Projections and weighted sums are computed in `dtype`, scores and softmax in float32.
  """

  def __init__(
    self,
    d_model: int,
    heads: int,
    *,
    time_unit: time_gaps.Unit = "seconds",
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Creates the layer. Without `dtype` it computes in the dtype of its input. `time_unit` is that of the bias.

    Raises:
      ValueError: `d_model` is not a multiple of `2 · heads`; rotary positions rotate pairs of channels.
    """
    if d_model % (2 * heads):
      raise ValueError(f"d_model={d_model} must be a multiple of 2 × heads={2 * heads}")
    self.heads = heads
    self.dtype = dtype
    self.qkv = linear(d_model, 3 * d_model, names=("embed", "heads"), bias=False, dtype=dtype, rngs=rngs)
    self.out = linear(d_model, d_model, names=("heads", "embed"), bias=False, dtype=dtype, rngs=rngs)
    self.time_unit = time_unit
    self.gap = sharding.param(jnp.zeros((len(time_gaps.ATTENTION_KNOTS[time_unit]), heads)), None, "heads")

  def __call__(self, x: jax.Array, position: jax.Array, time: jax.Array, visible: Visibility) -> jax.Array:
    """Attends within rows.

    Args:
      x: `[B, T, D]`.
      position: int32 `[B, T]`, place in the history.
      time: float32 `[B, T]`, hours since any fixed moment of the row.
      visible: `[B, T]`, the positions that each position sees.

    Returns: `[B, T, D]` in the dtype of `x`.
    """
    b, t, d = x.shape
    # q, k and v are grouped by head, so that a device that holds some heads holds the q, k and v of these heads only.
    qkv = self.qkv(x).astype(self.dtype or x.dtype).reshape(b, t, self.heads, 3, d // self.heads)
    q, k, v = (qkv[:, :, :, i] for i in range(3))
    queries = Queries(rotate(q, position), time, visible, jnp.arange(t, dtype=jnp.int32)[None])
    keys = Keys(rotate(k, position), v, time)
    # One copy per row: where rows are sharded, the gradient is then summed over devices once, not in every loop step.
    gap = jnp.broadcast_to(self.gap.get_value(), (b, *self.gap.shape))
    attended = (_attend_in_blocks if t <= LONG else _attend_in_loops)(queries, keys, GapBias(gap, self.time_unit))
    return self.out(attended.reshape(b, t, d)).astype(x.dtype)


class Queries(NamedTuple):
  """Queries of attention: `q [B, t, H, d]`, `time [B, t]`, `visible [B, t]`, and their `place [1, t]` in the row."""

  q: jax.Array
  time: jax.Array
  visible: Visibility
  place: jax.Array


class Keys(NamedTuple):
  """Keys and values of attention, from the row's first position on: `k, v [B, T, H, d]`, `time [B, T]`."""

  k: jax.Array
  v: jax.Array
  time: jax.Array


_Tree = TypeVar("_Tree", Queries, Keys)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["unit"])
@dataclasses.dataclass(frozen=True)
class GapBias:
  """Bias of the scores, piecewise linear in the logarithm of the time gap; `weight [B, knots, H]`."""

  weight: jax.Array
  unit: time_gaps.Unit

  def __call__(self, time: jax.Array, past: jax.Array) -> jax.Array:
    """Returns the bias `[B, H, t, T]` for gaps between times `time [B, t]` and `past [B, T]`, in hours."""
    gap = time_gaps.log_gap(jnp.abs(time[:, :, None] - past[:, None, :]), self.unit)
    knots = time_gaps.log_knots(time_gaps.ATTENTION_KNOTS[self.unit], self.unit)
    bends = (self.weight[:, i, :, None, None] * jax.nn.relu(gap - knot)[:, None] for i, knot in enumerate(knots))
    return sum(bends, jnp.zeros(()))


def _attend(queries: Queries, keys: Keys, gap: GapBias) -> jax.Array:
  """Returns softmax attention of t queries over T keys, `[B, t, H, d]`."""
  q, k, v = queries.q, keys.k, keys.v
  score = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  key = jnp.arange(k.shape[1], dtype=jnp.int32)
  start, end, also = queries.visible
  visible = ((start[:, :, None] <= key) & (key < end[:, :, None])) | (key == queries.place[:, :, None])
  if also is not None:
    visible |= key == also[:, :, None]
  score = jnp.where(visible[:, None], score + gap(queries.time, keys.time), HIDDEN)
  weight = jnp.exp(score - jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True)))
  total = jnp.sum(weight, axis=-1).swapaxes(1, 2)[..., None]
  mixed = jnp.einsum("bhts,bshd->bthd", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return (mixed / total).astype(v.dtype)


def _attend_in_blocks(queries: Queries, keys: Keys, gap: GapBias) -> jax.Array:
  """Returns `_attend` of a whole row, computed block by block."""
  blocks = []
  for start in range(0, queries.q.shape[1], QUERY_BLOCK):
    end = start + QUERY_BLOCK
    blocks.append(_attend(_positions(queries, start, end), _positions(keys, 0, end), gap))
  return jnp.concatenate(blocks, axis=1)


def _attend_in_loops(queries: Queries, keys: Keys, gap: GapBias) -> jax.Array:
  """Returns `_attend` of a whole row, with one block of scores in memory at a time, forward and backward."""
  t = queries.q.shape[1]
  group = -(-t // (LONG_BLOCK * LONG_GROUPS)) * LONG_BLOCK
  groups = []
  for start in range(0, t, group):
    end = min(start + group, t)
    groups.append(_attend_in_loop(_positions(queries, start, end), _positions(keys, 0, end), gap))
  return jnp.concatenate(groups, axis=1)


def _attend_in_loop(queries: Queries, keys: Keys, gap: GapBias) -> jax.Array:
  """Returns `_attend`, computed in a loop over blocks of queries. Results that pad the last block are dropped."""
  t = queries.q.shape[1]
  n_blocks = -(-t // LONG_BLOCK)

  def fold(a: jax.Array) -> jax.Array:  # [B, t, …] → [blocks, B, LONG_BLOCK, …]
    filled = jnp.pad(a, [(0, 0), (0, n_blocks * LONG_BLOCK - t)] + [(0, 0)] * (a.ndim - 2))
    return filled.reshape(len(a), n_blocks, LONG_BLOCK, *a.shape[2:]).swapaxes(0, 1)

  attend = jax.checkpoint(_attend, prevent_cse=False)  # the backward pass is a separate loop: nothing to merge
  blocks = jax.lax.map(lambda block: attend(block, keys, gap), jax.tree.map(fold, queries))
  return blocks.swapaxes(0, 1).reshape(blocks.shape[1], n_blocks * LONG_BLOCK, *blocks.shape[3:])[:, :t]


def _positions(tree: _Tree, start: int, end: int) -> _Tree:
  """Returns positions start ≤ i < end of every array."""
  return jax.tree.map(lambda a: a[:, start:end], tree)
