"""Makes the seesaw report: each task's gain or loss in a shared model against a model of its own, over paired seeds.

This module is pure statistics: `RunResult`s go in, the content of `seesaw.json` comes out. Gains Δ and their summaries
are in percent of the single-task score; intervals are 95 % Student-t intervals over seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from supermoe_jax.evaluation.metrics import LOWER_IS_BETTER
from supermoe_jax.seesaw.gains import SUMMARIES, Estimate, estimate, reduces_seesaw, relative_gain, verdict
from supermoe_jax.seesaw.sentences import Report, report_sentences

# The variant name of all single-task references.
SINGLE = "single"


@dataclasses.dataclass(frozen=True)
class RunResult:
  """The result of one trained and evaluated model.

  `tasks[task][split][metric]` are its scores. `losses[task]` are training losses over the loss of the best constant
  prediction, `constants[task]`. `weights` has `step` and each task's weights at these steps; `cosine` has the `matrix`
  of gradient cosines in the order of its `tasks`; `expert_load[task]` has the `load [M, E]` of the MoE layers and, if
  gates mix the tasks' views, a `gate [E]`.
  """

  variant: str
  seed: int
  task: str | None
  config_hash: str
  tasks: Mapping[str, Mapping[str, Mapping[str, float | None]]]
  main_metric: Mapping[str, str]
  losses: Mapping[str, float | None]
  parameters: int
  active_parameters: int
  seconds: float
  weights: Mapping[str, Sequence[float | None]] | None = None
  cosine: Mapping[str, Any] | None = None
  expert_load: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  constants: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    if (self.variant == SINGLE) != (self.task is not None):
      raise ValueError(f"run of {self.variant!r} with task={self.task!r}: runs of {SINGLE!r}, and no others, name one.")

  @classmethod
  def from_json(cls, found: Mapping[str, Any]) -> RunResult:
    """Reads the output of `to_json`. Raises ValueError if a key is missing or unknown."""
    fields = {f.name for f in dataclasses.fields(cls)}
    optional = {"weights", "cosine", "expert_load", "constants"}
    if wrong := (fields - optional - set(found)) | (set(found) - fields):
      what = f"variant {found.get('variant')!r}, seed {found.get('seed')!r}"
      raise ValueError(
        f"run result of {what}: missing or unknown keys {sorted(wrong)}; run it again with this version."
      )
    return cls(**{**found, **{k: found.get(k) or {} for k in ("expert_load", "constants")}})

  def to_json(self) -> dict[str, Any]:
    """Returns the run as JSON types; numbers that are not finite become None."""
    out: dict[str, Any] = _plain(dataclasses.asdict(self))
    return out

  def score(self, task: str, split: str = "test") -> float | None:
    """Returns the main metric of `task` on `split`; None if there is none or it is not finite."""
    metrics = self.tasks.get(task, {}).get(split) or {}
    return _finite(metrics.get(self.main_metric.get(task, "")))


def _finite(value: Any) -> float | None:
  return None if value is None or not math.isfinite(value) else float(value)


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple, np.ndarray)):
    return [_plain(v) for v in value]
  if isinstance(value, np.generic):
    value = value.item()
  return _finite(value) if isinstance(value, float) else value


# --------------------------------------------------------------------------------------------------------------- report


class _StudyScores:
  """The scores and gains of a split by variant, task and seed, and the tasks that can be compared."""

  def __init__(
    self,
    runs: Sequence[RunResult],
    tasks: Sequence[str],
    variants: Sequence[str],
    seeds: Sequence[int],
    split: str = "test",
  ):
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
    self.compared = [t for t in self.tasks if self.single[t] and any(s[t] for s in self.score.values())]
    # Trained tasks without a score in any run are unmeasured; the rest may get their scores as the study goes on.
    scored = {t for t in self.tasks if self.single[t] or any(s[t] for s in self.score.values())}
    trained = {t for r in every for t in (r.main_metric if r.task is None else [r.task])}
    self.unmeasured = [t for t in self.tasks if t in trained and t not in scored]
    self.waiting = [t for t in self.tasks if t not in self.compared and t not in self.unmeasured]
    self.gains = {v: {t: self._gains(v, t) for t in self.tasks} for v in self.shared}

  def _gains(self, variant: str, task: str) -> dict[int, float]:
    single, score, metric = self.single[task], self.score[variant][task], self.metric[task] or ""
    found = {s: relative_gain(metric, score[s], single[s]) for s in score if s in single}
    return {s: g for s, g in found.items() if g is not None}

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
        score, gains, where = self.score[variant][task], self.gains[variant][task], f"{variant}, task {task}"
        out += _lack(where, f"no {self.metric[task] or 'metric'}", [s for s in runs if s not in score])
        zero = [s for s in score if s in self.single[task] and s not in gains]
        out += _lack(where, "no gain, as the single-task score is 0", zero)
    return out


def _scores(runs: Mapping[int, RunResult], task: str, split: str) -> dict[int, float]:
  found = {s: r.score(task, split) for s, r in runs.items()}
  return {s: v for s, v in found.items() if v is not None}


def _lack(what: str, cause: str, seeds: Sequence[int]) -> list[str]:
  return [f"{what}: {cause} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})."] if seeds else []


def on_validation(runs: Sequence[RunResult], variants: Sequence[str]) -> dict[str, Any]:
  """Compares variants on validation, the split by which one may choose a configuration.

  Returns: `variants`, the tasks `lost` and the `mean_gain` of each variant; and `best`, the variant that loses on the
    fewest tasks, ties broken by the highest mean gain; None while no variant has all tasks in two seeds. The mean alone
    would follow the tasks with few labels, whose gains are mostly chance.
  """
  study = _StudyScores(runs, (), variants, (), split="validation")
  standing: dict[str, dict[str, Any]] = {}
  for name in variants:
    found = {t: verdict(estimate(study.gains[name][t].values())) for t in study.compared}
    mean = estimate(study.summaries(name)["mean_gain"].values())
    standing[name] = {"lost": [t for t, v in found.items() if v == "lost"], "mean_gain": mean}
  judged = {n: s for n, s in standing.items() if s["mean_gain"]["seeds"] > 1}
  best = min(judged, key=lambda n: (len(judged[n]["lost"]), -judged[n]["mean_gain"]["mean"]), default=None)
  return {"variants": standing, "best": best}


def make_report(
  runs: Sequence[RunResult],
  *,
  variants: Sequence[str],
  tuned: str,
  overrides: Mapping[str, Sequence[str]],
  seeds: Sequence[int] = (),
  tasks: Sequence[str] = (),
  possible: Mapping[str, Mapping[str, float]] | None = None,
  labels: Mapping[str, int] | None = None,
  references: Mapping[str, str | None] | None = None,
) -> Report:
  """Makes the report of a study, finished or not; `missing` names every gap.

  Args:
    runs: finished runs in any order; at most one a seed for each variant and for each single task.
    variants: in the order to show them; other variants of `runs` follow.
    tuned: the variant of tuned static weights that the others are compared with; "" for none.
    overrides: for each variant, its changes of the config.
    seeds: planned seeds; others of `runs` are added.
    tasks: planned tasks, in order; others of `runs` are added.
    possible: for a task, if known, the best possible score (`bayes`) and the score of a `constant` answer.
    labels: for a task, the number of its test labels.
    references: for a task, the name of the candidate chosen as its single-task model.

  Returns: JSON types only. An estimate is {"mean", "low", "high", "seeds"}, `seeds` the number of seeds. A variant's
    `mean_gain`, `worst_gain`, `harm` and `seesaw_index` are computed in each seed with a gain for all `compared` tasks,
    then averaged. Seed noise alone makes harm and index larger and the worst gain lower. `of_mean_gains` computes them
    from the tasks' mean gains instead, which is less biased but has no interval. `expert_load` is of the one seed
    `expert_load_seed`: experts have no order, so a mean over seeds would mean nothing.
  Raises: ValueError: two runs of one seed, or two main metrics of one task.
  """
  study = _StudyScores(runs, tasks, variants, seeds)
  labels, possible = labels or {}, possible or {}
  out: Report = {
    "tasks": {
      t: {
        "metric": study.metric[t],
        "lower_is_better": study.metric[t] in LOWER_IS_BETTER,
        "labels": labels.get(t),
        "possible": dict(possible[t]) if t in possible else None,
      }
      for t in study.tasks
    },
    "references": dict(references or {}),
    "compared": study.compared,
    "waiting": study.waiting,
    "seeds": study.seeds,
    "tuned": tuned,
    "single": {
      t: {
        "score": estimate(study.single[t].values()),
        "share_of_possible": _share(study.single[t], possible.get(t)),
        **_sizes(study.singles.get(t, {})),
      }
      for t in study.tasks
    },
    "variants": {v: _variant(study, v, tuned, overrides.get(v, ()), possible) for v in study.shared},
    "validation": on_validation(runs, list(study.shared)),
    "missing": study.missing(),
  }
  for task, bounds in possible.items():
    if bounds["bayes"] == bounds["constant"]:
      out["missing"].append(f"task {task}: the best possible score is that of a constant, so no share of it is given.")
  out["words"] = report_sentences(out)
  found: Report = _plain(out)
  return found


def _share(scores: Mapping[int, float], bounds: Mapping[str, float] | None) -> Estimate | None:
  """Estimates (score − constant) / (bayes − constant) over seeds; None if the bounds are unknown or equal."""
  if bounds is None or bounds["bayes"] == bounds["constant"]:
    return None
  return estimate((m - bounds["constant"]) / (bounds["bayes"] - bounds["constant"]) for m in scores.values())


def _sizes(runs: Mapping[int, RunResult]) -> dict[str, int | None]:
  first = next(iter(runs.values()), None)
  return {
    "parameters": first.parameters if first else None,
    "active_parameters": first.active_parameters if first else None,
  }


def _variant(
  study: _StudyScores, name: str, tuned: str, overrides: Sequence[str], possible: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
  runs, gains, summaries = study.shared[name], study.gains[name], study.summaries(name)
  tasks: dict[str, dict[str, Any]] = {}
  for task in study.tasks:
    score, found = study.score[name][task], estimate(gains[task].values())
    share = _share(score, possible.get(task))
    tasks[task] = {
      "score": estimate(score.values()),
      "gain": found,
      "verdict": verdict(found),
      "share_of_possible": share,
    }
  means = [tasks[t]["gain"]["mean"] for t in study.compared]
  whole = bool(means) and None not in means
  loaded = next((r for r in runs.values() if r.expert_load), None)
  return {
    "overrides": list(overrides),
    "seeds": list(runs),
    "tasks": tasks,
    "lost": [t for t in study.compared if tasks[t]["verdict"] == "lost"],
    "gained": [t for t in study.compared if tasks[t]["verdict"] == "gained"],
    **{k: estimate(v.values()) for k, v in summaries.items()},
    "of_mean_gains": {k: SUMMARIES[k](means) if whole else None for k in ("worst_gain", "harm", "seesaw_index")},
    "versus_tuned": _versus(study, summaries, tuned) if name != tuned and tuned in study.shared else None,
    **_sizes(runs),
    "seconds": float(np.mean([r.seconds for r in runs.values()])) if runs else None,
    "weights": _mean_weights([r.weights for r in runs.values() if r.weights]),
    "cosine": _mean_cosine([r.cosine for r in runs.values() if r.cosine]),
    "expert_load": loaded.expert_load if loaded else {},
    "expert_load_seed": loaded.seed if loaded else None,
  }


def _versus(study: _StudyScores, summaries: Mapping[str, Mapping[int, float]], tuned: str) -> dict[str, Any]:
  """Returns the differences to the tuned variant in the seeds that both have."""
  other = study.summaries(tuned)
  out: dict[str, Any] = {}
  for key in ("harm", "worst_gain", "mean_gain"):
    found = estimate(v - other[key][s] for s, v in summaries[key].items() if s in other[key])
    out[key] = {**found, "significant": verdict(found) in ("lost", "gained")}
  # While a task still waits for its runs, harm and the worst gain are not final.
  out["reduces_seesaw"] = not study.waiting and reduces_seesaw(out)
  return out


def _nanmean(values: Sequence[Any]) -> np.ndarray:
  """Returns the mean of the finite values over the first axis; NaN without any."""
  x = np.array(values, np.float64)
  known = np.isfinite(x)
  return np.where(known.any(0), np.where(known, x, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def _mean_weights(found: Sequence[Mapping[str, Sequence[float | None]]]) -> dict[str, Any] | None:
  """Averages weights over seeds, at the steps and for the tasks that all seeds have."""
  if not found:
    return None
  steps = [s for s in found[0]["step"] if all(s in w["step"] for w in found)]
  out: dict[str, Any] = {"step": steps}
  for task in (k for k in found[0] if k != "step" and all(k in w for w in found)):
    out[task] = _nanmean([[dict(zip(w["step"], w[task]))[s] for s in steps] for w in found])
  return out


def _mean_cosine(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """Averages gradient cosines over seeds, for the tasks that all seeds have."""
  if not found:
    return None
  tasks = [t for t in found[0]["tasks"] if all(t in c["tasks"] for c in found)]
  order = [[c["tasks"].index(t) for t in tasks] for c in found]
  return {
    "tasks": tasks,
    "matrix": _nanmean([np.array(c["matrix"], float)[np.ix_(i, i)] for c, i in zip(found, order)]),
  }
