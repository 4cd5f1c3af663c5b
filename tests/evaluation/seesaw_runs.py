"""Runs of a study, made up."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from supermoe_jax.evaluation import seesaw
from supermoe_jax.evaluation.seesaw import RunResult

METRIC = {"churn": "auc", "basket": "mean_auc", "spend": "rmse"}
# Gains of two tasks in three seeds, in percent.
BAD = [[-3.0, 2.0], [-3.2, 2.1], [-2.9, 2.0]]
GOOD = [[0.5, 2.0], [0.6, 2.1], [0.4, 2.2]]
FINITE = st.floats(-50, 50, allow_nan=False)


def run(variant, seed, scores, task=None, **changes):
  given = {
    "variant": variant,
    "seed": seed,
    "task": task,
    "config_hash": "c",
    "tasks": {t: {"validation": {}, "test": {METRIC.get(t, "auc"): v, "log_loss": 0.4}} for t, v in scores.items()},
    "main_metric": {t: METRIC.get(t, "auc") for t in scores},
    "losses": dict.fromkeys(scores, 0.9),
    "parameters": 1000,
    "active_parameters": 400,
    "seconds": 10.0 + seed,
  }
  return RunResult(**{**given, **changes})


def singles(seeds, scores):
  return [run("single", s, {t: v}, task=t) for s in seeds for t, v in scores.items()]


def study(gains, singles_score=0.5, tasks=("churn", "basket")):
  """Runs whose gains are `gains[variant] [seed][task]`, in percent."""
  seeds = range(max(len(rows) for rows in gains.values()))
  runs = singles(seeds, dict.fromkeys(tasks, singles_score))
  for variant, rows in gains.items():
    for s, row in enumerate(rows):
      runs.append(run(variant, s, {t: singles_score * (1 + g / 100) for t, g in zip(tasks, row)}))
  return runs


def make(runs, tuned="tuned", **changes):
  variants = list(dict.fromkeys(r.variant for r in runs if r.task is None))
  out = seesaw.report(runs, **{"variants": variants, "tuned": tuned, "overrides": {}, **changes})
  assert json.loads(json.dumps(out, allow_nan=False)) == out  # JSON types throughout, no NaN
  return out
