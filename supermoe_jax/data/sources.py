"""Sources of events into one DuckDB table of rows, each checked and, where it cannot be used, marked with its fault.

The table `rows` holds what the files hold, in their order: `user` VARCHAR, `time` BIGINT microseconds since 1970 UTC,
`source` INTEGER, `ord` BIGINT (the row's place in the whole log), `fault` (0: none), `bad_value`, `no_item` (its item
has no row in the source's table of items), and the column that `field_columns()` gives each field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import duckdb

from supermoe_jax import config
from supermoe_jax.data import files as files_lib
from supermoe_jax.data import parsing, readers, sequences
from supermoe_jax.data.readers import DataError, EmptyFileError, TableFile

DROP_REMEDY = "set config.data.on_bad_rows='drop' to leave such rows out and count them"


@dataclasses.dataclass(frozen=True)
class Fault:
  """Why a row cannot be used.

  Attributes:
    reason: its name in the counts.
    column: the column of the file that is to blame.
    condition: SQL that is true of such a row.
    value: SQL of the offending value as text; empty if the value is absent.
    kind: what the value should have been.
  """

  reason: str
  column: str
  condition: str
  value: str = ""
  kind: str = ""

  def describe(self, value: str | None) -> str:
    """Says what is wrong with a row."""
    if not self.kind:
      return f"column {self.column!r} is empty"
    return f"column {self.column!r} holds {value!r}, which is not {self.kind}"


def _fault_sql(faults: Sequence[Fault]) -> str:
  """The columns `fault`, the number from 1 of the first fault that holds or 0, and `bad_value`."""
  which = " ".join(f"WHEN {f.condition} THEN {i}" for i, f in enumerate(faults, 1))
  value = " ".join(f"WHEN {i} THEN {f.value}" for i, f in enumerate(faults, 1) if f.value)
  return f"CASE {which} ELSE 0 END AS fault, " + (f"CASE fault {value} END" if value else "NULL") + " AS bad_value"


def field_columns(data: config.Data) -> dict[str, str]:
  """The column of each field in the table `rows`."""
  return {name: f"f{i}" for i, name in enumerate(data.fields)}


@dataclasses.dataclass(frozen=True)
class _Items:
  """A source's table of items, loaded: `key` as text, and each field that it holds under the field's column."""

  table: str
  columns: Collection[str]
  fields: Collection[str]
  rows_dropped: int


class SourceReader:
  """Reads the sources of a config into the table `rows` of a database.

  Attributes:
    counts: of each source read so far, its rows read, by file and in all, dropped by reason, and empty files.
    user_type: the DuckDB type of the user column in the first source's first file.
  """

  def __init__(self, con: duckdb.DuckDBPyConnection, data: config.Data):
    self.counts: dict[str, dict[str, Any]] = {}
    self.user_type = ""
    self._con, self._data = con, data
    self._columns = field_columns(data)
    self._rows = 0
    fields = "".join(f", {c} {_stored_type(data.fields[n])}" for n, c in self._columns.items())
    con.execute(
      'CREATE TABLE rows ("user" VARCHAR, time BIGINT, source INTEGER, ord BIGINT, fault UTINYINT, bad_value VARCHAR, '
      f"no_item BOOLEAN{fields})"
    )

  def read(self) -> None:
    """Reads every source.

    Raises:
      DataError: a file or, unless `data.on_bad_rows` allows to drop it, a row cannot be used.
    """
    for index, name in enumerate(self._data.sources):
      self._read_source(index, name)

  def _read_source(self, index: int, name: str) -> None:
    source, key = self._data.sources[name], f"config.data.sources.{name}"
    items = self._load_items(index, name, source.items) if source.items else None
    counts = self.counts[name] = {"rows_read": 0, "dropped": {}, "files": {}, "empty_files": []}
    if items:
      counts |= {"items_missing": 0, "item_rows_dropped": items.rows_dropped}
    wanted = {source.user, source.time, *self._carried(name).values()}
    if items and source.items:
      wanted = wanted - set(items.columns) | {source.items.key}
    tables = []
    found = files_lib.find_files(self._con, source.files, f"{key}.files")
    for file in found:
      try:
        tables.append(readers.open_table(self._con, file.path, source.format, wanted))
      except EmptyFileError as error:
        if not file.may_be_empty:
          raise DataError(f"{error} Remove it from {key}.files.") from None
        counts["empty_files"].append(str(file.path))
    sequences.check(self._con, tables)
    for table in tables:
      self._read_file(index, name, table, items)
    if not tables:
      raise DataError(f"{key}.files: none of the {len(found)} files holds a row, the first of them {found[0].path}.")

  def _carried(self, source: str) -> dict[str, str]:
    """The fields that a source's events carry, and the name of the column of each."""
    return {n: f.column or n for n, f in self._data.fields.items() if not f.sources or source in f.sources}

  def _read_file(self, index: int, name: str, file: TableFile, items: _Items | None) -> None:
    """Appends a file's rows to `rows` and counts them."""
    source, key = self._data.sources[name], f"config.data.sources.{name}"
    wanted = {"user": file.require(source.user, f"{key}.user"), "time": file.require(source.time, f"{key}.time")}
    reading = parsing.time_reading(
      self._con, file, source.time, "e.time", key, unit=source.time_unit, format=source.time_format
    )
    user_type, time_type = file.columns[source.user], file.columns[source.time]
    self.user_type = self.user_type or ("VARCHAR" if user_type.startswith("ENUM") else user_type)
    values = {
      "user": parsing.text_sql('e."user"', user_type),
      "time": reading.sql,
      "raw_time": parsing.text_sql("e.time", time_type),
      "no_item": "i.key IS NULL" if items else "false",
    }
    faults = [
      Fault("null_user", source.user, '"user" IS NULL'),
      Fault("null_time", source.time, "raw_time IS NULL"),
      Fault("unparsable_time", source.time, "time IS NULL", "raw_time", "a time"),
    ]
    own = {}
    for field, column in self._carried(name).items():
      if column not in file.columns and items and field in items.fields:
        values[self._columns[field]] = f"i.{self._columns[field]}"
      else:
        own[field] = file.require(column, f"config.data.fields.{field}", items.columns if items else ())
    field_values, field_faults = self._field_values(file, own)
    wanted |= {self._columns[f]: column for f, column in own.items()}
    values |= field_values
    faults += field_faults
    join = ""
    if items:
      assert source.items is not None
      wanted["key"] = file.require(source.items.key, f"{key}.items.key")
      join = f"LEFT JOIN {items.table} i ON {parsing.text_sql('e.key', file.columns[wanted['key']])} = i.key"
    columns = ", ".join(self._stored(n) if c in values else "NULL" for n, c in self._columns.items())
    with readers.naming(file.path, file.format):
      self._con.execute(
        f'INSERT INTO rows SELECT "user", time, {index}, {self._rows} + row, {_fault_sql(faults)}, no_item, {columns} '
        f"FROM (SELECT e.row, {_aliased(values)} FROM ({file.select(wanted)}) e {join})"
      )
    self._count(name, file, faults, reading)

  def _field_values(self, file: TableFile, fields: Mapping[str, str]) -> tuple[dict[str, str], list[Fault]]:
    """The SQL of fields (name → column) read from a file `e`, and the faults that they may have."""
    values, faults = {}, []
    for name, column in fields.items():
      kind, alias = file.columns[column], self._columns[name]
      field = self._data.fields[name]
      if field.many:
        json = file.format in readers.JSON_FORMATS
        values[alias] = parsing.list_sql(f"e.{alias}", kind, field.separator, json=json)
        continue
      if field.kind != "numeric":
        values[alias] = parsing.text_sql(f"e.{alias}", kind)
        continue
      try:
        number = parsing.number_sql(f"e.{alias}", kind)
      except TypeError:
        raise DataError(
          f"{file.path}: column {column!r} is of type {kind}, which is not a number; name another column, or set "
          f"config.data.fields.{name}.kind='vocabulary'."
        ) from None
      values[alias] = f"CASE WHEN isfinite({number}) THEN {number} END"
      # NaN is how many writers spell an absent number; infinity would spoil every mean.
      bad = f"{number} IS NULL OR isinf({number})"
      values[f"bad_{alias}"] = f"CASE WHEN {bad} THEN {parsing.text_sql(f'e.{alias}', kind)} END"
      faults.append(Fault(f"unparsable_field_{name}", column, f"bad_{alias} IS NOT NULL", f"bad_{alias}", "a number"))
    return values, faults

  def _stored(self, field: str) -> str:
    """The SQL of a field's value as `rows` holds it."""
    column, spec = self._columns[field], self._data.fields[field]
    log1p = spec.kind == "numeric" and spec.encoding == "log1p"
    return f"sign({column}) * ln(1 + abs({column}))" if log1p else column

  def _count(self, name: str, file: TableFile, faults: Sequence[Fault], reading: parsing.TimeReading) -> None:
    """Counts a file's rows, just appended; raises DataError if one cannot be used and may not be dropped."""
    counts, first = self.counts[name], self._rows
    found = self._con.execute(
      "SELECT fault, count(*), min(ord), arg_min(bad_value, ord), count_if(no_item), min(time), max(time) "
      f"FROM rows WHERE ord >= {first} GROUP BY fault ORDER BY min(ord)"
    ).fetchall()
    if reading.guessed:
      self._check_guess(name, file, faults, found)
    bad = [row[:4] for row in found if row[0]]
    if bad and self._data.on_bad_rows == "error":
      raise _bad_row(file, faults, [(fault, n, ord - first, value) for fault, n, ord, value in bad])
    rows, items_joined = 0, "items_missing" in counts
    for fault, n, _, _, missing, _, _ in found:
      rows += n
      if fault:
        counts["dropped"][faults[fault - 1].reason] = counts["dropped"].get(faults[fault - 1].reason, 0) + n
      elif items_joined:
        counts["items_missing"] += missing
    self._rows += rows
    counts["rows_read"] += rows
    counts["files"][str(file.path)] = rows

  def _check_guess(self, name: str, file: TableFile, faults: Sequence[Fault], found: Sequence[tuple[Any, ...]]) -> None:
    """Raises DataError if the epochs of a file cannot be seconds, of which they may be too large to be any time."""
    column = self._data.sources[name].time
    for fault, _, _, bad_value, _, earliest, latest in found:
      if fault == 0:
        low, high = earliest / 1e6, latest / 1e6
      elif faults[fault - 1].reason == "unparsable_time" and (number := _number(bad_value)) is not None:
        low = high = number
      else:
        continue
      parsing.check_guessed_seconds(low, high, f"{file.path}: column {column!r}", f"config.data.sources.{name}")

  # -------------------------------------------------------------------------------------------------------------- items

  def _load_items(self, index: int, name: str, items: config.ItemTable) -> _Items:
    """Loads a source's table of items.

    Raises:
      DataError: its file cannot be used, or a key has two rows.
    """
    key = f"config.data.sources.{name}.items"
    file = self._open_items(items, key, {items.table_key or items.key, *self._carried(name).values()})
    there = items.table_key or (readers.KEY if file.format == "json_object" else items.key)
    file.require(there, f"{key}.{'table_key' if items.table_key else 'key'}")
    fields = {f: c for f, c in self._carried(name).items() if c in file.columns and c not in (items.key, there)}
    values, faults = self._field_values(file, fields)
    faults = [Fault("null_key", there, "key IS NULL"), *faults]
    values["key"] = parsing.text_sql("e.key", file.columns[there])
    wanted = {"key": there, **{self._columns[f]: c for f, c in fields.items()}}
    table = f"items_{index}"
    with readers.naming(file.path, file.format):
      self._con.execute(
        f"CREATE TEMP TABLE {table} AS SELECT *, {_fault_sql(faults)} "
        f"FROM (SELECT e.row, {_aliased(values)} FROM ({file.select(wanted)}) e)"
      )
    bad = self._con.execute(
      f"SELECT fault, count(*), min(row), arg_min(bad_value, row) FROM {table} WHERE fault > 0 "
      "GROUP BY fault ORDER BY min(row)"
    ).fetchall()
    if bad and self._data.on_bad_rows == "error":
      raise _bad_row(file, faults, bad)
    self._con.execute(f"DELETE FROM {table} WHERE fault > 0")
    twice = self._con.execute(
      f"SELECT key, count(*), min(row) FROM {table} GROUP BY key HAVING count(*) > 1 ORDER BY 3 LIMIT 1"
    ).fetchall()
    for value, n, row in twice:
      raise DataError(
        f"{file.path}: {n} rows have {there}={value!r}, the first is row {row + 1}; an item needs exactly one row "
        f"({key})."
      )
    return _Items(table, file.columns, fields, sum(n for _, n, *_ in bad))

  def _open_items(self, items: config.ItemTable, key: str, wanted: Collection[str]) -> TableFile:
    found = files_lib.find_files(self._con, [items.file], f"{key}.file")
    if len(found) > 1:
      raise DataError(f"{key}.file: {items.file} matches {len(found)} files; a table of items is one file.")
    return readers.open_table(self._con, found[0].path, items.format, wanted)


def _number(text: str) -> float | None:
  try:
    number = float(text)
  except ValueError:
    return None
  return number if math.isfinite(number) else None


def _stored_type(field: config.Field) -> str:
  if field.kind == "numeric":
    return "DOUBLE"
  return "VARCHAR[]" if field.many else "VARCHAR"


def _aliased(values: Mapping[str, str]) -> str:
  return ", ".join(f"{value} AS {readers.identifier(alias)}" for alias, value in values.items())


def _bad_row(file: TableFile, faults: Sequence[Fault], bad: Sequence[tuple[int, int, int, str | None]]) -> DataError:
  """Names the first of the bad rows, each given as (fault, count, number of the first row from 0, its value)."""
  fault, n, row, value = bad[0]
  others = sum(count for _, count, *_ in bad) - n
  more = f", and {others} with other faults" if others else ""
  return DataError(
    f"{file.path}: row {row + 1}: {faults[fault - 1].describe(value)} ({n} such row{'s' if n > 1 else ''}{more}). "
    f"Correct the file, or {DROP_REMEDY}."
  )
