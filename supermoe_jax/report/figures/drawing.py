"""Turns matplotlib figures into inline SVG that follows the page's text colour, light or dark.

Text and axes are drawn in a sentinel colour that becomes `currentColor`. Marks have a contrast of at least 3 to 1 with
the light page, its panels and the dark page. No figure touches pyplot's global state.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK = "#010203"  # the sentinel: replaced by currentColor
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3d85c6", "#d06a22", "#2f9b72", "#9068c8", "#d05050", "#858d96"
# Hues of nearly one brightness: most colour maps end in a colour that vanishes on white or on black.
SCALE = LinearSegmentedColormap.from_list("scale", ["#4a7fd0", "#8a68c8", "#c85a92", "#cc6a34", "#a37c10"])

# With more experts than this, their numbers and names no longer fit.
MOST_NAMED_EXPERTS = 16

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


class Canvas:
  """A figure under construction; `svg` holds its markup after the `with drawing(…)` block."""

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
  """Turns a standalone SVG document into markup for a page."""
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  # A style sheet in one SVG would apply to the whole page; the page's own style sheet has these rules.
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
  """Cuts the middle out of a long name, because similar names often differ only at the end."""
  end = (most - 1) // 2
  return text if len(text) <= most else f"{text[: most - 1 - end]}…{text[-end:]}"


def number(value: float) -> str:
  """Formats a number for people, with about three digits."""
  if not math.isfinite(value):
    return str(value)
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= max(0.9995 * size, 1e4):
      return f"{value / size:.{0 if abs(value) >= 99.95 * size else 1}f}".removesuffix(".0") + unit
  return f"{value:,.0f}" if abs(value) >= 999.5 or value == int(value) else f"{value:.3g}"


def percent(value: float) -> str:
  """Formats a share as a percentage with about three digits."""
  return f"{100 * value:.3g}%" if abs(value) < 0.9995 else f"{100 * value:.0f}%"
