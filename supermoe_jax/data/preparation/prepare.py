"""Prepares a dataset directory from event files.

Everything is written into a directory with a temporary name, the manifest last, and then renamed. So a directory under
the dataset's own name is whole, and an interrupted run leaves the earlier dataset untouched. Its finished work stays
under the temporary name, and the same command goes on from there.
"""

from __future__ import annotations

import concurrent.futures.process
import errno
import functools
import json
import logging
import pathlib
import shutil
import time as clock
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from supermoe_jax import atomic_files, config
from supermoe_jax.data.dataset.dataset import FORMAT_VERSION, USERS, Dataset, input_files
from supermoe_jax.data.encoding import vocabulary
from supermoe_jax.data.format import integrity, shard_files
from supermoe_jax.data.format.schema import make_comparison
from supermoe_jax.data.format.shard_files import Shard
from supermoe_jax.data.preparation import (
  dated_labels,
  fitting,
  null_word_counts,
  outlying_numbers,
  stray_times,
  write_shards,
)
from supermoe_jax.data.preparation import manifest as manifest_lib
from supermoe_jax.data.preparation.dated_labels import DatedLabels
from supermoe_jax.data.preparation.event_log import EventLog
from supermoe_jax.data.preparation.log_database import LogDatabase
from supermoe_jax.data.preparation.outlying_numbers import OutlyingNumbers
from supermoe_jax.data.preparation.write_shards import RecordMaker, ShardRows, ShardWriters
from supermoe_jax.data.reading import user_table
from supermoe_jax.data.tasks import bind, calendar
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.errors import DataError
from supermoe_jax.progress import ProgressBar

logger = logging.getLogger(__name__)

SHOWN_USERS = 3  # ids of each side of a join that finds nobody
STATE = "preparation.json"  # in an unfinished directory: the identity of the preparation


class PreparationPlan(NamedTuple):
  """The parts of a preparation from which an engine makes records.

  Attributes:
    cfg: the config of the run.
    encoders: the encoders of the events' fields and of the labels.
    encoder_path: the directory of the saved encoders.
    times: the calendar; None for leave one out.
    maker: the maker of the records.
    user_labels: for each task, the labels of users by id.
    dated: the rows of tables of dated labels; None if no task has such a table.
  """

  cfg: config.Config
  encoders: vocabulary.Encoders
  encoder_path: pathlib.Path
  times: Calendar | None
  maker: RecordMaker
  user_labels: Mapping[str, Mapping[str, float]]
  dated: DatedLabels | None


class Engine(Protocol):
  """A reader of logs and writer of records; all engines make the same dataset, apart from the boundaries of shards.

  Attributes:
    name: its name; an engine does not go on with the work of another.
  """

  name: str

  def open(self, cfg: config.Config, scratch: pathlib.Path) -> LogDatabase:
    """Reads the log, or finds that it was read already; work files go to `scratch`."""

  def write(self, log: LogDatabase, plan: PreparationPlan, directory: pathlib.Path) -> list[Shard]:
    """Writes the missing shards, and returns all shards in order; `log` is the result of `open`."""


def prepare(cfg: config.Config, *, overwrite: bool = False, engine: Engine | None = None) -> dict[str, Any]:
  """Prepares the dataset at `cfg.data.path` and returns its manifest; keeps a dataset prepared from the same config.

  A preparation that the user, the machine or a full disk interrupted goes on where it stopped: it repeats neither the
  reading nor the finished shards. `engine` does the work; None stands for this machine.

  Raises:
    DataError: the data cannot be used, the disk is full, or another dataset has this path.
    ConfigError: the split does not fit the log.
  """
  path, engine = pathlib.Path(cfg.data.path), engine or ThisMachine()
  atomic_files.restore(path, manifest_lib.KIND)
  there = path.is_dir() and any(path.iterdir())
  if there and not overwrite and atomic_files.manifest_kind(path) == manifest_lib.KIND:
    return _existing(cfg, path)
  atomic_files.check_replaceable(path, manifest_lib.KIND, ("manifest.json", "encoders", USERS, shard_files.TFDS_NAME))
  identity = {"format": FORMAT_VERSION, "data_hash": cfg.data_hash(), "files": input_files(cfg), "by": engine.name}
  identity = json.loads(json.dumps(identity))

  def resume(work: pathlib.Path) -> bool:
    same = _state(work) == identity
    logger.info(f"resuming in {work}" if same else f"removing {work}, left by another preparation that did not finish")
    return same

  try:
    with atomic_files.replacing_directory(path, resume=resume) as work:
      (work / STATE).write_text(json.dumps(identity))
      return _prepare_into(cfg, work, engine)
  except concurrent.futures.process.BrokenProcessPool as error:
    raise DataError(
      "a process that writes shards ended early, most likely because memory ran out: lower config.data.memory. "
      "(A script that calls prepare() must do so under `if __name__ == '__main__':`.) Finished work is kept; the same "
      "command resumes from there."
    ) from error
  except (OSError, duckdb.Error) as error:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else (str(error).splitlines() or [type(error).__name__])[0]
    free = shutil.disk_usage(path.parent).free / 2**30 if path.parent.exists() else 0.0
    remedy = (
      "Free space or set config.data.path to another disk" if full else "Check config.data.path and config.data.memory"
    )
    raise DataError(
      f"preparing {path} failed: {reason} ({free:.1f} GiB free). {remedy}; then the same command resumes: "
      f"finished work is kept in {path}.incomplete."
    ) from error


def _state(work: pathlib.Path) -> Any:
  try:
    return json.loads((work / STATE).read_text())
  except (OSError, ValueError):
    return None


def _existing(cfg: config.Config, path: pathlib.Path) -> dict[str, Any]:
  dataset = Dataset(path)
  dataset.check_matches(cfg)
  dataset.check_files()
  logger.info(f"{path} is already prepared from this configuration; --overwrite prepares it again")
  return dataset.manifest


def _prepare_into(cfg: config.Config, work: pathlib.Path, engine: Engine) -> dict[str, Any]:
  begun = clock.monotonic()
  files = input_files(cfg)
  scratch = work / "scratch"
  scratch.mkdir(exist_ok=True)
  user_labels = read_user_labels(cfg)
  logger.info(f"reading {', '.join(cfg.data.sources)} …")
  with_labels = set().union(*user_labels.values.values())
  with engine.open(cfg, scratch) as log:
    with_events = _count_labelled(cfg, log, with_labels)
    strays = stray_times.find_stray_times(log.facts.days, [(log.start, log.end)], log)
    start, end = (strays.first, strays.last) if strays else (log.start, log.end)
    log_end = calendar.log_end(cfg.data.split, end)
    times = None
    if cfg.data.split.mode != "leave_one_out":
      before = strays is not None and strays.before > 0
      times = calendar.make_calendar(cfg.data.split, start, log_end, stray_before=before)
    dated = dated_labels.write_dated_labels(cfg, log.users, times, scratch / "dated.parquet")
    label_encoders = {**user_labels.encoders, **(dated.encoders if dated else {})}
    encoders = _encoders(log, cfg, label_encoders, work / "encoders")
    check_answerable(cfg, encoders)
    maker = RecordMaker(cfg, encoders, times)
    plan = PreparationPlan(cfg, encoders, work / "encoders", times, maker, user_labels.values, dated)
    (work / shard_files.DIRECTORY).mkdir(parents=True, exist_ok=True)
    written = engine.write(log, plan, work / shard_files.DIRECTORY)
    sizes = [s.users for s in written], sum(s.bytes for s in written)
    shard_files.write_info(work / shard_files.DIRECTORY, maker.parts, {shard_files.TFDS_SPLIT: sizes})
    with log.users() as users:
      write_users(users, work / USERS)
    unseen = fitting.coverage_of(log, encoders)
    numbers = OutlyingNumbers(outlying_numbers.clipped_numbers(log, encoders), outlying_numbers.hiding_numbers(log))
    counts = {**log.counts, "null_words": null_word_counts.count_null_words(log, encoders)}
    summary = manifest_lib.LogSummary(
      counts, log.start, log.end, log_end, log.user_type, days=log.facts.days, strays=strays
    )
    if dated is not None:
      dated.close()
  shutil.rmtree(scratch)
  shard_files.remove_notes(work / shard_files.DIRECTORY)
  (work / STATE).unlink()
  tally = maker.new_counts()
  for shard in written:
    tally.merge(shard.tally)
  manifest = manifest_lib.make_manifest(
    cfg,
    summary,
    encoders,
    work / "encoders",
    tally,
    files=files,
    shards=written,
    fields=unseen,
    numbers=numbers,
    user_table={
      **user_labels.counts,
      "labelled_users": len(with_labels),
      "labelled_users_without_events": len(with_labels) - with_events,
    },
    seconds=clock.monotonic() - begun,
    dated=dated.counts if dated else None,
  )
  return integrity.write_manifest(work, manifest)


def _count_labelled(cfg: config.Config, log: LogDatabase, with_labels: Collection[str]) -> int:
  """Returns the number of users with a label that have an event.

  Raises:
    DataError: there are users with labels, and none of them has an event.
  """
  count = log.count_users(with_labels)
  if with_labels and not count and cfg.data.users is not None:
    events = log.query(f'SELECT "user" FROM ordered_users ORDER BY uid LIMIT {SHOWN_USERS}')
    shown = [", ".join(map(repr, of)) for of in (sorted(with_labels)[:SHOWN_USERS], [user for (user,) in events])]
    raise DataError(
      f"config.data.users.user={cfg.data.users.user!r}: none of the {len(with_labels):,} users with a label has an "
      f"event. The table of users holds {shown[0]}; the events hold {shown[1]}. Correct the column, or write the ids "
      "of both in the same way."
    )
  return count


def read_user_labels(cfg: config.Config) -> user_table.UserLabels:
  """Returns the labels of users, empty where the config has none; see `user_table`."""
  tasks = {n: cast(config.UserLabel, t) for n, t in cfg.tasks.items() if t.user_column}
  if cfg.data.users is None or not tasks:
    return user_table.UserLabels({}, {}, {})
  return user_table.read_user_table(cfg.data.users, tasks, cfg.data.split, cfg.data.on_bad_rows)


def _encoders(
  log: LogDatabase, cfg: config.Config, labels: Mapping[str, vocabulary.LabelEncoder], path: pathlib.Path
) -> vocabulary.Encoders:
  """Returns the saved encoders if there are any, because shards may have used them; otherwise fits and saves some."""
  if path.is_dir():
    return vocabulary.Encoders.load(path)
  encoders = fitting.fit_encoders(log, cfg.data, labels)
  part = path.with_name(path.name + ".part")
  shutil.rmtree(part, ignore_errors=True)
  encoders.save(part)
  part.replace(path)
  return encoders


def check_answerable(cfg: config.Config, encoders: vocabulary.Encoders) -> None:
  """Raises ConfigError if data with these encoders cannot answer a task or its sample space."""
  tasks = cfg.labelled_tasks
  kinds = bind(tasks, cfg.data, encoders)
  for kind in kinds.values():
    kind.check()
  for name in tasks:
    make_comparison(tasks, kinds, name)


class ThisMachine:
  """An engine that reads a log with DuckDB and writes its records with a process per core; see `Engine`."""

  name = "this machine"

  def open(self, cfg: config.Config, scratch: pathlib.Path) -> EventLog:
    """See `Engine`."""
    return EventLog(cfg.data, scratch)

  def write(self, log: LogDatabase, plan: PreparationPlan, directory: pathlib.Path) -> list[Shard]:
    """See `Engine`."""
    assert isinstance(log, EventLog)
    count = shard_files.count_shards(log.counts["events"], log.counts["users"])
    done = shard_files.finished_shards(directory, count)
    if done:
      logger.info(f"{len(done)} of {count} shards are finished already")

    def tasks() -> Iterator[tuple[pathlib.Path, ShardRows]]:
      for index, users, rows in log.shards(plan.encoders, count, done):
        labels = {name: of_users(known, users) for name, known in plan.user_labels.items()}
        dated = plan.dated.of_users(users) if plan.dated else None
        yield directory / shard_files.shard_name(index, count), ShardRows(users, rows, labels, dated)

    written = {shard.file: shard for shard in done.values()}
    bar = ProgressBar(total=log.counts["events"], unit=" events", unit_scale=True, desc="preparing", mininterval=1)
    with bar, ShardWriters(count - len(done)) as writers:
      bar.update(sum(shard.events for shard in written.values()))
      for shard in writers.run(functools.partial(_write, plan.maker), tasks()):
        written[shard.file] = shard
        bar.update(shard.events)
    return [written[name] for name in sorted(written)]


def _write(maker: RecordMaker, task: tuple[pathlib.Path, ShardRows]) -> Shard:
  return write_shards.write_shard(maker, *task)


def of_users(known: Mapping[str, float], users: Sequence[str]) -> np.ndarray:
  """Returns the labels of users: float64 `[U]`, NaN for users without a label."""
  return np.array([known.get(user, np.nan) for user in users], np.float64)


def write_users(batches: pa.RecordBatchReader, file: pathlib.Path) -> None:
  """Writes the table with the user of each record; see `dataset.read_users`."""
  with pq.ParquetWriter(file, batches.schema, write_page_checksum=True) as writer:
    for batch in batches:
      writer.write_batch(batch)
