"""Encoders of numbers: standardised, or replaced by their standard-normal quantile."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Sums over threads differ in their last bits from run to run; statistics are kept to fewer digits than that.
STATISTIC_DIGITS = 10

MAX_KNOTS = 100  # of a quantile encoder
BEYOND = 0.1  # score for each factor e that a number lies beyond the outermost knots, in units of their distance


def _rounded(value: float) -> float:
  return float(f"{value:.{STATISTIC_DIGITS}g}")


@dataclasses.dataclass(frozen=True)
class Numeric:
  """Mean and standard deviation of numbers, after log1p where configured; of constant numbers the deviation is 1."""

  mean: float
  std: float

  @classmethod
  def of(cls, mean: float, std: float) -> Numeric:
    """Rounds the statistics to the digits that are the same in every run."""
    mean, std = _rounded(mean), _rounded(std)
    return cls(mean, std if std > 0 else 1.0)

  def encode(self, value: float, encoding: str = "standardise") -> np.float32:
    """A raw number as events hold it: after log1p if that is the field's `encoding`, standardised."""
    if encoding == "log1p":
      value = math.copysign(math.log(1 + abs(value)), value)
    return np.float32((value - self.mean) / self.std)

  def encode_all(self, values: np.ndarray) -> np.ndarray:
    """Numbers `[N]` of the log, after log1p where configured, as events hold them: float32 `[N]`; NaN stays NaN."""
    return ((values - self.mean) / self.std).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Quantile:
  """The standard-normal quantile of a number's mid-rank among those it was fitted on, linear between at most 100 knots.

  A number that occurs often has the middle of the ranks that it takes. Beyond the outermost knots the scores go on
  rising, by the logarithm of the distance: a threshold that lies out there tells numbers apart too.

  Attributes:
    knots: numbers, ascending.
    scores: their standard-normal quantiles, ascending; that of a constant is 0.
  """

  knots: tuple[float, ...]
  scores: tuple[float, ...]

  @classmethod
  def of(cls, knots: Sequence[float], ranks: Sequence[float]) -> Quantile:
    """Makes the encoder of numbers in ascending order and of their mid-ranks as shares, in (0, 1)."""
    normal = statistics.NormalDist()
    return cls(tuple(map(float, knots)), tuple(_rounded(normal.inv_cdf(r)) for r in ranks))

  def encode(self, value: float, encoding: str = "quantile") -> np.float32:
    """A raw number as events hold it; `encoding` is the field's, as for `Numeric`."""
    del encoding
    return np.float32(self.encode_all(np.array([value], np.float64))[0])

  def encode_all(self, values: np.ndarray) -> np.ndarray:
    """Numbers `[N]` as events hold them: float32 `[N]`; NaN stays NaN."""
    # Of quarters no difference overflows. np.interp will not do: its slope does, between knots that nearly touch.
    values, knots = np.asarray(values, np.float64) / 4, np.array(self.knots) / 4
    low, high = knots[0], knots[-1]
    left = np.clip(np.searchsorted(knots, values, side="right") - 1, 0, max(len(knots) - 2, 0))
    right = np.minimum(left + 1, len(knots) - 1)
    width = knots[right] - knots[left]
    scale = np.log(high - low or max(abs(low), 1.0))
    # A share beyond 1 is cut, the log of no distance is -inf, and NaN stays NaN.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
      share = np.clip((values - knots[left]) / np.where(width > 0, width, 1), 0, 1)
      # log(1 + distance / scale), though the ratio be too large for a number
      above, below = (np.logaddexp(0, np.log(np.maximum(d, 0)) - scale) for d in (values - high, low - values))
    first, last = np.array(self.scores)[left], np.array(self.scores)[right]
    inside = np.minimum(first + share * (last - first), last)
    return (inside + BEYOND * (above - below)).astype(np.float32)


NumberEncoder = Numeric | Quantile


def number_encoder(saved: Mapping[str, Any]) -> NumberEncoder:
  """The encoder of what `dataclasses.asdict` made of one, by way of JSON."""
  if "knots" in saved:
    return Quantile(tuple(saved["knots"]), tuple(saved["scores"]))
  return Numeric(**saved)
