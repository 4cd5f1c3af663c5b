"""Files of event logs and user tables, opened through DuckDB under one view.

Text formats are read as text throughout, so that a value that cannot be used can be named as it stands in the file.
Parquet keeps its types. Every row carries its number within its file: order of equal times, and messages, rest on it.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import glob
import gzip
import itertools
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import duckdb

from supermoe_jax.config import nearest

ENDINGS = {
  "parquet": (".parquet", ".pq"),
  "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
  "jsonl": (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz"),
  "atomic": (".inter", ".user", ".item"),
}
DELIMITERS = ",\t;|"  # tried in this order of preference on a CSV file's header


class DataError(ValueError):
  """Data that cannot be used; the message names the file, the column, the value and the remedy."""


class EmptyFileError(DataError):
  """A file without a single row."""


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
  con.execute("SET enable_progress_bar = false")
  con.execute("SET python_enable_replacements = false")  # a name in SQL never means a Python variable
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


# --------------------------------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class FoundFile:
  """A file that a pattern of the config led to.

  Attributes:
    path: where it is.
    may_be_empty: whether a glob found it; a file that was asked for by name has to hold rows.
  """

  path: pathlib.Path
  may_be_empty: bool


def find_files(patterns: Sequence[str], key: str) -> list[FoundFile]:
  """Expands paths and globs (`~` too) in the order listed, each glob sorted by path.

  Raises:
    DataError: a path does not exist, is a directory, or is named twice; `key` says where in the config it stands.
  """
  found: dict[pathlib.Path, FoundFile] = {}
  for pattern in patterns:
    for file in _find(pattern, key):
      if file.path in found:
        raise DataError(f"{key}: {file.path} is named twice; its rows would count twice.")
      found[file.path] = file
  return list(found.values())


def glob_files(pattern: str) -> list[pathlib.Path]:
  """Returns the files that a glob matches, sorted by path; hidden ones only if it begins with a dot."""
  # Not pathlib's glob, which matches hidden files, such as the checksums that Hadoop leaves, as well.
  found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
  return [file for file in map(pathlib.Path, found) if file.is_file()]


def _find(pattern: str, key: str) -> list[FoundFile]:
  if "://" in pattern:
    raise DataError(f"{key}: {pattern} is not a local file; copy it to a disk, or mount the bucket and name the path.")
  path = pathlib.Path(pattern).expanduser()
  if path.is_dir():
    endings = sorted({p.suffix for p in path.iterdir() if p.is_file() and p.suffix}) or [".parquet"]
    raise DataError(f"{key}: {path} is a directory; name its files, such as {path / ('*' + endings[0])}.")
  if path.exists():
    return [FoundFile(path, may_be_empty=False)]
  if glob.has_magic(str(path)):
    if files := glob_files(str(path)):
      return [FoundFile(file, may_be_empty=True) for file in files]
    raise DataError(f"{key}: {path} matches no file.")
  if not path.parent.is_dir():
    raise DataError(f"{key}: {path}: no such file; the folder {path.parent} does not exist either.")
  siblings = [p.name for p in path.parent.iterdir() if p.is_file()]
  hint = nearest(path.name, siblings) if len(siblings) <= 20 else nearest(path.name, siblings).partition("; valid")[0]
  raise DataError(f"{key}: {path}: no such file{hint}")


@contextlib.contextmanager
def naming(path: pathlib.Path, format: str) -> Iterator[None]:
  """Turns DuckDB's complaint about a file's content into a `DataError` that names the file.

  What is not the file's fault passes through: memory or disk running out, or SQL of ours that is wrong.
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
    raise DataError(f"{path} cannot be read as {format}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
  """What went wrong, in one line: all that DuckDB says before it lists possible fixes."""
  fixes = ("Possible", "Try setting", "LINE ")
  said = itertools.takewhile(lambda line: not line.startswith(fixes), str(error).splitlines())
  return "; ".join(line.strip() for line in said if line.strip())[:400]


@dataclasses.dataclass(frozen=True)
class TableFile:
  """A file that was opened: its columns are known, its rows not yet read.

  Attributes:
    path: where it is.
    format: one of `ENDINGS`.
    columns: the DuckDB type of each column; VARCHAR throughout for text formats.
  """

  path: pathlib.Path
  format: str
  columns: Mapping[str, str]
  delimiter: str = ""

  def select(self, wanted: Mapping[str, str]) -> str:
    """Returns a query of the wanted columns (alias → name), besides `row`, the row's number from 0."""
    # Given by position: a CSV header may hold names that DuckDB takes for equal.
    position = {n: f"c{i}" for i, n in enumerate(self.columns)}
    names = {a: identifier(position[n] if self.format in ("csv", "atomic") else n) for a, n in wanted.items()}
    # A column of this very name hides Parquet's own row number.
    numbered = self.format == "parquet" and "file_row_number" not in self.columns
    row = "file_row_number" if numbered else "row_number() OVER () - 1"
    columns = ", ".join(f"{n} AS {identifier(a)}" for a, n in names.items())
    return f"SELECT {row} AS row{', ' if columns else ''}{columns} FROM {self._scan(set(wanted.values()))}"

  def _scan(self, names: Collection[str]) -> str:
    path = literal(glob.escape(str(self.path)))
    if self.format == "parquet":
      return f"read_parquet({path})"
    if self.format == "jsonl":
      asked = sorted(names) or list(self.columns)[:1]  # at least one, as only counting rows needs
      types = ", ".join(f"{literal(n)}: 'VARCHAR'" for n in asked)
      return f"read_json({path}, columns = {{{types}}})"
    types = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(len(self.columns)))
    quote = "'\"'" if self.format == "csv" else "''"  # RecBole does not quote: a title may hold a single quotation mark
    return (
      f"read_csv({path}, auto_detect = false, header = true, delim = {literal(self.delimiter)}, quote = {quote}, "
      f"escape = {quote}, columns = {{{types}}})"
    )

  def require(self, name: str, key: str, others: Collection[str] = ()) -> str:
    """Returns `name` if it is a column; `key` says where in the config it stands, `others` what else would be valid.

    Raises:
      DataError: there is no such column.
    """
    if name not in self.columns:
      raise DataError(f"{self.path} has no column {name!r} ({key}){nearest(name, {*self.columns, *others})}")
    return name


def open_table(
  con: duckdb.DuckDBPyConnection, path: pathlib.Path, format: str, wanted: Collection[str] = ()
) -> TableFile:
  """Opens a file; JSON lines are searched to the end for `wanted` keys that do not show early.

  Raises:
    EmptyFileError: the file holds no row.
    DataError: its format is unknown, or it is not of its format.
  """
  if format == "auto":
    format = format_of(path)
  if path.stat().st_size == 0:
    raise EmptyFileError(f"{path} is empty (0 bytes).")
  with naming(path, format):
    if format == "parquet":
      query = f"DESCRIBE SELECT * FROM read_parquet({literal(glob.escape(str(path)))})"
      file = TableFile(path, format, {name: kind for name, kind, *_ in con.execute(query).fetchall()})
    elif format == "jsonl":
      file = TableFile(path, format, dict.fromkeys(_json_keys(con, path, wanted), "VARCHAR"))
    else:
      names, delimiter = _header(path, format)
      file = TableFile(path, format, dict.fromkeys(names, "VARCHAR"), delimiter)
    if not con.execute(f"{file.select({})} LIMIT 1").fetchall():
      raise EmptyFileError(f"{path} holds no row.")
  return file


def format_of(path: pathlib.Path) -> str:
  """The format that a file's ending tells.

  Raises:
    DataError: the ending is none of `ENDINGS`.
  """
  name = path.name.lower()
  for format, endings in ENDINGS.items():
    if name.endswith(endings):
      return format
  known = ", ".join(e for endings in ENDINGS.values() for e in endings)
  raise DataError(f"{path}: the format of this ending is unknown; set the source's format, or use one of {known}.")


def _json_keys(con: duckdb.DuckDBPyConnection, path: pathlib.Path, wanted: Collection[str]) -> list[str]:
  # Only the keys are asked for: depth 1 keeps nested values as JSON, and no number of keys turns a record into a map.
  options = "maximum_depth = 1, map_inference_threshold = -1"
  for sample in (20_480, -1):
    query = f"DESCRIBE SELECT * FROM read_json({literal(glob.escape(str(path)))}, {options}, sample_size = {sample})"
    keys = [name for name, *_ in con.execute(query).fetchall()]
    if all(w in keys for w in wanted):
      break
  return keys


def _header(path: pathlib.Path, format: str) -> tuple[list[str], str]:
  """Reads the names of the columns and the delimiter from the first line of a CSV or atomic file."""
  opener = gzip.open if path.suffix.lower() == ".gz" else open
  try:
    with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
      first = lines.readline()
  except UnicodeDecodeError as error:
    raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first.") from None
  except (gzip.BadGzipFile, EOFError, OSError) as error:
    raise DataError(f"{path} cannot be read: {error}.") from None
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
