"""Proposes aggregates: counts of the values that tasks ask about, sums of amounts, habits, factors of many values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from supermoe_jax.data.inspect.proposed_tasks import field_of_column

if TYPE_CHECKING:
  from supermoe_jax.data.inspect.inspect import InspectedTable

MOST_COUNTED = 60  # values of a field that aggregates count for each user
FEW_VALUES, MOST_FEW_VALUES = 32, 64  # of a field that is counted though no task asks about it, and of all such fields
MOST_SUMMED = 4  # fields
MOST_DISTINCT, LEAST_DISTINCT = 6, 10  # fields whose different values are counted, and values of such a field
MOST_FACTORED = 4  # fields
LEAST_VALUES = 30  # of a field with factors; fewer are counted, or say little of a user
# Events a value of a field with factors: what occurs once, as the number of an order, is shared by none.
LEAST_REPEATS = 3


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
  values = _shared_values(sources, items, fields)
  if counted := _counted(values, fields, tasks):
    out["top_values"] = MOST_COUNTED, ""
    out["fields"] = counted, "how often each user had each of their most frequent values"
  if summed := _summed(fields, tasks):
    out["sums"] = summed, "the user's totals of some windows"
    out["trends"] = summed, "the same against the window before"
  out["paces"] = True, "whether a user comes, and spends, more than usual"
  out["habits"] = True, "on which weekdays and at which hours a user comes"
  if several := _of_most_values(values, fields, MOST_DISTINCT, LEAST_DISTINCT):
    out["distinct"] = several, "how many different values a user has had"
  if factored := _of_most_values(values, fields, MOST_FACTORED, LEAST_VALUES):
    out["factors"] = factored, "what all values that a user has had say, in 64 numbers a field"
  return out


def _counted(
  values: Mapping[str, int], fields: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]]
) -> list[str]:
  """Returns the fields that aggregates count: those that tasks ask about, and those of few values."""
  asked = dict.fromkeys(t["field"] for t in tasks.values() if t["kind"] in ("next_event", "future_values"))
  few, room = [], MOST_FEW_VALUES
  for name in sorted(values.keys() - asked, key=lambda n: (values[n], n)):
    if 2 <= values[name] <= min(FEW_VALUES, room):
      few.append(name)
      room -= values[name]
  plain = [n for n in (*asked, *few) if fields[n].get("kind", "vocabulary") == "vocabulary" and "many" not in fields[n]]
  return [n for n in plain if not fields[n].get("buckets")]


def _summed(fields: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Returns numeric fields that aggregates can add up, those whose amounts tasks ask about first."""
  asked = (t["field"] for t in tasks.values() if t["kind"] == "future_amount" and "field" in t)
  numeric = (n for n, f in fields.items() if f.get("kind") == "numeric")
  return [n for n in dict.fromkeys((*asked, *numeric)) if fields[n].get("encoding") != "quantile"][:MOST_SUMMED]


def _shared_values(
  sources: Sequence[InspectedTable], items: Mapping[str, InspectedTable], fields: Mapping[str, Mapping[str, Any]]
) -> dict[str, int]:
  """Returns the number of values of each categorical field whose values several users may share.

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
      if name and column.distinct <= column.present / repeats:
        values[name] = max(column.distinct, values.get(name, 0))
  return values


def _of_most_values(
  values: Mapping[str, int], fields: Mapping[str, Mapping[str, Any]], most: int, least: int
) -> list[str]:
  """Returns the fields of the most values, at most `most`, each of `least` values or more, in the config's order."""
  many = [n for n in values if values[n] >= least]
  kept = sorted(many, key=lambda n: -values[n])[:most]
  return [n for n in fields if n in kept]
