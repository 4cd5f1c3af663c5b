"""Heads: from the user representation to the answers of a task."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers.linear import linear
from supermoe_jax.layers.table import EmbeddingTable


class BinaryHead(nnx.Module):
  """The logit of a yes-or-no question, or of each of `outputs` of them."""

  def __init__(self, d_model: int, outputs: int | None = None, *, rngs: nnx.Rngs):
    self.single = outputs is None
    self.linear = linear(d_model, outputs or 1, names=("embed", None), rngs=rngs)

  def __call__(self, z: jax.Array) -> jax.Array:
    """`z [..., D]` to logits `[...]`, or `[..., outputs]`."""
    logits = self.linear(z)
    return logits[..., 0] if self.single else logits


class NextValueHead(nnx.Module):
  """Scores every value of a field against a state, with the field's own embeddings as output weights (tied).

  Item i of the catalogue is code i + 2: the codes absent and out-of-vocabulary are not values.
  """

  def __init__(self, d_model: int, items: int, *, rngs: nnx.Rngs):
    self.query = linear(d_model, d_model, names=("embed", "heads"), rngs=rngs)
    self.bias = sharding.param(jnp.zeros(items + 2), "rows")  # as long as the table, so that it is spread as it is

  def state(self, h: jax.Array) -> jax.Array:
    """What is compared with the catalogue: `[..., D]`."""
    return self.query(h)

  def scores(self, h: jax.Array, table: EmbeddingTable) -> jax.Array:
    """Scores `h [..., D]` against the whole catalogue: `[..., items]`."""
    rows, bias = self.catalogue(table)
    return self.state(h) @ rows.T + bias

  def catalogue(self, table: EmbeddingTable) -> tuple[jax.Array, jax.Array]:
    """The vectors `[items, D]` and biases `[items]` that states are compared with."""
    return table.rows.get_value()[2:], self.bias.get_value()[2:]
