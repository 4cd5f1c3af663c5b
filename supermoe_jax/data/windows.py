"""Windows of histories with snapshots of them, laid out as the encoder reads them: a user a row, or several.

Shapes: B rows, L events, S snapshots, F categorical and G numeric fields, A aggregates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.histories import UserHistory

MICROSECONDS_PER_HOUR = MICROSECONDS_PER_DAY // 24

# Numbers that describe a moment in the calendar; see `calendar_phases`.
CALENDAR = 6

# A NumPy array on the host, a JAX array inside a step.
Array = Any


class Features(NamedTuple):
  """What the encoder sees.

  Attributes:
    codes: int32 `[B, L, F]`, columns as in `events.UserHistory`; 0 absent, padding, or a field that is no input.
    source: int32 `[B, L]`; 0 padding, otherwise 1 + the source's index.
    numeric: float32 `[B, L, G]`; NaN absent, padding, or a field that is no input.
    calendar: float32 `[B, L, 6]`, phases of day, week and year.
    time: float32 `[B, L]`, hours since the first event of its user in the row.
    gap: float32 `[B, L]`, hours since the user's previous event; 0 for the first.
    segment: int32 `[B, L]`, the user of each event: the users of a row lie one behind the other, numbered from 1; 0 is
      padding. Only a packed row holds more than one.
    query_events: int32 `[B, S]`, how many of its user's events in the row a snapshot sees.
    query_segment: int32 `[B, S]`, the user of each snapshot; 0 where there is none.
    query_time: float32 `[B, S]`, hours since its user's first event in the row.
    query_gap: float32 `[B, S]`, hours since the last event that the snapshot sees.
    query_calendar: float32 `[B, S, 6]`.
    query_aggregates: float32 `[B, S, A]`, standardised.
  """

  codes: Array
  source: Array
  numeric: Array
  calendar: Array
  time: Array
  gap: Array
  segment: Array
  query_events: Array
  query_segment: Array
  query_time: Array
  query_gap: Array
  query_calendar: Array
  query_aggregates: Array

  @property
  def length(self) -> Array:
    """int `[B]`, events that are not padding."""
    return (self.segment > 0).sum(axis=-1)

  @property
  def query_valid(self) -> Array:
    """bool `[B, S]`, whether there is a snapshot."""
    return self.query_segment > 0


def calendar_phases(time: np.ndarray) -> np.ndarray:
  """Sine and cosine of the phase of the day, the week and the year: float32 `[…, 6]` of microseconds `[…]`."""
  periods = np.array([1.0, 7.0, 365.2425]) * MICROSECONDS_PER_DAY
  angle = 2 * np.pi * ((time[..., None] % periods) / periods)
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


def part(
  dataset: Dataset,
  history: UserHistory,
  start: int,
  stop: int,
  snapshot_time: np.ndarray,
  snapshot_events: np.ndarray,
  aggregates: np.ndarray | None = None,
) -> Features:
  """The events [start, stop) of a history and snapshots of it, without a batch dimension and without padding.

  Snapshots see the events [start, snapshot_events); their aggregates, where none are given, see the whole history
  before τ.
  """
  n, s = stop - start, len(snapshot_time)
  time = history.time[start:stop]
  previous = history.time[max(start - 1, 0) : stop - 1] if start else np.append(time[:1], time[:-1])
  origin = time[0] if n else (snapshot_time[0] if s else 0)

  def hours(x: np.ndarray) -> np.ndarray:
    return (x / MICROSECONDS_PER_HOUR).astype(np.float32)

  if aggregates is None:
    aggregates = dataset.aggregates(history, snapshot_time, snapshot_events)
  codes, numeric = history.codes[start:stop].astype(np.int32), history.numeric[start:stop].astype(np.float32)
  codes[:, list(dataset.hidden_codes)] = 0
  numeric[:, list(dataset.hidden_numeric)] = np.nan
  last = history.time[np.maximum(snapshot_events - 1, 0)]
  return Features(
    codes=codes,
    source=(history.source[start:stop] + 1).astype(np.int32),
    numeric=numeric,
    calendar=calendar_phases(time),
    time=hours(time - origin),
    gap=hours(time - previous),
    segment=np.ones(n, np.int32),
    query_events=(snapshot_events - start).astype(np.int32),
    query_segment=np.ones(s, np.int32),
    query_time=hours(snapshot_time - origin),
    query_gap=hours(snapshot_time - last),
    query_calendar=calendar_phases(snapshot_time),
    query_aggregates=aggregates.astype(np.float32),
  )


def join(parts: Sequence[Features], max_events: int, n_snapshots: int) -> Features:
  """Lays the parts of one or more users out as one row, one user behind the other and padding at the end.

  Raises:
    ValueError: there are more events than `max_events`, or more snapshots than `n_snapshots`.
  """
  n, s = (sum(len(x) for x in column) for column in zip(*((p.segment, p.query_segment) for p in parts)))
  if n > max_events or s > n_snapshots:
    raise ValueError(f"{n} events and {s} snapshots do not fit a row of {max_events} and {n_snapshots}")
  parts = [
    p._replace(segment=p.segment * (i + 1), query_segment=p.query_segment * (i + 1)) for i, p in enumerate(parts)
  ]
  of_snapshots = [name.startswith("query_") for name in Features._fields]
  row = Features(
    *(pad(column, n_snapshots if asked else max_events) for column, asked in zip(zip(*parts), of_snapshots))
  )
  row.numeric[n:] = np.nan
  return row


def pad(columns: Sequence[np.ndarray], size: int) -> np.ndarray:
  """One array behind the other, `[size, …]`, and 0 behind them."""
  out = np.zeros((size, *columns[0].shape[1:]), columns[0].dtype)
  place = 0
  for x in columns:
    out[place : place + len(x)] = x
    place += len(x)
  return out


def window(
  dataset: Dataset,
  history: UserHistory,
  start: int,
  stop: int,
  snapshot_time: np.ndarray,
  snapshot_events: np.ndarray,
  max_events: int,
  n_snapshots: int,
  aggregates: np.ndarray | None = None,
) -> Features:
  """Lays out one user as one row, padded; see `part` and `join`."""
  whole = part(dataset, history, start, stop, snapshot_time, snapshot_events, aggregates)
  return join([whole], max_events, n_snapshots)


def stack(rows: Sequence[Any]) -> Any:
  """Stacks rows of equal structure into a batch."""
  first = rows[0]
  if isinstance(first, dict):
    return {k: stack([r[k] for r in rows]) for k in first}
  if isinstance(first, tuple):
    return type(first)(*(stack(column) for column in zip(*rows)))
  return np.stack(rows)
