"""Reads numbers in text as preparation reads them in text files."""

from __future__ import annotations

import functools
import math
import re

# The characters that DuckDB's trim() removes: the space separators of Unicode.
SPACES = " \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
WHITESPACE = " \t\n\v\f\r"  # around a number in text
GROUP_SPACES = " \u00a0\u202f"  # that group digits: the setting " " stands for each of them
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")

_COMMA_AS_POINT = str.maketrans(".,", "x.")


def number_of_text(text: str, decimal: str = ".", thousands: str = "") -> float | None:
  """Returns the number that a text holds, None for the empty text and for NaN; see `config.TextFormat`.

  Raises:
    ValueError: the text holds no finite number.
  """
  if not text:
    return None
  stripped = text.strip(SPACES)
  if thousands and _grouped(decimal, thousands).fullmatch(stripped):
    stripped = stripped.translate(dict.fromkeys(map(ord, GROUP_SPACES if thousands in GROUP_SPACES else thousands)))
  if decimal == ",":
    stripped = stripped.translate(_COMMA_AS_POINT)
  stripped = stripped.strip(WHITESPACE)
  if stripped.lower() == "nan":
    return None
  if not NUMBER.fullmatch(stripped) or not math.isfinite(number := float(stripped)):
    raise ValueError(text)
  return number


@functools.cache
def _grouped(decimal: str, thousands: str) -> re.Pattern[str]:
  group = f"[{GROUP_SPACES}]" if thousands in GROUP_SPACES else re.escape(thousands)
  return re.compile(rf"[+-]?\d{{1,3}}({group}\d{{3}})+({re.escape(decimal)}\d*)?([eE][+-]?\d+)?", re.ASCII)
