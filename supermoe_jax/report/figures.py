"""Figures of the report: matplotlib drawings as inline SVG that follow the page's text colour, light or dark.

Text and axes are drawn in a sentinel colour that becomes `currentColor`; everything else is of middling brightness,
which reads on white and on near-black. No figure touches pyplot's global state.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from supermoe_jax.evaluation.metrics import LOWER_IS_BETTER, best, gain

INK = "#010203"  # the sentinel: replaced by currentColor
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3d85c6", "#d9722b", "#2f9e74", "#9068c8", "#d05050", "#858d96"
# Steps of hue at nearly one brightness: a usual map ends in a colour that vanishes on white or on black.
SCALE = LinearSegmentedColormap.from_list("scale", ["#4a7fd0", "#8a68c8", "#c85a92", "#dc7540", "#c99a1e"])

# Curves of longer runs are averaged down to this many points; a screen shows no more.
MOST_POINTS = 300
# Above this many experts numbers and names no longer fit.
MOST_NAMED_EXPERTS = 16
# Width and height, in points, of the pictures of expert load over time and what stands beside them.
WIDE = (370, 220)

STYLE: dict[str, Any] = {
  "svg.fonttype": "none",
  "text.parse_math": False,  # names come from the user's data and may hold a $
  "font.size": 10,
  "axes.titlesize": 10,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "legend.fontsize": 9,
  "legend.frameon": False,
  "xtick.labelsize": 9,
  "ytick.labelsize": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.linewidth": 0.7,
  "xtick.major.width": 0.7,
  "ytick.major.width": 0.7,
  "xtick.major.size": 3,
  "ytick.major.size": 3,
  "grid.linewidth": 0.6,
  "grid.alpha": 0.15,
  "axes.axisbelow": True,
  "lines.linewidth": 1.6,
  **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK),
  **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "savefig.edgecolor"), "none"),
}


class Scores(NamedTuple):
  """The main metric of a task: of this run, and of each baseline that has one."""

  task: str
  metric: str
  run: float | None
  baselines: Mapping[str, float | None]


class Canvas:
  """A figure under construction; `svg` holds its markup once the block that drew it is left."""

  def __init__(self, width: float, height: float):
    self.figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    self.svg = Markup("")


@contextmanager
def drawing(name: str, label: str, width: float, height: float) -> Iterator[Canvas]:
  """Opens a figure of `width` by `height` points; `name` makes its ids unique on the page, `label` is read aloud."""
  with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):  # type: ignore[arg-type]
    canvas = Canvas(width, height)
    yield canvas
    buffer = io.StringIO()
    canvas.figure.savefig(buffer, format="svg", dpi=200)
  canvas.svg = _inline(buffer.getvalue(), name, label, width)


def _inline(svg: str, name: str, label: str, width: float) -> Markup:
  """Makes a standalone SVG document part of a page."""
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  # A style sheet in one SVG would hold for the whole page, so the page's own has these rules.
  svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
  svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
  svg = re.sub(r'(<[^>]*\bid=")', rf"\1{name}-", svg)
  svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
  svg = svg.replace('xlink:href="', 'href="')
  svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
  svg = svg.replace(INK, "currentColor")
  box = re.search(r'viewBox="[^"]*"', svg)
  assert box is not None
  style = f"min-width:{width * 0.85:.0f}px;max-width:{width * 1.5:.0f}px"
  head = f'<svg class="plot" {box.group()} style="{style}" role="img" aria-label="{escape(label)}">'
  return Markup(head + re.sub(r"^<svg[^>]*>", "", svg))


def short(text: str, most: int = 22) -> str:
  """Cuts the middle out of a long name: names of one kind often differ at the end only."""
  end = (most - 1) // 2
  return text if len(text) <= most else f"{text[: most - 1 - end]}…{text[-end:]}"


def number(value: float) -> str:
  """Writes a number for people, with about three digits."""
  if not math.isfinite(value):
    return str(value)
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= max(0.9995 * size, 1e4):
      return f"{value / size:.{0 if abs(value) >= 99.95 * size else 1}f}".removesuffix(".0") + unit
  return f"{value:,.0f}" if abs(value) >= 999.5 or value == int(value) else f"{value:.3g}"


def percent(value: float) -> str:
  """Writes a share as a percentage with about three digits."""
  return f"{100 * value:.3g}%" if abs(value) < 0.9995 else f"{100 * value:.0f}%"


# ---------------------------------------------------------------------------------------------------------- main metric


_MARKS = (("D", ORANGE), ("s", GREEN), ("^", PURPLE), ("v", RED), ("P", BLUE))


def scores(name: str, rows: Sequence[Scores]) -> Markup:
  """Dots of this run and its baselines, a row a task.

  Areas under a curve stand apart from metrics that start at 0, and from those of which less is better.
  """
  areas = [r for r in rows if r.metric.endswith("auc")]
  errors = [r for r in rows if r.metric in LOWER_IS_BETTER]
  groups = [g for g in (areas, [r for r in rows if r not in areas and r not in errors], errors) if g]
  names = list(dict.fromkeys(b for r in rows for b in r.baselines))
  marks = dict(zip([n for n in names if n != "constant"], _MARKS * len(names)))
  marks["constant"] = ("|", GREY)
  lines = math.ceil((len(names) + 1) / 2)
  height = 24 * len(rows) + 44 * len(groups) + 16 * lines
  label = "This run's main metric beside its baselines, one row a task; the table holds the same numbers."
  with drawing(name, label, 380, height) as canvas:
    panels = canvas.figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(g) + 0.8 for g in groups])[:, 0]
    for axes, group in zip(panels, groups):
      _score_panel(axes, group, marks)
    handles = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
    order = [n for n in ("this run", *names) if n in handles]
    canvas.figure.legend([handles[n] for n in order], order, loc="outside lower left", ncols=2, handletextpad=0.3)
  return canvas.svg


def _score_panel(axes: Axes, rows: Sequence[Scores], marks: Mapping[str, tuple[str, str]]) -> None:
  for y, row in enumerate(rows):
    other = best(row.metric, row.baselines.values())
    if row.run is not None and other is not None:
      colour = BLUE if gain(row.metric, row.run, other) >= 0 else GREY
      axes.plot([other, row.run], [y, y], color=colour, linewidth=2, alpha=0.55, zorder=2)
    for baseline, value in row.baselines.items():
      shape, colour = marks[baseline]
      if value is not None:
        size = 9 if shape == "|" else 5.5
        axes.plot(value, y, shape, color=colour, ms=size, mfc="none", mew=1.6, zorder=3, label=baseline)
    if row.run is not None:
      axes.plot(row.run, y, "o", color=BLUE, ms=8, zorder=4, label="this run")
  values = [v for r in rows for v in (r.run, *r.baselines.values()) if v is not None] or [0.0]
  if rows[0].metric.endswith("auc"):
    axes.set_xlim(min(0.48, min(values) - 0.02), 1.0)
    title = "area under the ROC curve"
  else:
    axes.set_xlim(0, max(max(values) * 1.12, 1e-3))
    title = ", ".join(dict.fromkeys(r.metric.upper() for r in rows))
  axes.xaxis.set_major_locator(MaxNLocator(6))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
  side = "left" if rows[0].metric in LOWER_IS_BETTER else "right"
  axes.set_title(f"{title} (further {side} is better)", fontsize=9, fontweight="normal")
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_yticks(range(len(rows)), [short(r.task) for r in rows])
  axes.tick_params(axis="y", length=0)
  axes.spines["left"].set_visible(False)
  axes.grid(True)


# --------------------------------------------------------------------------------------------------------------- curves


def _thin(step: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Averages `values [n, ...]` over equal runs of rows, to at most MOST_POINTS."""
  if len(step) <= MOST_POINTS:
    return step, values
  parts = np.array_split(np.arange(len(step)), MOST_POINTS)
  return np.array([step[p].mean() for p in parts]), np.stack([values[p].mean(axis=0) for p in parts])


_LINES = ("-", "--", ":", "-.")


def curve(
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
  """One quantity over the steps; None and what is not finite leave a gap. With `zero`, the axis begins at 0."""
  y = np.array([np.nan if v is None else v for v in values], np.float64)
  y = np.where(np.isfinite(y), y, np.nan)
  x, y = _thin(np.asarray(step, np.float64), y)
  label = f"{title}: " + _course(step, values, show)
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


def _course(step: Sequence[float], values: Sequence[float | None], show: Callable[[float], str]) -> str:
  known = [(s, v) for s, v in zip(step, values) if v is not None]
  if not known:
    return "no value."
  (first, begin), (last, end) = known[0], known[-1]
  return f"{show(begin)} at step {first:,.0f}, {show(end)} at step {last:,.0f}."


def step_axis(axes: Axes, x: np.ndarray) -> None:
  """Marks whole steps on the horizontal axis, over the range of `x`."""
  axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
  axes.set_xlabel("step", fontsize=9)
  if len(x) == 1:
    axes.set_xlim(x[0] - 1, x[0] + 1)


def weights_over_time(name: str, step: Sequence[float], weights: Mapping[str, np.ndarray]) -> Markup:
  """The tasks' weights `[n]` over the steps, a line a task; what is not finite leaves a gap."""
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


def load_over_time(name: str, title: str, step: Sequence[float], load: np.ndarray) -> Markup:
  """Experts' shares `load [n, E]` stacked over the steps; each band's name stands at its right end."""
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
      # As outlines, many bands over a long run would take megabytes.
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


# ----------------------------------------------------------------------------------------------------------------- maps


def heat_map(name: str, title: str, tasks: Sequence[str], load: np.ndarray, most: float) -> Markup:
  """Shares `load [tasks, experts]` as cells; the deepest colour stands for the share `most`."""
  rows, experts = load.shape
  named = experts <= MOST_NAMED_EXPERTS
  cell = 27 if named else max(8, 480 // experts)
  width, height = 112 + max(cell * experts, 5.2 * len(title)), 62 + 24 * rows  # the title needs room over few experts
  top = ", ".join(f"{t} expert {int(np.argmax(v))} ({percent(float(v.max()))})" for t, v in zip(tasks, load))
  with drawing(name, f"{title}. Most used: {top}.", width, height) as canvas:
    axes = canvas.figure.subplots()
    # From transparent to blue: on either background more colour is more load, and the text stays readable.
    strength = 0.8 * np.clip(load / most, 0, 1)
    if named:
      for row, e in np.ndindex(load.shape):
        cell_style: dict[str, Any] = {"facecolor": BLUE, "alpha": float(strength[row, e]), "linewidth": 0}
        axes.add_patch(Rectangle((e + 0.04, row + 0.05), 0.92, 0.9, **cell_style))
        axes.text(e + 0.5, row + 0.52, f"{100 * load[row, e]:.0f}", ha="center", va="center", fontsize=9)
    else:
      image = np.concatenate([np.broadcast_to(to_rgb(BLUE), (*load.shape, 3)), strength[:, :, None]], axis=-1)
      axes.imshow(image, extent=(0, experts, rows, 0), aspect="auto", interpolation="nearest")
    axes.set_xlim(0, experts)
    axes.set_ylim(rows, 0)
    axes.set_yticks(np.arange(rows) + 0.5, [short(t) for t in tasks])
    shown = range(experts) if named else (0, experts - 1)
    axes.set_xticks([e + 0.5 for e in shown], list(map(str, shown)))
    axes.tick_params(length=0)
    axes.set_xlabel("expert", fontsize=9)
    axes.set_title(title)
    for spine in axes.spines.values():
      spine.set_visible(False)
    lines = [[(0, y), (experts, y)] for y in range(rows + 1)]
    axes.add_collection(LineCollection(lines, colors=INK, linewidths=0.5, alpha=0.12))
  return canvas.svg


def _map_axes(canvas: Canvas, place: np.ndarray, title: str) -> Axes:
  axes = canvas.figure.subplots()
  axes.set_title(title)
  axes.xaxis.set_major_locator(NullLocator())
  axes.yaxis.set_major_locator(NullLocator())
  low, high = place.min(axis=0), place.max(axis=0)
  margin = 0.04 * (high - low) + 1e-9
  axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
  axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
  for spine in axes.spines.values():
    spine.set_visible(True)
    spine.set_alpha(0.25)
  return axes


def map_by_count(name: str, title: str, place: np.ndarray, count: np.ndarray) -> Markup:
  """Points `place [n, 2]` coloured by a count, on a logarithmic scale."""
  count = np.maximum(count, 1)
  low, high = float(count.min()), float(max(count.max(), count.min() + 1))
  label = f"Map of {len(place):,} users coloured by {title}, {number(low)} to {number(high)}."
  with drawing(name, label, 300, 310) as canvas:
    axes = _map_axes(canvas, place, title)
    norm = LogNorm(low, high)
    x, y = place.T
    points = axes.scatter(x, y, 5, count, cmap=SCALE, norm=norm, alpha=0.75, linewidths=0, rasterized=True)
    bar = canvas.figure.colorbar(points, ax=axes, location="bottom", aspect=40, pad=0.03)
    assert bar.solids is not None
    bar.solids.set(alpha=1, rasterized=True)
    ticks = [t for d in range(math.ceil(math.log10(high)) + 1) for t in (10**d,) if low <= t <= high]
    bar.ax.xaxis.set_major_locator(FixedLocator(ticks if len(ticks) > 1 else [low, high]))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
    bar.outline.set_visible(False)
  return canvas.svg


def map_by_label(name: str, title: str, place: np.ndarray, value: np.ndarray) -> Markup:
  """Points `place [n, 2]` coloured by a label: 1 yes, 0 no, NaN unknown."""
  groups = [("unknown", np.isnan(value), GREY), ("no", value == 0, BLUE), ("yes", value == 1, ORANGE)]
  count = ", ".join(f"{where.sum():,} {text}" for text, where, _ in groups[::-1])
  with drawing(name, f"Map of {len(place):,} users coloured by {title}: {count}.", 300, 310) as canvas:
    axes = _map_axes(canvas, place, short(title, 40))
    unknown = groups[0][1]
    axes.scatter(place[unknown, 0], place[unknown, 1], 3, GREY, alpha=0.35, linewidths=0, rasterized=True)
    # Yes and no in one go, in the order of the users: drawn one after the other, the second would cover the first.
    known = ~unknown
    colours = [ORANGE if v else BLUE for v in value[known]]
    axes.scatter(place[known, 0], place[known, 1], 6, colours, alpha=0.75, linewidths=0, rasterized=True)
    for text, where, colour in groups:
      if where.any():
        axes.plot([], [], "o", color=colour, ms=6, label=f"{text} ({where.sum():,})")
    handles, texts = axes.get_legend_handles_labels()
    canvas.figure.legend(handles[::-1], texts[::-1], loc="outside lower left", ncols=3, handletextpad=0.1)
  return canvas.svg
