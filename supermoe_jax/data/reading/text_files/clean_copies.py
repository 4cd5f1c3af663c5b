"""Reads text files that DuckDB refuses as a whole: bad lines are named or dropped, line ends made equal.

The files are CSV, RecBole files and JSON lines.

A file is read as it is first, so a file without a fault costs nothing. Only after a failure its lines are split here,
and a copy of the good lines is read.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import duckdb

from supermoe_jax.data.reading import readers
from supermoe_jax.data.reading.readers import DELIMITED, TableFile
from supermoe_jax.data.reading.text_files import text_lines
from supermoe_jax.data.reading.text_files.text_layout import abridged
from supermoe_jax.errors import DataError

LONGEST_RECORD = 2_000_000  # bytes, the limit of DuckDB
MOST_LINES = 1000  # of one record; a quotation mark that is open for longer is a fault
OPEN, BROKEN = -1, -2  # in place of a number of values

OF_LINES = (*DELIMITED, "jsonl")  # formats whose lines can be read one by one
LINES_AT_ONCE = 10_000  # lines of JSON that are judged at a time

T = TypeVar("T")
Line = tuple[int, bytes]


class Record(NamedTuple):
  """A record of a text file.

  Attributes:
    line: the number of its first line, from 1.
    content: the bytes without the line end.
    fault: what is wrong with it; empty for a good record.
  """

  line: int
  content: bytes
  fault: str = ""


def read_clean(
  con: duckdb.DuckDBPyConnection, file: TableFile, remedy: str, read: Callable[[TableFile], T], *, drop: bool
) -> tuple[T, int]:
  """Returns the result of `read(file)`, and the number of bad lines that were left out.

  Args:
    con: the connection that reads.
    file: the file.
    remedy: how to go on in spite of bad lines, for the message; empty if there is no way.
    read: reads a file as a whole; it must be possible to call it again after a `DataError`.
    drop: whether bad lines may be left out.

  Raises:
    DataError: `read` fails for another reason, or lines are bad and may not be dropped; the message names the first.
  """
  try:
    return read(file), 0
  except DataError as error:
    if file.format not in OF_LINES or not isinstance(error.__cause__, duckdb.InvalidInputException):
      raise
    with clean_copy(con, file, remedy, drop=drop) as (copy, dropped):
      return read(copy), dropped


@contextlib.contextmanager
def readable(
  con: duckdb.DuckDBPyConnection, file: TableFile, remedy: str = "", *, drop: bool = False
) -> Iterator[tuple[TableFile, int]]:
  """Yields the file, with a copy of its good lines if it cannot be read as it is, and the number of bad lines.

  Serves several queries of a file; reads a file of lines once to find out. Arguments and errors are those of
  `read_clean`.
  """

  def parse(file: TableFile) -> None:
    with readers.naming(file.path, file.format):
      con.execute(
        f"SELECT count(COLUMNS(*)) FROM ({file.select({f'c{i}': n for i, n in enumerate(file.columns)})})"
      ).fetchall()

  try:
    if file.format in OF_LINES:
      parse(file)
  except DataError as error:
    if not isinstance(error.__cause__, duckdb.InvalidInputException):
      raise
    with clean_copy(con, file, remedy, drop=drop) as copy:
      yield copy
    return
  yield file, 0


@contextlib.contextmanager
def clean_copy(
  con: duckdb.DuckDBPyConnection, file: TableFile, remedy: str, *, drop: bool
) -> Iterator[tuple[TableFile, int]]:
  """Yields the file with a copy of its good lines to read, and the number of bad lines; arguments as `read_clean`.

  The copy lies where the connection spills to, and is removed at the end.

  Raises:
    DataError: lines are bad and may not be dropped.
  """
  ((spill,),) = con.execute("SELECT current_setting('temp_directory')").fetchall()
  place = pathlib.Path(spill) if spill and not spill.startswith(".") else None
  if place:
    place.mkdir(parents=True, exist_ok=True)
  bad: list[Record] = []
  dropped = 0
  with tempfile.TemporaryDirectory(dir=place) as folder:
    copy, good = pathlib.Path(folder) / f"copy.{file.format}", 0
    raw = text_lines.byte_lines(con, file.path)
    with copy.open("wb") as out:
      for record in _json_records(con, raw) if file.format == "jsonl" else _records(raw, file):
        if not record.fault:
          good += 1
          out.write(record.content + b"\n")
          continue
        dropped += 1
        bad = [*bad, record][:2]
    if file.format == "jsonl" and dropped > good:
      raise DataError(
        f"{file.path}: {dropped:,} of {good + dropped:,} lines are no JSON, the first is line {bad[0].line}: "
        f"{abridged(bad[0].content.decode(errors='replace'))}. Write one JSON object a line."
      )
    if bad and not drop:
      raise _bad_line(file, bad, dropped, remedy)
    yield dataclasses.replace(file, copy=copy), dropped


def _bad_line(file: TableFile, bad: list[Record], count: int, remedy: str) -> DataError:
  more = f" ({count} such lines; the next is line {bad[1].line})" if count > 1 else ""
  text = abridged(bad[0].content.decode(errors="replace").split("\n")[0])
  return DataError(
    f"{file.path}: line {bad[0].line} {bad[0].fault}{more}: {text}. Correct the file{f', or {remedy}' * bool(remedy)}."
  )


def _json_records(con: duckdb.DuckDBPyConnection, raw: Iterator[bytes]) -> Iterator[Record]:
  """Yields the records of JSON lines in order, without blank lines; DuckDB judges each line."""
  lines = ((number, content.strip()) for number, content in _numbered(raw))
  filled = (line for line in lines if line[1])
  with contextlib.closing(con.cursor()) as judge:
    while some := list(itertools.islice(filled, LINES_AT_ONCE)):
      texts = [content.decode(errors="replace") for _, content in some]
      valid = judge.execute("SELECT json_valid(unnest(?))", [texts]).fetchall()
      for (number, content), (good,) in zip(some, valid, strict=True):
        yield Record(number, content, "" if good else "is no JSON")


def _records(raw: Iterator[bytes], file: TableFile) -> Iterator[Record]:
  """Yields the records of lines in order, without blank lines."""
  width, delimiter = len(file.places), file.delimiter.encode()
  count = _value_counter(delimiter)
  lines = _numbered(raw)
  ahead: collections.deque[Line] = collections.deque()
  while line := ahead.popleft() if ahead else next(lines, None):
    number, content = line
    if not content.strip(b" \r") and width > 1:
      continue
    if file.format != "csv" or b'"' not in content:
      content = content.removesuffix(b"\r")
      yield _checked(number, content, content.count(delimiter) + 1, width, delimiter)
      continue
    values, record = count(content.removesuffix(b"\r"))
    joined: list[Line] = []
    while values == OPEN and len(joined) < MOST_LINES and (more := ahead.popleft() if ahead else next(lines, None)):
      joined.append(more)
      content += b"\n" + more[1]
      values, record = count(content.removesuffix(b"\r"))
    if joined and not _fits(
      record, values, width, delimiter
    ):  # the lines that a quotation mark joined are records of their own
      ahead.extendleft(reversed(joined))
      record, values = line[1], OPEN
    yield _checked(number, record, values, width, delimiter)


def _checked(line: int, content: bytes, values: int, width: int, delimiter: bytes) -> Record:
  """Returns a record with its fault; `values` is the number of its values, OPEN or BROKEN."""
  if values == OPEN:
    return Record(line, content, "opens a quotation mark that is not closed")
  if values == BROKEN:
    return Record(line, content, "holds a quotation mark within a quoted value; it must be written twice")
  if not _fits(content, values, width, delimiter):
    columns = f"{width} columns" if width > 1 else "one column"
    return Record(line, content, f"holds {values} value{'s' if values > 1 else ''}, but the file has {columns}")
  if len(content) > LONGEST_RECORD:
    return Record(line, content, f"is longer than {LONGEST_RECORD:,} bytes")
  try:
    content.decode()
  except UnicodeDecodeError:
    return Record(line, content, "is not UTF-8 text (if many lines are so, convert the file)")
  return Record(line, content)


def _fits(content: bytes, values: int, width: int, delimiter: bytes) -> bool:
  """Returns whether a record has the right number of values; DuckDB passes over further delimiters at its end."""
  return values == width or (values > width and content.endswith(delimiter * (values - width)))


def _numbered(raw: Iterator[bytes]) -> Iterator[Line]:
  """Yields lines without their line feeds, with their numbers; a carriage return alone ends a line too."""
  for number, line in enumerate(raw, 1):
    content = line.removesuffix(b"\n")
    if number == 1:
      content = content.removeprefix(b"\xef\xbb\xbf")
    if b"\r" in content[:-1] and b'"' not in content:
      yield from ((number, part) for part in content.removesuffix(b"\r").split(b"\r"))
    else:
      yield number, content


def _value_counter(delimiter: bytes) -> Callable[[bytes], tuple[int, bytes]]:
  """Returns a function that counts the values of a record, and returns it without spaces around quotation marks.

  The count is OPEN if the last value is open, and BROKEN if a quotation mark is amiss.
  """
  end = re.escape(delimiter)
  plain = re.compile(rb'(?! ?")(?:(?!' + end + rb").)*+", re.DOTALL)
  quoted = re.compile(rb' ?"(?:[^"]|"")*+" *(?=' + end + rb"|\Z)")
  unclosed = re.compile(rb' ?"(?:[^"]|"")*+\Z')

  def count(content: bytes) -> tuple[int, bytes]:
    place = 0
    values: list[bytes] = []
    while value := plain.match(content, place) or quoted.match(content, place):
      values.append(value[0].strip(b" ") if value.re is quoted else value[0])
      if value.end() == len(content):
        return len(values), delimiter.join(values)
      place = value.end() + len(delimiter)
    return (OPEN if unclosed.match(content, place) else BROKEN), content

  return count
