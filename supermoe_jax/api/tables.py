"""Writes data frames of pandas, polars or Arrow to files that a config can name."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from supermoe_jax.atomic_files import write_file
from supermoe_jax.errors import DataError

Tables = Mapping[str, Any]


def as_arrow(name: str, frame: Any) -> pa.Table:
  """Returns a data frame as an Arrow table, without the index of a pandas frame.

  Raises:
    DataError: `frame` is not a data frame.
  """
  if isinstance(frame, pa.Table):
    return frame
  if type(frame).__module__.partition(".")[0] == "pandas":
    return pa.Table.from_pandas(frame, preserve_index=False)
  if hasattr(frame, "__arrow_c_stream__"):  # polars, DuckDB and everything else that exports Arrow
    return pa.table(frame)
  raise DataError(
    f"table {name!r} is a {type(frame).__name__}; give a pandas, polars or Arrow table, or name a file in the config."
  )


def write_tables(tables: Tables, folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes data frames to `folder/NAME.parquet` and returns the paths; a file with the same content stays untouched.

  Raises:
    DataError: a table is not a data frame.
  """
  folder.mkdir(parents=True, exist_ok=True)
  paths = {}
  for name, frame in tables.items():
    content = io.BytesIO()
    pq.write_table(as_arrow(name, frame), content)
    paths[name] = folder / f"{name}.parquet"
    # A dataset identifies its files by size and time, so a rewritten file would look like other data.
    if not paths[name].is_file() or paths[name].read_bytes() != content.getvalue():
      write_file(paths[name], content.getvalue())
  return paths
