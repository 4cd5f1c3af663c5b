"""Recognises columns of lists, also lists in text, and proposes how many of their values a field keeps.

Lists of numbers that all have one length are vectors.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import duckdb

from supermoe_jax import config
from supermoe_jax.data.inspect.column_roles import ColumnRole, ColumnStatistics
from supermoe_jax.data.reading import value_sql, vector_sql

SHORTEST_VECTOR = 8  # numbers; shorter lists are more likely coordinates or ranges
MANY = 8  # the most values of a list to keep
WHOLE_LISTS = 0.95  # the share of lists to keep whole, as far as `MANY` allows
# Separators of lists in text, the likeliest first: the least share of values that hold it, and the most different parts
# as a share of the different lists.
SEPARATORS = {"|": (0.1, 1.0), ";": (0.5, 0.5), ",": (0.5, 0.5)}
DECIMAL_COMMA = re.compile(r"[-+]?[\d.]*,\d+")


def list_role(lengths: Mapping[int, int], separator: str = config.Field.separator) -> ColumnRole:
  """Returns the role of a column of lists.

  Args:
    lengths: each length, from 1 in order, with its number of lists.
    separator: the separator of the values where the lists are text.
  """
  reached = itertools.accumulate(lengths.values())
  usual = next(k for k, n in zip(lengths, reached, strict=True) if n >= WHOLE_LISTS * sum(lengths.values()))
  many, longest = min(usual, MANY), max(lengths)
  kept = sum(min(k, many) * n for k, n in lengths.items()) / sum(k * n for k, n in lengths.items())
  note = f"many={many} keeps {kept:.1%} of their values"
  settings: dict[str, str | int] = {"many": many}
  if separator != config.Field.separator:
    settings["separator"] = separator
  return ColumnRole("vocabulary", f"lists of up to {longest:,} values", settings, note)


def vector_role(
  con: duckdb.DuckDBPyConnection, place: int, column: ColumnStatistics, separator: str = config.Field.separator
) -> ColumnRole | None:
  """Returns the role of a column of vectors: finite numbers, not all of them whole, in lists of one length.

  None if it holds no vectors. The view `found` holds the column as `c` and its `place`; `separator` is that of lists in
  text that are no JSON arrays.
  """
  listed = separator != config.Field.separator or (bool(column.sample) and all(v[:1] == "[" for v in column.sample))
  fractions = re.fullmatch(r"(FLOAT|DOUBLE|DECIMAL\(\d+,\d+\))\[\d*\]", column.type)
  if column.distinct < 2 or not (fractions or (column.type == "VARCHAR" and listed)):
    return None
  numbers = vector_sql.numbers_sql(f"c{place}", column.type, separator)
  ((shortest, longest, finite, fraction),) = con.execute(
    "SELECT min(len(v)), max(len(v)), "
    "bool_and(list_bool_and(list_transform(v, lambda x: coalesce(isfinite(x), false)))), "
    "bool_or(list_bool_or(list_transform(v, lambda x: x <> trunc(x)))) "
    f"FROM (SELECT {numbers} AS v FROM found) WHERE len(v) > 0"
  ).fetchall()
  if shortest is None or not (SHORTEST_VECTOR <= shortest == longest and finite and fraction):
    return None
  settings: dict[str, str | int] = {"size": shortest}
  if separator != config.Field.separator:
    settings["separator"] = separator
  return ColumnRole("vector", f"lists of {shortest:,} numbers, such as an embedding", settings)


def _possible_separators(column: ColumnStatistics) -> list[str]:
  """Returns the separators that a text column may use for lists: those in many of its values, likeliest first."""
  if column.type != "VARCHAR" or column.numeric or column.iso_times or column.distinct < 2:
    return []
  sample = [value for value in column.sample if not DECIMAL_COMMA.fullmatch(value)]
  return [s for s, (least, _) in SEPARATORS.items() if sum(s in v for v in sample) >= max(least * len(sample), 2)]


def separator(con: duckdb.DuckDBPyConnection, place: int, column: ColumnStatistics) -> str:
  """Returns the separator of a text column whose values are lists: their parts recur in other lists; empty if none.

  The view `found` holds the column as `c` and its `place`.
  """
  for sign in _possible_separators(column):
    values = value_sql.list_sql(f"c{place}", column.type, sign, json=False)
    ((parts, lists),) = con.execute(
      "SELECT count(DISTINCT part), count(DISTINCT list) FROM (SELECT list, unnest(list) AS part FROM "
      f"(SELECT {values} AS list FROM found))"
    ).fetchall()
    if parts <= SEPARATORS[sign][1] * lists:
      return sign
  return ""


def lengths(
  con: duckdb.DuckDBPyConnection, place: int, type: str, separator: str = config.Field.separator, *, json: bool
) -> dict[int, int]:
  """Returns the number of lists of each length, in order; empty lists and absent elements do not count.

  The view `found` holds the column as `c` and its `place`; with `json`, text may be a JSON array.
  """
  values = value_sql.list_sql(f"c{place}", type, separator, json=json)
  listed = f"SELECT len({values}) AS length FROM found"
  query = f"SELECT length, count(*) FROM ({listed}) WHERE length > 0 GROUP BY length ORDER BY length"
  return dict(con.execute(query).fetchall())
