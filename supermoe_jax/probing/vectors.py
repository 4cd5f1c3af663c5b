"""Reads vectors of users from embedding directories and from files of other systems.

Shapes: n rows, D the width.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import uuid
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from supermoe_jax import config
from supermoe_jax.config import format_time
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.data.inspect import text_dialect
from supermoe_jax.data.reading import readers, value_sql
from supermoe_jax.data.reading.text_files import clean_copies, text_lines
from supermoe_jax.embeddings import embedding_files
from supermoe_jax.errors import ConfigError, DataError, nearest

USER = "user_id"  # user column of embeddings; tried in a file that lacks the label table's user column
AS_OF = "as_of"  # time column of embeddings; tried in a file that lacks the label table's time column

# The least whole number that a float may hold in the place of another one, by Arrow's name of the type.
EXACT = {"halffloat": 2**11, "float": 2**24, "double": 2**53}
UUID_BYTES = 16


@dataclasses.dataclass(frozen=True)
class UserVectors:
  """Vectors of users at one time or several.

  Attributes:
    name: their name in tables.
    user: `[n]` ids as text.
    time: int64 `[n]`, microseconds since 1970 UTC; None for vectors that hold at all times.
    x: float32 `[n, D]`, finite.
    about: their origin, for the report.
  """

  name: str
  user: np.ndarray
  time: np.ndarray | None
  x: np.ndarray
  about: dict[str, Any]

  @property
  def times(self) -> list[int]:
    """Returns the different times, ascending; empty without times."""
    return [] if self.time is None else np.unique(self.time).tolist()

  @functools.cached_property
  def _rows(self) -> dict[Any, int]:
    keys = self.user if self.time is None else zip(self.user, self.time.tolist())
    return {key: row for row, key in enumerate(keys)}

  def find(self, user: np.ndarray, time: np.ndarray | None) -> np.ndarray:
    """Returns the row of each user and time: int64 `[len(user)]`, -1 for a pair without a vector.

    Raises:
      DataError: the vectors have times, and `time` is None.
    """
    if self.time is None:
      asked: Any = user
    else:
      if time is None:
        raise DataError(f"{self.name} have several times, {_listed(self.times)}; name one with --as-of.")
      asked = zip(user, time.tolist())
    return np.fromiter((self._rows.get(key, -1) for key in asked), np.int64, len(user))


def _listed(times: Sequence[int], most: int = 6) -> str:
  return ", ".join(format_time(t) for t in times[:most]) + (" …" if len(times) > most else "")


def read_vectors(
  name: str, path: pathlib.Path, user: str = USER, time: str | None = None, views: Sequence[str] = ()
) -> UserVectors:
  """Reads a directory of 'supermoe embed', or another system's Parquet or CSV file (or directory of Parquet files).

  A file of another system has a column of users (`user`, or else `user_id`) and, optionally, of times (`time`, or else
  `as_of`). Its vectors are one column of lists of equal length, or columns of numbers. Other columns are left out and
  named in `about`, and so are the delimiter and the settings of `config.TextFormat` that a CSV file was read with.

  `views` names the views to keep of a directory that was written with `--views`; empty: all numbers.

  Raises:
    ConfigError: the embeddings have no views, or none of these names.
    DataError: the file or one of its values cannot be used, or a user (and time) has two rows.
  """
  if (path / "manifest.json").is_file():
    return _of_run(name, path, views)
  if views:
    raise ConfigError(f"--views {' '.join(views)}: {path} was not written by 'supermoe embed --views'; leave it out.")
  if path.is_dir():
    files = sorted(path.glob("*.parquet"))
    if not files:
      raise DataError(f"{path} holds no embeddings: no manifest.json of 'supermoe embed', and no Parquet file.")
  elif path.is_file():
    files = [path]
  else:
    raise DataError(f"there are no embeddings at {path}.")
  read = [_table(f, {user, USER, AS_OF, *([time] if time else [])}) for f in files]
  table = pa.concat_tables([rows for rows, _ in read], promote_options="default")
  if not table.num_rows:
    raise DataError(f"{path} holds no row.")
  if user not in table.column_names:
    if USER not in table.column_names:
      raise DataError(f"{path} has no column {user!r} of users (--user){nearest(user, table.column_names)}")
    user = USER
  timed = time if time in table.column_names else AS_OF if AS_OF in table.column_names else None
  users = _users(path, table[user].combine_chunks(), user)
  times = None if timed is None else _times(path, table[timed].combine_chunks(), timed)
  x, used, left_out = _vectors(path, table.drop_columns([user, *([timed] if timed else [])]), users)
  about = {"file": str(path), "rows": len(users), "width": x.shape[1], "time": timed, "columns": used}
  if read[0][1]:
    about["text"] = read[0][1]
  return _checked(path, UserVectors(name, users, times, x, {**about, "columns_left_out": left_out}))


def _of_run(name: str, path: pathlib.Path, views: Sequence[str] = ()) -> UserVectors:
  manifest = embedding_files.read_embedding_manifest(path)
  table = embedding_files.read_embeddings(path, ["user_id", "as_of", "embedding"])
  users = _users(path, table["user_id"].combine_chunks(), "user_id")
  times = table["as_of"].combine_chunks().cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
  about = {k: manifest.get(k) for k in ("run", "step", "config_hash", "data_hash", "dataset", "width", "rows")}
  x = embedding_files.embedding_vectors(table)
  if "views" in manifest:
    about["views"] = [v["name"] for v in manifest["views"] if not views or v["name"] in views]
  if views:
    from supermoe_jax.embeddings.views import view_places  # imports JAX, which other files do not need

    x = x[:, view_places(path, manifest, views)]
    about["width"] = x.shape[1]
  return _checked(path, UserVectors(name, users, times, x, {"directory": str(path), **about}))


def _table(file: pathlib.Path, keys: Collection[str]) -> tuple[pa.Table, dict[str, object]]:
  """Returns the rows of a file, and how a text was read: its delimiter and the settings that are not the usual ones."""
  if text_lines.unpacked_name(file.name.lower()).endswith((".csv", ".tsv")):
    return _text_table(file, keys)
  try:
    return pq.ParquetFile(file).read(), {}
  except (OSError, pa.ArrowException) as error:
    raise DataError(f"{file} cannot be read as Parquet or CSV ({error}).") from error


def _text_table(file: pathlib.Path, keys: Collection[str]) -> tuple[pa.Table, dict[str, object]]:
  """Reads a CSV file with the settings that `supermoe inspect` finds.

  A column whose values are all numbers, or true and false, holds numbers. The columns `keys` stay text: 007 is an id.

  Raises:
    DataError: the file cannot be read, or a line has too few or too many values; the message names the line.
  """
  con = readers.connect()
  try:
    opened = text_dialect.open_guessed(con, file, "auto", PLAIN_TEXT)
    with clean_copies.readable(con, opened) as (good, _), readers.naming(file, opened.format):
      (table,) = text_dialect.with_guessed_dialect(con, [good])
      names = {f"c{i}": name for i, name in enumerate(table.columns)}
      texts = {a: value_sql.text_sql(a, "VARCHAR") for a in names}
      words = "CASE lower(trim({a})) WHEN 'true' THEN 1 WHEN 'false' THEN 0 ELSE {number} END"
      numbers = {a: words.format(a=a, number=value_sql.number_sql(a, "VARCHAR", table.text)) for a in names}
      counts = ", ".join(f"count({texts[a]}), count({numbers[a]})" for a in names)
      (found,) = con.execute(f"SELECT {counts} FROM ({table.select(names)})").fetchall()
      numeric = {a for a, n, parsed in zip(names, found[::2], found[1::2], strict=True) if n == parsed > 0}
      values = {a: numbers[a] if a in numeric and name not in keys else texts[a] for a, name in names.items()}
      columns = ", ".join(f"{sql} AS {readers.identifier(names[a])}" for a, sql in values.items())
      rows = con.sql(f"SELECT {columns} FROM ({table.select(names)}) ORDER BY row").to_arrow_table()
    return rows, {"delimiter": table.delimiter, **text_dialect.text_settings(table.text)}
  finally:
    con.close()


def _users(path: pathlib.Path, column: pa.Array, name: str) -> np.ndarray:
  """Returns ids as text, as event files' ids are read: whole floats and decimals as integers, 16 bytes as a UUID.

  Raises:
    DataError: a user is missing, a float may stand for several ids, or bytes are no text.
  """
  if column.null_count:
    row = int(np.flatnonzero(pc.is_null(column).to_numpy(zero_copy_only=False))[0])
    raise DataError(f"{path}: row {row + 1} has no user in {name!r}; leave it out.")
  kind = column.type
  if pa.types.is_floating(kind) and len(large := column.filter(pc.greater_equal(pc.abs(column), EXACT[str(kind)]))):
    raise DataError(
      f"{path}: column {name!r} holds {large[0].as_py():.17g} as {kind}, a type that is exact only for whole numbers "
      f"below {EXACT[str(kind)]:,}: different ids may have become one. Write the column as integers or as text."
    )
  if kind == pa.binary(UUID_BYTES):
    return np.array([str(uuid.UUID(bytes=value)) for value in column.to_pylist()], object)
  try:
    column = column.cast(pa.int64()) if pa.types.is_floating(kind) else column
    text = column.cast(pa.string())
    if pa.types.is_decimal(kind) and kind.scale > 0:
      text = pc.utf8_rtrim(pc.utf8_rtrim(text, "0"), ".")
    return np.array(text.to_pylist(), object)
  except pa.ArrowException as error:
    raise DataError(f"{path}: column {name!r} holds no ids of users ({error}).") from None


def _times(path: pathlib.Path, column: pa.Array, name: str) -> np.ndarray:
  if column.null_count:
    raise DataError(f"{path}: {column.null_count} rows have no time in {name!r}; leave them out.")
  kind = column.type
  if pa.types.is_temporal(kind):
    return np.asarray(column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).to_numpy())
  if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
    raise DataError(f"{path}: column {name!r} is of type {kind}; write times as timestamps, dates or ISO 8601 text.")
  known: dict[str, int] = {}
  for text in pc.unique(column).to_pylist():
    try:
      known[text] = config.parse_time(text, name)
    except ConfigError as error:
      raise DataError(f"{path}: {error}") from None
  return np.array([known[t] for t in column.to_pylist()], np.int64)


def _is_number(kind: pa.DataType) -> bool:
  types = pa.types
  return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)


def _vectors(path: pathlib.Path, table: pa.Table, users: np.ndarray) -> tuple[np.ndarray, list[str], list[str]]:
  """Returns the vectors float32 `[n, D]`, the columns that they come from, and the other columns."""
  listing = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
  lists = [f.name for f in table.schema if any(t(f.type) for t in listing) and _is_number(f.type.value_type)]
  numbers = [f.name for f in table.schema if _is_number(f.type)]
  if len(lists) > 1:
    raise DataError(f"{path} has several columns of lists, {', '.join(lists)}; keep one of them.")
  used = lists or numbers
  if not used:
    raise DataError(f"{path} has neither a column of lists nor columns of numbers besides the users.")
  if lists:
    column = table[lists[0]].combine_chunks()
    length = pc.list_value_length(column)
    wrong = np.flatnonzero(pc.fill_null(pc.not_equal(length, length[0]), True).to_numpy(zero_copy_only=False))
    if len(wrong):
      row = int(wrong[0])
      raise DataError(
        f"{path}: row {row + 1}, user {users[row]}, has {length[row].as_py() or 'no'} numbers in {lists[0]!r}, the "
        f"first row {length[0].as_py() or 'none'}; all rows must have the same number."
      )
    flat = column.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False)
    x = flat.reshape(len(users), -1)
  else:
    x = np.stack([_numbers(table[n].combine_chunks()) for n in used], axis=1)
  with np.errstate(over="ignore"):
    x = x.astype(np.float32)
  return x, used, [c for c in table.column_names if c not in used]


def _numbers(column: pa.Array) -> np.ndarray:
  return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False))


def _checked(path: pathlib.Path, features: UserVectors) -> UserVectors:
  if not len(features.user):
    raise DataError(f"{path} holds no row; embed at a time with events before it.")
  bad = np.argwhere(~np.isfinite(features.x))
  if len(bad):
    row, column = bad[0]
    used = features.about.get("columns") or []
    where = f"column {used[column]!r}" if len(used) > 1 else f"place {column + 1}"
    raise DataError(
      f"{path}: user {features.user[row]} holds no finite 32-bit number in {where} (row {row + 1}); fill it in, or "
      "leave the user out."
    )
  if len(features._rows) < len(features.user):
    seen: set[Any] = set()
    keys = features.user if features.time is None else zip(features.user, features.time.tolist())
    for key in keys:
      if key in seen:
        named = key if features.time is None else f"{key[0]} at {format_time(key[1])}"
        raise DataError(f"{path}: user {named} has two rows; keep one.")
      seen.add(key)
  return features
