"""Reads label tables: files with a user column, an optional time column, and columns of labels.

Shapes: n rows, one for each user or (user, time).
"""

from __future__ import annotations

import fnmatch
import logging
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import duckdb
import numpy as np

from supermoe_jax import config
from supermoe_jax.config import format_time
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.data.reading import derived_columns, field_sql, readers, time_formats, value_sql
from supermoe_jax.data.reading.readers import TableFile, identifier
from supermoe_jax.data.reading.text_files import clean_copies, null_words
from supermoe_jax.errors import DataError, nearest

logger = logging.getLogger(__name__)

LabelKind = Literal["binary", "multiclass", "regression"]

# A column with at most this many different whole numbers, or texts, is read as classes.
MOST_NUMBERED_CLASSES = 10
MOST_NAMED_CLASSES = 50

GLOB = frozenset("*?[")


class Label(NamedTuple):
  """A column of labels.

  Attributes:
    name: of the column.
    kind: binary, multiclass or regression.
    value: float64 `[n]`: 0 and 1, indices of classes, or numbers; NaN for a missing label.
    classes: the column's value for each index; for a binary label the negative, then the positive one; empty for
      numbers.
    owner: `[n]`, numbers of the rows' users, for models that divide users; None: each row is another user's.
  """

  name: str
  kind: LabelKind
  value: np.ndarray
  classes: tuple[str, ...] = ()
  owner: np.ndarray | None = None

  @property
  def outputs(self) -> int:
    """Returns the number of classes of a multiclass label, and 1 for a binary label or a number."""
    return len(self.classes) if self.kind == "multiclass" else 1


class LabelTable(NamedTuple):
  """The labels of a file.

  Attributes:
    users: `[n]` ids as text.
    time: int64 `[n]`, microseconds since 1970 UTC; None without a time column.
    labels: the columns that can be probed.
    not_measured: the requested columns that cannot be probed, with the reason.
    groups: each requested glob, with the columns that it matches.
    repeated_rows: rows merged into an earlier row of the same user (and time).
  """

  users: np.ndarray
  time: np.ndarray | None
  labels: list[Label]
  not_measured: dict[str, str]
  groups: dict[str, list[str]]
  repeated_rows: int


def read_label_table(
  path: pathlib.Path,
  user: str = "user_id",
  time: str | None = None,
  wanted: Sequence[str] = (),
  kinds: Mapping[str, LabelKind] | None = None,
  text: config.TextFormat = PLAIN_TEXT,
  time_format: str = "",
) -> LabelTable:
  """Reads a label table, in any format that a user table may have; warns of words such as "NULL" among its classes.

  Args:
    path: the file.
    user: its column of users.
    time: its column of times, if it has one: timestamps, dates, ISO 8601 text, or text in `time_format`.
    wanted: names of label columns, or globs; empty: all columns except `user` and `time`.
    kinds: kinds of some columns; the kinds of the others follow from their values.
    text: how the table is written.
    time_format: strptime format of textual times.

  Raises:
    DataError: the file, a column or a value cannot be used, or two rows of a user (and time) contradict each other.
  """
  if not path.is_file():
    raise DataError(f"there is no label table {path}.")
  con = readers.connect()
  try:
    named = {user, *([] if time is None else [time]), *(kinds or {}), *wanted}
    file = readers.open_table(con, path, "auto", named, text)
    if not wanted or any(GLOB & {*name} for name in wanted):  # any column may be a label
      file = derived_columns.with_derived_columns(con, file, ())
    file.require(user, "--user")
    field_sql.check_ids(con, file, user, "--user")
    if time is not None:
      file.require(time, "--time")
    others = [c for c in file.columns if c not in (user, time)]
    names, groups = _chosen(path, others, wanted)
    for name in kinds or {}:
      if name not in names:
        raise DataError(f"--kind names the column {name!r}, which is none of the labels{nearest(name, names)}")
    columns = {"u": user, **({} if time is None else {"t": time}), **{f"l{i}": n for i, n in enumerate(names)}}

    def load(read: TableFile) -> None:
      with readers.naming(path, read.format):
        con.execute(f"CREATE TEMP TABLE given AS {read.select(columns)}")

    clean_copies.read_clean(con, file, "", load, drop=False)
    table = _read(con, file, user, time, names, groups, kinds or {}, time_format)
    _warn_of_null_words(con, file, names, table.labels)
    return table
  finally:
    con.close()


def _chosen(path: pathlib.Path, others: Sequence[str], wanted: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
  """Returns the requested columns, each once, and the columns of each glob."""
  if not others:
    raise DataError(f"{path} has no column of labels.")
  groups = {}
  names: list[str] = []
  for pattern in wanted or others:
    if pattern in others:
      names.append(pattern)
      continue
    found = [c for c in others if fnmatch.fnmatchcase(c, pattern)] if GLOB & set(pattern) else []
    if not found:
      raise DataError(f"{path} has no column {pattern!r} (--label){nearest(pattern, others)}")
    groups[pattern] = found
    names += found
  return list(dict.fromkeys(names)), groups


def _read(
  con: duckdb.DuckDBPyConnection,
  file: TableFile,
  user: str,
  time: str | None,
  names: Sequence[str],
  groups: dict[str, list[str]],
  kinds: Mapping[str, LabelKind],
  time_format: str,
) -> LabelTable:
  values, texts, not_measured = {}, set(), {}
  for i, name in enumerate(names):
    kind = file.columns[name]
    if kind.endswith("]") or kind.startswith((*derived_columns.OBJECTS, derived_columns.JSON_LIST, "BLOB")):
      not_measured[name] = f"its values are of type {kind}"
      continue
    numbers = value_sql.is_number(kind) or kind == "BOOLEAN"
    if kind == "VARCHAR":
      text = f"nullif(trim(l{i}), '')"
      number = value_sql.number_sql(f"l{i}", kind, file.text)
      ((known, parsed),) = con.execute(f"SELECT count({text}), count({number}) FROM given").fetchall()
      numbers = known == parsed > 0
    if numbers:
      number = value_sql.number_sql(f"l{i}", kind, file.text)
      values[name] = f"CASE WHEN NOT isnan({number}) THEN {number} END"
    else:
      texts.add(name)
      values[name] = f"nullif(trim(l{i}::VARCHAR), '')"
  selected = ", ".join([f"{sql} AS l{i}" for i, sql in enumerate(values.values())])
  read_user = value_sql.text_sql("u", file.columns[user])
  con.execute(
    f"CREATE TEMP TABLE labels AS SELECT row, {read_user} AS u, {_time_sql(con, file, time, time_format)} AS t"
    f"{', ' if selected else ''}{selected} FROM given"
  )
  _check_keys(con, file, user, time)
  repeated = _merge(con, file, list(values))
  found = con.execute("SELECT * EXCLUDE (row) FROM labels ORDER BY row").fetchnumpy()
  labels = []
  for i, name in enumerate(values):
    label = _label(file, name, np.ma.getdata(found[f"l{i}"]), _missing(found[f"l{i}"]), name in texts, kinds.get(name))
    if isinstance(label, str):
      not_measured[name] = label
    else:
      labels.append(label)
  users = np.array([str(u) for u in np.ma.getdata(found["u"])], object)
  at = None if time is None else np.ma.getdata(found["t"]).astype(np.int64)
  return LabelTable(users, at, labels, not_measured, groups, repeated)


def _time_sql(con: duckdb.DuckDBPyConnection, file: TableFile, time: str | None, format: str) -> str:
  if time is None:
    return "0::BIGINT"
  kind = file.columns[time]
  if kind != "VARCHAR" and not value_sql.is_instant(kind) and not format:
    raise DataError(
      f"{file.path}: column {time!r} (--time) is of type {kind}; write times as timestamps, dates or ISO 8601 text."
    )
  if kind == "VARCHAR" and not format:
    return value_sql.iso_sql("t")
  return value_sql.time_reading(con, file, time, "t", "", format=format).sql


def _warn_of_null_words(
  con: duckdb.DuckDBPyConnection, file: TableFile, names: Sequence[str], labels: Sequence[Label]
) -> None:
  """Warns of classes that are most likely words for "no value", unless such words are set."""
  found = [(label, word) for label in labels for word in sorted(null_words.NULL_WORDS & {*label.classes})]
  for label, word in found if not file.text.null_values else ():
    column = f"l{names.index(label.name)}"
    ((n,),) = con.execute(f"SELECT count(*) FROM given WHERE trim({column}::VARCHAR) = ?", [word]).fetchall()
    what = f"{file.path}: column {label.name!r}"
    logger.warning(null_words.null_word_warning(what, word, n, "", (other for _, other in found)))


def _check_keys(con: duckdb.DuckDBPyConnection, file: TableFile, user: str, time: str | None) -> None:
  """Raises DataError for the first row without a valid user or time."""
  for alias, name, what in (("u", user, "user"), ("t", time, "time")):
    if name is not None:
      bad = con.execute(
        f"SELECT row, given.{alias}::VARCHAR FROM labels JOIN given USING (row) "
        f"WHERE labels.{alias} IS NULL ORDER BY row LIMIT 1"
      ).fetchall()
      for row, value in bad:
        remedy = _time_remedy(con) if alias == "t" and value is not None else ""
        raise DataError(
          f"{file.path}: row {row + 1} holds {value!r} in {name!r}, which is no {what}; {remedy or 'correct the row.'}"
        )


def _time_remedy(con: duckdb.DuckDBPyConnection) -> str:
  """Returns the option that reads the times if none of them can be read; else the empty text."""
  values = con.execute(
    "SELECT DISTINCT given.t::VARCHAR AS value, labels.t IS NULL FROM labels JOIN given USING (row) "
    f"WHERE given.t IS NOT NULL ORDER BY value LIMIT {time_formats.SAMPLE}"
  ).fetchall()
  if not all(unread for _, unread in values):
    return ""
  remedy = time_formats.time_format_remedy(con, [value for value, _ in values], "")
  return remedy[:1].lower() + remedy[1:]


def _merge(con: duckdb.DuckDBPyConnection, file: TableFile, names: Sequence[str]) -> int:
  """Merges the rows of each user and time into one, and returns the number of rows that this removed.

  Raises:
    DataError: two of these rows hold different labels.
  """
  ((rows, keys),) = con.execute("SELECT count(*), count(DISTINCT (u, t)) FROM labels").fetchall()
  if rows == keys:
    return 0
  for i, name in enumerate(names):
    clash = con.execute(
      f"SELECT u, t, min(l{i})::VARCHAR, max(l{i})::VARCHAR FROM labels GROUP BY u, t "
      f"HAVING min(l{i}) <> max(l{i}) ORDER BY min(row) LIMIT 1"
    ).fetchall()
    for user, time, low, high in clash:
      at = f" at {format_time(time)}" if time else ""
      raise DataError(
        f"{file.path}: user {user}{at} has two labels in {identifier(name)}, {low} and {high}; keep one row a user"
        f"{'' if time else ', or name the column of times with --time'}."
      )
  picked = ", ".join(f"any_value(l{i}) AS l{i}" for i in range(len(names)))
  con.execute(
    f"CREATE TEMP TABLE merged AS SELECT min(row) AS row, u, t{', ' if picked else ''}{picked} FROM labels "
    "GROUP BY u, t"
  )
  con.execute("DROP TABLE labels; ALTER TABLE merged RENAME TO labels")
  return int(rows - keys)


def _missing(column: np.ndarray) -> np.ndarray:
  return np.ma.getmaskarray(column) | np.array([v is None for v in np.ma.getdata(column)], bool)


def _label(
  file: TableFile, name: str, column: np.ndarray, missing: np.ndarray, text: bool, wanted: LabelKind | None
) -> Label | str:
  """Returns the column as a label, or the reason why it cannot be measured."""
  known = column[~missing]
  if not len(known):
    return "it holds no value"
  distinct = np.unique(known.astype(str) if text else known.astype(np.float64))
  if not text and not np.isfinite(distinct).all():
    raise DataError(f"{file.path}: column {name!r} holds a value that is infinite; correct it, or leave it empty.")
  if len(distinct) == 1:
    return f"all its values are {distinct[0] if text else _number(distinct[0])}"
  kind = wanted or _kind(distinct, text)
  if kind is None:
    return f"it holds {len(distinct):,} different texts; --kind {name}=multiclass takes them for classes"
  value = np.full(len(column), np.nan)
  if kind == "regression":
    if text:
      raise DataError(
        f"{file.path}: column {name!r} holds the text {str(distinct[0])!r}, which --kind takes for a number."
      )
    value[~missing] = known
    return Label(name, kind, value)
  if kind == "binary" and len(distinct) > 2:
    raise DataError(f"{file.path}: column {name!r} has {len(distinct)} different values; --kind takes it for binary.")
  value[~missing] = np.searchsorted(distinct, known.astype(distinct.dtype))
  return Label(name, kind, value, tuple(str(v) if text else _number(v) for v in distinct))


def _kind(distinct: np.ndarray, text: bool) -> LabelKind | None:
  if len(distinct) == 2:
    return "binary"
  if text:
    return "multiclass" if len(distinct) <= MOST_NAMED_CLASSES else None
  whole = bool(np.all(distinct == np.trunc(distinct)))
  return "multiclass" if whole and len(distinct) <= MOST_NUMBERED_CLASSES else "regression"


def _number(value: float) -> str:
  return str(int(value)) if math.isfinite(value) and value == int(value) else str(float(value))
