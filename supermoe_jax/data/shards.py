"""Shards of a dataset: the events of some users become records in a file, in as many processes as there are cores.

A shard is written under another name and renamed when it is whole; then a note beside it says what it holds. A
preparation that was cut finds by these notes which shards it need not make again.

Files: `event_log/1.0.0/event_log-users.array_record-00000-of-00012`, ArrayRecord, as TensorFlow Datasets names them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
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
from array_record.python.array_record_module import ArrayRecordWriter

from supermoe_jax import config
from supermoe_jax.atomic_files import replacing_file
from supermoe_jax.data import records, snapshots
from supermoe_jax.data.histories import UserBlock, read_block
from supermoe_jax.data.labels import Calendar, Snapshots
from supermoe_jax.data.schema import make_aggregator, make_schema
from supermoe_jax.data.splits import TEST, TRAIN, user_split
from supermoe_jax.data.tally import Tally
from supermoe_jax.data.vocabulary import Encoders

TFDS_NAME, TFDS_VERSION, TFDS_SPLIT = "event_log", "1.0.0", "users"
DIRECTORY = f"{TFDS_NAME}/{TFDS_VERSION}"  # of the shards, in that of the dataset

SHARD_EVENTS = 250_000  # of which there are as many shards as this gives
MOST_SHARDS = 4096

SNAPSHOT_NUMBERS = 256  # labels and aggregates of snapshots that take as much memory as a block may for an event

# Each record is compressed alone, for records are read in any order.
WRITER_OPTIONS = "group_size:1,snappy"


class RecordMaker:
  """Makes the records of blocks of users, and counts them. Small enough to be sent to other processes."""

  def __init__(self, cfg: config.Config, encoders: Encoders, times: Calendar | None):
    """`times` is None for leave one out.

    Raises:
      DataError: a positive value of an event label is not in the field's vocabulary.
    """
    self.schema = make_schema(cfg, encoders)
    self.tasks = cfg.labelled_tasks
    self.parts = records.parts(self.schema, self.tasks)
    self.n_codes = len(self.schema.categorical) + len(self.schema.extra_columns)
    self.numbers = list(encoders.numeric.values())
    self._split, self._times = cfg.data.split, times
    self._labeller = records.Labeller(cfg, encoders, times)
    self._aggregator = make_aggregator(cfg.data, encoders)
    self._last_use = _last_use(self.tasks, times)
    # Of all users of a block labels and aggregates are worked out together: wide ones want fewer users.
    width = (sum(map(self._asked, self.tasks)) + self.schema.aggregates) / SNAPSHOT_NUMBERS
    own = times is None or cfg.data.split.snapshots != "calendar"
    self._event, self._user = max(1.0, width if own else 0.0), 0.0 if times is None else len(times.snapshots) * width

  def _asked(self, name: str) -> int:
    """How many labels of a task a snapshot has."""
    task = self.tasks[name]
    if isinstance(task, config.EventLabel):
      return task.per_snapshot
    return task.top if isinstance(task, config.FutureValues) else 1

  def tally(self) -> Tally:
    """One that has counted nothing yet."""
    return Tally(self.schema, self.tasks)

  def __call__(self, users: UserBlock, user_labels: Mapping[str, np.ndarray], tally: Tally) -> Iterator[bytes]:
    """Yields the record of each user, in order; `user_labels [U]` of each such task are NaN where unknown."""
    for made in self._made(users, user_labels, tally):
      yield from records.encode(*made, self.parts)

  def count(self, users: UserBlock, user_labels: Mapping[str, np.ndarray], tally: Tally) -> None:
    """Counts the users as if their records were made."""
    for _ in self._made(users, user_labels, tally):
      pass

  def _made(
    self, users: UserBlock, user_labels: Mapping[str, np.ndarray], tally: Tally
  ) -> Iterator[tuple[UserBlock, Snapshots, dict[str, records.TaskLabels], np.ndarray]]:
    """Yields some of the users at a time, with their snapshots, labels and splits."""
    done = 0
    for block in users.halves(self._event, self._user):
      n = len(block.users)
      yield self._make(block, {name: values[done : done + n] for name, values in user_labels.items()}, tally)
      done += n

  def _make(
    self, block: UserBlock, user_labels: Mapping[str, np.ndarray], tally: Tally
  ) -> tuple[UserBlock, Snapshots, dict[str, records.TaskLabels], np.ndarray]:
    owner = np.array([user_split(user, self._split) for user in block.users], np.int32)
    found, left_out = snapshots.user_snapshots(self._split, block, self._times, owner)
    labels = self._labeller(block, found, owner, user_labels)
    tally.add(block, found, {n: of_task.labels for n, of_task in labels.items()}, left_out, self._last_use)
    if self._aggregator is not None:
      user, time, n_events, split = found
      train = split == TRAIN
      aggregates = self._aggregator(block, user[train], time[train], n_events[train])
      tally.add_aggregates(aggregates, user[train])
    return block, found, labels, owner


def _last_use(tasks: Mapping[str, config.LabelledTask], times: Calendar | None) -> int | None:
  """The microsecond from which on events lie in no label window and before no snapshot; None: there is none."""
  if times is None or any(isinstance(t, config.AT_EVENTS) for t in tasks.values()):
    return None
  horizons = [t.horizon_days for t in tasks.values() if isinstance(t, config.FutureEvent | config.FutureValues)]
  # Where all snapshots are the users' own, any event of the log may lie before one.
  last = times.snapshots[-1] if len(times.snapshots) else times.observed_until[TEST]
  return int(last) + int(max(horizons, default=0) * config.MICROSECONDS_PER_DAY)


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of records.

  Attributes:
    file: its name.
    users: how many records it has.
    bytes: how many bytes they have before compression.
    tally: the state of their `Tally`.
  """

  file: str
  users: int
  bytes: int
  tally: Mapping[str, Any]

  @property
  def events(self) -> int:
    """How many events its users have."""
    return sum(int(n) * count for n, count in self.tally["lengths"].items())


@dataclasses.dataclass(frozen=True)
class Rows:
  """What a shard is made from; see `EventLog.shards`.

  Attributes:
    users: the ids of U users.
    rows: their sorted events.
    labels: float64 `[U]` of each user label, NaN unknown.
  """

  users: Sequence[str]
  rows: pa.Table
  labels: Mapping[str, np.ndarray]


def count_shards(events: int, users: int) -> int:
  """How many shards a dataset gets; it depends on the data alone."""
  return max(1, min(-(-events // SHARD_EVENTS), MOST_SHARDS, users))


def shard_name(index: int, count: int, split: str = TFDS_SPLIT) -> str:
  """The file of a shard, as TensorFlow Datasets names it."""
  return f"{TFDS_NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


class ShardFile:
  """A file of records that is being written.

  Attributes:
    records: how many it has.
    bytes: how many bytes they have before compression.
  """

  def __init__(self, writer: ArrayRecordWriter):
    self._writer = writer
    self.records = self.bytes = 0

  def write(self, records: Iterable[bytes]) -> None:
    """Appends records."""
    for record in records:
      self._writer.write(record)
      self.records, self.bytes = self.records + 1, self.bytes + len(record)


@contextlib.contextmanager
def writing(file: pathlib.Path) -> Iterator[ShardFile]:
  """Gives a file of records to be written, which has its name when the block ends without an error."""
  with replacing_file(file) as part:
    writer = ArrayRecordWriter(str(part), WRITER_OPTIONS)
    try:
      yield ShardFile(writer)
    finally:
      writer.close()


def write(maker: RecordMaker, file: pathlib.Path, rows: Rows) -> Shard:
  """Writes a shard and its note."""
  tally = maker.tally()
  block = read_block(rows.rows, rows.users, maker.n_codes, maker.numbers)
  with writing(file) as out:
    out.write(maker(block, rows.labels, tally))
  shard = Shard(file.name, out.records, out.bytes, tally.state)
  with replacing_file(_note(file)) as part:
    part.write_text(json.dumps(dataclasses.asdict(shard)))
  return shard


def move(file: pathlib.Path, directory: pathlib.Path) -> None:
  """Moves a shard and its note into a directory of the same file system."""
  for moved in (file, _note(file)):  # a note stands beside a whole shard only
    moved.replace(directory / moved.name)


def finished(directory: pathlib.Path, count: int) -> dict[int, Shard]:
  """The shards of `count` that an earlier preparation finished in the directory, by their index."""
  out = {}
  for index in range(count):
    file = directory / shard_name(index, count)
    if file.is_file() and _note(file).is_file():
      out[index] = Shard(**json.loads(_note(file).read_text()))
  return out


def write_info(directory: pathlib.Path, maker: RecordMaker, splits: Mapping[str, tuple[Sequence[int], int]]) -> None:
  """Writes what TensorFlow Datasets needs to read the shards: `dataset_info.json` and `features.json`.

  Args:
    directory: of the shards.
    maker: of their records.
    splits: of each split how many records each of its shards has, and their bytes before compression.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info, naming

  features = records.features(maker.parts)
  version = tfds.core.Version(TFDS_VERSION)
  identity = dataset_info.DatasetIdentity(TFDS_NAME, version, str(directory), module_name=records.__name__)
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  info.set_file_format("array_record")
  infos = []
  for name, (lengths, size) in splits.items():
    template = naming.ShardedFileTemplate(
      data_dir=directory,
      dataset_name=TFDS_NAME,
      split=name,
      filetype_suffix="array_record",
      template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    infos.append(
      tfds.core.SplitInfo(name=name, shard_lengths=list(lengths), num_bytes=size, filename_template=template)
    )
  info.set_splits(tfds.core.splits.SplitDict(infos))
  info.write_to_directory(directory)


def read_info(directory: pathlib.Path) -> dict[str, tuple[list[int], int]]:
  """The splits that `write_info` named in a directory."""
  info = json.loads((directory / "dataset_info.json").read_text())
  return {s["name"]: ([int(n) for n in s["shardLengths"]], int(s["numBytes"])) for s in info["splits"]}


def remove_notes(directory: pathlib.Path) -> None:
  """Removes what only an unfinished preparation needs."""
  for file in directory.glob("*.note"):
    file.unlink()


def _note(file: pathlib.Path) -> pathlib.Path:
  return file.with_name(file.name + ".note")


# ------------------------------------------------------------------------------------------------------------ processes


def processes(count: int) -> int:
  """How many processes write `count` shards: one a core that this process may use."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(cores, count)


class Writers:
  """Processes that write shards, or this process where one is enough; use it as a context manager."""

  def __init__(self, count: int):
    """Starts them, for `count` shards; they get ready while the rows are sorted."""
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None
    self._most = processes(count)
    if self._most > 1:
      # Not forked: threads of DuckDB and JAX do not live on in a fork.
      context = multiprocessing.get_context("spawn")
      self._pool = concurrent.futures.ProcessPoolExecutor(self._most, context, _begin)
      for _ in range(self._most):
        self._pool.submit(os.getpid)

  def __enter__(self) -> Writers:
    return self

  def __exit__(self, *exception: object) -> None:
    if self._pool is not None:
      self._pool.shutdown(wait=True, cancel_futures=True)

  def run(self, write: Callable[[Any], Shard], tasks: Iterable[Any]) -> Iterator[Shard]:
    """Yields what `write` returns of every task, as they end; takes a new task only when a process is free for it."""
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
  """In each process that writes: it ends with the one that started it, which alone minds interrupts."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)  # it was killed; else a shard would be written beside the next command's, and the process stay for ever
