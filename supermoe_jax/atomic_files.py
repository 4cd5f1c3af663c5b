"""Writes files and directories atomically: they exist whole or not at all, whatever kills the writing process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from supermoe_jax.errors import ConfigError, DataError


def write_file(file: pathlib.Path, content: str | bytes) -> None:
  """Writes a temporary file and moves it into place: a reader finds the old file or the new one, always whole."""
  temporary = file.with_name(file.name + ".incomplete")
  temporary.write_bytes(content.encode() if isinstance(content, str) else content)
  temporary.replace(file)


@contextlib.contextmanager
def replacing_file(file: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path, which replaces `file` once the block has ended without an error and all is on disk."""
  part = file.with_name(file.name + ".part")
  try:
    yield part
    descriptor = os.open(part, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
    part.replace(file)
  finally:
    part.unlink(missing_ok=True)


def check_replaceable(path: pathlib.Path, kind: str, names: tuple[str, ...]) -> None:
  """Checks that replacing `path` can destroy only files that this program wrote there.

  Args:
    path: the directory to be replaced; it may be missing or empty.
    kind: the `kind` in the manifest of such a directory.
    names: patterns that match all entries of such a directory.

  Raises:
    DataError: `path` is a file, a directory of another kind, or has further entries.
  """
  if not path.exists():
    return
  if not path.is_dir():
    raise DataError(f"{path} is a file; name another directory.")
  entries = sorted(path.iterdir())
  if not entries:
    return
  if manifest_kind(path) != kind:
    raise DataError(f"{path} holds no {kind} and is not overwritten; name another directory.")
  foreign = [e.name for e in entries if not any(e.match(n) for n in names)]
  if foreign:
    raise DataError(f"{path} holds {foreign[0]!r} besides the {kind} and is not overwritten; move it away first.")


def manifest_kind(path: pathlib.Path) -> str | None:
  """Returns the `kind` in a directory's manifest; None without a readable manifest."""
  try:
    return json.loads((path / "manifest.json").read_text()).get("kind")
  except (OSError, ValueError, AttributeError):
    return None


def restore(path: pathlib.Path, kind: str) -> None:
  """Puts the old directory of this kind back at `path`, if a replacement was killed after moving it away."""
  before = path.with_name(path.name + ".before")
  if not path.exists() and manifest_kind(before) == kind:
    before.replace(path)


def _remove(directory: pathlib.Path) -> None:
  """Removes a directory, its manifest first, so that the remains after a kill are not taken for a whole directory."""
  (directory / "manifest.json").unlink(missing_ok=True)
  shutil.rmtree(directory)


@contextlib.contextmanager
def replacing_directory(
  path: pathlib.Path, *, resume: Callable[[pathlib.Path], bool] | None = None
) -> Iterator[pathlib.Path]:
  """Yields a directory to write into, which replaces `path` once the block has ended without an error.

  The old directory stays at `path` until the new one is whole, and comes back if the new one cannot take its place.

  Args:
    path: the directory to be replaced.
    resume: returns whether the block can go on in the directory that an interrupted block left. Without `resume`, and
      after a DataError or a ConfigError, which going on cannot mend, the unfinished directory is removed.

  Raises:
    DataError: another process is replacing `path`.
  """
  work, before = path.with_name(path.name + ".incomplete"), path.with_name(path.name + ".before")
  found = work.is_dir()
  left, lock = False, _lock(work)
  try:
    if found and not (resume is not None and resume(work)):
      for entry in work.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    yield work
    if before.exists() and path.exists():
      _remove(before)
    if path.exists():
      path.replace(before)
    try:
      work.replace(path)
    except OSError:
      if before.exists():
        before.replace(path)
      raise
    with contextlib.suppress(OSError):
      _remove(before)
  except BaseException as error:
    left = resume is not None and not isinstance(error, DataError | ConfigError)
    raise
  finally:
    if not left:
      shutil.rmtree(work, ignore_errors=True)
    os.close(lock)


def _lock(work: pathlib.Path) -> int:
  """Makes a directory if it is missing, and locks it for this process until the returned descriptor is closed.

  The lock is on the directory itself: it ends with the process, leaves no file, and survives a rename.

  Raises:
    DataError: another process holds the lock.
  """
  while True:
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(descriptor)
      raise DataError(f"{work} is being written by another process; wait until it has ended.") from None
    except OSError:
      pass  # a file system without locks
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(descriptor), work.stat()):
        return descriptor
    os.close(descriptor)  # another process has just renamed or removed the directory, and ended
