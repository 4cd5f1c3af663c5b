"""Computes the influence of each label on a main metric, and from it 95 % intervals over users without resampling.

A metric moves by about Σ ψ over labels when users come and go. ψ is the influence of a label; it is exact for a mean,
and the linear part for an area or a root. The labels of one user depend on each other, so ψ is summed by user, and the
variance is U/(U − 1) Σ ψ². For the area under one curve with one label a user this is DeLong's interval. Differences
are paired: they take the difference of the influences of the same labels.

Intervals cover the random choice of users, not the randomness of training: a run with another seed has other scores.

Source: DeLong, DeLong and Clarke-Pearson 1988, https://doi.org/10.2307/2531595; labels in clusters, Obuchowski 1997,
https://doi.org/10.2307/2533958.
Shapes: n labels, U users, C classes or values.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from supermoe_jax import config
from supermoe_jax.evaluation.concordance import pair_counts
from supermoe_jax.evaluation.intervals import LEVEL, Bounds

METHOD = (
  "95 % intervals from the influence of each label on the metric, summed by user, with Student's t over users. An area "
  "under the curve has DeLong's influence. Metrics between 0 and 1 are computed on the logit scale, rank "
  "correlations on Fisher's, errors on the logarithmic scale. Differences are paired by label. An interval covers "
  "variation between samples of users; it does not cover variation between training runs."
)


@dataclasses.dataclass(frozen=True)
class Scored:
  """The known labels of one task with the answers of a run, or of a baseline.

  Attributes:
    form: the form of the answers.
    value: the labels `[n]`, or `[n, C]` for a task with many values; of times `[n, 2]`, see `survival`.
    answer: the answers as metrics take them: probabilities, numbers, days, or ranks of the true value `[n]`.
    cutoff: k of NDCG@k, for ranks.
  """

  form: config.Answer
  value: np.ndarray
  answer: np.ndarray
  cutoff: int


class Influence(NamedTuple):
  """A metric's `value` and the influence `psi [n]` of each label on it."""

  value: float
  psi: np.ndarray


def influence(scored: Scored) -> Influence | None:
  """Returns the main metric of a task's form and each label's influence; None if the metric has no value."""
  value, answer = scored.value, scored.answer
  if scored.form == "catalogue":
    gain = np.where(answer <= scored.cutoff, 1 / np.log2(1 + answer), 0.0)
    return Influence(float(gain.mean()), (gain - gain.mean()) / len(gain))
  if scored.form == "regression":
    squared = np.square(answer.astype(np.float64) - value.astype(np.float64))
    root = math.sqrt(squared.mean())
    return Influence(root, (squared - squared.mean()) / (2 * max(root, 1e-300) * len(squared)))
  if scored.form == "amount":
    return spearman_influence(value.astype(np.float64), answer)
  if scored.form == "survival":
    return concordance_influence(value, answer)
  if scored.form == "binary":
    return _areas(value[:, None] > 0, answer[:, None])
  classes = answer.shape[1]
  return _areas(value > 0 if scored.form == "multilabel" else value[:, None] == np.arange(classes), answer)


def concordance_influence(value: np.ndarray, days: np.ndarray) -> Influence | None:
  """Returns Harrell's concordance of predicted `days [n]` with times `value [n, 2]`, and influences.

  The influence of a label is that of its pairs: those that are right less their expected number, by the number of all
  pairs. None if no pair has an order.
  """
  pairs = pair_counts(value, days)
  total = float(pairs.ordered.sum()) / 2
  if not total:
    return None
  share = float(pairs.right.sum()) / 2 / total
  return Influence(share, (pairs.right - share * pairs.ordered) / total)


def spearman_influence(one: np.ndarray, other: np.ndarray) -> Influence | None:
  """Returns Spearman's rank correlation of two columns `[n]`, and influences; None if a column is constant.

  The correlation is that of the mid-distribution functions F and G. A point adds to their covariance by its own ranks,
  and by the ranks that it adds to all points above it.
  """
  ranks = [(stats.rankdata(x) - 0.5) / len(x) for x in (one, other)]
  # The mean over all points of F, or G, where a point lies below them; half where it is equal.
  above = [[_mean_above(x, rank) for rank in ranks] for x in (one, other)]

  def moment(i: int, j: int) -> tuple[float, np.ndarray]:
    mean = float(np.mean(ranks[i] * ranks[j]))
    return mean - 0.25, ranks[i] * ranks[j] + above[i][j] + above[j][i] - 3 * mean

  (both, by_both), (first, by_first), (second, by_second) = moment(0, 1), moment(0, 0), moment(1, 1)
  if first <= 1e-12 or second <= 1e-12:
    return None
  value = both / math.sqrt(first * second)
  psi = by_both / math.sqrt(first * second) - value / 2 * (by_first / first + by_second / second)
  return Influence(value, (psi - psi.mean()) / len(one))


def _mean_above(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
  """Returns, for each point, the sum of `weight [n]` over the points above it, and half of it over its equals, by n."""
  values, group = np.unique(x, return_inverse=True)
  sums = np.bincount(group, weight, len(values))
  return (((sums[::-1].cumsum()[::-1] - sums) + sums / 2) / len(x))[group]


def _areas(positive: np.ndarray, score: np.ndarray) -> Influence | None:
  """Returns the mean area under the curves of `positive, score [n, C]` over the columns that hold both classes."""
  found = [area_influence(positive[:, c], score[:, c]) for c in range(score.shape[1])]
  known = [f for f in found if f is not None]
  if not known:
    return None
  return Influence(float(np.mean([f.value for f in known])), np.mean([f.psi for f in known], axis=0))


def area_influence(positive: np.ndarray, score: np.ndarray) -> Influence | None:
  """Returns the area under the ROC curve of `positive, score [n]`, by ranks, and influences; None for one class."""
  ones = int(positive.sum())
  zeros = len(positive) - ones
  if not ones or not zeros:
    return None
  rank, above = stats.rankdata(score), np.empty(len(score))
  # For a positive, the share of negatives below it; for a negative, the share of positives above it; ties count half.
  above[positive] = (rank[positive] - stats.rankdata(score[positive])) / zeros
  above[~positive] = 1 - (rank[~positive] - stats.rankdata(score[~positive])) / ones
  value = float(above[positive].mean())
  return Influence(value, (above - value) / np.where(positive, ones, zeros))


def user_interval(form: config.Answer, found: Influence | None, user: np.ndarray) -> Bounds | None:
  """Returns the interval of a metric whose labels belong to the users `user [n]`; None if it cannot be estimated.

  A metric at the end of its range (an area of 1) has no spread to estimate it from, nor has a single user.
  """
  if found is None:
    return None
  error = _error(found.psi, user)
  value = found.value
  if form == "regression":
    if error is None or value <= 0:
      return None
    by = error / value
    return value * math.exp(-by), value * math.exp(by)
  if form == "amount":
    if error is None or not -1 < value < 1:
      return None
    centre, by = math.atanh(value), error / (1 - value**2)
    return math.tanh(centre - by), math.tanh(centre + by)
  if error is None or not 0 < value < 1:
    return None
  centre, by = math.log(value / (1 - value)), error / (value * (1 - value))
  low, high = (1 / (1 + math.exp(-x)) for x in (centre - by, centre + by))
  return low, high


def difference(one: Influence | None, other: Influence | None, user: np.ndarray) -> dict[str, object] | None:
  """Returns the `difference` `one` − `other` on the same labels and its paired `interval`; None if either is None."""
  if one is None or other is None:
    return None
  by, error = one.value - other.value, _error(one.psi - other.psi, user)
  return {"difference": by, "interval": None if error is None else [by - error, by + error]}


def _error(psi: np.ndarray, user: np.ndarray) -> float | None:
  """Returns half the width of the interval of a metric, from the influences `psi [n]`; None for a single user."""
  _, of = np.unique(user, return_inverse=True)
  sums = np.bincount(of, psi)
  count = len(sums)
  if count < 2:
    return None
  variance = count / (count - 1) * float(np.sum(np.square(sums)))
  return float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(variance)
