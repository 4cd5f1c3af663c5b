"""A small study, made up, with names that are no good for HTML; `tasks` are its tasks' metrics."""

from __future__ import annotations

import numpy as np

from supermoe_jax.evaluation import seesaw
from supermoe_jax.evaluation.seesaw import RunResult

HOSTILE_TASK, HOSTILE_VARIANT = "<b>x</b> & $y$", 'v"<script>'
METRIC = {HOSTILE_TASK: "auc", "spend": "rmse", "churn": "auc"}
VARIANTS = ("shared", "tuned", HOSTILE_VARIANT)


def run(variant, seed, scores, metric=METRIC, **changes):
  given = {
    "variant": variant,
    "seed": seed,
    "task": None,
    "config_hash": "c",
    "tasks": {t: {"test": {metric[t]: v}} for t, v in scores.items()},
    "main_metric": {t: metric[t] for t in scores},
    "losses": {},
    "parameters": 1_234_567,
    "active_parameters": 400,
    "seconds": 10.0,
  }
  return RunResult(**{**given, **changes})


def _cosine(i, j):
  """Of tasks that stand beside each other; of others it is not known."""
  return 1.0 if i == j else None if abs(i - j) > 1 else (-0.4, 0.2)[min(i, j) % 2]


def study(seeds=3, variants=VARIANTS, metric=METRIC):
  random = np.random.default_rng(0)
  runs = [run("single", s, {t: 0.5}, metric, task=t) for t in metric for s in range(seeds)]
  names = list(metric)
  for i, variant in enumerate(variants):
    for s in range(seeds):
      more = {
        "weights": {"step": [20, 40], **{t: [1.0, 1.0 + j / 10] for j, t in enumerate(names)}},
        "cosine": {"tasks": names, "matrix": [[_cosine(i, j) for j in range(len(names))] for i in range(len(names))]},
        "expert_load": {t: {"load": [[0.25, 0.75], [0.5, 0.5]], "gate": [0.9, 0.1]} for t in names},
      }
      scores = {t: 0.5 * (1 + (0.02 if i < 2 else -0.02) + random.normal(0, 0.001)) for t in names}
      runs.append(run(variant, s, scores, metric, **(more if i else {})))
  return runs


def make(runs, **changes):
  given = {
    "variants": VARIANTS,
    "tuned": "tuned",
    "overrides": {"tuned": ["train.weighting.method=static"], HOSTILE_VARIANT: ["model.note=<i> '"]},
    "labels": {HOSTILE_TASK: 100, "spend": 9000},
    "possible": {"churn": {"bayes": 0.6, "constant": 0.4}},
  }
  return seesaw.report(runs, **{**given, **changes})
