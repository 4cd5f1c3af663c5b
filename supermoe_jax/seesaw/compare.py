"""Makes the seesaw report: each task's gain or loss in a shared model against a model of its own, over paired seeds.

This module is pure statistics: `RunResult`s go in, the content of `seesaw.json` comes out. Gains Δ and their summaries
are in percent of what the single-task model has over a constant answer; intervals are 95 % Student-t intervals over
seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from supermoe_jax.evaluation.metrics import LOWER_IS_BETTER
from supermoe_jax.seesaw.gains import SUMMARIES, Estimate, reduces_seesaw, verdict, within_noise
from supermoe_jax.seesaw.run_result import RunResult, plain
from supermoe_jax.seesaw.sentences import Report, report_sentences
from supermoe_jax.seesaw.study_scores import StudyScores

# Version of the report: 2 measures gains by what a single-task model has over a constant answer, 1 by its raw score.
FORMAT = 2

# The tuning of a model that nothing is known of.
UNTUNED: Mapping[str, Any] = {"rate": None, "tries": None}


def on_validation(
  runs: Sequence[RunResult],
  variants: Sequence[str],
  *,
  base: str = "",
  null: str = "",
  folds: Mapping[str, int] | None = None,
) -> dict[str, Any]:
  """Compares variants on validation, the split by which one may choose a configuration.

  Args:
    runs: the runs of a study.
    variants: the variants to compare; `null` is never chosen.
    base: the variant that `null` repeats; "" without one.
    null: the variant that repeats `base` with other seeds; "" without one.
    folds: for a task whose seeds deal its users anew, the number of folds of the users.

  Returns: `variants`, the tasks `lost` and the `mean_gain` of each variant; and `best`, the variant that loses on the
    fewest tasks, ties broken by the highest mean gain; None while no variant has all tasks in two seeds. The mean alone
    would follow the tasks with few labels, whose gains are mostly chance. `alike` are the other variants whose mean
    gain differs from that of `best` by no more than chance alone makes it; None without a null variant.
  """
  study = StudyScores(runs, (), variants, (), split="validation", folds=folds)
  standing: dict[str, dict[str, Any]] = {}
  for name in variants:
    found = {t: verdict(study.estimate(study.gains[name][t].values(), t)) for t in study.compared}
    mean = study.estimate(study.summaries(name)["mean_gain"].values())
    standing[name] = {"lost": [t for t, v in found.items() if v == "lost"], "mean_gain": mean}
  judged = {n: s for n, s in standing.items() if s["mean_gain"]["seeds"] > 1 and n != null}
  best = min(judged, key=lambda n: (len(judged[n]["lost"]), -judged[n]["mean_gain"]["mean"]), default=None)
  noise, alike = _noise(study, base, null), None
  if best is not None and noise is not None and noise["mean_gain"]["low"] is not None:
    differences = {n: _differences(study, n, best)["mean_gain"]["mean"] for n in judged if n != best}
    alike = [n for n, d in differences.items() if within_noise(d, noise["mean_gain"])]
  return {"variants": standing, "best": best, "alike": alike}


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
  base: str = "",
  null: str = "",
  tuning: Mapping[str, Mapping[str, Any]] | None = None,
  single_tuning: Mapping[str, Mapping[str, Any]] | None = None,
  folds: Mapping[str, int] | None = None,
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
    base: the variant that `null` repeats; "" without one.
    null: the variant that repeats `base` with other seeds; "" without one.
    tuning: for a variant, the `rate` that was chosen, a factor of its learning rates, and the number of `tries`.
    single_tuning: the same for the single-task model of a task.
    folds: for a task whose seeds test different users, the number of folds of the users. Its `labels` are those of all
      seeds together, and its intervals are widened.

  Returns: JSON types only. An estimate is {"mean", "low", "high", "seeds"}, `seeds` the number of seeds. A variant's
    `mean_gain`, `worst_gain`, `harm` and `seesaw_index` are computed in each seed with a gain for all `compared` tasks,
    then averaged. Seed noise alone makes harm and index larger and the worst gain lower, because the mean of
    max(0, −Δ) also counts the seeds in which a task lost by chance. `of_mean_gains` computes them from the tasks' mean
    gains instead, which is less biased but has no interval. A task of `no_better` has no gain, because its single-task
    model is not better than a constant answer beyond chance; `over_constant` of `single` says by how much each is.
    `noise` holds the differences of the null variant to its base: what chance alone does. `within_noise` of a
    difference to the tuned variant says whether it is no larger. `expert_load` is of the one seed `expert_load_seed`:
    experts have no order, so a mean over seeds would mean nothing.
  Raises: ValueError: two runs of one seed, or two main metrics of one task.
  """
  folds = folds or {}
  study = StudyScores(runs, tasks, variants, seeds, folds=folds)
  labels, possible = labels or {}, possible or {}
  out: Report = {
    "format": FORMAT,
    "tasks": {
      t: {
        "metric": study.metric[t],
        "lower_is_better": study.metric[t] in LOWER_IS_BETTER,
        "labels": labels.get(t),
        "folds": folds.get(t),
        "possible": dict(possible[t]) if t in possible else None,
      }
      for t in study.tasks
    },
    "references": dict(references or {}),
    "compared": study.compared,
    "waiting": study.waiting,
    "no_better": study.no_better,
    "seeds": study.seeds,
    "tuned": tuned,
    "base": base,
    "null": null,
    "noise": (noise := _noise(study, base, null)),
    "single": {
      t: {
        "score": study.estimate(study.single[t].values(), t),
        "over_constant": study.estimate(study.over_constant[t].values(), t),
        "share_of_possible": _share(study, t, study.single[t], possible.get(t)),
        "tuning": dict((single_tuning or {}).get(t, UNTUNED)),
        **_sizes(study.singles.get(t, {})),
      }
      for t in study.tasks
    },
    "variants": {
      v: {
        **_variant(study, v, overrides.get(v, ()), possible),
        "versus_tuned": _versus(study, v, tuned, noise) if v != tuned and tuned in study.shared else None,
        "tuning": dict((tuning or {}).get(v, UNTUNED)),
      }
      for v in study.shared
    },
    "validation": on_validation(runs, list(study.shared), base=base, null=null, folds=folds),
    "missing": study.missing(),
  }
  for task, bounds in possible.items():
    if bounds["bayes"] == bounds["constant"]:
      out["missing"].append(f"task {task}: the best possible score is that of a constant, so no share of it is given.")
  out["words"] = report_sentences(out)
  found: Report = plain(out)
  return found


def _share(
  study: StudyScores, task: str, scores: Mapping[int, float], bounds: Mapping[str, float] | None
) -> Estimate | None:
  """Estimates (score − constant) / (bayes − constant) over seeds; None if the bounds are unknown or equal."""
  if bounds is None or bounds["bayes"] == bounds["constant"]:
    return None
  whole = bounds["bayes"] - bounds["constant"]
  return study.estimate(((m - bounds["constant"]) / whole for m in scores.values()), task)


def _sizes(runs: Mapping[int, RunResult]) -> dict[str, int | None]:
  first = next(iter(runs.values()), None)
  return {
    "parameters": first.parameters if first else None,
    "active_parameters": first.active_parameters if first else None,
  }


def _variant(
  study: StudyScores, name: str, overrides: Sequence[str], possible: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
  runs, gains, summaries = study.shared[name], study.gains[name], study.summaries(name)
  tasks: dict[str, dict[str, Any]] = {}
  for task in study.tasks:
    score, found = study.score[name][task], study.estimate(gains[task].values(), task)
    share = _share(study, task, score, possible.get(task))
    tasks[task] = {
      "score": study.estimate(score.values(), task),
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
    **{k: study.estimate(v.values()) for k, v in summaries.items()},
    "of_mean_gains": {k: SUMMARIES[k](means) if whole else None for k in ("worst_gain", "harm", "seesaw_index")},
    **_sizes(runs),
    "seconds": float(np.mean([r.seconds for r in runs.values()])) if runs else None,
    "weights": _mean_weights([r.weights for r in runs.values() if r.weights]),
    "cosine": _mean_cosine([r.cosine for r in runs.values() if r.cosine]),
    "expert_load": loaded.expert_load if loaded else {},
    "expert_load_seed": loaded.seed if loaded else None,
  }


def _differences(study: StudyScores, name: str, to: str) -> dict[str, Estimate]:
  """Returns the differences of one variant's summaries to another's in the seeds that both have."""
  summaries, other = study.summaries(name), study.summaries(to)
  return {
    key: study.estimate(v - other[key][s] for s, v in summaries[key].items() if s in other[key]) for key in SUMMARIES
  }


def _noise(study: StudyScores, base: str, null: str) -> dict[str, Estimate] | None:
  """Returns the differences of the null variant to its base, which chance alone makes; None without both."""
  return _differences(study, null, base) if base in study.shared and null in study.shared else None


def _versus(study: StudyScores, name: str, tuned: str, noise: Mapping[str, Estimate] | None) -> dict[str, Any]:
  """Returns the differences to the tuned variant, and whether chance alone makes such differences."""
  out: dict[str, Any] = {}
  for key, found in _differences(study, name, tuned).items():
    if key == "seesaw_index":
      continue
    within = within_noise(found["mean"], noise[key] if noise else None)
    out[key] = {**found, "significant": verdict(found) in ("lost", "gained"), "within_noise": within}
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
