"""What is known of an event log as a whole, put together from what is known of parts of it.

Of counts the sum is taken. Users are in one part only, with all of their events.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from supermoe_jax import config
from supermoe_jax.config import format_time
from supermoe_jax.data.reading.sources import Reading
from supermoe_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class FieldStatistics:
  """What events hold of a field.

  Attributes:
    absent: how many events of the sources that carry it have no value.
    present: how many events have one.
    training: how many of them lie in training.
    cut: how many values lists have beyond those that the field keeps.
    sum: the sum of the numbers in training; 0.0 of other kinds of fields.
    deviation: their standard deviation.
    low: the least of them.
    high: the greatest.
  """

  absent: int = 0
  present: int = 0
  training: int = 0
  cut: int = 0
  sum: float = 0.0
  deviation: float = 0.0
  low: float = math.inf
  high: float = -math.inf

  @property
  def mean(self) -> float:
    """The mean of the numbers in training, of which there is one at least."""
    return self.sum / self.training

  @classmethod
  def merge(cls, parts: Sequence[FieldStatistics]) -> FieldStatistics:
    """The facts of all parts together."""
    counts = {name: sum(getattr(p, name) for p in parts) for name in ("absent", "present", "training", "cut")}
    trained = [p for p in parts if p.training]
    if len(trained) < 2:
      return dataclasses.replace(trained[0] if trained else cls(), **counts)
    low, high = min(p.low for p in trained), max(p.high for p in trained)
    n, means, deviations = (np.array([getattr(p, k) for p in trained]) for k in ("training", "mean", "deviation"))
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers beyond all measure
      total = float(np.sum([p.sum for p in trained]))
      squares = n * (np.square(deviations) + np.square(means - total / n.sum()))
      # Of a constant the means may differ in their last bits, which would be taken for a deviation.
      deviation = 0.0 if low == high else float(np.sqrt(np.sum(squares) / n.sum()))
    return cls(**counts, sum=total, deviation=deviation, low=low, high=high)


@dataclasses.dataclass(frozen=True)
class LogStatistics:
  """What is known of events that were read.

  Attributes:
    events: how many are kept.
    users: of how many users.
    training: how many events lie in training.
    first: the first one's time, microseconds since 1970 UTC; None without events.
    last: the last one's time.
    tied: how many share user and time with another.
    duplicates: how many rows repeat an earlier one, whether they are kept or not.
    kept: of each source how many events are kept.
    fields: what is known of each field.
  """

  events: int
  users: int
  training: int
  first: int | None
  last: int | None
  tied: int
  duplicates: int
  kept: list[int]
  fields: dict[str, FieldStatistics]

  @classmethod
  def merge(cls, parts: Sequence[LogStatistics], data: config.Data) -> LogStatistics:
    """The facts of all parts of a log together."""
    events, users, training, tied, duplicates = (
      sum(getattr(p, name) for p in parts) for name in ("events", "users", "training", "tied", "duplicates")
    )
    first = min((p.first for p in parts if p.first is not None), default=None)
    last = max((p.last for p in parts if p.last is not None), default=None)
    kept = [sum(p.kept[i] for p in parts) for i in range(len(data.sources))]
    fields = {name: FieldStatistics.merge([p.fields[name] for p in parts]) for name in data.fields}
    return cls(events, users, training, first, last, tied, duplicates, kept, fields)

  @classmethod
  def of_json(cls, saved: Mapping[str, Any]) -> LogStatistics:
    """The facts of what `dataclasses.asdict` made of some, by way of JSON."""
    return cls(**{**saved, "fields": {name: FieldStatistics(**field) for name, field in saved["fields"].items()}})


def log_counts(data: config.Data, reading: Reading, facts: LogStatistics, *, part: bool = False) -> dict[str, Any]:
  """What was read of a log, kept, dropped and found, ready for JSON.

  Raises:
    DataError: no event is left, or none in training, unless it is a `part` of a log.
  """
  dropped = reading.dropped
  if not facts.events:
    listed = ", ".join(f"{reason}: {n}" for reason, n in dropped.items())
    raise DataError(f"No event is left of {reading.rows} rows ({listed}); correct config.data.sources.")
  assert facts.first is not None and facts.last is not None
  if facts.duplicates and data.duplicates == "drop":
    dropped["duplicate"] = facts.duplicates
  if not facts.training and not part and data.split.mode == "user":
    raise DataError(
      f"None of the {facts.users} users has an event in training: by their hash all belong to validation or test, or "
      "their events lie after config.data.split.log_end. Lower user_validation and user_test, or bring more users."
    )
  if not facts.training and not part:
    raise DataError(
      f"No event lies before config.data.split.train_end={data.split.train_end}: the log runs from "
      f"{format_time(facts.first)} to {format_time(facts.last)}. Set a train_end within it."
    )
  return {
    "rows_read": reading.rows,
    "dropped": dropped,
    "duplicate_rows": facts.duplicates,
    "events": facts.events,
    "users": facts.users,
    "training_events": facts.training,
    "tie_rate": facts.tied / facts.events,
    "nulls": {name: field.absent for name, field in facts.fields.items()},
    "first": format_time(facts.first),
    "last": format_time(facts.last),
    "user_rows_dropped": reading.user_rows_dropped,
    "sources": {
      name: {**counts, "rows_kept": facts.kept[list(data.sources).index(name)]}
      for name, counts in reading.sources.items()
    },
    "rows_kept": facts.events,
  }
