"""Embedding tables: rows of vectors, looked up by code and, tied, used as an output layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding


class EmbeddingTable(nnx.Module):
  """`rows` vectors of width D. Code 0 means absent: it looks up to 0 and is never learned.

  Code 1, out of vocabulary, starts at 0: where training has no such value, an unseen one says nothing rather than
  noise.
  """

  def __init__(self, rows: int, d_model: int, *, rngs: nnx.Rngs):
    initial = jax.random.normal(rngs.params(), (rows, d_model)) * d_model**-0.5
    self.rows = sharding.param(initial.at[:2].set(0.0), "rows", None)

  def __call__(self, codes: jax.Array) -> jax.Array:
    """Looks up `codes [...]`: float32 `[..., D]`; codes must be in [0, rows)."""
    return jnp.where((codes > 0)[..., None], self.rows.get_value()[codes], 0.0)
