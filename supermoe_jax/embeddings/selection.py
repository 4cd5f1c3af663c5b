"""Selects one embedding a user from an embedding directory, and finds users among them by id.

Shapes: n users, D the width of an embedding.
"""

from __future__ import annotations

import dataclasses
import decimal
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from supermoe_jax import config
from supermoe_jax.config import format_time
from supermoe_jax.embeddings import embedding_files
from supermoe_jax.errors import DataError, nearest

# Most examples in a message.
NAMED = 5

INT64 = (-(2**63), 2**63 - 1)  # the least and the greatest integer of 64 bits


@dataclasses.dataclass(frozen=True)
class RowSelection:
  """Selected rows of a directory's parts, in the order in which they lie there.

  Attributes:
    path: the directory.
    users: ids `[n]`, int64 or text.
    as_of: int64 `[n]`, microseconds since 1970 UTC.
    rows: for each part, the int64 indices of its selected rows.
    files: the files of the parts.
  """

  path: pathlib.Path
  users: pa.Array
  as_of: np.ndarray
  rows: list[np.ndarray]
  files: list[pathlib.Path]

  def __len__(self) -> int:
    return len(self.users)

  def vectors(self, part: int) -> np.ndarray:
    """Returns the selected vectors of a part: float32 `[rows of the part, D]`.

    Raises:
      DataError: the part is damaged, or a vector holds a number that is not finite.
    """
    found = embedding_files.embedding_vectors(_read(self.files[part], ["embedding"]).take(pa.array(self.rows[part])))
    bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(bad):
      row = int(self.rows[part][bad[0]])
      raise DataError(
        f"{self.files[part]}, row {row}, column embedding: not a finite number ({len(bad)} such rows in this part); "
        "embed again."
      )
    return found

  def all_vectors(self) -> np.ndarray:
    """Returns the vectors of all selected rows: float32 `[n, D]`.

    Raises:
      DataError: as `vectors`, or there are no rows, or parts differ in their width.
    """
    if not len(self):
      raise DataError(f"{self.path} holds no embeddings; embed as of a time that has events before it.")
    out: np.ndarray | None = None
    first = 0
    for part in range(len(self.files)):
      found = self.vectors(part)
      if out is None:
        out = np.empty((len(self), found.shape[1]), np.float32)
      if found.shape[1] != out.shape[1]:
        raise DataError(
          f"{self.files[part]}: embeddings of width {found.shape[1]}, earlier parts have {out.shape[1]}; embed again."
        )
      out[first : first + len(found)] = found
      first += len(found)
    assert out is not None
    return out

  def rows_of(self, index: np.ndarray) -> np.ndarray:
    """Returns the vectors of the users at `index [m]`: float32 `[m, D]`; reads parts one after the other.

    Raises:
      DataError: as `vectors`.
    """
    first, places, found = 0, [], []
    for part, rows in enumerate(self.rows):
      here = np.flatnonzero((index >= first) & (index < first + len(rows)))
      if len(here):
        places.append(here)
        found.append(self.vectors(part)[index[here] - first])
      first += len(rows)
    out = np.empty((len(index), found[0].shape[1]), np.float32)
    for place, vectors in zip(places, found):
      out[place] = vectors
    return out

  def column(self, name: str) -> pa.ChunkedArray:
    """Returns a column of the selected rows, `[n]`.

    Raises:
      DataError: there is no such column, or a part is damaged.
    """
    found = [_read(file, [name])[name].take(pa.array(rows)) for file, rows in zip(self.files, self.rows)]
    return pa.chunked_array([chunk for part in found for chunk in part.chunks])

  def time(self) -> str:
    """Returns the time or times of the rows, in words."""
    first, last = int(self.as_of.min()), int(self.as_of.max())
    return (
      f"as of {format_time(first)}"
      if first == last
      else f"as of each user's latest time ({format_time(first)} to {format_time(last)})"
    )


def select_rows(path: pathlib.Path, as_of: str | None = None) -> RowSelection:
  """Selects the rows of an embedding directory as of a time; without one, each user's latest row.

  Raises:
    ConfigError: `as_of` cannot be read.
    DataError: no row has that time, a user has two rows of one time, a column is missing, or the directory is damaged.
  """
  keys = _keys(path)
  if as_of is None:
    return keys.choose(keys.latest(np.arange(len(keys.users))))
  wanted = config.parse_time(as_of, "--as-of")
  chosen = np.flatnonzero(keys.times == wanted)
  if not len(chosen):  # the manifest and messages write times to the second
    chosen = np.flatnonzero(keys.times // 1_000_000 * 1_000_000 == wanted)
  if not len(chosen):
    there = np.unique(keys.times)
    named = ", ".join(format_time(t) for t in there[-NAMED:])
    raise DataError(
      f"{path} holds no embeddings as of {format_time(wanted)}; it has {len(there)} time(s), such as "
      f"{named or 'none'}. Name one of them, or embed as of that time."
    )
  return keys.choose(keys.latest(chosen))


def select_shared_rows(a: pathlib.Path, b: pathlib.Path) -> tuple[RowSelection, RowSelection]:
  """Selects, in each of two directories, the row of every user's latest time that both hold.

  Raises:
    DataError: as `select_rows`.
  """
  left, right = _keys(a), _keys(b)
  known = pc.unique(right.users)
  moments = np.unique(np.concatenate([left.times, right.times]))

  def codes(keys: _RowKeys) -> np.ndarray:
    """Returns one number for each pair of a user of `b` and a time; -1 for other users."""
    user = UserFinder(known).rows(keys.users)
    return np.where(user < 0, -1, user * len(moments) + np.searchsorted(moments, keys.times))

  mine, theirs = codes(left), codes(right)
  both = np.intersect1d(mine[mine >= 0], theirs)
  here, there = (np.flatnonzero(np.isin(x, both)) for x in (mine, theirs))
  return left.choose(left.latest(here)), right.choose(right.latest(there))


@dataclasses.dataclass(frozen=True)
class _RowKeys:
  """Users and times of all rows of a directory, `[n]` each, and the number of rows before each part."""

  path: pathlib.Path
  files: list[pathlib.Path]
  users: pa.Array
  times: np.ndarray
  before: np.ndarray

  def latest(self, rows: np.ndarray) -> np.ndarray:
    """Returns, out of `rows`, the row of each user's latest time, ascending.

    Raises:
      DataError: a user has two rows as of one time.
    """
    code, times = np.asarray(self.users.take(pa.array(rows)).dictionary_encode().indices), self.times[rows]
    order = np.lexsort((times, code))
    code, times = code[order], times[order]
    same = code[1:] == code[:-1]
    twice = np.flatnonzero(same & (times[1:] == times[:-1]))
    if len(twice):
      user = self.users[int(rows[order[twice[0]]])].as_py()
      raise DataError(f"{self.path} has user {user!r} twice as of {format_time(times[twice[0]])}; embed again.")
    return np.sort(rows[order[np.append(~same, True)[: len(order)]]])

  def choose(self, rows: np.ndarray) -> RowSelection:
    parts = [rows[(rows >= a) & (rows < b)] - a for a, b in zip(self.before, self.before[1:])]
    return RowSelection(self.path, self.users.take(pa.array(rows)), self.times[rows], parts, self.files)


def _keys(path: pathlib.Path) -> _RowKeys:
  files = embedding_files.part_paths(path)
  tables = [_read(file, ["user_id", "as_of"]) for file in files]
  table = pa.concat_tables(tables)
  kind = pa.int64() if pa.types.is_integer(table["user_id"].type) else pa.large_string()
  users = pc.cast(table["user_id"].combine_chunks(), kind)
  times = pc.cast(pc.cast(table["as_of"], pa.timestamp("us")), pa.int64()).to_numpy()
  return _RowKeys(path, files, users, times, np.cumsum([0, *map(len, tables)]))


def _read(file: pathlib.Path, columns: Sequence[str]) -> pa.Table:
  try:
    there = pq.read_schema(file).names
    for column in columns:
      if column not in there:
        raise DataError(f"{file} has no column {column!r}{nearest(column, there)}; embed again.")
    return pq.read_table(file, columns=list(columns))
  except (OSError, pa.ArrowException) as error:
    raise DataError(f"{file} is damaged ({error}); embed again.") from error


class UserFinder:
  """A lookup of users by id among `users [n]`."""

  def __init__(self, users: pa.Array):
    self._users = users

  def rows(self, ids: pa.Array) -> np.ndarray:
    """Returns the row of each of `ids [m]`, numbers or text: int64 `[m]`, -1 for an unknown id.

    Numbers written as text are found among numbers, and numbers among text.
    """
    if pa.types.is_integer(self._users.type):
      ids = _as_integers(ids)
    else:
      ids = pc.cast(ids, pa.large_string())
    return np.asarray(pc.fill_null(pc.index_in(ids, value_set=self._users), -1)).astype(np.int64)

  def nearest(self, user: str, count: int = 3) -> list[Any]:
    """Returns the ids closest to `user` in sorted order."""
    if pa.types.is_integer(self._users.type):
      try:
        value = min(max(int(user), INT64[0]), INT64[1])
      except ValueError:
        return list(self._users.slice(0, count).to_pylist())
      there = np.asarray(self._users)
      return sorted(int(u) for u in there[np.argsort(np.abs(there - value), kind="stable")[:count]])
    ordered = self._users.take(pc.sort_indices(self._users))
    at = int(pc.sum(pc.less(ordered, user)).as_py() or 0)
    return list(ordered.slice(max(0, min(at - 1, len(ordered) - count)), count).to_pylist())

  def one(self, user: str) -> int:
    """Returns the row of a user.

    Raises:
      DataError: the user is unknown; the message names the closest ids.
    """
    row = int(self.rows(pa.array([user]))[0])
    if row < 0:
      near = ", ".join(map(str, self.nearest(user)))
      raise DataError(
        f"user {user!r} has no embedding among {len(self._users):,}; similar ids: {near}. Users without an event "
        "before the time of the embeddings have none."
      )
    return row


def _as_integers(ids: pa.Array) -> pa.Array:
  """Returns ids as int64, null where an id is not a whole number."""
  if pa.types.is_integer(ids.type):
    return pc.cast(ids, pa.int64())
  text = pc.cast(ids, pa.large_string())
  whole = pc.cast(pc.if_else(pc.match_substring_regex(text, r"^[+-]?[0-9]{1,19}$"), text, None), pa.decimal128(19))
  low, high = (pa.scalar(decimal.Decimal(bound), pa.decimal128(19)) for bound in INT64)
  fits = pc.and_(pc.greater_equal(whole, low), pc.less_equal(whole, high))
  return pc.cast(pc.if_else(fits, whole, None), pa.int64())


def selection_fingerprint(selection: RowSelection) -> str:
  """Returns a hash of the manifest and the selected rows: it changes when the embeddings or the selection change."""
  digest = hashlib.sha256((selection.path / "manifest.json").read_bytes())
  for rows in selection.rows:
    digest.update(len(rows).to_bytes(8, "little"))
    digest.update(rows.astype("<i8").tobytes())
  return digest.hexdigest()
