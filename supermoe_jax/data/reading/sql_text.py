"""Quotes names and texts for SQL, and shortens DuckDB's messages."""

from __future__ import annotations

import itertools


def literal(text: str) -> str:
  """Quotes a text for SQL."""
  return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
  """Quotes a column's name for SQL."""
  return '"' + name.replace('"', '""') + '"'


def first_line(error: Exception) -> str:
  """Returns DuckDB's message in one line, without the possible fixes that follow it."""
  fixes = ("Possible", "Try setting", "LINE ")
  said = itertools.takewhile(lambda line: not line.startswith(fixes), str(error).splitlines())
  return "; ".join(line.strip() for line in said if line.strip())[:400]
