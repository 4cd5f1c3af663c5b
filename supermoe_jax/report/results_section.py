"""Prepares a report's results: scores and baselines with intervals, scores by length of history, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from supermoe_jax.evaluation import metrics
from supermoe_jax.evaluation.probes import LOSSES
from supermoe_jax.report.figures import scores
from supermoe_jax.report.figures.drawing import number, percent
from supermoe_jax.report.figures.scores import ScorePoint, ScoreRow
from supermoe_jax.report.run_files import RunFiles

# Below this many labels a difference between two scores is mostly chance, and the page warns of it.
FEW_LABELS = 500


def headline_section(run: RunFiles) -> dict[str, Any] | None:
  """Returns the main metric of each task on the test snapshots, and of its baselines; None before evaluation."""
  if run.evaluation is None:
    return None
  results, main = run.evaluation["splits"]["test"], run.evaluation["main_metric"]
  baselines = list(dict.fromkeys(b for t in results.values() for b in t["baselines"]))
  rows = [_compared(name, task, main[name]) for name, task in results.items()]
  compared = [r for r in rows if r["difference"] is not None]
  return {
    "rows": rows,
    "baselines": baselines,
    "compared": len(compared),
    "ahead": sum(r["gain"] > 0 for r in compared),
    "intervals": run.evaluation.get("intervals"),
    "surely_ahead": [r["task"] for r in compared if r["verdict"] == "ahead"],
    "surely_behind": [r["task"] for r in compared if r["verdict"] == "behind"],
    "lower": sorted({r["metric"] for r in rows} & metrics.LOWER_IS_BETTER),
    "few": [r["task"] for r in rows if r["labels"] < FEW_LABELS],
    "few_labels": FEW_LABELS,
    "untested": not results and not run.cfg.data.split.has_snapshots("test"),
    "unlabelled": [n for n in run.cfg.active_views if n not in results],
    "unmeasured": [n for n in run.cfg.active_tasks if n not in run.cfg.active_views],
    "figure": scores.draw_scores("scores", [_row(r) for r in rows]) if rows else None,
  }


def _compared(name: str, task: Mapping[str, Any], metric: str) -> dict[str, Any]:
  """Returns the main metric of a task and of its baselines, and the run's lead over the best baseline."""
  own, others = task["metrics"].get(metric), {b: v.get(metric) for b, v in task["baselines"].items()}
  best = metrics.best_value(metric, others.values())
  known = task.get("intervals") or {"run": None, "baselines": {}, "differences": {}, "users": None}
  out: dict[str, Any] = {
    "task": name,
    "labels": task["labels"],
    "users": known["users"],
    "metric": metric,
    "run": own,
    "interval": known["run"],
    "baselines": others,
    "intervals": known["baselines"],
    "best": next((b for b, v in others.items() if v is not None and v == best), None),
    "top": metrics.best_value(metric, (own, best)),
    "difference": None,
    "gain": None,
    "difference_interval": None,
    "verdict": None,
  }
  if own is None or best is None:
    return out
  out |= {"difference": own - best, "gain": metrics.improvement(metric, own, best)}
  between = (known["differences"].get(out["best"]) or {}).get("interval")
  if between is not None:
    gains = [metrics.improvement(metric, end, 0.0) for end in between]
    verdict = "ahead" if min(gains) > 0 else "behind" if max(gains) < 0 else "even"
    out |= {"difference_interval": between, "verdict": verdict}
  return out


def _row(found: Mapping[str, Any]) -> ScoreRow:
  others = {b: ScorePoint(v, _pair(found["intervals"].get(b))) for b, v in found["baselines"].items()}
  return ScoreRow(found["task"], found["metric"], ScorePoint(found["run"], _pair(found["interval"])), others)


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
  return None if interval is None else (interval[0], interval[1])


def metric_tables(run: RunFiles) -> list[dict[str, Any]]:
  """Returns all metrics: for each split its baselines and, for each task, one row per metric."""
  out = []
  for split, tasks in (run.evaluation or {"splits": {}})["splits"].items():
    baselines = list(dict.fromkeys(b for t in tasks.values() for b in t["baselines"]))
    rows = []
    for name, task in tasks.items():
      about = f"{task['labels']:,} labels"
      if task.get("positive") is not None:
        about += f", {percent(task['positive'])} positive"
      if task.get("observed") is not None:
        about += f", {percent(task['observed'])} with an event"
        days = [
          f"{number(d['days'])} days {percent(d['predicted'])} ({percent(d['observed'])})"
          for d in task["by_day"]
          if d["observed"] is not None
        ]
        about += f"; predicted share with an event by then (and its Kaplan-Meier estimate): {', '.join(days)}"
      if task.get("classes") is not None:
        about += f" of {task['classes']:,} class{'es' if task['classes'] != 1 else ''}"
      if task.get("unseen_in_training"):
        about += f", {task['unseen_in_training']:,} of them unseen in training"
      if "right_values" in task:
        about += f"; any value of the next moment is right, {task['right_values']:.1f} a question"
      if task.get("full_moments"):
        about += f" ({percent(task['full_moments'])} of the questions have most_values of them, and more may be cut)"
      if memory := task.get("memory"):
        gains = ", ".join(f"{kind} {of['gain']:.2f} ± {of['spread']:.2f}" for kind, of in memory.items())
        about += f"; gains of what the head remembers, mean and spread over questions: {gains}".replace("-", "−")
      if models := task.get("fitted"):
        fitted = next(iter(models.values()))  # the models of a task are fitted on the same snapshots
        about += (
          f"; {' and '.join(models)} fitted on {fitted['snapshots']:,} training snapshots of {fitted['users']:,} users"
        )
        about += f" ({LOSSES[fitted['loss']]})" if "loss" in fitted else ""
      values = [(m, [v, *(task["baselines"].get(b, {}).get(m) for b in baselines)]) for m, v in task["metrics"].items()]
      rows.append({"task": name, "about": about, "metrics": values})
    out.append({"split": split, "baselines": baselines, "tasks": rows})
  return out


def label_shares(run: RunFiles) -> dict[str, dict[str, str]]:
  """Returns a description of the labels of each task and split, in words; see `_label_share`."""
  out: dict[str, dict[str, str]] = {}
  for name, splits in (run.manifest or {"labels": {}})["labels"].items():
    asked = run.cfg.tasks[name].asked_values if name in run.cfg.tasks else 1
    for split, count in splits.items():
      out.setdefault(name, {})[split] = _label_share(count, asked)
  return out


def _label_share(count: Mapping[str, Any], asked: int) -> str:
  """Returns a description of `count["known"]` labels with `asked` answers each: their classes, mean or share."""
  if not count["known"]:
    return "–"
  if "classes" in count:
    most = max(count["classes"], key=count["classes"].__getitem__)
    some = sum(n > 0 for n in count["classes"].values())
    return f"{some} class{'es' if some != 1 else ''}, {percent(count['classes'][most] / count['known'])} {most}"
  if "mean" in count:
    return f"{number(count['mean'])} ± {number(count['std'])}".replace("-", "−")
  if "events" in count:
    return f"{percent(count['events'] / count['known'])} with an event"
  word, part = ("positive", count["positive"]) if "positive" in count else ("unseen", count.get("unseen_value", 0))
  return f"{percent(part / (count['known'] * asked))} {word}"


# ------------------------------------------------------------------------------------------ details of the main metric


def history_section(run: RunFiles) -> dict[str, Any] | None:
  """Returns the main metric of each task by the length of its users' histories; None if it was not measured."""
  found = (run.evaluation or {}).get("by_history")
  if not found:
    return None
  out = []
  for i, (name, groups) in enumerate(found.items()):
    metric = run.evaluation["main_metric"][name] if run.evaluation else ""
    baselines = list(dict.fromkeys(b for g in groups for b in g.get("baselines", {})))
    rows = []
    for group in groups:
      points = {b: ScorePoint(p["value"], _pair(p["interval"])) for b, p in group.get("baselines", {}).items()}
      own = ScorePoint(group["run"]["value"], _pair(group["run"]["interval"]))
      rows.append(ScoreRow(f"{_length(group)} ({group['users']:,})", metric, own, points))
    described = [(f"{_length(g)} events", g, r) for r, g in zip(rows, groups)]
    drawn = scores.draw_by_history(f"history-{i}", name, rows)
    out.append({"task": name, "metric": metric, "baselines": baselines, "groups": described, "figure": drawn})
  return {"tasks": out}


def _length(group: Mapping[str, Any]) -> str:
  low, high = group["from"], group["to"]
  return f"{low:,} or more" if high is None else f"{low:,}" if low == high else f"{low:,}–{high:,}"


def calibration_section(run: RunFiles) -> list[dict[str, Any]] | None:
  """Returns the reliability of each yes-or-no task; None if it was not measured."""
  found = (run.evaluation or {}).get("calibration")
  if found is None:
    return None
  return [
    {"task": name, **about, "figure": scores.draw_reliability(f"reliability-{i}", name, about["bins"])}
    for i, (name, about) in enumerate(found.items())
  ]


def decile_section(run: RunFiles) -> list[dict[str, Any]]:
  """Returns predicted and observed means of each task about an amount, by deciles; empty if none was measured."""
  found = (run.evaluation or {}).get("deciles", {})
  return [
    {"task": name, **about, "figure": scores.draw_deciles(f"deciles-{i}", name, about["bins"])}
    for i, (name, about) in enumerate(found.items())
  ]
