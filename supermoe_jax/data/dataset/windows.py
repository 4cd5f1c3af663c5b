"""Lays out windows of histories and their snapshots as the encoder reads them: one user per row, or several.

Shapes: B rows, L events, S snapshots, F categorical, G numeric and K vector fields, A aggregates, V numbers of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from supermoe_jax.batch import CALENDAR, Features
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory

if TYPE_CHECKING:
  from supermoe_jax.data.dataset.dataset import Dataset

MICROSECONDS_PER_HOUR = MICROSECONDS_PER_DAY // 24


class Encoding(Protocol):
  """The part of a dataset that windows need: hidden columns and aggregates. Exported encoders have it too."""

  @property
  def hidden_codes(self) -> tuple[int, ...]:
    """Returns the columns of the codes that the model must not see."""

  @property
  def hidden_numeric(self) -> tuple[int, ...]:
    """Returns the columns of the numbers that the model must not see."""

  @property
  def vector_columns(self) -> tuple[int, ...]:
    """Returns the columns of the codes of vectors."""

  def vectors(self, codes: np.ndarray, own: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Returns the vectors with `codes […, K]` as batches hold them: float16 `[…, V]`; `own` as in `UserHistory`."""

  def aggregates(self, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    """Returns standardised aggregates `[S, A]` at snapshots of a block's users; see `Dataset.aggregates`."""


def calendar_phases(time: np.ndarray) -> np.ndarray:
  """Returns sine and cosine of the phases of day, week and year: microseconds `[…]` → float32 `[…, 6]`."""
  periods = np.array([1.0, 7.0, 365.2425]) * MICROSECONDS_PER_DAY
  angle = 2 * np.pi * ((time[..., None] % periods) / periods)
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


def hours(microseconds: np.ndarray) -> np.ndarray:
  """Returns microseconds as float32 hours."""
  return (microseconds / MICROSECONDS_PER_HOUR).astype(np.float32)


class _EventFeatures(NamedTuple):
  """The features of N events that do not depend on where a window begins; shapes as in `Features`."""

  codes: np.ndarray
  source: np.ndarray
  numeric: np.ndarray
  calendar: np.ndarray
  gap: np.ndarray


def _events(
  dataset: Encoding, time: np.ndarray, previous: np.ndarray, source: np.ndarray, codes: np.ndarray, numeric: np.ndarray
) -> _EventFeatures:
  """Returns the features of N events; `previous [N]` are the times of their users' previous events.

  Columns that the model must not see are hidden.
  """
  codes, numeric = codes.astype(np.int32), numeric.astype(np.float32)
  codes[:, list(dataset.hidden_codes)] = 0
  numeric[:, list(dataset.hidden_numeric)] = np.nan
  return _EventFeatures(codes, (source + 1).astype(np.int32), numeric, calendar_phases(time), hours(time - previous))


def window_features(
  dataset: Encoding,
  history: UserHistory,
  start: int,
  stop: int,
  snapshot_time: np.ndarray,
  snapshot_events: np.ndarray,
  aggregates: np.ndarray | None = None,
) -> Features:
  """Returns the events [start, stop) of a history and its snapshots, without a batch dimension and without padding.

  A snapshot sees the events [start, snapshot_events). Without given `aggregates`, they are computed from the whole
  history before τ.
  """
  n, s = stop - start, len(snapshot_time)
  time = history.time[start:stop]
  previous = history.time[max(start - 1, 0) : stop - 1] if start else np.append(time[:1], time[:-1])
  origin = time[0] if n else (snapshot_time[0] if s else 0)
  if aggregates is None:
    aggregates = dataset.aggregates(history.block, np.zeros(s, np.int64), snapshot_time, snapshot_events)
  events = _events(dataset, time, previous, *(x[start:stop] for x in (history.source, history.codes, history.numeric)))
  last = history.time[np.maximum(snapshot_events - 1, 0)]
  return Features(
    *events[:4],
    time=hours(time - origin),
    gap=events.gap,
    segment=np.ones(n, np.int32),
    query_events=(snapshot_events - start).astype(np.int32),
    query_segment=np.ones(s, np.int32),
    query_time=hours(snapshot_time - origin),
    query_gap=hours(snapshot_time - last),
    query_calendar=calendar_phases(snapshot_time),
    query_aggregates=aggregates.astype(np.float32),
    vectors=dataset.vectors(history.codes[start:stop, list(dataset.vector_columns)], history.own_vectors),
  )


class BlockWindows:
  """A maker of windows with one snapshot each for a block's users, many at a time; `window` gives the same rows."""

  def __init__(self, dataset: Encoding, block: UserBlock):
    """Computes the features that do not depend on the windows."""
    previous = np.append(block.time[:1], block.time[:-1])
    first = block.offsets[:-1][block.lengths > 0]
    previous[first] = block.time[first]
    self._block, self._dataset = block, dataset
    self._events = _events(dataset, block.time, previous, block.source, block.codes, block.numeric)
    self._vector_codes = block.codes[:, list(dataset.vector_columns)]

  def __call__(self, user: np.ndarray, time: np.ndarray, n_events: np.ndarray, length: int) -> Features:
    """Returns R rows of `length` events: the last events of the users `user [R]` of the block before `time [R]` (µs).

    `n_events [R]`, at least one, is the number of events before τ; aggregates see all of them.
    """
    block, first = self._block, self._block.offsets[user]
    shown = np.minimum(n_events, length)
    start = first + n_events - shown
    inside = np.arange(length) < shown[:, None]
    place = np.where(inside, start[:, None] + np.arange(length), 0)

    def gathered(values: np.ndarray, padding: float = 0) -> np.ndarray:
      found = values[place]
      found[~inside] = padding
      return found

    events, origin = self._events, block.time[start]
    asked = np.ones((len(user), 1), np.int32)
    last = block.time[first + n_events - 1]
    return Features(
      codes=gathered(events.codes),
      source=gathered(events.source),
      numeric=gathered(events.numeric, np.nan),
      calendar=gathered(events.calendar),
      time=np.where(inside, hours(block.time[place] - origin[:, None]), np.float32(0)),
      gap=gathered(events.gap),
      segment=inside.astype(np.int32),
      query_events=shown.astype(np.int32)[:, None],
      query_segment=asked,
      query_time=hours(time - origin)[:, None],
      query_gap=hours(time - last)[:, None],
      query_calendar=calendar_phases(time)[:, None],
      query_aggregates=self._dataset.aggregates(block, user, time, n_events)[:, None],
      vectors=self._dataset.vectors(gathered(self._vector_codes)),
    )


def blank(dataset: Dataset, rows: int, length: int) -> Features:
  """Returns rows of padding, with `length` events and one snapshot each."""
  schema = dataset.schema
  columns = {"codes": len(schema.categorical) + len(schema.extra_columns), "numeric": len(schema.numeric)}
  columns |= {"vectors": sum(schema.vectors.values())}
  columns |= {"calendar": CALENDAR, "query_calendar": CALENDAR, "query_aggregates": schema.aggregates}
  types: dict[str, type] = dict.fromkeys(("codes", "source", "segment", "query_events", "query_segment"), np.int32)
  types["vectors"] = np.float16
  return Features(
    **{
      name: np.zeros(
        (rows, 1 if name.startswith("query_") else length, *((columns[name],) if name in columns else ())),
        types.get(name, np.float32),
      )
      for name in Features._fields
    }
  )


def join_features(parts: Sequence[Features], max_events: int, n_snapshots: int) -> Features:
  """Returns the parts of one or more users as one row, one user after the other and padding at the end.

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
  row.vectors[n:] = np.nan
  return row


def pad(columns: Sequence[np.ndarray], size: int) -> np.ndarray:
  """Returns the arrays one after the other, with zeros at the end: `[size, …]`."""
  out = np.zeros((size, *columns[0].shape[1:]), columns[0].dtype)
  place = 0
  for x in columns:
    out[place : place + len(x)] = x
    place += len(x)
  return out


def window(
  dataset: Encoding,
  history: UserHistory,
  start: int,
  stop: int,
  snapshot_time: np.ndarray,
  snapshot_events: np.ndarray,
  max_events: int,
  n_snapshots: int,
  aggregates: np.ndarray | None = None,
) -> Features:
  """Returns one user as one padded row; see `window_features` and `join_features`."""
  whole = window_features(dataset, history, start, stop, snapshot_time, snapshot_events, aggregates)
  return join_features([whole], max_events, n_snapshots)


def stack(rows: Sequence[Any]) -> Any:
  """Returns a batch of rows of equal structure."""
  first = rows[0]
  if isinstance(first, dict):
    return {k: stack([r[k] for r in rows]) for k in first}
  if isinstance(first, tuple):
    return type(first)(*(stack(column) for column in zip(*rows)))
  return np.stack(rows)
