"""Heads: from the user representation to the answers of a task."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers.linear import linear
from supermoe_jax.layers.table import EmbeddingTable


class LinearHead(nnx.Module):
  """One number for each state (the logit of a yes-or-no question, or a regression), or `outputs` of them."""

  def __init__(self, d_model: int, outputs: int | None = None, *, rngs: nnx.Rngs):
    self.single = outputs is None
    self.linear = linear(d_model, outputs or 1, names=("embed", None), rngs=rngs)

  def __call__(self, z: jax.Array) -> jax.Array:
    """`z [..., D]` to `[...]`, or to `[..., outputs]`, which keeps its dimension when `outputs` is 1."""
    answers = self.linear(z)
    return answers[..., 0] if self.single else answers


class EventLabelHead(nnx.Module):
  """What an event says, from the state before it and from what is known of the event beforehand.

  With h the state and g the sum of the known values' embeddings, the answer is linear in h, g and h·g (channel by
  channel), plus a small MLP of them; it starts at 0.
  """

  def __init__(self, d_model: int, *, rngs: nnx.Rngs):
    self.linear = linear(3 * d_model, 1, names=("embed", None), zero=True, rngs=rngs)
    self.up = linear(3 * d_model, d_model, names=("embed", "mlp"), rngs=rngs)
    self.down = linear(d_model, 1, names=("mlp", None), bias=False, zero=True, rngs=rngs)

  def __call__(self, h: jax.Array, g: jax.Array) -> jax.Array:
    """States `h [..., D]` and events `g [..., D]` (0: nothing is known of them) to logits, or numbers, `[...]`."""
    x = jnp.concatenate([h, g, h * g], axis=-1)
    return (self.linear(x) + self.down(jax.nn.gelu(self.up(x))))[..., 0]


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
