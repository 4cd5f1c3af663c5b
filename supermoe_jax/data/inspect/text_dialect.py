"""Opens files for inspection, and guesses the settings with which their text is read: `config.TextFormat`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import duckdb

from supermoe_jax.config import TextFormat
from supermoe_jax.data.reading import readers
from supermoe_jax.data.reading.readers import TableFile, literal
from supermoe_jax.data.reading.remote import FilePath
from supermoe_jax.data.reading.text_files.null_words import NULL_WORDS
from supermoe_jax.data.reading.text_files.text_layout import EPOCH, DataInHeaderError, kind_of_text

SAMPLE_ROWS = 1000  # that decide how numbers are written

_WHOLE = re.compile(r"[+-]?\d+")
_POINT = re.compile(r"[+-]?\d*\.\d*")
_COMMA = re.compile(r"[+-]?\d+,\d+")  # 12,5
_GROUPED_COMMA = re.compile(r"[+-]?\d{1,3}(?:([.' \u00a0\u202f])\d{3})+(?:,\d+)?")  # 1.028,50
_GROUPED_POINT = re.compile(r"[+-]?\d{1,3}(?:([,' \u00a0\u202f])\d{3})+(?:\.\d+)?")  # 1,028.50


def open_guessed(con: duckdb.DuckDBPyConnection, path: FilePath, format: str, text: TextFormat) -> TableFile:
  """Opens a file; a first line of data makes it a file without header, whose columns are named by their kind of value.

  Raises:
    DataError: as `readers.open_table`; or the first line holds data in spite of the columns that `text` names.
  """
  try:
    return readers.open_table(con, path, format, (), text)
  except DataInHeaderError as error:
    names = text.columns or tuple(f"{_kind_name(value)}_{i}" for i, value in enumerate(error.first, 1))
    return readers.open_table(con, path, format, (), dataclasses.replace(text, header=False, columns=names))


def _kind_name(value: str) -> str:
  """Returns a name for a column with this value, which tells `column_roles` apart times, ids and quantities."""
  kind = kind_of_text(value)
  if kind in ("date", "moment") or EPOCH.fullmatch(value.strip()):
    return "time"
  return {"number": "id" if _WHOLE.fullmatch(value.strip()) else "number", "text": "text"}.get(kind, "column")


def with_guessed_dialect(con: duckdb.DuckDBPyConnection, files: Sequence[TableFile]) -> list[TableFile]:
  """Returns files of the same columns with the decimal point, the groups and the null words that their values show.

  Settings that are set already stay as they are.
  """
  text = files[0].text
  columns = [name for name, kind in files[0].columns.items() if kind == "VARCHAR"]
  aliases = {f"c{i}": name for i, name in enumerate(columns)}
  if not columns or files[0].format == "sequences":
    return list(files)
  if (text.decimal, text.thousands) == (".", ""):
    with readers.naming(files[0].path, files[0].format):
      rows = con.execute(f"SELECT * EXCLUDE (row) FROM ({files[0].select(aliases)}) LIMIT {SAMPLE_ROWS}").fetchall()
    for values in zip(*rows, strict=True):
      decimal, thousands = _number_dialect([v.strip() for v in values if v and v not in NULL_WORDS], files[0].delimiter)
      if (decimal, thousands) != (".", ""):
        text = dataclasses.replace(text, decimal=decimal, thousands=thousands)
        break
  if not text.null_values:
    words = ", ".join(map(literal, sorted(NULL_WORDS)))
    found: set[str] = set()
    asked = ", ".join(f"list(DISTINCT {a}) FILTER ({a} IN ({words}))" for a in aliases)
    for file in files:
      with readers.naming(file.path, file.format):
        (lists,) = con.execute(f"SELECT {asked} FROM ({file.select(aliases)})").fetchall()
      found |= {word for there in lists for word in there or ()}
    text = dataclasses.replace(text, null_values=tuple(sorted(found)))
  return [
    dataclasses.replace(
      file,
      text=dataclasses.replace(file.text, decimal=text.decimal, thousands=text.thousands, null_values=text.null_values),
    )
    for file in files
  ]


def _number_dialect(values: Sequence[str], delimiter: str) -> tuple[Literal[".", ","], str]:
  """Returns the decimal point and the group sign that the values of a column show; "." and "" unless all are numbers.

  A comma before three digits may be either. It is a decimal point where the delimiter had to make room for it.
  """
  others = [v for v in values if not _WHOLE.fullmatch(v)]
  if not others or all(_POINT.fullmatch(v) for v in others):
    return ".", ""
  with_point, with_comma = _groups(others, _POINT, _GROUPED_POINT), _groups(others, _COMMA, _GROUPED_COMMA)
  comma = with_comma is not None and len(with_comma) <= 1 and any("," in v for v in others)
  if with_point is not None and len(with_point) == 1 and not (comma and delimiter == ";"):
    return ".", with_point.pop()
  return (",", "".join(with_comma or ())) if comma else (".", "")


def _groups(values: Sequence[str], plain: re.Pattern[str], grouped: re.Pattern[str]) -> set[str] | None:
  """Returns the signs that group digits in values of two patterns; None if a value matches neither."""
  matches = [grouped.fullmatch(v) for v in values if not plain.fullmatch(v)]
  return None if None in matches else {m[1] for m in matches if m}


def text_settings(text: TextFormat) -> dict[str, object]:
  """Returns the settings that differ from their defaults, as they are written in a config file."""
  fields = dataclasses.fields(TextFormat)
  found = {f.name: getattr(text, f.name) for f in fields if getattr(text, f.name) != f.default}
  return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
