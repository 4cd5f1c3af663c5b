"""Finds stray times: a few rows so far from all others that they stretch the log's range, such as a year mistyped.

A log counts as observed from its first to its last event. One row of 2027 in a log of 2024 would make three years
observed, and every user a churned one. So the range of the usual events counts instead, unless the config sets
`split.log_end` and `split.train_start`. Stray rows stay in the histories of their users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY, format_time
from supermoe_jax.data.format.stray_rows import StrayRow, StrayTimes

if TYPE_CHECKING:
  from supermoe_jax.data.preparation.log_database import LogDatabase

# Stray rows on one side are at most this share of all rows. A log of fewer than 100 rows thus has none.
FEW = 0.01
# The days without an event between stray rows and the others: more than this multiple of the longest such stretch among
# the others, and more than this share of their span. So neither a pause that the log knows already makes a row stray,
# nor a day that is appended some weeks after the log of months.
UNLIKE_OTHERS, STRETCH = 10, 0.5
# And more than this number of days, since a log of hours may well go on the week after.
LEAST_DAYS = 10

SHOWN_ROWS = 3

# For the end before and after the usual events: the key of the split that sets it.
KEYS = {"before": "train_start", "after": "log_end"}


def usual_days(days: Mapping[int, int]) -> tuple[int, int]:
  """Returns the first and the last day of the usual events.

  `days` has the number of events of each day with any, by the number of days since 1970.
  """
  day = np.array(sorted(days), np.int64)
  count = np.array([days[d] for d in day.tolist()], np.int64)
  few = int(count.sum() * FEW)
  # The days without which more than `few` events would be missing on either side are usual at any rate.
  low = int(np.searchsorted(np.cumsum(count), few, side="right"))
  high = len(day) - 1 - int(np.searchsorted(np.cumsum(count[::-1]), few, side="right"))
  if not few or low > high:
    return int(day[0]), int(day[-1])
  gaps = np.diff(day)
  longest = int(gaps[low:high].max(initial=1))
  least = max(UNLIKE_OTHERS * longest, STRETCH * float(day[high] - day[low] + 1), LEAST_DAYS)
  while low > 0 and gaps[low - 1] <= least:
    low -= 1
  while high < len(day) - 1 and gaps[high] <= least:
    high += 1
  return int(day[low]), int(day[high])


def find_stray_times(
  days: Mapping[int, int],
  ends: Sequence[tuple[int, int]],
  log: LogDatabase,
  known: Sequence[StrayRow] = (),
) -> StrayTimes | None:
  """Returns the stray times of a log whose events lie in `log` and, for an append, in an earlier dataset.

  Args:
    days: the number of events of each day, in all; empty if an earlier version did not count them.
    ends: times of first and last events of parts of the log, microseconds since 1970 UTC.
    log: the events to search for stray rows.
    known: stray rows of the earlier dataset.

  Returns: None if there are none.
  """
  if not days:
    return None
  first, last = usual_days(days)
  before, after = (sum(n for day, n in days.items() if outside(day)) for outside in (first.__gt__, last.__lt__))
  if not before and not after:
    return None
  start, stop = first * MICROSECONDS_PER_DAY, (last + 1) * MICROSECONDS_PER_DAY
  ((low, high),) = log.query(
    f"SELECT min(time), max(time) FROM {log.events_sql} WHERE time >= {start} AND time < {stop}"
  )
  inside = [time for pair in (*ends, (low, high)) for time in pair if time is not None and start <= time < stop]
  found = [row for row in known if not start <= row.time < stop]
  for side, order in ((f"time < {start}", ""), (f"time >= {stop}", "DESC")):
    rows = log.query(
      f"SELECT time, ord FROM {log.events_sql} WHERE {side} ORDER BY time {order}, ord LIMIT {SHOWN_ROWS}"
    )
    found += [StrayRow(*log.place(place), time) for time, place in rows]
  found.sort(key=lambda row: (row.time, row.file, row.row))
  early, late = [r for r in found if r.time < start][:SHOWN_ROWS], [r for r in found if r.time >= stop][-SHOWN_ROWS:]
  return StrayTimes(min(inside), max(inside), before, after, (*early, *late))


def describe_stray_times(found: StrayTimes, split: config.Split, events: int) -> Iterator[tuple[str, bool]]:
  """Yields a sentence for each side with stray rows, and whether the config leaves that end of the log open."""
  for side, count in (("before", found.before), ("after", found.after)):
    if not count:
      continue
    key, late = KEYS[side], side == "after"
    rows = [row for row in found.rows if (row.time > found.last) == late]
    shown = "; ".join(f"{row.file} row {row.row:,} ({format_time(row.time)})" for row in rows)
    end = format_time(found.last if late else found.first)
    text = (
      f"{count:,} of {events:,} events {'lies' if count == 1 else 'lie'} far {side} all others, which "
      f"{'end' if late else 'begin'} at {end}" + (f": {shown}" + (", …" if count > len(rows) else "") if shown else "")
    )
    if split.mode == "leave_one_out":
      yield f"{text}. Correct the rows if their times are wrong", True
    elif given := getattr(split, key):
      yield f"{text}. config.data.split.{key}={given} says what counts as observed", False
    else:
      means = (
        "The log counts as complete up to there only: labels that look further are unknown"
        if late
        else "No training snapshot lies earlier"
      )
      yield f"{text}. {means}. Correct the rows, or set config.data.split.{key} to count their stretch too", True
