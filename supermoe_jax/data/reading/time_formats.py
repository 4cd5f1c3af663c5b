"""Guesses the strptime format of times that are written in another way than ISO 8601."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence

import duckdb

from supermoe_jax.config import format_time
from supermoe_jax.config.text_settings import setting_text
from supermoe_jax.data.reading.readers import literal

_DATES = (
  *("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%Y%m%d", "%d-%m-%Y", "%m-%d-%Y", "%Y.%m.%d", "%Y-%m-%d"),
  *("%d.%m.%y", "%d/%m/%y", "%m/%d/%y", "%d-%b-%Y", "%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", "T%H:%M:%S", " %H.%M", " %H.%M.%S")
TIME_FORMATS = (
  *(date + clock for date, clock in itertools.product(_DATES, _CLOCKS)),
  *("%Y%m%d%H%M%S", "%a %b %d %H:%M:%S %z %Y", "%d/%b/%Y:%H:%M:%S %z", "%a, %d %b %Y %H:%M:%S %Z"),
)
SAMPLE = 1000  # values that a format must fit


def fitting_formats(sample: Sequence[str]) -> list[str]:
  """Returns the formats that fit all texts of a sample, likeliest first."""

  def fits(format: str) -> bool:
    try:
      return all(1900 <= datetime.datetime.strptime(v, format).year < 2100 for v in sample)
    except ValueError:
      return False

  found = [f for f in TIME_FORMATS if fits(f)] if sample else []
  # A clock of twelve hours stands most often behind the month first.
  return sorted(found, key=lambda f: "%p" in f and f.startswith("%d/"))


def time_format_remedy(con: duckdb.DuckDBPyConnection, sample: Sequence[str], key: str) -> str:
  """Returns a sentence that names the `time_format` that reads all texts of a sample; empty if none is known.

  Args:
    con: a connection, which tries the format.
    sample: different texts, at least one.
    key: the place of the setting, as `setting_text` takes it.
  """
  formats = [f for f in fitting_formats(sample) if _meaning(con, sample[0], f) is not None]
  if not formats:
    return ""
  first, *others = formats
  other = f"; or {others[0]!r}, which reads it as {_meaning(con, sample[0], others[0])}" if others else ""
  setting, meaning = setting_text(key, "time_format", first), _meaning(con, sample[0], first)
  return f"Set {setting}, which reads {sample[0]!r} as {meaning}{other}."


def _meaning(con: duckdb.DuckDBPyConnection, text: str, format: str) -> str | None:
  query = f"SELECT epoch_us(try_strptime({literal(text)}, {literal(format)}))"
  ((time,),) = con.execute(query).fetchall()
  return None if time is None else format_time(time)
