"""Computes gains over single-task models, their summaries over tasks, and their intervals over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from supermoe_jax.evaluation.intervals import student_t
from supermoe_jax.evaluation.metrics import LOWER_IS_BETTER

# An estimate over seeds: {"mean", "low", "high", "seeds"}; mean is None without a seed, low and high below two seeds.
Estimate = dict[str, Any]


def relative_gain(metric: str, score: float, single: float) -> float | None:
  """Returns the gain Δ of `score` over the single-task score, in percent; positive is better for every metric.

  Returns: None if the single-task score is 0, because a percentage of 0 is undefined.
  Source: the form of arXiv 1904.08918.
  """
  if single == 0:
    return None
  return 100 * (single - score if metric in LOWER_IS_BETTER else score - single) / abs(single)


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


def estimate(values: Iterable[float]) -> Estimate:
  """Returns the mean over seeds, one value each, with its 95 % Student-t interval if there are two seeds or more."""
  listed = list(values)
  mean, low, high = student_t(listed)
  return {"mean": mean, "low": low, "high": high, "seeds": len(listed)}


def verdict(found: Estimate) -> str:
  """Returns `lost` or `gained` if the interval excludes 0, `even` if it holds 0, `unknown` without an interval."""
  if found["low"] is None:
    return "unknown"
  return "lost" if found["high"] < 0 else "gained" if found["low"] > 0 else "even"


def reduces_seesaw(difference: Mapping[str, Estimate]) -> bool:
  """Returns whether the differences to tuned static weights allow the claim "reduces the seesaw".

  Harm and worst gain must both be better with intervals that exclude 0, and the mean gain must not be lower.
  """
  better = verdict(difference["harm"]) == "lost" and verdict(difference["worst_gain"]) == "gained"
  return better and difference["mean_gain"]["mean"] >= 0
