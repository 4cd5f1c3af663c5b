"""Sends ids to the devices that own their rows of an embedding table, and rows back to the ids' devices.

A table of R rows and width D is an array `[G, M, D]`. The row of code r lies at `[r // M, r % M]`, which is natural
order, and the M *stripes* are spread over the W devices. So codes that are about equally frequent go to different
owners, the array does not depend on W, and it grows at its end. On TPUs p rows may share a line, `[G, M / p, p·D]`: the
same numbers in the same order (see `layers.tpu_lines`).

A row's *place* counts the rows of the first device, then the rows of the second, and so on. The ids of a batch are
sorted by place, so that ids of one owner are adjacent. Gathers then fill and empty the cells, without another sort.

The exchange runs inside `sharding.on_shards` and sends a fixed number of cells: each device has C cells for each owner.
Ids without a cell travel in a further round (`fetch_on_device`); gradients without a cell are lost, and counted
(`collect_on_device`).

Source: rows sharded by row and exchanged by all-to-all, as in arXiv 1906.00091.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supermoe_jax import sharding
from supermoe_jax.layers.expert_buffer import ascending
from supermoe_jax.layers.tpu_lines import NONE, rows_at, take_rows

# Fewest stripes of a table; most stripes, unless the mesh needs more; fewest rows per stripe with more than the fewest.
LEAST_STRIPES, MOST_STRIPES, LEAST_ROWS = 8, 4096, 8


def stripes(rows: int, ways: int) -> int:
  """Returns M for a table of `rows` rows over `ways` devices: a multiple of `ways` and 8, with little padding."""
  m = math.lcm(ways, LEAST_STRIPES)
  while 2 * m <= MOST_STRIPES and 2 * m * LEAST_ROWS <= rows:
    m *= 2
  return m


def restriped(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns `value [G, M, ...]`, which has one entry per row, laid out as `shape`.

  `shape` may have other stripes, other lines, or more rows; the additional rows are 0.
  """
  width = math.gcd(*(math.prod(s[2:]) for s in (value.shape, shape)))  # of a row, if only one layout shares lines
  flat = value.reshape(-1, width)
  rows = math.prod(shape) // width
  return jnp.pad(flat, ((0, max(rows - len(flat), 0)), (0, 0)))[:rows].reshape(shape)


class Extent(NamedTuple):
  """Extent of a table: `size` codes, in M `stripes`."""

  size: int
  stripes: int

  @property
  def shape(self) -> tuple[int, int]:
    """Returns G and M."""
    return -(-self.size // self.stripes), self.stripes

  @property
  def rows_here(self) -> int:
    """Returns the number of rows on a device, including rows that only fill it up."""
    return math.prod(self.shape) // sharding.ways("rows")

  def places(self, code: jax.Array) -> jax.Array:
    """Returns the places of the rows of codes, int32; `NONE` for code 0 (absent) and for codes outside [0, size)."""
    if sharding.ways("rows") == 1:
      return jnp.where((code > 0) & (code < self.size), code, NONE)
    here = self.stripes // sharding.ways("rows")
    place = code % self.stripes // here * self.rows_here + code // self.stripes * here + code % here
    return jnp.where((code > 0) & (code < self.size), place, NONE)


def distinct_places(codes: jax.Array, extent: Extent, room: int) -> tuple[jax.Array, jax.Array]:
  """Returns the sorted places of a device's distinct codes, and the number of codes out of range.

  `room` must be enough for all codes or all rows, whichever are fewer.

  Returns: int32 `[room]`, the places filled up with `NONE`; and int32 `[1]`, the number of codes out of range.
  """
  flat = codes.reshape(-1)
  ordered = ascending(extent.places(flat))
  before = jnp.concatenate([jnp.full_like(ordered[:1], -1), ordered[:-1]])
  first = (ordered != before) & (ordered != NONE)
  index = jnp.where(first, jnp.cumsum(first) - 1, room)
  found = jnp.full_like(ordered, NONE, shape=room).at[index].set(ordered, mode="drop")
  return found, jnp.sum((flat < 0) | (flat >= extent.size), dtype=jnp.int32)[None]


def look_up_on_device(place: jax.Array, rows: jax.Array, codes: jax.Array, extent: Extent) -> jax.Array:
  """Returns the rows of `codes [...]` from the fetched `rows [U, D]`, whose sorted places are `place [U]`.

  A code that was not fetched gets 0.
  """
  if not len(place):
    return jnp.zeros((*codes.shape, rows.shape[-1]), rows.dtype)
  wanted = extent.places(codes)
  index = jnp.minimum(jnp.searchsorted(place, wanted), len(place) - 1)
  return rows_at(rows, index, (place[index] == wanted) & (wanted != NONE))


def cells(ids: int, rows_here: int, factor: float) -> int:
  """Returns C for `ids` ids on a device: `factor` times their even share, at most as many as can occur.

  Chance varies a small share more, so C leaves room for six standard deviations.
  """
  share = ids / sharding.ways("rows")
  return max(1, min(ids, rows_here, math.ceil(max(factor * share, share + 6 * math.sqrt(share)))))


def _exchange(buffer: jax.Array) -> jax.Array:
  """Sends part w of `[W, C, ...]` to device w, and returns the parts received from each device.

  The exchange goes along one mesh axis after the other. A device then talks only to the devices of its row and its
  column, not to all W, in messages that are longer in proportion. Each byte travels once per axis. Over 256 chips of
  v5e XLA takes half a minute to route an all-to-all between all devices, every time that a program holds one.
  """
  axes = [a for a in sharding.axes("rows") if jax.lax.axis_size(a) > 1]
  parts = buffer.reshape(*map(jax.lax.axis_size, axes), *buffer.shape[1:])
  for i, axis in enumerate(axes):
    parts = jax.lax.all_to_all(parts, axis, split_axis=i, concat_axis=i, tiled=True)
  return parts.reshape(buffer.shape)


class _Cells(NamedTuple):
  """Assignment of U ids, sorted by place, to the cells in which they travel.

  Attributes:
    cells: C, for each pair of devices.
    start: int32 `[W]`, the index of the first id of each owner.
    load: int32 `[W]`, the number of ids of each owner.
    rows_here: rows on a device.
  """

  cells: int
  start: jax.Array
  load: jax.Array
  rows_here: int

  @classmethod
  def of(cls, place: jax.Array, rows_here: int, factor: float) -> _Cells:
    """Returns the cells for the sorted `place [U]`."""
    edges = jnp.arange(sharding.ways("rows") + 1, dtype=jnp.int32) * rows_here
    bounds = jnp.searchsorted(place, edges).astype(jnp.int32)
    return cls(cells(len(place), rows_here, factor), bounds[:-1], jnp.diff(bounds), rows_here)

  def ids(self, round_: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Returns the index of the id in each cell of a round, `[W, C]`, and whether the cell holds one."""
    rank = round_ * self.cells + jnp.arange(self.cells, dtype=jnp.int32)
    return self.start[:, None] + rank, rank < self.load[:, None]

  def rows(self, place: jax.Array, round_: jax.Array | int) -> jax.Array:
    """Returns the row that each cell asks for, `[W, C]`, as the owner numbers its rows; `NONE` for an empty cell."""
    index, there = self.ids(round_)
    first = jnp.arange(len(self.start), dtype=jnp.int32)[:, None] * self.rows_here
    return jnp.where(there, jnp.take(place, index, mode="clip") - first, NONE)


def fetch_on_device(table: jax.Array, place: jax.Array, rows_here: int, factor: float) -> jax.Array:
  """Returns the rows of ids at sorted `place [U]`, whichever device owns them: `[U, D]`, 0 for `NONE`.

  `table` is this device's part, of `rows_here` rows. A round exchanges `factor` times an even share of the ids. There
  are as many rounds as the fullest pair of devices needs, almost always one.
  """
  lines, width = table.reshape(-1, table.shape[-1]), table.size // rows_here
  if not len(place):
    return jnp.zeros((0, width), table.dtype)
  if sharding.ways("rows") == 1:
    return take_rows(lines, place, place != NONE, width)
  plan = _Cells.of(place, rows_here, factor)
  c, sent = plan.cells, place != NONE
  owner = jnp.where(sent, place // rows_here, 0)
  rank = jnp.arange(len(place), dtype=jnp.int32) - plan.start[owner]

  def one(round_: jax.Array, found: jax.Array) -> jax.Array:
    asked = _exchange(plan.rows(place, round_))
    back = _exchange(take_rows(lines, asked, asked != NONE, width)).reshape(-1, width)
    now = sent & (rank // c == round_)
    return jnp.where(now[:, None], jnp.take(back, owner * c + rank % c, axis=0, mode="clip"), found)

  rounds = jax.lax.pmax(jnp.max((plan.load + c - 1) // c), sharding.axes("rows"))
  nothing = jnp.where(sent[:, None], 0, lines[:1, :width] * 0).astype(lines.dtype)  # varies over devices as the rows do
  return jax.lax.fori_loop(0, rounds, one, nothing)


class Touched(NamedTuple):
  """Rows of a device that have a gradient, each row once.

  Attributes:
    row: int32 `[n]`, ascending row numbers of this device, then `NONE`.
    gradient: float32 `[n, D]`, summed over all devices that asked for the row.
    lost: int32 `[1]`, the number of this device's ids whose gradients found no cell.
  """

  row: jax.Array
  gradient: jax.Array
  lost: jax.Array


def collect_on_device(place: jax.Array, gradient: jax.Array, rows_here: int, factor: float) -> Touched:
  """Sends the gradients `[U, D]` of ids at sorted `place [U]` to the owners of their rows, and sums them there.

  Each id occurs once on its device. Each device holds `rows_here` rows; `factor` is as for `fetch_on_device`.
  """
  if sharding.ways("rows") == 1 or not len(place):
    return Touched(place, gradient, jnp.zeros_like(place, shape=1))
  plan = _Cells.of(place, rows_here, factor)
  index, there = plan.ids(0)
  row = _exchange(plan.rows(place, 0)).reshape(-1)
  part = _exchange(rows_at(gradient, index, there)).reshape(-1, gradient.shape[-1])
  row, order = jax.lax.sort((row, jnp.arange(len(row), dtype=jnp.int32)), num_keys=1, is_stable=False)
  part = part[order]
  first = row != jnp.concatenate([jnp.full_like(row[:1], -1), row[:-1]])
  group = jnp.cumsum(first) - 1
  total = jnp.zeros_like(part).at[group].add(part, indices_are_sorted=True)
  each = jnp.full_like(row, NONE).at[group].set(row, indices_are_sorted=True)
  return Touched(each, total, jnp.sum(jnp.maximum(plan.load - plan.cells, 0), dtype=jnp.int32)[None])
