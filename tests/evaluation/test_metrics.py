import numpy as np
import pytest

from supermoe_jax.evaluation import metrics


def test_a_perfect_ranking_has_area_one_and_a_reversed_one_zero() -> None:
  label = np.array([0, 0, 1, 1])
  assert metrics.binary(label, np.array([0.1, 0.2, 0.8, 0.9]))["auc"] == 1.0
  assert metrics.binary(label, np.array([0.9, 0.8, 0.2, 0.1]))["auc"] == 0.0


def test_one_class_has_no_area() -> None:
  out = metrics.binary(np.zeros(3), np.full(3, 0.2))
  assert (out["auc"], out["average_precision"]) == (None, None)
  assert out["log_loss"] == pytest.approx(-np.log(0.8))


def test_calibration_error_is_the_distance_of_rates() -> None:
  rng = np.random.default_rng(0)
  probability = rng.random(20_000)
  label = (rng.random(20_000) < probability).astype(float)
  assert metrics.expected_calibration_error(label, probability) < 0.02
  assert metrics.expected_calibration_error(label, np.clip(probability + 0.3, 0, 1)) > 0.15


def test_values_that_never_occur_are_left_out_of_the_mean_and_counted() -> None:
  label = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]], float)
  out = metrics.multi_label(label, np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5], [0.7, 0.3, 0.5]]), k=1)
  assert out["mean_auc"] == 1.0
  assert out["values_without_auc"] == 1.0
  assert out["recall@1"] == 1.0


def test_ranking_metrics_of_known_ranks() -> None:
  out = metrics.ranking(np.array([1, 2, 6, np.inf]), (5,))
  assert out["hr@5"] == 0.5
  assert out["ndcg@5"] == pytest.approx((1 + 1 / np.log2(3)) / 4)
  assert out["mrr@5"] == pytest.approx((1 + 0.5) / 4)
