"""Encoders of event fields, fitted on the training period (or the training users) only, and of user labels, fitted on
the training users."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from supermoe_jax import config
from supermoe_jax.data.events import EventLog
from supermoe_jax.data.numeric import MAX_KNOTS, NumberEncoder, Numeric, Quantile, number_encoder
from supermoe_jax.data.readers import DataError

ABSENT, UNKNOWN, FIRST_VALUE = 0, 1, 2  # codes of no value and of a value out of vocabulary; values follow


def _bucket(value: str, buckets: int) -> int:
  """The bucket of a value, from 0, by the lower half of MD5 as DuckDB has it: the same on every machine, in every
  version."""
  return int.from_bytes(hashlib.md5(value.encode()).digest()[8:], "little") % buckets


def _bucket_sql(column: str, buckets: int) -> str:
  return f"md5_number_lower({column}) % {buckets}"


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """The values of a field, most frequent first, ties by value; the value at index i has the code i + 2.

  Values that it does not hold have the code 1 or, with buckets, one of the codes that follow those of the values.

  Attributes:
    values: the values as text.
    counts: int64, how often each occurs in the training period.
    buckets: how many codes other values are hashed into; 0: none.
  """

  values: list[str]
  counts: np.ndarray
  buckets: int = 0

  @property
  def n_codes(self) -> int:
    """The number of codes, absent and out of vocabulary included."""
    return self._first_bucket + self.buckets

  @property
  def _first_bucket(self) -> int:
    return len(self.values) + FIRST_VALUE

  @functools.cached_property
  def _codes(self) -> dict[str, int]:
    return {v: i for i, v in enumerate(self.values, FIRST_VALUE)}

  def code(self, value: str | None) -> int:
    """The code of a value; None is absent."""
    if value is None:
      return ABSENT
    if self.buckets and value not in self._codes:
      return self._first_bucket + _bucket(value, self.buckets)
    return self._codes.get(value, UNKNOWN)

  def table(self) -> pa.Table:
    """The columns `value` and `code`, for a join."""
    return pa.table(
      {"value": pa.array(self.values, pa.string()), "code": np.arange(len(self.values), dtype=np.int32) + FIRST_VALUE}
    )

  def code_sql(self, column: str, table: str) -> str:
    """The SQL of a column's code; `table` is `table()`, joined by an outer join on its `value`."""
    unknown = f"{self._first_bucket} + {_bucket_sql(column, self.buckets)}" if self.buckets else f"{UNKNOWN}"
    return f"CASE WHEN {column} IS NULL THEN {ABSENT} ELSE coalesce({table}.code, {unknown}) END"


@dataclasses.dataclass(frozen=True)
class Hashing:
  """Values hashed into buckets: nothing is out of vocabulary, but values may share a code."""

  buckets: int

  @property
  def n_codes(self) -> int:
    """The number of codes, absent and out of vocabulary included."""
    return self.buckets + FIRST_VALUE

  def code(self, value: str | None) -> int:
    """The code of a value; None is absent."""
    return ABSENT if value is None else FIRST_VALUE + _bucket(value, self.buckets)

  def table(self) -> None:
    """A hash needs no table."""

  def code_sql(self, column: str, table: str) -> str:
    """The SQL of a column's code."""
    del table
    return f"CASE WHEN {column} IS NULL THEN {ABSENT} ELSE {FIRST_VALUE} + {_bucket_sql(column, self.buckets)} END"


@dataclasses.dataclass(frozen=True)
class Classes:
  """The classes of a user label, most frequent among the training users first, ties by value.

  Attributes:
    values: the classes as text; the label is the index.
    counts: how many training users each has.
  """

  values: tuple[str, ...]
  counts: tuple[int, ...]


Categorical = Vocabulary | Hashing
LabelEncoder = Classes | Numeric


@dataclasses.dataclass(frozen=True)
class Encoders:
  """The encoder of each field, in config order, and of each user label that needs one (classes, numbers)."""

  categorical: Mapping[str, Categorical]
  numeric: Mapping[str, NumberEncoder]
  labels: Mapping[str, LabelEncoder] = dataclasses.field(default_factory=dict)

  def save(self, path: pathlib.Path) -> None:
    """Writes the vocabularies as Parquet (value, count) and the rest as `encoders.json` into a directory."""
    path.mkdir(parents=True, exist_ok=True)
    saved: dict[str, Any] = {
      "categorical": {},
      "numeric": {n: dataclasses.asdict(s) for n, s in self.numeric.items()},
      "labels": {n: dataclasses.asdict(e) for n, e in self.labels.items()},
    }
    for name, encoder in self.categorical.items():
      if isinstance(encoder, Hashing):
        saved["categorical"][name] = {"kind": "hash", "buckets": encoder.buckets}
        continue
      file = f"{urllib.parse.quote(name, safe='')}.parquet"
      pq.write_table(pa.table({"value": pa.array(encoder.values, pa.string()), "count": encoder.counts}), path / file)
      # Without buckets nothing is said of them: datasets that had none before keep their encoding hash.
      buckets = {"buckets": encoder.buckets} if encoder.buckets else {}
      saved["categorical"][name] = {"kind": "vocabulary", "file": file, **buckets}
    (path / "encoders.json").write_text(json.dumps(saved, indent=1) + "\n")

  @classmethod
  def load(cls, path: pathlib.Path) -> Encoders:
    """Reads what `save` wrote.

    Raises:
      DataError: the directory holds no encoders.
    """
    file = path / "encoders.json"
    if not file.is_file():
      raise DataError(f"{path} holds no encoders (no {file.name}); prepare the dataset again.")
    saved = json.loads(file.read_text())
    categorical: dict[str, Categorical] = {}
    for name, spec in saved["categorical"].items():
      if spec["kind"] == "hash":
        categorical[name] = Hashing(spec["buckets"])
      else:
        table = pq.read_table(path / spec["file"])
        values, counts = table["value"].to_pylist(), table["count"].to_numpy()
        categorical[name] = Vocabulary(values, counts, spec.get("buckets", 0))
    labels: dict[str, LabelEncoder] = {
      n: Classes(tuple(e["values"]), tuple(e["counts"])) if "values" in e else Numeric(**e)
      for n, e in saved["labels"].items()
    }
    return cls(categorical, {n: number_encoder(s) for n, s in saved["numeric"].items()}, labels)


def fit(log: EventLog, data: config.Data, labels: Mapping[str, LabelEncoder] | None = None) -> Encoders:
  """Fits the encoders of all fields on the events of the training period; those of user labels are given.

  Raises:
    DataError: a field has no value in the training period, or none that is frequent enough.
  """
  categorical: dict[str, Categorical] = {}
  numeric: dict[str, NumberEncoder] = {}
  for name, field in data.fields.items():
    if field.kind == "numeric":
      numeric[name] = _fit_quantile(log, name) if field.encoding == "quantile" else _fit_numeric(log, name)
    elif field.kind == "hash":
      categorical[name] = _fit_hashing(log, name, field)
    else:
      categorical[name] = _fit_vocabulary(log, name, field)
  return Encoders(categorical, numeric, labels or {})


def _fit_vocabulary(log: EventLog, name: str, field: config.Field) -> Vocabulary:
  counted = log.arrow(
    f"SELECT value, count(*) AS count FROM ({log.values_sql(name)}) WHERE training GROUP BY value "
    f"HAVING count >= {field.min_count} ORDER BY count DESC, value LIMIT {field.size}"
  )
  if not counted.num_rows:
    ((present,),) = log.query(f"SELECT count({log.columns[name]}) FROM events WHERE training")
    if present:
      raise DataError(
        f"No value of field {name!r} occurs {field.min_count} times in training; lower "
        f"config.data.fields.{name}.min_count."
      )
    raise _no_value(log, name)
  return Vocabulary(counted["value"].to_pylist(), counted["count"].to_numpy(), field.buckets)


def _fit_hashing(log: EventLog, name: str, field: config.Field) -> Hashing:
  if not log.query(f"SELECT 1 FROM events WHERE training AND {log.columns[name]} IS NOT NULL LIMIT 1"):
    raise _no_value(log, name)
  return Hashing(field.size)


def _fit_numeric(log: EventLog, name: str) -> Numeric:
  column = log.columns[name]
  ((mean, std),) = log.query(f"SELECT avg({column}), stddev_pop({column}) FROM events WHERE training")
  if mean is None:
    raise _no_value(log, name)
  return Numeric.of(mean, std)


def _fit_quantile(log: EventLog, name: str) -> Quantile:
  """Takes the first number of each of equally large shares of the ranks as a knot, and the last number of all."""
  shares = MAX_KNOTS - 1
  column = log.columns[name]
  values = f"SELECT {column} AS value, count(*) AS n FROM events WHERE training AND {column} IS NOT NULL GROUP BY value"
  ranked = f"SELECT value, (sum(n) OVER (ORDER BY value) - n / 2) / sum(n) OVER () AS rank FROM ({values})"
  shared = f"SELECT *, floor(rank * {shares}) AS share, max(value) OVER () AS last FROM ({ranked})"
  counted = log.arrow(
    f"SELECT value, rank FROM (SELECT *, lag(share) OVER (ORDER BY value) AS before FROM ({shared})) "
    "WHERE share IS DISTINCT FROM before OR value = last ORDER BY value"
  )
  if not counted.num_rows:
    raise _no_value(log, name)
  return Quantile.of(counted["value"].to_pylist(), counted["rank"].to_pylist())


def _no_value(log: EventLog, name: str) -> DataError:
  ((later,),) = log.query(f"SELECT count({log.columns[name]}) FROM events")
  where = (
    "of the training users, and {} of the others"
    if log.data.split.mode == "user"
    else "in the training period, and {} after it"
  )
  return DataError(
    f"Field {name!r} (column {log.data.fields[name].column or name!r}) has no value at all {where.format(later)}; "
    f"correct config.data.fields.{name}.column, or leave the field out."
  )


def unseen(log: EventLog, encoders: Encoders) -> dict[str, dict[str, Any]]:
  """Reports how well the encoders cover the log: of each categorical field, what training could not teach.

  Returns: of each field its `kind`, `codes`, and `oov_training` and `oov_after`, the shares of the values present that
  are out of vocabulary (None without values), those in buckets included. Where values are hashed `values`, the distinct
  ones in training that are, and `colliding`, the share of them whose code is not theirs alone (None without any). Of a
  field of many `values_cut`, the values of lists that are longer than the field keeps.
  """
  report: dict[str, dict[str, Any]] = {}
  for name, encoder in encoders.categorical.items():
    present = f"({log.values_sql(name)})"
    hashed = _hashed(log, encoder, present) if encoder.buckets else {}
    if isinstance(encoder, Hashing):
      report[name] = {"kind": "hash", "codes": encoder.n_codes, "oov_training": 0.0, "oov_after": 0.0, **hashed}
      continue
    shares = dict(
      log.query(
        f"SELECT training, avg((known.value IS NULL)::INTEGER) FROM {present} p "
        "LEFT JOIN known ON p.value = known.value GROUP BY training",
        known=encoder.table(),
      )
    )
    report[name] = {
      "kind": "vocabulary",
      "codes": encoder.n_codes,
      "oov_training": shares.get(True),
      "oov_after": shares.get(False),
      **hashed,
    }
  for name, facts in report.items():
    if many := log.data.fields[name].many:
      ((cut,),) = log.query(
        f"SELECT coalesce(sum(greatest(len({log.columns[name]}) - {many}, 0)), 0)::BIGINT FROM events"
      )
      facts["values_cut"] = cut
  return report


def _hashed(log: EventLog, encoder: Categorical, present: str) -> dict[str, Any]:
  """How many distinct values of `present`, a query of `value` and `training`, are hashed in training, and the share of
  them that share a code."""
  known = encoder.table()
  join, tables = ("", {}) if known is None else ("ANTI JOIN known USING (value)", {"known": known})
  bucket = _bucket_sql("value", encoder.buckets)
  ((values, colliding),) = log.query(
    "SELECT coalesce(sum(n), 0)::BIGINT, coalesce(sum(n) FILTER (n > 1), 0)::BIGINT FROM ("
    f"SELECT {bucket} AS bucket, count(DISTINCT value) AS n FROM {present} {join} WHERE training GROUP BY bucket)",
    **tables,
  )
  return {"values": values, "colliding": colliding / values if values else None}
