"""Contrast: text of the pages at 4.5 to 1 and marks of the pictures at 3 to 1, on every ground that is used."""

from __future__ import annotations

import re

import pytest
from matplotlib.colors import to_hex, to_rgb

from supermoe_jax.report import rendering
from supermoe_jax.report.figures import drawing, heat_maps


def palettes() -> list[dict[str, str]]:
  """The colours of the light page and of the dark one."""
  style = rendering.render_template("page_style.css.jinja", {}, {})
  light, dark, _ = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
  return [dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in (light, dark)]


def brightness(colour) -> float:
  parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other) -> float:
  low, high = sorted((brightness(one), brightness(other)))
  return (high + 0.05) / (low + 0.05)


def test_black_on_white_has_the_highest_contrast() -> None:
  assert contrast("#000", "#fff") == pytest.approx(21)
  assert contrast("#777", "#fff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark"])
def test_text_is_readable(palette) -> None:
  for ground in ("page", "panel"):
    for text in ("text", "soft", "accent", "better", "worse"):
      assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
  assert contrast(palette["text"], palette["note"]) >= 4.5


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark"])
def test_marks_stand_out(palette) -> None:
  marks = [drawing.BLUE, drawing.ORANGE, drawing.GREEN, drawing.PURPLE, drawing.RED, drawing.GREY]
  marks += [to_hex(drawing.SCALE(i / 4)) for i in range(5)]
  for mark in marks:
    assert contrast(mark, palette["page"]) >= 3, mark


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark"])
def test_numbers_in_the_deepest_cells_are_readable(palette) -> None:
  for colour in (drawing.BLUE, drawing.ORANGE):
    shares = zip(to_rgb(colour), to_rgb(palette["page"]))
    mixed = [heat_maps.DEEPEST * own + (1 - heat_maps.DEEPEST) * ground for own, ground in shares]
    assert contrast(palette["text"], mixed) >= 4.5, colour
