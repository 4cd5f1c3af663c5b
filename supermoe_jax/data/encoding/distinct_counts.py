"""Counts the distinct values of a field among the events of many ranges.

A value is counted at its first event in a range: there the user's previous event with this value lies before the range.
So a count is the number of events whose previous event is smaller than a bound. A wavelet matrix (Claude, Navarro,
Ordóñez, 2015) gives it in log N steps for each range, however long the range is.

Shapes: N events, m values of an event.
"""

from __future__ import annotations

import numpy as np


def distinct_between(codes: np.ndarray, owner: np.ndarray, starts: np.ndarray, stop: np.ndarray) -> np.ndarray:
  """Returns the numbers of distinct values among the events [start, stop) of one user each: int64 `[…, S]`.

  Args:
    codes: `[N, m]`, the values of events, as numbers from 0; 0 is no value.
    owner: `[N]`, the user of each event; users are in order.
    starts: `[…, S]`, the first event of each range.
    stop: `[S]`, the end of each range, at least its start; both lie within one user's events.
  """
  many = codes.shape[1]
  value = codes.reshape(-1).astype(np.int64)
  value += np.repeat(owner, many) * (int(value.max(initial=0)) + 1) * (value > 0)
  order = np.argsort(value, kind="stable")
  same = np.diff(value[order], prepend=-1) == 0
  previous = np.full(len(value), -1, np.int64)
  previous[order[same]] = order[np.flatnonzero(same) - 1]
  held = codes.reshape(-1) > 0
  previous[~held] = len(value)  # counted in no range
  begin, end = starts * many, np.broadcast_to(stop * many, starts.shape)
  # Every value before a range has its previous event before it too.
  return _smaller_before(previous + 1, end, begin + 1) - np.append(0, np.cumsum(held))[begin]


def _smaller_before(values: np.ndarray, stop: np.ndarray, bound: np.ndarray) -> np.ndarray:
  """Returns the number of `values [N]` before each place `stop` that are smaller than `bound`: int64.

  Values and bounds lie in [0, N + 1].
  """
  out, start = np.zeros(stop.shape, np.int64), np.zeros(stop.shape, np.int64)
  for bit in range((len(values) + 1).bit_length() - 1, -1, -1):
    one = (values >> bit) & 1 > 0
    zeros = np.append(0, np.cumsum(~one))  # the number of values without the bit before each place
    first, last = zeros[start], zeros[stop]
    larger = (bound >> bit) & 1 > 0  # values without the bit are smaller than such a bound
    out += np.where(larger, last - first, 0)
    start = np.where(larger, zeros[-1] + start - first, first)
    stop = np.where(larger, zeros[-1] + stop - last, last)
    values = np.concatenate([values[~one], values[one]])
  return out
