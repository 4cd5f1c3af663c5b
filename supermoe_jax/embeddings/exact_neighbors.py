"""Finds the nearest neighbours among all vectors exactly, on all devices.

Shapes: n vectors, m queries, D their width, k neighbours, W devices, C rows of a chunk, B queries at a time.

The rows are spread over the devices, and each device scores one chunk of its rows at a time. A device holds its n / W
vectors and one `[B, C]` block of scores, whatever n and m are. Its best rows are merged chunk by chunk, and the best
rows of all devices at the end. The few rows that remain are scored again in float64 from the original vectors, so that
scores do not depend on the number of devices. Equal scores stand in the order of their rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.distributed import processes
from supermoe_jax.errors import ConfigError, nearest

METRICS = ("cosine", "dot", "euclidean")

# Rows that a device scores at a time, and queries of a batch. On two CPU cores the product of blocks of this size runs
# near the best rate; a block of scores takes 32 MiB.
CHUNK = 8192
BATCH = 1024

# Candidates beyond k that are scored again: rounding in float32 may put a true neighbour just below the k-th.
SPARE = 8


class Neighbours(NamedTuple):
  """Neighbours of m queries.

  Attributes:
    row: int64 `[m, k]`, nearest first; -1 where there are no more.
    score: float64 `[m, k]`: cosine or dot product (larger is nearer), or Euclidean distance (smaller is nearer); NaN
      where `row` is -1.
  """

  row: np.ndarray
  score: np.ndarray


class VectorSpace(NamedTuple):
  """Vectors to search, prepared for one metric.

  Attributes:
    metric: one of `METRICS`.
    vectors: float32 `[n, D]`, unchanged.
    shaped: float32 `[n, D]`; its product with a shaped query, plus `bias`, orders rows as the metric does.
    bias: float32 `[n]`.
    centre: float32 `[D]`, the vector subtracted from shaped vectors and queries.
    length: float64 `[n]`, the lengths of the vectors for cosines; 1 for other metrics.
    zeros: number of vectors of length 0, which have no direction; their cosine with every vector counts as 0.
  """

  metric: str
  vectors: np.ndarray
  shaped: np.ndarray
  bias: np.ndarray
  centre: np.ndarray
  length: np.ndarray
  zeros: int

  @classmethod
  def of(cls, vectors: np.ndarray, metric: str = "cosine") -> VectorSpace:
    """Returns the space of `vectors [n, D]`.

    Raises:
      ConfigError: an unknown metric.
    """
    if metric not in METRICS:
      raise ConfigError(f"--metric={metric!r}{nearest(metric, METRICS)}.")
    vectors = np.ascontiguousarray(vectors, np.float32)
    none, still = np.zeros(len(vectors), np.float32), np.zeros(vectors.shape[1], np.float32)
    length = np.ones(len(vectors))
    if metric == "euclidean":
      # Vectors are centred on their mean: their squares are small there, and so are the rounding errors.
      still = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
      shaped = vectors - still
      return cls(metric, vectors, shaped, -0.5 * np.einsum("nd,nd->n", shaped, shaped), still, length, 0)
    if metric == "dot":
      return cls(metric, vectors, vectors, none, still, length, 0)
    shaped, zeros = unit_vectors(vectors)
    return cls(metric, vectors, shaped, none, still, _lengths(vectors), zeros)

  def shape(self, queries: np.ndarray) -> np.ndarray:
    """Returns queries `[m, D]` in the form that is multiplied with `shaped`."""
    queries = np.ascontiguousarray(queries, np.float32)
    return unit_vectors(queries)[0] if self.metric == "cosine" else queries - self.centre

  def score(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the metric of each of `queries [m, D]` with the vectors of its `rows [m, c]`: float64 `[m, c]`."""
    found = self.vectors[np.maximum(rows, 0)].astype(np.float64)
    asked = np.asarray(queries, np.float64)
    if self.metric == "euclidean":
      found -= asked[:, None, :]
      return np.sqrt(np.einsum("mcd,mcd->mc", found, found))
    dot = np.einsum("mcd,md->mc", found, asked)
    if self.metric == "dot":
      return dot
    lengths = self.length[np.maximum(rows, 0)] * _lengths(asked)[:, None]
    return np.divide(dot, lengths, out=np.zeros_like(dot), where=lengths > 0)

  def best(self, queries: np.ndarray, rows: np.ndarray, k: int) -> Neighbours:
    """Returns the k nearest of the candidates `rows [m, c]`, -1 for none; equal scores in the order of their rows."""
    score = self.score(queries, rows)
    far = np.where(rows < 0, np.inf, score if self.metric == "euclidean" else -score)
    order = np.lexsort((rows, far), axis=1)[:, :k]
    row, score = np.take_along_axis(rows, order, 1), np.take_along_axis(score, order, 1)
    return Neighbours(row.astype(np.int64), np.where(row < 0, np.nan, score))


def unit_vectors(vectors: np.ndarray) -> tuple[np.ndarray, int]:
  """Returns `vectors [n, D]` scaled to length 1, and the number of zero vectors, which stay zero."""
  length = _lengths(vectors)
  zero = length == 0
  return np.asarray(vectors / np.where(zero, 1.0, length).astype(np.float32)[:, None]), int(zero.sum())


def _lengths(vectors: np.ndarray) -> np.ndarray:
  return np.asarray(np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)))


class ExactSearch:
  """An exact search for the k nearest of all vectors of a space, on all devices."""

  def __init__(self, space: VectorSpace, chunk: int = CHUNK, batch: int = BATCH):
    """Spreads the vectors over the devices.

    Args:
      space: the vectors.
      chunk: rows that a device scores at a time.
      batch: queries of a batch, rounded up to a power of two of at least 8.
    """
    self.space = space
    self._batch = _power_of_two(batch)
    self._mesh = device_mesh.make_mesh(config.Mesh(data=len(jax.devices())))
    n, ways = len(space.vectors), self._mesh.size
    # All chunks have one size, a multiple of 64 rows: equal vectors then give equal bits wherever they stand.
    self._chunk = min(-(-chunk // 64) * 64, -(-max(n, 1) // (64 * ways)) * 64)
    room = -(-max(n, 1) // (self._chunk * ways)) * self._chunk * ways
    with jax.set_mesh(self._mesh):
      self._rows = self._place(space.shaped, room, 0.0, "rows", None)
      self._bias = self._place(space.bias, room, -np.inf, "rows")

  def _place(self, array: np.ndarray, room: int, fill: float, *names: str | None) -> jax.Array:
    """Returns an array spread over the devices, padded to `room` rows; each device copies its own part."""
    shape = (room, *array.shape[1:])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      first, last, _ = (index[0] if index else slice(None)).indices(room)
      out = np.full((last - first, *shape[1:]), fill, np.float32)
      there = array[first:last]
      out[: len(there)] = there
      return out

    return jax.make_array_from_callback(shape, NamedSharding(self._mesh, sharding.spec(*names)), part)

  def search(self, queries: np.ndarray, k: int, but: np.ndarray | None = None) -> Neighbours:
    """Returns the k nearest of all vectors to each query.

    Args:
      queries: float32 `[m, D]`.
      k: number of neighbours.
      but: int `[m]`, a row to exclude from the neighbours of each query, such as its own; -1 for none.
    """
    m = len(queries)
    but = np.full(m, -1, np.int64) if but is None else np.asarray(but, np.int64)
    wanted = min(k + SPARE, len(self.space.vectors))
    row, score = np.full((m, k), -1, np.int64), np.full((m, k), np.nan)
    with jax.set_mesh(self._mesh):
      for first in range(0, m, self._batch):
        some = np.asarray(queries[first : first + self._batch], np.float32)
        size = _power_of_two(len(some))  # few sizes, few compilations
        asked = np.zeros((size, some.shape[1]), np.float32)
        asked[: len(some)] = self.space.shape(some)
        not_these = np.full(size, -1, np.int32)
        not_these[: len(some)] = but[first : first + self._batch]
        found = _search(asked, not_these, self._rows, self._bias, wanted, self._chunk)
        best = self.space.best(some, processes.whole(found)[: len(some)].astype(np.int64), k)
        here = best.row.shape[1]
        row[first : first + len(some), :here], score[first : first + len(some), :here] = best
    return Neighbours(row, score)


def _power_of_two(n: int) -> int:
  return max(8, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("k", "chunk"))
def _search(queries: jax.Array, but: jax.Array, rows: jax.Array, bias: jax.Array, k: int, chunk: int) -> jax.Array:
  """Returns the rows with the k largest `queries [B, D] · row + bias`: int32 `[B, k]`, best first, -1 for none."""

  def local(queries: jax.Array, but: jax.Array, rows: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    here = sharding.index("rows") * len(rows)

    def merge(best: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
      some = jax.lax.dynamic_slice_in_dim(rows, i * chunk, chunk)
      scores = jnp.dot(queries, some.T, precision=jax.lax.Precision.HIGHEST)
      scores = scores + jax.lax.dynamic_slice_in_dim(bias, i * chunk, chunk)
      index = here + i * chunk + jnp.arange(chunk, dtype=jnp.int32)
      scores = jnp.where(index == but[:, None], -jnp.inf, scores)
      # Earlier rows stand first, because `top_k` takes the first of equal scores.
      score, place = jax.lax.top_k(scores, min(k, chunk))
      score = jnp.concatenate([best[0], score], axis=1)
      row = jnp.concatenate([best[1], index[place]], axis=1)
      score, place = jax.lax.top_k(score, k)
      return (score, jnp.take_along_axis(row, place, 1)), None

    # The products with 0 make the first carry vary over the devices as the rows do.
    none = jnp.full((len(queries), k), -jnp.inf) + 0 * bias[0].astype(jnp.int32)
    (score, row), _ = jax.lax.scan(
      merge, (none, jnp.full(none.shape, -1, jnp.int32) + 0 * here), jnp.arange(len(rows) // chunk)
    )
    return score[None], row[None]

  whole = (None, None), (None,), ("rows", None), ("rows",)
  score, row = sharding.on_shards(local, whole, (("rows", None, None), ("rows", None, None)), queries, but, rows, bias)
  score, row = (x.transpose(1, 0, 2).reshape(len(queries), -1) for x in (score, row))
  score, place = jax.lax.top_k(score, k)
  return jnp.where(jnp.isfinite(score), jnp.take_along_axis(row, place, 1), -1)
