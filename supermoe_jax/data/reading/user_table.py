"""Reads the user table: one row a user, with columns that become labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import duckdb
import numpy as np

from supermoe_jax import config
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.data.encoding.numeric import LARGEST, Numeric
from supermoe_jax.data.encoding.splits import TRAIN, user_split
from supermoe_jax.data.encoding.vocabulary import Classes, LabelEncoder
from supermoe_jax.data.reading import field_sql, paths, readers, value_sql
from supermoe_jax.data.reading.field_sql import DROP_REMEDY
from supermoe_jax.data.reading.readers import TableFile
from supermoe_jax.data.reading.text_files import clean_copies
from supermoe_jax.errors import DataError, nearest

SHOWN_VALUES = 20  # values of a column that a message about a missing value lists


class UserLabels(NamedTuple):
  """The labels of users.

  Attributes:
    values: task → user's id as text → the label: 0 or 1, the class's index, or the standardised number.
    encoders: the encoder of each task with classes or numbers.
    counts: `user_rows`, and in `user_labels` for each task the numbers of users `labelled` and `without_value`. A
      binary task also has the number of `positive` users; a multiclass task the number of users of each of the
      `classes`, and with an `unseen_class`, one that no training user has; a regression the `mean` and `std` of
      training users, and the numbers of `dropped` values and of values `clipped` by the encoding.
  """

  values: dict[str, dict[str, float]]
  encoders: dict[str, LabelEncoder]
  counts: dict[str, Any]


def read_user_table(
  users: config.UserTable, tasks: Mapping[str, config.UserLabel], split: config.Split, on_bad_rows: str = "error"
) -> UserLabels:
  """Reads the labels of the users; classes and statistics come from the training users of `split`.

  A user without a value has no label: unknown is not negative. A user with a class that no training user has, has no
  label either.

  Raises:
    DataError: a file or a column is missing, there is no row, a user is absent or has two rows, a positive value never
      occurs, a regression's value is no number (unless `on_bad_rows` is "drop"), or no training user has a value.
  """
  columns = {task.column: f"c{i}" for i, task in enumerate(tasks.values())}
  con = readers.connect()
  try:
    declared = "".join(f", {c} VARCHAR" for c in columns.values())
    con.execute(f'CREATE TABLE users (file INTEGER, row BIGINT, "user" VARCHAR{declared})')
    files, bad_lines = _read(con, users, tasks, columns, on_bad_rows == "drop")
    _check_users(con, users, files)
    out = UserLabels({}, {}, {"user_labels": {}})
    for name, task in tasks.items():
      column = columns[task.column]
      if task.type == "binary":
        _check_positive(con, f"config.tasks.{name}.positive", task, column)
        out.values[name], counts = _binary(con, task, column)
      elif task.type == "multiclass":
        out.values[name], out.encoders[name], counts = _multiclass(con, name, task, column, split)
      else:
        number = _number(column, users if files[0].columns[task.column] == "VARCHAR" else PLAIN_TEXT)
        _check_numbers(con, task, column, number, files, on_bad_rows)
        out.values[name], out.encoders[name], counts = _regression(con, name, task, column, number, split)
      out.counts["user_labels"][name] = {"labelled": len(out.values[name]), **counts}
    if bad_lines:
      out.counts["unreadable_lines"] = bad_lines
    ((out.counts["user_rows"],),) = con.execute("SELECT count(*) FROM users").fetchall()
    return out
  finally:
    con.close()


def _read(
  con: duckdb.DuckDBPyConnection,
  users: config.UserTable,
  tasks: Mapping[str, config.UserLabel],
  columns: Mapping[str, str],
  drop: bool,
) -> tuple[list[TableFile], int]:
  """Appends the user column and the tasks' columns of all files to the table `users`.

  Returns: the files, and the number of bad lines that were left out.
  """
  key, dropped = "config.data.users", 0
  files = paths.open_files(con, users.files, users.format, {users.user, *columns}, key, users).tables
  for index, table in enumerate(files):
    wanted = {"user": table.require(users.user, f"{key}.user")}
    wanted |= {columns[t.column]: table.require(t.column, f"config.tasks.{n}.column") for n, t in tasks.items()}
    field_sql.check_ids(con, table, users.user, f"{key}.user")
    for name, task in tasks.items():
      field_sql.check_plain(table, task.column, f"config.tasks.{name}.column")
    values = [value_sql.text_sql(f"e.{readers.identifier(a)}", table.columns[n]) for a, n in wanted.items()]
    begun = f"INSERT INTO users SELECT {index}, e.row, {', '.join(values)}"

    def insert(read: TableFile, begun: str = begun, wanted: dict[str, str] = wanted) -> None:
      with readers.naming(read.path, read.format):
        con.execute(f"{begun} FROM ({read.select(wanted)}) e")

    _, bad = clean_copies.read_clean(con, table, DROP_REMEDY, insert, drop=drop)
    dropped += bad
  return files, dropped


def _check_users(con: duckdb.DuckDBPyConnection, users: config.UserTable, files: list[TableFile]) -> None:
  """Raises DataError if a row has no user, or a user has two rows."""
  absent = con.execute(
    'SELECT file, min(row), count(*) FROM users WHERE "user" IS NULL GROUP BY file ORDER BY file'
  ).fetchall()
  for file, row, n in absent[:1]:
    raise DataError(
      f"{files[file].path}: row {row + 1}: column {users.user!r} is empty ({n} such row{'s' if n > 1 else ''}); "
      "remove such rows or fill in the user."
    )
  twice = con.execute(
    'SELECT "user", list((file, row) ORDER BY file, row)[:2], count(*) AS n FROM users GROUP BY "user" HAVING n > 1 '
    "ORDER BY min((file, row)) LIMIT 1"
  ).fetchall()
  for user, places, n in twice:
    where = " and ".join(f"{files[file].path} row {row + 1}" for file, row in places)
    raise DataError(f"{where}: {users.user}={user!r} has {n} rows in config.data.users; keep one row a user.")


def _check_positive(con: duckdb.DuckDBPyConnection, key: str, task: config.UserLabel, column: str) -> None:
  """Raises DataError if a positive value of the task never occurs, since it is most likely misspelt."""
  present = [
    v for (v,) in con.execute(f"SELECT DISTINCT {column} FROM users WHERE {column} IS NOT NULL ORDER BY 1").fetchall()
  ]
  for value in task.positive:
    if value not in present:
      hint = nearest(value, present).partition("; valid")[0]
      shown = ", ".join(repr(v) for v in present[:SHOWN_VALUES]) + (", …" if len(present) > SHOWN_VALUES else "")
      raise DataError(
        f"{key}: {value!r} never occurs in column {task.column!r}{hint} (it holds {shown or 'no value at all'})."
      )


def _check_numbers(
  con: duckdb.DuckDBPyConnection,
  task: config.UserLabel,
  column: str,
  number: str,
  files: list[TableFile],
  on_bad_rows: str,
) -> None:
  """Raises DataError for the first value that is no finite number, unless bad values may be dropped.

  `number` is the SQL of the column's values as numbers.
  """
  bad = con.execute(
    f"SELECT file, min(row), count(*), arg_min({column}, row), arg_min(coalesce(isfinite({number}), false), row) "
    f"FROM users WHERE {_bad_number(column, number)} GROUP BY file ORDER BY file LIMIT 1"
  ).fetchall()
  for file, row, n, value, finite in bad if on_bad_rows == "error" else []:
    more = f" ({n} such row{'s' if n > 1 else ''})"
    wrong = f"which is beyond {LARGEST:.2g}, the largest that can be standardised"
    if not finite:
      wrong = "which is not a number"
    raise DataError(
      f"{files[file].path}: row {row + 1}: column {task.column!r} holds {value!r}, {wrong}{more}. "
      "Correct the file, set type='multiclass', or let config.data.on_bad_rows='drop' leave such labels out, and count "
      "them."
    )


def _number(column: str, text: config.TextFormat) -> str:
  return value_sql.number_sql(column, "VARCHAR", text)


def _bad_number(column: str, number: str) -> str:
  return f"{column} IS NOT NULL AND ({number} IS NULL OR (abs({number}) > {LARGEST!r}::DOUBLE AND NOT isnan({number})))"


def _known(con: duckdb.DuckDBPyConnection, value: str) -> tuple[dict[str, Any], int]:
  """Returns the users' values of an SQL expression, in the order of ids, and the number of users without a value."""
  rows = con.execute(f'SELECT "user", {value} AS value FROM users ORDER BY "user"').fetchall()
  known = {user: v for user, v in rows if v is not None}
  return known, len(rows) - len(known)


def _of_training_users(values: Mapping[str, Any], split: config.Split, name: str, task: config.UserLabel) -> list[Any]:
  training = [v for u, v in values.items() if user_split(u, split) == TRAIN]
  if not training:
    raise DataError(
      f"config.tasks.{name}: no training user has a value in column {task.column!r} ({len(values)} other users have "
      "one); correct the column, or lower config.data.split.user_validation and user_test."
    )
  return training


def _binary(con: duckdb.DuckDBPyConnection, task: config.UserLabel, column: str) -> tuple[dict[str, float], dict]:
  known, without = _known(con, column)
  labels = {user: float(value in task.positive) for user, value in known.items()}
  return labels, {"positive": int(sum(labels.values())), "without_value": without}


def _multiclass(
  con: duckdb.DuckDBPyConnection, name: str, task: config.UserLabel, column: str, split: config.Split
) -> tuple[dict[str, float], Classes, dict]:
  known, without = _known(con, column)
  counted = Counter(_of_training_users(known, split, name, task))
  ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
  index = {value: i for i, (value, _) in enumerate(ordered)}
  labels = {user: float(index[value]) for user, value in known.items() if value in index}
  everyone = Counter(known.values())
  counts = {
    "classes": {value: everyone[value] for value in index},
    "unseen_class": len(known) - len(labels),
    "without_value": without,
  }
  return labels, Classes(tuple(index), tuple(n for _, n in ordered)), counts


def _regression(
  con: duckdb.DuckDBPyConnection, name: str, task: config.UserLabel, column: str, number: str, split: config.Split
) -> tuple[dict[str, float], Numeric, dict]:
  # NaN counts as absent, since many writers use it so.
  bad = _bad_number(column, number)
  known, without = _known(con, f"CASE WHEN isfinite({number}) AND NOT ({bad}) THEN {number} END")
  ((dropped,),) = con.execute(f"SELECT count_if({bad}) FROM users").fetchall()
  training = np.array(_of_training_users(known, split, name, task))
  encoder = Numeric.of(training.mean(), training.std())
  labels = {user: float(encoder.encode(value)) for user, value in known.items()}
  clipped = int(encoder.clips(np.array(list(known.values()), np.float64)).sum())
  counts = {
    "mean": encoder.mean,
    "clipped": clipped,
    "std": encoder.std,
    "dropped": dropped,
    "without_value": without - dropped,
  }
  return labels, encoder, counts
