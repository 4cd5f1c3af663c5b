import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from supermoe_jax.evaluation import metrics

seeds = st.integers(0, 2**16)


def test_a_perfect_ranking_has_area_one_and_a_reversed_one_zero() -> None:
  label = np.array([0, 0, 1, 1])
  assert metrics.binary_metrics(label, np.array([0.1, 0.2, 0.8, 0.9]))["auc"] == 1.0
  assert metrics.binary_metrics(label, np.array([0.9, 0.8, 0.2, 0.1]))["auc"] == 0.0


def test_metrics_of_four_answers_are_those_worked_out_by_hand() -> None:
  label, probability = np.array([0, 1, 1, 0]), np.array([0.1, 0.8, 0.4, 0.6])
  out = metrics.binary_metrics(label, probability)
  assert out["auc"] == pytest.approx(3 / 4)  # of four pairs one is the wrong way round
  assert out["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
  assert out["log_loss"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.4]).mean())
  assert out["ece"] == pytest.approx(np.mean([0.1, 0.2, 0.6, 0.6]))


def test_one_class_has_no_area() -> None:
  out = metrics.binary_metrics(np.zeros(3), np.full(3, 0.2))
  assert (out["auc"], out["average_precision"]) == (None, None)
  assert out["log_loss"] == pytest.approx(-np.log(0.8))


def test_calibration_error_is_the_distance_of_rates() -> None:
  rng = np.random.default_rng(0)
  probability = rng.random(20_000)
  label = (rng.random(20_000) < probability).astype(float)
  assert metrics.expected_calibration_error(label, probability) < 0.02
  assert metrics.expected_calibration_error(label, np.clip(probability + 0.3, 0, 1)) > 0.15


def test_calibration_error_counts_every_label_alike() -> None:
  """Eleven labels fill ten bins: the first bin holds two labels, the others one."""
  probability = np.arange(11) / 20
  assert metrics.expected_calibration_error(np.zeros(11), probability) == pytest.approx(probability.mean())
  shuffled = np.random.default_rng(0).permutation(11)
  assert metrics.expected_calibration_error(np.zeros(11), probability[shuffled]) == pytest.approx(probability.mean())


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 60), st.integers(1, 8), st.sampled_from([2, 5, 1000]))
def test_gauc_is_the_label_weighted_mean_of_the_users_own_areas(seed: int, n: int, users: int, values: int) -> None:
  rng = np.random.default_rng(seed)
  label = (rng.random(n) < 0.4).astype(np.float32)
  probability = rng.integers(0, values, n) / values  # few values: many ties
  user = rng.integers(0, users, n) * 7 - 3  # no indices
  total = weight = counted = 0.0
  for u in np.unique(user):
    own = user == u
    if 0 < label[own].sum() < own.sum():
      total += own.sum() * sk.roc_auc_score(label[own], probability[own])
      weight += own.sum()
      counted += 1
  out = metrics.event_binary_metrics(label, probability, user)
  assert out["gauc_users"] == counted
  assert out["gauc"] == (pytest.approx(total / weight, abs=1e-12) if counted else None)
  assert {k: v for k, v in out.items() if not k.startswith("gauc")} == metrics.binary_metrics(label, probability)


def test_gauc_does_not_see_how_users_differ_from_each_other() -> None:
  label, user = np.array([0, 0, 1, 0, 1, 1]), np.array([1, 1, 1, 2, 2, 2])
  probability = np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9])
  wrong_within = np.array([0.3, 0.2, 0.1, 0.9, 0.8, 0.7])
  assert metrics.event_binary_metrics(label, probability, user)["gauc"] == 1.0
  out = metrics.event_binary_metrics(label, wrong_within, user)
  assert out["gauc"] == 0.0 and out["auc"] is not None and out["auc"] > 0.3


def test_without_a_user_of_both_classes_there_is_no_gauc() -> None:
  out = metrics.event_binary_metrics(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9]), np.array([5, 5, 6, 6]))
  assert (out["gauc"], out["gauc_users"], out["auc"]) == (None, 0.0, 1.0)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 60), st.integers(2, 5))
def test_multi_class_metrics_equal_those_of_scikit_learn(seed: int, n: int, classes: int) -> None:
  rng = np.random.default_rng(seed)
  label = rng.integers(0, classes, n)
  assume(len(np.unique(label)) > 1)
  probability = rng.dirichlet(np.ones(classes), n)
  answer = probability.argmax(axis=1)
  out = metrics.multi_class_metrics(label, probability)
  present = np.unique(label)
  areas = [sk.roc_auc_score(label == c, probability[:, c]) for c in present]
  assert out["accuracy"] == sk.accuracy_score(label, answer)
  assert out["macro_f1"] == pytest.approx(sk.f1_score(label, answer, average="macro", zero_division=0))
  assert out["log_loss"] == pytest.approx(sk.log_loss(label, probability, labels=range(classes)))
  assert out["auc"] == pytest.approx(np.mean(areas))
  assert out["classes_without_auc"] == classes - len(present)
  if len(present) == classes > 2:
    assert out["auc"] == pytest.approx(sk.roc_auc_score(label, probability, multi_class="ovr", average="macro"))


def test_labels_of_one_class_have_no_area_but_the_other_metrics() -> None:
  out = metrics.multi_class_metrics(np.array([2, 2]), np.array([[0.2, 0.2, 0.6], [0.5, 0.1, 0.4]]))
  assert (out["auc"], out["classes_without_auc"], out["accuracy"]) == (None, 3.0, 0.5)
  assert out["log_loss"] == pytest.approx(-np.log(0.6 * 0.4) / 2)


def test_calibration_of_several_classes_is_that_of_the_likeliest() -> None:
  rng = np.random.default_rng(0)
  probability = rng.dirichlet(np.ones(3), 20_000)
  label = np.array([rng.choice(3, p=p) for p in probability])
  over = probability**3 / np.sum(probability**3, axis=1, keepdims=True)
  assert (
    metrics.multi_class_metrics(label, probability)["ece"]
    < 0.02
    < 0.1
    < metrics.multi_class_metrics(label, over)["ece"]
  )


def test_a_certain_wrong_answer_costs_much_but_not_everything() -> None:
  out = metrics.multi_class_metrics(np.array([0, 1]), np.array([[0.0, 1.0], [0.0, 1.0]]))
  assert out["log_loss"] == pytest.approx(-np.log(metrics.SMALLEST_PROBABILITY) / 2)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(2, 50))
def test_regression_metrics_equal_those_of_scikit_learn(seed: int, n: int) -> None:
  rng = np.random.default_rng(seed)
  label, prediction = rng.normal(3, 2, n).astype(np.float32), rng.normal(3, 2, n)
  out = metrics.regression_metrics(label, prediction)
  assert out["rmse"] == pytest.approx(sk.root_mean_squared_error(label, prediction))
  assert out["mae"] == pytest.approx(sk.mean_absolute_error(label, prediction))
  assert out["r2"] == pytest.approx(sk.r2_score(label, prediction), rel=1e-5, abs=1e-5)


def test_labels_that_are_all_alike_have_no_r2() -> None:
  # 0.1 is no float32: the mean of many differs from each by rounding.
  out = metrics.regression_metrics(np.full(7, 0.1, np.float32), np.full(7, 1.1))
  assert out["r2"] is None
  assert out["rmse"] == pytest.approx(1.0) == out["mae"]


def test_values_that_never_occur_are_left_out_of_the_mean_and_counted() -> None:
  label = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]], float)
  out = metrics.multi_label_metrics(label, np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5], [0.7, 0.3, 0.5]]), k=1)
  assert out["mean_auc"] == 1.0
  assert out["values_without_auc"] == 1.0
  assert out["recall@1"] == 1.0


def test_many_values_are_measured_value_by_value_and_recalled_user_by_user() -> None:
  label = np.array([[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], float)
  probability = np.array([[0.9, 0.1, 0.3, 0.8], [0.2, 0.6, 0.7, 0.1], [0.5, 0.5, 0.1, 0.1], [0.3, 0.2, 0.8, 0.7]])
  out = metrics.multi_label_metrics(label, probability, k=2)
  # Of the first user one of three is found; of the second all; the third wants none.
  assert out["recall@2"] == pytest.approx((1 / 3 + 1 + 0) / 3)
  areas = [sk.roc_auc_score(label[:, v], probability[:, v]) for v in range(3)]
  assert out["mean_auc"] == pytest.approx(np.mean(areas)) and out["values_without_auc"] == 1
  own = np.where(label > 0, probability, 1 - probability)
  assert out["log_loss"] == pytest.approx(-np.log(own).mean())
  assert metrics.multi_label_metrics(label * 0, probability)["recall@10"] is None


def test_ranking_metrics_of_known_ranks() -> None:
  out = metrics.ranking_metrics(np.array([1, 2, 5, 6, np.inf]), (2, 5))
  assert (out["hr@2"], out["hr@5"]) == (2 / 5, 3 / 5)  # the k-th place counts
  assert out["ndcg@2"] == pytest.approx((1 + 1 / np.log2(3)) / 5)
  assert out["ndcg@5"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(6)) / 5)
  assert out["mrr@2"] == pytest.approx((1 + 1 / 2) / 5)
  assert out["mrr@5"] == pytest.approx((1 + 1 / 2 + 1 / 5) / 5)


def test_nothing_can_be_measured_without_a_label() -> None:
  none = np.zeros(0)
  for measure in (
    lambda: metrics.binary_metrics(none, none),
    lambda: metrics.event_binary_metrics(none, none, none),
    lambda: metrics.multi_class_metrics(none.astype(int), np.zeros((0, 3))),
    lambda: metrics.multi_label_metrics(np.zeros((0, 3)), np.zeros((0, 3))),
    lambda: metrics.regression_metrics(none, none),
    lambda: metrics.ranking_metrics(none, (5,)),
  ):
    with pytest.raises(ValueError, match="no label"):
      measure()


def test_the_better_of_two_values_depends_on_the_metric() -> None:
  assert metrics.best_value("auc", [0.6, None, 0.7]) == 0.7
  assert metrics.best_value("rmse", [0.6, None, 0.7]) == 0.6
  assert metrics.best_value("rmse", [None]) is None
  for less in ("log_loss", "ece", "rmse", "mae"):
    assert metrics.best_value(less, [0.7, 0.6]) == 0.6 and metrics.improvement(less, 0.7, 0.6) < 0
  for more in ("auc", "average_precision", "gauc", "accuracy", "macro_f1", "mean_auc", "r2", "ndcg@10", "hr@10"):
    assert metrics.best_value(more, [0.7, 0.6]) == 0.7 and metrics.improvement(more, 0.7, 0.6) > 0
  assert metrics.improvement("auc", 0.7, 0.6) == pytest.approx(0.1) == metrics.improvement("rmse", 0.6, 0.7)
