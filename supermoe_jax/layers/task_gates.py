"""Implements gates of tasks over experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding


class TaskGates(nnx.Module):
  """Softmax over experts for each task, in float32; all experts weigh alike at first.

  Source: multi-gate mixture-of-experts, https://doi.org/10.1145/3219819.3220007.
  """

  def __init__(self, d_model: int, experts: int, tasks: int):
    self.kernel = sharding.param(jnp.zeros((tasks, d_model, experts)), None, "embed", None)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `x [B, S, D]` to gates, float32 `[B, S, T, E]`, which sum to 1 over E."""
    kernel = self.kernel.get_value().astype(jnp.float32)
    logits = jnp.einsum("bsd,tde->bste", x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.softmax(logits, axis=-1)
