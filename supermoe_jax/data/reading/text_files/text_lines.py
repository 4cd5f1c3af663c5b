"""Reads the lines of text files: local ones, packed or not, through Python, and remote ones through DuckDB."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import pathlib
from collections.abc import Iterator
from typing import BinaryIO, cast

import duckdb
import pyarrow as pa

from supermoe_jax.data.reading import remote
from supermoe_jax.data.reading.remote import FilePath, RemoteFile
from supermoe_jax.errors import DataError

LONGEST_LINE = 1 << 23  # bytes of a line of sequences, which is a user; buffers are 16 times as large
PACKED = (".gz", ".zst")
REMOTE_LINES = 10_000  # fetched from DuckDB at a time


def whole_lines_sql(path: FilePath) -> str:
  """Returns the SQL of a scan of a text file's lines as the column `text`; an empty line is NULL."""
  # No character of the text delimits, quotes or escapes. Lines may end in different ways.
  return (
    f"read_csv({remote.pattern_sql(path)}, auto_detect = false, header = false, delim = '\x01\x02\x03\x04', "
    f"quote = '', escape = '', comment = '', strict_mode = false, max_line_size = {LONGEST_LINE}, "
    "columns = {'text': 'VARCHAR'}, hive_partitioning = false)"
  )


def open_bytes(path: pathlib.Path) -> BinaryIO:
  """Opens a local file for reading, unpacked."""
  ending = path.suffix.lower()
  if ending == ".gz":
    return cast("BinaryIO", gzip.open(path))
  if ending == ".zst":
    return cast("BinaryIO", pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
  return path.open("rb")


def unpacked_name(name: str) -> str:
  """Returns the name of a file in lower case, without the ending of its compression."""
  name = name.lower()
  return name.rpartition(".")[0] if name.endswith(PACKED) else name


def byte_lines(con: duckdb.DuckDBPyConnection, path: FilePath) -> Iterator[bytes]:
  """Yields the lines of a text file with their ends; the lines of a remote file end in a line feed."""
  if isinstance(path, RemoteFile):
    with contextlib.closing(con.cursor()) as lines:
      lines.execute(f"SELECT text FROM {whole_lines_sql(path)}")
      while rows := lines.fetchmany(REMOTE_LINES):
        yield from ((text or "").encode() + b"\n" for (text,) in rows)
    return
  with open_bytes(path) as raw:
    yield from io.BufferedReader(cast("io.RawIOBase", raw), 1 << 20)


def first_lines(con: duckdb.DuckDBPyConnection, path: FilePath, count: int) -> list[str]:
  """Returns the first lines of a text file, and further lines up to the second one that is not blank.

  Raises:
    DataError: the lines are no UTF-8 text, or the file is not packed as its ending says.
  """
  try:
    with contextlib.ExitStack() as stack:
      if isinstance(path, RemoteFile):
        rows = con.execute(f"SELECT text FROM {whole_lines_sql(path)} LIMIT {count}").fetchall()
        return [text or "" for (text,) in rows]
      raw = stack.enter_context(open_bytes(path))
      lines = iter(io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace"))
      found = [line.rstrip("\r\n") for line in itertools.islice(lines, count)]
      while sum(bool(line.strip()) for line in found) < 2 and (line := next(lines, "")):
        found = [kept for kept in found if kept.strip()] + [line.rstrip("\r\n")]
      # Reading finds a later line that is no UTF-8; without a readable first line the file is of another kind.
      if found and "\ufffd" in found[0]:
        raise DataError(f"{path} is not UTF-8 text; convert it first.")
      return found
  except (gzip.BadGzipFile, EOFError, OSError) as error:
    raise DataError(f"{path} cannot be read: {error}.") from None
