"""Translates a task's condition on events into SQL over the raw events."""

from __future__ import annotations

from supermoe_jax import config
from supermoe_jax.config.tasks.condition import AllOf, Comparison, Condition, Negation, comparisons, parse_condition
from supermoe_jax.data.check.raw_events import field_column
from supermoe_jax.data.encoding.numeric import MOST_DEVIATIONS, Numeric
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.reading import readers

_SQL_OPERATORS = {"==": "=", "!=": "<>", "in": "IN", "not in": "NOT IN"}

# The spacing of float32 and a few of float64: sums count as equal to a constant that is no further away.
_SINGLE, _DOUBLE = 2.0**-23, 2.0**-50


def asked_sql(data: config.Data, where: str, source: str = "") -> str:
  """Returns SQL that is true for an event `e` of the type `source` that fulfils `where`; empty texts ask nothing.

  The events `e` are those of `events_sql`.
  """
  parts = ["true"]
  if source in data.sources:
    parts.append(f"e.source = {list(data.sources).index(source)}")
  elif source:
    name, field, value = data.typed(source)
    typed = _sql(data, Comparison(field, "==", (value,)))
    parts.append(f"e.source = {list(data.sources).index(name)} AND {typed}")
  if where:
    parts.append(_sql(data, parse_condition(where, "where")))
  return f"({' AND '.join(parts)})"


def events_sql(data: config.Data, where: str, encoders: Encoders) -> str:
  """Returns the table `events`, with columns about the moments of events if `where` compares moments.

  A function of a field adds its value as `sum_field_0`, …; `sum` and `mean` also the number of summands, as
  `number_field_0`, and how far the rounding of the records may have moved the sum, as `rounding_field_0`.
  """
  columns: dict[str, str] = {}
  for compared in comparisons(parse_condition(where, "where")) if where else ():
    if compared.function == "count":
      columns["moment_events"] = "count(*)"
    elif compared.function in ("max", "min"):
      column = field_column(data, compared.field)
      columns[f"{compared.function}_{column}"] = f"{compared.function}({column})"
    elif compared.function:
      column, encoder = field_column(data, compared.field), encoders.numeric[compared.field]
      assert isinstance(encoder, Numeric)  # config.resolve checked
      amount, rounding = _as_in_records(column, encoder, data.fields[compared.field].encoding)
      columns |= {f"sum_{column}": f"sum({amount})", f"rounding_{column}": f"sum({rounding})"}
      columns[f"number_{column}"] = f"count({column})"
  if not columns:
    return "events"
  windows = ", ".join(f"{sql} OVER moment AS {name}" for name, sql in columns.items())
  return f'(SELECT *, {windows} FROM events WINDOW moment AS (PARTITION BY "user", source, time))'


def user_fields(cfg: config.Config) -> list[str]:
  """Returns the fields of the table of users that the conditions of tasks compare."""
  conditions = [getattr(task, "where", "") for task in cfg.labelled_tasks.values()]
  named = {c.field for where in conditions if where for c in comparisons(parse_condition(where, "where"))}
  return [n for n, f in cfg.data.fields.items() if f.table == "users" and n in named]


def _as_in_records(column: str, encoder: Numeric, encoding: str) -> tuple[str, str]:
  """Returns the SQL of a raw number as records hold it, clipped and rounded, and of the most that rounding moves it."""
  mean, std = f"{encoder.mean!r}::DOUBLE", f"{encoder.std!r}::DOUBLE"
  raw = f"sign({column}) * ln(1 + abs({column}))" if encoding == "log1p" else column
  encoded = f"least(greatest(({raw} - {mean}) / {std}, {-MOST_DEVIATIONS}), {MOST_DEVIATIONS})::FLOAT::DOUBLE"
  amount, rounding = f"({encoded} * {std} + {mean})", f"{std} * abs({encoded}) * {_SINGLE + _DOUBLE!r}"
  rounding = f"({rounding} + abs({mean}) * {_DOUBLE!r})"
  if encoding == "log1p":
    amount = f"(sign({amount}) * (exp(abs({amount})) - 1))"
    rounding = f"{rounding} * (1 + abs({amount}))"
  known = f"CASE WHEN {column} IS NOT NULL THEN"  # least and greatest pass over NULL
  return f"{known} {amount} END", f"{known} {rounding} END"


def _sql(data: config.Data, condition: Condition) -> str:
  if isinstance(condition, Negation):
    return f"NOT {_sql(data, condition.part)}"
  if not isinstance(condition, Comparison):
    joint = " AND " if isinstance(condition, AllOf) else " OR "
    return f"({joint.join(_sql(data, part) for part in condition.parts)})"
  operator = _SQL_OPERATORS.get(condition.operator, condition.operator)
  if condition.function:
    return f"coalesce({_moment_sql(data, condition, operator)}, false)"
  numeric = data.fields[condition.field].kind == "numeric"
  constants = [repr(c) if numeric else readers.literal(_text(c)) for c in condition.constants]
  values = f"({', '.join(constants)})" if operator.endswith("IN") else constants[0]
  return f"coalesce(e.{field_column(data, condition.field)} {operator} {values}, false)"


def _text(constant: str | float) -> str:
  """Returns a constant as a value of a vocabulary: whole numbers have no decimal point."""
  return str(int(constant)) if isinstance(constant, float) and constant.is_integer() else str(constant)


def _moment_sql(data: config.Data, compared: Comparison, operator: str) -> str:
  """Returns the SQL of a comparison of an event's moment; NULL for a moment without numbers."""
  (constant,) = compared.constants
  if compared.function == "count":
    return f"e.moment_events {operator} {constant!r}"
  column = field_column(data, compared.field)
  if compared.function in ("max", "min"):
    return f"e.{compared.function}_{column} {operator} {constant!r}"
  summands = f"e.number_{column}" if compared.function == "mean" else "1"
  difference = f"(e.sum_{column} - {constant!r}::DOUBLE * {summands})"
  return f"CASE WHEN abs({difference}) <= e.rounding_{column} THEN 0 ELSE {difference} END {operator} 0"
