"""Finds the delimiter, the header and the columns of a CSV or RecBole file from its settings and its first lines."""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from supermoe_jax.config import TextFormat
from supermoe_jax.config.text_settings import setting_text
from supermoe_jax.data.reading.remote import FilePath
from supermoe_jax.data.reading.text_files.text_lines import unpacked_name
from supermoe_jax.errors import DataError

FIRST_LINES = 20  # lines that decide on the layout
DELIMITERS = ",\t;|"  # tried in this order of preference on the first line
SHOWN = 80  # characters of a line in a message

NUMBER = re.compile(r"[+-]?(\d+([.,' \u00a0\u202f]\d+)*[.,]?|[.,]\d+)([eE][+-]?\d+)?")
DATE = re.compile(r"\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./](\d{4}|\d{2})")
MOMENT = re.compile(rf"({DATE.pattern})[T ]\d{{1,2}}[:.]\d\d.*")
EPOCH = re.compile(r"(9[5-9]\d|1\d\d\d|20\d\d)\d{6}(\d{3}){0,3}(\.\d+)?")  # of the years 2000 to 2036, in s to ns


class TextLayout(NamedTuple):
  """The layout of a CSV or RecBole file.

  Attributes:
    names: the names of its columns.
    delimiter: what separates the values of a line.
    header: whether the first line names the columns.
    lists: the columns of a RecBole file whose header says that they hold lists, as `token_seq` does.
  """

  names: tuple[str, ...]
  delimiter: str
  header: bool
  lists: tuple[str, ...] = ()


class DataInHeaderError(DataError):
  """Error raised for a first line that holds data where the names of columns are expected.

  Attributes:
    first: the values of the first line.
  """

  def __init__(self, message: str, first: Sequence[str]):
    super().__init__(message)
    self.first = tuple(first)


def text_layout(
  path: FilePath, format: str, lines: Sequence[str], text: TextFormat, wanted: Collection[str], key: str
) -> TextLayout:
  """Returns the layout of a file whose first lines are `lines`, at least one.

  Args:
    path: the file.
    format: "csv" or "atomic".
    lines: the first lines, without line ends.
    text: the settings of the table.
    wanted: columns that the config names: a first line with one of them is a header.
    key: the place of the settings, as `setting_text` takes it.

  Raises:
    DataInHeaderError: the first line holds data, and no setting says what it is.
    DataError: the first line is empty, names a column twice, or holds another number of values than `text.columns`.
  """
  tabs = format == "atomic" or unpacked_name(path.name).endswith(".tsv")
  delimiter = text.delimiter or ("\t" if tabs and "\t" in lines[0] else guess_delimiter(lines[0]))
  rows = split_lines(lines, delimiter, quoted=format == "csv")
  first = rows[0] if rows else []
  names = [name.rpartition(":")[0] or name for name in first] if format == "atomic" else first
  if not any(names) and text.header is not False:
    raise DataError(f"{path} begins with an empty line; the first line has to name the columns.")
  if text.header == "auto" and not {*names} & {*wanted} and holds_data(names, rows[1:]):
    columns = "" if text.columns else f" and {setting_text(key, 'columns', ...)} with the names of its columns"
    raise DataInHeaderError(
      f"{path}: the first line holds data, it seems, and not the names of columns: {abridged(lines[0])}. Set "
      f"{setting_text(key, 'header', False)}{columns}; or, where these are names, {setting_text(key, 'header', True)}.",
      names,
    )
  if text.columns and len(text.columns) != len(first):
    raise DataError(
      f"{path}: the first line holds {len(first)} values, but {setting_text(key, 'columns', text.columns)} names "
      f"{len(text.columns)} columns; name them all, or correct {setting_text(key, 'delimiter', delimiter)}."
    )
  names = list(text.columns) or names
  for name in names:
    if names.count(name) > 1:
      raise DataError(
        f"{path} names the column {name!r} twice; rename one of them, or set {setting_text(key, 'columns', ...)} with "
        "the names of its columns."
      )
  typed = first if format == "atomic" and text.header is not False else ()
  lists = tuple(name for name, whole in zip(names, typed, strict=False) if ":" in whole and whole.endswith("_seq"))
  return TextLayout(tuple(names), delimiter, text.header is not False, lists)


def guess_delimiter(line: str) -> str:
  """Returns the delimiter that a line holds most often; a comma between digits may be a decimal point."""
  counts = {d: line.count(d) for d in DELIMITERS}
  if any(n for d, n in counts.items() if d != ","):
    counts[","] -= len(re.findall(r"(?<=\d),(?=\d)", line))
  return max(DELIMITERS, key=lambda d: counts[d])


def split_lines(lines: Sequence[str], delimiter: str, *, quoted: bool) -> list[list[str]]:
  """Returns the values of lines; with `quoted`, a quoted value may hold delimiters and line ends."""
  if not quoted or len(delimiter) > 1:
    return [line.split(delimiter) for line in lines]
  rows: list[list[str]] = []
  with contextlib.suppress(csv.Error):  # a value beyond the csv module's limit; the rows before it suffice
    rows.extend(csv.reader((line + "\n" for line in lines), delimiter=delimiter))
  return rows


def abridged(line: str) -> str:
  """Returns the beginning of a line, for a message."""
  line = line.replace("\t", " ⇥ ")
  return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def kind_of_text(value: str) -> str:
  """Returns "moment" for a date with a time of day, "date", "number", "text", or the empty text for no value."""
  value = value.strip()
  if not value:
    return ""
  return next((k for k, p in (("moment", MOMENT), ("date", DATE), ("number", NUMBER)) if p.fullmatch(value)), "text")


def holds_data(first: Sequence[str], rest: Sequence[Sequence[str]]) -> bool:
  """Returns whether a first line certainly holds data: numbers and times only, or a date with a time of day.

  The values must also be of the same kinds as the values below them. The numbers 0, 1, 2, … are the names that pandas
  gives to columns.
  """
  kinds = [kind_of_text(value) for value in first]
  if len(first) > 2 and list(first) == [str(i) for i in range(len(first))]:
    return False
  below = [[kind_of_text(value) for value in row] for row in rest if any(row)]
  alike = all(len(row) != len(kinds) or all(a == b or not (a and b) for a, b in zip(kinds, row)) for row in below)
  return alike and ("moment" in kinds or (any(kinds) and "text" not in kinds))


def header_hint(names: Sequence[str]) -> str:
  """Returns a remark for a message that misses a column, if the names look like data; else the empty text."""
  values = [name for name in names if kind_of_text(name) in ("number", "date", "moment")]
  if not values:
    return ""
  return f" (the first line holds {values[0]!r}: if it is data, set header=False and columns=(…))"


def is_table(lines: Sequence[str], wanted: Collection[str]) -> str:
  """Returns the delimiter if lines of text are rather a table than sequences of items; else the empty text.

  A table has equally many delimiters in each line, and a header with a wanted column, a header over a column of
  numbers or times, or a column of times.
  """
  lines = [line for line in lines if line.strip()]
  for delimiter in DELIMITERS:
    counts = {line.count(delimiter) for line in lines}
    if len(lines) < 2 or len(counts) > 1 or counts == {0}:
      continue
    first, *rest = split_lines(lines, delimiter, quoted=False)
    if {value.strip() for value in first} & {*wanted}:
      return delimiter
    for name, *column in zip(first, *rest, strict=True):
      plain = kind_of_text(name) == "text"
      if plain and all(kind_of_text(value) in ("number", "date", "moment") for value in column):
        return delimiter
      if all(kind_of_text(value) == "moment" or EPOCH.fullmatch(value.strip()) for value in [name, *column]):
        return delimiter
  return ""
