"""Draws the curves of a run: one quantity, or several, over the training steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from supermoe_jax.report.figures.drawing import BLUE, MOST_NAMED_EXPERTS, SCALE, drawing, number, percent, short

# Curves of longer runs are averaged down to this many points; a screen shows no more.
MOST_POINTS = 300
# Width and height, in points, of the figures of expert load, balance, dropped share and task weights.
WIDE = (370, 220)


def _thin(step: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Averages steps and `values [n, ...]` over equal groups of consecutive rows, to at most MOST_POINTS rows."""
  if len(step) <= MOST_POINTS:
    return step, values
  parts = np.array_split(np.arange(len(step)), MOST_POINTS)
  return np.array([step[p].mean() for p in parts]), np.stack([values[p].mean(axis=0) for p in parts])


_LINES = ("-", "--", ":", "-.")


def draw_curve(
  name: str,
  title: str,
  step: Sequence[float],
  values: Sequence[float | None],
  *,
  colour: str = BLUE,
  show: Callable[[float], str] = number,
  zero: bool = False,
  size: tuple[float, float] = (270, 165),
) -> Markup:
  """Draws one quantity over the steps; None and non-finite values leave a gap. With `zero`, the axis begins at 0."""
  y = np.array([np.nan if v is None else v for v in values], np.float64)
  y = np.where(np.isfinite(y), y, np.nan)
  x, y = _thin(np.asarray(step, np.float64), y)
  label = f"{title}: " + _draw_curve(step, values, show)
  with drawing(name, label, *size) as canvas:
    axes = canvas.figure.subplots()
    axes.plot(x, y, color=colour, marker="o" if len(x) <= 25 else "", ms=3.5)
    axes.set_title(short(title, 34))
    step_axis(axes, x)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: show(v)))
    if zero:
      axes.set_ylim(0, max(float(np.nanmax(y, initial=0)) * 1.1, 1e-3))
    axes.grid(True, axis="y")
  return canvas.svg


def _draw_curve(step: Sequence[float], values: Sequence[float | None], show: Callable[[float], str]) -> str:
  known = [(s, v) for s, v in zip(step, values) if v is not None]
  if not known:
    return "no value."
  (first, begin), (last, end) = known[0], known[-1]
  return f"{show(begin)} at step {first:,.0f}, {show(end)} at step {last:,.0f}."


def step_axis(axes: Axes, x: np.ndarray) -> None:
  """Labels the horizontal axis with whole steps; a single step in `x` gets room on both sides."""
  axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
  axes.set_xlabel("step", fontsize=9)
  if len(x) == 1:
    axes.set_xlim(x[0] - 1, x[0] + 1)


def draw_weights_over_time(name: str, step: Sequence[float], weights: Mapping[str, np.ndarray]) -> Markup:
  """Draws the tasks' weights `[n]` over the steps, one line a task; non-finite values leave a gap."""
  x, y = _thin(np.asarray(step, np.float64), np.stack(list(weights.values()), axis=1))
  ends = ", ".join(f"{t} {number(float(v[-1]))}" for t, v in weights.items())
  lines = math.ceil(len(weights) / 2)
  with drawing(name, f"Weight of each task; at the end {ends}.", WIDE[0], WIDE[1] + 16 * lines) as canvas:
    axes = canvas.figure.subplots()
    for t, task in enumerate(weights):
      style: dict[str, Any] = {"color": SCALE(t / max(len(weights) - 1, 1)), "linestyle": _LINES[t % len(_LINES)]}
      axes.plot(x, y[:, t], marker="o" if len(x) <= 25 else "", ms=3.5, label=short(task), **style)
    axes.set_title("Weight of each task")
    step_axis(axes, x)
    axes.set_ylim(0, max(float(np.nanmax(y, initial=0)) * 1.1, 1e-3))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(True, axis="y")
    canvas.figure.legend(loc="outside lower left", ncols=2, handletextpad=0.5)
  return canvas.svg


def draw_load_over_time(name: str, title: str, step: Sequence[float], load: np.ndarray) -> Markup:
  """Draws the experts' shares `load [n, E]` stacked over the steps; each band's name stands at its right end."""
  experts = load.shape[1]
  x, y = _thin(np.asarray(step, np.float64), np.nan_to_num(load))
  if len(x) == 1:  # a band needs a width
    x, y = np.array([x[0] - 0.5, x[0] + 0.5]), np.repeat(y, 2, axis=0)
  most = int(np.argmax(y[-1]))
  label = f"{title}: share of the choices by expert; at the end expert {most} has most, {percent(float(y[-1, most]))}."
  with drawing(name, label, *WIDE) as canvas:
    axes = canvas.figure.subplots()
    top = np.cumsum(y, axis=1)
    for e in range(experts):
      style: dict[str, Any] = {"color": SCALE(e / max(experts - 1, 1)), "alpha": 0.55 + 0.3 * (e % 2), "linewidth": 0}
      # Many bands over a long run would take megabytes as vectors, so they are drawn as pixels.
      axes.fill_between(x, top[:, e] - y[:, e], top[:, e], rasterized=experts > MOST_NAMED_EXPERTS, **style)
      if y[-1, e] > 0.045 and experts <= MOST_NAMED_EXPERTS:
        axes.annotate(
          f"expert {e}", (x[-1], top[-1, e] - y[-1, e] / 2), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_title(short(title, 50))
    step_axis(axes, x)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
  return canvas.svg
