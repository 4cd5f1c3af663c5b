"""Attention over a history and its snapshots: causal among events, one-way from snapshots, aware of time gaps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers.linear import linear

# Hours at which the learned bias on time gaps may bend: at once, a day, four weeks. Each costs a pass over all pairs.
GAP_KNOTS = np.log1p(np.array([0.0, 24.0, 672.0]))

# Nothing sees what comes after it in a row, so a block of queries needs only the keys up to its own end: half the work,
# and no [T, T] scores. Measured on 2 CPU cores (B 32, T 264, H 2, d 32, forward + backward): 93 ms in blocks, 245 ms
# with jax.nn.dot_product_attention and the same bias.
QUERY_BLOCK = 96

# Score of what is not visible; finite, so that a row that sees nothing (padding) stays finite.
HIDDEN = -1e30


def visibility(length: jax.Array, n_events: jax.Array, max_events: int) -> jax.Array:
  """Returns which positions see which, bool `[B, L + S, L + S]`, for L events followed by S snapshots.

  Event i sees the events j ≤ i. Snapshot s sees the first `n_events [B, S]` events, and itself. Nobody else sees a
  snapshot; `length [B]` events are real, the rest is padding, which nobody sees.
  """
  n_snapshots = n_events.shape[1]
  event = jnp.arange(max_events)
  causal = (event[None, :] <= event[:, None])[None] & (event[None, None, :] < length[:, None, None])
  past = (event[None, None, :] < n_events[:, :, None]) & (event[None, None, :] < length[:, None, None])
  events_see = jnp.pad(causal, ((0, 0), (0, 0), (0, n_snapshots)))
  itself = jnp.broadcast_to(jnp.eye(n_snapshots, dtype=bool), (len(length), n_snapshots, n_snapshots))
  return jnp.concatenate([events_see, jnp.concatenate([past, itself], axis=2)], axis=1)


def rotate(x: jax.Array, position: jax.Array) -> jax.Array:
  """Rotary embedding of `x [B, T, H, d]` at `position [B, T]` (arXiv 2104.09864)."""
  half = x.shape[-1] // 2
  frequency = 10_000.0 ** (-jnp.arange(half) / half)
  angle = position[:, :, None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Attention(nnx.Module):
  """Multi-head attention with rotary positions and a learned, piecewise linear bias on log time gaps."""

  def __init__(self, d_model: int, heads: int, *, rngs: nnx.Rngs):
    """Creates the layer.

    Raises:
      ValueError: `d_model` is no multiple of `2 · heads`; rotary positions turn pairs of channels.
    """
    if d_model % (2 * heads):
      raise ValueError(f"d_model={d_model} must be a multiple of 2 × heads={2 * heads}")
    self.heads = heads
    self.qkv = linear(d_model, 3 * d_model, names=("embed", "heads"), bias=False, rngs=rngs)
    self.out = linear(d_model, d_model, names=("heads", "embed"), bias=False, rngs=rngs)
    self.gap = sharding.param(jnp.zeros((len(GAP_KNOTS), heads)), None, "heads")

  def __call__(self, x: jax.Array, position: jax.Array, time: jax.Array, visible: jax.Array) -> jax.Array:
    """Attends within rows.

    Args:
      x: `[B, T, D]`.
      position: int32 `[B, T]`, place in the history.
      time: float32 `[B, T]`, hours since any fixed moment of the row.
      visible: bool `[B, T, T]`, whether i sees j; never for j > i.

    Returns: `[B, T, D]`. A row of `visible` that is all False gives finite but meaningless numbers.
    """
    b, t, d = x.shape
    q, k, v = jnp.split(self.qkv(x).reshape(b, t, 3 * self.heads, d // self.heads), 3, axis=2)
    q, k = rotate(q, position), rotate(k, position)
    blocks = []
    for start in range(0, t, QUERY_BLOCK):
      rows, past = slice(start, start + QUERY_BLOCK), slice(0, start + QUERY_BLOCK)
      blocks.append(
        _attend(
          q[:, rows], k[:, past], v[:, past], self._gap_bias(time[:, rows], time[:, past]), visible[:, rows, past]
        )
      )
    return self.out(jnp.concatenate(blocks, axis=1).reshape(b, t, d))

  def _gap_bias(self, time: jax.Array, past: jax.Array) -> jax.Array:
    """Returns the bias `[B, H, t, T]` of the gaps between `time [B, t]` and `past [B, T]`."""
    gap = jnp.log1p(jnp.abs(time[:, :, None] - past[:, None, :]))
    weight = self.gap.get_value()
    bends = (weight[i][:, None, None] * jax.nn.relu(gap - knot)[:, None] for i, knot in enumerate(GAP_KNOTS))
    return sum(bends, jnp.zeros(()))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, visible: jax.Array) -> jax.Array:
  """Softmax attention of `q [B, t, H, d]` over `k, v [B, T, H, d]`; `bias [B, H, t, T]`, `visible [B, t, T]`."""
  score = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5 + bias
  score = jnp.where(visible[:, None], score, HIDDEN)
  weight = jnp.exp(score - jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True)))
  total = jnp.sum(weight, axis=-1).swapaxes(1, 2)[..., None]
  return (jnp.einsum("bhts,bshd->bthd", weight.astype(v.dtype), v) / total).astype(v.dtype)
