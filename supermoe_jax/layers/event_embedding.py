"""From the values of events and snapshots to vectors of the model's width."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from supermoe_jax.layers.linear import linear
from supermoe_jax.layers.moe import Mlp
from supermoe_jax.layers.table import EmbeddingTable

# Hours at which the encoding of an event's or a snapshot's gap may bend.
GAP_KNOTS = np.log1p(np.array([0.05, 1.0, 24.0, 72.0, 168.0, 336.0, 672.0]))

# A numeric field is standardised, so these are standard deviations.
NUMERIC_KNOTS = np.array([-1.0, 0.0, 1.0, 2.0])


def bends(x: jax.Array, knots: np.ndarray) -> jax.Array:
  """Basis of the piecewise linear functions with these knots: `[…] → […, 1 + knots]`."""
  return jnp.concatenate([x[..., None], jax.nn.relu(x[..., None] - knots.astype(x.dtype))], axis=-1)


class EventEmbedding(nnx.Module):
  """Sum of the embeddings of an event's type, its fields, its numbers, its place in the calendar and its time gap."""

  def __init__(
    self,
    d_model: int,
    sources: int,
    categorical: Mapping[str, int],
    numeric: int,
    calendar: int,
    *,
    rngs: nnx.Rngs,
  ):
    """Creates the tables: `categorical` maps each field to its number of codes; `numeric` counts numeric fields."""
    self.source = EmbeddingTable(sources + 1, d_model, rngs=rngs)
    self.fields = nnx.Dict({n: EmbeddingTable(rows, d_model, rngs=rngs) for n, rows in categorical.items()})
    self.names = tuple(categorical)
    self.calendar = linear(calendar, d_model, names=(None, "embed"), rngs=rngs)
    self.gap = linear(1 + len(GAP_KNOTS), d_model, names=(None, "embed"), bias=False, rngs=rngs)
    self.numeric = (
      linear(numeric * (2 + len(NUMERIC_KNOTS)), d_model, names=(None, "embed"), bias=False, rngs=rngs)
      if numeric
      else None
    )

  def __call__(
    self, codes: jax.Array, source: jax.Array, numeric: jax.Array, calendar: jax.Array, gap: jax.Array
  ) -> jax.Array:
    """Embeds events; shapes as in `data.batches.Features`. Returns `[B, L, D]`; padding gives an arbitrary vector."""
    x = self.source(source) + self.calendar(calendar) + self.gap(bends(jnp.log1p(gap), GAP_KNOTS))
    for i, name in enumerate(self.names):
      x = x + self.fields[name](codes[..., i])
    if self.numeric is not None:
      present = jnp.isfinite(numeric)
      parts = bends(jnp.where(present, numeric, 0.0), NUMERIC_KNOTS) * present[..., None]
      parts = jnp.concatenate([parts, present[..., None].astype(parts.dtype)], axis=-1)
      x = x + self.numeric(parts.reshape(*parts.shape[:-2], -1))
    return x


class QueryEmbedding(nnx.Module):
  """A snapshot's token: no event, but the gap to the last one, the calendar of τ and, if any, its aggregates."""

  def __init__(self, d_model: int, calendar: int, aggregates: int, *, rngs: nnx.Rngs):
    self.calendar = linear(calendar, d_model, names=(None, "embed"), zero=True, rngs=rngs)
    self.gap = linear(1 + len(GAP_KNOTS), d_model, names=(None, "embed"), bias=False, zero=True, rngs=rngs)
    self.aggregates = linear(aggregates, d_model, names=(None, "embed"), rngs=rngs) if aggregates else None
    self.mlp = Mlp(d_model, 2 * d_model, rngs=rngs) if aggregates else None

  def __call__(self, calendar: jax.Array, gap: jax.Array, aggregates: jax.Array) -> jax.Array:
    """Embeds snapshots: `calendar [B, S, 6]`, `gap [B, S]`, `aggregates [B, S, A]` to `[B, S, D]`."""
    x = self.calendar(calendar) + self.gap(bends(jnp.log1p(gap), GAP_KNOTS))
    if self.aggregates is not None and self.mlp is not None:
      hidden = self.aggregates(aggregates)
      x = x + hidden + self.mlp(hidden)
    return x
