"""Adds new events to a prepared dataset: rewrites the records of users with new events and keeps all other records.

A rewritten record is what preparing all files at once would have given, except for the encoding. The encoding stays, so
that trained models remain usable: no code changes its meaning, and numbers and aggregates keep their statistics. A new
value is added behind the old ones of its vocabulary if it is frequent enough in the new training events, by the rule of
fitting. An earlier event with such a value keeps the out-of-vocabulary code. Every new vector is added to its table.

When the log's end moves, labels that were not wholly observed before may be observed now, for other users too. Then
their records are made again, and each record that differs is rewritten.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import pickle
import shutil
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from supermoe_jax import atomic_files
from supermoe_jax.config import format_time
from supermoe_jax.data.append import changed_labels, combined_counts, merge_histories, new_files
from supermoe_jax.data.append.dated_rows import AppendedRows, dated_file_stamps
from supermoe_jax.data.append.new_files import NewFiles
from supermoe_jax.data.append.rewritten_shards import RewrittenShards
from supermoe_jax.data.dataset.dataset import USERS, Dataset, read_users
from supermoe_jax.data.encoding import histories
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.splits import user_hash_sql
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.format import integrity, shard_files
from supermoe_jax.data.format.stray_rows import StrayTimes
from supermoe_jax.data.preparation import manifest as manifest_lib
from supermoe_jax.data.preparation import outlying_numbers, prepare, stray_times
from supermoe_jax.data.preparation.event_log import EventLog
from supermoe_jax.data.preparation.log_statistics import sum_days
from supermoe_jax.data.preparation.null_word_counts import count_null_words, null_word_warnings
from supermoe_jax.data.preparation.outlying_numbers import OutlyingNumbers
from supermoe_jax.data.preparation.record_counts import RecordCounts
from supermoe_jax.data.preparation.write_shards import RecordMaker
from supermoe_jax.data.reading import readers
from supermoe_jax.data.tasks.calendar import Calendar, log_end, make_calendar
from supermoe_jax.errors import DataError
from supermoe_jax.progress import ProgressBar

logger = logging.getLogger(__name__)

LOOKED_AT = 4096  # users that are read and made again at a time
SHOWN_VALUES = 20  # new values of a vocabulary that the manifest lists


def append(
  path: pathlib.Path,
  files: Mapping[str, Sequence[str]] | None = None,
  *,
  keep_vocabularies: bool = False,
  memory: str = "",
) -> dict[str, Any]:
  """Adds the events of new files to the dataset at `path` and returns its manifest.

  The dataset stays unchanged until everything is written.

  Args:
    path: the dataset directory.
    files: source → paths or globs of its new files. None: all files that match the dataset's patterns now and that the
      dataset was not prepared from.
    keep_vocabularies: adds no new value to a vocabulary.
    memory: DuckDB's memory budget; empty: the budget of the dataset's config.

  Raises:
    DataError: the dataset or the files cannot be used, or there is nothing to append.
    ConfigError: the dataset has no source of a given name.
  """
  atomic_files.restore(path, manifest_lib.KIND)
  Dataset(path)  # raises if there is no dataset
  try:
    with atomic_files.replacing_directory(path) as work:
      dataset = Dataset(path)  # opened again: from here on no other process can replace it
      new = new_files.find_new_files(dataset, files, memory)
      for file in (items := new_files.changed_items(dataset, new.part)):
        logger.info(f"{file} has changed: new events get its present values, earlier events keep their own")
      return _Append(dataset, new, keep_vocabularies, work, items).run()
  except (OSError, duckdb.Error) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise DataError(f"appending to {path} failed: {reason}; the dataset is as it was.") from error


class _Append:
  """One run of `append`; the directory `work` replaces the dataset at the end."""

  def __init__(
    self,
    dataset: Dataset,
    new: NewFiles,
    keep: bool,
    work: pathlib.Path,
    changed_items: Sequence[str],
  ):
    self._begun = clock.monotonic()
    cfg = new.cfg
    self._dataset, self._cfg, self._keep, self._changed_items = dataset, cfg, keep, changed_items
    self._work, self._scratch = work, work / "scratch"
    self._scratch.mkdir()
    self._new_files, self._extra_columns = new, cfg.data.extra_value_fields
    self._user_labels = prepare.read_user_labels(cfg).values
    self._log = EventLog(new.part, self._scratch, part=True)
    self._repeats, self._new_users = combined_counts.RepeatCounts(cfg.data), 0
    self._days: dict[int, int] = {}
    self._strays: StrayTimes | None = None
    self._clipped: dict[str, dict[str, Any]] = {}

  def run(self) -> dict[str, Any]:
    """Merges the new events, writes the new dataset into `work` and returns its manifest."""
    before, cfg = self._dataset.encoders, self._cfg
    with self._log as log:
      grown = merge_histories.provisional(before, log)
      counts = merge_histories.CodeCounts(grown, self._extra_columns)
      merged = list(self._merge(grown, counts))
      extension = merge_histories.extend_encoders(before, grown, counts, cfg.data, keep=self._keep)
      self._find_strays(log)
      then, now = self._calendars()
      dated = self._dated = AppendedRows(self._dataset, log, then, now, self._scratch)
      old = RecordMaker(self._dataset.config, before, then)
      new = RecordMaker(cfg, extension.encoders, now)
      covered = merge_histories.CodeCounts(extension.encoders, self._extra_columns)
      changed = changed_labels.users_with_changed_labels(cfg.data.split, cfg.labelled_tasks, then, now)
      tally = new.new_counts()
      # New snapshots may change the counts of a user whose record stays the same. So if everyone's labels may have
      # changed, all records are counted again, from zero.
      if not changed.everyone:
        tally.merge(self._dataset.manifest["tally"])
      with RewrittenShards(self._work / shard_files.DIRECTORY, self._dataset.records) as written:
        for file in merged:
          earlier, block = pickle.loads(file.read_bytes())
          block = extension.apply(block, self._extra_columns)
          covered.add(block)
          if earlier is not None:
            covered.add(earlier, sign=-1)
            if not changed.everyone:
              self._forget(old, earlier, tally)
          written.add(block, new(block, self._labels(block.users), tally, dated.after(block.users)))
        touched = len(written.users)
        self._look_at_others(changed, old, new, tally, written)
        self._clipped = outlying_numbers.clipped_numbers(log, extension.encoders)
        appended = self._describe(log, extension, touched, written)
        written.finish(f"appended_{appended['number']}")
      dated.close()
      return self._finish(log, extension.encoders, covered, new, tally, written, appended)

  def _merge(self, grown: Encoders, counts: merge_histories.CodeCounts) -> Iterator[pathlib.Path]:
    """Yields files, each with the earlier and the merged histories of some users, in provisional codes.

    A file is a pickled pair of `UserBlock`s. The first one is None if all these users are new.
    """
    log, path = self._log, self._dataset.path / USERS
    found = log.arrow(
      'SELECT u."user", p.record FROM ordered_users u '
      f'LEFT JOIN read_parquet({readers.literal(str(path))}) p USING ("user") ORDER BY u.uid'
    )
    place = found["record"].fill_null(-1).to_numpy()
    self._new_users, done = int(np.sum(place < 0)), 0
    n_codes, numbers = len(grown.categorical) + len(self._extra_columns), list(grown.numeric.values())
    # Few users at a time: a user with few new events may have a long earlier history.
    count = -(-log.counts["users"] // LOOKED_AT)
    with ProgressBar(total=log.counts["events"], unit=" events", unit_scale=True, desc="merging", mininterval=1) as bar:
      for index, users, rows in log.shards(grown, count):
        block = histories.read_block(rows, users, n_codes, numbers)
        places = place[done : done + len(users)]
        done, places = done + len(users), places[places >= 0]
        earlier = self._histories(self._dataset.contents(places.tolist())) if len(places) else None
        if earlier is not None:
          counts.add(earlier, sign=-1)
          block, repeats = merge_histories.merge_histories(earlier, block, grown, self._cfg.data)
          self._repeats.add(repeats)
        else:
          block = dataclasses.replace(block, n_train=merge_histories.training_events(block, self._cfg.data.split))
        counts.add(block)
        file = self._scratch / f"merged-{index}.pickle"
        file.write_bytes(pickle.dumps((earlier, block)))
        yield file
        bar.update(rows.num_rows)

  def _histories(self, contents: Sequence[bytes]) -> UserBlock:
    """Returns the histories of users from their records."""
    return histories.end_to_end([self._dataset.history(self._dataset.decode(content)) for content in contents])

  def _labels(self, users: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: prepare.of_users(known, users) for name, known in self._user_labels.items()}

  def _forget(self, old: RecordMaker, earlier: UserBlock, tally: RecordCounts) -> None:
    """Subtracts the records of earlier histories from the tally."""
    gone = old.new_counts()
    old.count(earlier, self._labels(earlier.users), gone, self._dated.before(earlier.users))
    tally.merge(gone.state, sign=-1)

  def _times(self) -> tuple[int, int]:
    """Returns the times of the first and the last event of the dataset and the new events together."""
    manifest = self._dataset.manifest
    first, last = manifest["first_event_microseconds"], manifest["last_event_microseconds"]
    return min(first, self._log.start), max(last, self._log.end)

  def _find_strays(self, log: EventLog) -> None:
    """Counts the events of each day, and finds rows with stray times among all events."""
    manifest, before = self._dataset.manifest, self._dataset.stray_times
    if not (known := manifest.get("events_by_day")):
      return  # an earlier version did not count them
    repeats = self._repeats.days if self._cfg.data.duplicates == "drop" else {}
    self._days = sum_days(known, log.facts.days, {day: -n for day, n in repeats.items()})
    ends = [(manifest["first_event_microseconds"], manifest["last_event_microseconds"]), (log.start, log.end)]
    if before is not None:
      ends.append((before.first, before.last))
    self._strays = stray_times.find_stray_times(self._days, ends, log, before.rows if before else ())

  def _usual_times(self) -> tuple[int, int]:
    """Returns the first and the last time of the dataset and the new events together, stray ones aside."""
    return (self._strays.first, self._strays.last) if self._strays else self._times()

  def _calendars(self) -> tuple[Calendar | None, Calendar | None]:
    """Returns the calendars of the dataset before and after the new events; None for a leave-one-out split."""
    split, manifest = self._cfg.data.split, self._dataset.manifest
    if split.mode == "leave_one_out":
      return None, None
    before = self._dataset.stray_times
    start = before.first if before else manifest["first_event_microseconds"]
    then = make_calendar(split, start, manifest["observed_until_microseconds"], stray_before=_any_before(before))
    first, last = self._usual_times()
    return then, make_calendar(split, first, log_end(split, last), stray_before=_any_before(self._strays))

  def _look_at_others(
    self,
    changed: changed_labels.ChangedUsers,
    old: RecordMaker,
    new: RecordMaker,
    tally: RecordCounts,
    written: RewrittenShards,
  ) -> None:
    """Recounts users without new events whose labels may have changed, and rewrites the records that differ."""
    if not changed.everyone and changed.since is None and not len(self._dated.changed):
      return
    known = read_users(self._dataset.path)
    left = ~pc.is_in(known["user"], pa.array(written.users, pa.string())).to_numpy()
    if not changed.everyone:
      concerned = pc.is_in(known["user"], self._dated.changed).to_numpy()
      if changed.since is not None:
        concerned |= known["last_event"].to_numpy() >= changed.since
      left &= concerned
    places = known["record"].to_numpy()[left]
    bar = ProgressBar(total=len(places), unit=" records", unit_scale=True, desc="checking labels", mininterval=1)
    with bar:
      for start in range(0, len(places), LOOKED_AT):
        here = places[start : start + LOOKED_AT]
        contents = self._dataset.contents(here.tolist())
        block = self._histories(contents)
        if not changed.everyone:
          self._forget(old, block, tally)
        again = list(new(block, self._labels(block.users), tally, self._dated.after(block.users)))
        differ = [i for i, (was, now) in enumerate(zip(contents, again, strict=True)) if was != now]
        if differ:
          differing = histories.end_to_end([block.history(i) for i in differ])
          written.add(differing, (again[i] for i in differ))
        bar.update(len(here))

  def _describe(
    self, log: EventLog, extension: merge_histories.ExtendedEncoders, touched: int, written: RewrittenShards
  ) -> dict[str, Any]:
    """Returns the manifest's entry for this append."""
    values = {
      name: {"added": len(added), "first": added[:SHOWN_VALUES], "left_out": extension.left_out[name]}
      for name, added in extension.added.items()
    }
    return {
      "number": len(self._dataset.manifest.get("appends", ())) + 1,
      "dataset_before": self._dataset.manifest["digest"],
      "records_before": self._dataset.records,
      "encoding_before": self._dataset.manifest["encoding_hash"],
      "beyond_patterns": {
        name: list(source.files[len(self._dataset.config.data.sources[name].files) :])
        for name, source in self._cfg.data.sources.items()
      },
      "files": [file for source in log.counts["sources"].values() for file in source["files"]],
      **({"label_files": self._dated.new_files} if self._dated.counts else {}),
      "empty_files": [file for of in self._new_files.empty.values() for file in of],
      "changed_item_tables": list(self._changed_items),
      "events": log.counts["events"],
      "tie_rate_before": self._dataset.manifest["reading"]["tie_rate"],
      "reading": dict(log.counts),
      "repeats_of_earlier_events": self._repeats.total,
      "new_users": self._new_users,
      "users_with_new_events": touched,
      "users_with_other_labels": len(written.users) - touched,
      "vocabularies": values,
      **({"new_vectors": extension.new_vectors} if extension.new_vectors else {}),
    }

  def _finish(
    self,
    log: EventLog,
    encoders: Encoders,
    covered: merge_histories.CodeCounts,
    new: RecordMaker,
    tally: RecordCounts,
    written: RewrittenShards,
    appended: Mapping[str, Any],
  ) -> dict[str, Any]:
    """Writes everything except the records, links the shards that stay, and returns the manifest."""
    before, cfg = self._dataset.manifest, self._cfg
    for name in before["shards"]:
      _link(self._dataset.path / shard_files.DIRECTORY / name, self._work / shard_files.DIRECTORY / name)
    splits = shard_files.read_info(self._dataset.path / shard_files.DIRECTORY)
    splits[f"appended_{appended['number']}"] = written.lengths, written.bytes
    shard_files.write_info(self._work / shard_files.DIRECTORY, new.parts, splits)
    encoders.save(self._work / "encoders")
    self._write_users(written)
    first, last = self._times()
    until = log_end(cfg.data.split, self._usual_times()[1])
    reading = {**log.counts, "null_words": count_null_words(log, encoders)}
    for warning in null_word_warnings(cfg, reading["null_words"], {}):
      logger.warning(warning)
    counts = combined_counts.combined_reading(
      before["reading"], reading, tally, self._repeats, cfg.data.duplicates == "drop"
    )
    for name, files in self._new_files.empty.items():
      counts["sources"][name]["empty_files"] += files
    counts |= {"first": format_time(first), "last": format_time(last)}
    with_labels = set().union(*self._user_labels.values())
    users = read_users(self._work, ["user"])["user"]
    with_events = pc.sum(pc.is_in(users, pa.array(with_labels, pa.string()))).as_py() or 0
    manifest = manifest_lib.make_manifest(
      cfg,
      manifest_lib.LogSummary(
        counts, first, last, until, before["source_user_type"], days=self._days, strays=self._strays
      ),
      encoders,
      self._work / "encoders",
      tally,
      files={
        **before["files"],
        **new_files.new_file_stamps(self._dataset, self._new_files),
        **dated_file_stamps(cfg),
      },
      shards=[shard_files.Shard(file, n, 0, {}) for file, n in {**before["shards"], **written.files}.items()],
      fields=combined_counts.combined_coverage(before["fields"], encoders, covered, log, cfg.data.fields),
      numbers=OutlyingNumbers(
        outlying_numbers.merge_clipped(before.get("clipped_numbers", {}), self._clipped),
        before.get("hiding_numbers", {}),
      ),
      user_table={
        **before["user_table"],
        "labelled_users": len(with_labels),
        "labelled_users_without_events": len(with_labels) - with_events,
      },
      seconds=clock.monotonic() - self._begun,
      aggregates=before["aggregates"],
      dated=self._dated.counts,
    )
    manifest["appends"] = [*before.get("appends", ()), dict(appended)]
    shutil.rmtree(self._scratch)
    return integrity.write_manifest(self._work, manifest)

  def _write_users(self, written: RewrittenShards) -> None:
    """Writes the table of users in the order of their hashes, with the new record places of rewritten users."""
    rows = pa.table(
      {
        "user": pa.array(written.users, pa.string()),
        "record": pa.array(written.places, pa.int64()),
        "last_event": pa.array(written.last_events, pa.int64()),
      }
    )
    path = readers.literal(str(self._dataset.path / USERS))
    order = user_hash_sql('"user"')
    with self._log.row_batches(
      'SELECT "user", coalesce(w.record, p.record) AS record, coalesce(w.last_event, p.last_event) AS last_event '
      f'FROM read_parquet({path}) p FULL JOIN written w USING ("user") ORDER BY {order}, "user"',
      written=rows,
    ) as batches:
      prepare.write_users(batches, self._work / USERS)


def _any_before(strays: StrayTimes | None) -> bool:
  return strays is not None and strays.before > 0


def _link(file: pathlib.Path, new: pathlib.Path) -> None:
  """Hard-links a file to `new`, or copies it where the file system has no hard links."""
  try:
    os.link(file, new)
  except OSError:
    shutil.copy2(file, new)
