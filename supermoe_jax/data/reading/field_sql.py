"""Writes the SQL that reads the values of fields from files, and finds the faults of unusable rows."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import duckdb

from supermoe_jax import config
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.data.encoding.numeric import LARGEST
from supermoe_jax.data.reading import derived_columns, readers, value_sql, vector_sql
from supermoe_jax.data.reading.readers import TableFile
from supermoe_jax.data.reading.text_files.null_words import NULL_WORDS
from supermoe_jax.errors import DataError

logger = logging.getLogger(__name__)

A_NUMBER = "a number"  # the kind of value that a numeric field expects
DROP_REMEDY = "set config.data.on_bad_rows='drop' to leave such rows out and count them"


@dataclasses.dataclass(frozen=True)
class Fault:
  """A reason why a row cannot be used.

  Attributes:
    reason: the name of the fault in the counts.
    column: the column of the file with the bad value.
    condition: SQL that is true for a row with the fault.
    value: SQL of the bad value as text; empty if the fault is an absent value.
    kind: the kind of value that was expected, such as "a number".
    larger: the setting that takes larger numbers, if the fault includes a number that is too large.
    text: how the number is written.
  """

  reason: str
  column: str
  condition: str
  value: str = ""
  kind: str = ""
  larger: str = ""
  text: config.TextFormat = PLAIN_TEXT

  def describe(self, value: str | None) -> str:
    """Returns a description of the fault of a row with this bad value."""
    if not self.kind:
      return f"column {self.column!r} is empty"
    if self.larger and value is not None and value_sql.is_finite(value, self.text):
      return (
        f"column {self.column!r} holds {value}, beyond the numbers that can be standardised, up to {LARGEST:.2g} "
        f"({self.larger} takes it)"
      )
    return f"column {self.column!r} holds {value!r}, which is not {self.kind}"


def time_faults(column: str, kind: str) -> list[Fault]:
  """Returns the faults of a column of times: no value, or one that is no time.

  The rows have the columns `time` and `raw_time`, the value as the file holds it, of the DuckDB type `kind`.
  """
  # Writing times as text takes long, so only the unreadable ones are written.
  text = value_sql.text_sql("raw_time", kind)
  return [
    Fault("null_time", column, f"time IS NULL AND {text} IS NULL"),
    Fault("unparsable_time", column, "time IS NULL", text, "a time"),
  ]


def fault_sql(faults: Sequence[Fault]) -> str:
  """Returns the SQL of two columns: `fault`, the number from 1 of a row's first fault or 0, and `bad_value`."""
  which = " ".join(f"WHEN {f.condition} THEN {i}" for i, f in enumerate(faults, 1))
  value = " ".join(f"WHEN {i} THEN {f.value}" for i, f in enumerate(faults, 1) if f.value)
  return f"CASE {which} ELSE 0 END AS fault, " + (f"CASE fault {value} END" if value else "NULL") + " AS bad_value"


def bad_row(
  file: TableFile, faults: Sequence[Fault], bad: Sequence[tuple[int, int, int, str | None]], remedy: str = ""
) -> DataError:
  """Returns an error that names the first of the `bad` rows: (fault, count, number of the first row from 0, value).

  `remedy` is a sentence on how to read the values; empty if nothing but the file can be corrected.
  """
  fault, n, row, value = bad[0]
  others = sum(count for _, count, *_ in bad) - n
  more = f", and {others} with other faults" if others else ""
  return DataError(
    f"{file.path}: row {row + 1}: {faults[fault - 1].describe(value)} ({n} such row{'s' if n > 1 else ''}{more}). "
    + (remedy or f"Correct the file, {_text_remedy(faults[fault - 1], value, file.text)}or {DROP_REMEDY}.")
  )


def _text_remedy(fault: Fault, value: str | None, text: config.TextFormat) -> str:
  """Returns the settings that read a bad value, as part of a sentence; empty if there are none."""
  if value in NULL_WORDS:
    return f"set null_values={(*text.null_values, value)!r} of its table where this means no value, "
  if fault.kind != A_NUMBER or value is None or text.decimal == "," or text.thousands:
    return ""
  if found := re.fullmatch(r"[+-]?\d{1,3}(?:([ .'\u00a0\u202f])\d{3})*,\d+", value.strip()):
    grouped = f" and thousands={found[1]!r}" if found[1] else ""
    return f"set decimal=','{grouped} of its table where the comma is the decimal point, "
  if found := re.fullmatch(r"[+-]?\d{1,3}(?:([ ,'\u00a0\u202f])\d{3})+(?:\.\d*)?", value.strip()):
    return f"set thousands={found[1]!r} of its table where this groups digits, "
  return ""


def aliased(values: Mapping[str, str]) -> str:
  """Returns the SQL of a list of columns, each given as alias → SQL."""
  return ", ".join(f"{value} AS {readers.identifier(alias)}" for alias, value in values.items())


def field_columns(data: config.Data) -> dict[str, str]:
  """Returns the column of each field in the tables that values are read into."""
  return {name: f"f{i}" for i, name in enumerate(data.fields)}


def stored_type(field: config.Field) -> str:
  """Returns the DuckDB type of a field's column."""
  if field.kind == "numeric":
    return "DOUBLE"
  return "VARCHAR[]" if field.many else "VARCHAR"


def carried(data: config.Data, source: str, table: Literal["events", "users"] = "events") -> dict[str, str]:
  """Returns the fields of a table that a source's events carry, with the name of each field's column."""
  return {
    n: f.column or n for n, f in data.fields.items() if f.table == table and (not f.sources or source in f.sources)
  }


def check_ids(con: duckdb.DuckDBPyConnection, file: TableFile, column: str, key: str) -> None:
  """Checks that the values of a column can be ids; `key` is the column's place in the config.

  Raises:
    DataError: the column holds lists, objects or bytes, or a float that may stand for several ids.
  """
  check_plain(file, column, key)
  if not (inexact := value_sql.inexact_sql("v", kind := file.columns[column])):
    return
  query = f"SELECT row, v FROM ({file.select({'v': column})}) WHERE {inexact} ORDER BY row LIMIT 1"
  with readers.naming(file.path, file.format):
    for row, value in con.execute(query).fetchall():
      raise DataError(
        f"{file.path}: row {row + 1}: column {column!r} ({key}) holds {value:.17g} as {kind}, a type that is exact "
        f"only for whole numbers below {2**24 if kind == 'FLOAT' else 2**53:,}: different ids may have become one. "
        "Write the column as integers or as text."
      )


def check_categories(
  con: duckdb.DuckDBPyConnection, data: config.Data, file: TableFile, fields: Mapping[str, str]
) -> None:
  """Checks the columns of DOUBLE among those of categorical fields (name → column), which may be ids of items.

  Raises:
    DataError: see `check_ids`.
  """
  for name, column in fields.items():
    if data.fields[name].kind not in ("numeric", "vector") and file.columns[column] == "DOUBLE":
      check_ids(con, file, column, f"config.data.fields.{name}")


def check_plain(file: TableFile, column: str, key: str, *, many: bool = False) -> None:
  """Checks that a column holds texts, numbers or times; with `many`, also lists of them.

  Raises:
    DataError: it holds lists, objects or bytes; the message names `key`, the column's place in the config.
  """
  kind = file.columns[column]
  place = f"{file.path}: column {column!r} ({key})"
  if kind.startswith(derived_columns.OBJECTS):
    inside = " in lists" if kind.endswith("]") else ""
    raise DataError(
      f"{place} holds objects{inside}, of the type {kind[: readers.SHOWN_TYPE]}; "
      + ("write lists of texts or numbers." if inside else f"name one of their members, as in {column}.{_first(kind)}.")
    )
  if not many and (kind.endswith("]") or kind == derived_columns.JSON_LIST):
    field = key.startswith("config.data.fields.")
    many_values = f"with kind='vocabulary' or 'hash', set {key}.many, the number of values to keep, such as 8"
    remedy = many_values if field else "write one value a row"
    raise DataError(f"{place} holds lists, of the type {kind[: readers.SHOWN_TYPE]}; {remedy}.")
  if kind == "BLOB":
    raise DataError(f"{place} holds bytes that are not UTF-8 text; write them as text, such as hexadecimal digits.")


def _first(kind: str) -> str:
  """Returns the name of the first member of a type of objects; a placeholder if the type does not name them."""
  found = re.match(r'STRUCT\((?:"([^"]+)"|(\w+)) ', kind)
  return (found[1] or found[2]) if found else "MEMBER"


def _check_sequence(file: TableFile, column: str, name: str, field: config.Field) -> None:
  """Says that a plain field takes lists for single values, and checks the separator of a field of many.

  Raises:
    DataError: the field separates the values of RecBole's lists by another sign than a space.
  """
  place = f"{file.path}: column {column!r} (config.data.fields.{name})"
  if not field.many and field.kind not in ("numeric", "vector"):
    logger.info(
      f"{place} holds lists by its header, and each list is read as one value; set many, the number of values to keep, "
      f"and separator={readers.LIST_SEPARATOR!r} to read their values"
    )
  if (field.many or field.kind == "vector") and field.separator != readers.LIST_SEPARATOR:
    raise DataError(
      f"{place} holds lists by its header, whose values a space separates; set config.data.fields.{name}.separator="
      f"{readers.LIST_SEPARATOR!r}, or call the column a token in the header if {field.separator!r} separates them."
    )


def read_sql(data: config.Data, file: TableFile, fields: Mapping[str, str]) -> tuple[dict[str, str], list[Fault]]:
  """Returns the SQL that reads fields (name → column) from a file `e`, and the faults that their values may have.

  Of a vector the value is its key; see `vector_sql`.

  Raises:
    DataError: the column of a numeric field or of vectors is of a type that holds none, or that of another field holds
      lists, objects or bytes.
  """
  columns = field_columns(data)
  values: dict[str, str] = {}
  faults: list[Fault] = []
  for name, column in fields.items():
    kind, alias, field = file.columns[column], columns[name], data.fields[name]
    key = f"config.data.fields.{name}"
    if column in file.lists:
      _check_sequence(file, column, name, field)
    if field.kind == "vector":
      vector_values, fault = _read_vector(file, column, name, alias, field)
      values |= vector_values
      faults.append(fault)
      continue
    if field.kind != "numeric":
      check_plain(file, column, key, many=field.many > 0)
    if field.many:
      json = file.format in readers.JSON_FORMATS or bool(column in file.derived and file.derived[column].path)
      values[alias] = value_sql.list_sql(f"e.{alias}", kind, field.separator, json=json)
      continue
    if field.kind != "numeric":
      values[alias] = value_sql.text_sql(f"e.{alias}", kind)
      continue
    try:
      number = value_sql.number_sql(f"e.{alias}", kind, file.text)
    except TypeError:
      check_plain(file, column, key)
      raise DataError(
        f"{file.path}: column {column!r} is of type {kind}, which is not a number; name another column, or set "
        f"{key}.kind='vocabulary'."
      ) from None
    values[alias] = f"CASE WHEN isfinite({number}) THEN {number} END"
    # NaN counts as absent, since many writers use it so; infinity is a fault, since it would spoil every mean.
    bad, larger = f"{number} IS NULL OR isinf({number})", ""
    if field.encoding == "standardise":
      bad += f" OR (abs({number}) > {LARGEST!r}::DOUBLE AND NOT isnan({number}))"
      larger = f"config.data.fields.{name}.encoding='log1p' or 'quantile'"
    values[f"bad_{alias}"] = f"CASE WHEN {bad} THEN {value_sql.text_sql(f'e.{alias}', kind)} END"
    written = file.text if kind == "VARCHAR" else PLAIN_TEXT
    reason, condition = f"unparsable_field_{name}", f"bad_{alias} IS NOT NULL"
    faults.append(Fault(reason, column, condition, f"bad_{alias}", A_NUMBER, larger, written))
  return values, faults


def _read_vector(
  file: TableFile, column: str, name: str, alias: str, field: config.Field
) -> tuple[dict[str, str], Fault]:
  """Returns the SQL that reads the keys of vectors from a column, and the fault of a value that is no vector."""
  kind = file.columns[column]
  try:
    key = vector_sql.key_sql(f"e.{alias}", kind, field, file.text)
  except TypeError:
    raise DataError(
      f"{file.path}: column {column!r} (config.data.fields.{name}) is of type {kind[: readers.SHOWN_TYPE]}, which "
      "holds no lists of numbers; name a column of lists, or set another kind."
    ) from None
  bad = f"bad_{alias}"
  values = {alias: key, bad: vector_sql.bad_sql(f"e.{alias}", kind, field, file.text)}
  wanted = f"a list of {field.size} finite numbers, as config.data.fields.{name}.size says"
  return values, Fault(f"unparsable_field_{name}", column, f"{bad} IS NOT NULL", bad, wanted)
