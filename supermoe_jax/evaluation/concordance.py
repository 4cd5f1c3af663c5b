"""Computes Harrell's concordance of predicted times with times that may be censored, and each label's influence on it.

A pair of labels has an order if the earlier one ends with an event. At equal times an event comes before a censored
label, and two events have no order. The concordance is the share of these pairs whose predictions have the same order;
equal predictions count half. Source: Harrell et al. 1982, https://doi.org/10.1001/jama.1982.03320430047030.

Shapes: n labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class PairCounts(NamedTuple):
  """For each label, float64 `[n]`: the pairs with an order that it belongs to, and those that predictions order right.

  A pair with equal predictions counts half in `right`.
  """

  ordered: np.ndarray
  right: np.ndarray


def pair_counts(value: np.ndarray, predicted: np.ndarray) -> PairCounts:
  """Returns the counts of pairs of times `value [n, 2]` (days, observed) by predicted days `predicted [n]`.

  The labels lie in the order of time. Blocks of twice the size are split again and again; in each, the events of the
  first half are compared with the second half, all blocks of a size at once. That takes n log n steps.
  """
  n = len(value)
  _, rank = np.unique(predicted, return_inverse=True)
  order = np.lexsort((rank, value[:, 1] <= 0, value[:, 0]))
  event, rank = value[order, 1] > 0, rank[order]
  ordered, right = np.zeros(n), np.zeros(n)
  # The places in the order of time; within each block, from its start on, by predicted time.
  place, at = np.argsort(rank, kind="stable"), np.arange(n)
  for level in reversed(range(max(n - 1, 0).bit_length())):
    half = 1 << level
    start = at & -(2 * half)
    stop = np.minimum(start + 2 * half, n)
    later = (place & half) > 0
    earlier = ~later & event[place]
    later_before, earlier_before = (np.append(0, np.cumsum(of_half)) for of_half in (later, earlier))
    # A label counts the other half's labels with shorter predictions, and half of those with equal ones.
    new = np.append(True, np.diff(rank[place]) != 0) | (at == start)
    first = np.maximum.accumulate(np.where(new, at, 0))
    last = np.minimum.accumulate(np.where(np.append(new[1:], True), at + 1, n)[::-1])[::-1]
    longer = later_before[stop] - (later_before[first] + later_before[last]) / 2
    shorter = (earlier_before[first] + earlier_before[last]) / 2 - earlier_before[start]
    pairs = np.where(later, earlier_before[stop] - earlier_before[start], later_before[stop] - later_before[start])
    counts = later | earlier
    ordered[place] += np.where(counts, pairs, 0)
    right[place] += np.where(counts, np.where(later, shorter, longer), 0)
    # Split each block into its halves; the order by prediction stays.
    of_later = later_before[:-1] - later_before[start]
    split = np.empty_like(place)
    split[np.where(later, start + half + of_later, at - of_later)] = place
    place = split
  _subtract_simultaneous_events(value[order, 0], event, rank, ordered, right)
  back = np.empty(n, np.int64)
  back[order] = np.arange(n)
  return PairCounts(ordered[back], right[back])


def _subtract_simultaneous_events(
  days: np.ndarray, event: np.ndarray, rank: np.ndarray, ordered: np.ndarray, right: np.ndarray
) -> None:
  """Subtracts the pairs of events at one time; they stand together, in the order of `rank`."""
  new_time = np.append(True, (np.diff(days) != 0) | (np.diff(event) != 0))
  new_rank = new_time | np.append(True, np.diff(rank) != 0)
  length = np.diff(np.append(np.flatnonzero(new_time), len(days)))
  others = np.repeat(length, length) - 1
  same = np.diff(np.append(np.flatnonzero(new_rank), len(days)))
  alike = np.repeat(same, same) - 1
  # Of two such events the one with the shorter prediction stands first, so every pair was counted as right.
  ordered -= np.where(event, others, 0)
  right -= np.where(event, others - alike / 2, 0)
