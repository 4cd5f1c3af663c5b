"""Paths and globs of a config expanded into files."""

from __future__ import annotations

import dataclasses
import glob
import pathlib
from collections.abc import Sequence

from supermoe_jax.config import nearest
from supermoe_jax.data.readers import DataError


@dataclasses.dataclass(frozen=True)
class FoundFile:
  """A file that a pattern of the config led to.

  Attributes:
    path: where it is.
    may_be_empty: whether a glob found it; a file that was asked for by name has to hold rows.
  """

  path: pathlib.Path
  may_be_empty: bool


def find_files(patterns: Sequence[str], key: str) -> list[FoundFile]:
  """Expands paths and globs (`~` too) in the order listed, each glob sorted by path.

  Raises:
    DataError: a path does not exist, is a directory, or is named twice; `key` says where in the config it stands.
  """
  found: dict[pathlib.Path, FoundFile] = {}
  for pattern in patterns:
    for file in _find(pattern, key):
      if file.path in found:
        raise DataError(f"{key}: {file.path} is named twice; its rows would count twice.")
      found[file.path] = file
  return list(found.values())


def glob_files(pattern: str) -> list[pathlib.Path]:
  """Returns the files that a glob matches, sorted by path; hidden ones only if it begins with a dot."""
  # Not pathlib's glob, which matches hidden files, such as the checksums that Hadoop leaves, as well.
  found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
  return [file for file in map(pathlib.Path, found) if file.is_file()]


def _find(pattern: str, key: str) -> list[FoundFile]:
  if "://" in pattern:
    raise DataError(f"{key}: {pattern} is not a local file; copy it to a disk, or mount the bucket and name the path.")
  path = pathlib.Path(pattern).expanduser()
  if path.is_dir():
    endings = sorted({p.suffix for p in path.iterdir() if p.is_file() and p.suffix}) or [".parquet"]
    raise DataError(f"{key}: {path} is a directory; name its files, such as {path / ('*' + endings[0])}.")
  if path.exists():
    return [FoundFile(path, may_be_empty=False)]
  if glob.has_magic(str(path)):
    if files := glob_files(str(path)):
      return [FoundFile(file, may_be_empty=True) for file in files]
    raise DataError(f"{key}: {path} matches no file.")
  if not path.parent.is_dir():
    raise DataError(f"{key}: {path}: no such file; the folder {path.parent} does not exist either.")
  siblings = [p.name for p in path.parent.iterdir() if p.is_file()]
  hint = nearest(path.name, siblings) if len(siblings) <= 20 else nearest(path.name, siblings).partition("; valid")[0]
  raise DataError(f"{key}: {path}: no such file{hint}")
