"""Carrying ids to the devices that own their rows, and rows back: the traffic of a table, on each device's part.

A table of R rows and width D is an array `[G, M, D]`: the row of code r lies at `[r // M, r % M]`, which is natural
order, and the M *stripes* are spread over the W devices. So neighbouring codes, which are about equally frequent, go to
different owners; the array does not depend on W; and it grows at its end.

Everything here runs inside `sharding.on_shards`, and sends cells of fixed size: each device has C for each owner. Ids
that find no cell travel in a further round (`fetch`); gradients that find none are counted (`collect`).

Source: rows sharded by row and exchanged by all-to-all, as in arXiv 1906.00091.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supermoe_jax import sharding
from supermoe_jax.layers import slots

# Stands for no code, and for no row: larger than any.
NONE = jnp.iinfo(jnp.int32).max

# Fewest stripes of a table, and most of one for which no larger mesh asks; fewest rows of a stripe beyond the fewest.
LEAST_STRIPES, MOST_STRIPES, LEAST_ROWS = 8, 4096, 8


def stripes(rows: int, ways: int) -> int:
  """Returns M for a table of `rows` rows over `ways` devices: a multiple of `ways` and 8, with little padding."""
  m = math.lcm(ways, LEAST_STRIPES)
  while 2 * m <= MOST_STRIPES and 2 * m * LEAST_ROWS <= rows:
    m *= 2
  return m


def restriped(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Lays `[G, M, ...]`, one entry a row, out as `shape`, of other stripes or more rows; entries that come anew: 0."""
  flat = value.reshape(-1, *value.shape[2:])
  rows = shape[0] * shape[1]
  more = max(rows - len(flat), 0)
  return jnp.pad(flat, ((0, more), *((0, 0) for _ in flat.shape[1:])))[:rows].reshape(shape)


def distinct(codes: jax.Array, rows: int, room: int) -> tuple[jax.Array, jax.Array]:
  """The different codes of a device, in order, then `NONE`: int32 `[room]`.

  Code 0, absent, is none of them; those outside [0, rows) are counted. `room` must hold what can come: all codes, or
  all rows.

  Returns: the codes, and how many were out of range, int32 `[1]`.
  """
  flat = codes.reshape(-1)
  outside = (flat < 0) | (flat >= rows)
  ordered = jnp.sort(jnp.where(outside | (flat == 0), NONE, flat))
  before = jnp.concatenate([jnp.full_like(ordered[:1], -1), ordered[:-1]])
  first = (ordered != before) & (ordered != NONE)
  place = jnp.where(first, jnp.cumsum(first) - 1, room)
  found = jnp.full_like(ordered, NONE, shape=room).at[place].set(ordered, mode="drop")
  return found, jnp.sum(outside, dtype=jnp.int32)[None]


def look_up(code: jax.Array, rows: jax.Array, codes: jax.Array) -> jax.Array:
  """The rows of `codes [...]` among those fetched, `code [U]` in order with `rows [U, D]`; 0 for any other code."""
  if not len(code):
    return jnp.zeros((*codes.shape, rows.shape[-1]), rows.dtype)
  place = jnp.minimum(jnp.searchsorted(code, codes), len(code) - 1)
  return rows_at(rows, place, code[place] == codes)


def rows_at(rows: jax.Array, index: jax.Array, there: jax.Array) -> jax.Array:
  """`rows[index]`, 0 where not `there`.

  By a product, which XLA:CPU fuses into a vectorised gather of several threads; a select takes four times as long.
  """
  return jnp.take(rows, index, axis=0, mode="clip") * there[..., None].astype(rows.dtype)


class _Cells(NamedTuple):
  """Where U ids go. `cells` C a pair of devices; `owner, rank, row [U]`: the owner, the place among the ids of the same
  owner, and the row there; `sent [U]`: whether there is an id; `load [W]`: the ids of each owner."""

  cells: int
  owner: jax.Array
  rank: jax.Array
  row: jax.Array
  sent: jax.Array
  load: jax.Array


def cells(ids: int, rows_here: int, factor: float) -> int:
  """Returns C for `ids` ids a device: `factor` times their even share, at most what can come.

  Where the share is small, chance varies it more: it gets six standard deviations.
  """
  share = ids / sharding.ways("rows")
  return max(1, min(ids, rows_here, math.ceil(max(factor * share, share + 6 * math.sqrt(share)))))


def _plan(code: jax.Array, m: int, rows_here: int, factor: float) -> _Cells:
  here = m // sharding.ways("rows")  # stripes of a device
  sent = code != NONE
  owner = jnp.where(sent, code % m // here, 0)
  ranked = slots.rank(owner[:, None], sent, sharding.ways("rows"))
  row = jnp.where(sent, code // m * here + code % here, NONE)
  return _Cells(cells(len(code), rows_here, factor), owner, ranked.rank[:, 0], row, sent, ranked.load)


def _exchange(buffer: jax.Array) -> jax.Array:
  """Sends part w of `[W, C, ...]` to device w, and returns what came from each."""
  return jax.lax.all_to_all(buffer, sharding.axes("rows"), split_axis=0, concat_axis=0, tiled=True)


def _to_cells(plan: _Cells, values: jax.Array, fill: int, round_: jax.Array | int) -> tuple[jax.Array, jax.Array]:
  """Puts `values [U, ...]` into cells `[W, C, ...]`, and tells each one's cell; W·C for none in this round."""
  ways, c = len(plan.load), plan.cells
  now = plan.sent & (plan.rank // c == round_)
  slot = jnp.where(now, plan.owner * c + plan.rank % c, ways * c)
  buffer = jnp.full_like(values, fill, shape=(ways * c, *values.shape[1:]))
  buffer = buffer.at[slot].set(values, mode="drop")
  return buffer.reshape(ways, c, *values.shape[1:]), slot


def fetch(table: jax.Array, code: jax.Array, m: int, factor: float) -> jax.Array:
  """The rows of ids `code [U]`, wherever they lie: `[U, D]`, 0 for `NONE`.

  `table [G, M / W, D]` is this device's part of a table of `m` stripes. A round exchanges `factor` times an even share
  of the ids; there are as many as the fullest pair of devices needs, almost always one.
  """
  rows = table.reshape(-1, table.shape[-1])
  if not len(code):
    return rows[:0]
  if sharding.ways("rows") == 1:
    return rows_at(rows, code, code != NONE)
  plan = _plan(code, m, len(rows), factor)

  def one(round_: jax.Array, found: jax.Array) -> jax.Array:
    wanted, slot = _to_cells(plan, plan.row, NONE, round_)
    asked = _exchange(wanted)
    back = _exchange(rows_at(rows, asked, asked != NONE)).reshape(-1, rows.shape[-1])
    return jnp.where((slot < len(back))[:, None], jnp.take(back, slot, axis=0, mode="clip"), found)

  rounds = jax.lax.pmax(jnp.max((plan.load + plan.cells - 1) // plan.cells), sharding.axes("rows"))
  nothing = jnp.where(plan.sent[:, None], 0, rows[:1] * 0).astype(rows.dtype)  # varies over the devices as rows do
  return jax.lax.fori_loop(0, rounds, one, nothing)


class Touched(NamedTuple):
  """The rows of a device that have a gradient: each row once.

  Attributes:
    row: int32 `[n]`, rows of this device in order, then `NONE`.
    gradient: float32 `[n, D]`, summed over all that asked for the row.
    lost: int32 `[1]`, ids of this device whose gradients found no cell.
  """

  row: jax.Array
  gradient: jax.Array
  lost: jax.Array


def collect(code: jax.Array, gradient: jax.Array, rows_here: int, m: int, factor: float) -> Touched:
  """Brings the gradients `[U, D]` of ids `code [U]`, each once on its device, to their owners and sums them there.

  Each device holds `rows_here` rows of the table of `m` stripes; `factor` is as for `fetch`.
  """
  if sharding.ways("rows") == 1:
    return Touched(code, gradient, jnp.zeros_like(code, shape=1))
  plan = _plan(code, m, rows_here, factor)
  rows, _ = _to_cells(plan, plan.row, NONE, 0)
  parts, _ = _to_cells(plan, gradient, 0, 0)
  row, part = _exchange(rows).reshape(-1), _exchange(parts).reshape(-1, gradient.shape[-1])
  order = jnp.argsort(row)
  row, part = row[order], part[order]
  first = row != jnp.concatenate([jnp.full_like(row[:1], -1), row[:-1]])
  group = jnp.cumsum(first) - 1
  total = jnp.zeros_like(part).at[group].add(part, indices_are_sorted=True)
  each = jnp.full_like(row, NONE).at[group].set(row, indices_are_sorted=True)
  return Touched(each, total, jnp.sum(plan.sent & (plan.rank >= plan.cells), dtype=jnp.int32)[None])
