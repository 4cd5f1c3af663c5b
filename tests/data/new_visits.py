"""More visits for the small log, in files of their own."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

QUIET: dict[str, Any] = {"say": lambda text: None}


def write_visits(folder: pathlib.Path, name: str, user: int, pages: list[str], day: str = "2024-06-20") -> str:
  n = len(pages)
  time = np.datetime64(day, "us") + np.arange(n)
  pq.write_table(
    pa.table({"user": [user] * n, "time": time, "page": pages, "device": ["web"] * n, "seconds": [1.0] * n}),
    folder / name,
  )
  return str(folder / name)
