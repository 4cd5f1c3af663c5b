"""Rejects settings of aggregates that can never work, before any file is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from supermoe_jax.config.kind_checks import AGGREGATES, check_condition, require
from supermoe_jax.config.tasks.condition import comparisons, parse_condition
from supermoe_jax.errors import nearest

if TYPE_CHECKING:
  from supermoe_jax.config.schema import Data

PATH = AGGREGATES

# The settings that name fields or conditions, and have no meaning without aggregates.
_ADDED = ("sums", "means", "trends", "distinct", "conditions", "factors")


def check_aggregates(data: Data) -> None:
  """Raises ConfigError for aggregates that can never work."""
  aggregates = data.aggregates
  require(
    all(days > 0 for days in aggregates.windows_days) and aggregates.top_values >= 0,
    f"{PATH}: windows_days must be positive and top_values must not be negative.",
  )
  for name in aggregates.fields:
    vocabularies = [n for n, f in data.fields.items() if f.kind == "vocabulary"]
    require(name in vocabularies, f"{PATH}.fields: {name!r} is not a vocabulary field{nearest(name, vocabularies)}")
    require(not data.fields[name].many, f"{PATH}.fields: {name!r} holds lists; leave it out.")
    require(
      not data.fields[name].buckets,
      f"{PATH}.fields: config.data.fields.{name}.buckets={data.fields[name].buckets} lets values share "
      "codes; leave it out, or name a second field of the same column without buckets.",
    )
    _require_input(f"{PATH}.fields", name, data)
  for key in _ADDED:
    given = getattr(aggregates, key)
    require(
      aggregates.enabled or not given,
      f"{PATH}.{key}={given} has no meaning with enabled=False; remove it, or set enabled=True.",
    )
    require(len(set(given)) == len(given), f"{PATH}.{key}={given} names a field twice; name it once.")
  for key in ("paces", "habits"):
    require(
      aggregates.enabled or not getattr(aggregates, key),
      f"{PATH}.{key}=True has no meaning with enabled=False; remove it, or set enabled=True.",
    )
  _check_numbers(data)
  for name in aggregates.distinct:
    require(name in data.fields, f"{PATH}.distinct: {name!r} is not a field{nearest(name, data.fields)}")
    require(data.fields[name].kind != "vector", f"{PATH}.distinct: {name!r} is a vector field; leave it out.")
    _require_input(f"{PATH}.distinct", name, data)
  categorical = [n for n, f in data.fields.items() if f.kind in ("vocabulary", "hash")]
  for name in aggregates.factors:
    require(name in categorical, f"{PATH}.factors: {name!r} is not a categorical field{nearest(name, categorical)}")
    _require_input(f"{PATH}.factors", name, data)
  for name, number in aggregates.factor_numbers.items():
    key = f"{PATH}.factor_numbers.{name}"
    require(name in aggregates.factors, f"{key}: config.data.aggregates.factors does not name {name!r}; add it there.")
    _check_number(key, number, data)
  require(aggregates.factor_size > 0, f"{PATH}.factor_size={aggregates.factor_size} must be positive.")
  for name, condition in aggregates.conditions.items():
    key = f"{PATH}.conditions.{name}"
    require(bool(condition.strip()), f"{key} is empty; write it as in \"type == 'buy' and amount >= 50\".")
    check_condition(key, condition, data)
    for compared in comparisons(parse_condition(condition, key)):
      if compared.field:  # count() takes none
        _require_input(key, compared.field, data)


def _check_numbers(data: Data) -> None:
  aggregates = data.aggregates
  for key in ("sums", "means", "trends"):
    for name in getattr(aggregates, key):
      _check_number(f"{PATH}.{key}", name, data)
  require(
    not aggregates.trends or bool(aggregates.windows_days),
    f"{PATH}.trends={aggregates.trends} needs windows to compare, but windows_days is empty; name at least one.",
  )


def _check_number(path: str, name: str, data: Data) -> None:
  """Requires that `name` is a numeric field of the events whose encoding keeps amounts."""
  numeric = [n for n, f in data.fields.items() if f.kind == "numeric"]
  require(name in numeric, f"{path}: {name!r} is not a numeric field{nearest(name, numeric)}")
  _require_input(path, name, data)
  field = data.fields[name]
  require(
    field.encoding != "quantile",
    f"{path}: {name!r} is encoded as quantiles, which keep no amounts; set config.data.fields.{name}."
    f"encoding='log1p', or name a second field, such as {name}_amount=dict(column={field.column or name!r}, "
    "kind='numeric', encoding='log1p').",
  )


def _require_input(path: str, name: str, data: Data) -> None:
  require(
    data.fields[name].table == "events",
    f"{path}: {name!r} is of the table of users, the same at every event; leave it out.",
  )
  require(
    data.fields[name].input,
    f"{path} holds {name!r}, which the model must not see (config.data.fields.{name}.input is False); leave it out.",
  )
