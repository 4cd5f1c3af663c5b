"""Finds numbers far from all others: those that the encoding clips, and one that hides the others of its field.

Numbers of fields with quantiles are never too far, since their ranks count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from supermoe_jax.data.encoding.numeric import MOST_DEVIATIONS, Numeric
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.preparation.log_database import LogDatabase
from supermoe_jax.data.reading.field_sql import field_columns

# One number hides the others of a field if their deviation is at most this share of the deviation with it: then they
# all look alike to the model.
HIDDEN = 0.01
# Only a number that makes up this share of the variance can do so. Where it does not, no query is needed.
SHARE_OF_VARIANCE = 0.99


class OutlyingNumbers(NamedTuple):
  """Outlying numbers of a log: those that are clipped, and those that hide others; see the functions of these names."""

  clipped: dict[str, dict[str, Any]]
  hiding: dict[str, dict[str, Any]]


def clipped_numbers(log: LogDatabase, encoders: Encoders) -> dict[str, dict[str, Any]]:
  """Returns the numbers of a log that the encoding clips, for each field with any.

  Returns: for each such field `count`, and of its first such number `value`, `file`, and `row` from 1.
  """
  out: dict[str, dict[str, Any]] = {}
  for name, encoder in encoders.numeric.items():
    facts = log.facts.fields[name]
    if not isinstance(encoder, Numeric) or not encoder.clips(np.array([facts.least, facts.greatest])).any():
      continue
    column = field_columns(log.data)[name]
    ((count, order, value),) = log.query(
      f"SELECT count(*), min(ord), arg_min({column}, ord) FROM {log.events_sql} WHERE {encoder.clips_sql(column)}"
    )
    if count:
      out[name] = {"count": count, **_row(log, name, order, value)}
  return out


def hiding_numbers(log: LogDatabase) -> dict[str, dict[str, Any]]:
  """Returns a number of training that hides the other numbers of its field, for each field with one.

  Returns: for each such field `value`, `file`, and `row` from 1.
  """
  out: dict[str, dict[str, Any]] = {}
  for name, field in log.data.fields.items():
    facts = log.facts.fields[name]
    if field.kind != "numeric" or field.encoding == "quantile" or not facts.deviation:
      continue
    extreme = max(facts.low, facts.high, key=lambda end: abs(end - facts.mean))
    share = ((extreme - facts.mean) / facts.deviation) ** 2 / facts.training
    if share < SHARE_OF_VARIANCE:
      continue
    column = field_columns(log.data)[name]
    ((others, order),) = log.query(
      f"SELECT stddev_pop({column}) FILTER ({column} <> {extreme!r}::DOUBLE), "
      f"min(ord) FILTER ({column} = {extreme!r}::DOUBLE) FROM {log.events_sql} WHERE training"
    )
    # A field that is the same number but once, such as a rare 1 among zeros, is no slip.
    if others and others <= HIDDEN * facts.deviation:
      out[name] = _row(log, name, order, extreme)
  return out


def _row(log: LogDatabase, name: str, order: int, value: float) -> dict[str, Any]:
  if log.data.fields[name].encoding == "log1p":
    value = math.copysign(math.expm1(abs(value)), value)
  file, row = log.place(order)
  return {"value": value, "file": file, "row": row}


def merge_clipped(*parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """Returns the clipped numbers of several parts of a log, the earlier part's first one of each field."""
  out: dict[str, dict[str, Any]] = {}
  for part in parts:
    for name, found in part.items():
      before = out.get(name, {"count": 0})
      out[name] = {**found, **before, "count": before["count"] + found["count"]}
  return out


def clipped_text(name: str, found: Mapping[str, Any]) -> str:
  """Returns a sentence about the clipped numbers of a field."""
  n = found["count"]
  return (
    f"field {name}: {n:,} number{'s lie' if n > 1 else ' lies'} more than {MOST_DEVIATIONS:,.0f} deviations from the "
    f"mean of training and {'were' if n > 1 else 'was'} clipped to there{', first' if n > 1 else ''}: "
    f"{found['value']:g} ({found['file']} row {found['row']:,})"
  )


def hiding_text(name: str, found: Mapping[str, Any]) -> str:
  """Returns a sentence about a number that hides the others of its field."""
  return (
    f"field {name}: one number, {found['value']:g} ({found['file']} row {found['row']:,}), makes up nearly all of the "
    f"deviation, and the others look alike to the model. Correct the row, or set config.data.fields.{name}.encoding to "
    "'log1p' or 'quantile'"
  )
