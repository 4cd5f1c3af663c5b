"""Proposes aggregates: counts of the values that tasks ask about, sums of amounts, habits, factors of many values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from supermoe_jax.data.inspect.proposed_tasks import field_of_column

if TYPE_CHECKING:
  from supermoe_jax.data.inspect.inspect import InspectedTable

MOST_COUNTED = 60  # values of a field that aggregates count for each user
MOST_FACTORED = 3  # fields
LEAST_VALUES = 30  # of a field with factors; fewer are counted, or say little of a user
LEAST_REPEATS = (
  3  # events a value of a field with factors: what occurs once, as the number of an order, is shared by none
)


def propose_aggregates(
  sources: Sequence[InspectedTable],
  items: Mapping[str, InspectedTable],
  fields: Mapping[str, Mapping[str, Any]],
  tasks: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[Any, str]]:
  """Returns settings of `data.aggregates`, each with a comment.

  Args:
    sources: the tables of events.
    items: the tables of items, by the name of their source.
    fields: the proposed fields.
    tasks: the proposed tasks.
  """
  out: dict[str, tuple[Any, str]] = {}
  if counted := _counted(fields, tasks):
    out["top_values"] = MOST_COUNTED, ""
    out["fields"] = counted, "how often each user had each of their most frequent values"
  if summed := _summed(fields, tasks):
    out["sums"] = summed, "the user's totals of some windows"
    out["trends"] = summed, "the same against the window before"
  out["paces"] = True, "whether a user comes, and spends, more than usual"
  out["habits"] = True, "on which weekdays and at which hours a user comes"
  if factored := _factored(sources, items, fields):
    out["distinct"] = factored, "how many different values a user has had"
    out["factors"] = factored, "what all values that a user has had say, in 64 numbers a field"
  return out


def _counted(fields: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Returns the fields whose values tasks ask about and aggregates can count."""
  asked = dict.fromkeys(t["field"] for t in tasks.values() if t["kind"] in ("next_event", "future_values"))
  plain = [n for n in asked if fields[n].get("kind", "vocabulary") == "vocabulary" and "many" not in fields[n]]
  return [n for n in plain if not fields[n].get("buckets")]


def _summed(fields: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Returns the numeric fields whose amounts tasks ask about and aggregates can add up."""
  asked = dict.fromkeys(t["field"] for t in tasks.values() if t["kind"] == "future_amount" and "field" in t)
  return [n for n in asked if fields[n].get("encoding") != "quantile"]


def _factored(
  sources: Sequence[InspectedTable], items: Mapping[str, InspectedTable], fields: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  """Returns the fields of the most values that several users may share, in the order of the config.

  Fields of lists are left out: their statistics count lists, not values.
  """
  values: dict[str, int] = {}
  for table in sources:
    # How often events hold a value of a table of items is not known; each value is of many items or of many events.
    own = [(column, LEAST_REPEATS) for column, _ in table.having("vocabulary", "hash")]
    joined = (
      [(column, 1) for column, _ in items[table.name].having("vocabulary", "hash")] if table.name in items else []
    )
    for column, repeats in [*own, *joined]:
      name = field_of_column(fields, table.name, column.name)
      if name and LEAST_VALUES <= column.distinct <= column.present / repeats:
        values[name] = max(column.distinct, values.get(name, 0))
  most = sorted(values, key=lambda n: -values[n])[:MOST_FACTORED]
  return [n for n in fields if n in most]
