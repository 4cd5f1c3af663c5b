"""Encodes categorical event fields as codes and user labels as classes.

The encoders of fields are fitted on the training period (or the training users) only, those for labels on the training
users.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from supermoe_jax.batch import ABSENT, FIRST_VALUE, UNKNOWN
from supermoe_jax.data.encoding import factors, vectors
from supermoe_jax.data.encoding.factors import Factors
from supermoe_jax.data.encoding.numeric import NumberEncoder, Numeric, number_encoder
from supermoe_jax.data.encoding.vectors import Vectors
from supermoe_jax.errors import DataError

if TYPE_CHECKING:  # encoding a value takes NumPy alone; only tables and files of them take Arrow
  import pyarrow as pa


def _bucket(value: str, buckets: int, half: str = "lower") -> int:
  """Returns the bucket of a value, from 0, by 64 bits of MD5 as in DuckDB: the same on every machine and version."""
  digest = hashlib.md5(value.encode()).digest()
  return int.from_bytes(digest[8:] if half == "lower" else digest[:8], "little") % buckets


def bucket_sql(column: str, buckets: int, half: str = "lower") -> str:
  """Returns the SQL of the bucket, from 0, that the value of a column is hashed into."""
  return f"md5_number_{half}({column}) % {buckets}"


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """The values of a field, most frequent first, ties by value; the value at index i has the code i + 2.

  Other values have the code 1 or, with buckets, one of the codes behind the codes of the values.

  Attributes:
    values: the values as text.
    counts: int64, the count of each value in the training period.
    buckets: the number of codes that other values are hashed into; 0: none.
  """

  values: list[str]
  counts: np.ndarray
  buckets: int = 0

  @property
  def n_codes(self) -> int:
    """Returns the number of codes, including absent and out of vocabulary."""
    return self._first_bucket + self.buckets

  @property
  def _first_bucket(self) -> int:
    return len(self.values) + FIRST_VALUE

  @functools.cached_property
  def _codes(self) -> dict[str, int]:
    return {v: i for i, v in enumerate(self.values, FIRST_VALUE)}

  def code(self, value: str | None) -> int:
    """Returns the code of a value; None is absent."""
    if value is None:
      return ABSENT
    if self.buckets and value not in self._codes:
      return self._first_bucket + _bucket(value, self.buckets)
    return self._codes.get(value, UNKNOWN)

  def table(self) -> pa.Table:
    """Returns a table with the columns `value` and `code`, for a join."""
    import pyarrow as pa

    return pa.table(
      {"value": pa.array(self.values, pa.string()), "code": np.arange(len(self.values), dtype=np.int32) + FIRST_VALUE}
    )

  def code_sql(self, column: str, table: str) -> str:
    """Returns the SQL of a column's code; `table` names the table `table()`, joined by an outer join on `value`."""
    unknown = f"{self._first_bucket} + {bucket_sql(column, self.buckets)}" if self.buckets else f"{UNKNOWN}"
    return f"CASE WHEN {column} IS NULL THEN {ABSENT} ELSE coalesce({table}.code, {unknown}) END"

  def bucket_sql(self, column: str) -> str:
    """Returns the SQL of the bucket, from 0, of a column's value that is out of vocabulary."""
    return bucket_sql(column, self.buckets)


@dataclasses.dataclass(frozen=True)
class Hashing:
  """Encoder that hashes values into buckets: nothing is out of vocabulary, but values may share a code.

  Attributes:
    buckets: the number of buckets of this part.
    part: the index of this part; a value of another part is absent here, and has a code there.
    parts: the number of equally large parts that all buckets are divided into.
    half: the half of the value's MD5, 64 bits, that chooses the bucket; the halves are independent.
  """

  buckets: int
  part: int = 0
  parts: int = 1
  half: str = "lower"

  @property
  def n_codes(self) -> int:
    """Returns the number of codes, including absent and out of vocabulary."""
    return self.buckets + FIRST_VALUE

  def code(self, value: str | None) -> int:
    """Returns the code of a value; None is absent."""
    if value is None:
      return ABSENT
    part, bucket = divmod(_bucket(value, self.buckets * self.parts, self.half), self.buckets)
    return FIRST_VALUE + bucket if part == self.part else ABSENT

  def bucket_sql(self, column: str) -> str:
    """Returns the SQL of the bucket, from 0, of a column's value; NULL for a value of another part."""
    bucket = bucket_sql(column, self.buckets * self.parts, self.half)
    if self.parts == 1:
      return bucket
    return f"CASE WHEN ({bucket}) // {self.buckets} = {self.part} THEN ({bucket}) % {self.buckets} END"

  def codes_sql(self, values: str) -> str:
    """Returns a query of the columns `value` and `code`, for a join; `values` is a query of distinct values."""
    codes = f"SELECT value, ({FIRST_VALUE} + {self.bucket_sql('value')})::INTEGER AS code FROM ({values})"
    return f"SELECT value, code FROM ({codes}) WHERE code IS NOT NULL"  # values of other parts need no row

  def code_sql(self, column: str, table: str) -> str:
    """Returns the SQL of a column's code; `table` names the query `codes_sql`, joined by an outer join on `value`."""
    del column
    return f"coalesce({table}.code, {ABSENT})"


@dataclasses.dataclass(frozen=True)
class Classes:
  """The classes of a user label, most frequent among the training users first, ties by value.

  Attributes:
    values: the classes as text; the label is the index.
    counts: the number of training users of each class.
  """

  values: tuple[str, ...]
  counts: tuple[int, ...]


Categorical = Vocabulary | Hashing | Vectors
LabelEncoder = Classes | Numeric


@dataclasses.dataclass(frozen=True)
class Encoders:
  """Encoders of all fields, in config order, of the user labels that need one (classes, numbers), and factors."""

  categorical: Mapping[str, Categorical]
  numeric: Mapping[str, NumberEncoder]
  labels: Mapping[str, LabelEncoder] = dataclasses.field(default_factory=dict)
  factors: Mapping[str, Factors] = dataclasses.field(default_factory=dict)

  def save(self, path: pathlib.Path) -> None:
    """Writes the vocabularies as Parquet (value, count), the vectors, and the rest as `encoders.json`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.mkdir(parents=True, exist_ok=True)
    saved: dict[str, Any] = {
      "categorical": {},
      "numeric": {n: dataclasses.asdict(s) for n, s in self.numeric.items()},
      "labels": {n: dataclasses.asdict(e) for n, e in self.labels.items()},
    }
    for name, encoder in self.categorical.items():
      if isinstance(encoder, Hashing):
        # Default values are not written, so that older datasets keep their encoding hash.
        plain = dataclasses.asdict(Hashing(encoder.buckets))
        own = {k: v for k, v in dataclasses.asdict(encoder).items() if k == "buckets" or v != plain[k]}
        saved["categorical"][name] = {"kind": "hash", **own}
        continue
      if isinstance(encoder, Vectors):
        file = f"{vectors.DIRECTORY}/{urllib.parse.quote(name, safe='')}"
        encoder.save(path / file)
        # The number of vectors is not written: an append may add some, and all codes keep their meaning.
        saved["categorical"][name] = {"kind": "vector", "file": file, "size": encoder.size, "scale": encoder.scale}
        continue
      file = f"{urllib.parse.quote(name, safe='')}.parquet"
      pq.write_table(pa.table({"value": pa.array(encoder.values, pa.string()), "count": encoder.counts}), path / file)
      # A vocabulary without buckets does not name them, so that older datasets keep their encoding hash.
      buckets = {"buckets": encoder.buckets} if encoder.buckets else {}
      saved["categorical"][name] = {"kind": "vocabulary", "file": file, **buckets}
    if self.factors:  # not named where there are none, so that older datasets keep their encoding hash
      saved["factors"] = {name: of.sha256 for name, of in self.factors.items()}
    factors.save_factors(path, self.factors)
    (path / "encoders.json").write_text(json.dumps(saved, indent=1) + "\n")

  @classmethod
  def load(cls, path: pathlib.Path) -> Encoders:
    """Reads the encoders that `save` wrote.

    Raises:
      DataError: the directory holds no encoders.
    """
    import pyarrow.parquet as pq

    file = path / "encoders.json"
    if not file.is_file():
      raise DataError(f"{path} holds no encoders (no {file.name}); prepare the dataset again.")
    saved = json.loads(file.read_text())
    categorical: dict[str, Categorical] = {}
    for name, spec in saved["categorical"].items():
      if spec["kind"] == "hash":
        categorical[name] = Hashing(**{k: v for k, v in spec.items() if k != "kind"})
      elif spec["kind"] == "vector":
        categorical[name] = Vectors(spec["size"], spec["scale"], (path / spec["file"],))
      else:
        table = pq.read_table(path / spec["file"])
        values, counts = table["value"].to_pylist(), table["count"].to_numpy()
        categorical[name] = Vocabulary(values, counts, spec.get("buckets", 0))
    labels: dict[str, LabelEncoder] = {
      n: Classes(tuple(e["values"]), tuple(e["counts"])) if "values" in e else Numeric(**e)
      for n, e in saved["labels"].items()
    }
    numeric = {n: number_encoder(s) for n, s in saved["numeric"].items()}
    return cls(categorical, numeric, labels, factors.load_factors(path, saved.get("factors", ())))
