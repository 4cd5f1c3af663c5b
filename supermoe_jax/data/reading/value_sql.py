"""Writes the SQL that reads the values of a column as text, lists, numbers or times."""

from __future__ import annotations

import dataclasses
import math
import re

import duckdb

from supermoe_jax.config import TextFormat, format_time, parse_time
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.data.reading.readers import TableFile, first_line, literal, naming
from supermoe_jax.errors import DataError

NUMBERS: tuple[str, ...] = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL")
NUMBERS += tuple("U" + name for name in NUMBERS[:5])
INSTANTS = ("TIMESTAMP", "DATE")  # and TIMESTAMP_S, TIMESTAMP WITH TIME ZONE, …

MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 0.001}
PLAUSIBLE = (parse_time("1980-01-01", ""), parse_time("2100-01-01", ""))
SPACES = " \u00a0\u202f"  # that group digits: the setting " " stands for each of them
SAMPLE_ROWS = 1000  # text values that decide whether a time column holds epochs or dates


def is_number(kind: str) -> bool:
  """Returns whether a DuckDB type is numeric."""
  return kind.startswith(NUMBERS) and not kind.endswith("]")


def is_finite(value: str, text: TextFormat = PLAIN_TEXT) -> bool:
  """Returns whether a text is a finite number, as `text` says that numbers are written."""
  with duckdb.connect() as con:
    ((number,),) = con.execute(f"SELECT {number_sql('v', 'VARCHAR', text)} FROM (SELECT ? AS v)", [value]).fetchall()
  return number is not None and math.isfinite(number)


def is_instant(kind: str) -> bool:
  """Returns whether a DuckDB type is a point in time."""
  return kind.startswith(INSTANTS) and not kind.endswith("]")


def text_sql(column: str, kind: str) -> str:
  """Returns the SQL of a value as text, the form in which ids and categories are compared; empty text and NaN are NULL.

  Whole numbers in a floating-point column are written as integers, since integers with gaps are often stored so.
  Decimals are written without zeros at the end: 7.0000000000 is 7, and 7.5000000000 is 7.5.
  """
  if re.fullmatch(r"DECIMAL\(\d+,[1-9]\d*\)", kind):
    return f"rtrim(rtrim({column}::VARCHAR, '0'), '.')"
  if kind in ("FLOAT", "DOUBLE"):
    whole = f"{column} = trunc({column}) AND abs({column}) < {2**53}"
    integer = f"TRY_CAST({column} AS BIGINT)::VARCHAR"
    return f"CASE WHEN isnan({column}) THEN NULL WHEN {whole} THEN {integer} ELSE {column}::VARCHAR END"
  return f"nullif({column}::VARCHAR, '')"


def inexact_sql(column: str, kind: str) -> str:
  """Returns the SQL of whether a float may stand for several whole numbers of up to 128 bits; empty for other types."""
  least = {"FLOAT": 2**24, "DOUBLE": 2**53}.get(kind)
  return f"abs({column}) >= {least} AND abs({column}) < {2.0**128:.0f}::DOUBLE" if least else ""


def list_sql(column: str, kind: str, separator: str, *, json: bool) -> str:
  """Returns the SQL of a value as a list of texts, without absent ones; NULL if none is left.

  Args:
    column: the SQL of the value.
    kind: the value's DuckDB type; a list gives its elements, any other type is split as text.
    separator: the separator of values within a text.
    json: whether a text may be a JSON array.
  """
  text = text_sql(column, kind)
  parts = f"string_split({text}, {literal(separator)})"
  if kind.endswith("]"):
    element = kind[: kind.rindex("[")]  # the value may be an array of fixed length, which the cast makes a list
    parts = f"list_transform({column}::{element}[], lambda x: {text_sql('x', element)})"
  elif json:
    array = f"json_valid({text}) AND json_type({text}) = 'ARRAY'"
    parts = f"CASE WHEN {array} THEN from_json({text}, '[\"VARCHAR\"]') ELSE {parts} END"
  kept = f"list_filter(list_transform({parts}, lambda x: nullif(trim(x), '')), lambda x: x IS NOT NULL)"
  return f"CASE WHEN len({kept}) > 0 THEN {kept} END"


def number_sql(column: str, kind: str, text: TextFormat = PLAIN_TEXT) -> str:
  """Returns the SQL of a value as DOUBLE; NULL if it is no number. `text` says how numbers are written as text.

  Raises:
    TypeError: values of this type are never numbers.
  """
  if kind == "VARCHAR":
    return f"TRY_CAST({plain_number_sql(f'trim({column})', text)} AS DOUBLE)"
  if is_number(kind) or kind == "BOOLEAN":
    return f"{column}::DOUBLE"
  raise TypeError(kind)


def plain_number_sql(value: str, text: TextFormat) -> str:
  """Returns the SQL of a number's text with a decimal point and ungrouped digits; other texts become no number."""
  if text.thousands:
    group = f"[{SPACES}]" if text.thousands in SPACES else re.escape(text.thousands)
    point = re.escape(text.decimal)
    grouped = literal(rf"[+-]?\d{{1,3}}({group}\d{{3}})+({point}\d*)?([eE][+-]?\d+)?")
    joined = f"regexp_replace({value}, {literal(group)}, '', 'g')"
    value = f"CASE WHEN regexp_full_match({value}, {grouped}) THEN {joined} ELSE {value} END"
  return f"translate({value}, '.,', 'x.')" if text.decimal == "," else value


def instant_sql(column: str, kind: str) -> str:
  """Returns the SQL of a column of a temporal type as microseconds since 1970 UTC; a type without a zone is UTC."""
  zoned = "TIME ZONE" in kind or "TZ" in kind
  return f"epoch_us({column}::{'TIMESTAMPTZ' if zoned else 'TIMESTAMP'})"


def iso_sql(column: str) -> str:
  """Returns the SQL of ISO 8601 text as microseconds since 1970 UTC; text without an offset is UTC."""
  return f"epoch_us(TRY_CAST({column} AS TIMESTAMPTZ))"


def formatted_sql(column: str, kind: str, format: str) -> str:
  """Returns the SQL of text, or whole numbers, in a strptime format as microseconds since 1970 UTC."""
  return f"epoch_us(try_strptime({text_sql(column, kind)}, {literal(format)}))"


def epoch_sql(column: str, kind: str, unit: str, text: TextFormat = PLAIN_TEXT) -> str:
  """Returns the SQL of epochs in s, ms, us or ns as microseconds since 1970 UTC; `text` as in `number_sql`."""
  scaled = "/ 1000" if unit == "ns" else f"* {MICROSECONDS[unit]}"
  return f"TRY_CAST(round({number_sql(column, kind, text)} {scaled}) AS BIGINT)"


@dataclasses.dataclass(frozen=True)
class TimeReading:
  """The way to read the times of a column.

  Attributes:
    sql: the SQL of microseconds since 1970 UTC, NULL where a value is no time.
    guessed: whether the values are epochs whose unit was assumed to be seconds.
  """

  sql: str
  guessed: bool = False


def time_reading(
  con: duckdb.DuckDBPyConnection,
  file: TableFile,
  name: str,
  column: str,
  key: str,
  *,
  unit: str = "auto",
  format: str = "",
) -> TimeReading:
  """Decides how to read the times of a file's column `name`, which the SQL `column` refers to.

  Raises:
    DataError: the column is of a type that is no time, or `format` is no strptime format; `key` is the source's place
      in the config.
  """
  kind = file.columns[name]
  if is_instant(kind):
    return TimeReading(instant_sql(column, kind))
  if kind != "VARCHAR" and not is_number(kind):
    raise DataError(f"{file.path}: column {name!r} is of type {kind}, which is not a time; name another column.")
  if format:
    try:
      con.execute(f"SELECT try_strptime('', {literal(format)})")
    except duckdb.Error as error:
      raise DataError(f"{key}.time_format={format!r} is not a strptime format: {first_line(error)}") from None
    return TimeReading(formatted_sql(column, kind, format))
  if kind == "VARCHAR" and not _mostly_numbers(con, file, name):
    return TimeReading(iso_sql(column))
  return TimeReading(epoch_sql(column, kind, "s" if unit == "auto" else unit, file.text), guessed=unit == "auto")


def _mostly_numbers(con: duckdb.DuckDBPyConnection, file: TableFile, name: str) -> bool:
  """Returns whether most of the first values of a text column are numbers; its other values are then faults."""
  values = f"SELECT t FROM ({file.select({'t': name})}) WHERE t IS NOT NULL LIMIT {SAMPLE_ROWS}"
  with naming(file.path, file.format):
    number = number_sql("t", "VARCHAR", file.text)
    ((share,),) = con.execute(f"SELECT avg(({number} IS NOT NULL)::INT) FROM ({values})").fetchall()
  return share is not None and share > 0.5


def plausible_units(low: float, high: float) -> list[str]:
  """Returns the units in which epochs from `low` to `high` all lie between 1980 and 2100."""
  return [u for u, scale in MICROSECONDS.items() if PLAUSIBLE[0] <= low * scale and high * scale < PLAUSIBLE[1]]


def check_guessed_seconds(low: float, high: float, place: str, key: str) -> None:
  """Checks that epochs from `low` to `high`, read as seconds because no unit is set, lie between 1980 and 2100.

  Raises:
    DataError: the epochs lie outside; the message names `place`, the column, and `key`, the source in the config.
  """
  if "s" in plausible_units(low, high):
    return
  value = low if low * MICROSECONDS["s"] < PLAUSIBLE[0] else high
  shown = f"{value:.0f}" if value == round(value) else f"{value:g}"
  remedy = f"Set {key}.time_unit to 's', 'ms', 'us' or 'ns'"
  if units := plausible_units(low, high):
    remedy = f"Set {key}.time_unit={units[0]!r}, which makes it {_meaning(value, units[0])}"
  elif _is_compact_date(value):
    remedy = f"Set {key}.time_format='%Y%m%d' if it is a date"
  raise DataError(
    f"{place} holds {shown}; read as seconds since 1970 it would mean {_meaning(value, 's')}, which is before 1980 or "
    f"after 2100. {remedy}. A unit that is set explicitly is not checked."
  )


def _is_compact_date(value: float) -> bool:
  return 19_000_101 <= value < 21_000_101


def _meaning(value: float, unit: str) -> str:
  microseconds = int(value * MICROSECONDS[unit])
  return format_time(microseconds) if abs(microseconds) < 2**63 else "a time beyond the year 290,000"
