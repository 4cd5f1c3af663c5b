"""Proposes tasks about the future: churn, the time to the next event, the values of events to come, and amounts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from supermoe_jax.config import MICROSECONDS_PER_DAY, parse_time
from supermoe_jax.data.inspect.column_roles import AMOUNT_WORDS, TYPE_WORDS, ColumnStatistics, next_event_rank

if TYPE_CHECKING:
  from supermoe_jax.data.inspect.inspect import InspectedTable

HORIZONS = (90, 28, 14, 7, 3, 1)  # days of a label's window; the longest that the log has room for is proposed
USUAL = 28  # days of the main window, where there is room
FURTHER = (28, 7)  # days of further windows, where they are shorter than the longest
MOST_TYPES = 20  # values of a column of types
LEAST_VALUES, MOST_VALUES = 21, 1000  # of a field whose values to come are asked about
ASKED_VALUES = 60  # the most frequent ones


def future_tasks(
  sources: Sequence[InspectedTable], items: Mapping[str, InspectedTable], data: Mapping[str, Any]
) -> dict[str, tuple[dict[str, Any], str]]:
  """Returns tasks about the time after a snapshot, each with a comment; none if no window fits the proposed split.

  They are churn and the number of different times with an event, in several windows, and the days to the next event, by
  events of the largest table; whether each other table's events happen; which types of events happen, by a column of
  types; which values, by the likeliest field of an item's kind with up to `MOST_VALUES`; and the sum of an amount in
  several windows, by the name of a numeric column.
  """
  windows = _windows(sources, data["split"])
  if not windows:
    return {}
  largest = max(sources, key=lambda t: t.rows)
  main = windows[0]
  out: dict[str, tuple[dict[str, Any], str]] = {}

  def add(name: str, task: dict[str, Any], comment: str, *, every_window: bool = False) -> None:
    for days in windows if every_window else windows[:1]:
      suffix = "" if days == main else f"_{days}d"
      out[f"{name}{suffix}"] = {**task, "horizon_days": float(days)}, f"{comment} within {days} days"

  churn = {"kind": "future_event", "source": largest.name, "negate": True}
  add("churn", churn, f"no event of {largest.name}", every_window=True)
  add(
    f"days_to_{largest.name}",
    {"kind": "time_to_event", "source": largest.name},
    f"the days until the next event of {largest.name}, if it is",
  )
  visits = {"kind": "future_amount", "of": "moments", "source": largest.name, "loss": "poisson"}
  add(f"{largest.name}_times", visits, f"the number of times with events of {largest.name}", every_window=True)
  for table in sources:
    if table is not largest:
      add(f"{table.name}_soon", {"kind": "future_event", "source": table.name}, f"an event of {table.name}")
  for column, field in _carried(sources, data["fields"], ("vocabulary",), TYPE_WORDS):
    if 2 <= column.distinct <= MOST_TYPES:
      add(f"{field}_soon", _values(field, column.distinct), "which types of events happen")
      break
  if found := _valued(largest, items.get(largest.name), data["fields"]):
    field, size = found
    # Half of the values at most: training must have them all, and it is a part of the log.
    add(f"{field}_soon", _values(field, min(size // 2, ASKED_VALUES)), f"which values of {field} occur")
  for column, field in _carried(sources, data["fields"], ("numeric",), AMOUNT_WORDS):
    # A standardised 0 comes back as 0 but for rounding, which may make it negative.
    standardised = data["fields"][field].get("encoding", "standardise") == "standardise"
    negative = column.low is not None and (column.low < 0 or (column.low == 0 and standardised))
    amount = {"kind": "future_amount", "field": field, **({"loss": "log1p"} if negative else {})}
    add(f"{field}_sum", amount, f"the sum of {field}", every_window=True)
    break
  return out


def _values(field: str, top: int) -> dict[str, Any]:
  return {"kind": "future_values", "field": field, "top": top}


def _windows(sources: Sequence[InspectedTable], split: Mapping[str, Any]) -> list[int]:
  """Returns the windows, in days, that lie within their periods after all proposed snapshots; the main one is first."""
  if split.get("mode") == "leave_one_out":
    return []
  validation, test = (parse_time(split[k][-1], k) for k in ("validation", "test"))
  first, last = (
    pick(getattr(t.events, end) for t in sources if t.events) for pick, end in ((min, "first"), (max, "last"))
  )
  # Windows of most training snapshots must lie within training too.
  room = min(test - validation, last - test, (parse_time(split["train_end"], "train_end") - first) / 2)
  room /= MICROSECONDS_PER_DAY
  longest = next((days for days in HORIZONS if days <= room), None)
  if longest is None:
    return []
  fitting = [longest, *(days for days in FURTHER if days < longest)]
  return sorted(fitting, key=lambda days: (days != USUAL, -days))


def _valued(
  table: InspectedTable, items: InspectedTable | None, fields: Mapping[str, Mapping[str, Any]]
) -> tuple[str, int] | None:
  """Returns the field whose values to come are asked about, and their number: the likeliest name of an item's kind.

  It is a field of single values of a table of events, which may come from its items, and has up to `MOST_VALUES`.
  """
  columns = [c for t in (table, items) if t for c, _ in t.having("vocabulary")]
  found: list[tuple[tuple[int, int], int, str]] = []
  for column in columns:
    name = field_of_column(fields, table.name, column.name)
    if name and LEAST_VALUES <= column.distinct <= MOST_VALUES and fields[name].get("kind") != "hash":
      found.append((next_event_rank(column), column.distinct, name))
  if not found:
    return None
  _, size, name = min(found, key=lambda of: (of[0][0], -of[1]))
  return name, size


def field_of_column(fields: Mapping[str, Mapping[str, Any]], source: str, column: str) -> str | None:
  """Returns the field of single categorical values that reads a column of a source; None without one."""
  for name, of in fields.items():
    categorical = of.get("kind", "vocabulary") in ("vocabulary", "hash") and "many" not in of
    if categorical and of.get("column", name) == column and source in of.get("sources", (source,)):
      return name
  return None


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
