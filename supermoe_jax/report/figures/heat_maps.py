"""Draws heat maps, whose depth of colour stands for a number: shares of experts, and lifts over usual shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from supermoe_jax.report.figures.drawing import BLUE, INK, MOST_NAMED_EXPERTS, ORANGE, drawing, percent, short

# The opacity of the deepest colour; text on it is still readable, light and dark.
DEEPEST = 0.7
# A lift of at least this, or at most its inverse, has the deepest colour.
MOST_LIFT = 4.0


def heat_map(name: str, title: str, tasks: Sequence[str], load: np.ndarray, most: float) -> Markup:
  """Draws shares `load [tasks, experts]` as cells; the deepest colour stands for the share `most`."""
  top = ", ".join(f"{t} expert {int(np.argmax(v))} ({percent(float(v.max()))})" for t, v in zip(tasks, load))
  strength = DEEPEST * np.clip(load / most, 0, 1)
  cells = [[f"{100 * v:.0f}" for v in row] for row in load]
  return _cells(name, title, f"{title}. Most used: {top}.", tasks, strength, cells)


def lift_map(name: str, title: str, rows: Sequence[str], lift: np.ndarray) -> Markup:
  """Draws `lift [rows, experts]`: how many times as often as all tokens a row's tokens go to each expert.

  Blue cells are above 1, orange ones below; each cell also shows its number. NaN marks an expert without tokens.
  """
  known = np.nan_to_num(lift, nan=1.0)
  depth = np.log(np.clip(known, 1 / MOST_LIFT, MOST_LIFT)) / np.log(MOST_LIFT)
  top = ", ".join(f"{t} expert {int(np.argmax(v))} ({v.max():.1f} times)" for t, v in zip(rows, known))
  cells = [["–" if np.isnan(v) else f"{v:.1f}" for v in row] for row in lift]
  return _cells(name, title, f"{title}. Highest: {top}.", rows, DEEPEST * depth, cells)


def _cells(
  name: str, title: str, label: str, rows: Sequence[str], strength: np.ndarray, texts: Sequence[Sequence[str]]
) -> Markup:
  """Draws cells with their texts; `strength [rows, experts]` is the opacity of blue, or of orange where negative."""
  count, experts = strength.shape
  named = experts <= MOST_NAMED_EXPERTS
  cell = 27 if named else max(8, 480 // experts)
  left = max(112, 18 + 5.4 * max(len(short(r)) for r in rows))
  width, height = left + max(cell * experts, 6.1 * len(title)), 62 + 24 * count  # a long title widens it
  with drawing(name, label, width, height) as canvas:
    axes = canvas.figure.subplots()
    # Opacity shows the value: deeper colour means more on a light and a dark page, and text stays readable.
    if named:
      for row, e in np.ndindex(strength.shape):
        depth = float(strength[row, e])
        style: dict[str, Any] = {"facecolor": BLUE if depth >= 0 else ORANGE, "alpha": abs(depth), "linewidth": 0}
        axes.add_patch(Rectangle((e + 0.04, row + 0.05), 0.92, 0.9, **style))
        axes.text(e + 0.5, row + 0.52, texts[row][e], ha="center", va="center", fontsize=9)
    else:
      colour = np.where(strength[:, :, None] >= 0, to_rgb(BLUE), to_rgb(ORANGE))
      image = np.concatenate([colour, np.abs(strength)[:, :, None]], axis=-1)
      axes.imshow(image, extent=(0, experts, count, 0), aspect="auto", interpolation="nearest")
    _frame(axes, rows, experts, named, title)
  return canvas.svg


def _frame(axes: Axes, rows: Sequence[str], experts: int, named: bool, title: str) -> None:
  axes.set_xlim(0, experts)
  axes.set_ylim(len(rows), 0)
  axes.set_yticks(np.arange(len(rows)) + 0.5, [short(t) for t in rows])
  shown = range(experts) if named else (0, experts - 1)
  axes.set_xticks([e + 0.5 for e in shown], list(map(str, shown)))
  axes.tick_params(length=0)
  axes.set_xlabel("expert", fontsize=9)
  axes.set_title(title)
  for spine in axes.spines.values():
    spine.set_visible(False)
  lines = [[(0, y), (experts, y)] for y in range(len(rows) + 1)]
  axes.add_collection(LineCollection(lines, colors=INK, linewidths=0.5, alpha=0.12))
