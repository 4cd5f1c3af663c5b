"""Derives the snapshots and labels of dated labels again, row by row in plain Python."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import duckdb

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.data.check import raw_events
from supermoe_jax.data.encoding.numeric import Numeric
from supermoe_jax.data.encoding.vocabulary import Classes, LabelEncoder
from supermoe_jax.data.reading import readers, value_sql

TRAIN, VALIDATION, TEST = 0, 1, 2
YES_OR_NO = {"true": 1.0, "false": 0.0}


class DatedMoment(NamedTuple):
  """A snapshot of dated labels.

  Attributes:
    split: 0 for training, 1 for validation, 2 for test.
    labels: for each task with a label there, 0 or 1, the class as text, or the standardised number.
  """

  split: int
  labels: dict[str, Any]


def derive_dated_moments(
  con: duckdb.DuckDBPyConnection,
  cfg: config.Config,
  users: Sequence[str],
  until: tuple[int, int, int],
  encoders: Mapping[str, LabelEncoder],
) -> dict[str, dict[int, DatedMoment]]:
  """Returns, for each of the users, the snapshots of dated labels by time (µs), ascending.

  Args:
    con: a connection with the tables `events` and `chosen` of `raw_events.load_raw_events` for these users.
    cfg: the dataset's config.
    users: the users.
    until: for each split the end of its period (µs).
    encoders: the classes and statistics of the labels.
  """
  found: dict[str, dict[int, DatedMoment]] = {user: {} for user in users}
  tasks = {n: cast(config.DatedLabel, t) for n, t in cfg.labelled_tasks.items() if t.asks_at_rows}
  if not tasks:
    return found
  times: dict[str, list[int]] = {user: [] for user in users}
  for user, time in con.execute('SELECT "user", time FROM events').fetchall():
    times[user].append(time)
  for name, task in tasks.items():
    settled = set()
    for user, time, text, format in _raw_rows(con, name, task):
      if text is None:
        continue
      value, split = _value(task, text, format), _split_of(cfg.data.split, user, time, until)
      if value is None or split is None:
        continue
      if split != TEST and time + int(task.delay_days * MICROSECONDS_PER_DAY) > until[split]:
        continue
      if (user, time) in settled:  # the first row of the files counts
        continue
      settled.add((user, time))
      label = _encoded(value, encoders.get(name))
      if label is not None and sum(t < time for t in times[user]) >= cfg.data.split.min_events:
        found[user].setdefault(time, DatedMoment(split, {})).labels[name] = label
  return {user: dict(sorted(moments.items())) for user, moments in found.items()}


def _raw_rows(
  con: duckdb.DuckDBPyConnection, name: str, task: config.DatedLabel
) -> list[tuple[str, int, str | None, config.TextFormat]]:
  """Returns user, time, label and the format of its text for the chosen users' rows with a time, in their order."""
  rows: list[tuple[str, int, str | None, config.TextFormat]] = []
  for file in raw_events.raw_files(
    con, task.files, task.format, {task.user, task.time, task.column}, f"config.tasks.{name}", task
  ):
    key = f"config.tasks.{name}"
    time = value_sql.time_reading(con, file, task.time, "e.time", key, unit=task.time_unit, format=task.time_format)
    wanted = {"user": task.user, "time": task.time, "label": task.column}
    user, label = (value_sql.text_sql(f'e."{a}"', file.columns[wanted[a]]) for a in ("user", "label"))
    format = file.text if file.columns[task.column] == "VARCHAR" else PLAIN_TEXT
    with readers.naming(file.path, file.format):
      found = con.execute(
        f"SELECT {user} AS who, {time.sql} AS micros, {label} FROM ({file.select(wanted)}) e "
        'WHERE micros IS NOT NULL AND who IN (SELECT "user" FROM chosen) ORDER BY e.row'
      ).fetchall()
    rows += [(*row, format) for row in found]
  return rows


def _value(task: config.DatedLabel, text: str, format: config.TextFormat) -> Any:
  """Returns the label that a text of this format means: a number, or the text of a class; None if it is none."""
  if task.type == "multiclass":
    return text
  if task.positive:
    return float(text in task.positive)
  if task.type == "binary" and text.lower() in YES_OR_NO:
    return YES_OR_NO[text.lower()]
  try:
    number = float(text.replace(format.thousands, "").replace(format.decimal, "."))
  except ValueError:
    return None
  good = number in (0, 1) if task.type == "binary" else math.isfinite(number)
  return number if good else None


def _split_of(split: config.Split, user: str, time: int, until: tuple[int, int, int]) -> int | None:
  """Returns the split of a row; None outside the periods."""
  if time > until[TEST]:
    return None
  early = bool(split.train_start) and time < config.parse_time(split.train_start, "")
  if split.mode == "user":
    share = int.from_bytes(hashlib.md5(user.encode()).digest()[:8], "little") / 2**64
    owner = (
      TEST if share < split.user_test else VALIDATION if share < split.user_test + split.user_validation else TRAIN
    )
    return None if early else owner
  if time < config.parse_time(split.train_end, ""):
    return None if early else TRAIN
  if split.test and time >= min(config.parse_time(t, "") for t in split.test):
    return TEST
  gap = int(split.gap_days * MICROSECONDS_PER_DAY)
  inside = config.parse_time(split.train_end, "") + gap <= time < until[VALIDATION]
  return VALIDATION if inside else None


def _encoded(value: Any, encoder: LabelEncoder | None) -> Any:
  if isinstance(encoder, Classes):
    return value if value in encoder.values else None
  if isinstance(encoder, Numeric):
    return (value - encoder.mean) / encoder.std
  return value
