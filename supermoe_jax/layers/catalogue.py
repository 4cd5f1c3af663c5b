"""Scores states against all rows of a table, a chunk of rows at a time, for full softmax and full ranking.

The rows of a table are spread over W devices. At each step every device sends some of its rows to all devices, and each
device scores its own states against them. No device ever holds the whole table or the whole matrix `[states, items]`.
The table travels once per pass, whatever the number of states. Gradients of rows travel only to the rows' owners.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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


def _places(codes: jax.Array, i: jax.Array, here: int, m: int, step: int) -> tuple[jax.Array, jax.Array]:
  """Returns where codes lie in the i-th chunk of all devices, and whether they lie there; code 0 lies nowhere."""
  stripes = m // sharding.ways("rows")
  place = codes // m * stripes + codes % stripes - _first(i, here, step)  # on the owner of the row
  there = (place >= 0) & (place < step) & (codes > 0)
  return jnp.where(there, codes % m // stripes * step + place, 0), there


def _among(part: _RowChunk, codes: jax.Array, i: jax.Array, here: int, m: int, step: int) -> jax.Array:
  """Returns whether each row of the i-th chunk is one of the n states' `codes [n, k]`: bool `[n, chunk]`."""
  place, there = _places(codes, i, here, m, step)
  # As bits of words: an array of n·chunk flags is made once, not k times.
  flag = jnp.where(there, jnp.uint32(1) << (place % 32).astype(jnp.uint32), jnp.uint32(0))
  lane = jnp.arange(-(-len(part.code) // 32))
  words = jnp.zeros((len(codes), len(lane)), jnp.uint32)
  for k in range(codes.shape[1]):
    words |= jnp.where(place[:, k, None] // 32 == lane, flag[:, k, None], jnp.uint32(0))
  words = jax.lax.optimization_barrier(words)  # else XLA fuses, and makes a word anew for each of its bits
  bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
  return (bits.reshape(len(codes), -1)[:, : len(part.code)] > 0) & (part.code > 0)


def _flat(rows: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
  return rows.reshape(-1, rows.shape[-1]), bias.reshape(-1)


# -------------------------------------------------------------------------------------------------------- full softmax


def cross_entropy(state: jax.Array, target: jax.Array, catalogue: Catalogue, chunk: int = CHUNK) -> jax.Array:
  """Returns `logsumexp over items − logsumexp over the targets`, float32 `[B, ...]`: −log P(any of the targets).

  `state` is `[B, ..., D]`, and `target [B, ..., m]`, or `[B, ...]` for one each, holds codes, 0 for none; a code that
  occurs twice counts once. Where no target is an item, the result is the logsumexp over items. The gradient with
  respect to the rows is as large as the rows.
  """
  target = target if target.ndim == state.ndim else target[..., None]
  shape, m = target.shape[:-1], target.shape[-1]
  state, target = state.reshape(shape[0], -1, state.shape[-1]), target.reshape(shape[0], -1, m)
  # Pads the sites of a row, so that devices that share rows of the batch can divide the sites evenly.
  missing = -target.shape[1] % (sharding.ways("rows") // sharding.ways("batch"))
  state = jnp.pad(state, ((0, 0), (0, missing), (0, 0)))
  target = jnp.pad(target, ((0, 0), (0, missing), (0, 0)))
  flat = state.reshape(-1, state.shape[-1]), target.reshape(-1, m)
  loss = _cross_entropy(*flat, catalogue.rows, catalogue.bias, catalogue.size, chunk)
  loss = sharding.constrain(loss, "batch").reshape(target.shape[:-1])
  return loss[:, : loss.shape[1] - missing].reshape(shape)


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

  def local(state: jax.Array, target: jax.Array, rows: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
    rows, bias = _flat(rows, bias)

    def more(sums: tuple[jax.Array, jax.Array], scores: jax.Array) -> tuple[jax.Array, jax.Array]:
      top, total = sums
      higher = jnp.maximum(top, jnp.max(scores, axis=1))
      safe = jnp.where(jnp.isfinite(higher), higher, 0.0)
      return higher, total * jnp.exp(top - safe) + jnp.sum(jnp.exp(scores - safe[:, None]), axis=1)

    def add(i: jax.Array, sums: tuple[Any, Any]) -> tuple[Any, Any]:
      part = _row_chunk(rows, bias, i, size, m, step)
      scores = _scores(state, part)
      right = _among(part, target, i, len(bias), m, step)
      return more(sums[0], scores), more(sums[1], jnp.where(right, scores, -jnp.inf))

    none = jnp.sum(state * 0, axis=1)  # zeros that vary over devices as the states do
    every, mine = jax.lax.fori_loop(0, parts, add, ((none - jnp.inf, none), (none - jnp.inf, none)))
    lse = every[0] + jnp.log(every[1])
    own = jnp.where(mine[1] > 0, mine[0] + jnp.log(jnp.where(mine[1] > 0, mine[1], 1.0)), -jnp.inf)
    return lse - jnp.where(mine[1] > 0, own, 0.0), lse, own

  names, outputs = (("rows", None), ("rows", None), _ROWS, _BIAS), (("rows",),) * 3
  loss, lse, own = sharding.on_shards(local, names, outputs, state, target, rows, bias)
  return loss, (state, target, rows, bias, lse, own)


def _cross_entropy_backward(
  size: int, chunk: int, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, None, jax.Array, jax.Array]:
  state, target, rows, bias, lse, own = saved
  _, step, parts = _chunk_sizes(Catalogue(rows, bias, size), chunk)
  m = bias.shape[1]

  def local(
    state: jax.Array,
    target: jax.Array,
    rows: jax.Array,
    bias: jax.Array,
    lse: jax.Array,
    own: jax.Array,
    gradient: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape, (flat, flat_bias) = rows.shape, _flat(rows, bias)

    def owners(x: jax.Array) -> jax.Array:
      return jax.lax.psum_scatter(x, sharding.axes("rows"), tiled=True) if sharding.ways("rows") > 1 else x

    def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      by_state, by_rows, by_bias = sums
      part = _row_chunk(flat, flat_bias, i, size, m, step)
      scores = _scores(state, part)
      there = _among(part, target, i, len(flat_bias), m, step)
      mine = jnp.where(there, jnp.exp(jnp.where(there, scores - own[:, None], 0.0)), 0.0)
      by_score = gradient[:, None] * (jnp.exp(scores - lse[:, None]) - mine)
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

  names = ("rows", None), ("rows", None), _ROWS, _BIAS, ("rows",), ("rows",), ("rows",)
  outputs = (("rows", None), _ROWS, _BIAS)
  by_state, by_rows, by_bias = sharding.on_shards(local, names, outputs, state, target, rows, bias, lse, own, gradient)
  return by_state, None, by_rows, by_bias


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


# ------------------------------------------------------------------------------------------------------------- ranking


def rank_codes(
  state: jax.Array, target: jax.Array, seen: jax.Array, catalogue: Catalogue, chunk: int = CHUNK
) -> jax.Array:
  """Returns the rank of each state's best target among all items, int32 `[n]`; 1 is best.

  A state has the targets `target [n, t]`, codes. The rank is that of the target with the highest score. Neither the
  other targets nor the codes `seen [n, m]` count against it. Every other item that does not score less does: one with
  an equal score, and one whose score is not a number. `seen` holds each code once and no target; 0 stands for none in
  both. Scores are products with `state [n, D]`; n must divide over all devices.

  One product scores all items. So rows that are equal score alike, whether or not one is the target or was seen. A
  first pass over the chunks finds the target's score, a second one compares; a single chunk needs one pass.
  """
  _, step, parts = _chunk_sizes(catalogue, chunk)
  m, passes = catalogue.bias.shape[1], min(parts, 2)

  def local(state: jax.Array, target: jax.Array, seen: jax.Array, rows: jax.Array, bias: jax.Array) -> jax.Array:
    rows, bias = _flat(rows, bias)

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      own, better = sums
      part = _row_chunk(rows, bias, i % parts, catalogue.size, m, step)
      scores = _scores(state, part)
      mine = _among(part, target, i % parts, len(bias), m, step)
      best = jnp.max(jnp.where(mine, scores, -jnp.inf), axis=1)  # not a number if one of the scores is none
      own = jnp.where(i < parts, jnp.maximum(own, best), own)
      ahead = ~(scores < own[:, None]) & ~mine & (part.code > 0)
      place, there = _places(seen, i % parts, len(bias), m, step)
      hidden = jnp.take_along_axis(ahead, place, axis=1) & there
      count = jnp.sum(ahead, axis=1, dtype=jnp.int32) - jnp.sum(hidden, axis=1, dtype=jnp.int32)
      return own, better + jnp.where(i >= (passes - 1) * parts, count, 0)

    # What the loop carries varies over devices as the states do.
    return jax.lax.fori_loop(0, passes * parts, add, (state[:, 0] * 0 - jnp.inf, jnp.ones_like(target[:, 0])))[1]

  names = ("rows", None), ("rows", None), ("rows", None), _ROWS, _BIAS
  return sharding.on_shards(local, names, ("rows",), state, target, seen, catalogue.rows, catalogue.bias)
