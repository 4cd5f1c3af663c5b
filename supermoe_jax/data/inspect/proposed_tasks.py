"""Proposes tasks about the future: churn, the time to the next event, the types of events to come, and amounts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from supermoe_jax.config import MICROSECONDS_PER_DAY, parse_time
from supermoe_jax.data.inspect.column_roles import AMOUNT_WORDS, TYPE_WORDS, ColumnStatistics

if TYPE_CHECKING:
  from supermoe_jax.data.inspect.inspect import InspectedTable

HORIZONS = (28, 14, 7, 3, 1)  # days of a label's window; the longest that the log has room for is proposed
MOST_TYPES = 20  # values of a column of types


def future_tasks(sources: Sequence[InspectedTable], data: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
  """Returns tasks about the time after a snapshot, each with a comment; none if no window fits the proposed split.

  They are churn and the days to the next event, by events of the largest table; whether each other table's events
  happen; which types of events happen, by a column of types; and the sum of an amount, by the name of a numeric column.
  """
  horizon = _horizon(sources, data["split"])
  if horizon is None:
    return {}
  largest = max(sources, key=lambda t: t.rows)
  window: dict[str, Any] = {"horizon_days": float(horizon)}
  out: dict[str, tuple[dict[str, Any], str]] = {
    "churn": (
      {"kind": "future_event", "source": largest.name, "negate": True, **window},
      f"no event of {largest.name} within {horizon} days",
    ),
    f"days_to_{largest.name}": (
      {"kind": "time_to_event", "source": largest.name, **window},
      f"the days until the next event of {largest.name}, censored after {horizon} days",
    ),
  }
  for table in sources:
    if table is not largest:
      task = {"kind": "future_event", "source": table.name, **window}
      out[f"{table.name}_soon"] = task, f"an event of {table.name} within {horizon} days"
  for column, field in _carried(sources, data["fields"], ("vocabulary",), TYPE_WORDS):
    if 2 <= column.distinct <= MOST_TYPES:
      task = {"kind": "future_values", "field": field, "top": column.distinct, **window}
      out[f"{field}_soon"] = task, f"which types of events happen within {horizon} days"
      break
  for column, field in _carried(sources, data["fields"], ("numeric",), AMOUNT_WORDS):
    negative = column.low is not None and column.low < 0
    task = {"kind": "future_amount", "field": field, **window, **({"loss": "log1p"} if negative else {})}
    out[f"{field}_sum"] = task, f"the sum of {field} within {horizon} days"
    break
  return out


def _horizon(sources: Sequence[InspectedTable], split: Mapping[str, Any]) -> int | None:
  """Returns the longest of `HORIZONS` whose windows after all proposed snapshots lie within their periods."""
  if split.get("mode") == "leave_one_out":
    return None
  validation, test = (parse_time(split[k][-1], k) for k in ("validation", "test"))
  last = max(t.events.last for t in sources if t.events)
  room = min(test - validation, last - test) / MICROSECONDS_PER_DAY
  return next((days for days in HORIZONS if days <= room), None)


def _carried(
  sources: Sequence[InspectedTable], fields: Mapping[str, Mapping[str, Any]], kinds: Sequence[str], words: Sequence[str]
) -> list[tuple[ColumnStatistics, str]]:
  """Returns the sources' columns that single-valued fields of some kinds read and whose names hold one of `words`.

  Columns with an earlier word come first, each with its field.
  """
  reading = {
    f.get("column", n): n for n, f in fields.items() if f.get("kind", "vocabulary") in kinds and "many" not in f
  }
  found = [(c, reading[c.name]) for t in sources for c, _ in t.having(*kinds) if c.name in reading]
  named = [(place, column, field) for column, field in found if (place := column.named(words)) is not None]
  return [(column, field) for _, column, field in sorted(named, key=lambda one: one[0])]
