"""Writes the rows of an embedding directory part by part; a file is there whole or not at all.

    part-*.parquet    user_id, as_of, embedding, n_events, last_event_time, and the user columns that are carried along
    absent-*.parquet  user_id, as_of, first_event_time: users without an event before a time, who have no embedding

Shapes: n rows of a part, D the width of an embedding.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from supermoe_jax import atomic_files
from supermoe_jax.data.dataset.snapshot_batches import Query, UserWithoutEvents

# Patterns of the files in an embedding directory.
NAMES = ("manifest.json", "part-*.parquet", "absent-*.parquet")

# The columns of every part; a user column may have none of these names.
COLUMNS = ("user_id", "as_of", "embedding", "n_events", "last_event_time")

# Arrow types of the numbers of a stored embedding.
TYPES = {"float32": pa.float32(), "float16": pa.float16()}


class RowStyle(NamedTuple):
  """The format of stored rows: user ids as integers or as text, and the width and type of vectors."""

  integer_users: bool
  width: int
  dtype: str


def part_name(number: int) -> str:
  """Returns the name of a part's file."""
  return f"part-{number:05d}.parquet"


def absent_name(number: int) -> str:
  """Returns the name of the file of a part's users without an embedding."""
  return f"absent-{number:05d}.parquet"


def user_column(users: Sequence[str], integer: bool) -> pa.Array:
  """Returns user ids as in the event log: int64 if all ids are integers there (`integer`), else text."""
  return pa.array([int(u) for u in users], pa.int64()) if integer else pa.array(users, pa.string())


def embedding_rows(questions: Sequence[Query], vectors: np.ndarray, style: RowStyle) -> pa.Table:
  """Returns the rows of `questions` with their `vectors`, float32 `[n, D]`."""
  kept = pa.array(vectors.astype(style.dtype).reshape(-1), TYPES[style.dtype])
  return pa.table(
    {
      "user_id": user_column([q.user_id for q in questions], style.integer_users),
      "as_of": pa.array([q.time for q in questions], pa.timestamp("us")),
      "embedding": pa.FixedSizeListArray.from_arrays(kept, style.width),
      "n_events": pa.array([q.n_events for q in questions], pa.int64()),
      "last_event_time": pa.array([q.last_event for q in questions], pa.timestamp("us")),
    }
  )


def absent_rows(users: Sequence[UserWithoutEvents], style: RowStyle) -> pa.Table:
  """Returns the rows of users without an event before a time."""
  return pa.table(
    {
      "user_id": user_column([a.user_id for a in users], style.integer_users),
      "as_of": pa.array([a.time for a in users], pa.timestamp("us")),
      "first_event_time": pa.array([a.first_event for a in users], pa.timestamp("us")),
    }
  )


def in_order(tables: Sequence[pa.Table], users: Sequence[np.ndarray]) -> tuple[pa.Table, np.ndarray]:
  """Returns the rows of `tables`, whose users are `users`, sorted by user and time; and the user of each row."""
  table, user = pa.concat_tables(tables), np.concatenate(users)
  order = np.lexsort((table["as_of"].cast(pa.int64()).to_numpy(), user))
  return table.take(order), user[order]


def write_part(work: pathlib.Path, number: int, table: pa.Table, missing: pa.Table) -> None:
  """Writes the absent users of a part first and the part last, so that both are there if the part is."""
  for name, content in ((absent_name(number), missing), (part_name(number), table)):
    if len(content) or name == part_name(number):
      with atomic_files.replacing_file(work / name) as file:
        pq.write_table(content, file)
