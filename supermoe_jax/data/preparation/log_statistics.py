"""Computes statistics of a whole event log, and merges the statistics of its parts.

Counts add up, because each user is in one part only, with all events.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from supermoe_jax import config
from supermoe_jax.config import format_time
from supermoe_jax.data.reading.sources import Reading
from supermoe_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class FieldStatistics:
  """Statistics of a field's values in events.

  Attributes:
    absent: the number of events without a value, of sources that carry the field.
    present: the number of events with a value.
    training: the number of events with a value in training.
    cut: the number of values in lists beyond the length that the field keeps.
    sum: the sum of the numbers in training; 0.0 for other kinds of fields.
    deviation: their standard deviation.
    low: the least of them.
    high: the greatest of them.
    least: the least number of all events.
    greatest: the greatest number of all events.
  """

  absent: int = 0
  present: int = 0
  training: int = 0
  cut: int = 0
  sum: float = 0.0
  deviation: float = 0.0
  low: float = math.inf
  high: float = -math.inf
  least: float = math.inf
  greatest: float = -math.inf

  @property
  def mean(self) -> float:
    """Returns the mean of the numbers in training; there must be at least one."""
    return self.sum / self.training

  @classmethod
  def merge(cls, parts: Sequence[FieldStatistics]) -> FieldStatistics:
    """Returns the statistics of all parts together."""
    counts = {name: sum(getattr(p, name) for p in parts) for name in ("absent", "present", "training", "cut")}
    least, greatest = (
      min((p.least for p in parts), default=math.inf),
      max((p.greatest for p in parts), default=-math.inf),
    )
    trained = [p for p in parts if p.training]
    if len(trained) < 2:
      return dataclasses.replace(trained[0] if trained else cls(), **counts, least=least, greatest=greatest)
    low, high = min(p.low for p in trained), max(p.high for p in trained)
    n, means, deviations = (np.array([getattr(p, k) for p in trained]) for k in ("training", "mean", "deviation"))
    with np.errstate(over="ignore", invalid="ignore"):  # for numbers that overflow
      total = float(np.sum([p.sum for p in trained]))
      squares = n * (np.square(deviations) + np.square(means - total / n.sum()))
      # The parts' means of a constant may differ in their last bits, which would look like a deviation.
      deviation = 0.0 if low == high else float(np.sqrt(np.sum(squares) / n.sum()))
    return cls(**counts, sum=total, deviation=deviation, low=low, high=high, least=least, greatest=greatest)


@dataclasses.dataclass(frozen=True)
class LogStatistics:
  """Statistics of the events of a log, or of a part of it.

  Attributes:
    events: the number of kept events.
    users: the number of users who have them.
    training: the number of events in training.
    first: the first event's time, microseconds since 1970 UTC; None without events.
    last: the last event's time.
    tied: the number of events that share user and time with another event.
    duplicates: the number of rows that repeat an earlier one, whether they are kept or not.
    kept: the number of kept events of each source.
    days: the number of kept events of each day with any, by the number of days since 1970 UTC, ascending.
    fields: the statistics of each field.
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
  days: dict[int, int] = dataclasses.field(default_factory=dict)

  @classmethod
  def merge(cls, parts: Sequence[LogStatistics], data: config.Data) -> LogStatistics:
    """Returns the statistics of all parts of a log together."""
    events, users, training, tied, duplicates = (
      sum(getattr(p, name) for p in parts) for name in ("events", "users", "training", "tied", "duplicates")
    )
    first = min((p.first for p in parts if p.first is not None), default=None)
    last = max((p.last for p in parts if p.last is not None), default=None)
    kept = [sum(p.kept[i] for p in parts) for i in range(len(data.sources))]
    fields = {name: FieldStatistics.merge([p.fields[name] for p in parts]) for name in data.fields}
    days = sum_days(*(p.days for p in parts))
    return cls(events, users, training, first, last, tied, duplicates, kept, fields, days)

  @classmethod
  def of_json(cls, saved: Mapping[str, Any]) -> LogStatistics:
    """Returns the statistics that were saved as JSON of `dataclasses.asdict`."""
    fields = {name: FieldStatistics(**field) for name, field in saved["fields"].items()}
    return cls(**{**saved, "fields": fields, "days": sum_days(saved.get("days", {}))})


def sum_days(*parts: Mapping[int, int] | Mapping[str, int]) -> dict[int, int]:
  """Returns the sums of numbers of events by day, ascending and without zeros; a day may be text, as in JSON."""
  total: Counter[int] = Counter()
  for part in parts:
    total.update({int(day): n for day, n in part.items()})
  return {day: n for day, n in sorted(total.items()) if n}


def log_counts(data: config.Data, reading: Reading, facts: LogStatistics, *, part: bool = False) -> dict[str, Any]:
  """Returns the numbers of rows read, kept and dropped, and further findings of a log, ready for JSON.

  Raises:
    DataError: no event is left; or none is left in training, unless it is a `part` of a log.
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
      f"None of the {facts.users} users has an event in training: their hashes put all of them into validation or "
      "test, or their events lie after config.data.split.log_end. Lower user_validation and user_test, or add users."
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
