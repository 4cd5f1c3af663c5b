"""Writes the SQL that reads vectors, lists of a fixed number of numbers, and keeps each distinct one once.

Events carry a vector's key, a text that its numbers determine. For each field of vectors a table of the database,
`vectors_` and the field's column, holds the vector of each key.
"""

from __future__ import annotations

from collections.abc import Mapping

import duckdb

from supermoe_jax import config
from supermoe_jax.config import TextFormat
from supermoe_jax.data.reading import derived_columns, readers, value_sql
from supermoe_jax.data.reading.readers import TableFile, literal

SHOWN_TEXT = 60  # characters of a bad vector that a message shows


def vectors_table(column: str) -> str:
  """Returns the name of the table of vectors of a field with this column in the events; see `field_columns`."""
  return f"vectors_{column}"


def numbers_sql(column: str, kind: str, separator: str, text: TextFormat = value_sql.PLAIN_TEXT) -> str:
  """Returns the SQL of a value as FLOAT[]: of a list, or of text as a JSON array or numbers with a separator.

  NULL is no list, and a NULL among the numbers is none. `text` says how numbers with a separator are written.

  Raises:
    TypeError: values of this type are never lists of numbers.
  """
  if kind in ("VARCHAR", derived_columns.JSON_LIST):
    parts = f"string_split({column}, {literal(separator)})"
    if text.decimal != "." or text.thousands:
      parts = f"list_transform({parts}, lambda part: {value_sql.plain_number_sql('trim(part)', text)})"
    array = f"TRY_CAST({column} AS FLOAT[])"
    return f"CASE WHEN starts_with(trim({column}), '[') THEN {array} ELSE TRY_CAST({parts} AS FLOAT[]) END"
  if kind.endswith("]"):
    return f"TRY_CAST({column} AS FLOAT[])"
  raise TypeError(kind)


def _vector_sql(numbers: str, size: int) -> str:
  """Returns the SQL of numbers that make a vector, and NULL otherwise."""
  finite = f"list_bool_and(list_transform({numbers}, lambda x: coalesce(isfinite(x), false)))"
  return f"CASE WHEN len({numbers}) = {size} AND {finite} THEN {numbers} END"


def key_sql(column: str, kind: str, field: config.Field, text: TextFormat) -> str:
  """Returns the SQL of a value's key; NULL where there is no vector.

  The key is two hashes of 64 bits, of the numbers and of the numbers in reverse order.
  """
  vector = _vector_sql(numbers_sql(column, kind, field.separator, text), field.size)
  key = f"hash({vector})::VARCHAR || '-' || hash(list_reverse({vector}))::VARCHAR"
  return f"CASE WHEN {vector} IS NOT NULL THEN {key} END"  # the hash of NULL is a number


def bad_sql(column: str, kind: str, field: config.Field, written: TextFormat) -> str:
  """Returns the SQL of the beginning of a value that is present, but no vector, as text; otherwise NULL.

  An empty text and a list without numbers are absent.
  """
  numbers = numbers_sql(column, kind, field.separator, written)
  text = value_sql.text_sql(column, kind)
  shown = f"left({text}, {SHOWN_TEXT}) || CASE WHEN length({text}) > {SHOWN_TEXT} THEN '…' ELSE '' END"
  counted = f"CASE WHEN len({numbers}) <> {field.size} THEN ' (' || len({numbers}) || ' numbers)' ELSE '' END"
  bad = f"{_vector_sql(numbers, field.size)} IS NULL AND {text} IS NOT NULL AND coalesce(len({numbers}), 1) > 0"
  return f"CASE WHEN {bad} THEN {shown} || coalesce({counted}, '') END"


def store_vectors(
  con: duckdb.DuckDBPyConnection,
  data: config.Data,
  file: TableFile,
  columns: Mapping[str, str],
  fields: Mapping[str, str],
) -> None:
  """Adds the vectors of a file to the tables of vectors, each distinct one once.

  Args:
    con: the connection.
    data: the data section of the config.
    file: the file, without lines that cannot be read.
    columns: the column of each field in the events.
    fields: the column of each field in the file.
  """
  for name, column in fields.items():
    field = data.fields[name]
    if field.kind != "vector":
      continue
    table, kind = vectors_table(columns[name]), file.columns[column]
    key = key_sql("v", kind, field, file.text)
    con.execute(f"CREATE TABLE IF NOT EXISTS {table} (value VARCHAR, vector FLOAT[{field.size}])")
    with readers.naming(file.path, file.format):
      con.execute(
        f"INSERT INTO {table} SELECT key, any_value(vector)::FLOAT[{field.size}] FROM (SELECT {key} AS key, "
        f"{numbers_sql('v', kind, field.separator, file.text)} AS vector FROM ({file.select({'v': column})})) "
        f"WHERE key IS NOT NULL AND key NOT IN (SELECT value FROM {table}) GROUP BY key"
      )
