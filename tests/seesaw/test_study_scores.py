"""Gains are measured only where single-task models are better than a constant answer beyond chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from supermoe_jax.seesaw import compare, study_scores, study_weights
from tests.fixtures.seesaw_runs import BAD, GOOD, METRIC, make, run, study

# Leads over the constant of .5 whose mean is positive and whose interval holds 0.
WEAK, STRONG = (0.499, 0.502, 0.505), (0.74, 0.75, 0.76)
# Three leads of about .1 whose plain interval lies above 0, and whose interval over two folds does not.
FOLDED = (0.56, 0.6, 0.64)


def scored(variant, seed, scores, task=None):
  """Returns a run with the same scores on validation and test."""
  tasks = {t: {s: {METRIC[t]: v} for s in ("validation", "test")} for t, v in scores.items()}
  return run(variant, seed, scores, task, tasks=tasks)


def singles(**scores):
  return {t: [scored("single", s, {t: v}, t) for s, v in enumerate(of)] for t, of in scores.items()}


def flat(references, *more):
  return [*(r for of in references.values() for r in of), *more]


def test_a_task_whose_single_task_model_may_be_no_better_than_a_constant_is_left_out():
  variant = [scored("v", s, {"churn": WEAK[s] + 0.003, "basket": STRONG[s] + 0.025}) for s in range(3)]
  runs = flat(singles(churn=WEAK, basket=STRONG), *variant)
  found = make(runs)
  assert found["no_better"] == ["churn"] and found["compared"] == ["basket"]
  assert found["variants"]["v"]["tasks"]["churn"]["gain"]["mean"] is None
  assert found["variants"]["v"]["mean_gain"]["mean"] == pytest.approx(10)
  assert found["single"]["churn"]["over_constant"]["mean"] == pytest.approx(0.002)
  (sentence,) = [m for m in found["missing"] if m.startswith("task churn")]
  assert "not better than a constant answer beyond chance" in sentence
  assert compare.on_validation(runs, ["v"])["variants"]["v"]["mean_gain"]["mean"] == pytest.approx(10)


def test_one_seed_is_judged_by_the_sign_of_its_lead():
  for alone, expected in ((0.502, ["churn"]), (0.498, [])):
    found = make(flat(singles(churn=(alone,)), scored("v", 0, {"churn": 0.51})))
    assert found["compared"] == expected


def test_a_lead_over_folds_of_users_has_a_wider_interval():
  runs = flat(singles(churn=FOLDED), *(scored("v", s, {"churn": 0.6}) for s in range(3)))
  assert make(runs)["compared"] == ["churn"]
  assert make(runs, folds={"churn": 2})["no_better"] == ["churn"]
  assert compare.on_validation(runs, ["v"])["best"] == "v"
  assert compare.on_validation(runs, ["v"], folds={"churn": 2})["best"] is None


def test_every_interval_of_a_folded_task_is_wider():
  variant = [scored("v", s, {"churn": STRONG[s] + 0.01 * s}) for s in range(3)]
  runs, possible = flat(singles(churn=STRONG), *variant), {"churn": {"bayes": 1.0, "constant": 0.5}}
  plain, folded = (make(runs, possible=possible, folds=f) for f in ({}, {"churn": 3}))

  def widths(report):
    shares = [report["single"]["churn"], report["variants"]["v"]["tasks"]["churn"]]
    found = [s["share_of_possible"] for s in shares] + [report["validation"]["variants"]["v"]["mean_gain"]]
    return [f["high"] - f["low"] for f in found]

  assert widths(folded) == pytest.approx([math.sqrt((1 / 3 + 1 / 2) * 3) * w for w in widths(plain)])


def test_a_fold_tests_one_user_for_each_that_the_other_folds_train_on():
  assert [study_scores.asked_share(n) for n in (2, 3, 5)] == [1, 0.5, 0.25]


def test_candidates_are_compared_by_their_mean_gain_on_validation():
  alone = singles(churn=(0.6,), spend=(2.0,))
  result = scored("v", 0, {"churn": 0.62, "spend": 1.9})
  assert study_weights.mean_validation_gain(result, alone) == pytest.approx((20 + 10) / 2)
  assert study_weights.mean_validation_gain(result, alone | singles(churn=(0.5,))) == pytest.approx(10)
  assert study_weights.mean_validation_gain(run("v", 0, {}), alone) == -math.inf


def test_gains_of_candidates_are_measured_by_the_lead_of_all_seeds():
  result = scored("v", 0, {"churn": 0.76, "basket": 0.6})
  assert study_weights.mean_validation_gain(result, singles(churn=STRONG)) == pytest.approx(100 * 0.02 / 0.25)
  weak = singles(churn=STRONG, basket=WEAK)
  assert study_weights.mean_validation_gain(result, weak) == pytest.approx(100 * 0.02 / 0.25)
  folded = singles(churn=FOLDED)
  assert study_weights.mean_validation_gain(result, folded) == pytest.approx(200)
  assert study_weights.mean_validation_gain(result, folded, {"churn": 2}) == -math.inf


def test_a_single_task_model_that_is_no_better_than_a_constant_has_no_gain_and_is_named():
  runs = study({"tuned": BAD, "good": GOOD})
  runs += [run("single", s, {"spend": 3.0 + 0.01 * s}, "spend") for s in range(3)]
  runs += [run(v, s + 3, {"spend": 2.9}) for v in ("tuned", "good") for s in range(1)]
  found = make(runs)
  assert found["no_better"] == ["spend"] and found["compared"] == ["churn", "basket"] and found["waiting"] == []
  assert found["variants"]["good"]["tasks"]["spend"]["gain"]["mean"] is None
  assert any(
    "task spend: its single-task model is not better than a constant answer beyond chance (rmse)" in m
    for m in found["missing"]
  )
  assert found["variants"]["good"]["mean_gain"]["mean"] == pytest.approx(np.mean(GOOD))


def test_a_ranking_without_a_known_constant_has_no_gain_and_is_named():
  tasks = {"item": {"validation": {}, "test": {"ndcg@10": 0.3}}}
  ranked = {"tasks": tasks, "main_metric": {"item": "ndcg@10"}}
  found = make([run("single", 0, {"item": 0.3}, "item", **ranked), run("v", 0, {"item": 0.3}, **ranked)])
  assert found["compared"] == [] and any("constant answer is not in the results" in m for m in found["missing"])


def test_intervals_over_folds_of_users_are_wider():
  """Folds share most of their training users, so their scores vary less than those of independent samples would."""
  runs = study({"tuned": BAD, "good": GOOD})
  plain = make(runs)["variants"]["good"]
  folded = make(runs, folds={"churn": 3})["variants"]["good"]
  wider = math.sqrt((1 / 3 + 0.5) / (1 / 3))

  def width(found):
    return found["high"] - found["low"]

  assert width(folded["tasks"]["churn"]["gain"]) == pytest.approx(wider * width(plain["tasks"]["churn"]["gain"]))
  assert folded["tasks"]["basket"] == plain["tasks"]["basket"]
  assert width(folded["mean_gain"]) == pytest.approx(wider * width(plain["mean_gain"]))
  assert width(folded["versus_tuned"]["harm"]) == pytest.approx(wider * width(plain["versus_tuned"]["harm"]))
