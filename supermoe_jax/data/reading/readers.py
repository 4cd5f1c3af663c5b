"""Opens files of event logs and user tables of any format through DuckDB, as tables of columns.

All columns of a text format are read as text, so that a message can quote a bad value as it stands in the file. Parquet
keeps its types. Every row carries its number within its file, which orders events of equal times and names bad rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import duckdb

from supermoe_jax.config import TextFormat
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.config.text_settings import setting_text
from supermoe_jax.data.reading import derived_columns, json_files, remote
from supermoe_jax.data.reading.derived_columns import DerivedColumn
from supermoe_jax.data.reading.remote import FilePath, RemoteFile
from supermoe_jax.data.reading.sql_text import first_line as first_line
from supermoe_jax.data.reading.sql_text import identifier as identifier
from supermoe_jax.data.reading.sql_text import literal as literal
from supermoe_jax.data.reading.text_files import text_layout, text_lines
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

LIST_SEPARATOR = " "  # of lists in RecBole's files

SEQUENCE_COLUMNS = {"user": "VARCHAR", "item": "VARCHAR", "position": "BIGINT"}
SHOWN_TYPE = 200  # characters of a column's type that a message shows


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


@dataclasses.dataclass(frozen=True)
class TableFile:
  """An opened file, with known columns and rows that are not read yet.

  Attributes:
    path: the file's path.
    format: one of `ENDINGS`, or "json_object".
    columns: the DuckDB type of each column; VARCHAR for text formats, except for the position in a sequence.
    delimiter: the delimiter of a CSV or atomic file; else empty.
    header: whether the first line of a CSV or atomic file names its columns.
    derived: the columns that the scan of the file does not hold as such.
    lists: the columns of an atomic file whose header says that they hold lists, as `token_seq` does: text that is
      separated by `LIST_SEPARATOR`.
    text: how the text values are written.
    copy: a copy that is read in place of the file; messages name the file.
  """

  path: FilePath
  format: str
  columns: Mapping[str, str]
  delimiter: str = ""
  header: bool = True
  derived: Mapping[str, DerivedColumn] = dataclasses.field(default_factory=dict)
  lists: Collection[str] = ()
  text: TextFormat = PLAIN_TEXT
  copy: pathlib.Path | None = None

  def select(self, wanted: Mapping[str, str], *, lenient: bool = False) -> str:
    """Returns a query of `row`, the row's number from 0, and the wanted columns (alias → name).

    With `lenient`, the bad lines of a CSV or atomic file are passed over, and those of JSON lines hold NULL.
    """
    # A column named file_row_number hides Parquet's own row number.
    numbered = self.format == "parquet" and "file_row_number" not in self.columns
    row = "file_row_number" if numbered else "row_number() OVER () - 1"
    scanned = sorted({name for n in wanted.values() if (name := self._scanned(n))})
    columns = ", ".join(f"{self._value(n, scanned)} AS {identifier(a)}" for a, n in wanted.items())
    return f"SELECT {row} AS row{', ' if columns else ''}{columns} FROM {self._scan(scanned, lenient)}"

  def _scanned(self, name: str) -> str:
    """Returns the name of the scan's column that a column is made of; empty: none."""
    return self.derived[name].column if name in self.derived else name

  @property
  def places(self) -> dict[str, int]:
    """Returns the place of each column of the scan."""
    scanned = dict.fromkeys(map(self._scanned, self.columns))
    return {name: i for i, name in enumerate(name for name in scanned if name)}

  def _value(self, name: str, scanned: Sequence[str]) -> str:
    """Returns the SQL of a column, without null values, over the scan of the columns `scanned`."""
    sql = self._sql(name, scanned)
    done = self.format in DELIMITED and name not in self.derived  # by the scan
    if self.text.null_values and self.columns[name] in derived_columns.TEXTS and not done:
      return f"CASE WHEN {sql} NOT IN ({', '.join(map(literal, self.text.null_values))}) THEN {sql} END"
    return sql

  def _sql(self, name: str, scanned: Sequence[str]) -> str:
    """Returns the SQL of a column over the scan of the columns `scanned`."""
    column = self._scanned(name)
    sql = identifier(column)
    if column and self.format in ("csv", "atomic", "json_object"):
      # These columns are given by position, since a file may hold names that DuckDB regards as equal.
      sql = f"c{self.places[column]}"
    elif column and self._in_records(scanned):
      sql = json_files.member_sql("json", column)
    return self.derived[name].sql.replace("{column}", sql) if name in self.derived else sql

  def _in_records(self, names: Sequence[str]) -> bool:
    """Returns whether JSON lines are scanned as whole records: DuckDB regards two of the keys as equal."""
    return self.format == "jsonl" and len({n.lower() for n in names}) < len(names)

  def _scan(self, names: Sequence[str], lenient: bool) -> str:
    path = remote.pattern_sql(self.copy or self.path)
    if self.format == "parquet":
      return f"read_parquet({path}, hive_partitioning = false)"
    if self.format == "sequences":
      places = "unnest(items) AS item, generate_subscripts(items, 1) - 1 AS position"
      return f'(SELECT "user", {places} FROM ({lines_sql(self.path)}))'
    if self.format == "json_object":
      columns = ", ".join(f"{json_files.entry_sql(n)} AS c{i}" for n, i in self.places.items())
      return f"(SELECT {columns} FROM ({json_files.entries_sql(self.path)}))"
    if self._in_records(names):
      return f"({json_files.records_sql(self.copy or self.path, self.format, lenient=lenient)})"
    if self.format == "jsonl":
      asked = names or list(self.places)[:1]  # read_json needs at least one column, also to count rows
      types = ", ".join(f"{literal(n)}: 'VARCHAR'" for n in asked)
      options = json_files.lines_options(self.copy or self.path, lenient=lenient)
      return f"read_json({path}, columns = {{{types}}}, {options})"
    types = ", ".join(f"'c{i}': 'VARCHAR'" for i in self.places.values())
    quote = "'\"'" if self.format == "csv" else "''"  # RecBole does not quote: a title may hold a single quotation mark
    nulls = f", nullstr = ['', {', '.join(map(literal, self.text.null_values))}]" if self.text.null_values else ""
    return (
      f"read_csv({path}, auto_detect = false, header = {self.header}, delim = {literal(self.delimiter)}, "
      f"quote = {quote}, escape = {quote}{nulls}, "
      f"ignore_errors = {lenient}, columns = {{{types}}}, hive_partitioning = false)"
    )

  def require(self, name: str, key: str, others: Collection[str] = ()) -> str:
    """Returns `name` if it is a column.

    Raises:
      DataError: there is no such column; the message names `key`, the place in the config, and proposes one of the
        columns or `others`.
    """
    if name not in self.columns:
      parts = name.split(".")
      for n in range(len(parts) - 1, 0, -1):
        if (base := ".".join(parts[:n])) in self.columns:
          raise DataError(
            f"{self.path} has no column {name!r} ({key}), and its column {base!r} of type "
            f"{self.columns[base][:SHOWN_TYPE]} has no member {'.'.join(parts[n:])!r}."
          )
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

  `wanted` names the columns that will be read; empty: all. `derived_columns` finds those that are no plain columns.
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
    file = _open_delimited(con, path, format, wanted, text, key)
    with naming(path, format):
      return derived_columns.with_derived_columns(con, file, wanted)
  with naming(path, format):
    if given == "auto" and format == "jsonl" and json_files.is_json_object(con, path):
      format = "json_object"
    if given == "auto" and format == "sequences":
      _check_no_table(con, path, wanted, key)
    if format == "parquet":
      file = derived_columns.open_parquet(con, TableFile(path, format, {}, text=text))
    elif format == "jsonl":
      file = TableFile(path, format, dict.fromkeys(json_files.line_keys(con, path, wanted), "VARCHAR"), text=text)
    elif format == "sequences":
      file = TableFile(path, format, SEQUENCE_COLUMNS, text=text)
    else:
      file = TableFile(path, format, dict.fromkeys(json_files.attributes(con, path), "VARCHAR"), text=text)
    if not con.execute(f"{file.select({}, lenient=True)} LIMIT 1").fetchall():
      raise EmptyFileError(f"{path} holds no row.")
    return derived_columns.with_derived_columns(con, file, wanted)


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
  columns = dict.fromkeys(layout.names, "VARCHAR")
  return TableFile(path, format, columns, layout.delimiter, layout.header, lists=layout.lists, text=text)


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


def lines_sql(path: FilePath) -> str:
  """Returns a query of a sequence file: `line`, its number from 1, `user`, NULL for an empty line, and `items`."""
  parts = "string_split_regex(trim(text, ' \t\r'), '[ \t]+') AS parts"
  return (
    "SELECT line, nullif(parts[1], '') AS \"user\", parts[2:] AS items "
    f"FROM (SELECT row_number() OVER () AS line, {parts} FROM {text_lines.whole_lines_sql(path)})"
  )
