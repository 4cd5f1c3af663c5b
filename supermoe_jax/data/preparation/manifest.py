"""Makes the manifest of a dataset: its config, counts of the log, encoders' coverage, and statistics of the records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from supermoe_jax import config
from supermoe_jax.config import format_time
from supermoe_jax.data.dataset.dataset import FORMAT_VERSION
from supermoe_jax.data.encoding.splits import SPLITS
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.format.shard_files import Shard
from supermoe_jax.data.format.stray_rows import StrayTimes
from supermoe_jax.data.preparation import losses
from supermoe_jax.data.preparation.null_word_counts import null_word_warnings
from supermoe_jax.data.preparation.outlying_numbers import OutlyingNumbers
from supermoe_jax.data.preparation.record_counts import RecordCounts

# The beginnings of the DuckDB types of user ids that outputs write as integers again, if every id is an integer of 64
# bits. Every id of a signed integer type is one.
INTEGER_TYPES = (
  "TINYINT",
  "SMALLINT",
  "INTEGER",
  "BIGINT",
  "UTINYINT",
  "USMALLINT",
  "UINTEGER",
  "UBIGINT",
  "HUGEINT",
  "DOUBLE",
  "DECIMAL",
)

# The manifest's name for this kind of directory.
KIND = "dataset"


class LogSummary(NamedTuple):
  """A summary of the event log as a whole.

  Attributes:
    counts: numbers of rows read, kept and dropped, and further findings; see `LogDatabase.counts`.
    first: the first event's time, microseconds since 1970 UTC.
    last: the last event's time.
    observed_until: the time up to which the log is complete.
    user_type: the DuckDB type of the user column.
    days: the number of events of each day, by the number of days since 1970; empty where an earlier version did not
      count them.
    strays: the rows with stray times; None if there are none.
  """

  counts: Mapping[str, Any]
  first: int
  last: int
  observed_until: int
  user_type: str
  days: Mapping[int, int]
  strays: StrayTimes | None


def make_manifest(
  cfg: config.Config,
  log: LogSummary,
  encoders: Encoders,
  encoder_path: pathlib.Path,
  tally: RecordCounts,
  *,
  files: Mapping[str, list[int]],
  shards: Sequence[Shard],
  fields: Mapping[str, Any],
  numbers: OutlyingNumbers,
  user_table: Mapping[str, Any],
  seconds: float,
  aggregates: Mapping[str, Any] | None = None,
  dated: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the manifest, without the entries that `integrity.write_manifest` adds.

  Args:
    cfg: the config of the run.
    log: the summary of the log.
    encoders: the encoders, saved in the directory `encoder_path`.
    encoder_path: see `encoders`.
    tally: the counts of all records.
    files: the stamps of the files that were read.
    shards: the shards of all records, in order.
    fields: how well the encoders cover the log; see `fitting.coverage_of`.
    numbers: the outlying numbers of the log.
    user_table: see `user_table.UserLabels.counts`.
    seconds: the duration of the preparation.
    aggregates: the statistics that standardise aggregates; None for the statistics of the tally.
    dated: see `DatedLabels.counts`; None if no task has a table of dated labels.
  """
  state = tally.state
  if aggregates is None:
    aggregates = tally.aggregate_statistics()
  manifest = {
    "kind": KIND,
    "format": FORMAT_VERSION,
    "files": dict(files),
    "config": config.to_dict(cfg),
    "data_hash": cfg.data_hash(),
    "users": tally.users,
    "events": tally.events,
    "shards": {shard.file: shard.users for shard in shards},
    "log": {
      "first": format_time(log.first),
      "last": format_time(log.last),
      "observed_until": format_time(log.observed_until),
    },
    "first_event_microseconds": log.first,
    "last_event_microseconds": log.last,
    "observed_until_microseconds": log.observed_until,
    "stray_times": None if log.strays is None else dataclasses.asdict(log.strays),
    "events_by_day": {str(day): n for day, n in log.days.items()},
    "source_user_type": log.user_type,
    "user_type": "text" if state["text_users"] or not log.user_type.startswith(INTEGER_TYPES) else "integer",
    "lengths": tally.length_percentiles(),
    "reading": dict(log.counts),
    "fields": dict(fields),
    "clipped_numbers": numbers.clipped,
    "hiding_numbers": numbers.hiding,
    "events_by_period": state["periods"],
    "snapshots": state["snapshots"],
    "snapshots_with_too_few_events": state["too_early"],
    "repeated_snapshots": state["repeated"],
    "users_without_training_events": state["without_training"],
    "users_without_snapshot": state["without_snapshot"],
    "user_table": dict(user_table),
    **({"dated_labels": dict(dated)} if dated else {}),
    "labels": tally.labels(encoders),
    "aggregates": dict(aggregates),
    "label_rates": tally.label_rates(),
    "encoding_hash": encoding_hash(encoder_path, aggregates),
    "tally": state,
    "seconds": round(seconds, 1),
  }
  splits = [split for split in SPLITS if cfg.data.split.has_snapshots(split)]
  alarming = [finding.text for finding in losses.find_losses(manifest) if finding.alarming]
  words = null_word_warnings(cfg, log.counts.get("null_words", {}), user_table)
  return {**manifest, "warnings": [*alarming, *tally.warnings(encoders, splits), *words]}


def encoding_hash(encoders: pathlib.Path, aggregates: Mapping[str, Any]) -> str:
  """Returns a hash that identifies how events and snapshots become numbers.

  Parameters trained with one encoding mean nothing in another.
  """
  digest = hashlib.sha256(json.dumps(aggregates).encode())
  digest.update((encoders / "encoders.json").read_bytes())
  for file in sorted(encoders.glob("*.parquet")):
    digest.update("\n".join(map(str, pq.read_table(file)["value"].to_pylist())).encode())
  return digest.hexdigest()[:16]
