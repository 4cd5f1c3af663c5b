"""Stores embedding tables spread over all devices; a training step touches only the rows that it looks up."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers import exchange, tpu_lines

# Rows initialised at a time.
_CREATED_AT_ONCE = 1 << 12

# Cells for each pair of devices, as a multiple of an even share of the ids.
CELLS = 2.0


class TableRows(nnx.Variable):
  """Rows of a table, `[G, M / p, p·D]` (see `layers.exchange`), or `Fetched` while a step differentiates.

  They are not an `nnx.Param`: an optimizer over all parameters would keep state for every row and move it in every
  step.
  """


class Fetched(NamedTuple):
  """Rows that a batch asks for: U on each of the S devices that the batch is spread over.

  Attributes:
    place: int32 `[S·U]`, the sorted places of each device's rows (see `layers.exchange`), then `tpu_lines.NONE`.
    rows: float32 `[S·U, D]`; 0 where the place is `NONE`.
  """

  place: jax.Array
  rows: jax.Array


class Layout(NamedTuple):
  """Storage options of tables; see `EmbeddingTable`."""

  ways: int = 1
  cells: float = CELLS
  dtype: str = "float32"
  platform: str | None = None


ONE_DEVICE = Layout()


class EmbeddingTable(nnx.Module):
  """Table of `size` vectors of width D. Code 0 means absent: it looks up to 0 and is never learned.

  Code 1, out of vocabulary, starts at 0: if training has no such value, an unseen one then adds 0 rather than noise. A
  row's initial value depends on the key and its code only, so a larger table starts with the rows of a smaller one.
  """

  def __init__(
    self,
    size: int,
    d_model: int,
    *,
    name: str = "",
    layout: Layout = ONE_DEVICE,
    rngs: nnx.Rngs,
  ):
    """Creates a table.

    Args:
      size: the number of codes.
      d_model: D.
      name: name by which a training step finds the table; unique within a model.
      layout: `ways`, the devices that the rows will be spread over (any divisor of it works too); `cells`, the room for
        each pair of devices in an exchange, as a multiple of an even share of the ids; `dtype` of the stored rows
        (lookups return float32); `platform`, such as "tpu", where rows may share lines (`layers.tpu_lines`); None: the
        platform of the mesh in use, else JAX' default.
      rngs: key of the initial rows.

    Raises:
      ValueError: `size` is not positive, or more than int32 codes can name. Split the ids over several tables.
    """
    if not 0 < size <= tpu_lines.MOST_ROWS:
      raise ValueError(f"a table of {size} rows: codes are int32; spread the ids over several tables")
    p = tpu_lines.rows_per_line(d_model, layout.platform or sharding.platform())
    m = exchange.stripes(size, layout.ways * p)
    self.size, self.width, self.cells, self.extent = size, d_model, layout.cells, exchange.Extent(size, m)
    value = initial_rows(rngs.params(), size, m, p, d_model, jnp.dtype(layout.dtype))
    self.rows = TableRows(value, logical=(None, "rows", None), table=name, size=size, width=d_model)

  def __call__(self, codes: jax.Array) -> jax.Array:
    """Looks up `codes [B, ...]`: float32 `[B, ..., D]`; 0 for absent codes and codes outside [0, size).

    While the rows are `Fetched`, only codes that were fetched are found. The gradient with respect to the whole rows
    has the table's size.
    """
    value = self.rows.get_value()
    if isinstance(value, Fetched):
      return look_up(value, codes, self.extent)
    return _look_up_all(value, codes, self.extent, self.cells)

  def natural(self) -> jax.Array:
    """Returns all rows in the order of their codes, `[size, D]`: a copy on every device, for small tables and tests."""
    return self.rows.get_value().reshape(-1, self.width)[: self.size]


def initial_rows(key: jax.Array, size: int, m: int, p: int, d_model: int, dtype: jnp.dtype) -> jax.Array:
  """Returns normal rows of length about 1, `[G, M / p, p·D]`; 0 for the codes 0 and 1, and beyond `size`.

  They are made in place, some at a time, so that memory holds no second array of the table's size.
  """
  groups = -(-size // m)
  step = max(1, min(groups, _CREATED_AT_ONCE // m))

  def row(code: jax.Array) -> jax.Array:
    vector = jax.random.normal(jax.random.fold_in(key, code), (d_model,)) * d_model**-0.5
    return jnp.where((code > 1) & (code < size), vector, 0.0).astype(dtype)

  def fill(i: jax.Array, rows: jax.Array) -> jax.Array:
    first = jnp.minimum(i * step, groups - step)  # the last ones may overlap the ones before
    code = (first * m + jnp.arange(step * m, dtype=jnp.int32)).reshape(step, m)
    made = jax.vmap(jax.vmap(row))(code).reshape(step, *rows.shape[1:])
    return jax.lax.dynamic_update_slice(rows, made, (first, 0, 0))

  return jax.lax.fori_loop(0, -(-groups // step), fill, jnp.zeros((groups, m // p, p * d_model), dtype))


def distinct_codes(codes: jax.Array, extent: exchange.Extent) -> tuple[jax.Array, jax.Array]:
  """Returns the places of each device's distinct codes among `codes [B, n]`, and the number of codes out of range.

  Returns: int32 `[S·U]`, the places of the codes' rows; and int32 `[S]`.
  """
  ways = sharding.ways("rows") // sharding.ways("batch")
  room = min(codes.size // sharding.ways("batch"), extent.size)
  room = -(-room // ways) * ways  # so that devices that share rows of the batch can divide the ids
  local = functools.partial(exchange.distinct_places, extent=extent, room=room)
  return sharding.on_shards(local, (("batch", None),), (("batch",), ("batch",)), codes)


def fetch(rows: jax.Array, place: jax.Array, extent: exchange.Extent, cells: float = CELLS) -> Fetched:
  """Fetches the rows at `place [S·U]`, as `distinct_codes` returns them, from the `rows` of a table of that extent."""
  local = functools.partial(exchange.fetch_on_device, rows_here=extent.rows_here, factor=cells)
  found = sharding.on_shards(local, ((None, "rows", None), ("rows",)), ("rows", None), rows, place)
  return Fetched(place, sharding.constrain(found.astype(jnp.float32), "batch", None))


def look_up(fetched: Fetched, codes: jax.Array, extent: exchange.Extent) -> jax.Array:
  """Returns the fetched rows of `codes [B, ...]`: `[B, ..., D]`; 0 for codes that were not fetched."""
  names = ("batch", *(None for _ in codes.shape[1:]))
  local = functools.partial(exchange.look_up_on_device, extent=extent)
  inputs = ("batch",), ("batch", None), names
  return sharding.on_shards(local, inputs, (*names, None), fetched.place, fetched.rows, codes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up_all(rows: jax.Array, codes: jax.Array, extent: exchange.Extent, cells: float) -> jax.Array:
  return _look_up_all_forward(rows, codes, extent, cells)[0]


def _look_up_all_forward(
  rows: jax.Array, codes: jax.Array, extent: exchange.Extent, cells: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  place, _ = distinct_codes(codes.reshape(len(codes), -1), extent)
  return look_up(fetch(rows, place, extent, cells), codes, extent), (rows, place, codes)


def _look_up_all_backward(
  extent: exchange.Extent, cells: float, saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
  rows, place, codes = saved
  none = jnp.zeros((len(place), gradient.shape[-1]))
  _, transpose = jax.vjp(lambda found: look_up(Fetched(place, found), codes, extent), none)
  # Enough cells for all ids, because gradients without a cell are not counted here.
  touched = collect(rows, place, transpose(gradient)[0], float(sharding.ways("rows")))
  return scattered(rows, touched), None


_look_up_all.defvjp(_look_up_all_forward, _look_up_all_backward)


def collect(rows: jax.Array, place: jax.Array, gradient: jax.Array, cells: float = CELLS) -> exchange.Touched:
  """Sends the gradients `[S·U, D]` of the rows fetched at `place [S·U]` to the rows' owners, and sums them there.

  Returns: `Touched`, with rows as their owners number them: `row [W·n]`, `gradient [W·n, D]`, `lost [W]`.
  """
  here = rows.size // gradient.shape[-1] // sharding.ways("rows")

  def local(place: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(exchange.collect_on_device(place, gradient, here, cells))

  flat = ("rows", None)
  outputs = (("rows",), flat, ("rows",))
  return exchange.Touched(*sharding.on_shards(local, (("rows",), flat), outputs, place, gradient))


def scattered(rows: jax.Array, touched: exchange.Touched) -> jax.Array:
  """Returns the gradients of all rows, laid out as `rows`; 0 for rows without a gradient."""

  def local(rows: jax.Array, row: jax.Array, gradient: jax.Array) -> jax.Array:
    empty = jnp.zeros_like(rows).reshape(-1, rows.shape[-1])
    return tpu_lines.put_rows(empty, row, gradient.astype(rows.dtype)).reshape(rows.shape)

  names = (None, "rows", None)
  return sharding.on_shards(local, (names, ("rows",), ("rows", None)), names, rows, touched.row, touched.gradient)
