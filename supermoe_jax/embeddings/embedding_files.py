"""Reads a directory of user embeddings that 'supermoe embed' wrote.

Shapes: n rows, D the width of an embedding.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from supermoe_jax.errors import DataError

# The `kind` in the manifest of such a directory.
KIND = "embeddings"


def read_embedding_manifest(path: pathlib.Path) -> dict[str, Any]:
  """Returns the manifest of an embedding directory.

  Raises:
    DataError: `path` holds no embeddings, or the manifest is damaged.
  """
  file = path / "manifest.json"
  if not file.is_file():
    raise DataError(f"{path} holds no embeddings (no manifest.json); run 'supermoe embed' first.")
  try:
    manifest: dict[str, Any] = json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise DataError(f"{file} is damaged ({error}); embed again.") from None
  if manifest.get("kind") != KIND:
    raise DataError(
      f"{path} holds no embeddings, but {manifest.get('kind', 'something else')!r}; name another directory."
    )
  return manifest


def part_paths(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the Parquet files of an embedding directory, in the order of their rows.

  Raises:
    DataError: `path` holds no whole set of embeddings.
  """
  found, expected = sorted(path.glob("part-*.parquet")), read_embedding_manifest(path)["parts"]
  if len(found) != expected:
    raise DataError(f"{path} holds {len(found)} parts, its manifest names {expected}; embed again.")
  return found


def absent_files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the Parquet files of users without an event before a time: `user_id, as_of, first_event_time`."""
  return sorted(path.glob("absent-*.parquet"))


def read_embeddings(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
  """Returns the rows of an embedding directory as of all its times, with `columns` or all columns.

  Raises:
    DataError: `path` holds no whole set of embeddings, or a part is damaged.
  """
  return pa.concat_tables([read_embedding_file(file, columns) for file in part_paths(pathlib.Path(path))])


def read_embedding_file(file: pathlib.Path, columns: Sequence[str] | None = None) -> pa.Table:
  """Reads one file of an embedding directory.

  Raises:
    DataError: the file is damaged.
  """
  try:
    return pq.read_table(file, columns=None if columns is None else list(columns))
  except (OSError, pa.ArrowException) as error:
    raise DataError(f"{file} is damaged ({error}); embed again.") from error


def embedding_vectors(table: pa.Table) -> np.ndarray:
  """Returns the embeddings of a table's rows as float32 `[n, D]`, whatever type the file holds."""
  column = table["embedding"]
  width = column.type.list_size
  chunks = [c.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for c in column.chunks]
  return np.concatenate([np.zeros((0, width), np.float32), *chunks]).astype(np.float32, copy=False)
