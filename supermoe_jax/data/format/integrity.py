"""Whether a dataset directory is the one that was written: nothing of it may change without being noticed.

What guards what: the manifest holds a digest of itself, a digest of every small file, and the size of every large one:
the shards, and the table of users. The content of a shard is guarded by the checksums of ArrayRecord, which are looked
at whenever a record is read, that of the table by those of Parquet's pages.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from supermoe_jax.errors import DataError

MANIFEST = "manifest.json"
# Too large to be read whole at every start: shards, by a part of their names, and the table of users.
SHARD, USERS = ".array_record-", "users.parquet"


def write_manifest(directory: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Writes the manifest of a finished directory, with what later shows whether it is intact, and returns it."""
  contents = {}
  for file in sorted(f for f in directory.rglob("*") if f.is_file() and f != directory / MANIFEST):
    large = SHARD in file.name or file == directory / USERS
    contents[file.relative_to(directory).as_posix()] = {
      "bytes": file.stat().st_size,
      "sha256": None if large else _checksum(file.read_bytes()),
    }
  sealed = {**manifest, "contents": contents}
  sealed["digest"] = _own_digest(sealed)
  (directory / MANIFEST).write_text(json.dumps(sealed, indent=1) + "\n")
  return sealed


def read_manifest(directory: pathlib.Path, format: int) -> dict[str, Any]:
  """Reads the manifest and looks whether the directory still holds what it says.

  Raises:
    DataError: there is no manifest, it is of another format, or it or a file of the directory was changed.
  """
  file = directory / MANIFEST
  if not file.is_file():
    raise DataError(f"{directory} holds no prepared dataset (no {MANIFEST}); run 'supermoe prepare' first.")
  try:
    manifest = json.loads(file.read_text())
  except ValueError as error:  # JSON or UTF-8
    raise DataError(f"{file} is damaged ({error}); prepare the dataset again.") from None
  if not isinstance(manifest, dict):
    raise DataError(f"{file} is damaged (it holds no object); prepare the dataset again.")
  # An older version's manifest has no digest to be compared with.
  if manifest.get("format") != format and ("digest" not in manifest or manifest["digest"] == _own_digest(manifest)):
    raise DataError(f"{file} has format {manifest.get('format')!r}, this version reads {format}; prepare again.")
  if manifest.get("digest") != _own_digest(manifest):
    raise DataError(f"{file} is damaged (its content does not have its digest); prepare the dataset again.")
  for name, written in manifest["contents"].items():
    _check(directory / name, written)
  return manifest


def _check(file: pathlib.Path, written: Mapping[str, Any]) -> None:
  if not file.is_file():
    raise DataError(f"{file} is missing; prepare again.")
  if file.stat().st_size != written["bytes"]:
    raise DataError(
      f"{file} is damaged: it has {file.stat().st_size:,} bytes, {written['bytes']:,} were written; prepare again."
    )
  if written["sha256"] is not None and _checksum(file.read_bytes()) != written["sha256"]:
    raise DataError(f"{file} is damaged: its content is not what was written; prepare again.")


def _checksum(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _own_digest(manifest: Mapping[str, Any]) -> str:
  """The digest of everything else that a manifest says."""
  rest = {k: v for k, v in manifest.items() if k != "digest"}
  return _checksum(json.dumps(rest, sort_keys=True).encode())
