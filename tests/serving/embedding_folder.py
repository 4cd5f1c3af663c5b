"""Directories of embeddings with known vectors, as 'supermoe embed' lays them out."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DAY = "2024-05-01"


def write(
  path: pathlib.Path,
  vectors: np.ndarray,
  users: Sequence[int] | Sequence[str] | None = None,
  as_of: Sequence[str] | str = DAY,
  *,
  rows_per_part: int = 100,
  half: bool = False,
  step: int = 1,
) -> pathlib.Path:
  """Writes `vectors [n, D]` of `users`, by default 0 to n − 1, in several parts, with a further column."""
  path.mkdir()
  n, width = vectors.shape
  number = np.float16 if half else np.float32
  values = pa.array(vectors.astype(number).reshape(-1))
  table = pa.table(
    {
      "user_id": pa.array(list(range(n)) if users is None else list(users)),
      "as_of": pa.array(np.array([as_of] * n if isinstance(as_of, str) else as_of, "datetime64[us]")),
      "embedding": pa.FixedSizeListArray.from_arrays(values, width),
      "n_events": pa.array(np.arange(n)),
      "last_event_time": pa.array(np.full(n, np.datetime64("2024-04-30", "us"))),
      "plan": pa.array(["free"] * n),
    }
  )
  parts = max(1, -(-n // rows_per_part))
  for i in range(parts):
    pq.write_table(table.slice(i * rows_per_part, rows_per_part), path / f"part-{i:05d}.parquet")
  manifest = {
    "kind": "embeddings",
    "run": "runs/some",
    "step": step,
    "config_hash": "c",
    "data_hash": "d",
    "width": width,
    "parts": parts,
    "rows": n,
  }
  (path / "manifest.json").write_text(json.dumps(manifest))
  return path


def turned(seed: int, width: int) -> np.ndarray:
  """A random orthogonal `[width, width]`."""
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
