"""Computes metrics of bootstrap resamples of users, many at a time.

Shapes: n labels, R resamples, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from supermoe_jax.evaluation.metrics import SMALLEST_PROBABILITY
from supermoe_jax.probing.label_table import LabelKind

# Resamples are drawn in parts; the weights of a part hold about this many numbers.
WEIGHTS_AT_ONCE = 4_000_000


def resamples(users: int, count: int, seed: int) -> Iterator[np.ndarray]:
  """Yields the weights of `count` bootstrap resamples in parts `[some, users]`: how often each user was drawn."""
  at_once = max(1, WEIGHTS_AT_ONCE // max(users, 1))
  rng = np.random.default_rng([seed, users])
  for start in range(0, count, at_once):
    yield rng.multinomial(users, np.full(users, 1 / users), min(at_once, count - start)).astype(np.float64)


def weighted_metrics(
  kind: LabelKind, label: np.ndarray, predicted: np.ndarray, weight: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns the metrics of `evaluation.metrics` that have intervals, `[R]` each; labels count `weight [R, n]` times.

  A metric is NaN in a resample without labels, or with one class where the metric needs two.
  Shapes: `label [n]`; `predicted [n]`, or `[n, C]` for a multiclass label.
  """
  with np.errstate(invalid="ignore", divide="ignore"):
    if kind == "binary":
      return _binary(label, predicted, weight)
    if kind == "multiclass":
      return _multi_class(label.astype(np.int64), predicted, weight)
    return _regression(label, predicted, weight)


def _binary(label: np.ndarray, probability: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
  area, precision = _ranked(label > 0, probability, weight)
  tiny = np.finfo(np.float64).eps
  p = np.clip(probability.astype(np.float64), tiny, 1 - tiny)
  loss = -np.where(label > 0, np.log(p), np.log1p(-p))
  return {"auc": area, "average_precision": precision, "log_loss": weight @ loss / weight.sum(axis=1)}


def _ranked(positive: np.ndarray, score: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns AUC and average precision, `[R]` each, from one sort; equal scores are one step of both curves."""
  order = np.argsort(-score, kind="stable")
  steps = np.flatnonzero(np.append(True, np.diff(score[order]) != 0))
  sorted_weight = weight[:, order]
  ones = np.add.reduceat(sorted_weight * positive[order], steps, axis=1)
  zeros = np.add.reduceat(sorted_weight, steps, axis=1) - ones
  hits, misses = np.cumsum(ones, axis=1), np.cumsum(zeros, axis=1)
  all_ones, all_zeros = hits[:, -1], misses[:, -1]
  # A negative ranks below the positives of earlier steps; each positive of its own step is a tie and counts half.
  area = np.sum(zeros * (hits - ones / 2), axis=1) / (all_ones * all_zeros)
  share = np.where(hits + misses > 0, hits / (hits + misses), 0.0)
  precision = np.where(all_zeros > 0, np.sum(share * ones, axis=1) / all_ones, np.nan)
  return area, precision


def _multi_class(label: np.ndarray, probability: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
  answer, total = np.argmax(probability, axis=1), weight.sum(axis=1)
  own = np.log(np.maximum(probability[np.arange(len(label)), label], SMALLEST_PROBABILITY))
  areas, scores = [], []
  for c in range(probability.shape[1]):
    mine, said = label == c, answer == c
    areas.append(_ranked(mine, probability[:, c], weight)[0])
    count = weight @ mine + weight @ said
    scores.append(np.where(count > 0, 2 * (weight @ (mine & said)) / count, np.nan))
  return {
    "accuracy": weight @ (answer == label) / total,
    "macro_f1": nan_mean(np.array(scores)),
    "auc": nan_mean(np.array(areas)),
    "log_loss": -(weight @ own) / total,
  }


def nan_mean(values: np.ndarray) -> np.ndarray:
  """Returns the mean of the finite values over the first dimension; NaN without any."""
  known = np.isfinite(values)
  return np.where(known, values, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)


def _regression(label: np.ndarray, prediction: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
  total = weight.sum(axis=1)
  error = prediction.astype(np.float64) - label
  squared = weight @ error**2 / total
  centred = label - label.mean()  # with a large mean, the difference of squares would lose its digits
  spread = weight @ centred**2 / total - (weight @ centred / total) ** 2
  spread = np.where(spread > 1e-12 * np.square(centred).max(), spread, np.nan)
  return {"rmse": np.sqrt(squared), "mae": weight @ np.abs(error) / total, "r2": 1 - squared / spread}
