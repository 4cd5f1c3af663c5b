"""Reads tables of dated labels: a user, a time and a label in each row, several rows a user."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import duckdb

from supermoe_jax import config
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.data.reading import field_sql, paths, readers, value_sql
from supermoe_jax.data.reading.field_sql import Fault
from supermoe_jax.data.reading.readers import TableFile
from supermoe_jax.data.reading.text_files import clean_copies
from supermoe_jax.errors import DataError, nearest

SHOWN_VALUES = 20  # values of a column that a message about a missing value lists


class DatedTable(NamedTuple):
  """The counts of a table of dated labels that was read.

  Attributes:
    files: the number of rows of each file, in order.
    empty_files: the files without rows.
    dropped: the numbers of unusable rows by reason.
  """

  files: dict[str, int]
  empty_files: list[str]
  dropped: dict[str, int]


def create_dated_rows(con: duckdb.DuckDBPyConnection) -> None:
  """Creates the empty table `dated_rows`.

  `task` is the number of the task; `file` and `row` are numbers from 0; `time` is in microseconds since 1970 UTC.
  `value` is the label as text. `number` is 0 or 1 for a binary label, the number for a regression, and otherwise NULL.
  Both are NULL where the row has no label.
  """
  con.execute(
    'CREATE TABLE dated_rows (task INTEGER, file INTEGER, row BIGINT, "user" VARCHAR, time BIGINT, value VARCHAR, '
    "number DOUBLE, fault UTINYINT, bad_value VARCHAR)"
  )


def load_dated_rows(
  con: duckdb.DuckDBPyConnection, index: int, name: str, task: config.DatedLabel, on_bad_rows: str
) -> DatedTable:
  """Appends the rows of a task's table to `dated_rows` under the number `index`; see `create_dated_rows`.

  Raises:
    DataError: a file or a column is missing, there is no row, a positive value never occurs, or a row has no user, no
      time or an unusable label (unless `on_bad_rows` is "drop").
  """
  key = f"config.tasks.{name}"
  opened = paths.open_files(con, task.files, task.format, {task.user, task.time, task.column}, key, task)
  out = DatedTable({}, [str(file) for file in opened.empty], {})
  for number, file in enumerate(opened.tables):
    load = functools.partial(_load_file, con, index, number, key=key, task=task, on_bad_rows=on_bad_rows, out=out)
    _, bad_lines = clean_copies.read_clean(con, file, field_sql.DROP_REMEDY, load, drop=on_bad_rows == "drop")
    if bad_lines:
      out.files[str(file.path)] += bad_lines
      out.dropped["unreadable_line"] = out.dropped.get("unreadable_line", 0) + bad_lines
  con.execute(f"DELETE FROM dated_rows WHERE task = {index} AND fault > 0")
  _check_positive(con, index, key, task)
  return out


def _load_file(
  con: duckdb.DuckDBPyConnection,
  index: int,
  number: int,
  file: TableFile,
  *,
  key: str,
  task: config.DatedLabel,
  on_bad_rows: str,
  out: DatedTable,
) -> None:
  wanted = {k: file.require(getattr(task, k), f"{key}.{k}") for k in ("user", "time", "column")}
  times = value_sql.time_reading(con, file, task.time, "e.time", key, unit=task.time_unit, format=task.time_format)
  text = value_sql.text_sql('e."column"', file.columns[task.column])
  values = {
    "user": value_sql.text_sql('e."user"', file.columns[task.user]),
    "time": times.sql,
    "raw_time": "e.time",
    "value": text,
    "number": _number_sql(task, text, file.text if file.columns[task.column] == "VARCHAR" else PLAIN_TEXT),
  }
  faults = [
    Fault("null_user", task.user, '"user" IS NULL'),
    *field_sql.time_faults(task.time, file.columns[task.time]),
  ]
  if task.type != "multiclass" and not task.positive:
    what = "0 or 1" if task.type == "binary" else "a number"
    faults.append(Fault("unusable_label", task.column, "value IS NOT NULL AND number IS NULL", "value", what))
  with readers.naming(file.path, file.format):
    con.execute(
      f'INSERT INTO dated_rows SELECT {index}, {number}, row, "user", time, CASE WHEN number IS NOT NULL OR '
      f"{task.type == 'multiclass'} THEN value END, CASE WHEN isfinite(number) THEN number END, "
      f"{field_sql.fault_sql(faults)} FROM (SELECT e.row, {field_sql.aliased(values)} FROM ({file.select(wanted)}) e)"
    )
  found = con.execute(
    "SELECT fault, count(*), min(row), arg_min(bad_value, row), min(time), max(time) FROM dated_rows "
    f"WHERE task = {index} AND file = {number} GROUP BY fault ORDER BY min(row)"
  ).fetchall()
  if times.guessed:
    for fault, _, _, bad_value, low, high in found:
      epochs = _epochs(faults, fault, bad_value, low, high)
      if epochs is not None:
        value_sql.check_guessed_seconds(*epochs, f"{file.path}: column {task.time!r}", key)
  bad = [row[:4] for row in found if row[0]]
  if bad and on_bad_rows == "error":
    raise _bad_row(file, faults, bad, key)
  for fault, n, *_ in bad:
    reason = faults[fault - 1].reason
    out.dropped[reason] = out.dropped.get(reason, 0) + n
  out.files[str(file.path)] = sum(n for _, n, *_ in found)


def _number_sql(task: config.DatedLabel, text: str, format: config.TextFormat) -> str:
  """Returns the SQL of a label as a number: NULL if it is absent, none that the task can use, or a class.

  `text` is the SQL of the label as text, and `format` says how its numbers are written.
  NaN counts as absent, since many writers use it so; it stays NaN here, which tells it from an unusable label.
  """
  if task.type == "multiclass":
    return "NULL::DOUBLE"
  if task.positive:
    yes = ", ".join(map(readers.literal, task.positive))
    return f"({text} IN ({yes}))::INTEGER::DOUBLE"
  number = value_sql.number_sql(text, "VARCHAR", format)
  if task.type == "binary":
    number = f"CASE lower({text}) WHEN 'true' THEN 1.0 WHEN 'false' THEN 0.0 ELSE {number} END"
    return f"CASE WHEN {number} IN (0, 1) OR isnan({number}) THEN {number} END"
  return f"CASE WHEN NOT isinf({number}) THEN {number} END"


def _epochs(
  faults: Sequence[Fault], fault: int, bad_value: str | None, low: int | None, high: int | None
) -> tuple[float, float] | None:
  """Returns the range of the epochs of rows with this fault, in seconds; None if they have none."""
  if fault == 0 and low is not None and high is not None:
    return low / 1e6, high / 1e6
  if fault and faults[fault - 1].reason == "unparsable_time" and bad_value is not None:
    try:
      number = float(bad_value)
    except ValueError:
      return None
    return (number, number) if math.isfinite(number) else None
  return None


def _bad_row(
  file: TableFile, faults: Sequence[Fault], bad: Sequence[tuple[int, int, int, str | None]], key: str
) -> DataError:
  """Returns an error about the first of the `bad` rows; see `field_sql.bad_row`."""
  fault, n, row, value = bad[0]
  found = faults[fault - 1]
  if found.reason != "unusable_label":
    return field_sql.bad_row(file, faults, bad)
  remedy = f"{key}.type='multiclass'"
  if found.kind == "0 or 1":
    remedy = f"{key}.positive to the values that count as positive, or {key}.type to 'multiclass' or 'regression'"
  return DataError(
    f"{file.path}: row {row + 1}: {found.describe(value)} ({n} such row{'s' if n > 1 else ''}). Set {remedy}; or "
    f"correct the file; or {field_sql.DROP_REMEDY}."
  )


def _check_positive(con: duckdb.DuckDBPyConnection, index: int, key: str, task: config.DatedLabel) -> None:
  """Raises DataError if a positive value of the task never occurs, since it is most likely misspelt."""
  if not task.positive:
    return
  of_task = f"FROM dated_rows WHERE task = {index} AND value IS NOT NULL"
  names = ", ".join(map(readers.literal, task.positive))
  there = {v for (v,) in con.execute(f"SELECT DISTINCT value {of_task} AND value IN ({names})").fetchall()}
  for value in task.positive:
    if value not in there:
      frequent = con.execute(
        f"SELECT value {of_task} GROUP BY value ORDER BY count(*) DESC, value LIMIT {SHOWN_VALUES + 1}"
      ).fetchall()
      present = [v for (v,) in frequent]
      hint = nearest(value, present).partition("; valid")[0]
      shown = ", ".join(repr(v) for v in present[:SHOWN_VALUES]) + (", …" if len(present) > SHOWN_VALUES else "")
      raise DataError(
        f"{key}.positive: {value!r} never occurs in column {task.column!r}{hint} "
        f"(it holds {shown or 'no value at all'})."
      )
