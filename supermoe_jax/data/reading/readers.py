"""Opens files of event logs and user tables of any format through DuckDB, as tables of columns.

All columns of a text format are read as text, so that a message can quote a bad value as it stands in the file. Parquet
keeps its types. Every row carries its number within its file, which orders events of equal times and names bad rows.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import itertools
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping

import duckdb

from supermoe_jax.data.reading import remote
from supermoe_jax.data.reading.remote import FilePath, RemoteFile
from supermoe_jax.errors import DataError, nearest

ENDINGS = {
  "parquet": (".parquet", ".pq"),
  "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
  "jsonl": (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz"),
  "atomic": (".inter", ".user", ".item"),
  "sequences": (".txt", ".txt.gz"),
}
JSON_FORMATS = ("jsonl", "json_object")  # formats whose lists are read as the text of a JSON array
DELIMITERS = ",\t;|"  # tried in this order of preference on a CSV file's header

SEQUENCE_COLUMNS = {"user": "VARCHAR", "item": "VARCHAR", "position": "BIGINT"}
LONGEST_LINE = 1 << 23  # bytes of a line of sequences, which is a user; buffers are 16 times as large

# The beginning of a JSON object keyed by id: its first value is an object or a list.
KEYED_BY_ID = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*[\[{]')
KEY, VALUES = "key", "values"  # columns of such an object: its keys and, if its values are lists, the lists
JSON_TEXT = 1 << 24  # bytes, DuckDB's default limit of a JSON value
REMOTE_JSON_TEXT = 1 << 29  # bytes, the limit for a remote file, whose size is not looked up


class EmptyFileError(DataError):
  """Error raised for a file without any row."""


def connect(
  database: pathlib.Path | None = None, *, memory: str = "", spill: pathlib.Path | None = None
) -> duckdb.DuckDBPyConnection:
  """Connects to a DuckDB database, in memory by default; times without an offset are UTC.

  Raises:
    DataError: `memory` is not an amount.
  """
  con = duckdb.connect(str(database) if database else ":memory:")
  con.execute("SET TimeZone = 'UTC'")
  con.execute("SET preserve_insertion_order = true")
  # The bar is turned off only if it is on: without ipywidgets a notebook's DuckDB refuses even to turn it off.
  (shown,) = con.execute("SELECT current_setting('enable_progress_bar')").fetchall()[0]
  if shown:
    con.execute("SET enable_progress_bar = false")
  con.execute("SET python_enable_replacements = false")  # otherwise a name in SQL may mean a Python variable
  if spill is not None:
    con.execute(f"SET temp_directory = {literal(str(spill))}")
  if memory:
    try:
      con.execute(f"SET memory_limit = {literal(memory)}")
    except duckdb.Error as error:
      con.close()
      raise DataError(f"config.data.memory={memory!r} is not an amount such as '2GB' ({first_line(error)}).") from None
  return con


def literal(text: str) -> str:
  """Quotes a text for SQL."""
  return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
  """Quotes a column's name for SQL."""
  return '"' + name.replace('"', '""') + '"'


@contextlib.contextmanager
def naming(path: FilePath, format: str) -> Iterator[None]:
  """Turns a DuckDB error about a file's content into a `DataError` that names the file.

  Other errors pass through: memory or disk running out, and wrong SQL of this package.
  """
  try:
    yield
  except (
    duckdb.OutOfMemoryException,
    duckdb.InterruptException,
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ParserException,
  ):
    raise
  except duckdb.Error as error:
    if "No space left" in str(error):
      raise
    remedy = f" {path.credentials}." if isinstance(path, RemoteFile) and isinstance(error, duckdb.IOException) else ""
    raise DataError(f"{path} cannot be read as {format}: {first_line(error)}{remedy}") from error


def first_line(error: Exception) -> str:
  """Returns DuckDB's message in one line, without the possible fixes that follow it."""
  fixes = ("Possible", "Try setting", "LINE ")
  said = itertools.takewhile(lambda line: not line.startswith(fixes), str(error).splitlines())
  return "; ".join(line.strip() for line in said if line.strip())[:400]


@dataclasses.dataclass(frozen=True)
class TableFile:
  """An opened file, with known columns and rows that are not read yet.

  Attributes:
    path: the file's path.
    format: one of `ENDINGS`, or "json_object".
    columns: the DuckDB type of each column; VARCHAR for text formats, except for the position in a sequence.
    delimiter: the delimiter of a CSV or atomic file; else empty.
  """

  path: FilePath
  format: str
  columns: Mapping[str, str]
  delimiter: str = ""

  def select(self, wanted: Mapping[str, str]) -> str:
    """Returns a query of `row`, the row's number from 0, and the wanted columns (alias → name)."""
    # CSV columns are given by position, since a header may hold names that DuckDB regards as equal.
    position = {n: f"c{i}" for i, n in enumerate(self.columns)}
    names = {a: identifier(position[n] if self.format in ("csv", "atomic") else n) for a, n in wanted.items()}
    # A column named file_row_number hides Parquet's own row number.
    numbered = self.format == "parquet" and "file_row_number" not in self.columns
    row = "file_row_number" if numbered else "row_number() OVER () - 1"
    columns = ", ".join(f"{n} AS {identifier(a)}" for a, n in names.items())
    return f"SELECT {row} AS row{', ' if columns else ''}{columns} FROM {self._scan(set(wanted.values()))}"

  def _scan(self, names: Collection[str]) -> str:
    path = literal(remote.pattern(self.path))
    if self.format == "parquet":
      return f"read_parquet({path})"
    if self.format == "sequences":
      places = "unnest(items) AS item, generate_subscripts(items, 1) - 1 AS position"
      return f'(SELECT "user", {places} FROM ({lines_sql(self.path)}))'
    if self.format == "json_object":
      return f"(SELECT {', '.join(_of_entry(n) for n in self.columns)} FROM ({_entries_sql(self.path)}))"
    if self.format == "jsonl":
      asked = sorted(names) or list(self.columns)[:1]  # read_json needs at least one column, also to count rows
      types = ", ".join(f"{literal(n)}: 'VARCHAR'" for n in asked)
      return f"read_json({path}, columns = {{{types}}})"
    types = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(self.columns)))
    quote = "'\"'" if self.format == "csv" else "''"  # RecBole does not quote: a title may hold a single quotation mark
    return (
      f"read_csv({path}, auto_detect = false, header = true, delim = {literal(self.delimiter)}, quote = {quote}, "
      f"escape = {quote}, columns = {{{types}}})"
    )

  def require(self, name: str, key: str, others: Collection[str] = ()) -> str:
    """Returns `name` if it is a column.

    Raises:
      DataError: there is no such column; the message names `key`, the place in the config, and proposes one of the
        columns or `others`.
    """
    if name not in self.columns:
      raise DataError(f"{self.path} has no column {name!r} ({key}){nearest(name, {*self.columns, *others})}")
    return name


def open_table(con: duckdb.DuckDBPyConnection, path: FilePath, format: str, wanted: Collection[str] = ()) -> TableFile:
  """Opens a file; searches JSON lines to the end for `wanted` keys that are missing at the beginning.

  With the format "auto" the file's ending decides the format. A local `.json` file is a "json_object", keyed by id, if
  it is one object whose values are all objects or all lists; a remote one needs the explicit format "json_object".

  Raises:
    EmptyFileError: the file holds no row.
    DataError: the format is unknown, or the file is not of its format.
  """
  given = format
  if format == "auto":
    format = format_of(path)
  if isinstance(path, pathlib.Path) and path.stat().st_size == 0:
    raise EmptyFileError(f"{path} is empty (0 bytes).")
  with naming(path, format):
    if given == "auto" and format == "jsonl" and _is_json_object(con, path):
      format = "json_object"
    if format == "parquet":
      query = f"DESCRIBE SELECT * FROM read_parquet({literal(remote.pattern(path))})"
      file = TableFile(path, format, {name: kind for name, kind, *_ in con.execute(query).fetchall()})
    elif format == "jsonl":
      file = TableFile(path, format, dict.fromkeys(_json_keys(con, path, wanted), "VARCHAR"))
    elif format == "sequences":
      file = TableFile(path, format, SEQUENCE_COLUMNS)
    elif format == "json_object":
      file = TableFile(path, format, dict.fromkeys(_attributes(con, path), "VARCHAR"))
    else:
      names, delimiter = _header(con, path, format)
      file = TableFile(path, format, dict.fromkeys(names, "VARCHAR"), delimiter)
    if not con.execute(f"{file.select({})} LIMIT 1").fetchall():
      raise EmptyFileError(f"{path} holds no row.")
  return file


def format_of(path: FilePath) -> str:
  """Returns the format of a file by its ending.

  Raises:
    DataError: the ending is none of `ENDINGS`.
  """
  name = path.name.lower()
  for format, endings in ENDINGS.items():
    if name.endswith(endings):
      return format
  known = ", ".join(e for endings in ENDINGS.values() for e in endings)
  raise DataError(f"{path}: the format of this ending is unknown; set the source's format, or use one of {known}.")


def _json_keys(con: duckdb.DuckDBPyConnection, path: FilePath, wanted: Collection[str]) -> list[str]:
  # Only the keys are needed: depth 1 keeps nested values as JSON, and threshold -1 never turns a record into a map.
  options = "maximum_depth = 1, map_inference_threshold = -1"
  for sample in (20_480, -1):
    query = f"DESCRIBE SELECT * FROM read_json({literal(remote.pattern(path))}, {options}, sample_size = {sample})"
    keys = [name for name, *_ in con.execute(query).fetchall()]
    if all(w in keys for w in wanted):
      break
  return keys


def lines_sql(path: FilePath) -> str:
  """Returns a query of a sequence file: `line`, its number from 1, `user`, NULL for an empty line, and `items`."""
  parts = "string_split_regex(trim(text, ' \t\r'), '[ \t]+') AS parts"
  return (
    "SELECT line, nullif(parts[1], '') AS \"user\", parts[2:] AS items "
    f"FROM (SELECT row_number() OVER () AS line, {parts} FROM {_whole_lines_sql(path)})"
  )


def _whole_lines_sql(path: FilePath) -> str:
  """Returns the SQL of a scan of a text file's lines as the column `text`; an empty line is NULL."""
  return (  # no character of the text delimits, quotes or escapes
    f"read_csv({literal(remote.pattern(path))}, auto_detect = false, header = false, delim = '\x01', quote = '', "
    f"escape = '', comment = '', max_line_size = {LONGEST_LINE}, columns = {{'text': 'VARCHAR'}})"
  )


def _is_json_object(con: duckdb.DuckDBPyConnection, path: FilePath) -> bool:
  """Returns whether a local JSON file is one object whose values are all objects or all lists."""
  if isinstance(path, RemoteFile) or not path.name.lower().endswith((".json", ".json.gz")):
    return False
  opener = gzip.open if path.suffix.lower() == ".gz" else open
  with opener(path, "rt", encoding="utf-8-sig", errors="replace") as text:
    if not KEYED_BY_ID.match(text.read(1 << 16)):
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
    f"read_json({literal(remote.pattern(path))}, records = false, format = 'unstructured', "
    f"maximum_object_size = {size}, columns = {{'json': '{type}'}})"
  )


def _unpacked_size(path: pathlib.Path) -> int:
  if path.suffix.lower() != ".gz":
    return path.stat().st_size
  with gzip.open(path) as text:
    return text.seek(0, os.SEEK_END)


def _entries_sql(path: FilePath) -> str:
  """Returns a query of a JSON object's entries in order: the structs `e` of `key` and, as JSON, `value`."""
  return f"SELECT unnest(map_entries(json)) AS e FROM {_json_sql(path, 'MAP(VARCHAR, JSON)')}"


def _kinds_sql(path: FilePath) -> str:
  """Returns a query of the JSON types of an object's values and the first key of each type; ignores absent values."""
  return (
    "SELECT json_type(e.value) AS kind, arg_min(e.key, row) FROM (SELECT e, row_number() OVER () AS row "
    f"FROM ({_entries_sql(path)})) WHERE e.value IS NOT NULL GROUP BY kind ORDER BY min(row)"
  )


def _attributes(con: duckdb.DuckDBPyConnection, path: FilePath) -> list[str]:
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
    f"FROM ({_entries_sql(path)})) GROUP BY name ORDER BY 2"
  ).fetchall()
  names = [name for name, _ in found]
  if KEY in names:
    raise DataError(f"{path} holds an attribute {KEY!r}, which is the name of the objects' ids; rename the attribute.")
  return [KEY, *names]


def _of_entry(name: str) -> str:
  """Returns the SQL of a column of a JSON object's entry `e`."""
  if name == KEY:
    return f"e.key AS {KEY}"
  pointer = "/" + name.replace("~", "~0").replace("/", "~1")  # a JSON pointer can name any key, a path cannot
  value = f"json_extract_string(e.value, {literal(pointer)})"
  if name == VALUES:
    value = f"CASE json_type(e.value) WHEN 'ARRAY' THEN e.value::VARCHAR ELSE {value} END"
  return f"{value} AS {identifier(name)}"


def _header(con: duckdb.DuckDBPyConnection, path: FilePath, format: str) -> tuple[list[str], str]:
  """Reads the names of the columns and the delimiter from the first line of a CSV or atomic file."""
  first = _first_line_of(con, path)
  tabs = format == "atomic" or path.name.lower().endswith((".tsv", ".tsv.gz"))
  delimiter = "\t" if tabs else max(DELIMITERS, key=first.count)
  if format == "atomic":
    names = [name.rpartition(":")[0] or name for name in first.rstrip("\r\n").split(delimiter)]
  else:
    names = next(csv.reader([first], delimiter=delimiter), [])
  if not any(names):
    raise DataError(f"{path} begins with an empty line; the first line has to name the columns.")
  for name in names:
    if names.count(name) > 1:
      raise DataError(f"{path} names the column {name!r} twice; rename one of them.")
  return names, delimiter


def _first_line_of(con: duckdb.DuckDBPyConnection, path: FilePath) -> str:
  if isinstance(path, RemoteFile):
    lines = con.execute(f"SELECT text FROM {_whole_lines_sql(path)} LIMIT 1").fetchall()
    if not lines:
      raise EmptyFileError(f"{path} is empty.")
    return lines[0][0] or ""
  opener = gzip.open if path.suffix.lower() == ".gz" else open
  try:
    with opener(path, "rt", encoding="utf-8-sig", newline="") as text:
      return text.readline()
  except UnicodeDecodeError as error:
    raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first.") from None
  except (gzip.BadGzipFile, EOFError, OSError) as error:
    raise DataError(f"{path} cannot be read: {error}.") from None
