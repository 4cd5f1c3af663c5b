"""Finds the files that are new to a dataset, and makes the configs that read them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.reading import paths, readers
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


def append_configs(
  dataset: Dataset, files: Mapping[str, Sequence[str]] | None, memory: str
) -> tuple[config.Config, config.Data]:
  """Returns the dataset's config including the new files, and a data section with the new files alone.

  Args:
    dataset: the dataset to append to.
    files: source → paths or globs of its new files; None: all files that match the dataset's own patterns now.
    memory: DuckDB's memory budget for the new files; empty: the budget of the dataset's config.

  Raises:
    DataError: a name matches no file or a file that was read before, no file is new, or the user table has changed.
    ConfigError: the dataset has no such source, or the source's format (sequences) holds whole users.
  """
  cfg, read = dataset.config, {paths.file_identity(file) for file in dataset.manifest["files"]}
  known = {name: source.files for name, source in cfg.data.sources.items()}
  new: dict[str, tuple[str, ...]] = {}
  if files is None:
    found = {n: paths.file_stamps(patterns) for n, patterns in known.items()}
    new = {n: tuple(f for f in files if paths.file_identity(f) not in read) for n, files in found.items()}
    if not any(new.values()):
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
      new[name] = _named(name, patterns)
      for file in new[name]:
        if paths.file_identity(file) in read:
          raise DataError(f"{file} is part of {dataset.path} already; its rows would count twice.")
    if not any(new.values()):
      raise DataError(f"no file to append to {dataset.path} is named; name at least one.")
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
  return whole, having(new, memory or cfg.data.memory)


def _named(source: str, patterns: Sequence[str]) -> tuple[str, ...]:
  """Returns the files that paths or globs name, in their order.

  Raises:
    DataError: a path or glob names no file, or two name the same file.
  """
  con = readers.connect()
  try:
    return tuple(str(file.path) for file in paths.find_files(con, patterns, f"source {source!r}"))
  finally:
    con.close()


def _check_users_table(dataset: Dataset) -> None:
  """Raises DataError if the user table has changed: labels of users without new events were read from it."""
  if dataset.config.data.users is not None:
    then = dataset.manifest["files"]
    for file, stamp in paths.file_stamps(dataset.config.data.users.files).items():
      if then.get(file) != stamp:
        raise DataError(f"{file}: the table of users has changed; prepare {dataset.path} again with --overwrite.")


def new_file_stamps(part: config.Data) -> dict[str, list[int]]:
  """Returns the stamps of the new files and of the tables that their events are joined to; see `paths.file_stamps`."""
  patterns = [p for s in part.sources.values() for p in s.files]
  return paths.file_stamps([*patterns, *_item_tables(part), *(part.users.files if part.users else ())])


def changed_items(dataset: Dataset, part: config.Data) -> list[str]:
  """Returns the item tables of the new events that have changed since the dataset read them."""
  then = dataset.manifest["files"]
  return [file for file, stamp in paths.file_stamps(_item_tables(part)).items() if then.get(file, stamp) != stamp]


def _item_tables(part: config.Data) -> list[str]:
  return [s.items.file for s in part.sources.values() if s.files and s.items]
