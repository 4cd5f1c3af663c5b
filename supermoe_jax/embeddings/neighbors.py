"""Finds the neighbours of users by id: for some users, or for all users as a Parquet file.

A file has one row a user and neighbour: `user_id, rank, neighbor_id, score`; rank 1 is the nearest.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from supermoe_jax import atomic_files
from supermoe_jax.embeddings import hnsw_index
from supermoe_jax.embeddings import selection as selection_lib
from supermoe_jax.embeddings.exact_neighbors import BATCH, ExactSearch, VectorSpace
from supermoe_jax.embeddings.selection import RowSelection
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.progress import ProgressBar


@dataclasses.dataclass(frozen=True)
class Search:
  """A search for neighbours among the users of an embedding directory.

  Attributes:
    selection: the users.
    space: their vectors.
    engine: the exact search or the index.
    said: messages about the search, one a line.
  """

  selection: RowSelection
  space: VectorSpace
  engine: ExactSearch | hnsw_index.HnswIndex
  said: list[str]

  def of(self, users: Sequence[str], k: int) -> pa.Table:
    """Returns the k nearest users of each of `users`, as the rows of a file.

    Raises:
      DataError: a user has no embedding.
    """
    finder = selection_lib.UserFinder(self.selection.users)
    rows = np.array([finder.one(u) for u in users], np.int64)
    return self._table(rows, k)

  def of_all(self, k: int) -> Iterator[pa.Table]:
    """Yields the k nearest users of every user, some users at a time."""
    n = len(self.selection)
    with ProgressBar(total=n, desc="neighbours", unit=" users", mininterval=1) as bar:
      for first in range(0, n, 4 * BATCH):
        rows = np.arange(first, min(first + 4 * BATCH, n))
        yield self._table(rows, k)
        bar.update(len(rows))

  def _table(self, rows: np.ndarray, k: int) -> pa.Table:
    found = self.engine.search(self.space.vectors[rows], k, rows)
    there = found.row >= 0
    return pa.table(
      {
        "user_id": self.selection.users.take(pa.array(np.repeat(rows, k)[there.reshape(-1)])),
        "rank": pa.array((np.cumsum(there, axis=1))[there]),
        "neighbor_id": self.selection.users.take(pa.array(found.row[there])),
        "score": pa.array(found.score[there]),
      }
    )


def open_search(
  path: pathlib.Path,
  *,
  metric: str = "cosine",
  as_of: str | None = None,
  index: pathlib.Path | None = None,
  recall: float = 0.98,
  rebuild: bool = False,
) -> Search:
  """Reads embeddings and, if `index` is named, their index, which is built when it is missing.

  Raises:
    ConfigError: an option is out of range, the index lies inside the embeddings, or FAISS is not installed.
    DataError: embeddings or the index are damaged, the index belongs to others, or the file `index` is not an index.
  """
  if index is not None and path.resolve() in index.resolve().parents:
    raise ConfigError(
      f"--index {index} lies inside {path}, which 'supermoe embed' replaces as a whole; name a file outside it."
    )
  if index is not None and not index.parent.is_dir():
    raise ConfigError(f"{index}: there is no directory {index.parent}; make it first.")
  selection = selection_lib.select_rows(path, as_of)
  space = VectorSpace.of(selection.all_vectors(), metric)
  said = [f"{len(selection):,} users, {selection.time()}"]
  if space.zeros:
    said.append(f"{space.zeros:,} vectors hold only zeros: their cosine with every user counts as 0")
  if index is None:
    return Search(selection, space, ExactSearch(space), said)
  fingerprint = selection_lib.selection_fingerprint(selection)
  if index.exists() and not rebuild:
    found = hnsw_index.read_index(index, space, fingerprint)
    said.append(f"index {index}: {hnsw_index.index_summary(found.header)}")
    return Search(selection, space, found, said)
  if index.exists():
    hnsw_index.check_index_file(index)
  exact = ExactSearch(space)
  found = hnsw_index.build_index(space, fingerprint, recall=recall, exact=exact)
  said.append(f"index built in {found.header.build_seconds:,.0f} s: {hnsw_index.index_summary(found.header)}")
  if not found.header.faster():
    said.append(f"{index} is not written; leave --index out next time.")
    return Search(selection, space, exact, said)
  found.write(index)
  said.append(f"written: {index} ({index.stat().st_size / 2**20:,.1f} MiB)")
  return Search(selection, space, found, said)


def write_all_neighbors(search: Search, k: int, out: pathlib.Path) -> int:
  """Writes the k nearest users of every user, and returns the number of rows.

  Raises:
    DataError: the file cannot be written; nothing is kept of it.
  """
  rows = 0
  try:
    with atomic_files.replacing_file(out) as part:
      writer: pq.ParquetWriter | None = None
      try:
        for table in search.of_all(k):
          writer = writer or pq.ParquetWriter(part, table.schema)
          writer.write_table(table)
          rows += len(table)
      finally:
        if writer is not None:
          writer.close()
  except OSError as error:
    raise DataError(f"writing {out} failed: {error}; nothing was kept.") from error
  return rows


def write_neighbors(table: pa.Table, out: pathlib.Path) -> None:
  """Writes neighbours of some users.

  Raises:
    DataError: the file cannot be written; nothing is kept of it.
  """
  try:
    with atomic_files.replacing_file(out) as part:
      pq.write_table(table, part)
  except OSError as error:
    raise DataError(f"writing {out} failed: {error}; nothing was kept.") from error


def neighbors_text(table: pa.Table, metric: str) -> list[str]:
  """Returns lines that list the neighbours of some users."""
  lines, last = [], object()
  for row in table.to_pylist():
    if row["user_id"] != last:
      last = row["user_id"]
      lines.append(f"user {last}: nearest by {metric}")
    lines.append(f"  {row['rank']:>3}  {row['neighbor_id']!s:<20}  {row['score']:.6f}")
  return lines
