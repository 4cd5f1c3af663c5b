"""Reads the raw events and user rows of a few users again from the files of a config, without encoding them.

Preparation shares only the code that opens files and reads times and texts. All else is separate SQL, so that the two
can be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import duckdb
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.data.encoding.numeric import LARGEST
from supermoe_jax.data.reading import json_files, paths, readers, value_sql, vector_sql
from supermoe_jax.data.reading.readers import EmptyFileError, TableFile
from supermoe_jax.data.reading.text_files import clean_copies


def field_column(data: config.Data, field: str) -> str:
  """Returns the name of a field's column in the table `events`."""
  return f"field_{list(data.fields).index(field)}"


def load_raw_events(con: duckdb.DuckDBPyConnection, data: config.Data, users: Sequence[str]) -> int | None:
  """Creates the table `events` of the users' usable rows, without repeats if duplicates are dropped.

  Its columns: `user`, `time` in microseconds since 1970 UTC, `source` as an index, `position` among the user's events
  from 0, `total`, the number of the user's events, and `field_0`, … with the raw values. Fields of the user table stay
  NULL, since they are equal in all rows of a user; `add_user_fields` adds those that conditions compare.

  Returns: the time of the last event of any user.
  """
  con.register("chosen", pa.table({"user": pa.array(users, pa.string())}))
  fields = [field_column(data, f) for f in data.fields]
  kinds = [f"{field_column(data, n)} {_type(f)}" for n, f in data.fields.items()]
  con.execute(
    f'CREATE TABLE raw ("user" VARCHAR, time BIGINT, source INTEGER, file INTEGER, row BIGINT, {", ".join(kinds)})'
  )
  last: int | None = None
  for index, (name, source) in enumerate(data.sources.items()):
    items = _load_items(con, data, name) if source.items else None
    wanted = {source.user, source.time, *_columns(data, name).values()}
    if items is not None and source.items is not None:
      wanted = wanted - set(items.columns) | {source.items.key}
    key = f"config.data.sources.{name}"
    for number, file in enumerate(raw_files(con, source.files, source.format, wanted, key, source)):
      query = _usable(con, data, name, file, items.columns if items else None)
      with readers.naming(file.path, file.format):
        ((latest,),) = con.execute(f"SELECT max(time) FROM ({query})").fetchall()
        con.execute(
          f'INSERT INTO raw SELECT "user", time, {index}, {number}, row, {", ".join(fields)} FROM ({query}) '
          'SEMI JOIN chosen USING ("user")'
        )
      last = max((t for t in (last, latest) if t is not None), default=None)
  once = ""
  if data.duplicates == "drop":
    alike = ", ".join(['"user"', "time", "source", *fields])
    once = f"QUALIFY row_number() OVER (PARTITION BY {alike} ORDER BY source, file, row) = 1"
  con.execute(
    f'CREATE TABLE events AS SELECT "user", time, source, {", ".join(fields)}, '
    'row_number() OVER (PARTITION BY "user" ORDER BY time, source, file, row) - 1 AS position, '
    f'count(*) OVER (PARTITION BY "user") AS total FROM (SELECT * FROM raw {once})'
  )
  return last


def _type(field: config.Field) -> str:
  own = {"numeric": "DOUBLE", "vector": "FLOAT[]"}
  return own.get(field.kind) or ("VARCHAR[]" if field.many else "VARCHAR")


def load_raw_users(con: duckdb.DuckDBPyConnection, users: config.UserTable, columns: Sequence[str]) -> None:
  """Creates the table `users` of all rows: `user`, and the text of each of the columns as `column_0`, …"""
  names = [f"column_{i}" for i in range(len(columns))]
  con.execute(f'CREATE TABLE users ("user" VARCHAR, {", ".join(n + " VARCHAR" for n in names)})')
  for file in raw_files(con, users.files, users.format, [users.user, *columns], "config.data.users", users):
    wanted = {"user": users.user, **dict(zip(names, columns, strict=True))}
    values = [value_sql.text_sql(f"e.{readers.identifier(a)}", file.columns[c]) for a, c in wanted.items()]
    with readers.naming(file.path, file.format):
      con.execute(f"INSERT INTO users SELECT {', '.join(values)} FROM ({file.select(wanted)}) e")


def add_user_fields(
  con: duckdb.DuckDBPyConnection, data: config.Data, users: config.UserTable, fields: Sequence[str]
) -> None:
  """Writes fields of the user table into the table `events`; fields of lists are none of `fields`."""
  if not fields:
    return
  columns = {field_column(data, n): data.fields[n].column or n for n in fields}
  for file in raw_files(con, users.files, users.format, {users.user, *columns.values()}, "config.data.users", users):
    values, _ = _values(data, file, {n: data.fields[n].column or n for n in fields})
    user = value_sql.text_sql('e."user"', file.columns[users.user])
    query = file.select({"user": users.user, **columns})
    with readers.naming(file.path, file.format):
      for name in fields:
        column, known = field_column(data, name), data.fields[name].sources or tuple(data.sources)
        sources = ", ".join(str(list(data.sources).index(s)) for s in known)
        con.execute(
          f"UPDATE events SET {column} = u.value FROM "
          f"(SELECT {user} AS who, {values[column]} AS value FROM ({query}) e) u "
          f'WHERE events."user" = u.who AND events.source IN ({sources})'
        )


def raw_files(
  con: duckdb.DuckDBPyConnection,
  patterns: Sequence[str],
  format: str,
  wanted: Collection[str],
  key: str,
  text: config.TextFormat,
) -> Iterator[TableFile]:
  """Yields the opened files with rows that the patterns of the config section `key` match."""
  for file in paths.find_files(con, patterns, f"{key}.files"):
    with contextlib.suppress(EmptyFileError):  # preparation has counted the empty file, or refused it
      table = readers.open_table(con, file.path, format, wanted, text, key)
      # Preparation has refused bad lines unless they may be dropped.
      with clean_copies.readable(con, table, drop=True) as (good, _):
        yield good


def _columns(data: config.Data, source: str) -> dict[str, str]:
  """Returns the fields of a source, and the column of each in the source's files or item table."""
  own = {n: f for n, f in data.fields.items() if f.table == "events"}
  return {n: f.column or n for n, f in own.items() if not f.sources or source in f.sources}


def _values(data: config.Data, file: TableFile, fields: dict[str, str]) -> tuple[dict[str, str], list[str]]:
  """Returns the SQL of fields (name → column) of a file `e`, and the conditions of an unusable row."""
  values, bad = {}, []
  for name, column in fields.items():
    alias, kind = f"e.{field_column(data, name)}", file.columns[column]
    text, field = value_sql.text_sql(alias, kind), data.fields[name]
    if field.many:
      json = file.format in ("jsonl", "json_object") or bool(column in file.derived and file.derived[column].path)
      values[field_column(data, name)] = value_sql.list_sql(alias, kind, field.separator, json=json)
      continue
    if field.kind == "vector":
      numbers = vector_sql.numbers_sql(alias, kind, field.separator, file.text)
      values[field_column(data, name)] = f"CASE WHEN ({text}) IS NOT NULL AND len({numbers}) > 0 THEN {numbers} END"
      finite = f"len(list_filter({numbers}, lambda x: isfinite(x))) = {field.size}"
      whole = f"len({numbers}) = {field.size} AND {finite}"
      bad.append(f"({text}) IS NOT NULL AND NOT coalesce({whole} OR len({numbers}) = 0, false)")
      continue
    if field.kind != "numeric":
      values[field_column(data, name)] = text
      continue
    number = value_sql.number_sql(alias, kind, file.text)
    values[field_column(data, name)] = f"CASE WHEN isfinite({number}) THEN {number} END"
    largest = f"abs({number}) > {LARGEST!r}::DOUBLE" if field.encoding == "standardise" else f"isinf({number})"
    bad.append(f"({text}) IS NOT NULL AND (({number}) IS NULL OR ({largest} AND NOT isnan({number})))")
  return values, bad


def _items_table(data: config.Data, name: str) -> str:
  return f"items_{list(data.sources).index(name)}"


def _usable(
  con: duckdb.DuckDBPyConnection, data: config.Data, name: str, file: TableFile, items: Collection[str] | None
) -> str:
  """Returns a query of the usable rows of a file: `row`, `user`, `time` and every field."""
  source, key = data.sources[name], f"config.data.sources.{name}"
  reading = value_sql.time_reading(
    con, file, source.time, "e.time", key, unit=source.time_unit, format=source.time_format
  )
  of_item = {n: c for n, c in _columns(data, name).items() if c not in file.columns}
  own = {n: c for n, c in _columns(data, name).items() if n not in of_item}
  values, bad = _values(data, file, own)
  wanted = {"user": source.user, "time": source.time, **{field_column(data, n): c for n, c in own.items()}}
  join = ""
  if items is not None and source.items is not None:
    wanted["key"] = source.items.key
    values |= {field_column(data, n): f"i.{field_column(data, n)}" for n, c in of_item.items() if c in items}
    join = (
      f"LEFT JOIN {_items_table(data, name)} i ON {value_sql.text_sql('e.key', file.columns[source.items.key])} = i.key"
    )
  columns = [f"{values.get(field_column(data, n), 'NULL')} AS {field_column(data, n)}" for n in data.fields]
  user = value_sql.text_sql('e."user"', file.columns[source.user])
  usable = " AND ".join(['"user" IS NOT NULL', "time IS NOT NULL", *(f"NOT bad_{i}" for i in range(len(bad)))])
  faults = [f"coalesce({condition}, false) AS bad_{i}" for i, condition in enumerate(bad)]
  return (
    f'SELECT * FROM (SELECT e.row, {user} AS "user", {reading.sql} AS time, {", ".join([*columns, *faults])} '
    f"FROM ({file.select(wanted)}) e {join}) WHERE {usable}"
  )


def _load_items(con: duckdb.DuckDBPyConnection, data: config.Data, name: str) -> TableFile:
  """Creates the table of a source's items, and returns the opened file."""
  items = data.sources[name].items
  assert items is not None
  (found,) = paths.find_files(con, [items.file], f"config.data.sources.{name}.items.file")
  needed = {items.table_key or items.key, *_columns(data, name).values()}
  file = readers.open_table(con, found.path, items.format, needed, items, f"config.data.sources.{name}.items")
  there = items.table_key or (json_files.KEY if file.format == "json_object" else items.key)
  fields = {n: c for n, c in _columns(data, name).items() if c in file.columns and c not in (items.key, there)}
  values, bad = _values(data, file, fields)
  key = value_sql.text_sql("e.key", file.columns[there])
  columns = ", ".join([f"{key} AS key", *(f"{v} AS {n}" for n, v in values.items())])
  usable = " AND ".join([f"{key} IS NOT NULL", *(f"NOT coalesce({condition}, false)" for condition in bad)])
  wanted = {"key": there, **{field_column(data, n): c for n, c in fields.items()}}
  with clean_copies.readable(con, file, drop=True) as (good, _), readers.naming(file.path, file.format):
    con.execute(
      f"CREATE TABLE {_items_table(data, name)} AS SELECT {columns} FROM ({good.select(wanted)}) e WHERE {usable}"
    )
  return file
