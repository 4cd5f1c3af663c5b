"""Computes the metrics of every form of answer: yes or no, classes, several values, numbers, amounts, rankings.

The metrics of times that may be censored are in `survival`.

Shapes: n labels, C classes. The `…_metrics` functions raise a ValueError if there is no label to measure against, or if
a label or an answer is not a finite number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn import metrics as sk

Metrics = dict[str, float | None]

# For every other metric more is better; counts such as `gauc_users` are neither better nor worse.
LOWER_IS_BETTER = frozenset({"log_loss", "ece", "rmse", "mae", "decile_error", "brier", "share_error"})

# Probabilities are raised to at least this before their logarithm is taken: otherwise one answer that was certain and
# wrong would make the mean infinite.
SMALLEST_PROBABILITY = 1e-7


def improvement(metric: str, value: float, reference: float) -> float:
  """Returns by how much `value` is better than `reference`; negative where it is worse."""
  return reference - value if metric in LOWER_IS_BETTER else value - reference


def best_value(metric: str, values: Iterable[float | None]) -> float | None:
  """Returns the best of the values that are not None, or None."""
  known = [v for v in values if v is not None]
  return max(known, key=lambda v: improvement(metric, v, 0.0), default=None)


def binary_metrics(label: np.ndarray, probability: np.ndarray) -> Metrics:
  """Returns AUC, average precision, log loss and calibration error of `probability [n]` for `label [n]` of 0 and 1.

  AUC and average precision are None when only one class is present.
  """
  require_numbers(label, probability)
  both = 0 < label.sum() < len(label)
  return {
    "auc": float(sk.roc_auc_score(label, probability)) if both else None,
    "average_precision": float(sk.average_precision_score(label, probability)) if both else None,
    "log_loss": float(sk.log_loss(label, probability, labels=[0, 1])),
    "ece": expected_calibration_error(label, probability),
  }


def event_binary_metrics(label: np.ndarray, probability: np.ndarray, user: np.ndarray) -> Metrics:
  """Returns the metrics of `binary_metrics`, and AUC within users, for labels of events: a user has several of them.

  `gauc` is the mean of the users' own AUCs, weighted by their numbers of labels. Users whose labels are all of one
  class have no AUC. `gauc_users` counts the users that have one; if there are none, `gauc` is None.
  Shapes: `label, probability, user [n]`.
  Source: GAUC, "Optimized Cost per Click in Taobao Display Advertising", arXiv 1703.02091.
  """
  whole = binary_metrics(label, probability)
  area, count = _area_of_each_user(label, probability, user)
  mean = float(np.average(area, weights=count)) if len(area) else None
  return {**whole, "gauc": mean, "gauc_users": float(len(area))}


def _area_of_each_user(label: np.ndarray, probability: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns AUC and number of labels of each user with both classes, by the rank sum: all users in one sort."""
  _, user = np.unique(user, return_inverse=True)
  order = np.lexsort((probability, user))
  user, score, positive = user[order], probability[order], label[order] > 0
  # Equal scores of a user share the mean of their ranks.
  begins = np.flatnonzero(np.append(True, (np.diff(user) != 0) | (np.diff(score) != 0)))
  length = np.diff(np.append(begins, len(user)))
  count = np.bincount(user)
  first = (np.cumsum(count) - count)[user]  # where the user's labels begin
  rank = np.repeat(begins + (length + 1) / 2, length) - first
  ones = np.bincount(user, positive)
  pairs = ones * (count - ones)
  above = np.bincount(user, rank * positive) - ones * (ones + 1) / 2
  both = pairs > 0
  return above[both] / pairs[both], count[both]


class CalibrationBin(NamedTuple):
  """A bin of answers with similar probabilities: their number, range, and mean, and the mean of their labels."""

  labels: int
  least: float
  most: float
  predicted: float
  observed: float


def calibration_bins(label: np.ndarray, probability: np.ndarray, bins: int = 10) -> list[CalibrationBin]:
  """Returns at most `bins` equally filled bins of `probability [n]`, in ascending order.

  Each of the labels with equal probabilities counts as their mean. So the order of the labels has no effect, even where
  a bin ends among them.
  """
  value, group, count = np.unique(probability, return_inverse=True, return_counts=True)
  predicted, observed = (np.repeat(x, count) for x in (value, np.bincount(group, label) / count))
  parts = (p for p in np.array_split(np.arange(len(label)), bins) if len(p))
  return [
    CalibrationBin(len(p), *map(float, (predicted[p[0]], predicted[p[-1]], predicted[p].mean(), observed[p].mean())))
    for p in parts
  ]


def expected_calibration_error(label: np.ndarray, probability: np.ndarray, bins: int = 10) -> float:
  """Returns the mean distance of predicted and observed rate over `calibration_bins` (arXiv 1909.10155)."""
  found = calibration_bins(label, probability, bins)
  return sum(b.labels * abs(b.predicted - b.observed) for b in found) / len(label)


def multi_class_metrics(label: np.ndarray, probability: np.ndarray) -> Metrics:
  """Returns metrics of `probability [n, C]` for class indices `label [n]`.

  They are accuracy, macro F1, mean AUC, log loss and calibration error. `macro_f1` is the mean over the classes that
  occur as label or as answer. `auc` is the mean AUC of one class against the rest, over the classes that some but not
  all labels have; `classes_without_auc` counts the other classes. `ece` compares how often the likeliest class is right
  with its probability.
  """
  require_numbers(label, probability)
  answer = np.argmax(probability, axis=1)
  usable = [c for c in range(probability.shape[1]) if 0 < np.sum(label == c) < len(label)]
  areas = [sk.roc_auc_score(label == c, probability[:, c]) for c in usable]
  own = probability[np.arange(len(label)), label]
  return {
    "accuracy": float(np.mean(answer == label)),
    "macro_f1": float(sk.f1_score(label, answer, average="macro", zero_division=0)),
    "auc": float(np.mean(areas)) if areas else None,
    "log_loss": float(-np.mean(np.log(np.maximum(own, SMALLEST_PROBABILITY)))),
    "ece": expected_calibration_error((answer == label).astype(np.float64), probability.max(axis=1)),
    "classes_without_auc": float(probability.shape[1] - len(usable)),
  }


def multi_label_metrics(label: np.ndarray, probability: np.ndarray, k: int = 10) -> Metrics:
  """Returns mean AUC over the values that occur, recall in the k likeliest, and log loss.

  `recall@k` is the share of a sample's values that are among its k likeliest (of equally likely ones the first), in
  the mean over the samples that have a value.
  `values_without_auc` counts the values left out of the mean because all samples or none have them.
  Shapes: `label, probability [n, values]`.
  """
  require_numbers(label, probability)
  usable = [v for v in range(label.shape[1]) if 0 < label[:, v].sum() < len(label)]
  areas = [sk.roc_auc_score(label[:, v], probability[:, v]) for v in usable]
  top = np.argsort(-probability, axis=1, kind="stable")[:, :k]
  hits, wanted = np.take_along_axis(label, top, axis=1).sum(axis=1), label.sum(axis=1)
  some = wanted > 0
  clipped = np.clip(probability, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
  return {
    "mean_auc": float(np.mean(areas)) if areas else None,
    f"recall@{k}": float(np.mean(hits[some] / wanted[some])) if some.any() else None,
    "log_loss": float(-np.mean(label * np.log(clipped) + (1 - label) * np.log(1 - clipped))),
    "values_without_auc": float(label.shape[1] - len(usable)),
  }


def regression_metrics(label: np.ndarray, prediction: np.ndarray) -> Metrics:
  """Returns root mean square error, mean absolute error and R² of `prediction [n]`, in the unit of `label [n]`.

  R² compares with the mean of these same labels; it is None when they are all equal.
  """
  require_numbers(label, prediction)
  label, error = label.astype(np.float64), prediction.astype(np.float64) - label
  spread = np.mean(np.square(label - label.mean()))
  squared = np.mean(np.square(error))
  return {
    "rmse": float(np.sqrt(squared)),
    "mae": float(np.mean(np.abs(error))),
    "r2": float(1 - squared / spread) if np.ptp(label) > 0 else None,
  }


def amount_metrics(label: np.ndarray, prediction: np.ndarray) -> Metrics:
  """Returns metrics of predicted amounts `prediction [n]` for `label [n]`.

  They are Spearman's rank correlation (equal values share the mean of their ranks), the normalised Gini coefficient,
  root mean square and mean absolute error, `decile_error`, and `mean_ratio`, the predicted sum over the sum of the
  labels. The Gini coefficient is the covariance of the labels with the ranks of the predictions, over that with the
  labels' own ranks: 1 for the right order, 0 for a random one. `decile_error` is the mean distance of predicted and
  true mean over ten equally filled bins of predictions, over the mean of |label|. A metric that is not defined is None:
  where all labels are alike, where all predictions are (`spearman`), or where labels sum to 0 (the last two).
  """
  require_numbers(label, prediction)
  label, prediction = label.astype(np.float64), prediction.astype(np.float64)
  own, ranks = (stats.rankdata(x) - (len(label) + 1) / 2 for x in (label, prediction))
  spread, both = float(label @ own), math.sqrt(float(own @ own) * float(ranks @ ranks))
  size, total = float(np.abs(label).mean()), float(label.sum())
  error = prediction - label
  return {
    "spearman": float(own @ ranks) / both if both > 0 else None,
    "gini": float(label @ ranks) / spread if spread > 0 else None,
    "rmse": math.sqrt(float(np.mean(np.square(error)))),
    "mae": float(np.mean(np.abs(error))),
    "decile_error": expected_calibration_error(label, prediction) / size if size > 0 else None,
    "mean_ratio": float(prediction.sum()) / total if total > 0 else None,
  }


def ranking_metrics(rank: np.ndarray, cutoffs: Sequence[int]) -> Metrics:
  """Returns HR@k, NDCG@k and MRR@k of one relevant item a question, at `rank [n]` (1 is best; infinite: not ranked)."""
  require_numbers(np.zeros(len(rank)), np.where(rank == np.inf, 0.0, rank))
  out: Metrics = {}
  for k in cutoffs:
    hit = rank <= k
    out[f"hr@{k}"] = float(np.mean(hit))
    out[f"ndcg@{k}"] = float(np.mean(np.where(hit, 1 / np.log2(1 + rank), 0.0)))
    out[f"mrr@{k}"] = float(np.mean(np.where(hit, 1 / rank, 0.0)))
  return out


def require_numbers(label: np.ndarray, answer: np.ndarray) -> None:
  """Raises ValueError if there is no label, or if a label or an answer is not a finite number."""
  if not len(label):
    raise ValueError("there is no label to measure against")
  for name, values in (("labels", label), ("answers", answer)):
    if bad := values.size - np.count_nonzero(np.isfinite(values)):
      raise ValueError(f"{bad} of {values.size} {name} are not finite numbers: there is nothing to measure")
