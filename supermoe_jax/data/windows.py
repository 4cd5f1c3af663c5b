"""Windows of a history with snapshots of it, laid out as the encoder reads them.

Shapes: B rows, L events, S snapshots, F categorical and G numeric fields, A aggregates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.events import UserHistory

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
    time: float32 `[B, L]`, hours since the row's first event.
    gap: float32 `[B, L]`, hours since the user's previous event; 0 for the first.
    length: int32 `[B]`, events that are not padding.
    query_events: int32 `[B, S]`, how many of the row's events a snapshot sees.
    query_valid: bool `[B, S]`, whether there is a snapshot.
    query_time: float32 `[B, S]`, hours since the row's first event.
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
  length: Array
  query_events: Array
  query_valid: Array
  query_time: Array
  query_gap: Array
  query_calendar: Array
  query_aggregates: Array


def calendar_phases(time: np.ndarray) -> np.ndarray:
  """Sine and cosine of the phase of the day, the week and the year: float32 `[…, 6]` of microseconds `[…]`."""
  periods = np.array([1.0, 7.0, 365.2425]) * MICROSECONDS_PER_DAY
  angle = 2 * np.pi * ((time[..., None] % periods) / periods)
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


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
  """Lays out the events [start, stop) of a history and snapshots of it as one row (no batch dimension).

  Snapshots see the events [start, snapshot_events); their aggregates, where none are given, see the whole history
  before τ.

  Raises:
    ValueError: there are more events than `max_events`, or more snapshots than `n_snapshots`.
  """
  n, s = stop - start, len(snapshot_time)
  if n > max_events or s > n_snapshots:
    raise ValueError(f"{n} events and {s} snapshots do not fit a row of {max_events} and {n_snapshots}")
  time = history.time[start:stop]
  previous = history.time[max(start - 1, 0) : stop - 1] if start else np.append(time[:1], time[:-1])
  origin = time[0] if n else (snapshot_time[0] if s else 0)

  def pad(x: np.ndarray, size: int, dtype: Any, fill: float = 0) -> np.ndarray:
    out = np.full((size, *x.shape[1:]), fill, dtype)
    out[: len(x)] = x
    return out

  def hours(x: np.ndarray) -> np.ndarray:
    return x / MICROSECONDS_PER_HOUR

  if aggregates is None:
    aggregates = dataset.aggregates(history, snapshot_time, snapshot_events)
  codes = pad(history.codes[start:stop], max_events, np.int32)
  numeric = pad(history.numeric[start:stop], max_events, np.float32, np.nan)
  for column in dataset.hidden_codes:
    codes[:, column] = 0
  for column in dataset.hidden_numeric:
    numeric[:, column] = np.nan
  last = history.time[np.maximum(snapshot_events - 1, 0)]
  return Features(
    codes=codes,
    source=pad(history.source[start:stop] + 1, max_events, np.int32),
    numeric=numeric,
    calendar=pad(calendar_phases(time), max_events, np.float32),
    time=pad(hours(time - origin), max_events, np.float32),
    gap=pad(hours(time - previous), max_events, np.float32),
    length=np.int32(n),
    query_events=pad(snapshot_events - start, n_snapshots, np.int32),
    query_valid=pad(np.ones(s, bool), n_snapshots, bool),
    query_time=pad(hours(snapshot_time - origin), n_snapshots, np.float32),
    query_gap=pad(hours(snapshot_time - last), n_snapshots, np.float32),
    query_calendar=pad(calendar_phases(snapshot_time), n_snapshots, np.float32),
    query_aggregates=pad(aggregates, n_snapshots, np.float32),
  )


def stack(rows: Sequence[Any]) -> Any:
  """Stacks rows of equal structure into a batch."""
  first = rows[0]
  if isinstance(first, dict):
    return {k: stack([r[k] for r in rows]) for k in first}
  if isinstance(first, tuple):
    return type(first)(*(stack(column) for column in zip(*rows)))
  return np.stack(rows)
