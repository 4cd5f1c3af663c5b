"""Checks a prepared dataset: derives snapshots, splits, labels and aggregates of some users again from the raw files.

It compares them with the records, and raises an error at the first difference. The derivation is separate SQL over the
files as `raw_events` reads them. It shares no code with `data.tasks`, so that a fault in either shows as a difference.
From preparation it takes only the vocabularies and the statistics that standardise numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import duckdb
import numpy as np
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE, UNKNOWN
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.check import raw_events
from supermoe_jax.data.check.dated_moments import derive_dated_moments
from supermoe_jax.data.check.derived_aggregates import differing_aggregate
from supermoe_jax.data.check.derived_labels import OUTSIDE, DerivedLabels, SampledSnapshot
from supermoe_jax.data.check.raw_vectors import differing_vector
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.supervision import Supervision
from supermoe_jax.data.reading import readers
from supermoe_jax.errors import ConfigError, DataError

SNAPSHOTS_A_USER = 20  # compared at most, of each sampled user
SPLITS = ("train", "validation", "test")  # the names of the records' split numbers
TOLERANCE = 1e-5  # for numbers, which the records hold as float32


class CheckError(DataError):
  """Error raised when a dataset differs from its raw files."""


class ComparedLabels(NamedTuple):
  """Numbers of compared answers of a task: `labels` are known, `unknown` ones are unknown to both sides."""

  labels: int
  unknown: int


def check_dataset(path: pathlib.Path, *, sample: int = 200, seed: int = 0) -> dict[str, ComparedLabels]:
  """Derives the labels of up to `sample` users again, and returns the numbers of compared answers of each task.

  At up to `SNAPSHOTS_A_USER` snapshots a user it compares the number of visible events, the split, and every task's
  label and indicator; for an event label also the events that it asks about. It compares the aggregates at these
  snapshots and the vectors of all events.

  Raises:
    CheckError: something differs; the message names the first difference.
    DataError: there is no dataset at `path`, or a file that it was prepared from has changed.
    ConfigError: `sample` is not positive.
  """
  if sample < 1:
    raise ConfigError(f"--sample={sample} must be at least 1.")
  dataset = Dataset(path)
  dataset.check_files()
  rng = np.random.default_rng(seed)
  chosen = rng.choice(len(dataset), min(sample, len(dataset)), replace=False)
  records = [dataset[int(i)] for i in np.sort(chosen)]
  con = readers.connect(memory=dataset.config.data.memory)
  try:
    return _Check(con, dataset, {r["user"]: r for r in records}, rng).run()
  finally:
    con.close()


class _Check:
  """Comparison of some records with the raw files of their dataset."""

  def __init__(
    self, con: duckdb.DuckDBPyConnection, dataset: Dataset, records: Mapping[str, Mapping[str, Any]], rng: Any
  ):
    self._con, self._dataset, self._records = con, dataset, records
    self._cfg, self._split = dataset.config, dataset.config.data.split
    self._asked: list[SampledSnapshot] = []
    last = raw_events.load_raw_events(con, self._cfg.data, list(records))
    assert last is not None  # the dataset holds events, and its files are unchanged
    until = self._observed_until(dataset.stray_times.last if dataset.stray_times else last)
    self._dated = derive_dated_moments(con, self._cfg, list(records), until, dataset.encoders.labels)
    for user, record in records.items():
      n, dated = len(record["snapshot_time"]), self._dated_snapshots(user, record)
      for i in np.sort(rng.choice(n, min(n, SNAPSHOTS_A_USER), replace=False)):
        time, seen, split = (int(record[f"snapshot_{k}"][i]) for k in ("time", "events", "split"))
        self._asked.append(SampledSnapshot(user, int(i), time, seen, split, until[split], int(i in dated)))
    numbers = [k for k in SampledSnapshot._fields if k != "user"]
    columns = {k: pa.array([getattr(a, k) for a in self._asked], pa.int64()) for k in numbers}
    columns |= {"user": pa.array([a.user for a in self._asked], pa.string())}
    con.register("asked_rows", pa.table(columns | {"id": pa.array(range(len(self._asked)), pa.int64())}))
    # The user's hash as a share of 1: the first eight bytes of the MD5, little-endian.
    share = 'md5_number_upper("user")::DOUBLE / pow(2::DOUBLE, 64)'
    test, held_out = self._split.user_test, self._split.user_test + self._split.user_validation
    owner = f"CASE WHEN {share} < {test!r} THEN 2 WHEN {share} < {held_out!r} THEN 1 ELSE 0 END"
    con.execute(f"CREATE TABLE asked AS SELECT *, {owner} AS owner FROM asked_rows")

  def _dated_snapshots(self, user: str, record: Mapping[str, Any]) -> set[int]:
    """Returns the indices of a user's snapshots of dated labels: the last snapshot at the time of each of them."""
    found = set()
    for time in self._dated[user]:
      at = np.flatnonzero(record["snapshot_time"] == time)
      if not len(at):
        moment = self._dated[user][time]
        name, label = next(iter(moment.labels.items()))
        missing = SampledSnapshot(user, -1, time, -1, moment.split, 0, 1)
        raise self._differ(missing, f"task {name}", "no snapshot at this time", label)
      found.add(int(at[-1]))
    return found

  def _observed_until(self, last: int) -> tuple[int, int, int]:
    split = self._split
    if split.log_end:
      last = config.parse_time(split.log_end, "config.data.split.log_end")
    elif split.mode == "user":
      last += 1
    if split.mode != "temporal":
      return last, last, last
    gap = int(split.gap_days * MICROSECONDS_PER_DAY)
    before_test = [config.parse_time(t, "config.data.split.test") - gap for t in split.test]
    return config.parse_time(split.train_end, "config.data.split.train_end"), min(before_test, default=last), last

  def run(self) -> dict[str, ComparedLabels]:
    self._right = DerivedLabels(self._con, self._dataset, self._asked, self._dated)
    self._check_snapshots()
    of_asked = [(self._records[a.user], a.time, a.n_events) for a in self._asked]
    if found := differing_aggregate(self._con, self._dataset, of_asked):
      raise self._differ(self._asked[found.snapshot], f"aggregate {found.name!r}", found.stored, found.derived)
    if vector := differing_vector(self._con, self._dataset, self._records):
      raise CheckError(f"{vector} Do not train on it; prepare it again with --overwrite.")
    compared = {name: self._compare(name, task) for name, task in self._cfg.labelled_tasks.items()}
    self._compare_moments()
    return compared

  def _differ(self, asked: SampledSnapshot, what: str, stored: object, derived: object) -> CheckError:
    before = "" if asked.n_events < 0 else f", {asked.n_events} events before it"
    return CheckError(
      f"user {asked.user!r}, snapshot {np.datetime64(asked.time, 'us')} ({SPLITS[asked.split]}{before}), {what}: "
      f"{self._dataset.path} holds {_shown(stored)}, the raw files give {_shown(derived)}. Do not train on it; "
      "prepare it again with --overwrite, and if the difference stays, report it with this message."
    )

  # ---------------------------------------------------------------------------------------------------------- snapshots

  def _check_snapshots(self) -> None:
    """Compares each snapshot's number of visible events, its split, and, for leave one out, its time."""
    if self._split.mode == "leave_one_out":
      seen = f"{self._split.min_events} + a.snapshot"
      found = self._con.execute(
        f"SELECT a.id, {seen}, e.time, CASE WHEN e.total < 3 THEN 0 ELSE greatest({seen} - e.total + 3, 0) END "
        f'FROM asked a LEFT JOIN events e ON e."user" = a."user" AND e.position = {seen} - 1 ORDER BY a.id'
      ).fetchall()
    else:
      found = self._con.execute(
        "SELECT a.id, count(e.time), a.time, a.owner FROM asked a "
        'LEFT JOIN events e ON e."user" = a."user" AND e.time < a.time GROUP BY ALL ORDER BY a.id'
      ).fetchall()
    tasks_at_rows = {n: t for n, t in self._cfg.labelled_tasks.items() if t.asks_at_rows}
    for asked, (_, n_events, time, split) in zip(self._asked, found, strict=True):
      if not asked.dated:  # else another task, without a label there, would be named, or the split
        for name, task in tasks_at_rows.items():
          if (stored := self._stored(name, task, asked)) is not None:
            raise self._differ(asked, f"task {name}", stored, None)
      if asked.n_events != n_events:
        raise self._differ(asked, "visible events", asked.n_events, n_events)
      if asked.time != time:
        raise self._differ(asked, "its time", asked.time, time)
      allowed = self._splits_at(asked.time) if self._split.mode == "temporal" else [SPLITS[split]]
      if asked.dated:
        allowed = [SPLITS[self._dated[asked.user][asked.time].split]]
      if SPLITS[asked.split] not in allowed:
        raise self._differ(asked, "its split", SPLITS[asked.split], " or ".join(allowed) or "none")

  def _splits_at(self, time: int) -> list[str]:
    """Returns the splits that a snapshot at `time` may belong to; training may end where validation begins."""
    named = {k: [config.parse_time(t, "") for t in getattr(self._split, k)] for k in SPLITS[1:]}
    training = ["train"] if time <= config.parse_time(self._split.train_end, "") else []
    return training + [k for k, times in named.items() if time in times]

  # ------------------------------------------------------------------------------------------------------------- labels

  def _compare(self, name: str, task: config.LabelledTask) -> ComparedLabels:
    derived = self._right.of(name, task)
    # A value that an append added stays out of vocabulary in events before the append.
    first = self._right.of(name, task, before_appends=True) if self._has_late_values(task) else derived
    labels = unknown = 0
    for i, asked in enumerate(self._asked):
      stored, mine = self._stored(name, task, asked), derived.get(i)
      if not _equal(stored, mine) and _equal(stored, first.get(i)):
        mine = first.get(i)
      if not _equal(stored, mine):
        raise self._differ(asked, f"task {name}", stored, mine)
      answers = [answer for _, answer in mine or ()] if task.about_events else [mine]
      known = sum(answer is not None for answer in answers)
      labels, unknown = labels + known, unknown + len(answers) - known
    return ComparedLabels(labels, unknown)

  def _compare_moments(self) -> None:
    """Compares all values of the moments that tasks with `ties="set"` ask about, as training sees them."""
    tie_rate, mode = self._dataset.tie_rate, self._split.mode
    most = {n: t.values_of_a_moment(tie_rate, mode) for n, t in self._cfg.labelled_tasks.items()}
    most = {name: values for name, values in most.items() if values}
    if not most:
      return
    # Every label counts here, in a sample space or not.
    tasks = {n: dataclasses.replace(cast(config.NextEvent, self._cfg.tasks[n]), sample_space="") for n in most}
    cfg = dataclasses.replace(self._cfg, tasks=tasks, exclude_tasks=())
    supervision = Supervision(self._dataset, cfg, training=False)
    for name, task in tasks.items():
      now = self._right.moments(task, most[name])
      before = self._right.moments(task, most[name], before_appends=True) if self._has_late_values(task) else now
      for i, stored in self._stored_moments(name, supervision):
        asked, mine = self._asked[i], now.get(i, ()) if not self._asked[i].dated else ()
        # Of values that an append added, events before the append do not have the codes.
        if stored != mine and not set(before.get(i, ())) <= set(stored) <= set(mine):
          raise self._differ(asked, f"task {name}, all values of the next moment", stored, mine)

  def _stored_moments(self, name: str, supervision: Supervision) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields for each snapshot its number in the sample and the sorted values of the moment that it asks about."""
    field = cast(config.NextEvent, self._cfg.tasks[name]).field
    values = self._right.values(field)
    for user, asked in itertools.groupby(enumerate(self._asked), key=lambda pair: pair[1].user):
      record, (places, snapshots) = self._records[user], zip(*asked, strict=True)
      chosen = np.array([snapshot.snapshot for snapshot in snapshots])
      found = supervision.at_snapshots(record, self._dataset.history(record), chosen)[name]
      codes = np.where(found.known[:, None], np.concatenate([found.value[:, None], found.also], axis=1), UNKNOWN)
      for place, row in zip(places, codes, strict=True):
        yield place, tuple(sorted(_at(values, int(code) - FIRST_VALUE) for code in row if code > UNKNOWN))

  def _stored(self, name: str, task: config.LabelledTask, asked: SampledSnapshot) -> Any:
    """Returns the record's label: None if unknown; for an event label a tuple of (event, answer), or None."""
    record, i = self._records[asked.user], asked.snapshot
    known, value = record[f"known_{name}"][i], record[f"label_{name}"][i]
    if task.about_events:
      said = [float(v) if k else None for v, k in zip(value, known, strict=True)]
      pairs = zip(record[f"event_{name}"][i].tolist(), said, strict=True)
      return tuple((event, answer) for event, answer in pairs if (event, answer) != (-1, None)) or None
    if not known:
      return None
    field = getattr(task, "field", "")
    if task.answer == "catalogue":
      return OUTSIDE if value == UNKNOWN else _at(self._right.values(field), int(value) - FIRST_VALUE)
    if task.answer == "multilabel":
      top = self._right.values(field)[: task.asked_values]
      return tuple(sorted(v for v, there in zip(top, value, strict=True) if there))
    if task.answer == "survival":
      return tuple(map(float, value))
    if task.answer == "multiclass":
      return _at(self._right.classes(name), int(value))
    return float(value)

  def _has_late_values(self, task: config.LabelledTask) -> bool:
    appends = self._dataset.manifest.get("appends", ())
    field = getattr(task, "field", None)
    return any(append["vocabularies"].get(field, {}).get("added") for append in appends)


def _at(values: Sequence[str], index: int) -> str:
  return values[index] if 0 <= index < len(values) else f"number {index} of {len(values)} values"


def _equal(a: Any, b: Any) -> bool:
  if isinstance(a, float) and isinstance(b, float):
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
  if isinstance(a, tuple) and isinstance(b, tuple):
    return len(a) == len(b) and all(map(_equal, a, b))
  return bool(a == b)


def _shown(value: object) -> str:
  return "no label" if value is None else repr(value)


def check_summary(compared: Mapping[str, ComparedLabels]) -> str:
  """Returns a text with the numbers of compared labels."""
  lines = [f"  {name}: {n.labels:,} labels agree, {n.unknown:,} are unknown to both" for name, n in compared.items()]
  return "\n".join(["all labels and aggregates of the sample agree with the raw files:", *lines])
