"""Opens files of event logs and user tables of any format through DuckDB, as tables of columns.

All columns of a text format are read as text, so that a message can quote a bad value as it stands in the file. Parquet
keeps its types. Every row carries its number within its file, which orders events of equal times and names bad rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping

import duckdb

from supermoe_jax.config import TextFormat
from supermoe_jax.config.tables import PLAIN_TEXT, setting_text
from supermoe_jax.data.reading import remote, text_layout, text_lines
from supermoe_jax.data.reading.remote import FilePath, RemoteFile
from supermoe_jax.errors import ConfigError, DataError, nearest

ENDINGS = {
  "parquet": (".parquet", ".pq"),
  "csv": (".csv", ".tsv"),
  "jsonl": (".jsonl", ".json", ".ndjson"),
  "atomic": (".inter", ".user", ".item"),
  "sequences": (".txt",),
}
JSON_FORMATS = ("jsonl", "json_object")  # formats whose lists are read as the text of a JSON array
DELIMITED = ("csv", "atomic")  # formats with a delimiter, a header and columns in order

SEQUENCE_COLUMNS = {"user": "VARCHAR", "item": "VARCHAR", "position": "BIGINT"}

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
    header: whether the first line of a CSV or atomic file names its columns.
    folders: the columns of a text format that the names of the file's folders hold, with their value in every row.
    text: how the text values are written.
    copy: a copy that is read in place of the file; messages name the file.
  """

  path: FilePath
  format: str
  columns: Mapping[str, str]
  delimiter: str = ""
  header: bool = True
  folders: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
  text: TextFormat = PLAIN_TEXT
  copy: pathlib.Path | None = None

  def select(self, wanted: Mapping[str, str]) -> str:
    """Returns a query of `row`, the row's number from 0, and the wanted columns (alias → name)."""
    # CSV columns are given by position, since a header may hold names that DuckDB regards as equal.
    places = {n: f"c{i}" for i, n in enumerate(self.columns)} if self.format in DELIMITED else {}
    values = {a: places[n] if n in places and n not in self.folders else self._value(n) for a, n in wanted.items()}
    # A column named file_row_number hides Parquet's own row number.
    numbered = self.format == "parquet" and "file_row_number" not in self.columns
    row = "file_row_number" if numbered else "row_number() OVER () - 1"
    columns = ", ".join(f"{value} AS {identifier(a)}" for a, value in values.items())
    names = set(wanted.values()) - self.folders.keys()
    return f"SELECT {row} AS row{', ' if columns else ''}{columns} FROM {self._scan(names)}"

  def _value(self, name: str) -> str:
    """Returns the SQL of a named column's value in a scan of the file."""
    if name in self.folders:
      value = self.folders[name]
      return "NULL::VARCHAR" if value is None or value in self.text.null_values else literal(value)
    column = identifier(name)
    if self.text.null_values and self.columns[name] == "VARCHAR":
      return f"CASE WHEN {column} NOT IN ({', '.join(map(literal, self.text.null_values))}) THEN {column} END"
    return column

  def _scan(self, names: Collection[str]) -> str:
    path = remote.pattern_sql(self.copy or self.path)
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
      return f"read_json({path}, columns = {{{types}}}, hive_partitioning = false)"
    types = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(self.columns) - len(self.folders)))
    quote = "'\"'" if self.format == "csv" else "''"  # RecBole does not quote: a title may hold a single quotation mark
    nulls = f", nullstr = ['', {', '.join(map(literal, self.text.null_values))}]" if self.text.null_values else ""
    return (
      f"read_csv({path}, auto_detect = false, header = {self.header}, delim = {literal(self.delimiter)}, "
      f"quote = {quote}, escape = {quote}{nulls}, columns = {{{types}}}, hive_partitioning = false)"
    )

  def require(self, name: str, key: str, others: Collection[str] = ()) -> str:
    """Returns `name` if it is a column.

    Raises:
      DataError: there is no such column; the message names `key`, the place in the config, and proposes one of the
        columns or `others`.
    """
    if name not in self.columns:
      hint = text_layout.header_hint(list(self.columns)) if self.format in DELIMITED and self.header else ""
      raise DataError(f"{self.path} has no column {name!r} ({key}){nearest(name, {*self.columns, *others})}{hint}")
    return name


def open_table(
  con: duckdb.DuckDBPyConnection,
  path: FilePath,
  format: str,
  wanted: Collection[str] = (),
  text: TextFormat = PLAIN_TEXT,
  key: str = "",
) -> TableFile:
  """Opens a file; searches JSON lines to the end for `wanted` keys that are missing at the beginning.

  With the format "auto" the file's ending decides the format. A local `.json` file is a "json_object", keyed by id, if
  it is one object whose values are all objects or all lists; a remote one needs the explicit format "json_object".
  Messages name the settings `text` by their place `key` in the config, or as options of the command if it is empty.

  Raises:
    EmptyFileError: the file holds no row.
    DataInHeaderError: the first line of a CSV or atomic file holds data where names are expected.
    DataError: the format is unknown, or the file is not of its format.
    ConfigError: a setting of `text` has no meaning for the file's format.
  """
  given = format
  if format == "auto":
    format = format_of(path)
  if isinstance(path, pathlib.Path) and path.stat().st_size == 0:
    raise EmptyFileError(f"{path} is empty (0 bytes).")
  _check_meaning(path, format, text, key)
  if format in DELIMITED:
    return _open_delimited(con, path, format, wanted, text, key)
  with naming(path, format):
    if given == "auto" and format == "jsonl" and _is_json_object(con, path):
      format = "json_object"
    if given == "auto" and format == "sequences":
      _check_no_table(con, path, wanted, key)
    if format == "parquet":
      query = f"DESCRIBE SELECT * FROM read_parquet({remote.pattern_sql(path)})"
      file = TableFile(path, format, {name: kind for name, kind, *_ in con.execute(query).fetchall()}, text=text)
    elif format == "jsonl":
      columns = dict.fromkeys(_json_keys(con, path, wanted), "VARCHAR")
      folders = {k: v for k, v in remote.folder_values(path).items() if k not in columns}
      file = TableFile(path, format, columns | dict.fromkeys(folders, "VARCHAR"), folders=folders, text=text)
    elif format == "sequences":
      file = TableFile(path, format, SEQUENCE_COLUMNS, text=text)
    else:
      file = TableFile(path, format, dict.fromkeys(_attributes(con, path), "VARCHAR"), text=text)
    if not con.execute(f"{file.select({})} LIMIT 1").fetchall():
      raise EmptyFileError(f"{path} holds no row.")
  return file


def _check_meaning(path: FilePath, format: str, text: TextFormat, key: str) -> None:
  for name in ("delimiter", "header", "columns") if format not in DELIMITED else ():
    value = getattr(text, name)
    if value != getattr(PLAIN_TEXT, name):
      raise ConfigError(
        f"{path}: {setting_text(key, name, value)} has no meaning for the format {format}; remove it, or set the "
        "format 'csv'."
      )


def _open_delimited(
  con: duckdb.DuckDBPyConnection, path: FilePath, format: str, wanted: Collection[str], text: TextFormat, key: str
) -> TableFile:
  """Opens a CSV or atomic file; see `open_table`. Only the first lines are read."""
  with naming(path, format):
    lines = text_lines.first_lines(con, path, text_layout.FIRST_LINES)
  if not any(line.strip() for line in lines):
    raise EmptyFileError(f"{path} is empty.")
  layout = text_layout.text_layout(path, format, lines, text, wanted, key)
  if sum(bool(line.strip()) for line in lines) <= layout.header:
    raise EmptyFileError(f"{path} holds no row.")
  folders = {k: v for k, v in remote.folder_values(path).items() if k not in layout.names}
  columns = dict.fromkeys((*layout.names, *folders), "VARCHAR")
  return TableFile(path, format, columns, layout.delimiter, layout.header, folders, text)


def _check_no_table(con: duckdb.DuckDBPyConnection, path: FilePath, wanted: Collection[str], key: str) -> None:
  """Raises DataError if a file with the ending of sequences looks like a table."""
  lines = text_lines.first_lines(con, path, text_layout.FIRST_LINES)
  if text_layout.is_table(lines, wanted):
    csv, sequences = (f"{key}.format={f!r}" if key else f"--format {f}" for f in ("csv", "sequences"))
    raise DataError(
      f"{path} looks like a table, not like sequences of items: {text_layout.abridged(lines[0])}. Set {csv}; or, where "
      f"a line is a user and its items, {sequences}."
    )


def format_of(path: FilePath) -> str:
  """Returns the format of a file by its ending.

  Raises:
    DataError: the ending is none of `ENDINGS`.
  """
  name = path.name.lower()
  for format, endings in ENDINGS.items():
    if (name if format == "parquet" else text_lines.unpacked_name(name)).endswith(endings):
      return format
  known = ", ".join(e for endings in ENDINGS.values() for e in endings)
  raise DataError(
    f"{path}: the format of this ending is unknown; set the source's format, or use one of {known}, where "
    f"{' or '.join(text_lines.PACKED)} may follow if it is text."
  )


def _json_keys(con: duckdb.DuckDBPyConnection, path: FilePath, wanted: Collection[str]) -> list[str]:
  # Only the keys are needed: depth 1 keeps nested values as JSON, and threshold -1 never turns a record into a map.
  options = "maximum_depth = 1, map_inference_threshold = -1, hive_partitioning = false"
  for sample in (20_480, -1):
    query = f"DESCRIBE SELECT * FROM read_json({remote.pattern_sql(path)}, {options}, sample_size = {sample})"
    keys = [name for name, *_ in con.execute(query).fetchall()]
    if all(w in keys for w in wanted):
      break
  return keys


def lines_sql(path: FilePath) -> str:
  """Returns a query of a sequence file: `line`, its number from 1, `user`, NULL for an empty line, and `items`."""
  parts = "string_split_regex(trim(text, ' \t\r'), '[ \t]+') AS parts"
  return (
    "SELECT line, nullif(parts[1], '') AS \"user\", parts[2:] AS items "
    f"FROM (SELECT row_number() OVER () AS line, {parts} FROM {text_lines.whole_lines_sql(path)})"
  )


def _is_json_object(con: duckdb.DuckDBPyConnection, path: FilePath) -> bool:
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
    f"maximum_object_size = {size}, columns = {{'json': '{type}'}})"
  )


def _unpacked_size(path: pathlib.Path) -> int:
  if not path.name.lower().endswith(text_lines.PACKED):
    return path.stat().st_size
  with text_lines.open_bytes(path) as packed:
    return sum(len(part) for part in iter(lambda: packed.read(1 << 20), b""))


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
