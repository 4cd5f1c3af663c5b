"""Scores states against all rows of a table, a chunk of rows at a time, for full softmax and full ranking.

The rows of a table are spread over W devices. At each step every device sends some of its rows to all devices, and each
device scores its own states against them. No device ever holds the whole table or the whole matrix `[states, items]`.
The table travels once per pass, whatever the number of states. Gradients of rows travel only to the rows' owners.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supermoe_jax import sharding
from supermoe_jax.layers import exchange

# Rows scored at a time, on all devices together.
CHUNK = 8192

_ROWS, _BIAS = (None, "rows", None), (None, "rows")


class Catalogue(NamedTuple):
  """Items that states are scored against: the codes from 2 on, so that item i is code i + 2.

  Attributes:
    rows: `[G, M / p, p·D]`, the rows of an `EmbeddingTable`.
    bias: float32 `[G, M]`, one per row.
    size: number of codes of the table, including absent and out of vocabulary.
  """

  rows: jax.Array
  bias: jax.Array
  size: int

  @classmethod
  def of(cls, vectors: jax.Array, bias: jax.Array | None = None, ways: int = 1) -> Catalogue:
    """Returns a catalogue of `vectors [items, D]` and optional `bias [items]`, for a mesh of `ways` devices."""
    size = len(vectors) + 2
    m = exchange.stripes(size, ways)
    groups = -(-size // m)
    padding = (2, groups * m - size)
    rows = jnp.pad(jnp.asarray(vectors), (padding, (0, 0))).reshape(groups, m, -1)
    scores = jnp.zeros(len(vectors)) if bias is None else jnp.asarray(bias)
    return cls(rows, jnp.pad(scores, padding).reshape(groups, m), size)


class _RowChunk(NamedTuple):
  """Chunk of rows that all devices score at a time: `rows [n, D]`, `bias [n]`, and `code [n]`, 0 for rows to ignore."""

  rows: jax.Array
  bias: jax.Array
  code: jax.Array


def _first(i: jax.Array, here: int, step: int) -> jax.Array:
  return jnp.minimum(i * step, here - step)  # the last chunk may overlap the one before


def _chunk_sizes(catalogue: Catalogue, chunk: int) -> tuple[int, int, int]:
  """Returns the number of rows on a device, the number of these in a chunk, and the number of chunks."""
  here, p = catalogue.bias.size // sharding.ways("rows"), catalogue.bias.shape[1] // catalogue.rows.shape[1]
  step = max(p, min(here, chunk // sharding.ways("rows")) // p * p)  # whole lines
  return here, step, -(-here // step)


def _row_chunk(rows: jax.Array, bias: jax.Array, i: jax.Array, size: int, m: int, step: int) -> _RowChunk:
  """Returns the i-th chunk, gathered from all devices; `rows [n / p, p·D]` and `bias [n]` are this device's."""
  ways = sharding.ways("rows")
  first, p = _first(i, len(bias), step), len(bias) // len(rows)
  index = first + jnp.arange(step, dtype=jnp.int32)
  stripes = m // ways
  code = index // stripes * m + jnp.arange(ways, dtype=jnp.int32)[:, None] * stripes + index % stripes
  code = jnp.where((index >= i * step) & (code > 1) & (code < size), code, 0)
  mine = jax.lax.dynamic_slice_in_dim(rows, first // p, step // p), jax.lax.dynamic_slice_in_dim(bias, first, step)
  if ways > 1:
    mine = tuple(jax.lax.all_gather(x, sharding.axes("rows"), tiled=True) for x in mine)
  return _RowChunk(mine[0].astype(jnp.float32).reshape(code.size, -1), mine[1], code.reshape(-1))


def _scores(state: jax.Array, part: _RowChunk) -> jax.Array:
  return jnp.where(part.code > 0, state @ part.rows.T + part.bias, -jnp.inf)


def _flat(rows: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
  return rows.reshape(-1, rows.shape[-1]), bias.reshape(-1)


# -------------------------------------------------------------------------------------------------------- full softmax


def cross_entropy(state: jax.Array, target: jax.Array, catalogue: Catalogue, chunk: int = CHUNK) -> jax.Array:
  """Returns `logsumexp over items − score of the target`, float32 `[B, ...]`.

  `state` is `[B, ..., D]`, and `target [B, ...]` holds codes. Where the target is no item, the result is the logsumexp.
  The gradient with respect to the rows is as large as the rows.
  """
  shape = target.shape
  state, target = state.reshape(shape[0], -1, state.shape[-1]), target.reshape(shape[0], -1)
  # Pads the sites of a row, so that devices that share rows of the batch can divide the sites evenly.
  missing = -target.shape[1] % (sharding.ways("rows") // sharding.ways("batch"))
  state = jnp.pad(state, ((0, 0), (0, missing), (0, 0)))
  target = jnp.pad(target, ((0, 0), (0, missing)))
  flat = state.reshape(-1, state.shape[-1]), target.reshape(-1)
  loss = _cross_entropy(*flat, catalogue.rows, catalogue.bias, catalogue.size, chunk)
  loss = sharding.constrain(loss, "batch").reshape(target.shape)
  return loss[:, : target.shape[1] - missing].reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
  state: jax.Array, target: jax.Array, rows: jax.Array, bias: jax.Array, size: int, chunk: int
) -> jax.Array:
  return _cross_entropy_forward(state, target, rows, bias, size, chunk)[0]


def _cross_entropy_forward(
  state: jax.Array, target: jax.Array, rows: jax.Array, bias: jax.Array, size: int, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  _, step, parts = _chunk_sizes(Catalogue(rows, bias, size), chunk)
  m = bias.shape[1]

  def local(state: jax.Array, target: jax.Array, rows: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, bias = _flat(rows, bias)

    def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      top, total, own = sums
      part = _row_chunk(rows, bias, i, size, m, step)
      scores = _scores(state, part)
      higher = jnp.maximum(top, jnp.max(scores, axis=1))
      safe = jnp.where(jnp.isfinite(higher), higher, 0.0)
      total = total * jnp.exp(top - safe) + jnp.sum(jnp.exp(scores - safe[:, None]), axis=1)
      mine = (part.code == target[:, None]) & (part.code > 0)
      return higher, total, own + jnp.sum(jnp.where(mine, scores, 0.0), axis=1)

    none = jnp.sum(state * 0, axis=1)  # zeros that vary over devices as the states do
    top, total, own = jax.lax.fori_loop(0, parts, add, (none - jnp.inf, none, none))
    lse = top + jnp.log(total)
    return lse - own, lse

  names = ("rows", None), ("rows",), _ROWS, _BIAS
  loss, lse = sharding.on_shards(local, names, (("rows",), ("rows",)), state, target, rows, bias)
  return loss, (state, target, rows, bias, lse)


def _cross_entropy_backward(
  size: int, chunk: int, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, None, jax.Array, jax.Array]:
  state, target, rows, bias, lse = saved
  _, step, parts = _chunk_sizes(Catalogue(rows, bias, size), chunk)
  m = bias.shape[1]

  def local(
    state: jax.Array, target: jax.Array, rows: jax.Array, bias: jax.Array, lse: jax.Array, gradient: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape, (flat, flat_bias) = rows.shape, _flat(rows, bias)

    def owners(x: jax.Array) -> jax.Array:
      return jax.lax.psum_scatter(x, sharding.axes("rows"), tiled=True) if sharding.ways("rows") > 1 else x

    def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      by_state, by_rows, by_bias = sums
      part = _row_chunk(flat, flat_bias, i, size, m, step)
      p = jnp.exp(_scores(state, part) - lse[:, None])
      mine = (part.code == target[:, None]) & (part.code > 0)
      by_score = gradient[:, None] * (p - mine)
      first = _first(i, len(flat_bias), step)
      per_line = len(flat_bias) // len(flat)
      line = first // per_line
      there = jax.lax.dynamic_slice_in_dim(by_rows, line, step // per_line)
      there = there + owners(by_score.T @ state).astype(rows.dtype).reshape(there.shape)
      by_rows = jax.lax.dynamic_update_slice_in_dim(by_rows, there, line, 0)
      there = jax.lax.dynamic_slice_in_dim(by_bias, first, step) + owners(jnp.sum(by_score, axis=0))
      by_bias = jax.lax.dynamic_update_slice_in_dim(by_bias, there, first, 0)
      return by_state + by_score @ part.rows, by_rows, by_bias

    by_state, by_rows, by_bias = jax.lax.fori_loop(0, parts, add, (state * 0, flat * 0, flat_bias * 0))
    return by_state, by_rows.reshape(shape), by_bias.reshape(bias.shape)

  names = ("rows", None), ("rows",), _ROWS, _BIAS, ("rows",), ("rows",)
  outputs = (("rows", None), _ROWS, _BIAS)
  by_state, by_rows, by_bias = sharding.on_shards(local, names, outputs, state, target, rows, bias, lse, gradient)
  return by_state, None, by_rows, by_bias


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


# ------------------------------------------------------------------------------------------------------------- ranking


def rank_codes(
  state: jax.Array, target: jax.Array, seen: jax.Array, catalogue: Catalogue, chunk: int = CHUNK
) -> jax.Array:
  """Returns the rank of the code `target [n]` among all items but the codes `seen [n, m]`: int32 `[n]`, 1 is best.

  The scores are against `state [n, D]`; n must divide over all devices. Every item that does not score less counts
  against the target: one with an equal score, and one whose score is not a number. `seen` holds each code once, and 0
  for none.

  One product scores all items. So rows that are equal score alike, whether or not one is the target or was seen. A
  first pass over the chunks finds the target's score, a second one compares; a single chunk needs one pass.
  """
  _, step, parts = _chunk_sizes(catalogue, chunk)
  m, passes = catalogue.bias.shape[1], min(parts, 2)

  def local(state: jax.Array, target: jax.Array, seen: jax.Array, rows: jax.Array, bias: jax.Array) -> jax.Array:
    rows, bias = _flat(rows, bias)
    stripes = m // sharding.ways("rows")
    index = seen // m * stripes + seen % stripes  # of the row on its device
    owner = seen % m // stripes

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      own, better = sums
      part = _row_chunk(rows, bias, i % parts, catalogue.size, m, step)
      scores = _scores(state, part)
      mine = (part.code == target[:, None]) & (part.code > 0)
      own = jnp.where(i < parts, own + jnp.sum(jnp.where(mine, scores, 0.0), axis=1), own)
      ahead = ~(scores < own[:, None]) & ~mine & (part.code > 0)
      place = index - _first(i % parts, len(bias), step)
      there = (place >= 0) & (place < step) & (seen > 0)
      hidden = jnp.take_along_axis(ahead, jnp.where(there, owner * step + place, 0), axis=1) & there
      count = jnp.sum(ahead, axis=1, dtype=jnp.int32) - jnp.sum(hidden, axis=1, dtype=jnp.int32)
      return own, better + jnp.where(i >= (passes - 1) * parts, count, 0)

    # A sum of each row starts at zeros that vary over devices as the states do.
    return jax.lax.fori_loop(0, passes * parts, add, (state[:, 0] * 0, jnp.ones_like(target)))[1]

  names = ("rows", None), ("rows",), ("rows", None), _ROWS, _BIAS
  return sharding.on_shards(local, names, ("rows",), state, target, seen, catalogue.rows, catalogue.bias)
