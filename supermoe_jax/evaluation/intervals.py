"""Computes 95 % intervals: over seeds, over folds, from resamples, and of shares.

Intervals over users without resampling are in `influence`.
Shapes: J scores of folds, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.special import stdtrit

LEVEL = 0.95

# The two ends of an interval.
Bounds = tuple[float, float]


class Interval(NamedTuple):
  """An estimate and its 95 % interval; the ends are None if there are too few values for one."""

  value: float | None
  low: float | None = None
  high: float | None = None

  @property
  def half(self) -> float | None:
    """Returns half of the interval's width."""
    return None if self.low is None or self.high is None else (self.high - self.low) / 2


def interval_from_folds(scores: Sequence[float | None], asked_share: float) -> Interval:
  """Returns the mean of J folds' scores with the corrected resampled t interval; leaves out scores that are None.

  Folds share most of their fitted rows, so the plain standard error is too small. The variance is therefore multiplied
  by 1/J + `asked_share` instead of 1/J; `asked_share` is (predicted rows / fitted rows).
  Source: Nadeau & Bengio, "Inference for the Generalization Error", Machine Learning 52, 2003; for repeated folds
  Bouckaert & Frank, "Evaluating the Replicability of Significance Tests for Comparing Learning Algorithms", 2004.
  """
  x = np.array([s for s in scores if s is not None], np.float64)
  if len(x) < 2:
    return Interval(float(x[0]) if len(x) else None)
  half = float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) * math.sqrt(1 / len(x) + asked_share))
  mean = float(x.mean())
  return Interval(mean, mean - half, mean + half)


def interval_from_resamples(value: float | None, resampled: np.ndarray) -> Interval:
  """Returns `value` with the 2.5 % and 97.5 % percentiles of the finite values in `resampled [R]`."""
  known = resampled[np.isfinite(resampled)]
  if value is None or len(known) < 2:
    return Interval(value)
  low, high = np.percentile(known, (2.5, 97.5))
  return Interval(value, float(low), float(high))


def mean_interval(found: Sequence[Interval]) -> Interval:
  """Returns the mean value with the mean half-width: exact if the values err together, else too wide."""
  values = [i.value for i in found if i.value is not None]
  halves = [i.half for i in found if i.half is not None]
  value = float(np.mean(values)) if values else None
  if value is None or len(halves) < len(values):
    return Interval(value)
  half = float(np.mean(halves))
  return Interval(value, value - half, value + half)


def student_t(values: Sequence[float]) -> Interval:
  """Returns the mean of independent values, such as one a seed, with its Student-t interval; None without values."""
  x = np.array(list(values), np.float64)
  if len(x) < 2:
    return Interval(float(x[0]) if len(x) else None)
  mean, half = float(x.mean()), float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / math.sqrt(len(x)))
  return Interval(mean, mean - half, mean + half)


def wilson(hits: float, count: int) -> Bounds:
  """Returns the interval of a share: `hits` among `count` independent trials.

  Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
  """
  z = float(stats.norm.ppf((1 + LEVEL) / 2))
  share = hits / count
  centre = (share + z * z / (2 * count)) / (1 + z * z / count)
  half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
  return max(0.0, centre - half), min(1.0, centre + half)
