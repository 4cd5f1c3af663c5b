"""Reads how often a user had each of a field's most frequent values before, from the aggregates of a snapshot.

People repeat themselves: the best predictor of a value is the user's own count of it. There are hundreds of counts, so
among the inputs of the blocks they drown the few numbers that every task needs. They bypass the blocks instead: they
are added to the representation, and the answer about a value reads the counts of that value directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.batch import ValueCounts
from supermoe_jax.sharding import linear

class CountsVector(nnx.Module):
  """Linear map of the counts of some fields to a vector; it starts at 0."""

  def __init__(self, counts: Sequence[ValueCounts], d_model: int, *, scale: float = 1.0, rngs: nnx.Rngs):
    """Creates the map from `scale` times the counts of at least one field; a small scale lets the map learn slowly."""
    self.counts, self.scale = tuple(counts), scale
    size = sum(c.windows * c.values for c in counts)
    self.linear = linear(size, d_model, names=(None, "embed"), bias=False, zero=True, rngs=rngs)

  def __call__(self, aggregates: jax.Array) -> jax.Array:
    """Maps `aggregates [..., A]` to `[..., D]`."""
    return self.linear(self.scale * jnp.concatenate([aggregates[..., c.columns] for c in self.counts], axis=-1))


class CountsScore(nnx.Module):
  """Score of each value from the user's own counts of that value in each window; it starts at 0.

  A window's weight is a part that all values share plus one of the value's own.
  """

  def __init__(self, counts: ValueCounts, outputs: int):
    """Creates weights for the first `outputs` values of the field; values that are not counted score 0."""
    self.counts, self.outputs = counts, outputs
    self.counted = min(outputs, counts.values)
    self.shared = sharding.param(jnp.zeros(counts.windows), None)
    self.own = sharding.param(jnp.zeros((counts.windows, self.counted)), None, None)

  def __call__(self, aggregates: jax.Array) -> jax.Array:
    """Maps `aggregates [..., A]` to `[..., outputs]`."""
    counts = self.counts.of(aggregates)[..., : self.counted]
    weight = self.shared.get_value()[:, None] + self.own.get_value()
    score = jnp.einsum("...wv,wv->...v", counts, weight)
    return jnp.pad(score, [(0, 0)] * (score.ndim - 1) + [(0, self.outputs - self.counted)])
