"""Sorts the runs of a study into scores and gains by variant, task and seed, and finds what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from supermoe_jax.evaluation.metrics import improvement
from supermoe_jax.seesaw.gains import SUMMARIES, Estimate, beyond_constant, estimate, relative_gain
from supermoe_jax.seesaw.run_result import SINGLE, RunResult


class StudyScores:
  """The scores and gains of a split by variant, task and seed, and the tasks that can be compared.

  Attributes:
    singles: the single-task runs by task and seed.
    shared: the runs of variants by variant and seed.
    tasks: all tasks, the planned ones first.
    seeds: all seeds, ascending.
    metric: each task's main metric; None without a run.
    single: the score of each task's single-task model, by seed.
    score: the score of each variant on each task, by seed.
    over_constant: for each task, how much better its single-task model is than a constant answer, by seed.
    compared: the tasks with gains.
    unmeasured: trained tasks without a score in any run.
    no_better: tasks whose single-task model is not better than a constant answer beyond chance.
    unknown_constant: tasks whose constant answer has no known score.
    waiting: the tasks that may be compared once more runs end.
    gains: the gain of each variant on each task, by seed.
  """

  def __init__(
    self,
    runs: Sequence[RunResult],
    tasks: Sequence[str],
    variants: Sequence[str],
    seeds: Sequence[int],
    split: str = "test",
    folds: Mapping[str, int] | None = None,
  ):
    """Sorts runs.

    Args:
      runs: the runs; at most one a seed for each variant and for each single task.
      tasks: planned tasks; others of `runs` are added.
      variants: planned variants; others of `runs` are added.
      seeds: planned seeds; others of `runs` are added.
      split: the split whose scores are compared.
      folds: for a task whose seeds test different users, the number of folds of the users.

    Raises: ValueError: two runs of one seed, or two main metrics of one task.
    """
    self._shares = {t: asked_share(n) for t, n in (folds or {}).items()}
    self.singles: dict[str, dict[int, RunResult]] = {}
    self.shared: dict[str, dict[int, RunResult]] = {v: {} for v in variants}
    for run in sorted(runs, key=lambda r: r.seed):
      of = self.shared.setdefault(run.variant, {}) if run.task is None else self.singles.setdefault(run.task, {})
      if run.seed in of:
        what = run.variant if run.task is None else f"{SINGLE} of task {run.task}"
        raise ValueError(f"two runs of {what} with seed {run.seed}; remove the one that does not belong to the study.")
      of[run.seed] = run
    every = [r for of in (*self.shared.values(), *self.singles.values()) for r in of.values()]
    self.tasks = list(dict.fromkeys([*tasks, *(t for r in every for t in (*r.main_metric, *r.tasks)), *self.singles]))
    self.seeds = sorted({*seeds, *(r.seed for r in every)})
    self.metric: dict[str, str | None] = {}
    for task in self.tasks:
      found = sorted({r.main_metric[task] for r in every if task in r.main_metric})
      if len(found) > 1:
        raise ValueError(f"task {task} has the main metrics {', '.join(found)} in one study; run it again with one.")
      self.metric[task] = found[0] if found else None
    self.single = {t: _scores(self.singles.get(t, {}), t, split) for t in self.tasks}
    self.score = {v: {t: _scores(of, t, split) for t in self.tasks} for v, of in self.shared.items()}
    constants = {t: _constants([*self.singles.get(t, {}).values(), *every], t, split) for t in self.tasks}
    self.over_constant = {t: self._over_constant(t, constants[t]) for t in self.tasks}
    both = [t for t in self.tasks if self.single[t] and any(s[t] for s in self.score.values())]
    self.unknown_constant = [t for t in both if not self.over_constant[t]]
    known = [t for t in both if self.over_constant[t]]
    self.no_better = [t for t in known if not beyond_constant(self.estimate(self.over_constant[t].values(), t))]
    self.compared = [t for t in known if t not in self.no_better]
    # Trained tasks without a score in any run are unmeasured; the rest may get their scores as the study goes on.
    scored = {t for t in self.tasks if self.single[t] or any(s[t] for s in self.score.values())}
    trained = {t for r in every for t in (r.main_metric if r.task is None else [r.task])}
    self.unmeasured = [t for t in self.tasks if t in trained and t not in scored]
    self.waiting = [t for t in self.tasks if t not in both and t not in self.unmeasured]
    self.gains = {v: {t: self._gains(v, t) for t in self.tasks} for v in self.shared}

  def _gains(self, variant: str, task: str) -> dict[int, float]:
    if task not in self.compared:
      return {}
    single, score, metric = self.single[task], self.score[variant][task], self.metric[task] or ""
    over = self._mean_over_constant(task)
    found = {s: relative_gain(metric, score[s], single[s], over) for s in score if s in single}
    return {s: g for s, g in found.items() if g is not None}

  def _over_constant(self, task: str, constants: Mapping[int, float]) -> dict[int, float]:
    metric = self.metric[task] or ""
    return {s: improvement(metric, v, constants[s]) for s, v in self.single[task].items() if s in constants}

  def _mean_over_constant(self, task: str) -> float:
    """Returns what the gains of a compared task are measured by."""
    found = self.over_constant[task].values()
    return sum(found) / len(found)

  def estimate(self, values: Iterable[float], task: str = "") -> Estimate:
    """Returns the mean over seeds with its interval, of a task, or of a summary of all compared tasks.

    The interval is widened where seeds are folds of users, for a summary if one of its tasks is scored so.
    """
    tasks = [task] if task else self.compared
    return estimate(values, max((self._shares.get(t, 0.0) for t in tasks), default=0.0))

  def complete(self, variant: str) -> list[int]:
    """Returns the seeds in which every compared task has a gain; in other seeds, means would be over fewer tasks."""
    gains = self.gains[variant]
    return [s for s in self.seeds if self.compared and all(s in gains[t] for t in self.compared)]

  def summaries(self, variant: str) -> dict[str, dict[int, float]]:
    """Returns each summary over the compared tasks, by complete seed."""
    rows = {s: [self.gains[variant][t][s] for t in self.compared] for s in self.complete(variant)}
    return {name: {s: of(row) for s, row in rows.items()} for name, of in SUMMARIES.items()}

  def missing(self) -> list[str]:
    """Returns a sentence for each missing run, score or gain, by variant or task."""
    out = []
    for task in self.unmeasured:
      out.append(f"task {task}: no run has its metric ({self.metric[task]}) on test, so it is left out.")
    for task in self.tasks:
      runs = self.singles.get(task, {})
      out += _lack(f"{SINGLE} {task}", "no run", [s for s in self.seeds if s not in runs])
      if task not in self.unmeasured:
        out += _lack(f"{SINGLE} {task}", f"no {self.metric[task]}", [s for s in runs if s not in self.single[task]])
    for task in self.tasks:
      alone = self.single[task]
      unpaired = {v: [s for s in of[task] if s not in alone] for v, of in self.score.items()}
      where = f"task {task}, in {sum(map(bool, unpaired.values()))} of {len(unpaired)} variants"
      every = sorted({s for of in unpaired.values() for s in of})
      out += _lack(where, "scores without a single-task score to compare with", every)
    for variant, runs in self.shared.items():
      out += _lack(variant, "no run", [s for s in self.seeds if s not in runs])
      for task in (t for t in self.tasks if t not in self.unmeasured):
        score, where = self.score[variant][task], f"{variant}, task {task}"
        out += _lack(where, f"no {self.metric[task] or 'metric'}", [s for s in runs if s not in score])
    for task in self.no_better:
      out.append(
        f"task {task}: its single-task model is not better than a constant answer beyond chance ({self.metric[task]}), "
        "so there is nothing to measure gains by, and the task is left out."
      )
    for task in self.unknown_constant:
      out.append(
        f"task {task}: the {self.metric[task]} of a constant answer is not in the results, so there is nothing to "
        "measure gains by, and the task is left out; run the study again with this version."
      )
    return out


def asked_share(folds: int) -> float:
  """Returns the tested users of a fold over its training users. Intervals widen by this share."""
  return 1 / (folds - 1)


def _scores(runs: Mapping[int, RunResult], task: str, split: str) -> dict[int, float]:
  found = {s: r.score(task, split) for s, r in runs.items()}
  return {s: v for s, v in found.items() if v is not None}


def _constants(runs: Sequence[RunResult], task: str, split: str) -> dict[int, float]:
  """Returns the score of a constant answer by seed, as the first run of the seed that knows it says."""
  out: dict[int, float] = {}
  for run in runs:
    found = run.constant(task, split)
    if found is not None:
      out.setdefault(run.seed, found)
  return out


def _lack(what: str, cause: str, seeds: Sequence[int]) -> list[str]:
  return [f"{what}: {cause} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})."] if seeds else []
