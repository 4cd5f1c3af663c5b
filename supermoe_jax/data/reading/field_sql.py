"""Values of fields as files hold them: the SQL that reads them, and the faults of rows that cannot be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from supermoe_jax import config
from supermoe_jax.data.reading import readers, value_sql
from supermoe_jax.data.reading.readers import TableFile
from supermoe_jax.errors import DataError

DROP_REMEDY = "set config.data.on_bad_rows='drop' to leave such rows out and count them"


@dataclasses.dataclass(frozen=True)
class Fault:
  """Why a row cannot be used.

  Attributes:
    reason: its name in the counts.
    column: the column of the file that is to blame.
    condition: SQL that is true of such a row.
    value: SQL of the offending value as text; empty if the value is absent.
    kind: what the value should have been.
  """

  reason: str
  column: str
  condition: str
  value: str = ""
  kind: str = ""

  def describe(self, value: str | None) -> str:
    """Says what is wrong with a row."""
    if not self.kind:
      return f"column {self.column!r} is empty"
    return f"column {self.column!r} holds {value!r}, which is not {self.kind}"


def fault_sql(faults: Sequence[Fault]) -> str:
  """The columns `fault`, the number from 1 of the first fault that holds or 0, and `bad_value`."""
  which = " ".join(f"WHEN {f.condition} THEN {i}" for i, f in enumerate(faults, 1))
  value = " ".join(f"WHEN {i} THEN {f.value}" for i, f in enumerate(faults, 1) if f.value)
  return f"CASE {which} ELSE 0 END AS fault, " + (f"CASE fault {value} END" if value else "NULL") + " AS bad_value"


def bad_row(file: TableFile, faults: Sequence[Fault], bad: Sequence[tuple[int, int, int, str | None]]) -> DataError:
  """Names the first of the bad rows, each given as (fault, count, number of the first row from 0, its value)."""
  fault, n, row, value = bad[0]
  others = sum(count for _, count, *_ in bad) - n
  more = f", and {others} with other faults" if others else ""
  return DataError(
    f"{file.path}: row {row + 1}: {faults[fault - 1].describe(value)} ({n} such row{'s' if n > 1 else ''}{more}). "
    f"Correct the file, or {DROP_REMEDY}."
  )


def aliased(values: Mapping[str, str]) -> str:
  """The SQL of a list of columns, each given as alias → SQL."""
  return ", ".join(f"{value} AS {readers.identifier(alias)}" for alias, value in values.items())


def field_columns(data: config.Data) -> dict[str, str]:
  """The column of each field in the tables that values are read into."""
  return {name: f"f{i}" for i, name in enumerate(data.fields)}


def stored_type(field: config.Field) -> str:
  """The DuckDB type of a field's column."""
  if field.kind == "numeric":
    return "DOUBLE"
  return "VARCHAR[]" if field.many else "VARCHAR"


def carried(data: config.Data, source: str, table: Literal["events", "users"] = "events") -> dict[str, str]:
  """The fields of a table that a source's events carry, and the name of the column of each."""
  return {
    n: f.column or n for n, f in data.fields.items() if f.table == table and (not f.sources or source in f.sources)
  }


def read_sql(data: config.Data, file: TableFile, fields: Mapping[str, str]) -> tuple[dict[str, str], list[Fault]]:
  """The SQL of fields (name → column) read from a file `e`, and the faults that they may have.

  Raises:
    DataError: a column's type holds no numbers where they are wanted.
  """
  columns, values, faults = field_columns(data), {}, []
  for name, column in fields.items():
    kind, alias, field = file.columns[column], columns[name], data.fields[name]
    if field.many:
      json = file.format in readers.JSON_FORMATS
      values[alias] = value_sql.list_sql(f"e.{alias}", kind, field.separator, json=json)
      continue
    if field.kind != "numeric":
      values[alias] = value_sql.text_sql(f"e.{alias}", kind)
      continue
    try:
      number = value_sql.number_sql(f"e.{alias}", kind)
    except TypeError:
      raise DataError(
        f"{file.path}: column {column!r} is of type {kind}, which is not a number; name another column, or set "
        f"config.data.fields.{name}.kind='vocabulary'."
      ) from None
    values[alias] = f"CASE WHEN isfinite({number}) THEN {number} END"
    # NaN is how many writers spell an absent number; infinity would spoil every mean.
    bad = f"{number} IS NULL OR isinf({number})"
    values[f"bad_{alias}"] = f"CASE WHEN {bad} THEN {value_sql.text_sql(f'e.{alias}', kind)} END"
    faults.append(Fault(f"unparsable_field_{name}", column, f"bad_{alias} IS NOT NULL", f"bad_{alias}", "a number"))
  return values, faults
