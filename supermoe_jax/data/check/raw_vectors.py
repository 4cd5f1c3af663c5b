"""Compares the vectors that a dataset gives the events of some users with those of the raw files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb
import numpy as np

from supermoe_jax.batch import FIRST_VALUE
from supermoe_jax.data.check.raw_events import field_column
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.vectors import Vectors


def differing_vector(con: duckdb.DuckDBPyConnection, dataset: Dataset, records: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a sentence on the first event whose vector is another one in the raw files; empty if there is none.

  Vectors of the table of users are left out, as `load_raw_events` reads none. If a table of items changed before an
  append, nothing is compared: earlier events keep their vectors, which the table may lack now.

  Args:
    con: the connection with the table `events` of `load_raw_events`.
    dataset: the dataset.
    records: the records of the users of `events`, by the user's id.
  """
  if any(append["changed_item_tables"] for append in dataset.manifest.get("appends", ())):
    return ""
  data = dataset.config.data
  for name, encoder in dataset.encoders.categorical.items():
    if not isinstance(encoder, Vectors) or data.fields[name].table == "users":
      continue
    column = dataset.schema.field(name)
    sql = f'SELECT position, {field_column(data, name)} FROM events WHERE "user" = ? ORDER BY position'
    for user, record in records.items():
      for position, raw in con.execute(sql, [user]).fetchall():
        code = int(record["codes"][position, column])
        stored = encoder.rows[code - FIRST_VALUE] if code >= FIRST_VALUE else None
        same = stored is raw if stored is None or raw is None else np.array_equal(stored, np.array(raw, np.float32))
        if not same:
          return (
            f"user {user!r}, event {position}, field {name}: {dataset.path} holds {_shown(stored)}, the raw files give "
            f"{_shown(raw)}."
          )
  return ""


def _shown(vector: Any) -> str:
  if vector is None:
    return "no vector"
  return f"[{', '.join(f'{x:.4g}' for x in vector[:4])}{', …' if len(vector) > 4 else ''}]"
