"""Every metric equals a plain reference, scikit-learn's or its definition in a loop, on random answers with ties."""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics as sk

from supermoe_jax.evaluation import metrics
from tests.fixtures.grids import quick_few

Case = tuple[metrics.Metrics, dict[str, float | None]]


def answers(rng: np.random.Generator, *shape: int) -> np.ndarray:
  """Returns random probabilities; all are equal, or many, or none."""
  levels = rng.choice([1, 2, 5, 10**6])
  return (rng.integers(0, levels, shape) + 0.5) / levels


def area(label: np.ndarray, score: np.ndarray) -> float | None:
  """The share of pairs of a positive and a negative that are the right way round; ties count half."""
  ones, zeros = score[label > 0], score[label == 0]
  if not len(ones) or not len(zeros):
    return None
  return float(np.mean((ones[:, None] > zeros) + 0.5 * (ones[:, None] == zeros)))


def mean(values: list[float | None]) -> float | None:
  known = [v for v in values if v is not None]
  return float(np.mean(known)) if known else None


def calibration_error(label: np.ndarray, probability: np.ndarray) -> float:
  """Ten bins of ranks; each label is spread evenly over the ranks of the labels with its probability."""
  n, ranked = len(label), sorted(zip(probability, label))
  rate = {p: np.mean(label[probability == p]) for p in set(probability)}
  smooth = [rate[p] for p, _ in ranked]
  size, more = divmod(n, 10)
  ends = np.cumsum([size + (i < more) for i in range(10)])
  bins = zip([0, *ends[:-1]], ends)
  return sum(abs(sum(ranked[i][0] - smooth[i] for i in range(a, b))) for a, b in bins) / n


def binary(rng: np.random.Generator) -> Case:
  n = int(rng.integers(1, 40))
  label, probability = (rng.random(n) < rng.random()).astype(float), answers(rng, n)
  both = 0 < label.sum() < n
  wanted = {
    "auc": area(label, probability),
    "average_precision": sk.average_precision_score(label, probability) if both else None,
    "log_loss": -np.mean([np.log(p if y else 1 - p) for p, y in zip(probability, label)]),
    "ece": calibration_error(label, probability),
  }
  return metrics.binary_metrics(label, probability), wanted


def of_events(rng: np.random.Generator) -> Case:
  n = int(rng.integers(1, 60))
  label, probability, user = (rng.random(n) < 0.5).astype(float), answers(rng, n), rng.integers(0, 6, n)
  own = {u: area(label[user == u], probability[user == u]) for u in set(user.tolist())}
  labels = {u: int(np.sum(user == u)) for u, a in own.items() if a is not None}
  total = sum(labels[u] * (own[u] or 0.0) for u in labels)
  wanted = {"gauc": total / sum(labels.values()) if labels else None, "gauc_users": len(labels)}
  return metrics.event_binary_metrics(label, probability, user), wanted | metrics.binary_metrics(label, probability)


def multi_class(rng: np.random.Generator) -> Case:
  n, classes = int(rng.integers(1, 40)), int(rng.integers(2, 6))
  label, odds = rng.integers(0, classes, n), answers(rng, n, classes)
  probability = odds / odds.sum(axis=1, keepdims=True)
  first = [next(c for c in range(classes) if p[c] == max(p)) for p in probability]
  right = np.array(first) == label
  areas = [area((label == c).astype(float), probability[:, c]) for c in range(classes)]
  wanted = {
    "accuracy": sk.accuracy_score(label, first),
    "macro_f1": sk.f1_score(label, first, average="macro", zero_division=0),
    "auc": mean(areas),
    "log_loss": -np.mean([np.log(max(p[y], 1e-7)) for p, y in zip(probability, label)]),
    "ece": calibration_error(right.astype(float), probability.max(axis=1)),
    "classes_without_auc": areas.count(None),
  }
  return metrics.multi_class_metrics(label, probability), wanted


def multi_label(rng: np.random.Generator) -> Case:
  n, values, k = int(rng.integers(1, 20)), int(rng.integers(1, 12)), int(rng.integers(1, 8))
  label, probability = (rng.random((n, values)) < rng.random()).astype(float), answers(rng, n, values)
  areas = [area(label[:, v], probability[:, v]) for v in range(values)]
  shown = [sorted(range(values), key=lambda v, p=p: (-p[v], v))[:k] for p in probability]
  recall = [sum(y[v] for v in top) / sum(y) if sum(y) else None for y, top in zip(label, shown)]
  wanted = {
    "mean_auc": mean(areas),
    f"recall@{k}": mean(recall),
    "log_loss": -np.mean(np.log(np.where(label > 0, probability, 1 - probability))),
    "values_without_auc": areas.count(None),
  }
  return metrics.multi_label_metrics(label, probability, k), wanted


def regression(rng: np.random.Generator) -> Case:
  n = int(rng.integers(1, 40))
  label, prediction = rng.integers(-3, 4, n).astype(float), rng.integers(-3, 4, n) * rng.random()
  wanted = {
    "rmse": sk.root_mean_squared_error(label, prediction),
    "mae": sk.mean_absolute_error(label, prediction),
    "r2": sk.r2_score(label, prediction) if len(set(label)) > 1 else None,
  }
  return metrics.regression_metrics(label, prediction), wanted


def ranking(rng: np.random.Generator) -> Case:
  n, k = int(rng.integers(1, 40)), int(rng.integers(1, 12))
  rank = np.where(rng.random(n) < 0.2, np.inf, rng.integers(1, 20, n))
  wanted = {
    f"hr@{k}": np.mean([r <= k for r in rank]),
    f"ndcg@{k}": np.mean([1 / np.log2(1 + r) if r <= k else 0 for r in rank]),
    f"mrr@{k}": np.mean([1 / r if r <= k else 0 for r in rank]),
  }
  return metrics.ranking_metrics(rank, (k,)), wanted


KINDS = (binary, of_events, multi_class, multi_label, regression, ranking)


@pytest.mark.parametrize("cases", quick_few([25], [25, 1000]))
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_equal_a_plain_reference(kind: Callable[[np.random.Generator], Case], cases: int) -> None:
  for seed in range(cases):
    found, wanted = kind(np.random.default_rng(seed))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
      close = value if value is None else pytest.approx(value, rel=1e-9, abs=1e-12)
      assert found[name] == close, f"{name}, seed {seed}"


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_answers_and_labels_that_are_not_numbers_are_refused(broken: float) -> None:
  one, wide = np.array([0.0, 1.0, 1.0]), np.eye(3)
  bad, bad_wide = np.array([0.5, broken, 0.1]), np.where(wide > 0, broken, 0.1)
  for measure in (
    lambda: metrics.binary_metrics(one, bad),
    lambda: metrics.binary_metrics(bad, one),
    lambda: metrics.event_binary_metrics(one, bad, one),
    lambda: metrics.multi_class_metrics(one.astype(int), bad_wide),
    lambda: metrics.multi_label_metrics(wide, bad_wide),
    lambda: metrics.multi_label_metrics(bad_wide, wide),
    lambda: metrics.regression_metrics(one, bad),
    lambda: metrics.regression_metrics(bad, one),
    lambda: metrics.ranking_metrics(np.array([1.0, np.nan, 2.0]), (5,)),
  ):
    with pytest.raises(ValueError, match=r"^[13] of [39] (labels|answers) are not finite numbers"):
      measure()


@pytest.mark.parametrize("order", ["as they come", "ones last", "ones first"])
def test_the_calibration_of_a_constant_does_not_depend_on_the_order_of_the_labels(order: str) -> None:
  label = (np.random.default_rng(0).random(200) < 0.3).astype(float)
  label = {"as they come": label, "ones last": np.sort(label), "ones first": np.sort(label)[::-1]}[order]
  assert metrics.expected_calibration_error(label, np.full(200, label.mean())) == pytest.approx(0, abs=1e-12)
