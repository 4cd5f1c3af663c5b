"""Finds columns of events that nearly determine a label; most often they were recorded when the label was known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import duckdb

from supermoe_jax.data.inspect import column_roles
from supermoe_jax.data.reading import value_sql

if TYPE_CHECKING:
  from supermoe_jax.data.inspect.column_roles import ColumnStatistics
  from supermoe_jax.data.inspect.inspect import InspectedTable

SAMPLE_ROWS = 200_000  # of events; users are sampled whole
TELLS = 0.9  # the least share of errors, of always guessing the commonest label, that the column removes
LEAST_USERS = 5  # of a value that counts; a value that fewer users share identifies users
LEAST_ROWS = 20  # with another than the commonest label
COVERED = 0.5  # the least share of rows whose value has `LEAST_USERS` users
BINS = 20  # of equal size, for numbers


@dataclasses.dataclass(frozen=True)
class LeakSuspect:
  """A column of events that nearly determines a label.

  Attributes:
    table: the table of events.
    column: the column of the table.
    label: the label, as `table.column`.
    right: the share of rows with the commonest label of their value.
    commonest: the share of rows with the commonest label overall.
  """

  table: str
  column: str
  label: str
  right: float
  commonest: float

  def __str__(self) -> str:
    return (
      f"{self.table}.{self.column} predicts {self.label} in {self.right:.1%} of the rows, the commonest value in "
      f"{self.commonest:.1%}: if it is known only with the label, leave it out of the fields, or set input=False"
    )


def find_leaks(
  con: duckdb.DuckDBPyConnection,
  events: InspectedTable,
  rows: str,
  users: InspectedTable | None = None,
  user_rows: str = "",
) -> list[LeakSuspect]:
  """Finds the columns of a table of events that nearly determine a label.

  Labels are columns with few values: all such columns of the user table, and event columns with the name of a label.

  Args:
    con: the connection that runs the queries.
    events: the table of events.
    rows: a query of the rows of `events`, with columns c0, c1, …
    users: the user table, if there is one.
    user_rows: a query of the rows of `users`, with columns c0, c1, …
  """
  owner = _text(events, _user(events))
  some = f"hash({owner}) % {max(1, -(-events.rows // SAMPLE_ROWS))} = 0"
  con.execute(f"CREATE OR REPLACE TEMP TABLE sampled AS SELECT *, {owner} AS owner FROM ({rows}) WHERE {some}")
  fields = [i for i, role in enumerate(events.roles) if role.kind in ("vocabulary", "hash", "numeric")]
  own = [i for i in fields if events.columns[i].named(column_roles.LABEL_WORDS) is not None and _few(events.columns[i])]
  found = []
  for label in own:
    answers = f"SELECT *, {_text(events, label)} AS label FROM sampled"
    name = f"{events.name}.{events.columns[label].name}"
    found += _tellers(con, events, [i for i in fields if i != label], answers, name)
  if users is not None:
    user = _user(users)
    for label, column in enumerate(users.columns):
      if label != user and _few(column):
        known = f"SELECT {_text(users, user)} AS known, {_text(users, label)} AS label FROM ({user_rows})"
        answers = f"SELECT sampled.*, label FROM sampled JOIN ({known}) ON owner = known"
        found += _tellers(con, events, fields, answers, f"{users.name}.{column.name}")
  con.execute("DROP TABLE sampled")
  return found


def _tellers(
  con: duckdb.DuckDBPyConnection, events: InspectedTable, columns: Sequence[int], answers: str, label: str
) -> list[LeakSuspect]:
  """Returns the columns that nearly determine the label of `answers`, a query of sampled rows with `owner`, `label`."""
  found = []
  for i in columns:
    # An absent value counts as a value: some columns are filled in only when the label is positive.
    valued = f"SELECT {_value(events, i)} AS value, label, owner FROM ({answers}) WHERE label IS NOT NULL"
    counted = (
      f"WITH valued AS ({valued}), shared AS (SELECT value FROM valued GROUP BY value "
      f"HAVING count(DISTINCT owner) >= {LEAST_USERS}), "
      "counted AS (SELECT valued.value, label, count(*) AS n FROM valued JOIN shared ON "
      "valued.value IS NOT DISTINCT FROM shared.value GROUP BY ALL) "
      "SELECT (SELECT count(*) FROM valued), (SELECT sum(n) FROM counted), "
      "(SELECT sum(most) FROM (SELECT max(n) AS most FROM counted GROUP BY value)), "
      "(SELECT max(n) FROM (SELECT sum(n) AS n FROM counted GROUP BY label))"
    )
    ((rows, covered, right, commonest),) = con.execute(counted).fetchall()
    if not covered or covered < COVERED * rows or covered - commonest < LEAST_ROWS:
      continue
    if right - commonest >= TELLS * (covered - commonest):
      found.append(
        LeakSuspect(events.name, events.columns[i].name, label, int(right) / int(covered), commonest / covered)
      )
  return found


def _user(table: InspectedTable) -> int:
  return next(i for i, role in enumerate(table.roles) if role.kind == "user")


def _few(column: ColumnStatistics) -> bool:
  return 2 <= column.distinct <= column_roles.FEW_VALUES


def _text(table: InspectedTable, place: int) -> str:
  return value_sql.text_sql(f"c{place}", table.columns[place].type)


def _value(table: InspectedTable, place: int) -> str:
  """Returns the SQL of a value that can be counted; for a quantity its bin."""
  if table.roles[place].kind != "numeric":
    return _text(table, place)
  number = value_sql.number_sql(f"c{place}", table.columns[place].type, table.text)
  number = f"CASE WHEN isfinite({number}) THEN {number} END"
  bin = f"floor({BINS} * percent_rank() OVER (ORDER BY {number}))"  # equal numbers share a bin
  return f"CASE WHEN {number} IS NOT NULL THEN {bin} END"
