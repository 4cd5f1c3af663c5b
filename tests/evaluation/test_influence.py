"""Intervals of main metrics: they agree with their definitions, with resampling, and with what they promise."""

import dataclasses

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from supermoe_jax.evaluation import influence, intervals, metrics
from supermoe_jax.evaluation.breakdown import ScoredAnswers
from supermoe_jax.evaluation.influence import Scored


def labelled(n: int = 400, users: int = 120, seed: int = 0):
  """Labels of users whose own labels and answers hang together: `value, answer, user [n]`."""
  rng = np.random.default_rng(seed)
  user = rng.integers(0, users, n)
  taste = rng.normal(size=users)[user]
  value = (taste + rng.normal(size=n) > 0.5).astype(np.float64)
  return value, np.round(taste + value + rng.normal(size=n), 1), user  # rounded, so that there are ties


def test_the_variance_of_an_area_is_delongs_where_each_user_has_one_label() -> None:
  value, answer, _ = labelled()
  found = influence.area_influence(value > 0, answer)
  assert found is not None
  ones, zeros = answer[value > 0], answer[value == 0]
  wins = (ones[:, None] > zeros) + 0.5 * (ones[:, None] == zeros)
  assert found.value == pytest.approx(wins.mean()) == pytest.approx(roc_auc_score(value, answer))
  of_ones, of_zeros = wins.mean(axis=1), wins.mean(axis=0)
  delong = np.var(of_ones) / len(ones) + np.var(of_zeros) / len(zeros)
  assert np.sum(np.square(found.psi)) == pytest.approx(delong)
  assert found.psi.sum() == pytest.approx(0)


@pytest.mark.parametrize("form", ["binary", "multilabel", "multiclass", "regression", "catalogue"])
def test_an_interval_is_about_as_wide_as_by_resampling_users(form: str) -> None:
  value, answer, user = labelled()
  rng = np.random.default_rng(1)
  if form == "multilabel":
    value, answer = np.stack([value, 1 - value], axis=1), np.stack([answer, rng.normal(size=len(answer))], axis=1)
  elif form == "multiclass":
    value = value + (rng.random(len(value)) < 0.3)
    answer = np.stack([-answer, answer * 0.1, answer], axis=1)
  elif form == "catalogue":
    answer = np.where(rng.random(len(answer)) < 0.1, np.inf, np.ceil(np.exp(answer)))

  def measured(where: np.ndarray) -> float:
    found = influence.influence(Scored(form, value[where], answer[where], 10))
    assert found is not None
    return found.value

  whole = influence.influence(Scored(form, value, answer, 10))
  assert whole is not None
  low, high = influence.user_interval(form, whole, user)
  assert low < whole.value < high
  of = [np.flatnonzero(user == u) for u in np.unique(user)]
  again = [measured(np.concatenate([of[i] for i in rng.integers(0, len(of), len(of))])) for _ in range(400)]
  assert high - low == pytest.approx(2 * 1.96 * np.std(again), rel=0.15)


def test_the_values_are_those_of_the_metrics() -> None:
  value, answer, _ = labelled()
  probability = 1 / (1 + np.exp(-answer))
  rank = np.maximum(np.ceil(np.exp(answer)), 1)
  three = (value + (answer > 2)).astype(int)
  odds = np.stack([-answer, answer * 0.1, answer], axis=1)
  odds = np.exp(odds) / np.exp(odds).sum(axis=1, keepdims=True)
  many = np.stack([value, answer > 1, np.ones_like(value)], axis=1)
  given = {
    ("binary", "auc"): (value, probability, metrics.binary_metrics(value, probability)),
    ("regression", "rmse"): (value, answer, metrics.regression_metrics(value, answer)),
    ("catalogue", "ndcg@10"): (value, rank, metrics.ranking_metrics(rank, [10])),
    ("multiclass", "auc"): (three, odds, metrics.multi_class_metrics(three, odds)),
    ("multilabel", "mean_auc"): (many, odds, metrics.multi_label_metrics(many, odds)),
  }
  for (form, metric), (label, said, wanted) in given.items():
    found = influence.influence(Scored(form, label, said, 10))
    assert found is not None and found.value == pytest.approx(wanted[metric])


def test_of_a_hundred_intervals_about_ninety_five_hold_the_truth() -> None:
  """The area of two normal distributions a deviation apart is Φ(1/√2); users have one to four labels of one kind."""
  truth, held, rng = 0.76025, 0, np.random.default_rng(2)
  for _ in range(400):
    kind = rng.random(80) < 0.3
    user = np.repeat(np.arange(80), rng.integers(1, 5, 80))
    answer = (rng.normal(size=80) * 0.8)[user] + rng.normal(size=len(user)) * 0.6 + kind[user]
    low, high = influence.user_interval("binary", influence.area_influence(kind[user], answer), user)
    held += low < truth < high
  assert 0.92 <= held / 400 <= 0.98


def test_labels_repeated_within_users_tell_nothing_new() -> None:
  value, answer, user = labelled()
  once, thrice = (
    influence.user_interval(
      "binary", influence.area_influence(np.tile(value, k) > 0, np.tile(answer, k)), np.tile(user, k)
    )
    for k in (1, 3)
  )
  assert once == pytest.approx(thrice)


def test_a_difference_is_paired() -> None:
  value, answer, user = labelled()
  one = influence.area_influence(value > 0, answer)
  alike = influence.difference(one, influence.area_influence(value > 0, 2 * answer + 1), user)
  assert alike == {"difference": 0.0, "interval": [0.0, 0.0]}
  near = influence.area_influence(value > 0, answer + np.random.default_rng(3).normal(size=len(answer)) * 0.3)
  low, high = influence.difference(one, near, user)["interval"]
  alone = influence.user_interval("binary", one, user)
  assert high - low < 0.5 * (alone[1] - alone[0])


def test_of_a_mean_with_one_label_a_user_the_difference_is_students_paired_one() -> None:
  ranks = np.array([[1, 3, 2, 9, 30, 4, 1, 2], [2, 3, 1, 12, 10, 5, 4, 1]], float)
  gains = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)
  one, other = (influence.influence(Scored("catalogue", r, r, 10)) for r in ranks)
  found = influence.difference(one, other, np.arange(8))
  assert found is not None
  wanted = stats.ttest_rel(*gains)
  assert found["difference"] == pytest.approx(gains[0].mean() - gains[1].mean())
  assert found["interval"] == pytest.approx(list(wanted.confidence_interval(0.95)))


def test_where_labels_tell_of_no_spread_there_is_no_interval() -> None:
  value = np.array([0.0, 0, 1, 1])
  users = np.arange(4)
  assert influence.area_influence(value == 2, value) is None
  assert influence.user_interval("binary", None, users) is None
  assert influence.user_interval("binary", influence.area_influence(value > 0, value), users) is None  # an area of 1
  assert (
    influence.user_interval("binary", influence.area_influence(value > 0, value[::-1] + users % 2), users * 0) is None
  )
  assert influence.user_interval("binary", influence.area_influence(value > 0, value * 0), users) == pytest.approx(
    (0.5, 0.5)
  )


def test_the_interval_of_a_share_covers_it_as_often_as_it_says() -> None:
  rng = np.random.default_rng(0)
  for true in (0.05, 0.3, 0.9):
    found = [intervals.wilson(int(hits), 60) for hits in rng.binomial(60, true, 2000)]
    assert 0.92 < np.mean([low <= true <= high for low, high in found]) < 0.98
  assert intervals.wilson(0, 20)[0] == 0.0 and intervals.wilson(20, 20)[1] == pytest.approx(1.0)


def test_the_interval_of_a_share_is_wilsons() -> None:
  assert intervals.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
  assert intervals.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@pytest.fixture
def answers() -> ScoredAnswers:
  value, answer, user = labelled()
  events = np.random.default_rng(4).integers(1, 300, len(value))
  events[:3] = [3, 4, 5000]
  probability = 1 / (1 + np.exp(-answer))
  return ScoredAnswers("binary", value, probability, {"constant": np.full(len(value), 0.3)}, user, events, 10)


def test_a_run_is_set_beside_each_baseline_and_ahead_of_it_is_above_zero(answers: ScoredAnswers) -> None:
  found = answers.with_intervals()
  one, other = (influence.area_influence(answers.value > 0, a) for a in (answers.run, answers.baselines["constant"]))
  assert one is not None and other is not None and one.value > 0.6
  assert found["users"] == len(np.unique(answers.user)) < len(answers.user)
  assert found["run"] == list(influence.user_interval("binary", one, answers.user) or ())
  assert found["baselines"] == {"constant": [pytest.approx(0.5)] * 2}
  lead = found["differences"]["constant"]
  assert lead["difference"] == pytest.approx(one.value - 0.5)
  assert 0 < lead["interval"][0] < lead["difference"] < lead["interval"][1]
  assert np.mean(lead["interval"]) == pytest.approx(lead["difference"])


def test_groups_of_histories_hold_every_label_once_and_are_scored_alone(answers: ScoredAnswers) -> None:
  groups = answers.by_history()
  assert sum(g["labels"] for g in groups) == len(answers.value)
  assert [g["from"] for g in groups] == [1, 4, 16, 64, 256, 4096] and [g["to"] for g in groups][:3] == [3, 15, 63]
  third = (answers.events >= 16) & (answers.events < 64)
  assert groups[2]["labels"] == third.sum() and groups[2]["users"] == len(np.unique(answers.user[third]))
  assert groups[2]["run"]["value"] == pytest.approx(roc_auc_score(answers.value[third], answers.run[third]))
  assert groups[2]["baselines"]["constant"]["value"] == 0.5
  assert groups[2]["positive"] == pytest.approx(answers.value[third].mean())
  last = groups[-1]
  assert last["labels"] == 1 and last["run"] == {"value": None, "interval": None}


def test_bins_of_a_calibration_are_those_of_its_error(answers: ScoredAnswers) -> None:
  found = answers.calibration()
  assert found is not None
  assert found["ece"] == pytest.approx(metrics.expected_calibration_error(answers.value, answers.run))
  assert sum(b["labels"] for b in found["bins"]) == len(answers.value)
  assert all(b["least"] <= b["predicted"] <= b["most"] for b in found["bins"])
  assert all(b["interval"][0] <= b["observed"] <= b["interval"][1] for b in found["bins"])


def test_questions_about_many_values_are_calibrated_together(answers: ScoredAnswers) -> None:
  many = dataclasses.replace(
    answers,
    form="multilabel",
    value=np.stack([answers.value, 1 - answers.value], axis=1),
    run=np.stack([answers.run, answers.run], axis=1),
  )
  found = many.calibration()
  assert found is not None and found["pooled"] and found["labels"] == 2 * len(answers.value)
  assert [b["observed"] for b in found["bins"]] == pytest.approx([0.5] * 10, abs=0.05)
  assert dataclasses.replace(answers, form="regression").calibration() is None
