"""Makes configs with static task weights to try, and scores them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from supermoe_jax import config
from supermoe_jax.seesaw.gains import mean_gain
from supermoe_jax.seesaw.run_result import RunResult
from supermoe_jax.seesaw.study_scores import StudyScores


def fixed_weights(base: config.Config) -> list[np.ndarray]:
  """Returns the log weights `[T]` that are always tried: equal ones and, if they differ, the config's own."""
  own = np.log([task.weight for task in base.active_tasks.values()])
  return [np.zeros(len(own))] + [own] * bool(np.ptp(own))


def weighted_configs(base: config.Config, plan: config.Seesaw) -> list[config.Config]:
  """Returns a config for each static weighting to try, the fixed ones first; weights sum to T."""
  draws = fixed_weights(base)
  rng, spread, tasks = np.random.default_rng(0), math.log(plan.static_spread), list(base.active_tasks)
  draws += [rng.uniform(-spread, spread, len(tasks)) for _ in range(plan.static_candidates - len(draws))]
  weighing = dataclasses.replace(base.train.weighting, method="static")
  out = []
  for draw in draws:
    weights = np.exp(draw) * len(tasks) / np.exp(draw).sum()
    weighted = {n: dataclasses.replace(base.tasks[n], weight=round(float(w), 4)) for n, w in zip(tasks, weights)}
    train = dataclasses.replace(base.train, weighting=weighing)
    out.append(dataclasses.replace(base, tasks={**base.tasks, **weighted}, train=train))
  return out


def mean_validation_gain(
  result: RunResult, references: Mapping[str, Sequence[RunResult]], folds: Mapping[str, int] | None = None
) -> float:
  """Returns a run's mean gain on validation over the single-task runs of its seed; −∞ if no task can be compared.

  As in the report, a task's gains are measured by what its single-task models have over a constant answer in the mean
  over all seeds, and a task whose models are not better than that beyond chance is left out.

  Args:
    result: the run.
    references: the single-task runs of each task, of all seeds.
    folds: for a task whose seeds deal its users anew, the number of folds of the users.
  """
  runs = [result, *(r for of in references.values() for r in of)]
  study = StudyScores(runs, (), (), (), split="validation", folds=folds)
  gains = [g for t in study.compared for g in study.gains[result.variant][t].values()]
  return mean_gain(gains) if gains else -math.inf
