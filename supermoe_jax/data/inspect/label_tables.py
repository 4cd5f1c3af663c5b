"""Recognises tables of dated labels among inspected tables, and proposes a task for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from supermoe_jax.data.inspect import column_roles

if TYPE_CHECKING:
  from supermoe_jax.data.inspect.column_roles import ColumnStatistics
  from supermoe_jax.data.inspect.inspect import InspectedTable

MOST_CLASSES = 20  # different values of a label that is no number
YES_AND_NO = {"0", "1", "true", "false"}


def dated_label(table: InspectedTable, tables: Sequence[InspectedTable]) -> ColumnStatistics | None:
  """Returns the label of a table that holds a user, a time and one column with the name of a label, and no other.

  None for any other table, for a table with one row a user, and where no other table holds events.
  """
  label = _only_label(table)
  with_events = [t for t in tables if t.events is not None and _only_label(t) is None]
  return label if with_events else None


def _only_label(table: InspectedTable) -> ColumnStatistics | None:
  if table.events is None or table.users[0].most < 2 or table.format == "sequences":
    return None
  others = [c for c, r in zip(table.columns, table.roles, strict=True) if r.kind not in ("user", "time")]
  return others[0] if len(others) == 1 and _label_type(others[0]) is not None else None


def _label_type(column: ColumnStatistics) -> str | None:
  """Returns the type of the label that a column may be; None if its name or its values are not those of a label."""
  if column.named(column_roles.LABEL_WORDS) is None:
    return None
  if column.distinct <= 2 and {v.lower() for v in column.sample} <= YES_AND_NO:
    return "binary"
  if column.distinct <= MOST_CLASSES:
    return "multiclass"
  return "regression" if column.numeric else None


def dated_task(table: InspectedTable, label: ColumnStatistics, files: Sequence[str]) -> dict[str, Any]:
  """Returns the settings of the task about a table of dated labels."""
  ((user, _),), ((time, role),) = table.having("user"), table.having("time")
  task = {"kind": "dated_label", "files": list(files), "user": user.name, "time": time.name, **role.settings}
  type = _label_type(label)
  return {**task, "column": label.name, **({} if type == "binary" else {"type": type})}
