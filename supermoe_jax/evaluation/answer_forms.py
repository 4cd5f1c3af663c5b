"""Defines how each form of answers is measured: predictions from a model's answers, metrics, and the main metric.

Shapes: n labels, C classes or values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.encoding.censored_times import chances_by_day
from supermoe_jax.evaluation import metrics, survival
from supermoe_jax.evaluation.metrics import Metrics
from supermoe_jax.training.answer_forms import LARGEST_LOGARITHM, LEAST_DEVIATION


class AnswerMetrics:
  """The measures of a form of answers; this base class measures yes-or-no answers about users."""

  main = "auc"
  aggregate_model = "aggregates + logistic"  # the baseline's name in tables

  def main_metric(self, cutoffs: Sequence[int]) -> str:
    """Returns the name of the main metric."""
    del cutoffs
    return self.main

  def predictions(self, answer: np.ndarray) -> np.ndarray:
    """Returns the input of the metrics, float64, from a model's answers `[n, …]`: probabilities from logits."""
    return np.asarray(np.exp(-np.logaddexp(0, -answer.astype(np.float64))))

  def scores(self, predicted: np.ndarray) -> np.ndarray:
    """Returns what the main metric compares with the labels: the predictions themselves, or a number of each `[n]`."""
    return predicted

  def measure(self, value: np.ndarray, predicted: np.ndarray, users: np.ndarray) -> Metrics:
    """Returns the metrics of predictions for the labels `value [n, …]` of `users [n]`."""
    del users
    return metrics.binary_metrics(value.astype(np.float32), predicted)

  def metric_names(self, cutoffs: Sequence[int]) -> list[str]:
    """Returns the names of all metrics, by measuring two right answers."""
    del cutoffs
    two = np.arange(2)
    return sorted(self.measure(two, two.astype(np.float64), two))


class EventMetrics(AnswerMetrics):
  """The measures of yes-or-no answers about events; a user may have several events."""

  def measure(self, value: np.ndarray, predicted: np.ndarray, users: np.ndarray) -> Metrics:
    """See `AnswerMetrics`."""
    return metrics.event_binary_metrics(value.astype(np.float32), predicted, users)


class SeveralMetrics(AnswerMetrics):
  """The measures of a yes or no for each of several values."""

  main = "mean_auc"

  def measure(self, value: np.ndarray, predicted: np.ndarray, users: np.ndarray) -> Metrics:
    """See `AnswerMetrics`."""
    return metrics.multi_label_metrics(value.astype(np.float32), predicted)

  def metric_names(self, cutoffs: Sequence[int]) -> list[str]:
    """See `AnswerMetrics`."""
    return sorted(self.measure(np.eye(2), np.eye(2), np.arange(2)))


class ClassMetrics(AnswerMetrics):
  """The measures of one of several classes."""

  def predictions(self, answer: np.ndarray) -> np.ndarray:
    """See `AnswerMetrics`; the result is `[n, C]`."""
    answer = answer.astype(np.float64)
    odds = np.exp(answer - answer.max(axis=-1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=-1, keepdims=True))

  def measure(self, value: np.ndarray, predicted: np.ndarray, users: np.ndarray) -> Metrics:
    """See `AnswerMetrics`."""
    return metrics.multi_class_metrics(value.astype(np.int64), predicted)

  def metric_names(self, cutoffs: Sequence[int]) -> list[str]:
    """See `AnswerMetrics`."""
    return sorted(self.measure(np.arange(2), np.eye(2), np.arange(2)))


class NumberMetrics(AnswerMetrics):
  """The measures of a number."""

  main = "rmse"
  aggregate_model = "aggregates + ridge"

  def predictions(self, answer: np.ndarray) -> np.ndarray:
    """See `AnswerMetrics`; numbers stay as they are."""
    return answer.astype(np.float64)

  def measure(self, value: np.ndarray, predicted: np.ndarray, users: np.ndarray) -> Metrics:
    """See `AnswerMetrics`."""
    return metrics.regression_metrics(value, predicted)


class AmountMetrics(AnswerMetrics):
  """The measures of an amount; `loss` is the task's loss, on which the meaning of answers depends."""

  main = "spearman"
  aggregate_model = "aggregates + boosted trees"

  def __init__(self, loss: str = "log1p"):
    self._loss = loss

  def predictions(self, answer: np.ndarray) -> np.ndarray:
    """See `AnswerMetrics`; the expected amount, or with the loss `log1p` a typical one."""
    answer = answer.astype(np.float64)
    if self._loss == "zero_inflated":
      chance, deviation = super().predictions(answer[..., 0]), np.logaddexp(0, answer[..., 2]) + LEAST_DEVIATION
      return np.asarray(chance * np.exp(_cut(answer[..., 1] + deviation**2 / 2)))
    if self._loss == "log1p":
      return np.asarray(np.sign(answer) * np.expm1(np.abs(_cut(answer))))
    return np.asarray(np.exp(_cut(answer)))

  def measure(self, value: np.ndarray, predicted: np.ndarray, users: np.ndarray) -> Metrics:
    """See `AnswerMetrics`."""
    return metrics.amount_metrics(value, predicted)


class SurvivalMetrics(AnswerMetrics):
  """The measures of times that may be censored; `edges` are the ends of the K intervals, in days."""

  main = "concordance"
  aggregate_model = "aggregates + boosted trees"

  def __init__(self, edges: Sequence[float]):
    self.edges = tuple(edges)

  def predictions(self, answer: np.ndarray) -> np.ndarray:
    """See `AnswerMetrics`; the chance of an event by the end of each interval, `[n, K]`."""
    return chances_by_day(super().predictions(answer))

  def scores(self, predicted: np.ndarray) -> np.ndarray:
    """See `AnswerMetrics`; the expected days within the horizon, `[n]`."""
    return survival.predicted_days(predicted, self.edges)

  def measure(self, value: np.ndarray, predicted: np.ndarray, users: np.ndarray) -> Metrics:
    """See `AnswerMetrics`; `predicted` are chances `[n, K]`, or days `[n]`, which have a concordance only."""
    return survival.survival_metrics(value, predicted, self.edges)

  def metric_names(self, cutoffs: Sequence[int]) -> list[str]:
    """See `AnswerMetrics`."""
    chances = np.full((2, len(self.edges)), 0.5)
    return sorted(self.measure(np.array([[0.0, 1.0], [self.edges[-1], 0.0]]), chances, np.arange(2)))


def _cut(logarithm: np.ndarray) -> np.ndarray:
  return np.clip(logarithm, -LARGEST_LOGARITHM, LARGEST_LOGARITHM)


class RankingMetrics(AnswerMetrics):
  """The measures of one of a field's values, ranked among all; a prediction is the rank of the true value."""

  def main_metric(self, cutoffs: Sequence[int]) -> str:
    """See `AnswerMetrics`."""
    return f"ndcg@{max(cutoffs)}"

  def metric_names(self, cutoffs: Sequence[int]) -> list[str]:
    """See `AnswerMetrics`."""
    return sorted(metrics.ranking_metrics(np.arange(2) + 1.0, cutoffs))


FORMS: dict[config.Answer, AnswerMetrics] = {
  "binary": AnswerMetrics(),
  "catalogue": RankingMetrics(),
  "multiclass": ClassMetrics(),
  "multilabel": SeveralMetrics(),
  "regression": NumberMetrics(),
  "amount": AmountMetrics(),
}


def form_of(task: config.LabelledTask) -> AnswerMetrics:
  """Returns the measures of a task's answers."""
  if isinstance(task, config.FutureAmount):
    return AmountMetrics(task.loss)
  if isinstance(task, config.TimeToEvent):
    return SurvivalMetrics(task.edges)
  return EventMetrics() if task.about_events and task.answer == "binary" else FORMS[task.answer]
