"""Embeds the values of events and snapshots as vectors of the model's width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers import time_gaps
from supermoe_jax.layers.moe import Mlp
from supermoe_jax.layers.table import ONE_DEVICE, EmbeddingTable, Layout
from supermoe_jax.sharding import linear, set_bias

# Knots of numeric fields, in standard deviations, since these fields are standardised.
NUMERIC_KNOTS = np.array([-1.0, 0.0, 1.0, 2.0])

# Knots of the aggregates that are neither counts of values nor factors, in standard deviations.
AGGREGATE_KNOTS = np.array([-2.0, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 2.0, 3.0])
RAMPS = len(AGGREGATE_KNOTS) - 1

# Scale of the standardised counts of values that join a representation. At 1 they outrun what the blocks learn, to the
# harm of rare labels; at 0.1 the labels of users, which depend on many counts, learn too slowly.
COUNTS_SCALE = 0.3


class EventEmbedding(nnx.Module):
  """Sum of the embeddings of an event's type, fields, numbers, place in the calendar and time gap."""

  def __init__(
    self,
    d_model: int,
    sources: int,
    categorical: Mapping[str, int],
    inputs: Sequence[str],
    numeric_inputs: Sequence[int],
    calendar: int,
    *,
    time_unit: time_gaps.Unit = "seconds",
    extra_columns: Sequence[str] = (),
    shares: Mapping[str, str] | None = None,
    vectors: Mapping[str, int] | None = None,
    layout: Layout = ONE_DEVICE,
    rngs: nnx.Rngs,
  ):
    """Creates the tables. A field that is not an input has no table, and its values are not read.

    Args:
      d_model: D.
      sources: number of event sources.
      categorical: the number of codes of each categorical field, in the order of the codes' first columns.
      inputs: the categorical fields that the model may see.
      numeric_inputs: the columns of the numeric fields that the model may see.
      calendar: number of values that describe an event's place in the calendar.
      time_unit: the unit of the encoding of time gaps.
      extra_columns: the field of each further column of the codes, whose values share the field's table.
      shares: the owner of the table of each field that uses another field's table; both have the owner's codes.
      vectors: the number of numbers of each vector field.
      layout: layout of the fields' tables.
      rngs: keys of the initial parameters.

    Raises:
      ValueError: an input is not a categorical field.
    """
    for name in inputs:
      if name not in categorical:
        raise ValueError(f"input {name!r} is not a categorical field; there are {', '.join(categorical) or 'none'}")
    source = jax.random.normal(rngs.params(), (sources + 1, d_model)) * d_model**-0.5
    self.source = sharding.param(source.at[0].set(0.0), None, "embed")
    self.owner = {n: (shares or {}).get(n, n) for n in categorical if n in inputs}
    columns = [self.owner.get(n) for n in (*categorical, *extra_columns)]
    tables = [n for n in categorical if n in self.owner.values()]
    self.columns = {n: tuple(i for i, c in enumerate(columns) if c == n) for n in tables}
    self.tables = nnx.Dict(
      {n: EmbeddingTable(categorical[n], d_model, name=n, layout=layout, rngs=rngs) for n in tables}
    )
    self.numeric_columns = tuple(numeric_inputs)
    self.calendar = linear(calendar, d_model, names=(None, "embed"), rngs=rngs)
    self.time_unit = time_unit
    self.gap = linear(time_gaps.basis_size(time_unit), d_model, names=(None, "embed"), bias=False, rngs=rngs)
    self.numeric = (
      linear(len(numeric_inputs) * (2 + len(NUMERIC_KNOTS)), d_model, names=(None, "embed"), bias=False, rngs=rngs)
      if self.numeric_columns
      else None
    )
    # The last input of a projection is 1 for a vector, and 0 for none.
    self.vector_fields, self.vector_sizes = tuple(vectors or {}), tuple((vectors or {}).values())
    self.vectors = (
      nnx.Dict({n: linear(k + 1, d_model, names=(None, "embed"), bias=False, rngs=rngs) for n, k in vectors.items()})
      if vectors
      else None
    )

  def __call__(
    self,
    codes: jax.Array,
    source: jax.Array,
    numeric: jax.Array,
    calendar: jax.Array,
    gap: jax.Array,
    vectors: jax.Array | None = None,
  ) -> jax.Array:
    """Embeds events; shapes as in `batch.Features`, which also hold the fields that are not inputs.

    Returns: `[B, L, D]`; padding gets an arbitrary vector.
    """
    kinds = self.source.get_value()
    x = jax.nn.one_hot(source, len(kinds)) @ kinds  # few rows: a product is faster than a gather and its transpose
    x = x + self.calendar(calendar) + self.gap(time_gaps.gap_basis(gap, self.time_unit))
    for name, asked in self.asked(codes).items():
      x = x + jnp.sum(self.tables[name](asked), axis=-2)
    if self.numeric is not None:
      numeric = numeric[..., np.array(self.numeric_columns)]
      present = jnp.isfinite(numeric)
      parts = time_gaps.bends(jnp.where(present, numeric, 0.0), NUMERIC_KNOTS) * present[..., None]
      parts = jnp.concatenate([parts, present[..., None].astype(parts.dtype)], axis=-1)
      x = x + self.numeric(parts.reshape(*parts.shape[:-2], -1))
    if self.vectors is not None and vectors is not None:
      of_fields = jnp.split(vectors, np.cumsum(self.vector_sizes)[:-1], axis=-1)
      for name, vector in zip(self.vector_fields, of_fields, strict=True):
        present = jnp.isfinite(vector[..., :1])
        x = x + self.vectors[name](jnp.concatenate([jnp.where(present, vector, 0), present], axis=-1, dtype=x.dtype))
    return x

  def without_some_vectors(self, vectors: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """Returns `vectors [B, L, V]`, where random vectors, a `share` of all, are absent."""
    kept = jax.random.bernoulli(key, 1 - share, (*vectors.shape[:-1], len(self.vector_sizes)))
    return jnp.where(kept[..., np.repeat(np.arange(len(self.vector_sizes)), self.vector_sizes)], vectors, jnp.nan)

  def asked(self, codes: jax.Array) -> dict[str, jax.Array]:
    """Returns the codes that events with `codes [B, L, F]` look up in each table: `[B, L, k]` for k columns."""
    return {n: codes[..., np.array(columns)] for n, columns in self.columns.items()}

  def table(self, field: str) -> EmbeddingTable:
    """Returns the table of a field, its own or one that it shares.

    Raises:
      ValueError: the field is not an input, so it has no table.
    """
    if field not in self.owner:
      raise ValueError(f"field {field!r} is no input, so it has no embeddings; inputs: {', '.join(self.owner)}")
    return self.tables[self.owner[field]]

  def values(self, names: Sequence[str], codes: jax.Array) -> jax.Array:
    """Returns the sum `[..., D]` of the embeddings of `codes [..., G]` of the G fields `names`; 0 where G is 0.

    Raises:
      ValueError: `codes` does not have one column per field; a field is not an input, so it has no embeddings.
    """
    if codes.shape[-1] != len(names):
      raise ValueError(f"codes of shape {codes.shape} for the {len(names)} fields {tuple(names)}")
    total = jnp.zeros((*codes.shape[:-1], self.source.shape[-1]))
    for i, name in enumerate(names):
      total = total + self.table(name)(codes[..., i])
    return total


class QueryEmbedding(nnx.Module):
  """Embedding of a snapshot: of the gap to its last event, the calendar of its time τ and, if any, its aggregates.

  All aggregates also join the representation after the blocks, see `add_aggregates`. Counts of values do that alone:
  there are hundreds of them, and in the token they drown the few numbers that every task needs. Those few, the plain
  ones, enter as they are and as `aggregate_ramps`, since what they say of a user is seldom linear.

  Calendar and gap count for nothing at first. A random vector stands for all snapshots, as for all events of a type:
  a norm multiplies the gradients of a vector of zeros by a thousand.
  """

  def __init__(
    self,
    d_model: int,
    calendar: int,
    aggregates: int,
    plain: Sequence[int] | None = None,
    factors: Sequence[int] = (),
    *,
    time_unit: time_gaps.Unit = "seconds",
    rngs: nnx.Rngs,
  ):
    """Creates the embedding; of the A aggregates `plain` are the columns of the plain ones, `factors` those of factors.

    With `plain=None` the token reads every aggregate, as it is, and no aggregate joins the representation.
    """
    self.time_unit = time_unit
    self.plain = tuple(plain or ())
    self.token_columns = tuple(range(aggregates)) if plain is None else (*self.plain, *factors)
    self.scale = tuple(1.0 if i in self.token_columns else COUNTS_SCALE for i in range(aggregates))
    ramps = len(self.plain) * RAMPS
    self.calendar = linear(calendar, d_model, names=(None, "embed"), zero=True, rngs=rngs)
    set_bias(self.calendar, jax.random.normal(rngs.params(), (d_model,)) * d_model**-0.5)
    self.gap = linear(time_gaps.basis_size(time_unit), d_model, names=(None, "embed"), bias=False, zero=True, rngs=rngs)
    self.aggregates = (
      linear(len(self.token_columns) + ramps, d_model, names=(None, "heads"), rngs=rngs) if self.token_columns else None
    )
    self.mlp = Mlp(d_model, 2 * d_model, rngs=rngs) if self.token_columns else None
    joining = 0 if plain is None else aggregates + ramps
    self.into_z = linear(joining, d_model, names=(None, "heads"), bias=False, zero=True, rngs=rngs) if joining else None

  def __call__(self, calendar: jax.Array, gap: jax.Array, aggregates: jax.Array) -> jax.Array:
    """Embeds snapshots: `calendar [B, S, 6]`, `gap [B, S]`, `aggregates [B, S, A]` to `[B, S, D]`."""
    x = self.calendar(calendar) + self.gap(time_gaps.gap_basis(gap, self.time_unit))
    if self.aggregates is not None and self.mlp is not None:
      hidden = self.aggregates(self._with_ramps(aggregates[..., np.array(self.token_columns)], aggregates))
      x = x + hidden + self.mlp(hidden)
    return x

  def add_aggregates(self, z: jax.Array, aggregates: jax.Array) -> jax.Array:
    """Returns `z [B, S, D]` plus a linear map, 0 at first, of `aggregates [B, S, A]` and their ramps."""
    if self.into_z is None:
      return z
    return z + self.into_z(self._with_ramps(aggregates * jnp.array(self.scale, aggregates.dtype), aggregates))

  def _with_ramps(self, columns: jax.Array, aggregates: jax.Array) -> jax.Array:
    """Returns `columns [..., C]` and, behind them, the ramps of the plain ones of `aggregates [..., A]`."""
    return jnp.concatenate([columns, aggregate_ramps(aggregates, self.plain)], axis=-1) if self.plain else columns


def aggregate_ramps(aggregates: jax.Array, columns: tuple[int, ...]) -> jax.Array:
  """Returns the ramps of some columns of standardised `aggregates [..., A]`: `[..., columns · RAMPS]`.

  They are 0 at the mean, so that an average user's aggregates count for nothing.
  """
  middle = time_gaps.ramps(jnp.zeros((), aggregates.dtype), AGGREGATE_KNOTS)
  ramps = time_gaps.ramps(aggregates[..., np.array(columns)], AGGREGATE_KNOTS) - middle
  return ramps.reshape(*aggregates.shape[:-1], -1)
