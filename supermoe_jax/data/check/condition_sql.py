"""Translates a task's condition on events into SQL over the raw events."""

from __future__ import annotations

from supermoe_jax import config
from supermoe_jax.config.tasks.condition import AllOf, Comparison, Condition, Negation, parse_condition
from supermoe_jax.data.check.raw_events import field_column
from supermoe_jax.data.reading import readers

_SQL_OPERATORS = {"==": "=", "!=": "<>", "in": "IN", "not in": "NOT IN"}


def asked_sql(data: config.Data, where: str, source: str = "") -> str:
  """Returns SQL that is true for an event `e` of the type `source` that fulfils `where`; empty texts ask nothing."""
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


def _sql(data: config.Data, condition: Condition) -> str:
  if isinstance(condition, Negation):
    return f"NOT {_sql(data, condition.part)}"
  if not isinstance(condition, Comparison):
    joint = " AND " if isinstance(condition, AllOf) else " OR "
    return f"({joint.join(_sql(data, part) for part in condition.parts)})"
  numeric = data.fields[condition.field].kind == "numeric"
  constants = [
    repr(c) if numeric else readers.literal(c if isinstance(c, str) else f"{c:g}") for c in condition.constants
  ]
  operator = _SQL_OPERATORS.get(condition.operator, condition.operator)
  values = f"({', '.join(constants)})" if operator.endswith("IN") else constants[0]
  return f"coalesce(e.{field_column(data, condition.field)} {operator} {values}, false)"
