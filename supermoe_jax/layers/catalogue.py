"""Scores states against all rows of a table, a chunk of rows at a time; the full softmax. `catalogue_ranks` ranks.

The rows of a table are spread over W devices. At each step every device sends some of its rows to all devices, and each
device scores its own states against them. No device ever holds the whole table or the whole matrix `[states, items]`.
The table travels once per pass, whatever the number of states. Gradients of rows travel only to the rows' owners.

A score may add what a state remembers, `Σ gain_k · log(1 + count_k)` (`layers.memory.remembered`). The gains of K kinds
of counts are then the last K numbers of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from supermoe_jax import sharding
from supermoe_jax.layers import exchange

if TYPE_CHECKING:  # loaded only by a config that names a memory
  from supermoe_jax.layers.memory.remembered import Remembered

# Rows scored at a time, on all devices together.
CHUNK = 8192

ROWS, BIAS = (None, "rows", None), (None, "rows")


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


class RowChunk(NamedTuple):
  """Chunk of rows that all devices score at a time: `rows [n, D]`, `bias [n]`, and `code [n]`, 0 for rows to ignore."""

  rows: jax.Array
  bias: jax.Array
  code: jax.Array


class DeviceRows(NamedTuple):
  """The rows of one device, for use inside `sharding.on_shards`; all devices score a chunk of them at a time.

  Attributes:
    rows: `[n / p, p·D]`.
    bias: `[n]`.
    size: the number of codes of the catalogue.
    stripes: the stripes of this device.
    step: rows of each device in a chunk.
  """

  rows: jax.Array
  bias: jax.Array
  size: int
  stripes: int
  step: int

  @classmethod
  def of(cls, rows: jax.Array, bias: jax.Array, size: int, chunk: int) -> DeviceRows:
    """Returns the rows of a device's part of a catalogue, in chunks of about `chunk` rows of all devices."""
    here, p = bias.size, bias.shape[1] // rows.shape[1]
    step = max(p, min(here, chunk // sharding.ways("rows")) // p * p)  # whole lines
    return cls(rows.reshape(-1, rows.shape[-1]), bias.reshape(-1), size, bias.shape[1], step)

  @property
  def chunks(self) -> int:
    """Returns the number of chunks."""
    return -(-len(self.bias) // self.step)

  def first(self, i: jax.Array) -> jax.Array:
    """Returns the first row of the i-th chunk; the last chunk may overlap the one before."""
    return jnp.minimum(i * self.step, len(self.bias) - self.step)

  def chunk(self, i: jax.Array) -> RowChunk:
    """Returns the i-th chunk, gathered from all devices."""
    ways, p = sharding.ways("rows"), len(self.bias) // len(self.rows)
    first, m = self.first(i), self.stripes * sharding.ways("rows")
    index = first + jnp.arange(self.step, dtype=jnp.int32)
    own = jnp.arange(ways, dtype=jnp.int32)[:, None] * self.stripes
    code = index // self.stripes * m + own + index % self.stripes
    code = jnp.where((index >= i * self.step) & (code > 1) & (code < self.size), code, 0)
    rows = jax.lax.dynamic_slice_in_dim(self.rows, first // p, self.step // p)
    bias = jax.lax.dynamic_slice_in_dim(self.bias, first, self.step)
    if ways > 1:
      rows, bias = (jax.lax.all_gather(x, sharding.axes("rows"), tiled=True) for x in (rows, bias))
    return RowChunk(rows.astype(jnp.float32).reshape(code.size, -1), bias, code.reshape(-1))

  def places(self, codes: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where codes lie in the i-th chunk of all devices, and whether they lie there; code 0 lies nowhere."""
    m = self.stripes * sharding.ways("rows")
    place = codes // m * self.stripes + codes % self.stripes - self.first(i)  # on the owner of the row
    there = (place >= 0) & (place < self.step) & (codes > 0)
    return jnp.where(there, codes % m // self.stripes * self.step + place, 0), there

  def among(self, part: RowChunk, codes: jax.Array, i: jax.Array) -> jax.Array:
    """Returns whether each row of the i-th chunk is one of the n states' `codes [n, k]`: bool `[n, chunk]`."""
    place, there = self.places(codes, i)
    # As bits of words: an array of n·chunk flags is made once, not k times.
    flag = jnp.where(there, jnp.uint32(1) << (place % 32).astype(jnp.uint32), jnp.uint32(0))
    lane = jnp.arange(-(-len(part.code) // 32))
    words = jnp.zeros((len(codes), len(lane)), jnp.uint32)
    for k in range(codes.shape[1]):
      words |= jnp.where(place[:, k, None] // 32 == lane, flag[:, k, None], jnp.uint32(0))
    words = jax.lax.optimization_barrier(words)  # else XLA fuses, and makes a word anew for each of its bits
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (bits.reshape(len(codes), -1)[:, : len(part.code)] > 0) & (part.code > 0)

  def logs(self, remembered: Sequence[Remembered], part: RowChunk, i: jax.Array) -> list[jax.Array]:
    """Returns `log(1 + count)` of the i-th chunk's rows for each kind of counts, `[n, chunk]`."""
    width = len(part.code)
    found = (self.places(r.code, i) for r in remembered)
    return [r.logs_of_chunk(jnp.where(there, at, width), width) for r, (at, there) in zip(remembered, found)]


def scores_of_chunk(state: jax.Array, part: RowChunk, logs: Sequence[jax.Array]) -> jax.Array:
  """Returns the scores `[n, chunk]` of `state [n, D + K]`, with the `logs [n, chunk]` of K kinds of counts."""
  d = part.rows.shape[1]
  score = state[:, :d] @ part.rows.T + part.bias
  for k, log in enumerate(logs):
    score += state[:, d + k, None] * log
  return jnp.where(part.code > 0, score, -jnp.inf)


def cross_entropy(
  state: jax.Array,
  target: jax.Array,
  catalogue: Catalogue,
  chunk: int = CHUNK,
  remembered: tuple[Remembered, ...] = (),
) -> jax.Array:
  """Returns `logsumexp over items − logsumexp over the targets`, float32 `[B, ...]`: −log P(any of the targets).

  `state` is `[B, ..., D + K]`, and `target [B, ..., m]`, or `[B, ...]` for one each, holds codes, 0 for none; a code
  that occurs twice counts once. Where no target is an item, the result is the logsumexp over items. The K kinds of
  counts `remembered` have the sites of `state [B, S, D + K]`. The gradient with respect to the rows is as large as the
  rows; counts have none.
  """
  target = target if target.ndim == state.ndim else target[..., None]
  shape, m = target.shape[:-1], target.shape[-1]
  state, target = state.reshape(shape[0], -1, state.shape[-1]), target.reshape(shape[0], -1, m)
  # Pads the sites of a row, so that devices that share rows of the batch can divide the sites evenly.
  sites = state.shape[1]
  padding = (0, 0), (0, -sites % sharding.ways("sites")), (0, 0)
  state, target = jnp.pad(state, padding), jnp.pad(target, padding)
  remembered = tuple(r._replace(weight=jnp.pad(r.weight, padding)) for r in remembered)
  loss = _cross_entropy(state, target, remembered, catalogue.rows, catalogue.bias, catalogue.size, chunk)
  return sharding.constrain(loss, "batch", None)[:, :sites].reshape(shape)


# How the arguments of a loss lie on the mesh: sites, the counts at the sites, rows.
_SITES, _STATES = ("batch", "sites"), ("batch", "sites", None)
_COUNTS = {"weight": _STATES, "code": ("batch", None, None), "number": ("batch", None, None)}


def _cross_entropy_forward(
  state: jax.Array,
  target: jax.Array,
  remembered: tuple[Remembered, ...],
  rows: jax.Array,
  bias: jax.Array,
  size: int,
  chunk: int,
) -> tuple[jax.Array, tuple[Any, ...]]:
  def local(
    state: jax.Array, target: jax.Array, rows: jax.Array, bias: jax.Array, *counts: dict[str, jax.Array]
  ) -> tuple[jax.Array, ...]:
    sites, state = target.shape[:2], state.reshape(-1, state.shape[-1])
    target = target.reshape(len(state), -1)
    device, memory = DeviceRows.of(rows, bias, size, chunk), [type(r)(**c) for r, c in zip(remembered, counts)]

    def more(sums: tuple[jax.Array, jax.Array], scores: jax.Array) -> tuple[jax.Array, jax.Array]:
      top, total = sums
      higher = jnp.maximum(top, jnp.max(scores, axis=1))
      safe = jnp.where(jnp.isfinite(higher), higher, 0.0)
      return higher, total * jnp.exp(top - safe) + jnp.sum(jnp.exp(scores - safe[:, None]), axis=1)

    def add(i: jax.Array, sums: tuple[Any, Any]) -> tuple[Any, Any]:
      part = device.chunk(i)
      scores = scores_of_chunk(state, part, device.logs(memory, part, i))
      right = device.among(part, target, i)
      return more(sums[0], scores), more(sums[1], jnp.where(right, scores, -jnp.inf))

    none = jnp.sum(state * 0, axis=1)  # zeros that vary over devices as the states do
    every, mine = jax.lax.fori_loop(0, device.chunks, add, ((none - jnp.inf, none), (none - jnp.inf, none)))
    lse = every[0] + jnp.log(every[1])
    own = jnp.where(mine[1] > 0, mine[0] + jnp.log(jnp.where(mine[1] > 0, mine[1], 1.0)), -jnp.inf)
    loss = lse - jnp.where(mine[1] > 0, own, 0.0)
    return loss.reshape(sites), lse.reshape(sites), own.reshape(sites)

  names = (_STATES, _STATES, ROWS, BIAS, *[_COUNTS] * len(remembered))
  arguments = state, target, rows, bias, *(r._asdict() for r in remembered)
  loss, lse, own = sharding.on_shards(local, names, (_SITES,) * 3, *arguments)
  return loss, (state, target, remembered, rows, bias, lse, own)


def _cross_entropy_backward(
  size: int, chunk: int, saved: tuple[Any, ...], gradient: jax.Array
) -> tuple[jax.Array, None, None, jax.Array, jax.Array]:
  state, target, remembered, rows, bias, lse, own = saved

  def local(
    state: jax.Array,
    target: jax.Array,
    rows: jax.Array,
    bias: jax.Array,
    lse: jax.Array,
    own: jax.Array,
    gradient: jax.Array,
    *counts: dict[str, jax.Array],
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    shapes = state.shape, rows.shape, bias.shape
    state = state.reshape(-1, state.shape[-1])
    target, lse, own, gradient = (x.reshape(len(state), -1) for x in (target, lse, own, gradient))
    device, memory = DeviceRows.of(rows, bias, size, chunk), [type(r)(**c) for r, c in zip(remembered, counts)]
    per_line = len(device.bias) // len(device.rows)

    def owners(x: jax.Array) -> jax.Array:
      return jax.lax.psum_scatter(x, sharding.axes("rows"), tiled=True) if sharding.ways("rows") > 1 else x

    def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      by_state, by_rows, by_bias = sums
      part = device.chunk(i)
      logs = device.logs(memory, part, i)
      scores = scores_of_chunk(state, part, logs)
      there = device.among(part, target, i)
      mine = jnp.where(there, jnp.exp(jnp.where(there, scores - own, 0.0)), 0.0)
      by_score = gradient * (jnp.exp(scores - lse) - mine)
      first = device.first(i)
      line = first // per_line
      there = jax.lax.dynamic_slice_in_dim(by_rows, line, device.step // per_line)
      vectors = state[:, : part.rows.shape[1]]
      there = there + owners(by_score.T @ vectors).astype(rows.dtype).reshape(there.shape)
      by_rows = jax.lax.dynamic_update_slice_in_dim(by_rows, there, line, 0)
      there = jax.lax.dynamic_slice_in_dim(by_bias, first, device.step) + owners(jnp.sum(by_score, axis=0))
      by_bias = jax.lax.dynamic_update_slice_in_dim(by_bias, there, first, 0)
      by_gain = [jnp.sum(by_score * log, axis=1, keepdims=True) for log in logs]
      return by_state + jnp.concatenate([by_score @ part.rows, *by_gain], axis=1), by_rows, by_bias

    sums = jax.lax.fori_loop(0, device.chunks, add, (state * 0, device.rows * 0, device.bias * 0))
    by_state, by_rows, by_bias = (x.reshape(shape) for x, shape in zip(sums, shapes))
    return by_state, by_rows, by_bias

  names = (_STATES, _STATES, ROWS, BIAS, _SITES, _SITES, _SITES, *[_COUNTS] * len(remembered))
  arguments = state, target, rows, bias, lse, own, gradient, *(r._asdict() for r in remembered)
  by_state, by_rows, by_bias = sharding.on_shards(local, names, (_STATES, ROWS, BIAS), *arguments)
  return by_state, None, None, by_rows, by_bias


_cross_entropy = jax.custom_vjp(lambda *arguments: _cross_entropy_forward(*arguments)[0], nondiff_argnums=(5, 6))
_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
