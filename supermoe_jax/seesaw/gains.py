"""Computes gains over single-task models, their summaries over tasks, and their intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from supermoe_jax.evaluation.intervals import interval_from_folds, student_t
from supermoe_jax.evaluation.metrics import improvement

# An estimate over seeds: {"mean", "low", "high", "seeds"}; mean is None without a seed, low and high below two seeds.
Estimate = dict[str, Any]


# What an answer that ignores the user scores on average, whatever the data.
CONSTANT_SCORES = {
  "auc": 0.5,
  "mean_auc": 0.5,
  "gauc": 0.5,
  "concordance": 0.5,
  "r2": 0.0,
  "spearman": 0.0,
  "gini": 0.0,
}


def constant_score(metric: str, measured: Mapping[str, float | None]) -> float | None:
  """Returns the score of an answer that ignores the user, or None if it cannot be told from a model's metrics.

  For the root mean square error it is that of the mean of the same labels, which R² compares with. For rankings it
  depends on the data; see `constant_scores.popularity_scores`.

  Args:
    metric: the main metric of a task.
    measured: the metrics of a model on the labels in question.
  """
  if metric == "rmse":
    error, r2 = measured.get("rmse"), measured.get("r2")
    # With R² = 1 the error is 0, and nothing is known about the spread of the labels.
    return None if error is None or r2 is None or r2 >= 1 else error / math.sqrt(1 - r2)
  return CONSTANT_SCORES.get(metric)


def relative_gain(metric: str, score: float, single: float, over_constant: float) -> float | None:
  """Returns the gain Δ of `score` over the single-task score; positive is better for every metric.

  The unit is percent of what the single-task model has over a constant answer. An AUC of .55 against .50 and one of
  .95 against .90 are equal steps in the metric; but the first single-task model knows nothing, and the second most of
  what there is to know.

  Args:
    metric: the name of the metric.
    score: the score of the shared model.
    single: the score of the single-task model with the same seed.
    over_constant: how much better than a constant answer single-task models are, in the metric's unit. It is a mean
      over seeds where there are several, because a quotient of two noisy numbers has no mean.

  Returns: None unless `over_constant` is positive: then there is nothing to measure a gain by.
  """
  return 100 * improvement(metric, score, single) / over_constant if over_constant > 0 else None


def beyond_constant(over_constant: Estimate) -> bool:
  """Returns whether single-task models are better than a constant answer beyond chance: their interval lies above 0.

  Without an interval, which needs two seeds, the sign of the mean decides.
  """
  lead = over_constant["mean"] if over_constant["low"] is None else over_constant["low"]
  return lead is not None and lead > 0


def harm(gains: Sequence[float]) -> float:
  """Returns H, the mean of max(0, −Δ) over tasks, `gains [T]`."""
  return sum(max(0.0, -g) for g in gains) / len(gains)


def seesaw_index(gains: Sequence[float]) -> float:
  """Returns Σ max(0, −Δ) / Σ|Δ| over tasks, `gains [T]`: 0 without losses (or changes), 1 if all changes are losses."""
  moved = sum(abs(g) for g in gains)
  return sum(max(0.0, -g) for g in gains) / moved if moved else 0.0


def mean_gain(gains: Sequence[float]) -> float:
  """Returns Δm, the mean of Δ over tasks, `gains [T]`."""
  return sum(gains) / len(gains)


SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
  "mean_gain": mean_gain,
  "worst_gain": min,
  "harm": harm,
  "seesaw_index": seesaw_index,
}


def estimate(values: Iterable[float], asked_share: float = 0.0) -> Estimate:
  """Returns the mean over seeds, one value each, with its 95 % Student-t interval if there are two seeds or more.

  Where seeds are folds of users, `asked_share` is (tested users / training users), by which the interval is widened,
  because folds share most of their training users; see `intervals.interval_from_folds`.
  """
  listed = list(values)
  mean, low, high = interval_from_folds(listed, asked_share) if asked_share else student_t(listed)
  return {"mean": mean, "low": low, "high": high, "seeds": len(listed)}


def verdict(found: Estimate) -> str:
  """Returns `lost` or `gained` if the interval excludes 0, `even` if it holds 0, `unknown` without an interval."""
  if found["low"] is None:
    return "unknown"
  return "lost" if found["high"] < 0 else "gained" if found["low"] > 0 else "even"


def within_noise(difference: float | None, noise: Estimate | None) -> bool | None:
  """Returns whether a difference is no larger than chance alone makes it; None if that is not known.

  Args:
    difference: the mean difference of two variants over seeds.
    noise: the difference of two variants that differ in their seeds alone. Its interval says how large such a mean can
      be, so the end of it that is further from 0 is the limit.
  """
  if difference is None or noise is None or noise["low"] is None:
    return None
  return abs(difference) <= max(abs(noise["low"]), abs(noise["high"]))


def reduces_seesaw(difference: Mapping[str, Estimate]) -> bool:
  """Returns whether the differences to tuned static weights allow the claim "reduces the seesaw".

  Harm and worst gain must both be better with intervals that exclude 0, and the mean gain must not be lower.
  """
  better = verdict(difference["harm"]) == "lost" and verdict(difference["worst_gain"]) == "gained"
  return better and difference["mean_gain"]["mean"] >= 0
