"""Makes configs with static task weights to try, and scores them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from supermoe_jax import config
from supermoe_jax.evaluation.metrics import improvement
from supermoe_jax.seesaw.gains import relative_gain
from supermoe_jax.seesaw.run_result import RunResult


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


def mean_validation_gain(result: RunResult, alone: Mapping[str, RunResult]) -> float:
  """Returns a run's mean gain on validation over the single-task runs `alone`; −∞ if no task can be compared.

  A task whose single-task run is no better there than a constant answer cannot be compared.
  """
  gains = []
  for task, other in alone.items():
    mine, reference = result.score(task, "validation"), other.score(task, "validation")
    constant = other.constant(task, "validation")
    if mine is not None and reference is not None and constant is not None:
      metric = result.main_metric[task]
      gains.append(relative_gain(metric, mine, reference, improvement(metric, reference, constant)))
  known = [g for g in gains if g is not None]
  return float(np.mean(known)) if known else -math.inf
