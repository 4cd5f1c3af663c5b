"""Measures predicted chances of an event by each of several days against times that may be censored.

A time is `(days, observed)`. Chances `[n, K]` are those of an event by each of the K `edges`, in days; labels are
censored at edges only. Corrections for censoring assume that the end of a label's follow-up tells nothing about its
event, as where periods end at a date.

Shapes: n labels, K intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from supermoe_jax.data.encoding.censored_times import (
  chances_by_day,
  expected_days,
  interval_counts,
  survived_intervals,
)
from supermoe_jax.evaluation.concordance import pair_counts
from supermoe_jax.evaluation.metrics import SMALLEST_PROBABILITY, Metrics, require_numbers

# Edges at which predicted and observed chances are listed, at most.
LISTED_EDGES = 8


def survival_metrics(value: np.ndarray, predicted: np.ndarray, edges: Sequence[float]) -> Metrics:
  """Returns metrics of predicted chances `[n, K]`, or of predicted days `[n]`, for times `value [n, 2]`.

  `concordance` is Harrell's, by the expected days within the horizon; it is None where no two labels have an order.
  Chances have further metrics. `log_loss` is the mean negative log likelihood. `brier` is the squared error of the
  chance by each edge, with inverse weights for the labels that are censored earlier, in the mean over the days.
  `share_error` is the distance of the mean chance from the Kaplan-Meier estimate, in the mean over the edges. Both end
  at the last edge that is known, see `known_edges`.
  Source of `brier`: Graf et al. 1999.
  """
  require_numbers(value, predicted)
  days = predicted_days(predicted, edges)
  pairs = pair_counts(value, days)
  out: Metrics = {"concordance": float(pairs.right.sum() / pairs.ordered.sum()) if pairs.ordered.any() else None}
  if predicted.ndim > 1:
    observed, k = observed_chances(value, edges), known_edges(value, edges)
    out |= {
      "log_loss": _log_loss(value, predicted, edges),
      "brier": _brier(value, predicted, edges, k),
      "share_error": float(np.abs(predicted.mean(axis=0) - observed)[:k].mean()),
    }
  return out


def predicted_days(predicted: np.ndarray, edges: Sequence[float]) -> np.ndarray:
  """Returns the expected days within the horizon of chances `[n, K]`; days `[n]` stay as they are."""
  return expected_days(predicted, edges) if predicted.ndim > 1 else predicted


def observed_chances(value: np.ndarray, edges: Sequence[float]) -> np.ndarray:
  """Returns the Kaplan-Meier estimate of the share of labels with an event by each edge: float64 `[K]`.

  Where no label is followed through an interval, the estimate stays.
  """
  events, at_risk = interval_counts(value, edges)
  return chances_by_day(events / np.maximum(at_risk, 1))


def known_edges(value: np.ndarray, edges: Sequence[float]) -> int:
  """Returns the number of edges up to which labels are followed; after an event of all of them nothing is unknown."""
  _, at_risk = interval_counts(value, edges)
  return int(np.sum((at_risk > 0) | (observed_chances(value, edges) >= 1)))


def calibration_by_day(value: np.ndarray, predicted: np.ndarray, edges: Sequence[float]) -> list[dict[str, Any]]:
  """Returns the mean predicted and the observed chance of an event by some of the edges, the last among them.

  `observed` is the Kaplan-Meier estimate, and `interval` its 95 % interval by Greenwood's variance on the log-log
  scale, each label for itself; None where all labels, or none, have an event. `followed` is the number of labels whose
  last interval before the edge counts. Beyond the last known edge `observed` is None.
  """
  events, at_risk = interval_counts(value, edges)
  observed, mean, known = observed_chances(value, edges), predicted.mean(axis=0), known_edges(value, edges)
  left = np.maximum(at_risk - events, 0)
  variance = np.cumsum(np.where(left > 0, events / np.maximum(at_risk * left, 1), 0.0))
  step = -(-len(edges) // LISTED_EDGES)
  chosen = range(len(edges) - 1, -1, -step)
  return [
    {
      "days": float(edges[k]),
      "followed": int(at_risk[k]),
      "predicted": float(mean[k]),
      "observed": float(observed[k]) if k < known else None,
      "interval": _interval(1 - float(observed[k]), float(variance[k])) if k < known else None,
    }
    for k in reversed(chosen)
  ]


def _interval(survival: float, variance: float) -> list[float] | None:
  if not 0 < survival < 1:
    return None
  by = 1.96 * math.sqrt(variance) / abs(math.log(survival))
  return [1 - survival ** math.exp(-by), 1 - survival ** math.exp(by)]


def _log_loss(value: np.ndarray, chances: np.ndarray, edges: Sequence[float]) -> float:
  survived, label = survived_intervals(value, edges), np.arange(len(value))
  ends = np.concatenate([np.zeros((len(chances), 1)), chances, np.ones((len(chances), 1))], axis=1)
  of_event = ends[label, survived + 1] - ends[label, survived]
  likelihood = np.where(value[:, 1] > 0, of_event, 1 - ends[label, survived])
  return float(-np.mean(np.log(np.maximum(likelihood, SMALLEST_PROBABILITY))))


def _brier(value: np.ndarray, chances: np.ndarray, edges: Sequence[float], known: int) -> float:
  survived, observed = survived_intervals(value, edges), value[:, 1] > 0
  k = len(edges)
  # The share of labels that are followed through each interval, by a Kaplan-Meier estimate of the censoring.
  there = np.array([np.sum(survived >= i) for i in range(1, k)])
  stopped = np.bincount(survived[~observed], minlength=k + 1)[1:k]
  followed = np.append(1.0, np.cumprod(1 - stopped / np.maximum(there, 1)))
  error = 0.0
  for i, width in enumerate(np.diff(edges[:known], prepend=0.0)):
    happened = observed & (survived <= i)
    weight = np.where(happened, 1 / np.maximum(followed[np.minimum(survived, k - 1)], 1e-12), 0.0)
    weight = np.where(survived > i, 1 / max(followed[i], 1e-12), weight)
    error += width * float(np.mean(weight * np.square(happened - chances[:, i])))
  return error / edges[known - 1]
