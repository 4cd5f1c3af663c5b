"""Encoders fitted on an event log, on the training period (or the training users) only, and how well they cover it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supermoe_jax import config
from supermoe_jax.data.events import EventLog
from supermoe_jax.data.numeric import MAX_KNOTS, NumberEncoder, Numeric, Quantile
from supermoe_jax.data.readers import DataError
from supermoe_jax.data.vocabulary import Categorical, Encoders, Hashing, LabelEncoder, Vocabulary, bucket_sql


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
  are out of vocabulary (None without values), those in buckets included; of a vocabulary also `values_training` and
  `values_after`, how many values are present, and `outside_training` and `outside_after`, how many of them are out of
  it. Where values are hashed `values`, the distinct ones in training that are, and `colliding`, the share of them whose
  code is not theirs alone (None without any). Of a field of many `values_cut`, the values of lists that are longer than
  the field keeps.
  """
  report: dict[str, dict[str, Any]] = {}
  for name, encoder in encoders.categorical.items():
    present = f"({log.values_sql(name)})"
    hashed = _hashed(log, encoder, present) if encoder.buckets else {}
    if isinstance(encoder, Hashing):
      report[name] = {"kind": "hash", "codes": encoder.n_codes, "oov_training": 0.0, "oov_after": 0.0, **hashed}
      continue
    counted = log.query(
      f"SELECT training, count(*), count_if(known.value IS NULL) FROM {present} p "
      "LEFT JOIN known ON p.value = known.value GROUP BY training",
      known=encoder.table(),
    )
    counts = {training: (n, outside) for training, n, outside in counted}
    report[name] = {"kind": "vocabulary", "codes": encoder.n_codes}
    for when, training in (("training", True), ("after", False)):
      report[name] |= share_outside(when, *counts.get(training, (0, 0)))
    report[name] |= hashed
  for name, facts in report.items():
    if log.data.fields[name].many:
      facts["values_cut"] = values_cut(log, name)
  return report


def values_cut(log: EventLog, name: str) -> int:
  """How many values of the lists of a field of many are not kept."""
  ((cut,),) = log.query(
    f"SELECT coalesce(sum(greatest(len({log.columns[name]}) - {log.data.fields[name].many}, 0)), 0)::BIGINT FROM events"
  )
  return cut


def share_outside(when: str, values: int, outside: int) -> dict[str, Any]:
  """What the report says of the values present in training, or after it, and of those out of vocabulary."""
  return {f"oov_{when}": outside / values if values else None, f"values_{when}": values, f"outside_{when}": outside}


def _hashed(log: EventLog, encoder: Categorical, present: str) -> dict[str, Any]:
  """How many distinct values of `present`, a query of `value` and `training`, are hashed in training, and the share of
  them that share a code."""
  known = encoder.table()
  join, tables = ("", {}) if known is None else ("ANTI JOIN known USING (value)", {"known": known})
  bucket = bucket_sql("value", encoder.buckets)
  ((values, colliding),) = log.query(
    "SELECT coalesce(sum(n), 0)::BIGINT, coalesce(sum(n) FILTER (n > 1), 0)::BIGINT FROM ("
    f"SELECT {bucket} AS bucket, count(DISTINCT value) AS n FROM {present} {join} WHERE training GROUP BY bucket)",
    **tables,
  )
  return {"values": values, "colliding": colliding / values if values else None}
