"""Fits encoders on the training part of an event log, and reports how well they cover the log."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE
from supermoe_jax.data.encoding import factors, vectors
from supermoe_jax.data.encoding.factors import Factors
from supermoe_jax.data.encoding.numeric import MAX_KNOTS, NumberEncoder, Numeric, Quantile
from supermoe_jax.data.encoding.vectors import Vectors
from supermoe_jax.data.encoding.vocabulary import Categorical, Encoders, Hashing, LabelEncoder, Vocabulary
from supermoe_jax.data.preparation.log_database import LogDatabase
from supermoe_jax.data.preparation.log_statistics import FieldStatistics
from supermoe_jax.data.reading.field_sql import field_columns
from supermoe_jax.data.reading.vector_sql import vectors_table
from supermoe_jax.errors import DataError

FACTORED_USERS = 50_000  # the first ones in the order of the ids' hashes, so a sample


def fit_encoders(log: LogDatabase, data: config.Data, labels: Mapping[str, LabelEncoder] | None = None) -> Encoders:
  """Returns encoders fitted on the events of training; `labels` are the encoders of user labels.

  Raises:
    DataError: a field has no value in training, or none that is frequent enough or that factors can be fitted on.
  """
  categorical: dict[str, Categorical] = {}
  numeric: dict[str, NumberEncoder] = {}
  for name, field in data.fields.items():
    facts = log.facts.fields[name]
    if not facts.training:
      raise _no_value(data, name, facts)
    if field.kind == "numeric":
      quantile = field.encoding == "quantile"
      numeric[name] = _fit_quantile(log, name) if quantile else Numeric.of(facts.mean, facts.deviation)
    elif field.kind == "hash":
      categorical[name] = Hashing(field.size, field.part, field.parts, field.half)
    elif field.kind == "vector":
      categorical[name] = _fit_vectors(log, name)
    else:
      categorical[name] = _fit_vocabulary(log, field.shares or name, data.fields[field.shares or name])
  for name in categorical:
    categorical[name] = categorical[data.fields[name].shares or name]
  fitted = {name: _fit_factors(log, name, categorical[name], numeric) for name in data.aggregates.factors}
  return Encoders(categorical, numeric, labels or {}, fitted)


def _fit_factors(log: LogDatabase, name: str, encoder: Categorical, numeric: Mapping[str, NumberEncoder]) -> Factors:
  """Returns the factors of a field, fitted on the events of training of `FACTORED_USERS` users at most."""
  assert not isinstance(encoder, Vectors)  # config.resolve checked
  column, field = field_columns(log.data)[name], log.data.fields[name]
  value = f"unnest({column}[:{field.many}])" if field.many else column
  number, of_first, order = "NULL", "", "uid"
  numbered = log.data.aggregates.factor_numbers.get(name)
  if numbered is not None:  # finding the first events takes as long as all the rest, so nothing else asks for them
    of = numeric[numbered]
    assert isinstance(of, Numeric)  # config.resolve checked
    number = of.deviations_sql(field_columns(log.data)[numbered])
    of_first = (
      ", min(time) AS first_time, first(ord ORDER BY time, ord) AS first_ord, "
      "first(number ORDER BY time, ord) AS number"
    )
    order = "uid, first_time, first_ord"
  events = f'{log.events_sql} JOIN ordered_users USING ("user") WHERE training AND uid < {FACTORED_USERS}'
  counted = log.arrow(
    f"SELECT uid, value, count(*) AS n{of_first} FROM "
    f"(SELECT uid, {value} AS value, {number} AS number, time, ord FROM {events}) WHERE value IS NOT NULL "
    f"GROUP BY uid, value ORDER BY {order}, value"
  )
  # All values together may have more bytes than the usual type of text can hold.
  values = counted["value"].cast(pa.large_string()).combine_chunks().dictionary_encode()
  code = np.array([encoder.code(v) for v in values.dictionary.to_pylist()], np.int64)[values.indices.to_numpy()]
  known = code >= FIRST_VALUE
  user, count, code = counted["uid"].to_numpy()[known], counted["n"].to_numpy()[known], code[known]
  if not len(user):
    raise DataError(
      f"config.data.aggregates.factors: none of the {FACTORED_USERS:,} users that factors are fitted on has a known "
      f"value of field {name!r} in training; leave the field out of the factors."
    )
  # Values may share a code, as those in a bucket do. With numbers a user's rows are in the order of their first events.
  pair, first, place = np.unique(user * encoder.n_codes + code, return_index=True, return_inverse=True)
  summed = np.bincount(place.reshape(-1), count).astype(np.int64)
  user, code = np.divmod(pair, encoder.n_codes)
  numbers = None if numbered is None else counted["number"].to_numpy()[known][first].astype(np.float64)
  return factors.fit_factors(user, code, summed, encoder.n_codes, log.data.aggregates.factor_size, numbers)


def _fit_vocabulary(log: LogDatabase, name: str, field: config.Field) -> Vocabulary:
  counted = log.arrow(
    f"SELECT value, n FROM ({log.values_sql(name)}) WHERE training AND n >= {field.min_count} "
    f"ORDER BY n DESC, value LIMIT {field.size}"
  )
  if not counted.num_rows:
    raise DataError(
      f"No value of field {name!r} occurs {field.min_count} times in training; lower "
      f"config.data.fields.{name}.min_count."
    )
  return Vocabulary(counted["value"].to_pylist(), counted["n"].to_numpy(), field.buckets)


def _fit_quantile(log: LogDatabase, name: str) -> Quantile:
  """Returns a quantile encoder, fitted on training.

  Its knots are the first number of each of equal shares of the ranks, and the last number.
  """
  shares = MAX_KNOTS - 1
  values = f"SELECT value, n FROM ({log.values_sql(name)}) WHERE training"
  ranked = f"SELECT value, (sum(n) OVER (ORDER BY value) - n / 2) / sum(n) OVER () AS rank FROM ({values})"
  shared = f"SELECT *, floor(rank * {shares}) AS share, max(value) OVER () AS last FROM ({ranked})"
  counted = log.arrow(
    f"SELECT value, rank FROM (SELECT *, lag(share) OVER (ORDER BY value) AS before FROM ({shared})) "
    "WHERE share IS DISTINCT FROM before OR value = last ORDER BY value"
  )
  return Quantile.of(counted["value"].to_pylist(), counted["rank"].to_pylist())


def _fit_vectors(log: LogDatabase, name: str) -> Vectors:
  """Returns the table of a field's vectors in the events, the most frequent first; its scale is that of training."""
  part, size = _vector_file(log, name), log.data.fields[name].size
  trained, squares = _write_vectors(log, name, part)
  return Vectors(size, vectors.fitted_scale(trained, squares, size), (part,))


def extend_vectors(log: LogDatabase, name: str, encoder: Vectors) -> Vectors:
  """Returns the table with the further vectors of a log behind it; codes and scale stay."""
  part = _vector_file(log, name)
  _write_vectors(log, name, part, known=encoder.table())
  return dataclasses.replace(encoder, parts=(*encoder.parts, part))


def _vector_file(log: LogDatabase, name: str) -> pathlib.Path:
  return log.scratch / vectors_table(field_columns(log.data)[name])


def _write_vectors(log: LogDatabase, name: str, part: pathlib.Path, **known: Any) -> tuple[int, float]:
  """Writes the vectors in the events, without the `known` ones; returns what `vectors.write_vectors` does."""
  table, size = vectors_table(field_columns(log.data)[name]), log.data.fields[name].size
  values = (
    "SELECT value, sum(n) AS n, bool_or(training) AS training FROM "
    f"({log.values_sql(name)}) {'ANTI JOIN known USING (value)' if known else ''} GROUP BY value"
  )
  ((rows,),) = log.query(f"SELECT count(*) FROM ({values})", **known)
  if not rows:  # the table itself may be missing: no file has the field's column
    return vectors.write_vectors(part, 0, size, ())
  found = f"SELECT value, vector, training FROM ({values}) JOIN {table} USING (value) ORDER BY n DESC, value"
  with log.row_batches(found, vectors.CHUNK, **known) as batches:
    return vectors.write_vectors(part, rows, size, batches)


def _no_value(data: config.Data, name: str, facts: FieldStatistics) -> DataError:
  where = (
    "of the training users, and {} of the others"
    if data.split.mode == "user"
    else "in the training period, and {} after it"
  )
  return DataError(
    f"Field {name!r} (column {data.fields[name].column or name!r}) has no value at all {where.format(facts.present)}; "
    f"correct config.data.fields.{name}.column, or leave the field out."
  )


def coverage_of(log: LogDatabase, encoders: Encoders) -> dict[str, dict[str, Any]]:
  """Returns a report on how well the encoders cover the log, for each categorical field.

  Returns: for each field `kind`, `codes`, and the shares `oov_training` and `oov_after` of the present values that are
    out of vocabulary, values in buckets included (None without values). A vocabulary also has `values_training` and
    `values_after`, the numbers of present values, and `outside_training` and `outside_after`, the numbers out of
    vocabulary. A field with hashed values has `values`, the number of distinct ones in training, and `colliding`, the
    share of them that share their code (None without any). A field of lists has `values_cut`, the number of values
    beyond the length that the field keeps. A field of vectors has the entries of `vector_facts`.
  """
  report: dict[str, dict[str, Any]] = {}
  for name, encoder in encoders.categorical.items():
    if isinstance(encoder, Vectors):
      report[name] = vector_facts(encoder)
      continue
    values = f"({log.values_sql(name)})"
    hashed = _hashed(log, encoder, values) if encoder.buckets else {}
    if isinstance(encoder, Hashing):
      report[name] = {"kind": "hash", "codes": encoder.n_codes, "oov_training": 0.0, "oov_after": 0.0, **hashed}
      continue
    counted = log.query(
      "SELECT training, sum(n)::BIGINT, coalesce(sum(n) FILTER (known.value IS NULL), 0)::BIGINT "
      f"FROM {values} v LEFT JOIN known ON v.value = known.value GROUP BY training",
      known=encoder.table(),
    )
    counts = {training: (n, outside) for training, n, outside in counted}
    report[name] = {"kind": "vocabulary", "codes": encoder.n_codes}
    for when, training in (("training", True), ("after", False)):
      report[name] |= share_outside(when, *counts.get(training, (0, 0)))
    report[name] |= hashed
  for name, facts in report.items():
    if log.data.fields[name].many:
      facts["values_cut"] = log.facts.fields[name].cut
  return report


def vector_facts(encoder: Vectors) -> dict[str, Any]:
  """Returns the report's entry of a field of vectors: `size`, `scale`, and `clipped`, the number of clipped vectors."""
  facts = {"kind": "vector", "codes": encoder.n_codes, "oov_training": 0.0, "oov_after": 0.0}
  return {**facts, "size": encoder.size, "scale": encoder.scale, "clipped": encoder.clipped}


def share_outside(when: str, values: int, outside: int) -> dict[str, Any]:
  """Returns the report's entries on the values present in training, or after it, and on those out of vocabulary."""
  return {f"oov_{when}": outside / values if values else None, f"values_{when}": values, f"outside_{when}": outside}


def _hashed(log: LogDatabase, encoder: Vocabulary | Hashing, values: str) -> dict[str, Any]:
  """Returns the number of distinct values that are hashed in training, and the share of them that share a code.

  `values` is a query as `LogDatabase.values_sql` returns it.
  """
  known = encoder.table() if isinstance(encoder, Vocabulary) else None
  join, tables = ("", {}) if known is None else ("ANTI JOIN known USING (value)", {"known": known})
  ((distinct, colliding),) = log.query(
    "SELECT coalesce(sum(n), 0)::BIGINT, coalesce(sum(n) FILTER (n > 1), 0)::BIGINT FROM ("
    f"SELECT {encoder.bucket_sql('value')} AS bucket, count(*) AS n FROM {values} {join} WHERE training "
    "GROUP BY bucket HAVING bucket IS NOT NULL)",
    **tables,
  )
  return {"values": distinct, "colliding": colliding / distinct if distinct else None}
