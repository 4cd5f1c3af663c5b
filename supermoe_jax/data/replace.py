"""Directories that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator

from supermoe_jax.data.readers import DataError


def check_replaceable(path: pathlib.Path, kind: str, names: tuple[str, ...]) -> None:
  """Makes sure that replacing `path` can destroy nothing but what this program wrote there.

  Args:
    path: the directory to be replaced; it may be missing or empty.
    kind: the `kind` that the manifest of such a directory states.
    names: patterns of everything that such a directory holds.

  Raises:
    DataError: `path` is a file, holds another kind of thing, or something besides.
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
  """The `kind` in a directory's manifest; None without a readable one."""
  try:
    return json.loads((path / "manifest.json").read_text()).get("kind")
  except (OSError, ValueError, AttributeError):
    return None


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a directory to write into, which takes the place of `path` when the block ends without an error.

  What stood at `path` stays until the new directory is whole, and comes back if it cannot take its place.
  """
  work, before = path.with_name(path.name + ".incomplete"), path.with_name(path.name + ".before")
  shutil.rmtree(work, ignore_errors=True)
  try:
    work.mkdir(parents=True)
    yield work
    if before.exists() and path.exists():
      shutil.rmtree(before)
    if path.exists():
      path.replace(before)
    try:
      work.replace(path)
    except OSError:
      if before.exists():
        before.replace(path)
      raise
    shutil.rmtree(before, ignore_errors=True)
  finally:
    shutil.rmtree(work, ignore_errors=True)
