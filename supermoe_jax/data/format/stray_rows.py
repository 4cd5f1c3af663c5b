"""Describes the stray rows of a log in its manifest: rows so far from all others that they stretch the log's range."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class StrayRow:
  """A row of an event file, numbered from 1, with its time in microseconds since 1970 UTC."""

  file: str
  row: int
  time: int


@dataclasses.dataclass(frozen=True)
class StrayTimes:
  """The stray rows of a log.

  Attributes:
    first: the first usual event's time, microseconds since 1970 UTC.
    last: the last usual event's time.
    before: the number of events before all usual ones.
    after: the number of events after them.
    rows: the first stray rows of each side, in the order of their times.
  """

  first: int
  last: int
  before: int
  after: int
  rows: tuple[StrayRow, ...]

  @classmethod
  def from_json(cls, saved: Mapping[str, Any]) -> StrayTimes:
    """Returns the stray times that `dataclasses.asdict` turned into `saved`, by way of JSON."""
    return cls(**{**saved, "rows": tuple(StrayRow(**row) for row in saved["rows"])})
