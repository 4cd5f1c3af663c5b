"""Reads the sources of events into one DuckDB table of rows, and marks each unusable row with its fault.

The table `rows` holds the rows of all files in order: `user` VARCHAR, `time` BIGINT microseconds since 1970 UTC,
`source` INTEGER, `ord` BIGINT (the row's place in the whole log), `fault` (0: none), `bad_value`, `no_item` (the item
has no row in the source's item table), `no_user_row` (the user has no row in the user table), and a column for each
field, named by `field_columns()`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import duckdb

from supermoe_jax import config
from supermoe_jax.data.reading import field_sql, joined_tables, paths, readers, sequence_files, time_formats, value_sql
from supermoe_jax.data.reading.field_sql import (
  DROP_REMEDY,
  Fault,
  aliased,
  bad_row,
  carried,
  fault_sql,
  field_columns,
  read_sql,
  stored_type,
  time_faults,
)
from supermoe_jax.data.reading.joined_tables import JoinedTable
from supermoe_jax.data.reading.readers import TableFile
from supermoe_jax.data.reading.text_files import clean_copies
from supermoe_jax.data.reading.vector_sql import store_vectors
from supermoe_jax.errors import DataError
from supermoe_jax.progress import ProgressBar

SHOWN_KEYS = 3  # of each side of a join that finds nobody
FILE_PLACES = 1 << 40  # places in the log that each file has for its rows


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """A file of events.

  Attributes:
    number: the file's index among all files of the log, which is also the order of their rows.
    source: the name of the file's source.
    table: the opened file.
  """

  number: int
  source: str
  table: TableFile


class FileCounts(NamedTuple):
  """Counts of the rows of a file of events.

  Attributes:
    rows: the number of all rows.
    dropped: reason → the number of unusable rows.
    items_missing: the number of usable rows without a row in the item table.
    users_missing: the number of usable rows without a row in the user table.
    columns_missing: the fields whose column the file lacks, as `config.Field.missing` allows.
  """

  rows: int
  dropped: dict[str, int]
  items_missing: int
  users_missing: int
  columns_missing: list[str]


@dataclasses.dataclass(frozen=True)
class Reading:
  """Counts of the rows of all files of a log.

  Attributes:
    sources: source → counts: `rows_read`, by file (`files`) and in all, `dropped` by reason, `empty_files`, and in
      `columns_missing` for each field the files that lack its column. A source with an item table also has
      `items_missing`, its events without a row there, and `item_rows_dropped`; a source with fields of the user table
      has `users_missing`.
    user_rows_dropped: the number of unusable rows of the user table, if it is joined.
    user_type: the DuckDB type of the user column in the first source's first file.
  """

  sources: dict[str, dict[str, Any]]
  user_rows_dropped: int
  user_type: str

  def add(self, file: SourceFile, found: FileCounts) -> None:
    """Adds the counts of a file; files are added in order."""
    counts = self.sources[file.source]
    for reason, n in found.dropped.items():
      counts["dropped"][reason] = counts["dropped"].get(reason, 0) + n
    for key, missing in (("items_missing", found.items_missing), ("users_missing", found.users_missing)):
      if key in counts:
        counts[key] += missing
    for field in found.columns_missing:
      counts["columns_missing"].setdefault(field, []).append(str(file.table.path))
    counts["rows_read"] += found.rows
    counts["files"][str(file.table.path)] = found.rows

  def finds_nobody(self, missing: str, *sources: str) -> bool:
    """Returns whether sources have usable rows, but no row has a match in a joined table.

    `missing` names the count of usable rows without a match, such as "items_missing".
    """
    counts = [self.sources[name] for name in sources]
    usable = sum(c["rows_read"] - sum(c["dropped"].values()) for c in counts)
    return usable > 0 and sum(c[missing] for c in counts) == usable

  @property
  def rows(self) -> int:
    """Returns the number of rows that were read."""
    return sum(counts["rows_read"] for counts in self.sources.values())

  @property
  def dropped(self) -> dict[str, int]:
    """Returns the number of unusable rows by reason."""
    out: dict[str, int] = {}
    for counts in self.sources.values():
      for reason, n in counts["dropped"].items():
        out[reason] = out.get(reason, 0) + n
    return out


def create_rows(con: duckdb.DuckDBPyConnection, data: config.Data) -> None:
  """Creates the empty table `rows`."""
  fields = "".join(f", {c} {stored_type(data.fields[n])}" for n, c in field_columns(data).items())
  con.execute(
    'CREATE TABLE rows ("user" VARCHAR, time BIGINT, source INTEGER, ord BIGINT, fault UTINYINT, bad_value VARCHAR, '
    f"no_item BOOLEAN, no_user_row BOOLEAN{fields})"
  )


class SourceReader:
  """Reader of the files of a config's sources into the table `rows` of a database, which it creates."""

  def __init__(self, con: duckdb.DuckDBPyConnection, data: config.Data):
    self._con, self._data = con, data
    self._columns = field_columns(data)
    self._joined: dict[str, JoinedTable] = {}
    create_rows(con, data)

  def open(self, *, part: bool = False) -> tuple[list[SourceFile], Reading]:
    """Returns the opened files with rows of every source, in order, and a `Reading` without counted rows.

    Raises:
      DataError: a file, a joined table or a line of a sequence file cannot be used, or no file has a field's column,
        unless they are `part` of a log.
    """
    files: list[SourceFile] = []
    users = self._users() if any(f.table == "users" for f in self._data.fields.values()) else None
    # A source may have no files here: an append reads new files only.
    reading = {name: self._open_source(name, files) for name, source in self._data.sources.items() if source.files}
    if not part:
      self._check_columns(files)
    user_type = files[0].table.columns.get(self._data.sources[files[0].source].user, "")
    return files, Reading(
      reading, users.rows_dropped if users else 0, "VARCHAR" if user_type.startswith("ENUM") else user_type
    )

  def _check_columns(self, files: Sequence[SourceFile]) -> None:
    """Raises DataError if the column of a field that files may lack is in none of the files and tables."""
    for name, field in self._data.fields.items():
      carrying = [f for f in files if name in carried(self._data, f.source)] if field.missing == "null" else []
      found = (name in self._fields_of_items(f.source) or (field.column or name) in f.table.columns for f in carrying)
      if carrying and not any(found):
        carrying[-1].table.require(field.column or name, f"config.data.fields.{name}, and no other file has it")

  def _fields_of_items(self, source: str) -> Collection[str]:
    items = self._items(source)
    return items.fields if items else ()

  def _open_source(self, name: str, files: list[SourceFile]) -> dict[str, Any]:
    """Appends the opened files of a source to `files`, and returns the source's counts, without rows yet."""
    source, key = self._data.sources[name], f"config.data.sources.{name}"
    items = self._items(name)
    counts: dict[str, Any] = {"rows_read": 0, "dropped": {}, "files": {}, "empty_files": [], "columns_missing": {}}
    if items:
      counts |= {"items_missing": 0, "item_rows_dropped": items.rows_dropped}
    if carried(self._data, name, "users"):
      counts["users_missing"] = 0
    wanted = {source.user, source.time, *carried(self._data, name).values()}
    if items and source.items:
      wanted = wanted - set(items.columns) | {source.items.key}
    opened = paths.open_files(self._con, source.files, source.format, wanted, key, source)
    counts["empty_files"] += map(str, opened.empty)
    sequence_files.check_sequences(self._con, opened.tables)
    files += [SourceFile(i, name, table) for i, table in enumerate(opened.tables, len(files))]
    return counts

  def _users(self) -> JoinedTable:
    if "" not in self._joined:
      self._joined[""] = joined_tables.load_user_fields(self._con, self._data)
    return self._joined[""]

  def _items(self, source: str) -> JoinedTable | None:
    if not self._data.sources[source].items:
      return None
    if source not in self._joined:
      self._joined[source] = joined_tables.load_items(self._con, self._data, source)
    return self._joined[source]

  def read(self, *, part: bool = False) -> Reading:
    """Reads every source. Unless they are `part` of a log, each joined table has to hold a key of the events.

    Raises:
      DataError: a file, a joined table or, unless `data.on_bad_rows` allows to drop it, a row cannot be used.
    """
    files, reading = self.open(part=part)
    with ProgressBar(desc="reading", unit=" rows", unit_scale=True, mininterval=1) as bar:
      for file in files:
        found = self.read_file(file)
        reading.add(file, found)
        bar.update(found.rows)
    if not part:
      self.check_joins(files, reading)
    return reading

  def check_joins(self, files: Sequence[SourceFile], reading: Reading) -> None:
    """Checks that each joined table with a field holds at least one item of its source, or one user of all events.

    Raises:
      DataError: the keys of a table and of the events have no value in common; the message shows some of both.
    """
    having_users = [name for name in reading.sources if carried(self._data, name, "users")]
    for name, source in self._data.sources.items():
      items = self._items(name) if name in reading.sources else None
      if source.items and items and items.fields and reading.finds_nobody("items_missing", name):
        key = f"config.data.sources.{name}.items.key"
        self._raise_unjoined(files, name, source.items.key, items, key, source.items.file)
    if having_users and reading.finds_nobody("users_missing", *having_users):
      assert self._data.users is not None
      user, table = self._data.sources[having_users[0]].user, self._data.users.files[0]
      self._raise_unjoined(files, having_users[0], user, self._users(), "config.data.users.user", table)

  def _raise_unjoined(
    self, files: Sequence[SourceFile], source: str, column: str, joined: JoinedTable, key: str, table: str
  ) -> None:
    """Raises DataError for a table none of whose keys is in the events' column; `key` is its place in the config."""
    file = next(f.table for f in files if f.source == source)
    own = value_sql.text_sql("v", file.columns[column])
    shown = []
    with clean_copies.readable(self._con, file, drop=True) as (good, _):
      events = f"SELECT DISTINCT {own} AS key FROM ({good.select({'v': column})}) WHERE key IS NOT NULL"
      for query in (events, f"SELECT key FROM {joined.table} ORDER BY file, row"):
        found = self._con.execute(f"{query} LIMIT {SHOWN_KEYS}").fetchall()
        shown.append(", ".join(repr(value) for (value,) in found) or "no value")
    raise DataError(
      f"{key}: the table {table} holds none of the ids in the column {column!r} of the events: {file.path} holds "
      f"{shown[0]}; the table holds {shown[1]}. Correct the key, or write the ids of both in the same way."
    )

  def read_file(self, source_file: SourceFile) -> FileCounts:
    """Appends a file's rows to `rows` and counts them; the file may have been opened elsewhere.

    Raises:
      DataError: the file or, unless `data.on_bad_rows` allows to drop it, a row cannot be used.
    """
    key = f"config.data.sources.{source_file.source}"
    paths.make_readable(self._con, source_file.table.path, key)
    found, bad = clean_copies.read_clean(
      self._con,
      source_file.table,
      DROP_REMEDY,
      lambda table: self._read_file(dataclasses.replace(source_file, table=table)),
      drop=self._data.on_bad_rows == "drop",
    )
    return found._replace(rows=found.rows + bad, dropped=found.dropped | ({"unreadable_line": bad} if bad else {}))

  def _read_file(self, source_file: SourceFile) -> FileCounts:
    name, file = source_file.source, source_file.table
    source, key = self._data.sources[name], f"config.data.sources.{name}"
    index, first = list(self._data.sources).index(name), source_file.number * FILE_PLACES
    items, users = self._items(name), self._users() if carried(self._data, name, "users") else None
    wanted = {"user": file.require(source.user, f"{key}.user"), "time": file.require(source.time, f"{key}.time")}
    reading = value_sql.time_reading(
      self._con, file, source.time, "e.time", key, unit=source.time_unit, format=source.time_format
    )
    field_sql.check_ids(self._con, file, source.user, f"{key}.user")
    user_type, time_type = file.columns[source.user], file.columns[source.time]
    values = {
      "user": value_sql.text_sql('e."user"', user_type),
      "time": reading.sql,
      "raw_time": "e.time",
      "no_item": "i.key IS NULL" if items else "false",
      "no_user_row": "u.key IS NULL" if users else "false",
    }
    faults = [
      Fault("null_user", source.user, '"user" IS NULL'),
      *time_faults(source.time, time_type),
    ]
    own, absent = {}, []
    for field, column in carried(self._data, name).items():
      if column not in file.columns and items and field in items.fields:
        values[self._columns[field]] = f"i.{self._columns[field]}"
      elif column not in file.columns and self._data.fields[field].missing == "null":
        absent.append(field)
      else:
        own[field] = file.require(column, f"config.data.fields.{field}", items.columns if items else ())
    values |= {self._columns[f]: f"u.{self._columns[f]}" for f in carried(self._data, name, "users")}
    field_sql.check_categories(self._con, self._data, file, own)
    field_values, field_faults = read_sql(self._data, file, own)
    wanted |= {self._columns[f]: column for f, column in own.items()}
    values |= field_values
    faults += field_faults
    join = ""
    if items:
      assert source.items is not None
      wanted["key"] = file.require(source.items.key, f"{key}.items.key")
      field_sql.check_ids(self._con, file, source.items.key, f"{key}.items.key")
      join = f"LEFT JOIN {items.table} i ON {value_sql.text_sql('e.key', file.columns[wanted['key']])} = i.key"
    if users:
      join += f" LEFT JOIN {users.table} u ON {values['user']} = u.key"
    columns = ", ".join(self._stored(n) if c in values else "NULL" for n, c in self._columns.items())
    with readers.naming(file.path, file.format):
      self._con.execute(
        f'INSERT INTO rows SELECT "user", time, {index}, {first} + row, {fault_sql(faults)}, no_item, '
        f"no_user_row, {columns} FROM (SELECT e.row, {aliased(values)} FROM ({file.select(wanted)}) e {join})"
      )
    found = self._count(name, file, first, faults, reading, absent)
    store_vectors(self._con, self._data, file, self._columns, own)
    return found

  def _stored(self, field: str) -> str:
    """Returns the SQL of a field's value as `rows` holds it."""
    column, spec = self._columns[field], self._data.fields[field]
    log1p = spec.kind == "numeric" and spec.encoding == "log1p"
    return f"sign({column}) * ln(1 + abs({column}))" if log1p else column

  def _count(
    self,
    name: str,
    file: TableFile,
    first: int,
    faults: Sequence[Fault],
    reading: value_sql.TimeReading,
    absent: list[str],
  ) -> FileCounts:
    """Counts the rows of a file that was just read; raises DataError if one is unusable and may not be dropped."""
    found = self._con.execute(
      "SELECT fault, count(*), min(ord), arg_min(bad_value, ord), min(time), max(time), count_if(no_item), "
      f"count_if(no_user_row) FROM rows WHERE ord >= {first} GROUP BY fault ORDER BY min(ord)"
    ).fetchall()
    if reading.guessed:
      self._check_guess(name, file, faults, found)
    bad = [row[:4] for row in found if row[0]]
    remedy = self._time_remedy(name, first, faults, [row[0] for row in found])
    if bad and (remedy or self._data.on_bad_rows == "error"):
      raise bad_row(file, faults, [(fault, n, ord - first, value) for fault, n, ord, value in bad], remedy)
    good = [row for row in found if not row[0]]
    return FileCounts(
      sum(n for _, n, *_ in found),
      {faults[fault - 1].reason: n for fault, n, *_ in bad},
      sum(no_item for *_, no_item, _ in good),
      sum(no_user_row for *_, no_user_row in good),
      absent,
    )

  def _time_remedy(self, name: str, first: int, faults: Sequence[Fault], found: Sequence[int]) -> str:
    """Returns how to read the times of a file if not one of them can be read, but a format fits; else the empty text.

    `found` holds the number of the fault of each group of rows; 0 means no fault.
    """
    unreadable = [fault for fault in found if fault and faults[fault - 1].reason == "unparsable_time"]
    source = self._data.sources[name]
    if 0 in found or not unreadable or source.time_format:
      return ""
    values = self._con.execute(
      f"SELECT DISTINCT bad_value FROM rows WHERE ord >= {first} AND fault = {unreadable[0]} "
      f"ORDER BY bad_value LIMIT {time_formats.SAMPLE}"
    ).fetchall()
    return time_formats.time_format_remedy(self._con, [v for (v,) in values], f"config.data.sources.{name}")

  def _check_guess(self, name: str, file: TableFile, faults: Sequence[Fault], found: Sequence[tuple[Any, ...]]) -> None:
    """Raises DataError if the epochs of a file cannot be seconds, or are so large that they are no time at all."""
    column = self._data.sources[name].time
    for fault, _, _, bad_value, earliest, latest, *_ in found:
      if fault == 0:
        low, high = earliest / 1e6, latest / 1e6
      elif faults[fault - 1].reason == "unparsable_time" and (number := _number(bad_value)) is not None:
        low = high = number
      else:
        continue
      value_sql.check_guessed_seconds(low, high, f"{file.path}: column {column!r}", f"config.data.sources.{name}")


def _number(text: str) -> float | None:
  try:
    number = float(text)
  except ValueError:
    return None
  return number if math.isfinite(number) else None
