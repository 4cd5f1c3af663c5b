"""Draws dots: the scores of a run and its baselines, the reliability of its predictions, and amounts by deciles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from supermoe_jax.evaluation.metrics import LOWER_IS_BETTER
from supermoe_jax.report.figures.drawing import (
  BLUE,
  GREEN,
  GREY,
  INK,
  ORANGE,
  PURPLE,
  RED,
  drawing,
  number,
  percent,
  short,
)

RUN = "this run"


class ScorePoint(NamedTuple):
  """A score with its interval; None stands for a missing score or interval."""

  value: float | None
  interval: tuple[float, float] | None = None


class ScoreRow(NamedTuple):
  """A metric of one task, or of a group of its labels: the score of this run and the scores of its baselines."""

  name: str
  metric: str
  run: ScorePoint
  baselines: Mapping[str, ScorePoint]

  @property
  def series(self) -> dict[str, ScorePoint]:
    """Returns the run and the baselines that have a score, in their order from top to bottom."""
    every = {RUN: self.run, **self.baselines}
    return {n: p for n, p in every.items() if p.value is not None}


_MARKS = (("D", ORANGE), ("s", GREEN), ("^", PURPLE), ("v", RED), ("P", BLUE))
# Height in points of one score, and a row's additional height.
_LINE, _GAP = 11, 10


def marks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
  """Returns the marker and the colour of this run and of each baseline."""
  found = dict(zip([n for n in names if n != "constant"], _MARKS * len(names)))
  return {RUN: ("o", BLUE), "constant": ("|", GREY), **found}


def draw_scores(name: str, rows: Sequence[ScoreRow]) -> Markup:
  """Draws the scores and intervals of this run and its baselines, one row a task.

  Areas under a curve, other metrics, and metrics where lower is better have a panel each.
  """
  areas = [r for r in rows if r.metric.endswith("auc")]
  errors = [r for r in rows if r.metric in LOWER_IS_BETTER]
  groups = [g for g in (areas, [r for r in rows if r not in areas and r not in errors], errors) if g]
  names = list(dict.fromkeys(b for r in rows for b in r.baselines))
  heights = [_height(g) for g in groups]
  label = "This run's main metric and its baselines, one row a task; the table holds the same numbers."
  with drawing(name, label, 430, sum(heights) + 44 * len(groups) + 16 * math.ceil((len(names) + 1) / 2)) as canvas:
    panels = list(canvas.figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0])
    for axes, group in zip(panels, groups):
      _panel(axes, group, marks(names))
      axes.set_title(f"{_metrics(group)} ({_better(group[0].metric)})", fontsize=9, fontweight="normal")
    _legend(canvas.figure, panels, names)
  return canvas.svg


def draw_by_history(name: str, title: str, rows: Sequence[ScoreRow]) -> Markup:
  """Draws the main metric of one task, with one row for each group of histories, by length."""
  names = list(dict.fromkeys(b for r in rows for b in r.baselines))
  own = ", ".join(f"{r.name} {r.run.value:.3g}" for r in rows if r.run.value is not None)
  height = _height(rows) + 66 + 16 * math.ceil((len(names) + 1) / 2)
  label = f"{title}: {rows[0].metric} by events before (and users): {own or 'no value'}."
  with drawing(name, label, 330, height) as canvas:
    axes = canvas.figure.subplots()
    _panel(axes, rows, marks(names))
    axes.set_title(f"{short(title)}, by events (users)")
    axes.set_xlabel(f"{_metrics(rows)} ({_better(rows[0].metric)})", fontsize=9)
    _legend(canvas.figure, [axes], names)
  return canvas.svg


def _height(rows: Sequence[ScoreRow]) -> float:
  return sum(_LINE * max(len(r.series), 1) + _GAP for r in rows)


def _metrics(rows: Sequence[ScoreRow]) -> str:
  names = dict.fromkeys(r.metric.upper() for r in rows)
  return "area under the ROC curve" if rows[0].metric.endswith("auc") else ", ".join(names)


def _better(metric: str) -> str:
  return f"further {'left' if metric in LOWER_IS_BETTER else 'right'} is better"


def _panel(axes: Axes, rows: Sequence[ScoreRow], shapes: Mapping[str, tuple[str, str]]) -> None:
  """Draws each score with its interval on its own line; the lines of a row stand together."""
  top, places, ends = 0.0, [], []
  for row in rows:
    height = _LINE * max(len(row.series), 1) + _GAP
    places.append(top + height / 2)
    for i, (series, (value, interval)) in enumerate(row.series.items()):
      assert value is not None
      shape, colour = shapes[series]
      y = top + _GAP / 2 + _LINE * (i + 0.5)
      ends += [value, *(interval or ())]
      if interval:
        axes.plot(interval, [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
      style: dict[str, Any] = {"ms": 6.5} if series == RUN else {"ms": 9 if shape == "|" else 5, "mfc": "none"}
      axes.plot(value, y, shape, color=colour, mew=1.5, zorder=3, label=series, **style)
    top += height
    if row is not rows[-1]:
      axes.axhline(top, color=INK, linewidth=0.5, alpha=0.15)
  ends = ends or [0.0, 1.0]
  margin = max(0.04 * (max(ends) - min(ends)), 1e-3)
  bounded = rows[0].metric not in LOWER_IS_BETTER
  axes.set_xlim(max(min(ends) - margin, 0.0), min(max(ends) + margin, 1.0) if bounded else max(ends) + margin)
  axes.xaxis.set_major_locator(MaxNLocator(5))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
  axes.set_ylim(top, 0)
  axes.set_yticks(places, [short(r.name, 26) for r in rows])
  axes.tick_params(axis="y", length=0)
  axes.spines["left"].set_visible(False)
  axes.grid(True, axis="x")


def _legend(figure: Figure, panels: Sequence[Axes], names: Sequence[str]) -> None:
  handles = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
  order = [n for n in (RUN, *names) if n in handles]
  if order:
    figure.legend([handles[n] for n in order], order, loc="outside lower left", ncols=2, handletextpad=0.3)


def draw_reliability(name: str, title: str, bins: Sequence[Mapping[str, Any]]) -> Markup:
  """Draws the observed over the predicted share, one dot with interval for each bin; on the line both are equal."""
  most = max(max(b["predicted"], b["observed"], b["interval"][1]) for b in bins)
  told = ", ".join(f"{percent(b['predicted'])} predicted, {percent(b['observed'])} observed" for b in bins)
  with drawing(name, f"Reliability of {title}: {told}.", 270, 270) as canvas:
    axes = canvas.figure.subplots()
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.5, linestyle=(0, (4, 3)))
    for b in bins:
      axes.plot([b["predicted"]] * 2, b["interval"], color=BLUE, linewidth=1.4, solid_capstyle="butt")
    axes.plot([b["predicted"] for b in bins], [b["observed"] for b in bins], "o", color=BLUE, ms=5)
    axes.set_title(short(title, 34))
    limit = min(1.0, most * 1.08)
    axes.set_xlim(0, limit)
    axes.set_ylim(0, limit)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_locator(MaxNLocator(4))
      axis.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel("observed", fontsize=9)
    axes.grid(True)
  return canvas.svg


def draw_deciles(name: str, title: str, bins: Sequence[Mapping[str, Any]]) -> Markup:
  """Draws the mean predicted and the mean observed amount of each decile of the prediction, the smallest first."""
  told = "; ".join(f"{number(b['predicted'])} predicted, {number(b['observed'])} observed" for b in bins)
  with drawing(name, f"Amounts of {title} by deciles: {told}.", 270, 270) as canvas:
    axes, places = canvas.figure.subplots(), range(1, len(bins) + 1)
    for place, b in zip(places, bins):
      axes.plot([place] * 2, [b["predicted"], b["observed"]], color=INK, linewidth=0.8, alpha=0.5)
    axes.plot(places, [b["observed"] for b in bins], "o", color=BLUE, ms=5, label="observed")
    axes.plot(places, [b["predicted"] for b in bins], "D", color=ORANGE, ms=6, mfc="none", mew=1.5, label="predicted")
    axes.set_title(short(title, 34))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
    axes.set_xlabel("decile of the prediction", fontsize=9)
    axes.set_ylabel("mean amount", fontsize=9)
    axes.legend(loc="upper left")
    axes.grid(True, axis="y")
  return canvas.svg
