"""Counts times that may be censored by intervals.

A time is `(days, observed)`: with `observed` 1 an event happens after these days; with 0 none happened within them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def survived_intervals(value: np.ndarray, edges: Sequence[float]) -> np.ndarray:
  """Returns the number of intervals that each of the times `value [n, 2]` survived: int64 `[n]`.

  `edges [K]` are the intervals' ends in days, ascending. The event of an observed time lies in the next interval.
  """
  survived = np.searchsorted(np.array(edges, np.float32), value[:, 0].astype(np.float32), side="right")
  # In float32 an event just before the last edge may lie at it.
  return np.where(value[:, 1] > 0, np.minimum(survived, len(edges) - 1), survived)


def interval_counts(value: np.ndarray, edges: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the number of events in each interval, and of times `value [n, 2]` that count there.

  A time counts in the intervals that it survived and in that of its event. The ratio of the two numbers is the
  Kaplan-Meier estimate of the interval's hazard, if times are censored at edges only.

  Returns: int64 `[K]` each.
  """
  survived, observed = survived_intervals(value, edges), value[:, 1] > 0
  k = len(edges)
  events = np.bincount(survived[observed], minlength=k)
  ended = np.bincount(survived[~observed], minlength=k + 1)[:k]  # censored where the interval begins
  left = len(value) - np.append(0, np.cumsum(events + ended)[:-1])
  return events, left - ended


def chances_by_day(hazards: np.ndarray) -> np.ndarray:
  """Returns the chance of an event by the end of each interval, from the intervals' hazards `[..., K]`."""
  return np.asarray(1 - np.cumprod(1 - hazards, axis=-1))


def expected_days(chances: np.ndarray, edges: Sequence[float]) -> np.ndarray:
  """Returns the expected days until the event or the last edge, whichever comes first: float64 `[...]`.

  `chances [..., K]` are those of an event by each edge. Within an interval the event is as likely at any moment.
  """
  survival = np.concatenate([np.ones((*chances.shape[:-1], 1)), 1 - chances], axis=-1)
  return np.asarray((survival[..., 1:] + survival[..., :-1]) / 2 @ np.diff(edges, prepend=0.0))
