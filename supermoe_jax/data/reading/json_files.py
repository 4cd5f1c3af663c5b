"""Reads JSON: the keys of JSON lines, and one JSON object keyed by id as a table."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Collection, Sequence

import duckdb

from supermoe_jax.data.reading import remote
from supermoe_jax.data.reading.remote import FilePath, RemoteFile
from supermoe_jax.data.reading.sql_text import literal
from supermoe_jax.data.reading.text_files import text_lines
from supermoe_jax.errors import DataError

# The beginning of a JSON object keyed by id: its first value is an object or a list.
KEYED_BY_ID = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*[\[{]')
SAMPLE_ROWS = 20_480  # records in which keys, lists and objects are looked for
KEY, VALUES = "key", "values"  # columns of such an object: its keys and, if its values are lists, the lists
FIRST_BYTES = 1 << 16  # that show whether a file holds a record a line
JSON_TEXT = 1 << 24  # bytes, DuckDB's default limit of a JSON value
REMOTE_JSON_TEXT = 1 << 29  # bytes, the limit for a remote file, whose size is not looked up


def line_keys(con: duckdb.DuckDBPyConnection, path: FilePath, wanted: Collection[str]) -> list[str]:
  """Returns the keys of JSON lines; looks beyond the first lines for keys that are `wanted` and missing there.

  Passes over damaged lines, which reading finds.
  """
  # Only the keys are needed: depth 1 keeps nested values as JSON, and threshold -1 never turns a record into a map.
  options = f"maximum_depth = 1, map_inference_threshold = -1, {lines_options(path, lenient=True)}"
  for sample in (SAMPLE_ROWS, -1):
    query = f"DESCRIBE SELECT * FROM read_json({remote.pattern_sql(path)}, {options}, sample_size = {sample})"
    keys = _exact(con, path, [name for name, *_ in con.execute(query).fetchall()])
    if all(w in keys or any(w.startswith(f"{k}.") for k in keys) for w in wanted):
      break
  return keys


def lines_options(path: FilePath, *, lenient: bool) -> str:
  """Returns the SQL of the options of a scan of JSON lines; with `lenient` a damaged line of a local file is NULL.

  DuckDB guesses the layout from the first records, and takes a damaged first line for another layout than lines.
  """
  lines: list[bytes] = []
  if not isinstance(path, RemoteFile):
    with contextlib.suppress(OSError, EOFError, ValueError), text_lines.open_bytes(path) as raw:
      start = raw.read(FIRST_BYTES).removeprefix(b"\xef\xbb\xbf")
      lines = [line for part in start.split(b"\n") if (line := part.strip())][:2]
  of_lines = False
  if len(lines) == 2:
    opened = [line.startswith(b"{") for line in lines]
    whole = [is_open and _is_json(line) for is_open, line in zip(opened, lines, strict=True)]
    of_lines = (opened[0] and opened[1]) or whole[0] or (whole[1] and not lines[0].startswith(b"["))
  layout = ", format = 'newline_delimited'" if of_lines else ""
  return f"hive_partitioning = false, ignore_errors = {lenient and of_lines}{layout}"


def _is_json(line: bytes) -> bool:
  with contextlib.suppress(ValueError):
    json.loads(line)
    return True
  return False


def renamed(names: Sequence[str]) -> bool:
  """Returns whether DuckDB may have renamed one of a file's columns, since another differs from it in case alone."""
  known = {name.lower() for name in names}
  return any((end := re.fullmatch(r"(.+)_\d+", name)) and end[1].lower() in known for name in names)


def _exact(con: duckdb.DuckDBPyConnection, path: FilePath, keys: list[str]) -> list[str]:
  """Returns the keys as they stand in the file: DuckDB renames `Item` to `Item_1` where there is also an `item`."""
  if not renamed(keys):
    return keys
  found: list[str] = []
  for limit in (f" LIMIT {SAMPLE_ROWS}", ""):
    records = f"SELECT json FROM ({records_sql(path, 'jsonl', lenient=True)}){limit}"
    query = f"SELECT unnest(json_keys(json)) AS key, row_number() OVER () AS row FROM ({records})"
    found = [key for key, _ in con.execute(f"SELECT key, min(row) FROM ({query}) GROUP BY key ORDER BY 2").fetchall()]
    if {*keys} <= {*found}:  # each key stands in the file as it is
      return keys
  return found


def records_sql(path: FilePath, format: str, *, lenient: bool = False) -> str:
  """Returns a query of the records of JSON lines, or of the values of a JSON object, as the column `json`.

  With `lenient` a damaged line is NULL.
  """
  if format == "json_object":
    return f"SELECT e.value AS json FROM ({entries_sql(path)})"
  options = f"records = false, columns = {{'json': 'JSON'}}, {lines_options(path, lenient=lenient)}"
  return f"SELECT json FROM read_json({remote.pattern_sql(path)}, {options})"


def member_sql(column: str, name: str) -> str:
  """Returns the SQL of a member of a JSON value as text."""
  pointer = "/" + name.replace("~", "~0").replace("/", "~1")  # a JSON pointer can name any key, a path cannot
  return f"json_extract_string({column}, {literal(pointer)})"


def is_json_object(con: duckdb.DuckDBPyConnection, path: FilePath) -> bool:
  """Returns whether a local JSON file is one object whose values are all objects or all lists."""
  if isinstance(path, RemoteFile) or not text_lines.unpacked_name(path.name).endswith(".json"):
    return False
  with text_lines.open_bytes(path) as packed:
    if not KEYED_BY_ID.match(packed.read(1 << 16).decode("utf-8-sig", errors="replace")):
      return False
  with contextlib.suppress(duckdb.Error):  # any other file is read as JSON lines, which reports its errors
    objects = con.execute(f"SELECT 1 FROM {_json_sql(path, 'JSON')} LIMIT 2").fetchall()
    kinds = con.execute(_kinds_sql(path)).fetchall() if len(objects) == 1 else []
    return [kind for kind, *_ in kinds] in (["OBJECT"], ["ARRAY"])
  return False


def _json_sql(path: FilePath, type: str) -> str:
  """Returns the SQL of a scan of a file's JSON values, most often one, as the column `json` of a type."""
  size = REMOTE_JSON_TEXT if isinstance(path, RemoteFile) else max(JSON_TEXT, 2 * _unpacked_size(path))
  return (
    f"read_json({remote.pattern_sql(path)}, records = false, format = 'unstructured', "
    f"maximum_object_size = {size}, hive_partitioning = false, columns = {{'json': '{type}'}})"
  )


def _unpacked_size(path: pathlib.Path) -> int:
  if not path.name.lower().endswith(text_lines.PACKED):
    return path.stat().st_size
  with text_lines.open_bytes(path) as packed:
    return sum(len(part) for part in iter(lambda: packed.read(1 << 20), b""))


def entries_sql(path: FilePath) -> str:
  """Returns a query of a JSON object's entries in order: the structs `e` of `key` and, as JSON, `value`."""
  return f"SELECT unnest(map_entries(json)) AS e FROM {_json_sql(path, 'MAP(VARCHAR, JSON)')}"


def _kinds_sql(path: FilePath) -> str:
  """Returns a query of the JSON types of an object's values and the first key of each type; ignores absent values."""
  return (
    "SELECT json_type(e.value) AS kind, arg_min(e.key, row) FROM (SELECT e, row_number() OVER () AS row "
    f"FROM ({entries_sql(path)})) WHERE e.value IS NOT NULL GROUP BY kind ORDER BY min(row)"
  )


def attributes(con: duckdb.DuckDBPyConnection, path: FilePath) -> list[str]:
  """Returns the columns of a JSON object keyed by id: `key`, and the keys of its values, or `values` for lists.

  Raises:
    DataError: the values are neither all objects nor all lists, or an attribute is named `key`.
  """
  kinds = con.execute(_kinds_sql(path)).fetchall()
  for kind, key in kinds:
    if kind not in ("OBJECT", "ARRAY") or kind != kinds[0][0]:
      raise DataError(
        f"{path}: the value of {key!r} is of the JSON type {kind}; write every value as an object of attributes, or "
        "every value as a list."
      )
  if not kinds or kinds[0][0] == "ARRAY":
    return [KEY, VALUES]
  found = con.execute(
    "SELECT name, min(row) FROM (SELECT unnest(json_keys(e.value)) AS name, row_number() OVER () AS row "
    f"FROM ({entries_sql(path)})) GROUP BY name ORDER BY 2"
  ).fetchall()
  names = [name for name, _ in found]
  if KEY in names:
    raise DataError(f"{path} holds an attribute {KEY!r}, which is the name of the objects' ids; rename the attribute.")
  return [KEY, *names]


def entry_sql(name: str) -> str:
  """Returns the SQL of a column of a JSON object's entry `e`."""
  if name == KEY:
    return "e.key"
  value = member_sql("e.value", name)
  if name == VALUES:
    value = f"CASE json_type(e.value) WHEN 'ARRAY' THEN e.value::VARCHAR ELSE {value} END"
  return value
