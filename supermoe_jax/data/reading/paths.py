"""Expands the paths and globs of a config into files: local ones and files on object stores and web servers."""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import duckdb

from supermoe_jax import config
from supermoe_jax.config import TextFormat
from supermoe_jax.data.reading import readers, remote
from supermoe_jax.data.reading.readers import EmptyFileError, TableFile, literal
from supermoe_jax.data.reading.remote import FilePath, RemoteFile
from supermoe_jax.errors import DataError, nearest

logger = logging.getLogger(__name__)

HIDDEN = (".", "_")  # beginnings of the names that Hadoop, Spark and table formats give to files that are no data


@dataclasses.dataclass(frozen=True)
class FoundFile:
  """A file that a pattern of the config matches.

  Attributes:
    path: the file's path.
    may_be_empty: whether a glob or a folder found the file; a file that the config names must hold rows.
  """

  path: FilePath
  may_be_empty: bool


class OpenedFiles(NamedTuple):
  """Opened files with rows, at least one, and the paths of empty files."""

  tables: list[TableFile]
  empty: list[FilePath]


def find_files(con: duckdb.DuckDBPyConnection, patterns: Sequence[str], key: str) -> list[FoundFile]:
  """Expands paths, globs and folders (`~` too) in the order listed, each sorted by path; DuckDB lists remote globs.

  A folder stands for all data files in it and in its folders. Hidden files, and files and folders whose names begin
  with an underscore, are no data unless the pattern itself names them so: Hadoop and Spark write them beside the data.

  Raises:
    DataError: a path does not exist, a folder holds no data file, a file is named twice, or a remote file cannot be
      reached; the message names `key`, the place of the patterns in the config, unless it is empty.
  """
  found: dict[str, FoundFile] = {}
  for pattern in patterns:
    for file in _find_remote(con, pattern, key) if remote.scheme(pattern) else _find(pattern, key):
      if file_identity(str(file.path)) in found:
        raise DataError(f"{_place(key)}{file.path} is named twice; its rows would count twice.")
      found[file_identity(str(file.path))] = file
  return list(found.values())


def _place(key: str) -> str:
  """Returns the beginning of a message about the patterns of `key`; empty for the arguments of a command."""
  return f"{key}: " if key else ""


def open_files(
  con: duckdb.DuckDBPyConnection,
  patterns: Sequence[str],
  format: str,
  wanted: Collection[str],
  key: str,
  text: TextFormat,
) -> OpenedFiles:
  """Finds the `files` of the config section `key` and opens them as `readers.open_table` does.

  Raises:
    DataError: a file cannot be found or opened, a file that the config names is empty, or all files are empty.
  """
  opened = OpenedFiles([], [])
  found = find_files(con, patterns, f"{key}.files")
  for file in found:
    try:
      opened.tables.append(readers.open_table(con, file.path, format, wanted, text, key))
    except EmptyFileError as error:
      if not file.may_be_empty:
        raise DataError(f"{error} Remove it from {key}.files.") from None
      opened.empty.append(file.path)
  if not opened.tables:
    raise DataError(f"{key}.files: none of the {len(found)} files holds a row; the first is {found[0].path}.")
  return opened


def _inside(folder: pathlib.Path) -> str:
  return f"{glob.escape(str(folder))}/**/*"


def _say_passed_over(pattern: str, key: str) -> None:
  """Logs the files that a glob matches and that are no data by their names, though their endings are those of data."""
  endings = tuple(ending for of in readers.ENDINGS.values() for ending in of)
  others = [path for path in sorted(glob.glob(pattern, recursive=True)) if not is_data(path, pattern)]  # noqa: PTH207
  if passed := [path for path in others if path.lower().endswith(endings) and pathlib.Path(path).is_file()]:
    logger.info(
      f"{_place(key)}{len(passed)} file{'s' if len(passed) > 1 else ''} passed over, since the name or that of a "
      f"folder begins with '_': {passed[0]}{' …' if len(passed) > 1 else ''}"
    )


def file_identity(file: str) -> str:
  """Returns the same text for all names of a file: the absolute path with links resolved, or a remote file's name."""
  return file if remote.scheme(file) else str(pathlib.Path(file).expanduser().resolve())


def glob_files(pattern: str) -> list[pathlib.Path]:
  """Returns the data files that a glob matches, sorted by path; see `find_files`.

  A glob that matches folders alone, such as `2024-*.parquet` of folders that Spark wrote, stands for their files.
  """
  # pathlib's glob would also match hidden files, such as the checksums that Hadoop leaves.
  found = [path for path in sorted(glob.glob(pattern, recursive=True)) if is_data(path, pattern)]  # noqa: PTH207
  files = [file for file in map(pathlib.Path, found) if file.is_file()]
  return files or [file for folder in found for file in folder_files(pathlib.Path(folder))]


def check_paths_of_config(data: config.Data, tasks: Mapping[str, config.LabelledTask], file: pathlib.Path) -> None:
  """Checks that no relative path of a config is meant relative to the folder of the config's `file`.

  Relative paths are relative to the working directory.

  Raises:
    DataError: a path matches nothing in the working directory, but would in that folder.
  """
  patterns = [(f"config.data.sources.{n}.files", p) for n, s in data.sources.items() for p in s.files]
  patterns += [(f"config.data.sources.{n}.items.file", s.items.file) for n, s in data.sources.items() if s.items]
  patterns += [("config.data.users.files", p) for p in (data.users.files if data.users else ())]
  patterns += [(f"config.tasks.{n}.files", p) for n, t in tasks.items() for p in t.own_files]
  for key, pattern in patterns:
    if remote.scheme(pattern) or pathlib.Path(pattern).expanduser().is_absolute() or _matches(pattern):
      continue
    if _matches(str(there := file.parent / pattern)):
      raise DataError(
        f"{key}: there is no {pattern} in the working directory {pathlib.Path.cwd()}, which relative paths start from, "
        f"but there is {there}, next to the config file. Run the command in {file.parent}, or write the path in the "
        f"config as str(pathlib.Path(__file__).parent / {pattern!r})."
      )


def _matches(pattern: str) -> bool:
  return pathlib.Path(pattern).exists() or (glob.has_magic(pattern) and bool(glob_files(pattern)))


def is_data(file: str, pattern: str) -> bool:
  """Returns whether a file that matches a glob is data by the names of its folders and its own; see `find_files`.

  A folder such as `_day=2024-01-05` is data, since it gives a column.
  """
  wanted = _names_in(pattern)
  fixed = next((i for i, part in enumerate(wanted) if glob.has_magic(part)), len(wanted))
  *folders, name = _names_in(file)[fixed:] or [""]
  *named_folders, named = wanted[fixed:] or [""]
  hidden = [folder[0] for folder in folders if folder[:1] in HIDDEN and "=" not in folder]
  return (name[:1] not in HIDDEN or named[:1] == name[:1]) and all(
    any(folder[:1] == first for folder in named_folders) for first in hidden
  )


def _names_in(path: str) -> list[str]:
  return [part for part in path.replace(os.sep, "/").split("/") if part not in ("", ".")]


def folder_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the data files in a folder and in its folders, sorted by path; see `find_files`."""
  pattern = _inside(folder)
  found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
  return [file for file in map(pathlib.Path, found) if is_data(str(file), pattern) and file.is_file()]


def _find(pattern: str, key: str) -> list[FoundFile]:
  path = pathlib.Path(pattern).expanduser()
  if path.is_dir():
    if files := folder_files(path):
      _say_passed_over(_inside(path), key)
      return [FoundFile(file, may_be_empty=True) for file in files]
    raise DataError(f"{_place(key)}the folder {path} holds no data file; names that begin with '.' or '_' are no data.")
  if path.exists():
    return [FoundFile(path, may_be_empty=False)]
  if glob.has_magic(str(path)):
    if files := glob_files(str(path)):
      _say_passed_over(str(path), key)
      return [FoundFile(file, may_be_empty=True) for file in files]
    raise DataError(f"{_place(key)}{path} matches no data file; names that begin with '.' or '_' are no data.")
  if not path.parent.is_dir():
    raise DataError(f"{_place(key)}{path}: no such file; the folder {path.parent} does not exist either.")
  siblings = [p.name for p in path.parent.iterdir() if p.is_file()]
  hint = nearest(path.name, siblings) if len(siblings) <= 20 else nearest(path.name, siblings).partition("; valid")[0]
  raise DataError(f"{_place(key)}{path}: no such file{hint}")


def _find_remote(con: duckdb.DuckDBPyConnection, pattern: str, key: str) -> list[FoundFile]:
  scheme = remote.scheme(pattern)
  if scheme not in remote.EXTENSIONS:
    known = ", ".join(f"{s}://" for s in remote.EXTENSIONS)
    raise DataError(
      f"{_place(key)}{pattern} is not a local file, and {scheme}:// is not read; copy it to a disk, or name one of "
      f"{known}."
    )
  _load(con, remote.EXTENSIONS[scheme], f"{_place(key)}{pattern}")
  if scheme in remote.WEB:
    if "*" in pattern:
      raise DataError(f"{_place(key)}{pattern}: a web server does not list its files; name each of them.")
    return [FoundFile(RemoteFile(pattern), may_be_empty=False)]
  credentials = RemoteFile(pattern).credentials
  try:
    found = con.execute(f"SELECT file FROM glob({literal(pattern)}) ORDER BY file").fetchall()
  except duckdb.Error as error:
    raise DataError(f"{_place(key)}{pattern} cannot be listed: {readers.first_line(error)}. {credentials}.") from error
  found = [(file,) for (file,) in found if not glob.has_magic(pattern) or is_data(file, pattern)]
  if not found:
    raise DataError(f"{_place(key)}{pattern} matches no file. {credentials}.")
  return [FoundFile(RemoteFile(file), may_be_empty=glob.has_magic(pattern)) for (file,) in found]


def make_readable(con: duckdb.DuckDBPyConnection, path: FilePath, key: str) -> None:
  """Lets the connection read a file that another connection found; `key` is the file's place in the config."""
  if isinstance(path, RemoteFile):
    _load(con, remote.EXTENSIONS[remote.scheme(path.url)], f"{_place(key)}{path}")


def _load(con: duckdb.DuckDBPyConnection, extension: str, place: str) -> None:
  """Loads the DuckDB extension that a remote file needs. The user must install it, since that is a download."""
  if not extension:
    return
  try:
    con.execute(f"LOAD {extension}")
  except duckdb.Error as error:
    raise DataError(
      f"{place} needs DuckDB's extension {extension}, which is not installed. With access to the internet, run once: "
      f"python -c \"import duckdb; duckdb.sql('INSTALL {extension}')\""
    ) from error


def _there(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that a local path, glob or folder matches, as in `find_files`; none if there is no match."""
  return [path] if path.is_file() else folder_files(path) if path.is_dir() else glob_files(str(path))


def file_stamps(patterns: Sequence[str]) -> dict[str, list[int]]:
  """Returns [size in bytes, time of change (local: ns, remote: µs since 1970)] of every file that the patterns match.

  Raises:
    DataError: a remote file cannot be reached.
  """
  local = {f for p in patterns if not remote.scheme(p) for f in _there(pathlib.Path(p).expanduser())}
  out = {str(f): [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(local)}
  if elsewhere := [p for p in dict.fromkeys(patterns) if remote.scheme(p)]:
    con = readers.connect()
    try:
      for pattern in elsewhere:
        for file in _find_remote(con, pattern, "config.data"):
          with readers.naming(file.path, "bytes"):
            # A query without the content looks up size and time; it does not read the file.
            facts = con.execute(
              f"SELECT size, coalesce(epoch_us(last_modified), 0) FROM read_blob({literal(remote.pattern(file.path))})"
            ).fetchall()
          out |= {str(file.path): [int(size), int(changed)] for size, changed in facts}
    finally:
      con.close()
  return out
