"""Places the rows of tables of dated labels in the splits, and writes their labels for the making of records.

Everything is SQL over whole tables, so a table of many rows costs little next to the events. The result is a Parquet
file in the order of the users, from which any machine reads the rows of some users.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import duckdb
import numpy as np
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.encoding.numeric import Numeric
from supermoe_jax.data.encoding.splits import SPLITS, TEST, TRAIN, VALIDATION, user_hash, user_hash_sql, user_split_sql
from supermoe_jax.data.encoding.vocabulary import Classes, LabelEncoder
from supermoe_jax.data.reading import dated_table, readers
from supermoe_jax.data.reading.dated_table import DatedTable
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.data.tasks.labels import DatedRows
from supermoe_jax.errors import DataError

SHOWN_IDS = 3  # ids of each side in a message about tables without a common user
ROW_GROUP = 16_384  # rows; small, because a shard reads only the groups with its users

# Opens a reader of the users of a log, with a column `user`; may be opened several times.
OpenUsers = Callable[[], contextlib.AbstractContextManager[pa.RecordBatchReader]]


class DatedLabels:
  """The labels of all tables of dated labels, ready for the making of records; close it at the end.

  Attributes:
    encoders: the encoder of each task with classes or numbers.
    counts: for each task, the rows of its `files`, its `empty_files`, the `dropped` rows by reason, and the numbers of
      rows that give no label: `without_value`, `of_users_without_events`, `outside_periods`, `known_too_late`,
      `repeated` (at the user and time of an earlier row), `unseen_class`. `contradicting` of the repeated moments have
      rows with different labels. `placed` holds the number of labels in each split; a snapshot that sees too few events
      still leaves its label out.
  """

  def __init__(
    self,
    file: pathlib.Path,
    tasks: Sequence[str],
    encoders: Mapping[str, LabelEncoder] | None = None,
    counts: Mapping[str, Any] | None = None,
  ):
    """Opens a file that `write_dated_labels` wrote for `tasks`."""
    self.file, self.tasks = file, tuple(tasks)
    self.encoders, self.counts = dict(encoders or {}), dict(counts or {})
    self._con = readers.connect()

  def close(self) -> None:
    """Closes the file."""
    self._con.close()

  def of_users(self, users: Sequence[str]) -> DatedRows:
    """Returns the rows of users, which must be in the order of their hashes, as in a dataset."""
    asked = {"user": pa.array(users, pa.string()), "place": pa.array(range(len(users)), pa.int64())}
    self._con.register("asked", pa.table(asked))
    first, last = (readers.literal(user_hash(users[i])) for i in (0, -1))
    columns = ", ".join(f"v{i}" for i in range(len(self.tasks)))
    found = self._con.sql(
      f'SELECT place, time, split, {columns} FROM {_parquet(self.file)} JOIN asked USING ("user") '
      f"WHERE hash BETWEEN {first} AND {last} ORDER BY place, time"
    ).to_arrow_table()
    values = {
      name: found[f"v{i}"].to_numpy().astype(np.float64) for i, name in enumerate(self.tasks)
    }  # NULL becomes NaN
    return DatedRows(
      found["place"].to_numpy(), found["time"].to_numpy(), found["split"].to_numpy().astype(np.int32), values
    )


def dated_tasks(cfg: config.Config) -> dict[str, config.DatedLabel]:
  """Returns the tasks about dated labels, in the order of their names."""
  return {n: cast(config.DatedLabel, t) for n, t in cfg.labelled_tasks.items() if t.asks_at_rows}


def write_dated_labels(
  cfg: config.Config,
  users: OpenUsers,
  times: Calendar | None,
  file: pathlib.Path,
  encoders: Mapping[str, LabelEncoder] | None = None,
) -> DatedLabels | None:
  """Writes the labels of a config's tables of dated labels to `file`, and opens it; None if there is no such task.

  Args:
    cfg: the config.
    users: the users with events.
    times: the calendar, which config.resolve guarantees where there is such a task.
    file: the Parquet file to write: `hash` of the user, `user`, `time`, `split`, and `v0`, … with each task's label,
      NULL for none.
    encoders: the encoders of the labels; None: classes and statistics come from the rows for training.

  Raises:
    DataError: a table cannot be used, none of its rows is of a user with events, or no row is for training and classes
      or statistics are missing.
  """
  tasks = dated_tasks(cfg)
  if not tasks:
    return None
  assert times is not None
  con = readers.connect(memory=cfg.data.memory, spill=file.with_suffix(".spill"))
  try:
    writer = _Writer(con, cfg, tasks, times, encoders)
    counts = writer.write(users, file)
  finally:
    con.close()
  return DatedLabels(file, list(tasks), writer.encoders, counts)


class _Writer:
  """One run of `write_dated_labels`."""

  def __init__(
    self,
    con: duckdb.DuckDBPyConnection,
    cfg: config.Config,
    tasks: Mapping[str, config.DatedLabel],
    times: Calendar,
    encoders: Mapping[str, LabelEncoder] | None,
  ):
    self._con, self._cfg, self._tasks, self._times = con, cfg, tasks, times
    self._fit = encoders is None
    self.encoders = {n: e for n, e in (encoders or {}).items() if n in tasks}

  def write(self, users: OpenUsers, file: pathlib.Path) -> dict[str, Any]:
    """Writes the labels and returns the counts of each task."""
    dated_table.create_dated_rows(self._con)
    read = {
      name: dated_table.load_dated_rows(self._con, i, name, task, self._cfg.data.on_bad_rows)
      for i, (name, task) in enumerate(self._tasks.items())
    }
    with users() as batches:
      self._con.register("log_users", batches)
      self._con.execute(
        'CREATE TABLE with_events AS SELECT DISTINCT "user" FROM log_users SEMI JOIN dated_rows USING ("user")'
      )
      self._con.unregister("log_users")
    self._con.execute(
      f'CREATE TABLE placed AS SELECT r.*, w."user" IS NOT NULL AS has_events, {self._split_sql()} AS split '
      'FROM dated_rows r LEFT JOIN with_events w USING ("user")'
    )
    counts, parts = {}, []
    for i, (name, task) in enumerate(self._tasks.items()):
      counts[name] = self._place(i, name, task, read[name], users)
      columns = ", ".join(f"{'label' if i == j else 'NULL::DOUBLE'} AS v{j}" for j in range(len(self._tasks)))
      parts.append(f'SELECT "user", time, split, {columns} FROM labels_{i} WHERE label IS NOT NULL')
    values = ", ".join(f"max(v{i}) AS v{i}" for i in range(len(self._tasks)))
    self._con.execute(
      f'COPY (SELECT {user_hash_sql(chr(34) + "user" + chr(34))} AS hash, "user", time, split, {values} '
      f'FROM ({" UNION ALL ".join(parts)}) GROUP BY "user", time, split ORDER BY hash, "user", time) '
      f"TO {readers.literal(str(file))} (FORMAT parquet, ROW_GROUP_SIZE {ROW_GROUP})"
    )
    return counts

  def _split_sql(self) -> str:
    """Returns the SQL of the split of a row `r`; NULL outside the periods."""
    split, until = self._cfg.data.split, self._times.observed_until
    after_start = "true"
    if split.train_start:
      after_start = f"r.time >= {config.parse_time(split.train_start, 'config.data.split.train_start')}"
    if split.mode == "user":
      owner = user_split_sql('r."user"', split)
      return f"CASE WHEN {after_start} AND r.time <= {until[TEST]} THEN {owner} END"
    validation = until[TRAIN] + int(split.gap_days * MICROSECONDS_PER_DAY)
    tests = self._times.snapshots[self._times.split == TEST]
    of_test = "false" if not len(tests) else f"r.time >= {int(tests.min())} AND r.time <= {until[TEST]}"
    return (
      f"CASE WHEN r.time < {until[TRAIN]} THEN CASE WHEN {after_start} THEN {TRAIN} END "
      f"WHEN r.time >= {validation} AND r.time < {until[VALIDATION]} THEN {VALIDATION} "
      f"WHEN {of_test} THEN {TEST} END"
    )

  def _place(
    self, index: int, name: str, task: config.DatedLabel, read: DatedTable, users: OpenUsers
  ) -> dict[str, Any]:
    """Creates `labels_<index>` with a row for each user and time that has a label, and returns the task's counts."""
    until, delay = self._times.observed_until, int(task.delay_days * MICROSECONDS_PER_DAY)
    late = " OR ".join(f"(split = {s} AND time + {delay} > {until[s]})" for s in (TRAIN, VALIDATION))
    label = "value" if task.type == "multiclass" else "number"
    status = (
      f"CASE WHEN {label} IS NULL THEN 'without_value' WHEN NOT has_events THEN 'of_users_without_events' "
      f"WHEN split IS NULL THEN 'outside_periods' WHEN {late} THEN 'known_too_late' ELSE 'usable' END"
    )
    rows = self._con.execute(f"SELECT {status}, count(*) FROM placed WHERE task = {index} GROUP BY 1").fetchall()
    found = dict(rows)
    counts: dict[str, Any] = {"files": read.files, "empty_files": read.empty_files, "dropped": read.dropped}
    for reason in ("without_value", "of_users_without_events", "outside_periods", "known_too_late"):
      counts[reason] = found.get(reason, 0)
    self._check_join(index, name, task, users)
    self._con.execute(
      f'CREATE TABLE kept_{index} AS SELECT "user", time, any_value(split) AS split, '
      f"arg_min({label}, (file, row)) AS found, min({label}) <> max({label}) AS contradicts "
      f"FROM placed WHERE task = {index} AND {status} = 'usable' GROUP BY \"user\", time"
    )
    moments, contradicting = self._con.execute(f"SELECT count(*), count_if(contradicts) FROM kept_{index}").fetchall()[
      0
    ]
    counts |= {"repeated": found.get("usable", 0) - moments, "contradicting": contradicting}
    counts |= self._encode(index, name, task)
    placed = dict(
      self._con.execute(f"SELECT split, count(*) FROM labels_{index} WHERE label IS NOT NULL GROUP BY split").fetchall()
    )
    return counts | {"placed": {split: placed.get(i, 0) for split, i in SPLITS.items()}}

  def _check_join(self, index: int, name: str, task: config.DatedLabel, users: OpenUsers) -> None:
    """Raises DataError if no row of the task is of a user with events, although there are rows."""
    of_task = f"FROM placed WHERE task = {index}"
    ((rows, common),) = self._con.execute(f"SELECT count(*), count_if(has_events) {of_task}").fetchall()
    if common or not rows:
      return
    theirs = [
      u for (u,) in self._con.execute(f'SELECT "user" {of_task} ORDER BY file, row LIMIT {SHOWN_IDS}').fetchall()
    ]
    with users() as batches:
      ours = next(iter(batches))["user"].to_pylist()[:SHOWN_IDS]
    shown = [", ".join(map(repr, ids)) for ids in (theirs, ours)]
    raise DataError(
      f"config.tasks.{name}: none of the {rows:,} rows is of a user with events: column {task.user!r} holds "
      f"{shown[0]}, …; the log's users are {shown[1]}, …. Name the column with the log's ids in "
      f"config.tasks.{name}.user, or write the ids as the log does."
    )

  def _encode(self, index: int, name: str, task: config.DatedLabel) -> dict[str, Any]:
    """Creates `labels_<index>` from `kept_<index>`; returns the counts of classes or the statistics."""
    if task.type == "multiclass":
      return self._encode_classes(index, name, task)
    label, counts = "found", {}
    if task.type == "regression":
      if self._fit:
        self.encoders[name] = self._statistics(index, name, task)
      encoder = self.encoders[name]
      assert isinstance(encoder, Numeric)
      label, counts = f"(found - {encoder.mean!r}) / {encoder.std!r}", {"mean": encoder.mean, "std": encoder.std}
    self._con.execute(f'CREATE TABLE labels_{index} AS SELECT "user", time, split, {label} AS label FROM kept_{index}')
    return counts

  def _statistics(self, index: int, name: str, task: config.DatedLabel) -> Numeric:
    # In one order, so that the sums are the same in every run.
    of_training = self._con.execute(f"SELECT found FROM kept_{index} WHERE split = {TRAIN} ORDER BY found").fetchnumpy()
    numbers = np.asarray(of_training["found"], np.float64)
    if not len(numbers):
      raise self._no_training_row(index, name, task)
    return Numeric.of(numbers.mean(), numbers.std())

  def _encode_classes(self, index: int, name: str, task: config.DatedLabel) -> dict[str, Any]:
    if self._fit:
      counted = self._con.execute(
        f"SELECT found, count(*) AS n FROM kept_{index} WHERE split = {TRAIN} GROUP BY found ORDER BY n DESC, found"
      ).fetchall()
      if not counted:
        raise self._no_training_row(index, name, task)
      self.encoders[name] = Classes(tuple(v for v, _ in counted), tuple(n for _, n in counted))
    encoder = self.encoders[name]
    assert isinstance(encoder, Classes)
    classes = {
      "value": pa.array(encoder.values, pa.string()),
      "label": pa.array(range(len(encoder.values)), pa.float64()),
    }
    self._con.register("classes", pa.table(classes))
    self._con.execute(
      f'CREATE TABLE labels_{index} AS SELECT "user", time, split, c.label FROM kept_{index} k '
      "LEFT JOIN classes c ON k.found = c.value"
    )
    self._con.unregister("classes")
    ((unseen,),) = self._con.execute(f"SELECT count_if(label IS NULL) FROM labels_{index}").fetchall()
    return {"unseen_class": unseen}

  def _no_training_row(self, index: int, name: str, task: config.DatedLabel) -> DataError:
    first, last = self._con.execute(f"SELECT min(time), max(time) FROM placed WHERE task = {index}").fetchall()[0]
    between = f"between {config.format_time(first)} and {config.format_time(last)}" if first is not None else "at all"
    return DataError(
      f"config.tasks.{name}: no row of a user with events has a value in column {task.column!r} that may be used in "
      f"training (rows lie {between}); correct config.data.split or the table's times, or lower "
      f"config.tasks.{name}.delay_days."
    )


def _parquet(file: pathlib.Path) -> str:
  return f"read_parquet({readers.literal(str(file))})"
