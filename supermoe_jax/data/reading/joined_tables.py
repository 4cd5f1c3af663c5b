"""Loads the tables that are joined to events by a key: the item table of a source, and the user table."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import duckdb

from supermoe_jax import config
from supermoe_jax.data.reading import field_sql, json_files, paths, readers, value_sql, vector_sql
from supermoe_jax.data.reading.field_sql import Fault
from supermoe_jax.data.reading.readers import TableFile
from supermoe_jax.data.reading.text_files import clean_copies
from supermoe_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class JoinedTable:
  """A table to be joined to events, loaded into the database.

  Attributes:
    table: the table's name in the database; its columns are `key`, as text, and one for each field.
    columns: the columns of the table's first file.
    fields: the fields that the table holds.
    rows_dropped: the number of rows that could not be used.
  """

  table: str
  columns: Collection[str]
  fields: Collection[str]
  rows_dropped: int


def load_items(con: duckdb.DuckDBPyConnection, data: config.Data, source: str) -> JoinedTable:
  """Loads a source's item table, with each field of the source that the table has a column for.

  Raises:
    DataError: the file cannot be used, or a key has two rows.
  """
  items, key = data.sources[source].items, f"config.data.sources.{source}.items"
  assert items is not None
  carried = field_sql.carried(data, source)
  found = paths.find_files(con, [items.file], f"{key}.file")
  if len(found) > 1:
    raise DataError(f"{key}.file: {items.file} matches {len(found)} files; a table of items is one file.")
  wanted = {items.table_key or items.key, *carried.values()}
  file = readers.open_table(con, found[0].path, items.format, wanted, items, key)
  there = items.table_key or (json_files.KEY if file.format == "json_object" else items.key)
  place = f"{key}.{'table_key' if items.table_key else 'key'}"
  file.require(there, place)
  fields = {f: c for f, c in carried.items() if c in file.columns and c not in (items.key, there)}
  return _load(con, data, f"items_{list(data.sources).index(source)}", [file], there, fields, f"an item ({key})", place)


def load_user_fields(con: duckdb.DuckDBPyConnection, data: config.Data) -> JoinedTable:
  """Loads the fields of the user table.

  Raises:
    DataError: a file cannot be used or lacks a column, or a user has two rows.
  """
  users, key = data.users, "config.data.users"
  assert users is not None  # config.resolve checked
  fields = {n: f.column or n for n, f in data.fields.items() if f.table == "users"}
  files = paths.open_files(con, users.files, users.format, {users.user, *fields.values()}, key, users).tables
  for file in files:
    file.require(users.user, f"{key}.user")
    for name, column in fields.items():
      if data.fields[name].missing == "error" or not any(column in f.columns for f in files):
        file.require(column, f"config.data.fields.{name}")
  return _load(con, data, "users", files, users.user, fields, f"a user ({key})", f"{key}.user")


def _load(
  con: duckdb.DuckDBPyConnection,
  data: config.Data,
  table: str,
  files: Sequence[TableFile],
  there: str,
  fields: Mapping[str, str],
  what: str,
  key: str,
) -> JoinedTable:
  """Loads files with the key in the column `there`, and their fields (name → column).

  Messages call a row `what`, and `key` the place of `there` in the config.
  """
  columns = field_sql.field_columns(data)
  declared = "".join(f", {columns[f]} {field_sql.stored_type(data.fields[f])}" for f in fields)
  con.execute(
    f"CREATE TEMP TABLE {table} (file INTEGER, row BIGINT, fault UTINYINT, bad_value VARCHAR, key VARCHAR{declared})"
  )
  dropped = 0
  drop = data.on_bad_rows == "drop"
  for index, file in enumerate(files):
    own = {field: column for field, column in fields.items() if column in file.columns}
    field_sql.check_ids(con, file, there, key)
    field_sql.check_categories(con, data, file, own)
    values, faults = field_sql.read_sql(data, file, own)
    faults = [Fault("null_key", there, "key IS NULL"), *faults]
    values["key"] = value_sql.text_sql("e.key", file.columns[there])
    wanted = {"key": there, **{columns[f]: c for f, c in own.items()}}
    kept = "".join(f", {columns[f] if f in own else 'NULL'}" for f in fields)
    begun = f"INSERT INTO {table} SELECT {index}, row, {field_sql.fault_sql(faults)}, key{kept} "
    selected = f"SELECT e.row, {field_sql.aliased(values)}"

    def insert(
      read: TableFile,
      begun: str = begun,
      selected: str = selected,
      wanted: dict[str, str] = wanted,
      own: dict[str, str] = own,
    ) -> None:
      with readers.naming(read.path, read.format):
        con.execute(f"{begun} FROM ({selected} FROM ({read.select(wanted)}) e)")
      vector_sql.store_vectors(con, data, read, columns, own)

    _, bad_lines = clean_copies.read_clean(con, file, field_sql.DROP_REMEDY, insert, drop=drop)
    dropped += bad_lines
    bad = con.execute(
      f"SELECT fault, count(*), min(row), arg_min(bad_value, row) FROM {table} WHERE file = {index} AND fault > 0 "
      "GROUP BY fault ORDER BY min(row)"
    ).fetchall()
    if bad and not drop:
      raise field_sql.bad_row(file, faults, bad)
    dropped += sum(n for _, n, *_ in bad)
  con.execute(f"DELETE FROM {table} WHERE fault > 0")
  twice = con.execute(
    f"SELECT key, count(*), list((file, row) ORDER BY file, row)[:2] FROM {table} GROUP BY key HAVING count(*) > 1 "
    "ORDER BY min((file, row)) LIMIT 1"
  ).fetchall()
  for value, n, ((first, row), (second, other)) in twice:
    elsewhere = "" if first == second else f" of {files[second].path}"
    raise DataError(
      f"{files[first].path}: {n} rows have {there}={value!r}, the first is row {row + 1}, the next row {other + 1}"
      f"{elsewhere}; {what} needs exactly one row."
    )
  return JoinedTable(table, files[0].columns, fields, dropped)
