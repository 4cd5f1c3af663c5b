"""Transformer blocks: pre-norm attention, then an MLP or a Mixture of Experts."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx

from supermoe_jax.layers.attention import Attention
from supermoe_jax.layers.moe import Mlp, MoE, MoEOutput


class Block(nnx.Module):
  """`x + attention(norm x)`, then `x + mlp(norm x)`, where the second may be a Mixture of Experts."""

  def __init__(self, d_model: int, heads: int, feed_forward: Mlp | MoE, *, dropout: float = 0.0, rngs: nnx.Rngs):
    self.attention_norm = nnx.RMSNorm(d_model, rngs=rngs)
    self.attention = Attention(d_model, heads, rngs=rngs)
    self.feed_forward_norm = nnx.RMSNorm(d_model, rngs=rngs)
    self.feed_forward = feed_forward
    self.dropout = nnx.Dropout(dropout)

  def __call__(
    self, x: jax.Array, context: Context, *, dropless: bool, rngs: nnx.Rngs | None = None
  ) -> tuple[jax.Array, MoEOutput | None]:
    """Applies the block to `x [B, T, D]`; with `rngs`, dropout is on. Returns x and, for experts, their record."""

    def drop(y: jax.Array) -> jax.Array:
      return self.dropout(y, deterministic=rngs is None, rngs=rngs)

    attended = self.attention(self.attention_norm(x), context.position, context.time, context.visible)
    x = x + drop(attended)
    normed = self.feed_forward_norm(x)
    if isinstance(self.feed_forward, MoE):
      out = self.feed_forward(normed, context.valid, dropless=dropless)
      return x + drop(out.y), out
    return x + drop(self.feed_forward(normed)), None


class Context(NamedTuple):
  """What every block of a stack shares: `position`, `time` `[B, T]`, `visible [B, T, T]`, `valid [B, T]`."""

  position: jax.Array
  time: jax.Array
  visible: jax.Array
  valid: jax.Array
