"""Tunes the models of a study: each tries learning rates on the first seed, and validation chooses.

Every variant and every single-task reference tries the same factors. The variant of tuned static weights also tries
weights; how many configurations each has tried is part of the report.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

from supermoe_jax import config
from supermoe_jax.evaluation.metrics import LOWER_IS_BETTER
from supermoe_jax.seesaw import compare, study_weights
from supermoe_jax.seesaw.cached_runs import CachedRuns, RunGroup
from supermoe_jax.seesaw.run_result import SINGLE, RunResult

logger = logging.getLogger(__name__)

# Random static weightings that are run with all seeds.
FINALISTS = 3


@dataclasses.dataclass(frozen=True)
class Choice:
  """A configuration that was chosen on validation.

  Attributes:
    cfg: the chosen configuration.
    candidate: the name of the candidate that it comes from; empty for variants.
    rate: the chosen factor of the learning rates.
    tries: the number of configurations that it was chosen from on the first seed; 0 if there was no choice.
  """

  cfg: config.Config
  candidate: str = ""
  rate: float = 1.0
  tries: int = 0

  def overrides(self, before: config.Config) -> list[str]:
    """Returns the overrides that make the chosen learning rates of the config `before`; none if they are its own."""
    train = self.cfg.train
    changed = (train.learning_rate, train.tables.learning_rate)
    if changed == (before.train.learning_rate, before.train.tables.learning_rate):
      return []
    return [f"train.learning_rate={changed[0]:.9g}", f"train.tables.learning_rate={changed[1]:.9g}"]


def with_rate(cfg: config.Config, factor: float) -> config.Config:
  """Returns the config with the learning rates of the parameters and of the tables multiplied by `factor`."""
  tables = dataclasses.replace(cfg.train.tables, learning_rate=_scaled(cfg.train.tables.learning_rate, factor))
  train = dataclasses.replace(cfg.train, learning_rate=_scaled(cfg.train.learning_rate, factor), tables=tables)
  return dataclasses.replace(cfg, train=train)


def _scaled(rate: float, factor: float) -> float:
  return float(f"{rate * factor:.9g}")


class Tuning:
  """Chooses configurations of a study on the validation split."""

  def __init__(self, runs: CachedRuns, plan: config.Seesaw, folds: Mapping[str, int] | None = None):
    """Tunes by the rates and the static candidates of `plan`; `folds` is the number of folds of tasks with folds."""
    self._runs, self._plan, self._folds = runs, plan, folds
    self._first = plan.seeds[:1]

  def references(self, candidates: Mapping[str, Mapping[str, config.Config]]) -> dict[str, Choice | None]:
    """Returns each task's single-task configuration, of its `candidates` by name; None without a score in validation.

    Every candidate is tried with every rate; the best main metric wins.
    """
    tried = {
      task: [Choice(with_rate(c, r), name, r) for name, c in named.items() for r in self._plan.rates]
      for task, named in candidates.items()
    }
    groups = [RunGroup(SINGLE, t, c.cfg, self._first) for t, cs in tried.items() if len(cs) > 1 for c in cs]
    self._runs.execute("tuning references", groups)
    return {task: self._best_reference(task, choices) for task, choices in tried.items()}

  def _best_reference(self, task: str, choices: Sequence[Choice]) -> Choice | None:
    if len(choices) == 1:
      return choices[0]
    scored: list[tuple[float, Choice]] = []
    for choice in choices:
      for result in self._runs.results(RunGroup(SINGLE, task, choice.cfg, self._first)):
        score = result.score(task, "validation")
        if score is not None:
          scored.append((-score if result.main_metric[task] in LOWER_IS_BETTER else score, choice))
    if not scored:
      return None
    return dataclasses.replace(max(scored, key=lambda s: s[0])[1], tries=self._distinct(choices))

  def variants(
    self, cfgs: Mapping[str, config.Config], references: Mapping[str, Sequence[RunResult]]
  ) -> dict[str, Choice]:
    """Returns each variant's configuration with the rate that has the highest mean gain on validation.

    Args:
      cfgs: the variants' configs.
      references: the single-task runs of each task, of all seeds.
    """
    tried = {name: [Choice(with_rate(cfg, r), rate=r) for r in self._plan.rates] for name, cfg in cfgs.items()}
    if len(self._plan.rates) > 1:
      groups = [RunGroup(name, None, c.cfg, self._first) for name, choices in tried.items() for c in choices]
      self._runs.execute("tuning learning rates", groups)
    return {name: self._best_rate(name, choices, references) for name, choices in tried.items()}

  def _best_rate(self, name: str, choices: Sequence[Choice], references: Mapping[str, Sequence[RunResult]]) -> Choice:
    if len(choices) == 1:
      return choices[0]
    scored: list[tuple[float, Choice]] = []
    # Of equal scores the rate nearest to the config's own wins, also if no run has a score.
    for choice in sorted(choices, key=lambda c: max(c.rate, 1 / c.rate)):
      found = self._runs.results(RunGroup(name, None, choice.cfg, self._first))
      gain = study_weights.mean_validation_gain(found[0], references, self._folds) if found else -math.inf
      scored.append((gain, choice))
    return dataclasses.replace(max(scored, key=lambda s: s[0])[1], tries=self._distinct(choices))

  def static_weights(self, name: str, chosen: Choice, references: Mapping[str, Sequence[RunResult]]) -> Choice:
    """Returns the choice of the tuned variant with the static weights that are best on validation.

    The first seed tries equal weights, the config's own, and random ones. All seeds then run the equal weights, the
    config's own and the `FINALISTS` random ones with the highest mean gain. They are compared like variants.
    """
    names = list(chosen.cfg.active_tasks)
    weighted = study_weights.weighted_configs(chosen.cfg, self._plan)
    candidates = {f"weights {i}": c for i, c in enumerate(weighted)}
    first = {n: RunGroup(n, None, c, self._first) for n, c in candidates.items()}
    self._runs.execute("tuning static weights", list(first.values()), together=True)
    scores = {
      n: study_weights.mean_validation_gain(result, references, self._folds)
      for n, job in first.items()
      for result in self._runs.results(job)
    }
    fixed = len(study_weights.fixed_weights(chosen.cfg))
    others = sorted((n for n in list(candidates)[fixed:] if n in scores), key=lambda n: -scores[n])
    kept = (*list(candidates)[:fixed], *others[:FINALISTS])
    final = {n: RunGroup(n, None, candidates[n], self._plan.seeds) for n in kept}
    self._runs.execute("the best static weights", list(final.values()), together=True)
    runs = [r for results in references.values() for r in results]
    runs += [r for job in final.values() for r in self._runs.results(job)]
    best = candidates[compare.on_validation(runs, list(final), folds=self._folds)["best"] or "weights 0"]
    told = ", ".join(f"{n}={best.tasks[n].weight:g}" for n in names)
    logger.info(f"static weights of {name}, best of {len(scores)} on validation: {told}")
    again = chosen.tries > 0 and self._runs.file(chosen.cfg) in {self._runs.file(c) for c in weighted}
    return dataclasses.replace(chosen, cfg=best, tries=chosen.tries + len(scores) - again)

  def _distinct(self, choices: Sequence[Choice]) -> int:
    return len({self._runs.file(c.cfg) for c in choices})
