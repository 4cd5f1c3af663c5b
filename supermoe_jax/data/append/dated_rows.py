"""Finds what new events and new files change in the tables of dated labels of a dataset."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import USERS, Dataset
from supermoe_jax.data.preparation.dated_labels import DatedLabels, dated_tasks, write_dated_labels
from supermoe_jax.data.preparation.event_log import EventLog
from supermoe_jax.data.reading import paths, readers
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.data.tasks.labels import DatedRows
from supermoe_jax.errors import DataError


class AppendedRows:
  """The rows of dated labels before and after an append; without tasks about dated labels there are none.

  Attributes:
    counts: see `DatedLabels.counts`, after the append; None without such tasks.
    changed: the users whose rows differ, among them users without new events.
    new_files: the files of labels that the dataset had not read, in order.
  """

  def __init__(
    self, dataset: Dataset, log: EventLog, then: Calendar | None, now: Calendar | None, scratch: pathlib.Path
  ):
    """Reads the tables of the dataset twice: the files before the append, and all files that match the patterns now.

    Args:
      dataset: the dataset before the append.
      log: the new events.
      then: the calendar before the append.
      now: the calendar after it.
      scratch: an existing directory for work files.

    Raises:
      DataError: a table cannot be used, or a file that the dataset has read is different now.
    """
    self._old: DatedLabels | None = None
    self._new: DatedLabels | None = None
    self.counts: Mapping[str, Any] | None = None
    self.changed = pa.array([], pa.string())
    self.new_files: list[str] = []
    cfg, encoders = dataset.config, dataset.encoders.labels
    if not dated_tasks(cfg):
      return
    check_earlier_files(dataset)
    earlier = f'SELECT "user" FROM read_parquet({readers.literal(str(dataset.path / USERS))})'
    every = f'{earlier} UNION SELECT "user" FROM ordered_users'
    sides = (("then", _with_files_of(dataset), earlier, then), ("now", cfg, every, now))
    self._old, self._new = (
      write_dated_labels(
        of, functools.partial(log.row_batches, users), times, scratch / f"dated-{name}.parquet", encoders
      )
      for name, of, users, times in sides
    )
    assert self._old is not None and self._new is not None
    self.counts = self._new.counts
    every_file = dict.fromkeys(file for read in self.counts.values() for file in read["files"])
    self.new_files = [file for file in every_file if file not in dataset.manifest["files"]]
    old, new = (f"SELECT * FROM read_parquet({readers.literal(str(d.file))})" for d in (self._old, self._new))
    differ = f"(({old}) EXCEPT ({new})) UNION ALL (({new}) EXCEPT ({old}))"
    self.changed = log.arrow(f'SELECT DISTINCT "user" FROM ({differ})')["user"].combine_chunks()

  def before(self, users: Sequence[str]) -> DatedRows | None:
    """Returns the rows before the append of users in the order of their hashes; None without such tasks."""
    return self._old.of_users(users) if self._old else None

  def after(self, users: Sequence[str]) -> DatedRows | None:
    """Returns the rows after the append of users in the order of their hashes; None without such tasks."""
    return self._new.of_users(users) if self._new else None

  def close(self) -> None:
    """Closes the work files."""
    for dated in (self._old, self._new):
      if dated is not None:
        dated.close()


def _with_files_of(dataset: Dataset) -> config.Config:
  """Returns the dataset's config, whose tables of dated labels are the files that the dataset has read."""
  read = dataset.manifest["dated_labels"]
  tasks = {n: dataclasses.replace(t, files=tuple(read[n]["files"])) for n, t in dated_tasks(dataset.config).items()}
  return dataclasses.replace(dataset.config, tasks={**dataset.config.tasks, **tasks})


def check_earlier_files(dataset: Dataset) -> None:
  """Raises DataError if a file of dated labels that the dataset has read is different now, or is missing."""
  then = dataset.manifest["files"]
  for name, read in dataset.manifest["dated_labels"].items():
    for file in read["files"]:
      if paths.file_stamps([file]).get(file) != then.get(file):
        raise DataError(
          f"{file}: this file of config.tasks.{name}.files has changed or is missing; prepare {dataset.path} again "
          "with --overwrite. An append reads new labels only from new files that match the patterns."
        )


def dated_file_stamps(cfg: config.Config) -> dict[str, list[int]]:
  """Returns the stamps of all files of dated labels that the config's patterns match; see `paths.file_stamps`."""
  return paths.file_stamps([p for task in dated_tasks(cfg).values() for p in task.files])
