"""The statistics of a seesaw study against slow references."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from supermoe_jax.evaluation import metrics
from supermoe_jax.seesaw import compare, gains
from supermoe_jax.seesaw.run_result import RunResult
from tests.fixtures.seesaw_runs import BAD, FINITE, GOOD, make, run, singles, study


def slow_interval(values):
  mean = statistics.fmean(values)
  if len(values) == 1:
    return mean, None, None
  if not statistics.stdev(values):  # scipy gives NaN
    return mean, mean, mean
  return (mean, *stats.t.interval(0.95, len(values) - 1, mean, statistics.stdev(values) / math.sqrt(len(values))))


@given(st.lists(FINITE, min_size=1, max_size=7))
@settings(max_examples=50, deadline=None)
def test_an_interval_is_students(values):
  found = gains.estimate(values)
  mean, low, high = slow_interval(values)
  assert found["seeds"] == len(values) and found["mean"] == pytest.approx(mean, abs=1e-9)
  if len(values) == 1:
    assert found["low"] is None and found["high"] is None
  elif statistics.stdev(values) > 1e-6:  # below this, rounding is all there is
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
  else:
    assert found["low"] == pytest.approx(mean, abs=1e-4) == found["high"]


def test_no_seed_has_no_mean():
  assert gains.estimate([]) == {"mean": None, "low": None, "high": None, "seeds": 0}


def test_a_gain_is_a_share_of_what_the_single_task_model_has_over_a_constant_answer():
  assert gains.relative_gain("auc", 0.66, 0.6, 0.1) == pytest.approx(60)
  assert gains.relative_gain("auc", 0.95, 0.9, 0.4) == pytest.approx(12.5)
  assert gains.relative_gain("rmse", 0.66, 0.6, 0.2) == pytest.approx(-30)
  assert gains.relative_gain("ndcg@10", 0.03, 0.06, 0.04) == pytest.approx(-75)
  assert all(gains.relative_gain(m, 0.9, 1.0, 0.5) > 0 for m in ("rmse", "mae", "log_loss", "ece"))
  assert gains.relative_gain("auc", 0.55, 0.5, 0.0) is None
  assert gains.relative_gain("auc", 0.55, 0.49, -0.01) is None


def test_the_score_of_a_constant_answer():
  assert [gains.constant_score(m, {}) for m in ("auc", "mean_auc", "gauc", "concordance")] == [0.5] * 4
  assert gains.constant_score("spearman", {}) == gains.constant_score("r2", {}) == 0
  label, prediction = np.array([1.0, 2.0, 6.0]), np.array([1.5, 2.0, 4.0])
  measured = metrics.regression_metrics(label, prediction)
  constant = metrics.regression_metrics(label, np.full(3, label.mean()))
  assert gains.constant_score("rmse", measured) == pytest.approx(constant["rmse"])
  assert gains.constant_score("rmse", {"rmse": 1.0, "r2": None}) is None
  assert gains.constant_score("ndcg@10", {"ndcg@10": 0.3}) is None


def test_gains_are_measured_from_the_constant_answer_of_each_metric():
  metric = {"churn": "auc", "spend": "rmse", "item": "ndcg@10"}
  popular = {"item": {"validation": 0.05, "test": 0.1}}

  def scored(variant, scores, r2, task=None):
    tasks = {t: {"validation": {}, "test": {metric[t]: v}} for t, v in scores.items()}
    if "spend" in tasks:
      tasks["spend"]["test"]["r2"] = r2
    main = {t: metric[t] for t in scores}
    return run(variant, 0, scores, task, tasks=tasks, main_metric=main, constant_scores=popular)

  alone = {"churn": 0.9, "spend": 2.0, "item": 0.3}
  runs = [scored("single", {t: v}, 0.75, t) for t, v in alone.items()]  # a constant's error is 4
  runs.append(scored("v", {"churn": 0.95, "spend": 2.5, "item": 0.2}, 1 - (2.5 / 4) ** 2))
  found = make(runs)
  assert found["compared"] == list(metric)
  expected = {"churn": 12.5, "spend": -25.0, "item": -50.0}
  assert {t: v["gain"]["mean"] for t, v in found["variants"]["v"]["tasks"].items()} == pytest.approx(expected)
  over = {t: v["over_constant"]["mean"] for t, v in found["single"].items()}
  assert over == pytest.approx({"churn": 0.4, "spend": 2.0, "item": 0.2})
  assert any("percent of what the single-task model has over a constant answer" in w for w in found["words"])


@given(st.lists(st.lists(FINITE, min_size=3, max_size=3), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_summaries_against_a_slow_reference(rows):
  """Every summary of a variant, made per seed and then averaged, and made of the tasks' mean gains."""
  score, over = {"churn": 0.6, "basket": 0.7, "spend": 2.0}, {"churn": 0.1, "basket": 0.2, "spend": 1.0}
  runs = singles(range(len(rows)), score)
  for s, row in enumerate(rows):
    better = {t: v + over[t] * (-g if t == "spend" else g) / 100 for (t, v), g in zip(score.items(), row)}
    runs.append(run("v", s, better))
  found = make(runs)["variants"]["v"]
  harms, worsts, means, index = [], [], [], []
  for row in rows:
    lost = [-g if g < 0 else 0 for g in row]
    harms.append(sum(lost) / 3)
    worsts.append(sorted(row)[0])
    means.append(sum(row) / 3)
    index.append(sum(lost) / sum(map(abs, row)) if any(row) else 0.0)
  for key, values in (("harm", harms), ("worst_gain", worsts), ("mean_gain", means)):
    mean, low, high = slow_interval(values)
    assert found[key]["mean"] == pytest.approx(mean, abs=1e-6)
    if statistics.stdev(values) > 1e-6:
      assert (found[key]["low"], found[key]["high"]) == pytest.approx((low, high), rel=1e-4, abs=1e-6)
  if all(max(map(abs, row)) > 1e-6 or not any(row) for row in rows):
    rounding = any(not any(row) for row in rows)  # 0 / 0 of a row without gains becomes noise over noise
    assert rounding or found["seesaw_index"]["mean"] == pytest.approx(statistics.fmean(index), abs=1e-5)
  by_task = [statistics.fmean(column) for column in zip(*rows)]
  assert found["of_mean_gains"]["harm"] == pytest.approx(sum(max(0, -g) for g in by_task) / 3, abs=1e-6)
  assert found["of_mean_gains"]["worst_gain"] == pytest.approx(min(by_task), abs=1e-6)
  # Noise of a seed can only add to harm and take from the worst gain.
  assert found["of_mean_gains"]["harm"] <= found["harm"]["mean"] + 1e-9
  assert found["of_mean_gains"]["worst_gain"] >= found["worst_gain"]["mean"] - 1e-9


def test_the_index_is_the_share_of_movement_that_was_loss():
  assert gains.seesaw_index([1.0, 2.0]) == 0
  assert gains.seesaw_index([-1.0, -2.0]) == 1
  assert gains.seesaw_index([3.0, -1.0]) == 0.25
  assert gains.seesaw_index([0.0, 0.0]) == 0


def test_gains_are_paired_by_seed():
  """Seeds that differ much, but alike for single and shared, give a narrow interval; shuffled pairs would not."""
  level = [0.6, 0.7, 0.8, 0.9]
  runs = [run("single", s, {"churn": v}, task="churn") for s, v in enumerate(level)]
  runs += [run("v", s, {"churn": v + 0.0025}) for s, v in enumerate(level)]
  found = make(runs)["variants"]["v"]["tasks"]["churn"]["gain"]
  assert (found["low"], found["high"]) == pytest.approx((1, 1))
  assert make(runs[::-1]) == make(runs)


@given(st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_order_of_runs_tasks_and_variants_changes_no_number(random):
  rows = np.random.default_rng(1).normal(size=(3, 4, 3))
  names = ["churn", "basket", "spend"]
  runs = study(dict(zip(("tuned", "a", "b"), rows)), tasks=names)
  first = make(runs)
  tasks, variants = random.sample(names, 3), random.sample(["tuned", "a", "b"], 3)
  second = make(random.sample(runs, len(runs)), variants=variants, tasks=tasks)
  assert list(second["tasks"]) == tasks and list(second["variants"]) == variants
  for variant in variants:
    one, two = first["variants"][variant], second["variants"][variant]
    assert one["tasks"] == two["tasks"]
    assert set(one["lost"]) == set(two["lost"])
    for key in ("mean_gain", "worst_gain", "harm", "seesaw_index"):
      assert one[key] == pytest.approx(two[key])


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ([-1.0, -1.1, -0.9], "lost"),
    ([1.0, 1.1, 0.9], "gained"),
    ([-1.0, 1.0, 0.5], "even"),
    ([-1.0, -3.0], "even"),  # two seeds: 12.7 standard errors to each side
    ([-1.0, -1.0], "lost"),
    ([0.0, 0.0], "even"),
    ([-9.0], "unknown"),
    ([], "unknown"),
  ],
)
def test_verdicts(values, expected):
  assert gains.verdict(gains.estimate(values)) == expected


def point(mean, half):
  return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": 3}


@pytest.mark.parametrize(
  ("harm", "worst", "mean", "allowed"),
  [
    (point(-1, 0.5), point(1, 0.5), point(0.2, 3), True),
    (point(-1, 0.5), point(1, 0.5), point(0.0, 3), True),
    (point(-1, 0.5), point(1, 0.5), point(-0.1, 3), False),
    (point(-1, 1.5), point(1, 0.5), point(0.2, 3), False),
    (point(-1, 0.5), point(1, 1.0), point(0.2, 3), False),
    (point(1, 0.5), point(1, 0.5), point(0.2, 3), False),
    (point(-1, 0.5), point(-1, 0.5), point(0.2, 3), False),
    (gains.estimate([-1]), gains.estimate([1]), gains.estimate([1]), False),
    (gains.estimate([]), gains.estimate([]), gains.estimate([]), False),
  ],
)
def test_what_counts_as_reducing_the_seesaw(harm, worst, mean, allowed):
  assert gains.reduces_seesaw({"harm": harm, "worst_gain": worst, "mean_gain": mean}) is allowed


def test_a_task_without_a_metric_is_named_and_left_out():
  runs = study({"tuned": BAD, "good": GOOD})
  runs += [run("single", s, {"young": None}, task="young") for s in range(3)]
  runs += [run("third", s, {"churn": 0.5, "basket": 0.5, "young": float("nan")}) for s in range(3)]
  found = make(runs)
  assert found["compared"] == ["churn", "basket"] and found["waiting"] == []
  assert "task young: no run has its metric (auc) on test, so it is left out." in found["missing"]
  assert found["variants"]["good"]["versus_tuned"]["reduces_seesaw"]  # it can never be measured, so it does not wait


def test_summaries_are_of_seeds_that_have_every_task():
  runs = study({"tuned": BAD, "good": GOOD})
  runs = [r for r in runs if not (r.task == "basket" and r.seed == 2)]
  found = make(runs, seeds=(0, 1, 2, 3))
  good = found["variants"]["good"]
  assert good["tasks"]["churn"]["gain"]["seeds"] == 3 and good["tasks"]["basket"]["gain"]["seeds"] == 2
  assert good["mean_gain"]["seeds"] == good["versus_tuned"]["harm"]["seeds"] == 2
  assert good["mean_gain"]["mean"] == pytest.approx(np.mean(GOOD[:2]))
  assert found["seeds"] == [0, 1, 2, 3]
  assert "good: no run (seed 3)." in found["missing"]
  assert "single basket: no run (seeds 2, 3)." in found["missing"]


def test_differences_to_tuned_are_of_common_seeds():
  runs = [r for r in study({"tuned": BAD, "good": GOOD}) if not (r.variant == "tuned" and r.seed == 0)]
  found = make(runs)["variants"]["good"]["versus_tuned"]
  expected = [np.mean(GOOD[s]) - np.mean(BAD[s]) for s in (1, 2)]
  assert found["mean_gain"]["seeds"] == 2 and found["mean_gain"]["mean"] == pytest.approx(np.mean(expected))


def test_one_seed_has_no_verdict():
  found = make(study({"tuned": BAD[:1], "good": GOOD[:1]}))
  assert found["variants"]["tuned"]["tasks"]["churn"]["verdict"] == "unknown"
  assert found["variants"]["tuned"]["lost"] == []
  assert any("no verdict from one seed on churn, basket" in w for w in found["words"])
  assert "No variant shares two complete seeds" in found["words"][0]


def test_share_of_the_possible():
  runs = study({"tuned": [[0.0, 10.0], [2.0, 10.0]]})
  possible = {"churn": {"bayes": 0.75, "constant": 0.5}, "basket": {"bayes": 0.6, "constant": 0.6}}
  found = make(runs, possible=possible)
  tasks = found["variants"]["tuned"]["tasks"]
  assert tasks["churn"]["share_of_possible"]["mean"] == pytest.approx(np.mean([1.0, 1.02]))
  assert tasks["basket"]["share_of_possible"] is None
  assert any("task basket: the best possible score is that of a constant" in m for m in found["missing"])
  assert found["single"]["churn"]["share_of_possible"]["mean"] == pytest.approx(1)
  assert found["tasks"]["churn"]["possible"] == possible["churn"]


def test_traces_are_averaged_over_seeds_and_experts_are_not():
  names = ["churn", "basket"]
  runs = [
    run("v", 1, dict.fromkeys(names, 0.5), weights={"step": [10, 20], "churn": [1, 3], "basket": [1, None]}),
    run(
      "v",
      0,
      dict.fromkeys(names, 0.5),
      weights={"step": [10, 20, 30], "churn": [2, 1, 1], "basket": [0, 1, 1]},
      cosine={"tasks": names, "matrix": [[1, 0.5], [0.5, 1]]},
      expert_load={"churn": {"load": [[0.25, 0.75]]}},
    ),
    run(
      "v",
      2,
      dict.fromkeys(names, 0.5),
      weights={"step": [10, 20], "churn": [3, 2], "basket": [2, 1]},
      cosine={"tasks": ["basket", "churn"], "matrix": [[1, -0.1], [-0.3, float("nan")]]},
      expert_load={"churn": {"load": [[0.75, 0.25]]}},
    ),
  ]
  found = make(runs)["variants"]["v"]
  assert found["weights"] == {"step": [10, 20], "churn": [2, 2], "basket": [1, 1]}
  assert found["cosine"]["tasks"] == names
  np.testing.assert_allclose(found["cosine"]["matrix"], [[1, 0.1], [0.2, 1]])  # churn–churn is known for seed 0 only
  assert (found["expert_load"], found["expert_load_seed"]) == ({"churn": {"load": [[0.25, 0.75]]}}, 0)
  assert found["seconds"] == 11 and found["parameters"] == 1000


def test_runs_that_cannot_be_of_one_study():
  runs = study({"v": GOOD})
  with pytest.raises(ValueError, match="two runs of v with seed 0"):
    make([*runs, run("v", 0, {"churn": 0.1})])
  with pytest.raises(ValueError, match="two runs of single of task churn with seed 1"):
    make([*runs, run("single", 1, {"churn": 0.1}, task="churn")])
  with pytest.raises(ValueError, match="main metrics auc, log_loss"):
    make([*runs, run("v", 9, {"churn": 0.1}, main_metric={"churn": "log_loss"})])
  with pytest.raises(ValueError, match="no others"):
    run("v", 0, {"churn": 0.1}, task="churn")
  with pytest.raises(ValueError, match="no others"):
    run("single", 0, {"churn": 0.1})


def test_a_run_result_survives_json():
  one = run("v", 3, {"churn": 0.5}, weights={"step": [1], "churn": [np.float32(2.0)]}, losses={"churn": float("inf")})
  text = json.dumps(one.to_json(), allow_nan=False)
  two = RunResult.from_json(json.loads(text))
  assert two.losses == {"churn": None} and two.weights == {"step": [1], "churn": [2.0]}
  assert two.to_json() == one.to_json()
  less = {k: v for k, v in one.to_json().items() if k not in ("weights", "cosine", "expert_load", "constant_scores")}
  assert RunResult.from_json(less).expert_load == {}
  assert RunResult.from_json(less).constant("churn") == 0.5  # the metric tells it, even in a file of an earlier version
  with pytest.raises(ValueError, match=r"variant 'v', seed 3.*'main_metric'"):
    RunResult.from_json({k: v for k, v in one.to_json().items() if k != "main_metric"})
  with pytest.raises(ValueError, match="'extra'"):
    RunResult.from_json({**one.to_json(), "extra": 1})


def validated(gains_by_variant):
  """Runs whose gains on validation are `gains_by_variant[variant] [seed][task]`, and on test the opposite."""
  runs = []
  for r in study({v: [[-g for g in row] for row in rows] for v, rows in gains_by_variant.items()}):
    score = {t: s["test"][r.main_metric[t]] for t, s in r.tasks.items()}
    mirrored = {t: {"test": r.tasks[t]["test"], "validation": {r.main_metric[t]: 1.5 - score[t]}} for t in score}
    runs.append(dataclasses.replace(r, tasks=mirrored))
  return runs


def test_a_variant_is_chosen_by_the_fewest_tasks_lost_on_validation_and_then_by_its_mean_gain():
  rows = {
    "rich": [[-3.0, 40.0], [-3.1, 41.0], [-2.9, 39.0]],  # the highest mean, but a task pays for it
    "safe": [[0.1, 0.5], [0.0, 0.6], [-0.1, 0.4]],
    "safer": [[0.2, 0.9], [0.1, 1.0], [0.0, 0.8]],
    "waiting": [[5.0, 5.0]],  # one seed only
  }
  found = compare.on_validation(validated(rows), list(rows))
  assert found["variants"]["rich"]["lost"] == ["churn"] and found["variants"]["safe"]["lost"] == []
  assert found["best"] == "safer"
  del rows["safe"], rows["safer"]
  assert compare.on_validation(validated(rows), list(rows))["best"] == "rich"
  assert compare.on_validation(validated({"waiting": rows["waiting"]}), ["waiting"])["best"] is None


def test_the_choice_on_validation_is_told():
  rows = {"safe": [[0.1, 0.5], [0.0, 0.6], [-0.1, 0.4]]}
  (sentence,) = [w for w in make(validated(rows))["words"] if w.startswith("On validation")]
  assert "safe is best" in sentence and "(none)" in sentence


SAME = [[0.5, 2.0], [0.7, 1.8], [0.3, 2.2]]
AGAIN = [[0.9, 1.6], [0.5, 2.2], [0.1, 1.8]]


def test_the_null_variant_shows_what_chance_alone_does():
  found = make(study({"tuned": BAD, "base": SAME, "null": AGAIN}), base="base", null="null")
  differences = [np.mean(a) - np.mean(b) for a, b in zip(AGAIN, SAME)]
  mean, low, high = slow_interval(differences)
  noise = found["noise"]["mean_gain"]
  assert (noise["mean"], noise["low"], noise["high"]) == pytest.approx((mean, low, high))
  assert set(found["noise"]) == {"mean_gain", "worst_gain", "harm", "seesaw_index"}
  assert make(study({"tuned": BAD, "base": SAME}))["noise"] is None


def test_a_difference_within_what_chance_does_is_marked():
  near = [[g - 0.1 for g in row] for row in SAME]
  runs = study({"tuned": SAME, "near": near, "far": BAD, "base": SAME, "null": AGAIN})
  found = make(runs, base="base", null="null")["variants"]
  assert found["near"]["versus_tuned"]["mean_gain"]["significant"]  # paired seeds agree, and yet it is nothing
  assert found["near"]["versus_tuned"]["mean_gain"]["within_noise"]
  assert not found["far"]["versus_tuned"]["worst_gain"]["within_noise"]
  unknown = make(study({"tuned": SAME, "near": near}))["variants"]["near"]["versus_tuned"]
  assert unknown["mean_gain"]["within_noise"] is None


def test_the_limit_of_chance_is_the_further_end_of_its_interval():
  noise = {"mean": 0.1, "low": -0.4, "high": 0.6, "seeds": 3}
  assert gains.within_noise(-0.6, noise) and gains.within_noise(0.5, noise) and not gains.within_noise(0.61, noise)
  assert gains.within_noise(0.1, gains.estimate([0.1])) is None and gains.within_noise(None, noise) is None


def test_the_null_variant_is_never_chosen_and_what_is_no_better_than_chance_is_named():
  best, near = [[0.2, 0.9], [0.1, 1.0], [0.0, 0.8]], [[0.15, 0.9], [0.1, 0.95], [0.0, 0.8]]
  again = [[9.0, 9.0], [0.1, 0.2], [-0.2, 0.5]]
  runs = validated({"best": best, "near": near, "far": BAD, "null": again})
  found = compare.on_validation(runs, ["best", "near", "far", "null"], base="best", null="null")
  assert found["best"] == "best" and "near" in found["alike"]
  assert compare.on_validation(runs, ["best", "near", "far"])["alike"] is None
