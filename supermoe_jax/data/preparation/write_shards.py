"""Writes a dataset's shards: turns the events of some users into records, with a process per core."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.atomic_files import replacing_file
from supermoe_jax.data.encoding.histories import UserBlock, read_block
from supermoe_jax.data.encoding.splits import TEST, TRAIN, user_split
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.format import records
from supermoe_jax.data.format.schema import make_aggregator, make_schema
from supermoe_jax.data.format.shard_files import Shard, note_file, writing_shard
from supermoe_jax.data.preparation import snapshots
from supermoe_jax.data.preparation.record_counts import RecordCounts
from supermoe_jax.data.tasks import bind
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.data.tasks.labels import DatedRows, LabelInputs, Snapshots, TaskLabels, without_labels

SNAPSHOT_NUMBERS = 256  # numbers of labels and aggregates that take the memory of one event


class RecordMaker:
  """A maker of the records of blocks of users, which also counts them; small enough to send to other processes."""

  def __init__(self, cfg: config.Config, encoders: Encoders, times: Calendar | None):
    """Prepares making records; `times` is None for leave one out.

    Raises:
      DataError: a positive value of an event label is not in the field's vocabulary.
    """
    self.schema = make_schema(cfg, encoders)
    self.tasks = cfg.labelled_tasks
    self.parts = records.record_arrays(self.schema, self.tasks)
    self.n_codes = len(self.schema.categorical) + len(self.schema.extra_columns)
    self.numbers = list(encoders.numeric.values())
    self._split, self._times = cfg.data.split, times
    self._kinds = bind(self.tasks, cfg.data, encoders)
    self._aggregator = make_aggregator(cfg.data, encoders)
    self._last_use = _last_use(self.tasks, times)
    # Labels and aggregates of all users of a block are computed together: if they are wide, a block needs fewer users.
    labels = sum(task.asked_events * task.asked_values for task in self.tasks.values())
    self._width = width = (labels + self.schema.aggregates) / SNAPSHOT_NUMBERS
    own = times is None or cfg.data.split.snapshots != "calendar"
    # An event's part of the factors of a field is there four times while they are summed.
    factors = (
      4 * max((of.factors.sums for of in self._aggregator.factors.values()), default=0) if self._aggregator else 0
    )
    self._event = max(1.0, width if own else 0.0, factors / SNAPSHOT_NUMBERS)
    self._user = 0.0 if times is None else len(times.snapshots) * width

  def new_counts(self) -> RecordCounts:
    """Returns counts that have counted nothing yet."""
    return RecordCounts(self.schema, self.tasks)

  def __call__(
    self, users: UserBlock, user_labels: Mapping[str, np.ndarray], tally: RecordCounts, dated: DatedRows | None = None
  ) -> Iterator[bytes]:
    """Yields the record of each user, in order, and counts the users.

    Args:
      users: the histories of the users.
      user_labels: for each task about the table of users, float64 `[U]`; NaN where unknown.
      tally: the counts that the users are added to.
      dated: the users' rows of tables of dated labels; None if no task has such a table.
    """
    for made in self._made(users, user_labels, tally, dated):
      yield from records.encode_records(*made, self.parts)

  def count(
    self, users: UserBlock, user_labels: Mapping[str, np.ndarray], tally: RecordCounts, dated: DatedRows | None = None
  ) -> None:
    """Counts the users without making their records."""
    for _ in self._made(users, user_labels, tally, dated):
      pass

  def _made(
    self, users: UserBlock, user_labels: Mapping[str, np.ndarray], tally: RecordCounts, dated: DatedRows | None
  ) -> Iterator[tuple[UserBlock, Snapshots, dict[str, TaskLabels], np.ndarray]]:
    """Yields some of the users at a time, with their snapshots, labels and splits."""
    done = 0
    of_rows = 0.0 if dated is None else self._width * len(dated.time) / max(len(users.users), 1)
    for block in users.halves(self._event, self._user + of_rows):
      n = len(block.users)
      of_block = {name: values[done : done + n] for name, values in user_labels.items()}
      yield self._make(block, of_block, tally, None if dated is None else dated.between(done, done + n))
      done += n

  def _make(
    self, block: UserBlock, user_labels: Mapping[str, np.ndarray], tally: RecordCounts, dated: DatedRows | None
  ) -> tuple[UserBlock, Snapshots, dict[str, TaskLabels], np.ndarray]:
    owner = np.array([user_split(user, self._split) for user in block.users], np.int32)
    found, left_out = snapshots.user_snapshots(self._split, block, self._times, owner)
    dated_labels: dict[str, np.ndarray] = {}
    row = np.full(len(found.time), -1, np.int64)
    if dated is not None:
      found, row, too_early = snapshots.with_dated_rows(found, block, dated, self._split.min_events)
      left_out = left_out._replace(too_early=left_out.too_early + too_early)
      dated_labels = {n: np.append(values, np.nan)[row] for n, values in dated.values.items()}
    inputs = LabelInputs(block, found, self._times, owner, user_labels, dated_labels)
    labels = {name: kind.label(inputs) for name, kind in self._kinds.items()}
    if (row >= 0).any():  # the snapshot of a dated label is none of another task
      labels = {
        n: of_task if self.tasks[n].asks_at_rows else without_labels(of_task, row >= 0) for n, of_task in labels.items()
      }
    tally.add(block, found, {n: of_task.labels for n, of_task in labels.items()}, left_out, self._last_use)
    if self._aggregator is not None:
      user, time, n_events, split = found
      train = split == TRAIN
      aggregates = self._aggregator(block, user[train], time[train], n_events[train])
      tally.add_aggregates(aggregates, user[train])
    return block, found, labels, owner


def _last_use(tasks: Mapping[str, config.LabelledTask], times: Calendar | None) -> int | None:
  """Returns the microsecond from which events lie in no label window and before no snapshot; None if there is none."""
  if times is None or any(t.asks_at_events for t in tasks.values()):
    return None
  horizons = [t.horizon for t in tasks.values() if t.horizon is not None]
  # Where all snapshots are the users' own, any event of the log may lie before a snapshot.
  last = times.snapshots[-1] if len(times.snapshots) else times.observed_until[TEST]
  end = int(last) + int(max(horizons, default=0) * config.MICROSECONDS_PER_DAY)
  # A dated label may lie at the end of the log.
  return max(end, times.observed_until[TEST]) if any(t.asks_at_rows for t in tasks.values()) else end


@dataclasses.dataclass(frozen=True)
class ShardRows:
  """The input of a shard; see `EventLog.shards`.

  Attributes:
    users: the ids of U users.
    rows: their sorted events.
    labels: for each user label, float64 `[U]`; NaN where unknown.
    dated: the users' rows of tables of dated labels; None if no task has such a table.
  """

  users: Sequence[str]
  rows: pa.Table
  labels: Mapping[str, np.ndarray]
  dated: DatedRows | None = None


def write_shard(maker: RecordMaker, file: pathlib.Path, rows: ShardRows) -> Shard:
  """Writes a shard and its note, and returns the shard."""
  tally = maker.new_counts()
  block = read_block(rows.rows, rows.users, maker.n_codes, maker.numbers)
  with writing_shard(file) as out:
    out.write(maker(block, rows.labels, tally, rows.dated))
  shard = Shard(file.name, out.records, out.bytes, tally.state)
  with replacing_file(note_file(file)) as part:
    part.write_text(json.dumps(dataclasses.asdict(shard)))
  return shard


# ------------------------------------------------------------------------------------------------------------ processes


def count_writers(count: int) -> int:
  """Returns the number of processes that write `count` shards: one per core that this process may use."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(cores, count)


class ShardWriters:
  """Processes that write shards, or this process where one is enough; use it as a context manager."""

  def __init__(self, count: int):
    """Starts the processes for `count` shards; they start up while the rows are sorted."""
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None
    self._most = count_writers(count)
    if self._most > 1:
      # Not forked, because threads of DuckDB and JAX do not survive a fork.
      context = multiprocessing.get_context("spawn")
      self._pool = concurrent.futures.ProcessPoolExecutor(self._most, context, _begin)
      for _ in range(self._most):
        self._pool.submit(os.getpid)

  def __enter__(self) -> ShardWriters:
    return self

  def __exit__(self, *exception: object) -> None:
    if self._pool is not None:
      self._pool.shutdown(wait=True, cancel_futures=True)

  def run(self, write: Callable[[Any], Shard], tasks: Iterable[Any]) -> Iterator[Shard]:
    """Yields the result of `write` for every task as they end; takes a new task only when a process is free for it."""
    if self._pool is None:
      yield from map(write, tasks)
      return
    running: set[concurrent.futures.Future[Shard]] = set()
    for task in tasks:
      running.add(self._pool.submit(write, task))
      if len(running) > self._most:
        ended, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        yield from (future.result() for future in ended)
    for future in concurrent.futures.as_completed(running):
      yield future.result()


def _begin() -> None:
  """Makes a writing process end with its parent and ignore interrupts, which only the parent handles."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)  # the parent was killed; this process would write next to the next command's, and stay for ever
