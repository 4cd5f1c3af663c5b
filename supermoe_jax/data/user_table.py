"""The table of users: what is known of some users besides their events, as binary labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb

from supermoe_jax import config
from supermoe_jax.data import parsing, readers
from supermoe_jax.data.readers import DataError, EmptyFileError, TableFile, literal

SHOWN_VALUES = 20  # of a column, in a message about a value that it does not hold


def read_user_table(
  users: config.UserTable, tasks: Mapping[str, config.UserLabel]
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
  """Reads the labels of the users: 1 where the task's column holds one of its positive values, else 0.

  A user without a value has no label: unknown is not negative.

  Returns: the labels, task → user's id as text → 0 or 1; and the counts: `user_rows`, and of each task in
  `user_labels` the users `labelled`, those of them `positive`, and those `without_value`.

  Raises:
    DataError: a file or a column is missing, there is no row, a user is absent or has two rows, or a positive value
      never occurs.
  """
  columns = {task.column: f"c{i}" for i, task in enumerate(tasks.values())}
  con = readers.connect()
  try:
    declared = "".join(f", {c} VARCHAR" for c in columns.values())
    con.execute(f'CREATE TABLE users (file INTEGER, row BIGINT, "user" VARCHAR{declared})')
    files = _read(con, users, tasks, columns)
    _check_users(con, users, files)
    for name, task in tasks.items():
      _check_positive(con, f"config.tasks.{name}.positive", task, columns[task.column])
    labels, counts = {}, {}
    for name, task in tasks.items():
      labels[name] = _labels(con, task, columns[task.column])
      ((without,),) = con.execute(f"SELECT count_if({columns[task.column]} IS NULL) FROM users").fetchall()
      positive = int(sum(labels[name].values()))
      counts[name] = {"labelled": len(labels[name]), "positive": positive, "without_value": without}
    ((rows,),) = con.execute("SELECT count(*) FROM users").fetchall()
    return labels, {"user_rows": rows, "user_labels": counts}
  finally:
    con.close()


def _read(
  con: duckdb.DuckDBPyConnection,
  users: config.UserTable,
  tasks: Mapping[str, config.UserLabel],
  columns: Mapping[str, str],
) -> list[TableFile]:
  """Appends the user column and the tasks' columns of all files to the table `users`."""
  key = "config.data.users"
  files: list[TableFile] = []
  found = readers.find_files(users.files, f"{key}.files")
  for file in found:
    try:
      table = readers.open_table(con, file.path, users.format, {users.user, *columns})
    except EmptyFileError as error:
      if not file.may_be_empty:
        raise DataError(f"{error} Remove it from {key}.files.") from None
      continue
    wanted = {"user": table.require(users.user, f"{key}.user")}
    wanted |= {columns[t.column]: table.require(t.column, f"config.tasks.{n}.column") for n, t in tasks.items()}
    values = [parsing.text_sql(f"e.{readers.identifier(a)}", table.columns[n]) for a, n in wanted.items()]
    with readers.naming(table.path, table.format):
      con.execute(f"INSERT INTO users SELECT {len(files)}, e.row, {', '.join(values)} FROM ({table.select(wanted)}) e")
    files.append(table)
  if not files:
    raise DataError(f"{key}.files: none of the {len(found)} files holds a row, the first of them {found[0].path}.")
  return files


def _check_users(con: duckdb.DuckDBPyConnection, users: config.UserTable, files: list[TableFile]) -> None:
  """Raises DataError if a row has no user, or a user two rows."""
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
    raise DataError(f"{where}: {users.user}={user!r} stands in {n} rows of config.data.users; keep one row a user.")


def _check_positive(con: duckdb.DuckDBPyConnection, key: str, task: config.UserLabel, column: str) -> None:
  """Raises DataError if a positive value of the task does not occur: it is most likely misspelt."""
  present = [
    v for (v,) in con.execute(f"SELECT DISTINCT {column} FROM users WHERE {column} IS NOT NULL ORDER BY 1").fetchall()
  ]
  for value in task.positive:
    if value not in present:
      hint = config.nearest(value, present).partition("; valid")[0]
      shown = ", ".join(repr(v) for v in present[:SHOWN_VALUES]) + (", …" if len(present) > SHOWN_VALUES else "")
      raise DataError(
        f"{key}: {value!r} never occurs in column {task.column!r}{hint} (it holds {shown or 'no value at all'})."
      )


def _labels(con: duckdb.DuckDBPyConnection, task: config.UserLabel, column: str) -> dict[str, float]:
  positive = ", ".join(literal(v) for v in task.positive)
  query = f'SELECT "user", ({column} IN ({positive}))::DOUBLE FROM users WHERE {column} IS NOT NULL ORDER BY "user"'
  return dict(con.execute(query).fetchall())
