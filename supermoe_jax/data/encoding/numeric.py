"""Encodes numbers: standardises them, or replaces them by their standard-normal quantiles."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Sums over threads differ in their last bits from run to run; rounding the statistics removes the difference.
STATISTIC_DIGITS = 10

MAX_KNOTS = 100  # of a quantile encoder
# Standardised numbers are clipped to this many deviations from the mean. Of fewer than a million training numbers none
# can lie farther out. Later ones can, such as a price with a slip in its unit, and would overflow the encoder.
MOST_DEVIATIONS = 1000.0

# Numbers that are standardised are at most this large, so that their deviation is finite: the largest of float32.
LARGEST = float(np.finfo(np.float32).max)

# Beyond the outermost knots the score grows by BEYOND · log(1 + distance / span), where span is that of the knots.
BEYOND = 0.1


def rounded_statistic(value: float) -> float:
  """Returns a statistic rounded to the digits that are the same in every run."""
  return float(f"{value:.{STATISTIC_DIGITS}g}")


@dataclasses.dataclass(frozen=True)
class Numeric:
  """Mean and standard deviation of numbers, after log1p where configured; the deviation of constant numbers is 1."""

  mean: float
  std: float

  @classmethod
  def of(cls, mean: float, std: float) -> Numeric:
    """Makes the encoder from statistics, rounded to the digits that are the same in every run."""
    mean, std = rounded_statistic(mean), rounded_statistic(std)
    return cls(mean, std if std > 0 else 1.0)

  def encode(self, value: float, encoding: str = "standardise") -> np.float32:
    """Returns a raw number standardised, as events hold it; log1p comes first if it is the field's `encoding`."""
    if encoding == "log1p":
      value = math.copysign(math.log(1 + abs(value)), value)
    return np.float32(self.encode_all(np.array([value], np.float64))[0])

  def encode_all(self, values: np.ndarray) -> np.ndarray:
    """Returns numbers `[N]` of the log, after log1p where configured, standardised: float32 `[N]`; NaN stays NaN.

    Numbers more than `MOST_DEVIATIONS` from the mean are clipped.
    """
    return np.clip(self._deviations(values), -MOST_DEVIATIONS, MOST_DEVIATIONS).astype(np.float32)

  def clips(self, values: np.ndarray) -> np.ndarray:
    """Returns whether `encode_all` clips each number of `[N]`: bool `[N]`."""
    return np.abs(self._deviations(values)) > MOST_DEVIATIONS

  def clips_sql(self, column: str) -> str:
    """Returns the SQL of `clips` of a column."""
    return f"abs(({column} - {self.mean!r}::DOUBLE) / {self.std!r}::DOUBLE) > {MOST_DEVIATIONS}"

  def deviations_sql(self, column: str) -> str:
    """Returns the SQL of `encode_all` of a column, in float64."""
    deviation = f"({column} - {self.mean!r}::DOUBLE) / {self.std!r}::DOUBLE"
    within = f"least(greatest({deviation}, -{MOST_DEVIATIONS}), {MOST_DEVIATIONS})"
    return f"CASE WHEN {column} IS NOT NULL THEN {within} END"  # least and greatest pass over NULL

  def _deviations(self, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
      return np.asarray((values - self.mean) / self.std)

  def decode_all(self, values: np.ndarray, encoding: str = "standardise") -> np.ndarray:
    """Returns the raw numbers of standardised ones: float64 `[N]`; NaN stays NaN."""
    numbers = values.astype(np.float64) * self.std + self.mean
    return np.sign(numbers) * np.expm1(np.abs(numbers)) if encoding == "log1p" else numbers


@dataclasses.dataclass(frozen=True)
class Quantile:
  """Map from a number to the standard-normal quantile of its mid-rank in the fitted numbers, linear between knots.

  The mid-rank of a number that occurs often is the middle of its ranks. There are at most 100 knots. Beyond the
  outermost knots scores go on rising, by the logarithm of the distance, so that numbers there stay distinguishable.

  Attributes:
    knots: numbers, ascending.
    scores: the standard-normal quantiles of the knots, ascending; 0 for a constant.
  """

  knots: tuple[float, ...]
  scores: tuple[float, ...]

  @classmethod
  def of(cls, knots: Sequence[float], ranks: Sequence[float]) -> Quantile:
    """Makes the encoder from numbers in ascending order and their mid-ranks as shares in (0, 1)."""
    normal = statistics.NormalDist()
    return cls(tuple(map(float, knots)), tuple(rounded_statistic(normal.inv_cdf(r)) for r in ranks))

  def encode(self, value: float, encoding: str = "quantile") -> np.float32:
    """Returns the score of a raw number; `encoding` is ignored, it serves the common signature with `Numeric`."""
    del encoding
    return np.float32(self.encode_all(np.array([value], np.float64))[0])

  def clips(self, values: np.ndarray) -> np.ndarray:
    """Returns False for each number of `[N]`: scores grow so slowly that none is clipped."""
    return np.zeros(len(values), bool)

  def encode_all(self, values: np.ndarray) -> np.ndarray:
    """Returns the scores of numbers `[N]`: float32 `[N]`; NaN stays NaN."""
    # Division by 4 keeps differences from overflowing. np.interp's slope overflows between knots that nearly touch.
    values, knots = np.asarray(values, np.float64) / 4, np.array(self.knots) / 4
    low, high = knots[0], knots[-1]
    left = np.clip(np.searchsorted(knots, values, side="right") - 1, 0, max(len(knots) - 2, 0))
    right = np.minimum(left + 1, len(knots) - 1)
    width = knots[right] - knots[left]
    scale = np.log(high - low or max(abs(low), 1.0))
    # The ignored warnings are harmless: a share beyond 1 is cut, the log of distance 0 is -inf, NaN stays NaN.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
      share = np.clip((values - knots[left]) / np.where(width > 0, width, 1), 0, 1)
      # log(1 + distance / span), also where the ratio would overflow; `scale` is the log of the span
      above, below = (np.logaddexp(0, np.log(np.maximum(d, 0)) - scale) for d in (values - high, low - values))
    first, last = np.array(self.scores)[left], np.array(self.scores)[right]
    inside = np.minimum(first + share * (last - first), last)
    return (inside + BEYOND * (above - below)).astype(np.float32)


NumberEncoder = Numeric | Quantile


def number_encoder(saved: Mapping[str, Any]) -> NumberEncoder:
  """Returns the encoder that `dataclasses.asdict` turned into `saved`, by way of JSON."""
  if "knots" in saved:
    return Quantile(tuple(saved["knots"]), tuple(saved["scores"]))
  return Numeric(**saved)
