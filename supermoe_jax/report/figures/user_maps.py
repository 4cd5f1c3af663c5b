"""Draws maps of users in the plane, coloured by a count or by a label."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from supermoe_jax.report.figures.drawing import BLUE, GREY, ORANGE, SCALE, Canvas, drawing, number, short

# The points of a map are drawn in this many parts.
_TURNS = 8


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
  """Draws points `place [n, 2]` coloured by `count [n]`, on a logarithmic scale."""
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
  """Draws points `place [n, 2]` by a label `value [n]`: 1 (yes) triangles, 0 (no) dots, NaN (unknown) small dots."""
  groups = [("unknown", np.isnan(value), GREY), ("no", value == 0, BLUE), ("yes", value == 1, ORANGE)]
  count = ", ".join(f"{where.sum():,} {text}" for text, where, _ in groups[::-1])
  with drawing(name, f"Map of {len(place):,} users coloured by {title}: {count}.", 300, 310) as canvas:
    axes = _map_axes(canvas, place, short(title, 40))
    unknown = groups[0][1]
    axes.scatter(place[unknown, 0], place[unknown, 1], 3, GREY, alpha=0.35, linewidths=0, rasterized=True)
    # Parts of yes and of no alternate; otherwise the class drawn second would cover the first.
    for part in range(_TURNS):
      for value_of, shape, size, colour in ((0, "o", 6, BLUE), (1, "^", 9, ORANGE)):
        turn = np.flatnonzero(value == value_of)[part::_TURNS]
        style: dict[str, Any] = {"alpha": 0.75, "linewidths": 0, "rasterized": True}
        axes.scatter(place[turn, 0], place[turn, 1], size, colour, marker=shape, **style)
    for text, where, colour in groups:
      if where.any():
        axes.plot([], [], "^" if text == "yes" else "o", color=colour, ms=6, label=f"{text} ({where.sum():,})")
    handles, texts = axes.get_legend_handles_labels()
    canvas.figure.legend(handles[::-1], texts[::-1], loc="outside lower left", ncols=3, handletextpad=0.1)
  return canvas.svg
