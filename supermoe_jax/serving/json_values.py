"""Reads JSON values of raw events as preparation reads the same values in files: as text, as numbers, as times.

A column has a kind, which follows from its DuckDB type in the event files. The kind decides which JSON it takes:

    kind        JSON                                          text that categories are compared by
    text        string; whole number; true, false             as it stands; 5; true. Of JSON lines also a fraction, 2.5
    integer     whole number; a string of its digits          5
    float64     number                                        5, if whole and less than 2^53; else 2.5
    float32     number, rounded to float32                    as float64
    decimal     number; a number in a string                  without zeros at the end: 5, 2.5
    boolean     true, false                                   true
    date        ISO 8601 string                               2024-01-05
    timestamp   ISO 8601 string; without an offset it is UTC  2024-01-05 10:00:00.5, with a zone +00 behind it
    exact       string                                        as it stands: as DuckDB writes a value of that type

null, a missing key and an empty string are absent. A field of many values takes a list of such values or, if the files
hold text, text that is split at the field's separator. A numeric field takes a number, true and false if the files
hold them, and a number in a string if the column takes strings. A time is ISO 8601, text in the source's `time_format`
or, if the files hold epochs, a number in the same unit.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import json as json_lib
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from supermoe_jax.serving.text_numbers import NUMBER, SPACES, WHITESPACE, number_of_text

WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")

LARGEST_INTEGER = 2**127  # beyond DuckDB's integers
EXACT = 2**53  # below this, float64 holds every whole number

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1}
FIRST_TIME, LAST_TIME = -62_135_596_800_000_000, 253_402_300_799_999_999  # of the years 1 and 9999, microseconds

Text = Callable[[Any], str | None]
Texts = Callable[[Any], list[str] | None]
Number = Callable[[Any], float]


class ValueProblem(ValueError):
  """Error of a value that cannot be read; the message states what it should be."""


@dataclasses.dataclass(frozen=True)
class ColumnKind:
  """The kind of a column's values; the table at the top of this module lists the kinds.

  Attributes:
    name: a name in that table.
    scale: for decimal, the number of digits behind the point.
    zone: for timestamp, whether the files' times have a zone.
    json: for text, whether the files are JSON lines; then a fraction is read too, as text in the form of JSON.
    list: whether the files hold lists of such values.
    decimal, thousands, nulls: for text, the settings of `config.TextFormat`; nulls are its `null_values`.
  """

  name: str
  scale: int = 0
  zone: bool = False
  json: bool = False
  list: bool = False
  decimal: str = "."
  thousands: str = ""
  nulls: tuple[str, ...] = ()


def described(value: Any) -> str:
  """Returns a value as short ASCII text for a message, so that every answer can carry it."""
  try:
    text = ascii(value)
  except (ValueError, RecursionError):  # an integer of thousands of digits
    text = f"a value of type {type(value).__name__}"
  return text if len(text) <= 80 else text[:77] + "..."


def _wrong(value: Any, wanted: str) -> ValueProblem:
  return ValueProblem(f"{described(value)} is not {wanted}")


# --------------------------------------------------------------------------------------------------------------- text


def text_reader(kind: ColumnKind) -> Text:
  """Returns a function that reads a JSON value of such a column as text; None is absent."""
  if kind.name == "decimal":
    return lambda value: _decimal(value, kind.scale)
  if kind.name == "timestamp":
    return lambda value: _timestamp(value, kind.zone)
  if kind.name == "text":
    read = _json_text if kind.json else _text
    return (lambda value: None if value in kind.nulls else read(value)) if kind.nulls else read
  return {"integer": _integer, "float64": _float64, "float32": _float32, "boolean": _boolean, "date": _date}.get(
    kind.name, _exact
  )


def _text(value: Any) -> str | None:
  if type(value) is str:
    return value or None
  if value is None:
    return None
  if isinstance(value, bool):
    return "true" if value else "false"
  if isinstance(value, int) and abs(value) < LARGEST_INTEGER:
    return str(value)
  raise _wrong(value, "text (write a fraction or a large number as a string, as in the event files)")


def _json_text(value: Any) -> str | None:
  return repr(value) if isinstance(value, float) and math.isfinite(value) else _text(value)


def _integer(value: Any) -> str | None:
  if type(value) is int and -EXACT < value < EXACT:
    return str(value)
  if value is None or value == "":
    return None
  if isinstance(value, str) and WHOLE.fullmatch(value) and value != "-0":
    return value
  if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
    return str(int(value))
  if isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST_INTEGER:
    return str(value)
  raise _wrong(value, "a whole number, or a string of its digits")


def _finite(value: Any) -> bool:
  return isinstance(value, int | float) and (isinstance(value, int) or math.isfinite(value))


def _float64(value: Any) -> str | None:
  number = _as_float(value)
  return None if number is None else _float_text(number, repr)


def _float32(value: Any) -> str | None:
  number = _as_float(value)
  return None if number is None else _float_text(_rounded32(number), lambda x: str(np.float32(x)))


def _float_text(number: float, written: Callable[[float], str]) -> str:
  whole = number == math.trunc(number) and abs(number) < EXACT
  return str(int(number)) if whole else written(number)


def _rounded32(number: float) -> float:
  with np.errstate(over="ignore"):
    rounded = float(np.float32(number))
  if not math.isfinite(rounded):
    raise _wrong(number, "a number of float32")
  return rounded


def _as_float(value: Any) -> float | None:
  """Returns a JSON number; None if it is absent or NaN, by which a table marks an absent number."""
  if value is None:
    return None
  if isinstance(value, int | float) and not isinstance(value, bool):
    try:
      number = float(value)
    except OverflowError:
      raise _wrong(value, "a finite number") from None
    if math.isnan(number):
      return None
    if math.isfinite(number):
      return number
    raise _wrong(value, "a finite number")
  raise _wrong(value, "a number")


def _decimal(value: Any, scale: int) -> str | None:
  if value is None or value == "":
    return None
  if (_finite(value) and not isinstance(value, bool)) or (isinstance(value, str) and NUMBER.fullmatch(value)):
    try:
      with decimal.localcontext(prec=60) as context:
        context.rounding = decimal.ROUND_HALF_UP
        number = decimal.Decimal(repr(value) if isinstance(value, float) else value)
        text = f"{number.quantize(decimal.Decimal(1).scaleb(-scale)) + 0:f}"
        return text.rstrip("0").rstrip(".") if scale else text
    except (decimal.InvalidOperation, ValueError):
      pass
  raise _wrong(value, f"a number with at most {scale} digits behind the point")


def _boolean(value: Any) -> str | None:
  if value is None:
    return None
  if isinstance(value, bool):
    return "true" if value else "false"
  raise _wrong(value, "true or false")


def _date(value: Any) -> str | None:
  if value is None or value == "":
    return None
  if isinstance(value, str):
    try:
      return datetime.date.fromisoformat(value).isoformat()
    except ValueError:
      pass
  raise _wrong(value, "a date such as 2017-10-01")


def _timestamp(value: Any, zone: bool) -> str | None:
  if value is None or value == "":
    return None
  moment = EPOCH + datetime.timedelta(microseconds=_iso(value))
  fraction = f".{moment.microsecond:06}".rstrip("0") if moment.microsecond else ""
  return f"{moment:%Y-%m-%d %H:%M:%S}{fraction}{'+00' if zone else ''}"


def _exact(value: Any) -> str | None:
  if value is None or isinstance(value, str):
    return value or None
  raise _wrong(value, "a string, as the event files' values are written out")


def texts_reader(kind: ColumnKind, separator: str) -> Texts:
  """Returns a function that reads a JSON value as the values of a field of many: without absent ones, None if empty."""
  one = text_reader(dataclasses.replace(kind, list=False, nulls=()))

  def read(value: Any) -> list[str] | None:
    if isinstance(value, str) and value in kind.nulls:
      return None
    if isinstance(value, str) and kind.json and (array := json_array(value)) is not None:
      value = array
    if isinstance(value, list | tuple):
      if any(isinstance(v, list | tuple | dict) for v in value):
        raise _wrong(value, "a list of plain values")
      parts = [text for v in value if (text := one(v)) is not None]
    elif kind.list and value is not None:
      raise _wrong(value, "a list")
    else:
      text = one(value)
      parts = text.split(separator) if text else []
    return [kept for part in parts if (kept := part.strip(SPACES))] or None

  return read


def json_array(text: str) -> list[Any] | None:
  """Returns the array that a text holds as JSON; None if it holds none."""
  if not text.lstrip(WHITESPACE).startswith("["):
    return None
  try:
    found = json_lib.loads(text)
  except (ValueError, RecursionError):
    return None
  return found if isinstance(found, list) else None


# ------------------------------------------------------------------------------------------------------------ numbers


def number_reader(kind: ColumnKind, log1p: bool) -> Number:
  """Returns a function that reads a JSON value of a numeric field for its encoder, with log1p if set; NaN is absent."""
  read = {
    **dict.fromkeys(("text", "integer", "decimal"), lambda value: _number_in_text(value, kind)),
    "boolean": _number_of_boolean,
    "float32": _number_of_float32,
  }.get(kind.name, _as_float)

  def number(value: Any) -> float:
    if type(value) is float and -math.inf < value < math.inf and kind.name != "float32":
      found: float | None = value
    else:
      found = read(value)
    if found is None:
      return math.nan
    return math.copysign(math.log(1 + abs(found)), found) if log1p else found

  return number


def _number_in_text(value: Any, kind: ColumnKind) -> float | None:
  if not isinstance(value, str):
    return _as_float(value)
  if value in kind.nulls:
    return None
  try:
    return number_of_text(value, kind.decimal, kind.thousands)
  except ValueError:
    raise _wrong(value, "a number") from None


def _number_of_boolean(value: Any) -> float | None:
  return float(value) if isinstance(value, bool) else _as_float(value)


def _number_of_float32(value: Any) -> float | None:
  number = _as_float(value)
  return None if number is None else _rounded32(number)


# -------------------------------------------------------------------------------------------------------------- times


@dataclasses.dataclass(frozen=True)
class TimeKind:
  """The way in which the times of a source are written.

  Attributes:
    name: iso, format or epoch.
    format: for format, the strptime format.
    unit: for epoch, s, ms, us or ns.
  """

  name: str
  format: str = ""
  unit: str = "s"

  @property
  def wanted(self) -> str:
    """Returns a description of the times that can be read."""
    if self.name == "epoch":
      return f"a number of {self.unit} since 1970, or ISO 8601 text such as 2017-10-01T12:00:00"
    other = f"text in the format {self.format}, or " if self.name == "format" else ""
    return f"a time: {other}ISO 8601 text such as 2017-10-01T12:00:00, which is UTC without an offset"

  def read(self, value: Any) -> int:
    """Returns a JSON value as microseconds since 1970 UTC.

    Raises:
      ValueProblem: the value is not a time, or lies before the year 1 or after 9999.
    """
    if self.name == "epoch" and (number := _epoch(value)) is not None:
      moment = self._counted(number, value)
    elif not isinstance(value, str):
      raise _wrong(value, self.wanted)
    elif (written := self._formatted(value)) is not None:
      moment = written
    else:
      try:
        moment = _iso(value)
      except ValueProblem:
        raise _wrong(value, self.wanted) from None
    if not FIRST_TIME <= moment <= LAST_TIME:
      raise ValueProblem(f"{described(value)} is a time before the year 1 or after the year 9999")
    return moment

  def _counted(self, number: int | float, value: Any) -> int:
    # Nanoseconds become microseconds as in DuckDB: by a division of floating-point numbers.
    scaled = float(number) / 1000 if self.unit == "ns" else number * UNITS[self.unit]
    if isinstance(scaled, float):
      if not math.isfinite(scaled):
        raise _wrong(value, self.wanted)
      scaled = int(math.copysign(math.floor(abs(scaled) + 0.5), scaled))  # halves away from 0, as DuckDB rounds
    return scaled

  def _formatted(self, value: str) -> int | None:
    if self.name != "format":
      return None
    try:
      moment = datetime.datetime.strptime(value, self.format)
      return _microseconds(moment)
    except (ValueError, OverflowError):
      return None


def _epoch(value: Any) -> int | float | None:
  if isinstance(value, str):
    stripped = value.strip(SPACES)
    if WHOLE.fullmatch(stripped) and len(stripped) < 30:
      return int(stripped)
    return float(stripped) if NUMBER.fullmatch(stripped) else None
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  return value


def _iso(value: Any) -> int:
  """Returns ISO 8601 text as microseconds since 1970 UTC."""
  if isinstance(value, str):
    try:
      return _microseconds(datetime.datetime.fromisoformat(value))
    except (ValueError, OverflowError):
      pass
  raise _wrong(value, "a time such as 2017-10-01T12:00:00")


def _microseconds(moment: datetime.datetime) -> int:
  since = moment - (EPOCH if moment.tzinfo else EPOCH.replace(tzinfo=None))
  return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


# The form of the `as_of` of a request.
AS_OF = TimeKind("iso")
