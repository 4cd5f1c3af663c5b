"""Finds the files that are new to a dataset, and makes the configs that read them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.reading import paths, readers
from supermoe_jax.data.reading.paths import FoundFile
from supermoe_jax.errors import ConfigError, DataError, nearest


def named_files(path: pathlib.Path, arguments: Sequence[str]) -> dict[str, list[str]]:
  """Returns the files of each source from arguments `SOURCE=FILE`, or just `FILE` if the dataset has one source.

  Raises:
    ConfigError: an argument names no source, and the dataset has several.
  """
  sources = list(Dataset(path).config.data.sources)
  out: dict[str, list[str]] = {}
  for argument in arguments:
    source, equals, file = argument.partition("=")
    if len(sources) == 1 and source != sources[0]:
      source, equals, file = sources[0], "=", argument
    if not equals:
      raise ConfigError(
        f"{argument!r} names no source; write SOURCE=FILE, where SOURCE is one of {', '.join(sources)}."
      )
    out.setdefault(source, []).append(file)
  return out


class NewFiles(NamedTuple):
  """The files that an append reads.

  Attributes:
    cfg: the dataset's config including the new files.
    part: a data section with the new files alone.
    empty: source → the new files without a row that globs found; they are passed over.
  """

  cfg: config.Config
  part: config.Data
  empty: dict[str, list[str]]


def find_new_files(dataset: Dataset, files: Mapping[str, Sequence[str]] | None, memory: str) -> NewFiles:
  """Finds the files to append, and makes the configs that read them.

  Args:
    dataset: the dataset to append to.
    files: source → paths or globs of its new files; None: all files that match the dataset's own patterns now.
    memory: DuckDB's memory budget for the new files; empty: the budget of the dataset's config.

  Raises:
    DataError: a name matches no file or a file that was read before, no file is new, a named file or all files are
      empty, or the user table has changed.
    ConfigError: the dataset has no such source, or the source's format (sequences) holds whole users.
  """
  cfg, read = dataset.config, {paths.file_identity(file) for file in dataset.manifest["files"]}
  known = {name: source.files for name, source in cfg.data.sources.items()}
  new: dict[str, tuple[str, ...]] = {}
  empty: dict[str, list[str]] = {}
  if files is None:
    for name, source in cfg.data.sources.items():
      found = [f for f in _found(name, source.files) if paths.file_identity(str(f.path)) not in read]
      new[name], empty[name] = _with_rows(source, f"config.data.sources.{name}", found)
    if not any(new.values()) and not any(empty.values()):
      labels = [f for task in cfg.tasks.values() for f in paths.file_stamps(task.own_files)]
      if late := [file for file in labels if paths.file_identity(file) not in read]:
        raise DataError(
          f"{late[0]} is a new file of dated labels, but no file of events is new; an append of new events reads it "
          f"too. Until then, prepare {dataset.path} again with --overwrite."
        )
      raise DataError(
        f"{dataset.path} already holds all files that config.data.sources names; name new files: "
        f"supermoe append --data {dataset.path} {next(iter(known))}=FILE"
      )
  else:
    for name, patterns in files.items():
      if name in cfg.tasks and cfg.tasks[name].own_files:
        raise ConfigError(
          f"{name!r} is no source, but a task about dated labels: put its new files where config.tasks.{name}.files "
          f"({', '.join(cfg.tasks[name].own_files)}) matches them, and an append of new events reads them."
        )
      if name not in known:
        raise ConfigError(f"{dataset.path} has no source {name!r}{nearest(name, known)}")
      new[name], empty[name] = _with_rows(cfg.data.sources[name], f"config.data.sources.{name}", _found(name, patterns))
      for file in new[name]:
        if paths.file_identity(file) in read:
          raise DataError(f"{file} is part of {dataset.path} already; its rows would count twice.")
    if not any(new.values()) and not any(empty.values()):
      raise DataError(f"no file to append to {dataset.path} is named; name at least one.")
  if not any(new.values()):
    without = [file for of in empty.values() for file in of]
    raise DataError(f"none of the {len(without)} new files holds a row; the first is {without[0]}.")
  for name, source in cfg.data.sources.items():
    if new.get(name) and source.format == "sequences":
      raise ConfigError(f"source {name!r}: a file of sequences holds whole users and cannot be appended.")
  _check_users_table(dataset)

  def having(of_sources: Mapping[str, tuple[str, ...]], memory: str) -> config.Data:
    sources = {n: dataclasses.replace(s, files=of_sources.get(n, ())) for n, s in cfg.data.sources.items()}
    return dataclasses.replace(cfg.data, sources=sources, memory=memory)

  # The config lists a new file only if none of its globs matches it.
  matched = {n: {paths.file_identity(f) for f in paths.file_stamps(patterns)} for n, patterns in known.items()}
  further = {n: tuple(f for f in files if paths.file_identity(f) not in matched[n]) for n, files in new.items()}
  listed = {n: (*patterns, *further.get(n, ())) for n, patterns in known.items()}
  whole = dataclasses.replace(cfg, data=having(listed, cfg.data.memory))
  return NewFiles(whole, having(new, memory or cfg.data.memory), empty)


def _found(source: str, patterns: Sequence[str]) -> list[FoundFile]:
  """Returns the files that paths, globs or folders name, in their order.

  Raises:
    DataError: a path or glob names no file, or two name the same file.
  """
  con = readers.connect()
  try:
    return paths.find_files(con, patterns, f"source {source!r}")
  finally:
    con.close()


def _with_rows(source: config.Source, key: str, files: Sequence[FoundFile]) -> tuple[tuple[str, ...], list[str]]:
  """Returns the paths of files with rows, and those of files without a row that globs found.

  `key` is the source's place in the config.

  Raises:
    DataError: a file cannot be opened, or a file that was named is empty.
  """
  con = readers.connect()
  try:
    empty = []
    for file in files:
      paths.make_readable(con, file.path, str(file.path))
      try:
        readers.open_table(con, file.path, source.format, {source.user}, source, key)
      except readers.EmptyFileError as error:
        if not file.may_be_empty:
          raise DataError(f"{error} Leave it out.") from None
        empty.append(str(file.path))
    return tuple(str(file.path) for file in files if str(file.path) not in empty), empty
  finally:
    con.close()


def _check_users_table(dataset: Dataset) -> None:
  """Raises DataError if the user table has changed: labels of users without new events were read from it."""
  if dataset.config.data.users is not None:
    then = dataset.manifest["files"]
    for file, stamp in paths.file_stamps(dataset.config.data.users.files).items():
      if then.get(file) != stamp:
        raise DataError(f"{file}: the table of users has changed; prepare {dataset.path} again with --overwrite.")


def new_file_stamps(dataset: Dataset, new: NewFiles) -> dict[str, list[int]]:
  """Returns the stamps of the new files and of the tables that their events are joined to; see `paths.file_stamps`.

  An empty file is among them only if the dataset's own patterns match it: these are the files that `train` compares.
  """
  part = new.part
  patterns = [p for s in part.sources.values() for p in s.files]
  own = {paths.file_identity(f) for s in dataset.config.data.sources.values() for f in paths.file_stamps(s.files)}
  patterns += [f for files in new.empty.values() for f in files if paths.file_identity(f) in own]
  return paths.file_stamps([*patterns, *_item_tables(part), *(part.users.files if part.users else ())])


def changed_items(dataset: Dataset, part: config.Data) -> list[str]:
  """Returns the item tables of the new events that have changed since the dataset read them."""
  then = dataset.manifest["files"]
  return [file for file, stamp in paths.file_stamps(_item_tables(part)).items() if then.get(file, stamp) != stamp]


def _item_tables(part: config.Data) -> list[str]:
  return [s.items.file for s in part.sources.values() if s.files and s.items]
