"""Checks that a dataset directory is as it was written, so that no change goes unnoticed.

The manifest holds a digest of itself, a digest of every small file, and the size of every large file: the shards and
the table of users. ArrayRecord's checksums guard the content of a shard and are checked whenever a record is read. The
checksums of Parquet pages guard the table of users. Tables of vectors have none of their own, so they are read whole.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from supermoe_jax.errors import DataError

MANIFEST = "manifest.json"
# Files too large to read whole at every start: shards, by a part of their names, and the table of users.
SHARD, USERS = ".array_record-", "users.parquet"


def write_manifest(directory: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Writes the manifest of a finished directory, with the sizes and digests that later checks need, and returns it."""
  contents = {}
  for file in sorted(f for f in directory.rglob("*") if f.is_file() and f != directory / MANIFEST):
    name = file.relative_to(directory).as_posix()
    large = SHARD in file.name or name == USERS
    contents[name] = {
      "bytes": file.stat().st_size,
      "sha256": None if large else _file_checksum(file),
    }
  sealed = {**manifest, "contents": contents}
  sealed["digest"] = _own_digest(sealed)
  (directory / MANIFEST).write_text(json.dumps(sealed, indent=1) + "\n")
  return sealed


def read_manifest(directory: pathlib.Path, format: int) -> dict[str, Any]:
  """Reads the manifest and checks that the directory still holds the files that it lists.

  Raises:
    DataError: there is no manifest, it has another format, or it or a file of the directory was changed.
  """
  file = directory / MANIFEST
  if not file.is_file():
    raise DataError(f"{directory} holds no prepared dataset (no {MANIFEST}); run 'supermoe prepare' first.")
  try:
    manifest = json.loads(file.read_text())
  except ValueError as error:  # JSON or UTF-8
    raise DataError(f"{file} is damaged ({error}); prepare the dataset again.") from None
  if not isinstance(manifest, dict):
    raise DataError(f"{file} is damaged (it holds no JSON object); prepare the dataset again.")
  # The manifest of an older version has no digest to compare with.
  if manifest.get("format") != format and ("digest" not in manifest or manifest["digest"] == _own_digest(manifest)):
    raise DataError(f"{file} has format {manifest.get('format')!r}, this version reads {format}; prepare again.")
  if manifest.get("digest") != _own_digest(manifest):
    raise DataError(f"{file} is damaged (its content does not match its digest); prepare the dataset again.")
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
  if written["sha256"] is not None and _file_checksum(file) != written["sha256"]:
    raise DataError(f"{file} is damaged: its content is not what was written; prepare again.")


def _file_checksum(file: pathlib.Path) -> str:
  with file.open("rb") as content:
    return hashlib.file_digest(content, "sha256").hexdigest()


def _checksum(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _own_digest(manifest: Mapping[str, Any]) -> str:
  """Returns the digest of a manifest's content, without its own digest."""
  rest = {k: v for k, v in manifest.items() if k != "digest"}
  return _checksum(json.dumps(rest, sort_keys=True).encode())
