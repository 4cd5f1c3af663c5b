"""Finds columns that the scan of a file does not hold as such: values of folder names, members of objects, bytes.

Preparation reads `sales/day=2024-01-05/part-0.csv` with the column `day`, the struct `props` with the column
`props.item`, and bytes as text. Each is a `DerivedColumn` of the opened file.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import duckdb

from supermoe_jax.data.reading import json_files, remote
from supermoe_jax.data.reading.sql_text import literal
from supermoe_jax.errors import DataError

if TYPE_CHECKING:
  from supermoe_jax.data.reading.readers import TableFile

WITH_FOLDERS = ("parquet", "csv", "jsonl", "atomic")  # formats whose files take columns from the names of folders
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # the name that Hive and Spark write for an absent value

JSON_LIST, JSON_OBJECT = "JSON ARRAY", "JSON OBJECT"  # types of text columns whose sample holds such values
TEXTS = ("VARCHAR", JSON_LIST, JSON_OBJECT)  # types whose values DuckDB reads as text
OBJECTS = ("STRUCT", "MAP", "UNION", JSON_OBJECT)  # the beginnings of the types of objects
MOST_MEMBERS = 50  # members of an object that become columns of their own in an inspection
UUID_BYTES = 16


@dataclasses.dataclass(frozen=True)
class DerivedColumn:
  """A column that is made of one column of a file's scan, or of none.

  Attributes:
    sql: the SQL of the value; `{column}` stands for the scan's column.
    column: the name of the scan's column; empty: none.
    path: the keys that lead to the value from an object of JSON text.
  """

  sql: str
  column: str = ""
  path: tuple[str, ...] = ()


def open_parquet(con: duckdb.DuckDBPyConnection, file: TableFile) -> TableFile:
  """Returns a Parquet file with its columns, by their names in the file even where DuckDB has renamed them."""
  path = literal(remote.pattern(file.path))
  found = con.execute(f"DESCRIBE SELECT * FROM read_parquet({path}, hive_partitioning = false)").fetchall()
  types = {name: kind for name, kind, *_ in found}
  if not json_files.renamed(list(types)):
    return with_types(file, types)
  # A schema lists each group of columns before its members.
  schema = con.execute(f"SELECT name, coalesce(num_children, 0) FROM parquet_schema({path})").fetchall()
  names: list[str] = []
  place = 1
  while place < len(schema):
    names.append(schema[place][0])
    place = _behind(schema, place)
  for name, (scanned, kind) in zip(names, types.items(), strict=True):
    same = name == scanned or name in file.columns
    file = (
      with_types(file, {scanned: kind}) if same else _with_column(file, name, kind, DerivedColumn("{column}", scanned))
    )
  return file


def _behind(schema: Sequence[tuple[str, int]], place: int) -> int:
  """Returns the place behind a column and its members in a schema."""
  after = place + 1
  for _ in range(schema[place][1]):
    after = _behind(schema, after)
  return after


def with_derived_columns(con: duckdb.DuckDBPyConnection, file: TableFile, wanted: Collection[str]) -> TableFile:
  """Returns an opened file with its derived columns; `wanted` names the columns that will be read, empty: all.

  Raises:
    DataError: a folder's name contradicts a wanted column of the file.
  """
  file = _with_folders(con, file, wanted)
  if file.format == "parquet":
    file = _with_text_of_bytes(con, file, wanted)
  for name in wanted:
    if name not in file.columns and "." in name:
      file = _with_member(con, file, name)
  if file.format in ("jsonl", "json_object"):
    file = with_types(file, _json_types(con, file, [n for n in wanted if n in file.columns] or list(file.columns)))
  return file


def with_types(file: TableFile, types: Mapping[str, str]) -> TableFile:
  """Returns the file with other types of some columns."""
  return dataclasses.replace(file, columns={**file.columns, **types}) if types else file


def _with_column(file: TableFile, name: str, type: str, column: DerivedColumn) -> TableFile:
  return dataclasses.replace(file, columns={**file.columns, name: type}, derived={**file.derived, name: column})


# ------------------------------------------------------------------------------------------------------------- folders


def folder_values(path: remote.FilePath) -> dict[str, str | None]:
  """Returns the columns that folders of a path name, as in `day=2024-01-05`; None for an absent value."""
  text = str(path).partition("?")[0] if isinstance(path, remote.RemoteFile) else str(path)  # of a web address
  found = re.findall(r"(?:^|[/\\])([^/\\=]+)=([^/\\]*)(?=[/\\])", text)
  return {urllib.parse.unquote(n): None if v == NO_VALUE else urllib.parse.unquote(v) for n, v in found}


def _with_folders(con: duckdb.DuckDBPyConnection, file: TableFile, wanted: Collection[str]) -> TableFile:
  if file.format not in WITH_FOLDERS:
    return file
  for name, value in folder_values(file.path).items():
    if name not in file.columns:
      file = _with_column(file, name, "VARCHAR", DerivedColumn("NULL" if value is None else literal(value)))
    elif not wanted or name in wanted:
      _check_folder(con, file, name, value)
  return file


def _check_folder(con: duckdb.DuckDBPyConnection, file: TableFile, name: str, value: str | None) -> None:
  """Raises DataError if a column's value differs from the folder's; a time agrees with a folder of its day."""
  same = "false"
  if value is not None:
    within = f"TRY_CAST(v::VARCHAR AS TIMESTAMP) IS NOT NULL AND starts_with(v::VARCHAR, {literal(value)})"
    same = f"coalesce(v = TRY_CAST({literal(value)} AS {file.columns[name]}), false) OR ({within})"
  rows = f"SELECT row, v::VARCHAR FROM ({file.select({'v': name}, lenient=True)}) WHERE v IS NOT NULL AND NOT ({same})"
  found = con.execute(f"{rows} ORDER BY row LIMIT 1").fetchall()
  for row, own in found:
    raise DataError(
      f"{file.path}: row {row + 1}: column {name!r} holds {own!r}, but the folder's name says {name}="
      f"{value or NO_VALUE}. If the column is right, rename the folder to one without {name}=; if the folder is right, "
      "write the file without the column."
    )


# --------------------------------------------------------------------------------------------------------------- bytes


def _with_text_of_bytes(con: duckdb.DuckDBPyConnection, file: TableFile, wanted: Collection[str]) -> TableFile:
  """Reads bytes of a fixed length of 16 as UUIDs, and other bytes as text if all of a column's values are UTF-8."""
  names = [n for n, kind in file.columns.items() if kind == "BLOB" and (not wanted or n in wanted)]
  lengths = fixed_lengths(con, file) if names else {}
  for name in names:
    if lengths.get(name) == UUID_BYTES:
      file = _with_column(file, name, "VARCHAR", DerivedColumn("hex({column})::UUID::VARCHAR", name))
      continue
    binary = con.execute(
      f"SELECT 1 FROM (SELECT v, TRY(decode(v)) AS text FROM ({file.select({'v': name})})) "
      "WHERE v IS NOT NULL AND (text IS NULL OR strpos(text, chr(0)) > 0) LIMIT 1"
    ).fetchall()
    if not binary:
      file = _with_column(file, name, "VARCHAR", DerivedColumn("decode({column})", name))
  return file


def fixed_lengths(con: duckdb.DuckDBPyConnection, file: TableFile) -> dict[str, int]:
  """Returns the lengths in bytes of the columns of a Parquet file whose bytes have a fixed length."""
  path = literal(remote.pattern(file.path))
  found = con.execute(
    f"SELECT name, type_length::INTEGER FROM parquet_schema({path}) WHERE type = 'FIXED_LEN_BYTE_ARRAY'"
  ).fetchall()
  return dict(found)


# ------------------------------------------------------------------------------------------------------------- members


def _with_member(con: duckdb.DuckDBPyConnection, file: TableFile, name: str) -> TableFile:
  """Returns the file with the column `name`, such as `props.item`, if its column `props` holds such a member."""
  parts = name.split(".")
  for n in range(len(parts) - 1, 0, -1):
    base, path = ".".join(parts[:n]), parts[n:]
    kind = file.columns.get(base, "")
    if base in file.derived or kind.endswith("]"):
      continue
    if kind == "VARCHAR" and _holds(con, file, base, f"json_exists({{column}}, {_pointer(path)})"):
      sql = f"json_extract_string({{column}}, {_pointer(path)})"
      return _with_column(file, name, "VARCHAR", DerivedColumn(_if_json(sql), base, tuple(path)))
    if kind.startswith(("STRUCT", "MAP")) and (member := _member(_type(con, file, base), path, "{column}")):
      sql, type = member
      if kind.startswith("STRUCT") or _holds(con, file, base, f"{sql} IS NOT NULL"):
        return _with_column(file, name, type, DerivedColumn(sql, base))
  return file


def _pointer(path: Sequence[str]) -> str:
  """Returns the SQL of a JSON pointer, which can name any key; a JSON path cannot."""
  return literal("".join(f"/{key.replace('~', '~0').replace('/', '~1')}" for key in path))


def _if_json(sql: str) -> str:
  return f"CASE WHEN json_valid({{column}}) THEN {sql} END"


def _holds(con: duckdb.DuckDBPyConnection, file: TableFile, base: str, condition: str) -> bool:
  """Returns whether a condition is true for a value of a column; for a text column, of a value that is JSON."""
  condition = _if_json(condition) if file.columns[base] == "VARCHAR" else condition
  query = f"SELECT 1 FROM ({file.select({'v': base}, lenient=True)}) WHERE {condition.replace('{column}', 'v')} LIMIT 1"
  return bool(con.execute(query).fetchall())


def _type(con: duckdb.DuckDBPyConnection, file: TableFile, name: str) -> Any:
  """Returns the type of a column as DuckDB's object, whose stubs do not say what a type's children are."""
  return con.sql(f"SELECT v FROM ({file.select({'v': name})})").types[0]


def _member(type: Any, path: Sequence[str], sql: str) -> tuple[str, str] | None:
  """Returns the SQL and the type of the member at `path` of a struct or map; None if there is no such member."""
  if not path:
    return sql, str(type)
  if type.id == "map":
    inner = dict(type.children)
    return _member(inner["value"], path[1:], f"{sql}[{literal(path[0])}]") if str(inner["key"]) == "VARCHAR" else None
  for n in range(len(path), 0, -1) if type.id == "struct" else ():  # the name of a member may hold a point
    members = dict(type.children)
    if (name := ".".join(path[:n])) in members:
      return _member(members[name], path[n:], f"struct_extract({sql}, {literal(name)})")
  return None


def with_members(con: duckdb.DuckDBPyConnection, file: TableFile) -> TableFile:
  """Returns the file with the members of structs and of JSON objects as columns, in the place of the objects."""
  for name, kind in list(file.columns.items()):
    paths: Iterable[tuple[str, ...]] = ()
    if kind.startswith("STRUCT") and not kind.endswith("]"):
      paths = _leaves(_type(con, file, name))
    elif kind == JSON_OBJECT:
      paths = _json_leaves(con, file, [name])
    members = [".".join(path) for path in itertools.islice(paths, MOST_MEMBERS + 1)]
    if not members or len(members) > MOST_MEMBERS:
      continue
    for member in members:
      if f"{name}.{member}" not in file.columns:
        file = _with_member(con, with_types(file, {name: "VARCHAR"} if kind == JSON_OBJECT else {}), f"{name}.{member}")
    file = dataclasses.replace(file, columns={n: k for n, k in file.columns.items() if n != name})
    if kind == JSON_OBJECT:
      file = with_types(file, _json_types(con, file, [f"{name}.{member}" for member in members]))
  return file


def _leaves(type: Any) -> Iterator[tuple[str, ...]]:
  for name, inner in type.children:
    if inner.id == "struct":
      yield from ((name, *path) for path in _leaves(inner))
    else:
      yield (name,)


# ---------------------------------------------------------------------------------------------------------------- JSON


def _json_types(con: duckdb.DuckDBPyConnection, file: TableFile, names: Sequence[str]) -> dict[str, str]:
  """Returns the types `JSON_LIST` and `JSON_OBJECT` of the columns whose first values hold lists or objects."""
  types: dict[str, str] = {}
  paths = {n: [file.derived[n].column, *file.derived[n].path] if n in file.derived else [n] for n in names}
  if paths := {n: path for n, path in paths.items() if path[0] and n != json_files.KEY}:
    columns = ", ".join(f"json_type(json, {_pointer(path)}) AS c{i}" for i, path in enumerate(paths.values()))
    if file.format == "json_object" and json_files.VALUES in paths:
      columns = "json_type(json) AS c0"
    found = ", ".join(f"bool_or(c{i} = 'ARRAY'), bool_or(c{i} = 'OBJECT')" for i in range(len(paths)))
    records = json_files.records_sql(file.path, file.format, lenient=True)
    rows = f"SELECT {columns} FROM ({records}) LIMIT {json_files.SAMPLE_ROWS}"
    (flags,) = con.execute(f"SELECT {found} FROM ({rows})").fetchall()
    for name, holds_lists, holds_objects in zip(paths, flags[::2], flags[1::2], strict=True):
      if holds_lists or holds_objects:
        types[name] = JSON_LIST if holds_lists else JSON_OBJECT
  return types


def _json_leaves(con: duckdb.DuckDBPyConnection, file: TableFile, path: Sequence[str]) -> Iterator[tuple[str, ...]]:
  """Yields the paths of the members of the JSON objects at `path` that are no objects, below it, by their names."""
  records = f"{json_files.records_sql(file.path, file.format, lenient=True)} LIMIT {json_files.SAMPLE_ROWS}"
  objects = (
    f"SELECT v FROM (SELECT json_extract(json, {_pointer(path)}) AS v FROM ({records})) WHERE json_type(v) = 'OBJECT'"
  )
  found = con.execute(
    "SELECT member, bool_or(json_type(v, '/' || replace(replace(member, '~', '~0'), '/', '~1')) = 'OBJECT') "
    f"FROM (SELECT v, unnest(json_keys(v)) AS member FROM ({objects})) GROUP BY member ORDER BY member"
  ).fetchall()
  for member, holds_objects in found[: MOST_MEMBERS + 1]:
    if holds_objects:
      yield from ((member, *below) for below in _json_leaves(con, file, [*path, member]))
    else:
      yield (member,)
