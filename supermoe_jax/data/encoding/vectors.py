"""Encodes the vectors that come with a log, such as pretrained embeddings of items.

A dataset stores each distinct vector of a field once. A record holds a vector's code: its row in that table plus 2, or
0 where there is none. Batches hold the vectors themselves, divided by one scale for the whole field, so that the
numbers of the training vectors have the mean square 1. One scale keeps the angles between vectors as they are.

Shapes: N vectors, V numbers of all vector fields together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from supermoe_jax.batch import ABSENT, FIRST_VALUE, UNKNOWN
from supermoe_jax.data.encoding.numeric import MOST_DEVIATIONS, rounded_statistic
from supermoe_jax.errors import DataError

if TYPE_CHECKING:
  import pyarrow as pa

DIRECTORY = "vectors"  # within the directory of a dataset's encoders
CHUNK = 1 << 14  # rows of a table that are in memory at a time


@dataclasses.dataclass(frozen=True)
class VectorScale:
  """The form in which the model reads a field's vectors.

  Attributes:
    size: the number of numbers of a vector.
    scale: the root of the mean square of the training vectors' numbers; 1 where all are 0.
  """

  size: int
  scale: float

  def encode(self, vectors: np.ndarray) -> np.ndarray:
    """Returns raw vectors `[…, size]` as batches hold them: float16; numbers beyond 1000 scales are clipped."""
    with np.errstate(over="ignore"):
      return np.clip(vectors / np.float32(self.scale), -MOST_DEVIATIONS, MOST_DEVIATIONS).astype(np.float16)

  def looked_up(self, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the vectors with `codes […]` as batches hold them: float16 `[…, size]`; NaN where there is none.

    `rows [N, size]` holds the raw vectors; the first one has the code 2.
    """
    out = np.full((*codes.shape, self.size), np.nan, np.float16)
    known = codes >= FIRST_VALUE
    out[known] = self.encode(rows[codes[known] - FIRST_VALUE])
    return out


@dataclasses.dataclass(frozen=True)
class Vectors(VectorScale):
  """The table of a field's distinct vectors, in files.

  Attributes:
    parts: paths without ending; `.npy` holds rows of the table, float32 `[rows, size]`, and `.parquet` their keys.
    buckets: 0; no vectors share a code.
  """

  parts: tuple[pathlib.Path, ...]
  buckets: int = dataclasses.field(default=0, init=False)

  def __reduce__(self) -> tuple[type[Vectors], tuple[Any, ...]]:
    return Vectors, (self.size, self.scale, self.parts)  # another process maps the files into its own memory

  @functools.cached_property
  def rows(self) -> np.ndarray:
    """Returns the raw vectors, float32 `[N, size]`, mapped into memory if they are in one file.

    Raises:
      DataError: a file is missing or damaged.
    """
    arrays = [_opened(part, self.size) for part in self.parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

  @property
  def n_codes(self) -> int:
    """Returns the number of codes, including 0 for absent and 1, which no vector has."""
    return FIRST_VALUE + sum(len(_opened(part, self.size)) for part in self.parts)

  @property
  def clipped(self) -> int:
    """Returns the number of vectors with a number that `encode` clips; reads the whole table."""
    n, most = 0, MOST_DEVIATIONS * self.scale
    for part in self.parts:
      rows = _opened(part, self.size)
      n += sum(int((np.abs(rows[i : i + CHUNK]) > most).any(axis=1).sum()) for i in range(0, len(rows), CHUNK))
    return n

  def table(self) -> pa.Table:
    """Returns a table with the columns `value`, the key of each vector, and `code`, for a join."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = pa.concat_tables([pq.read_table(f"{part}.parquet") for part in self.parts])
    return keys.append_column("code", [np.arange(keys.num_rows, dtype=np.int32) + FIRST_VALUE])

  def code_sql(self, column: str, table: str) -> str:
    """Returns the SQL of the code of a column of keys; `table` names the table `table()`, joined on `value`."""
    return f"CASE WHEN {column} IS NULL THEN {ABSENT} ELSE coalesce({table}.code, {UNKNOWN}) END"

  def save(self, path: pathlib.Path) -> None:
    """Writes the whole table as one part."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = [_opened(part, self.size) for part in self.parts]
    pq.write_table(self.table().select(["value"]), f"{path}.parquet")
    out = np.lib.format.open_memmap(
      f"{path}.npy", mode="w+", dtype=np.float32, shape=(sum(map(len, arrays)), self.size)
    )
    place = 0
    for array in arrays:
      for start in range(0, len(array), CHUNK):
        chunk = array[start : start + CHUNK]
        out[place : place + len(chunk)] = chunk
        place += len(chunk)
    out.flush()


def write_vectors(part: pathlib.Path, rows: int, size: int, batches: Iterable[pa.RecordBatch]) -> tuple[int, float]:
  """Writes a part of a table, and returns the number of its training vectors and the sum of their squared numbers.

  Args:
    part: the part's path without ending.
    rows: the number of vectors.
    size: the number of numbers of a vector.
    batches: the vectors: `value`, the key; `vector`, a list of fixed size; `training`, whether training has it.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq

  part.parent.mkdir(parents=True, exist_ok=True)
  keys: list[pa.Array] = []
  out = np.lib.format.open_memmap(f"{part}.npy", mode="w+", dtype=np.float32, shape=(rows, size))
  place, trained, squares = 0, 0, 0.0
  for batch in batches:
    vectors = batch["vector"].flatten().to_numpy().reshape(-1, size)
    training = batch["training"].to_numpy(zero_copy_only=False)
    out[place : place + len(vectors)] = vectors
    place += len(vectors)
    trained += int(training.sum())
    squares += float(np.square(vectors[training], dtype=np.float64).sum())
    keys.append(batch["value"])
  out.flush()
  pq.write_table(pa.table({"value": pa.chunked_array(keys, pa.string())}), f"{part}.parquet")
  return trained, squares


def fitted_scale(trained: int, squares: float, size: int) -> float:
  """Returns the scale of a field from the results of `write_vectors`."""
  return rounded_statistic(math.sqrt(squares / (trained * size))) or 1.0


def looked_up(fields: Sequence[Vectors], codes: np.ndarray) -> np.ndarray:
  """Returns the vectors of all vector fields, one after the other: float16 `[…, V]` of the codes `[…, fields]`."""
  found = [field.looked_up(codes[..., i], field.rows) for i, field in enumerate(fields)]
  return concatenated(found, codes.shape[:-1])


def concatenated(found: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
  """Returns the vectors of several fields, each `[*shape, size]`, as one array float16 `[*shape, V]`."""
  return np.concatenate(found, axis=-1) if found else np.zeros((*shape, 0), np.float16)


def _opened(part: pathlib.Path, size: int) -> np.ndarray:
  try:
    rows = np.load(f"{part}.npy", mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError) as error:
    raise DataError(f"{part}.npy is damaged ({error}); prepare the dataset again.") from error
  if rows.ndim != 2 or rows.shape[1] != size or rows.dtype != np.float32:
    raise DataError(
      f"{part}.npy holds {rows.dtype} of the shape {rows.shape}, not float32 [rows, {size}]; prepare again."
    )
  return np.asarray(rows)
