"""Draws the curves of a training run and lists their first and last values, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from supermoe_jax.evaluation import evaluate
from supermoe_jax.report.figures import curves, drawing
from supermoe_jax.report.figures.drawing import number, percent
from supermoe_jax.report.run_files import RunFiles
from supermoe_jax.report.task_sentences import sparse_blocks


def training_section(run: RunFiles) -> dict[str, Any] | None:
  """Returns the curves of the run's log and their first and last values; None before the first logged step."""
  rows = run.rows
  if not rows:
    return None
  step = [r["step"] for r in rows]

  def draw(name: str, title: str, values: Sequence[float | None], **style: Any) -> Markup:
    table.append((title, [style.get("show", number)(v) if v is not None else "–" for v in (values[0], values[-1])]))
    return curves.draw_curve(name, title, step, values, **style)

  table: list[tuple[str, list[str]]] = []
  grey, green = drawing.GREY, drawing.GREEN
  whole = [
    draw("loss", "Total loss", [r["loss"] for r in rows]),
    draw("gradient", "Gradient norm before clipping", [r["gradient_norm"] for r in rows], colour=grey, zero=True),
    draw("rate", "Learning rate", [r["learning_rate"] for r in rows], colour=grey, zero=True),
    draw("speed", "Events per second", [r["speed"]["events_per_second"] for r in rows], colour=green, zero=True),
  ]
  names = list(dict.fromkeys(n for r in rows for n in r["tasks"]))
  tasks = [
    draw(f"task-{i}", n, [r["tasks"].get(n, {}).get("loss") for r in rows], colour=drawing.PURPLE)
    for i, n in enumerate(names)
  ]
  validation = _validation(run)
  weights = _weights(rows, table)
  loads, blocks = [r["load"] for r in rows], sparse_blocks(run.cfg.model)
  experts = [
    curves.draw_load_over_time(
      f"load-{m}", f"Block {block}: share of the choices", step, np.array([x[m] for x in loads])
    )
    for m, block in enumerate(blocks)
    if all(len(x) > m for x in loads)
  ]
  if experts:
    dropped, balance = [r["dropped_share"] for r in rows], [r["balance_loss"] for r in rows]
    wide = curves.WIDE
    experts.append(draw("dropped", "Dropped share", dropped, colour=drawing.RED, show=percent, zero=True, size=wide))
    experts.append(draw("balance", "Balance loss (1 is even)", balance, colour=drawing.ORANGE, size=wide))
  return {
    "first": step[0],
    "last": step[-1],
    "thinned": len(rows) > curves.MOST_POINTS,
    "whole": whole,
    "tasks": tasks,
    "validation": validation,
    "weights": weights,
    "experts": experts,
    "table": table,
  }


def _validation(run: RunFiles) -> list[Markup]:
  """Draws the validation score and each task's main metric on validation snapshots, over the steps."""
  step = [r["step"] for r in run.validation]
  if not step:
    return []
  drawn = [curves.draw_curve("validation", "Score", step, [r["score"] for r in run.validation], colour=drawing.GREEN)]
  for i, (name, task) in enumerate(run.cfg.active_views.items()):
    metric = evaluate.main_metric(run.cfg, task)
    values = [r["tasks"].get(name, {}).get(metric) for r in run.validation]
    drawn.append(curves.draw_curve(f"validation-{i}", f"{name}: {metric}", step, values))
  return drawn


def _weights(rows: Sequence[dict[str, Any]], table: list[tuple[str, list[str]]]) -> Markup | None:
  """Draws the tasks' weights over the steps and adds them to `table`; returns None if the log has no weights."""
  some = [r for r in rows if r.get("weights")]
  if not some:
    return None
  names = list(dict.fromkeys(n for r in some for n in r["weights"]))
  values = np.array([[r["weights"].get(n, np.nan) for n in names] for r in some], np.float64)
  table += [(f"Weight of {n}", [number(v[0]), number(v[-1])]) for n, v in zip(names, values.T)]
  return curves.draw_weights_over_time("weights", [r["step"] for r in some], dict(zip(names, values.T)))
