"""Draws the figures of a seesaw study as inline SVG that follows the page's text colour, as in a run's report."""

from __future__ import annotations

import io
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from supermoe_jax import atomic_files
from supermoe_jax.report.figures.curves import step_axis
from supermoe_jax.report.figures.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, STYLE, drawing, short
from supermoe_jax.seesaw.sentences import UNIT, Report, signed

# The side of the zero line also separates lost from gained, for readers who cannot distinguish these colours.
COLOURS = {"lost": ORANGE, "gained": BLUE, "even": GREY, "unknown": GREY}
_LINES = [(c, s) for s in ("-", "--", ":") for c in (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)]
# The most columns of small panels, a panel's width in points, and the height of a variant's row in points.
_COLUMNS = 4
_PANEL = 150
_ROW = 15

# A standalone picture may be shown on any page, so it brings its own background.
_ALONE: dict[str, Any] = {
  **dict.fromkeys((k for k, v in STYLE.items() if v == INK), "#24292f"),
  **dict.fromkeys(("figure.facecolor", "savefig.facecolor"), "#ffffff"),
}


def draw_gains(name: str, found: Report) -> Markup:
  """Draws bars of Δ with intervals, one panel a task and one row a variant."""
  lost = {n: v["lost"] for n, v in found["variants"].items() if v["lost"]}
  label = "Gain of each variant on each task over a single-task model. " + (
    "; ".join(f"{n} lost on {', '.join(t)}" for n, t in lost.items()) or "No loss is certain"
  )
  with drawing(name, label + ".", *_size(found)) as canvas:
    _draw_gain_bars(canvas.figure, found)
  return canvas.svg


def write_picture(found: Report, file: pathlib.Path) -> pathlib.Path:
  """Writes the bars of Δ as a standalone picture, SVG or PNG by the ending of `file`; returns its path.

  Raises: ValueError: the name has another ending.
  """
  kind = file.suffix.removeprefix(".").lower()
  if kind not in ("svg", "png"):
    raise ValueError(f"{file}: a picture is written as .svg or .png; give it one of these endings.")
  width, height = _size(found)
  height += 34  # room for the title
  buffer = io.BytesIO()
  with matplotlib.rc_context(STYLE | _ALONE | {"svg.hashsalt": "gains"}):  # type: ignore[arg-type]
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    _draw_gain_bars(figure, found)
    figure.suptitle(
      f"Gain over a model trained for the task alone,\nin {UNIT}, with 95% intervals over seeds", x=0.01, ha="left"
    )
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
  content = buffer.getvalue()
  if kind == "svg":
    text = re.sub(r"<metadata>.*?</metadata>", "", content.decode(), flags=re.DOTALL)
    content = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text).encode()
  atomic_files.write_file(file, content)
  return file


def _grid(found: Report) -> tuple[int, int]:
  count = max(len(found["tasks"]), 1)
  columns = min(_COLUMNS, count)
  return math.ceil(count / columns), columns


def _size(found: Report) -> tuple[float, float]:
  rows, columns = _grid(found)
  return 120 + _PANEL * columns, rows * (58 + _ROW * max(len(found["variants"]), 1)) + 26


def _panels(figure: Figure, found: Report) -> list[tuple[str, Axes]]:
  """Makes one panel a task; its rows are the variants, named at the left."""
  rows, columns = _grid(found)
  names = list(found["variants"])
  every = figure.subplots(rows, columns, squeeze=False)
  cast(ConstrainedLayoutEngine, figure.get_layout_engine()).set(wspace=0.04, hspace=0.04)
  for at, axes in enumerate(every.flat):
    if at >= len(found["tasks"]):
      axes.set_visible(False)
      continue
    axes.set_ylim(len(names) - 0.4, -0.6)
    labels = [short(n, 24) for n in names] if at % columns == 0 else [""] * len(names)
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
    axes.grid(True, axis="x")
    if found["tuned"] in names:
      y = names.index(found["tuned"])
      axes.axhspan(y - 0.5, y + 0.5, color=matplotlib.rcParams["text.color"], alpha=0.06, linewidth=0)
  return list(zip(found["tasks"], every.flat))


def _title(axes: Axes, found: Report, task: str) -> None:
  axes.set_title(short(task, 21))
  axes.set_xlabel(short(found["tasks"][task]["metric"] or "no metric", 20), fontsize=9)


def _draw_gain_bars(figure: Figure, found: Report) -> None:
  ink = matplotlib.rcParams["text.color"]
  for task, axes in _panels(figure, found):
    reach = []
    for y, this in enumerate(found["variants"].values()):
      gain, colour = this["tasks"][task]["gain"], COLOURS[this["tasks"][task]["verdict"]]
      if gain["mean"] is None:
        axes.annotate("none", (0, y), (4, 0), textcoords="offset points", va="center", fontsize=8, alpha=0.6)
        continue
      axes.barh(y, gain["mean"], 0.68, color=colour, alpha=0.85, linewidth=0)
      reach.append(abs(gain["mean"]) * 1.15)
      if gain["low"] is not None:
        axes.plot([gain["low"], gain["high"]], [y, y], color=ink, linewidth=1, solid_capstyle="butt")
        # An interval over two seeds can be many times as long as the bars; it may run out of the panel.
        reach += [min(abs(e), 3 * abs(gain["mean"]) + 1) for e in (gain["low"], gain["high"])]
    most = 1.05 * max([0.01, *reach]) if reach else 1.0
    axes.set_xlim(-most, most)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}%".replace("-", "−") if v else "0"))
    axes.axvline(0, color=ink, linewidth=0.8)
    _title(axes, found, task)
  handles = [
    Rectangle((0, 0), 1, 1, color=BLUE, alpha=0.85, label="gained: the interval is above 0"),
    Rectangle((0, 0), 1, 1, color=ORANGE, alpha=0.85, label="lost: the interval is below 0"),
    Rectangle((0, 0), 1, 1, color=GREY, alpha=0.85, label="no verdict"),
  ]
  figure.legend(handles=handles, loc="outside lower left", ncols=3, handlelength=1, handleheight=0.8, columnspacing=1.4)


def draw_shares(name: str, found: Report) -> Markup:
  """Draws how far each variant gets from a constant's score to the best possible; a line is the single-task model."""
  known = {**found, "tasks": {t: a for t, a in found["tasks"].items() if a["possible"]}}
  label = "Share of the possible that each variant reaches on each task; the details hold the same numbers."
  with drawing(name, label, *_size(known)) as canvas:
    for task, axes in _panels(canvas.figure, known):
      values = []
      for y, this in enumerate(known["variants"].values()):
        share = this["tasks"][task]["share_of_possible"]
        if share is None or share["mean"] is None:
          continue
        values.append(share["mean"])
        axes.plot(share["mean"], y, "o", color=BLUE, ms=5)
        if share["low"] is not None:
          axes.plot([share["low"], share["high"]], [y, y], color=BLUE, linewidth=1.2)
      alone = known["single"][task]["share_of_possible"]
      if alone is not None and alone["mean"] is not None:
        values.append(alone["mean"])
        axes.axvline(alone["mean"], color=ORANGE, linewidth=1.4)
      if values:
        margin = max(0.2 * (max(values) - min(values)), 0.02)
        axes.set_xlim(min(values) - margin, max(values) + margin)
      axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g}%".replace("-", "−")))
      _title(axes, known, task)
  return canvas.svg


def draw_trade_off(name: str, found: Report) -> Markup:
  """Draws every variant by the harm H of its mean gains and its mean gain Δm; up and to the left is better.

  A faint line reaches to the mean of the seeds' harm, which noise makes larger.
  """
  points = {
    n: (v["of_mean_gains"]["harm"], v["harm"]["mean"], v["mean_gain"])
    for n, v in found["variants"].items()
    if v["of_mean_gains"]["harm"] is not None and v["harm"]["mean"] is not None
  }
  each = "; ".join(f"{n} {x:.2f} and {signed(m['mean'])}" for n, (x, _, m) in points.items())
  with drawing(name, f"Harm and mean gain of each variant: {each}.", 470, 330) as canvas:
    axes = canvas.figure.subplots()
    for variant, (x, by_seed, y) in points.items():
      colour = ORANGE if variant == found["tuned"] else BLUE
      axes.plot([x, by_seed], [y["mean"]] * 2, color=colour, linewidth=1, alpha=0.35)
      if y["low"] is not None:
        axes.plot([x, x], [y["low"], y["high"]], color=colour, linewidth=1, alpha=0.35)
      axes.plot(x, y["mean"], "D" if variant == found["tuned"] else "o", color=colour, ms=6.5)
    where = np.array([(x, y["mean"]) for x, _, y in points.values()])
    for of, limit in ((where[:, 0], axes.set_xlim), (where[:, 1], axes.set_ylim)):
      margin = max(0.14 * float(np.ptp(of)), 0.1)
      limit(float(of.min()) - margin, float(of.max()) + margin)
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.grid(True)
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_locator(MaxNLocator(6))
      axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}%".replace("-", "−")))
    axes.set_xlabel("harm H of mean gains (further left is better)", fontsize=9)
    axes.set_ylabel("mean gain Δm (higher is better)", fontsize=9)
    _name_points(canvas.figure, axes, list(points), where)
  return canvas.svg


def _name_points(figure: Figure, axes: Axes, names: Sequence[str], where: np.ndarray) -> None:
  """Writes names next to points `where [n, 2]`, each at the free place nearest to its point."""
  figure.draw_without_rendering()  # lays the axes out, so that data can be transformed to points
  scale = 72 / figure.dpi
  place = axes.transData.transform(where) * scale
  inside = Bbox(axes.bbox.get_points() * scale)
  taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in place]
  for text, (x, y), point in zip((short(n) for n in names), place, where):
    width, height = 4.9 * len(text), 10
    places = []
    for distance in (0, 11, 22, 33, 44):
      for dy in {distance, -distance}:
        places += [(6, dy - 5), (-6 - width, dy - 5)]
      places += [(-width / 2, 6 + distance), (-width / 2, -16 - distance)]
    boxes = [Bbox.from_bounds(x + dx, y + dy, width, height) for dx, dy in places]
    costs = [round(_covered(b, taken, inside), 3) for b in boxes]
    best = min(range(len(boxes)), key=costs.__getitem__)
    taken.append(boxes[best])
    dx, dy = places[best]
    line = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.5, "shrinkA": 0, "shrinkB": 3, "color": INK}
    far = abs(dy + 5) > 12
    offset: dict[str, Any] = {"xytext": (dx, dy + 2), "textcoords": "offset points", "fontsize": 8.5}
    axes.annotate(text, tuple(point), arrowprops=line if far else None, **offset)


def _covered(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
  """Returns the area of `box` that overlaps taken boxes, plus twice its area outside of the axes."""
  outside = _area(box) - _area(Bbox.intersection(box, inside))
  return sum(_area(Bbox.intersection(box, other)) for other in taken) + 2 * outside


def _area(box: Bbox | None) -> float:
  return 0.0 if box is None else float(box.width * box.height)


def draw_cosines(name: str, title: str, tasks: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> Markup:
  """Draws cosines of task gradients, `matrix [T, T]`: blue if two tasks agree, orange if they conflict."""
  n = len(tasks)
  pairs = [(matrix[i][j], tasks[i], tasks[j]) for i in range(n) for j in range(i) if matrix[i][j] is not None]
  least = min(pairs, key=lambda p: p[0] or 0.0, default=None)
  label = f"{title}." + (f" Lowest: {least[1]} with {least[2]}, {signed(least[0])}." if least else "")
  with drawing(name, label, 130 + max(34 * n, 6.1 * len(title)), 90 + 24 * n) as canvas:
    axes = canvas.figure.subplots()
    for i, j in np.ndindex(n, n):
      value = matrix[i][j]
      colour = GREY if value is None else BLUE if value >= 0 else ORANGE
      style: dict[str, Any] = {"facecolor": colour, "alpha": 0.08 + 0.7 * min(abs(value or 0.0), 1.0), "linewidth": 0}
      axes.add_patch(Rectangle((j + 0.04, i + 0.05), 0.92, 0.9, **style))
      text = "–" if value is None else signed(value, plus=False)
      axes.text(j + 0.5, i + 0.52, text, ha="center", va="center", fontsize=8.5)
    axes.set_xlim(0, n)
    axes.set_ylim(n, 0)
    axes.set_yticks(np.arange(n) + 0.5, [short(t) for t in tasks])
    axes.set_xticks(np.arange(n) + 0.5, [short(t, 14) for t in tasks], rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.set_title(title)
    for spine in axes.spines.values():
      spine.set_visible(False)
  return canvas.svg


def draw_weights(name: str, title: str, found: Mapping[str, Sequence[float | None]]) -> Markup:
  """Draws the tasks' weights over the steps, one line a task, named at its right end."""
  step, tasks = np.array(found["step"], np.float64), [k for k in found if k != "step"]
  lines = {t: np.array([np.nan if v is None else v for v in found[t]], np.float64) for t in tasks}
  ends = {t: float(y[np.isfinite(y)][-1]) for t, y in lines.items() if np.isfinite(y).any()}
  label = f"{title}. At the end: " + ", ".join(f"{t} {v:.2f}" for t, v in ends.items()) + "."
  with drawing(name, label, 400, 220) as canvas:
    axes = canvas.figure.subplots()
    top = 1.08 * max((float(np.nanmax(lines[t])) for t in ends), default=1.0)
    # Names of lines with close ends are moved apart: a name is about 13 points high, the axis about 155.
    gap, at = top * 13 / 155, -math.inf
    for task, end in sorted(ends.items(), key=lambda item: item[1]):
      colour, style = _LINES[tasks.index(task) % len(_LINES)]
      axes.plot(step, lines[task], color=colour, linestyle=style, linewidth=1.4, marker="o" if len(step) == 1 else "")
      at = max(end, at + gap)
      axes.annotate(short(task), (1, at), (5, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=9)
    axes.set_title(short(title, 50))
    step_axis(axes, step)
    if len(step) > 1:
      axes.set_xlim(step[0], step[-1])
    axes.set_ylim(0, max(top, at + gap / 2))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(True, axis="y")
  return canvas.svg
