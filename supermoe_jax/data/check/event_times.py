"""Derives the labels of times to an event from the raw events."""

from __future__ import annotations

import duckdb

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.check.condition_sql import asked_sql


def derive_times(
  con: duckdb.DuckDBPyConnection, data: config.Data, task: config.TimeToEvent, events: str
) -> dict[int, tuple[float, float]]:
  """Returns the label `(days, observed)` of each snapshot of the table `asked` that has one, by the snapshot's number.

  A label is observed until the last edge within the period of its snapshot's split, and censored there. `events` is the
  SQL of the events that the task's condition can be asked of.
  """
  ends = {int(edge * MICROSECONDS_PER_DAY): edge for edge in task.edges}
  found = con.execute(
    "SELECT a.id, a.until - a.time, min(e.time) - a.time FROM asked a "
    f'LEFT JOIN {events} e ON e."user" = a."user" AND e.time >= a.time AND {asked_sql(data, task.where, task.source)} '
    "GROUP BY a.id, a.until, a.time"
  ).fetchall()
  out: dict[int, tuple[float, float]] = {}
  for number, observed, wait in found:
    until = max((end for end in ends if end <= observed), default=0)
    if until:
      out[number] = (ends[until], 0.0) if wait is None or wait >= until else (wait / MICROSECONDS_PER_DAY, 1.0)
  return out
