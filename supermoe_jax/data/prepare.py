"""Preparation: from event files to a dataset directory.

Everything is written into a directory of another name, the manifest last, and then renamed: a directory under the
dataset's own name is whole, and a run that is cut leaves the one before untouched.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import pathlib
import shutil
import time as clock
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from tqdm import tqdm

from supermoe_jax import config
from supermoe_jax.data import integrity, replace, snapshots, user_table, vocabulary
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data import records as records_lib
from supermoe_jax.data.aggregates import Aggregator
from supermoe_jax.data.dataset import (
  FORMAT_VERSION,
  TFDS_NAME,
  TFDS_SPLIT,
  TFDS_VERSION,
  input_files,
  make_aggregator,
  make_comparison,
  make_schema,
)
from supermoe_jax.data.events import DataError, EventLog
from supermoe_jax.data.labels import Calendar
from supermoe_jax.data.records import Labeller, Record
from supermoe_jax.data.tally import Tally

# DuckDB's types of user ids that are written as integers again, if every id is one that 64 bits hold.
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
)

SHOWN_CLASSES = 5  # of a task, in the summary

# What the manifest calls such a directory.
KIND = "dataset"


class _Builder(tfds.core.GeneratorBasedBuilder):
  """Writes one record a user; TFDS shuffles them by key and writes the ArrayRecord shards."""

  name = TFDS_NAME
  VERSION = tfds.core.Version(TFDS_VERSION)

  def __init__(self, parts: Mapping[str, Any], records: Iterator[tuple[str, Record]], data_dir: str):
    self._parts, self._records = dict(parts), records
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self._parts))

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, Record]]]:
    del dl_manager
    return {TFDS_SPLIT: self._records}

  def _generate_examples(self, **kwargs: Any) -> Iterator[tuple[str, Record]]:
    raise AssertionError("the records are given to _split_generators")


def prepare(cfg: config.Config, *, overwrite: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
  """Prepares the dataset at `cfg.data.path` and returns its manifest; one prepared from the same config is kept.

  Raises:
    DataError: the data cannot be used, the disk is full, or another dataset is in the place.
    ConfigError: the split does not fit the log.
  """
  path = pathlib.Path(cfg.data.path)
  there = path.is_dir() and any(path.iterdir())
  if there and not overwrite and replace.manifest_kind(path) == KIND:
    return _existing(cfg, path, say)
  replace.check_replaceable(path, KIND, ("manifest.json", "encoders", TFDS_NAME))
  if path.with_name(path.name + ".incomplete").exists():
    say(f"removing {path}.incomplete, left by a preparation that did not finish")
  try:
    with replace.replacing(path) as work:
      return _prepare_into(cfg, work, say)
  except (OSError, duckdb.Error) as error:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else (str(error).splitlines() or [type(error).__name__])[0]
    free = shutil.disk_usage(path.parent).free / 2**30 if path.parent.exists() else 0.0
    remedy = (
      "Free space or set config.data.path to another disk" if full else "Check config.data.path and config.data.memory"
    )
    raise DataError(f"preparing {path} failed: {reason} ({free:.1f} GiB free). {remedy}; nothing was kept.") from error


def _existing(cfg: config.Config, path: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
  from supermoe_jax.data.dataset import Dataset

  dataset = Dataset(path)
  dataset.check_matches(cfg)
  dataset.check_files()
  say(f"{path} is already prepared from this configuration; --overwrite prepares it again")
  return dataset.manifest


def _prepare_into(cfg: config.Config, work: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
  begun = clock.monotonic()
  files = input_files(cfg)
  scratch = work / "scratch"
  scratch.mkdir()
  user_labels = user_table.UserLabels({}, {}, {})
  label_tasks = {n: t for n, t in cfg.tasks.items() if isinstance(t, config.UserLabel)}
  if cfg.data.users is not None and label_tasks:
    user_labels = user_table.read_user_table(cfg.data.users, label_tasks, cfg.data.split, cfg.data.on_bad_rows)
  say(f"reading {', '.join(cfg.data.sources)} …")
  with EventLog(cfg.data, scratch) as log:
    encoders = vocabulary.fit(log, cfg.data, user_labels.encoders)
    for name, task in cfg.tasks.items():
      if isinstance(task, config.FutureValues) and task.top > encoders.categorical[task.field].n_codes - 2:
        known = encoders.categorical[task.field].n_codes - 2
        raise config.ConfigError(
          f"config.tasks.{name}.top={task.top}, but {task.field} has only {known} values in training."
        )
    schema = make_schema(cfg, encoders)
    log_end = _log_end(cfg.data.split, log)
    times = None if cfg.data.split.mode == "leave_one_out" else labels_lib.calendar(cfg.data.split, log.start, log_end)
    tally = Tally(schema, cfg.labelled_tasks, encoders)
    seen_users: set[str] = set()
    labeller = Labeller(cfg, encoders, times, user_labels.values)
    for name in cfg.labelled_tasks:
      make_comparison(cfg, name, encoders)  # a sample space that cannot be evaluated is an error here already
    aggregator = make_aggregator(cfg.data, encoders)
    records = _records(cfg, log, encoders, times, labeller, user_labels.values, tally, seen_users, aggregator)
    with contextlib.redirect_stdout(io.StringIO()):
      tfds.disable_progress_bar()
      _Builder(records_lib.features(schema, cfg.labelled_tasks), records, str(work)).download_and_prepare()
    counts, unseen = dict(log.counts), vocabulary.unseen(log, encoders)
    first, last, user_type = log.start, log.end, log.user_type
  shutil.rmtree(scratch)
  shutil.rmtree(work / "downloads", ignore_errors=True)
  encoders.save(work / "encoders")
  aggregates = tally.aggregate_statistics()
  labelled = set().union(*user_labels.values.values())
  manifest = {
    "kind": KIND,
    "format": FORMAT_VERSION,
    "files": files,
    "config": config.to_dict(cfg),
    "data_hash": cfg.data_hash(),
    "users": len(tally.lengths),
    "events": int(sum(tally.lengths)),
    "log": {"first": labels_lib.iso(first), "last": labels_lib.iso(last), "observed_until": labels_lib.iso(log_end)},
    "last_event_microseconds": last,
    "user_type": "integer" if tally.integer_users and user_type in INTEGER_TYPES else "text",
    "lengths": {f"p{q}": float(np.percentile(tally.lengths, q)) for q in (0, 10, 25, 50, 75, 90, 99, 100)},
    "reading": counts,
    "fields": unseen,
    "events_by_period": tally.periods,
    "snapshots": tally.snapshots,
    "snapshots_with_too_few_events": tally.too_early,
    "repeated_snapshots": tally.repeated,
    "users_without_training_events": tally.without_training,
    "users_without_snapshot": tally.without_snapshot,
    "user_table": {**user_labels.counts, "labelled_users_without_events": len(labelled - seen_users)},
    "labels": tally.labels,
    "aggregates": aggregates,
    "label_rates": tally.label_rates(),
    "encoding_hash": _encoding_hash(work / "encoders", aggregates),
    "warnings": tally.warnings(),
    "seconds": round(clock.monotonic() - begun, 1),
  }
  return integrity.write_manifest(work, manifest)


def _encoding_hash(encoders: pathlib.Path, aggregates: Mapping[str, Any]) -> str:
  """Identifies how events and snapshots become numbers; parameters trained with one encoding mean nothing in
  another."""
  digest = hashlib.sha256(json.dumps(aggregates).encode())
  digest.update((encoders / "encoders.json").read_bytes())
  for file in sorted(encoders.glob("*.parquet")):
    digest.update("\n".join(map(str, pq.read_table(file)["value"].to_pylist())).encode())
  return digest.hexdigest()[:16]


def _records(
  cfg: config.Config,
  log: EventLog,
  encoders: vocabulary.Encoders,
  times: Calendar | None,
  labeller: Labeller,
  user_labels: Mapping[str, Mapping[str, float]],
  tally: Tally,
  seen_users: set[str],
  aggregator: Aggregator | None,
) -> Iterator[tuple[str, Record]]:
  """Yields each user's key and record, and counts it."""
  last_use = None
  tasks = cfg.labelled_tasks
  if times is not None and not any(isinstance(t, config.AT_EVENTS) for t in tasks.values()):
    horizons = [t.horizon_days for t in tasks.values() if isinstance(t, config.FutureEvent | config.FutureValues)]
    # Where all snapshots are the users' own, any event of the log may lie before one.
    last = times.snapshots[-1] if len(times.snapshots) else times.observed_until[labels_lib.TEST]
    last_use = int(last) + int(max(horizons, default=0) * config.MICROSECONDS_PER_DAY)
  with tqdm(total=log.counts["events"], unit=" events", unit_scale=True, desc="preparing", mininterval=1) as bar:
    for history in log.histories(encoders):
      owner = labels_lib.user_split(history.user, cfg.data.split)
      found, left_out = snapshots.user_snapshots(cfg.data.split, history, times, owner)
      labels = labeller(history, found, owner)
      if any(history.user in known for known in user_labels.values()):
        seen_users.add(history.user)
      tally.too_early += left_out.too_early
      tally.repeated += left_out.repeated
      tally.add(history, found, {n: of_task.labels for n, of_task in labels.items()}, last_use)
      train = found.split == labels_lib.TRAIN
      if aggregator is not None and train.any():
        tally.add_aggregates(aggregator(history, found.time[train], found.n_events[train]))
      bar.update(len(history.time))
      yield history.user, records_lib.make_record(history, found, labels, tasks, owner)


def _log_end(split: config.Split, log: EventLog) -> int:
  """The microsecond up to which the log is complete; users' own snapshots may follow its last event at once."""
  if split.log_end:
    return config.parse_time(split.log_end, "config.data.split.log_end")
  return log.end + 1 if split.mode == "user" else log.end


def render(manifest: Mapping[str, Any]) -> str:
  """Says in a few lines what was prepared and what to know about it."""
  lengths, reading = manifest["lengths"], manifest["reading"]
  by_user = manifest["config"]["data"]["split"]["mode"] == "user"
  lines = [
    f"{manifest['users']:,} users, {manifest['events']:,} events from {manifest['log']['first']} to "
    f"{manifest['log']['last']} (median {lengths['p50']:.0f} a user, at most {lengths['p100']:.0f}); "
    f"{reading['tie_rate']:.1%} share user and time",
    "snapshots: " + ", ".join(f"{n:,} {split}" for split, n in manifest["snapshots"].items()),
  ]
  if repeated := manifest.get("repeated_snapshots"):
    lines.append(f"  {repeated:,} at the moment of another (events at equal times) were left out")
  for task, splits in manifest["labels"].items():
    lines.append(f"  {task}: " + ", ".join(_label_text(split, count) for split, count in splits.items()))
  for task, count in manifest["user_table"].get("user_labels", {}).items():
    if unseen := count.get("unseen_class"):
      lines.append(f"  {task}: {unseen:,} users have a class that no training user has; they have no label")
    if dropped := count.get("dropped"):
      lines.append(f"  {task}: {dropped:,} users' values are no numbers; they have no label")
  for name, field in manifest["fields"].items():
    if field["oov_after"]:
      where = "of users outside training were unseen" if by_user else "after the training period were unseen"
      lines.append(f"field {name}: {field['oov_after']:.2%} of the values {where} in it")
    if cut := field.get("values_cut"):
      many = manifest["config"]["data"]["fields"][name]["many"]
      lines.append(f"field {name}: {cut:,} values of lists longer than {many} were cut off")
  lines += [f"warning: {w}" for w in manifest["warnings"]]
  lines.append(f"prepared in {manifest['seconds']:.0f} s: {manifest['config']['data']['path']}")
  return "\n".join(lines)


def _label_text(split: str, count: Mapping[str, Any]) -> str:
  text = f"{split} {count['known']:,} known"
  if "classes" in count:
    return f"{text} ({', '.join(f'{n:,} {value}' for value, n in list(count['classes'].items())[:SHOWN_CLASSES])})"
  if "mean" in count:
    return f"{text} (mean {count['mean']:.3g}, deviation {count['std']:.3g}, standardised)" if count["known"] else text
  kind = next(k for k in count if k != "known")
  return f"{text} ({count[kind]:,} {kind.replace('_', ' ')})"
