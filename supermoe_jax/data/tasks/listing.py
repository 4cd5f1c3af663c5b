"""Formats lists of values for sentences and messages."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_VALUES = 20  # values of a vocabulary in a message about a value that it lacks


def listed(values: Sequence[str]) -> str:
  """Returns the first few values in words, such as "one of a, b, …"; a single value stands alone."""
  text = ", ".join(values[:4]) + (", …" if len(values) > 4 else "")
  return text if len(values) == 1 else f"one of {text}"


def where(condition: str) -> str:
  """Returns the clause that names the condition of a task's events; empty without a condition."""
  return f" among those where {condition}" if condition else ""
