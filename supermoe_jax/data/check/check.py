"""Checks a prepared dataset: derives snapshots, splits, labels and aggregates of some users again from the raw files.

It compares them with the records, and raises an error at the first difference. The derivation is separate SQL over the
files as `raw_events` reads them. It shares no code with `data.tasks`, so that a fault in either shows as a difference.
From preparation it takes only the vocabularies and the statistics that standardise numbers.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE, UNKNOWN
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.check import raw_events
from supermoe_jax.data.check.condition_sql import asked_sql
from supermoe_jax.data.check.dated_moments import derive_dated_moments
from supermoe_jax.data.check.derived_aggregates import clipped_sql, differing_aggregate
from supermoe_jax.data.check.raw_events import field_column
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.numeric import Numeric
from supermoe_jax.data.encoding.vocabulary import Classes, Vocabulary
from supermoe_jax.data.reading import readers
from supermoe_jax.errors import ConfigError, DataError

SNAPSHOTS_A_USER = 20  # compared at most, of each sampled user
SPLITS = ("train", "validation", "test")  # the names of the records' split numbers
OUTSIDE = "a value out of vocabulary"
TOLERANCE = 1e-5  # for numbers, which the records hold as float32


class CheckError(DataError):
  """Error raised when a dataset differs from its raw files."""


class ComparedLabels(NamedTuple):
  """Numbers of compared answers of a task: `labels` are known, `unknown` ones are unknown to both sides."""

  labels: int
  unknown: int


class _SampledSnapshot(NamedTuple):
  """A snapshot of the sample."""

  user: str
  snapshot: int  # its index in the record
  time: int
  n_events: int
  split: int
  until: int  # the end of the period that its answers must lie in; unused for a leave-one-out split
  dated: int  # 1 for the snapshot of a dated label, otherwise 0


def check_dataset(path: pathlib.Path, *, sample: int = 200, seed: int = 0) -> dict[str, ComparedLabels]:
  """Derives the labels of up to `sample` users again, and returns the numbers of compared answers of each task.

  At up to `SNAPSHOTS_A_USER` snapshots a user it compares the number of visible events, the split, and every task's
  label and indicator; for an event label also the events that it asks about; and the aggregates.

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
    self._asked: list[_SampledSnapshot] = []
    last = raw_events.load_raw_events(con, self._cfg.data, list(records))
    assert last is not None  # the dataset holds events, and its files are unchanged
    until = self._observed_until(dataset.stray_times.last if dataset.stray_times else last)
    self._dated = derive_dated_moments(con, self._cfg, list(records), until, dataset.encoders.labels)
    for user, record in records.items():
      n, dated = len(record["snapshot_time"]), self._dated_snapshots(user, record)
      for i in np.sort(rng.choice(n, min(n, SNAPSHOTS_A_USER), replace=False)):
        time, seen, split = (int(record[f"snapshot_{k}"][i]) for k in ("time", "events", "split"))
        self._asked.append(_SampledSnapshot(user, int(i), time, seen, split, until[split], int(i in dated)))
    numbers = [k for k in _SampledSnapshot._fields if k != "user"]
    columns = {k: pa.array([getattr(a, k) for a in self._asked], pa.int64()) for k in numbers}
    columns |= {"user": pa.array([a.user for a in self._asked], pa.string())}
    con.register("asked_rows", pa.table(columns | {"id": pa.array(range(len(self._asked)), pa.int64())}))
    # The user's hash as a share of 1: the first eight bytes of the MD5, little-endian.
    share = 'md5_number_upper("user")::DOUBLE / pow(2::DOUBLE, 64)'
    test, held_out = self._split.user_test, self._split.user_test + self._split.user_validation
    owner = f"CASE WHEN {share} < {test!r} THEN 2 WHEN {share} < {held_out!r} THEN 1 ELSE 0 END"
    con.execute(f"CREATE TABLE asked AS SELECT *, {owner} AS owner FROM asked_rows")
    # The events that a task about the next event may ask about.
    self._next = "e.time >= a.time AND e.time < a.until"
    if self._split.mode == "leave_one_out":
      self._next = "e.position = a.n_events AND (a.split > 0 OR e.total < 3 OR e.position < e.total - 2)"

  def _dated_snapshots(self, user: str, record: Mapping[str, Any]) -> set[int]:
    """Returns the indices of a user's snapshots of dated labels: the last snapshot at the time of each of them."""
    found = set()
    for time in self._dated[user]:
      at = np.flatnonzero(record["snapshot_time"] == time)
      if not len(at):
        raise CheckError(
          f"user {user!r}: {self._dataset.path} has no snapshot at {np.datetime64(time, 'us')}, where the raw files "
          "hold a dated label. Do not train on it; prepare it again with --overwrite."
        )
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
    self._check_snapshots()
    of_asked = [(self._records[a.user], a.time, a.n_events) for a in self._asked]
    if found := differing_aggregate(self._con, self._dataset, of_asked):
      raise self._differ(self._asked[found.snapshot], f"aggregate {found.name!r}", found.stored, found.derived)
    users, tasks = self._cfg.data.users, self._cfg.labelled_tasks
    self._user_columns = sorted({t.user_column for t in tasks.values() if t.user_column})
    if users is not None and self._user_columns:
      raw_events.load_raw_users(self._con, users, self._user_columns)
    return {name: self._compare(name, task) for name, task in tasks.items()}

  def _rows(self, sql: str, **tables: pa.Table) -> list[tuple[Any, ...]]:
    for name, table in tables.items():
      self._con.register(name, table)
    return self._con.execute(sql).fetchall()

  def _differ(self, asked: _SampledSnapshot, what: str, stored: object, derived: object) -> CheckError:
    time = str(np.datetime64(asked.time, "us"))
    return CheckError(
      f"user {asked.user!r}, snapshot {time} ({SPLITS[asked.split]}, {asked.n_events} events before it), {what}: "
      f"{self._dataset.path} holds {_shown(stored)}, the raw files give {_shown(derived)}. Do not train on it; "
      "prepare it again with --overwrite, and if the difference stays, report it with this message."
    )

  # ---------------------------------------------------------------------------------------------------------- snapshots

  def _check_snapshots(self) -> None:
    """Compares each snapshot's number of visible events, its split, and, for leave one out, its time."""
    if self._split.mode == "leave_one_out":
      seen = f"{self._split.min_events} + a.snapshot"
      found = self._rows(
        f"SELECT a.id, {seen}, e.time, CASE WHEN e.total < 3 THEN 0 ELSE greatest({seen} - e.total + 3, 0) END "
        f'FROM asked a LEFT JOIN events e ON e."user" = a."user" AND e.position = {seen} - 1 ORDER BY a.id'
      )
    else:
      found = self._rows(
        "SELECT a.id, count(e.time), a.time, a.owner FROM asked a "
        'LEFT JOIN events e ON e."user" = a."user" AND e.time < a.time GROUP BY ALL ORDER BY a.id'
      )
    for asked, (_, n_events, time, split) in zip(self._asked, found, strict=True):
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
    derived = self._derived(name, task)
    # A value that an append added stays out of vocabulary in events before the append.
    first = self._derived(name, task, before_appends=True) if self._has_late_values(task) else derived
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

  def _stored(self, name: str, task: config.LabelledTask, asked: _SampledSnapshot) -> Any:
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
      return OUTSIDE if value == UNKNOWN else _at(self._values(field), int(value) - FIRST_VALUE)
    if task.answer == "multilabel":
      top = self._values(field)[: task.asked_values]
      return tuple(sorted(v for v, there in zip(top, value, strict=True) if there))
    if task.answer == "multiclass":
      return _at(self._classes(name), int(value))
    return float(value)

  def _has_late_values(self, task: config.LabelledTask) -> bool:
    appends = self._dataset.manifest.get("appends", ())
    field = getattr(task, "field", None)
    return any(append["vocabularies"].get(field, {}).get("added") for append in appends)

  def _derived(self, name: str, task: config.LabelledTask, *, before_appends: bool = False) -> dict[int, Any]:
    """Derives labels from the raw files: snapshot's number in the sample → label; unknown ones are missing or None.

    With `before_appends` values that an append added count as out of vocabulary.
    """
    derivations: dict[str, Callable[[str, Any, bool], dict[int, Any]]] = {
      config.NextEvent.kind: self._next_event,
      config.EventLabel.kind: self._event_label,
      config.FutureEvent.kind: self._future_event,
      config.FutureValues.kind: self._future_values,
      config.FutureAmount.kind: self._future_amount,
      config.UserLabel.kind: self._user_label,
      config.DatedLabel.kind: self._dated_label,
    }
    found = derivations[task.kind](name, task, before_appends)
    # The snapshot of a dated label is none of another kind of task.
    return {i: label for i, label in found.items() if bool(self._asked[i].dated) == task.asks_at_rows}

  def _within(self, days: float) -> tuple[str, str]:
    """Returns the SQL of the end of a window, and of whether an event `e` lies in the window of a snapshot `a`."""
    end = f"a.time + {int(days * MICROSECONDS_PER_DAY)}"
    return end, f'e."user" = a."user" AND e.time >= a.time AND e.time < {end}'

  def _future_event(self, name: str, task: config.FutureEvent, before_appends: bool) -> dict[int, Any]:
    del name, before_appends
    end, within = self._within(task.horizon_days)
    asked = asked_sql(self._cfg.data, task.where, task.source)
    happens = "count(e.time) = 0" if task.negate else "count(e.time) > 0"
    return dict(
      self._rows(
        f"SELECT a.id, ({happens})::INTEGER::DOUBLE FROM asked a "
        f"LEFT JOIN events e ON {within} AND {asked} WHERE {end} <= a.until GROUP BY a.id"
      )
    )

  def _future_values(self, name: str, task: config.FutureValues, before_appends: bool) -> dict[int, Any]:
    del name, before_appends
    end, within = self._within(task.horizon_days)
    column = field_column(self._cfg.data, task.field)
    top = pa.table({"value": pa.array(self._values(task.field)[: task.top], pa.string())})
    asked = asked_sql(self._cfg.data, task.where)
    found = self._rows(
      f"SELECT a.id, list(DISTINCT e.{column}) FILTER (e.{column} IN (SELECT value FROM top)) FROM asked a "
      f"LEFT JOIN events e ON {within} AND {asked} WHERE {end} <= a.until GROUP BY a.id",
      top=top,
    )
    return {i: tuple(sorted(values or ())) for i, values in found}

  def _future_amount(self, name: str, task: config.FutureAmount, before_appends: bool) -> dict[int, Any]:
    del name, before_appends
    end, within = self._within(task.horizon_days)
    value = clipped_sql(self._dataset, task.field) if task.field else "e.time"
    function = {"count": "count(", "moments": "count(DISTINCT ", "sum": "sum(", "mean": "avg(", "max": "max("}[task.of]
    empty = "NULL" if task.of in ("mean", "max") else "0"
    return dict(
      self._rows(
        f"SELECT a.id, coalesce({function}{value}), {empty})::DOUBLE FROM asked a LEFT JOIN events e ON {within} "
        f"AND {asked_sql(self._cfg.data, task.where, task.source)} WHERE {end} <= a.until GROUP BY a.id"
      )
    )

  def _next_event(self, name: str, task: config.NextEvent, before_appends: bool) -> dict[int, Any]:
    column = field_column(self._cfg.data, task.field)
    found = self._rows(
      f"SELECT a.id, arg_min(e.{column}, e.position) FROM asked a JOIN events e "
      f'ON e."user" = a."user" AND {self._next} AND e.{column} IS NOT NULL '
      f"AND {asked_sql(self._cfg.data, task.where)} GROUP BY a.id"
    )
    known = set(self._values(task.field, before_appends))
    return {i: value if value in known else OUTSIDE for i, value in found}

  def _event_label(self, name: str, task: config.EventLabel, before_appends: bool) -> dict[int, Any]:
    column, tables = f"e.{field_column(self._cfg.data, task.field)}", {}
    regression = task.answer == "regression"
    if task.positive:
      values = self._values(task.field, before_appends)
      tables["vocabulary"] = pa.table({"value": pa.array(values, pa.string())})
      yes = ", ".join(map(readers.literal, task.positive))
      said = f"CASE WHEN {column} IN (SELECT value FROM vocabulary) THEN ({column} IN ({yes}))::INTEGER::DOUBLE END"
    else:
      said = column if task.at_least is None else f"({column} >= {task.at_least!r})::INTEGER::DOUBLE"
    out: dict[int, Any] = {}
    for i, position, answer in self._rows(
      f"SELECT a.id, e.position, {said} FROM asked a JOIN events e "
      f'ON e."user" = a."user" AND {self._next} AND {column} IS NOT NULL '
      f"AND {asked_sql(self._cfg.data, task.where)} "
      f"QUALIFY row_number() OVER (PARTITION BY a.id ORDER BY e.position) <= {task.per_snapshot} ORDER BY 1, 2",
      **tables,
    ):
      said_of_it = self._encoded(task.field, answer) if regression else answer
      out[i] = (*out.get(i, ()), (position, said_of_it))
    return out

  def _encoded(self, field: str, number: float) -> float:
    return float(self._dataset.encoders.numeric[field].encode(number, self._cfg.data.fields[field].encoding))

  def _user_label(self, name: str, task: config.UserLabel, before_appends: bool) -> dict[int, Any]:
    text = f"u.column_{self._user_columns.index(task.column)}"
    found = self._rows(
      f'SELECT a.id, {text}, TRY_CAST(trim({text}) AS DOUBLE) FROM asked a JOIN users u ON u."user" = a."user" '
      f"WHERE a.split = a.owner AND {text} IS NOT NULL"
    )
    if task.type == "binary":
      return {i: float(value in task.positive) for i, value, _ in found}
    if task.type == "multiclass":
      return {i: value for i, value, _ in found if value in self._classes(name)}
    scale = self._dataset.encoders.labels[name]
    assert isinstance(scale, Numeric)  # `user_table` encodes numbers this way
    return {i: (n - scale.mean) / scale.std for i, _, n in found if n is not None and math.isfinite(n)}

  def _dated_label(self, name: str, task: config.DatedLabel, before_appends: bool) -> dict[int, Any]:
    del task, before_appends
    moments = [(i, self._dated[a.user][a.time]) for i, a in enumerate(self._asked) if a.dated]
    return {i: moment.labels[name] for i, moment in moments if name in moment.labels}

  def _values(self, field: str, before_appends: bool = False) -> list[str]:
    encoder = self._dataset.encoders.categorical[field]
    assert isinstance(encoder, Vocabulary)  # config.resolve checked
    appends = self._dataset.manifest.get("appends", ()) if before_appends else ()
    return encoder.values[: len(encoder.values) - sum(a["vocabularies"][field]["added"] for a in appends)]

  def _classes(self, name: str) -> tuple[str, ...]:
    encoder = self._dataset.encoders.labels[name]
    assert isinstance(encoder, Classes)  # `user_table` encodes classes this way
    return encoder.values


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
