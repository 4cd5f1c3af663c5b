"""Puts the results of an evaluation into a table, and into sentences on what the table cannot show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supermoe_jax.evaluation import metrics
from supermoe_jax.evaluation.probes import LOSSES


def shown_split(result: Mapping[str, Any]) -> str:
  """Returns the split to show first: test, or validation if nothing was measured in test."""
  return "test" if result["splits"]["test"] or not result["splits"]["validation"] else "validation"


def results_table(result: Mapping[str, Any], split: str = "test") -> list[list[str]]:
  """Returns the rows of a table of results: task, labels, metric, this run, each baseline; the first is the heading."""
  tasks = result["splits"][split]
  names = list(dict.fromkeys(b for t in tasks.values() for b in t["baselines"]))
  rows = [["task", "labels", "metric", "supermoe", *names]]
  for name, metric in result["main_metric"].items():
    note = " (lower is better)" if metric in metrics.LOWER_IS_BETTER else ""
    task = tasks.get(name, {"labels": 0, "metrics": {}, "baselines": {}})
    cells = [_cell(task["metrics"].get(metric)), *(_cell(task["baselines"].get(b, {}).get(metric)) for b in names)]
    rows.append([name, f"{task['labels']:,}", metric + note, *cells])
  return rows


def results_words(result: Mapping[str, Any], split: str = "test") -> list[str]:
  """Returns sentences on what a table of results cannot show: missing labels, one class, one value."""
  tasks, words = result["splits"][split], []
  if missing := [name for name in result["main_metric"] if name not in tasks]:
    words.append(f"without a label in {split}, so not measured there: {', '.join(missing)}")
  for name, task in tasks.items():
    metric = result["main_metric"][name]
    if metric == "concordance" and task["metrics"].get(metric) is None:
      words.append(f"{name}: no two of its {task['labels']:,} labels in {split} have an order, so there is no {metric}")
    elif task["metrics"].get(metric) is None:
      words.append(f"{name}: its {task['labels']:,} labels in {split} are all of one class, so there is no {metric}")
    if task.get("values") == 1:
      words.append(f"{name}: its field has one value in training, so every answer ranks it first")
  if fitted := [_fitted_words(name, task["fitted"]) for name, task in tasks.items() if task.get("fitted")]:
    words.append(f"the models on aggregates are fitted on training snapshots: {'; '.join(fitted)}")
  if empty := [other for other in result["splits"] if not result["splits"].get(other, True) and other != split]:
    words.append(f"nothing is measured in {', '.join(empty)}")
  return words


def _fitted_words(name: str, fitted: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns the number of snapshots that a task's model is fitted on, and the loss of boosted trees."""
  model = next(iter(fitted.values()))  # all are fitted on the same ones
  loss = f", {LOSSES[model['loss']]}" if "loss" in model else ""
  return f"{name} {model['snapshots']:,} of {model['users']:,} users{loss}"


def _cell(value: float | None) -> str:
  return "–" if value is None else f"{value:.4f}"


def aligned_table(rows: list[list[str]]) -> str:
  """Returns a table as text that is aligned for the terminal."""
  widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
  lines = [
    "  ".join(c.ljust(w) if i in (0, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
    for row in rows
  ]
  return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])
