"""Derives the labels of sampled snapshots again, by SQL over the raw events."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.check import raw_events
from supermoe_jax.data.check.condition_sql import asked_sql, events_sql, user_fields
from supermoe_jax.data.check.dated_moments import DatedMoment
from supermoe_jax.data.check.derived_aggregates import clipped_sql
from supermoe_jax.data.check.event_times import derive_times
from supermoe_jax.data.check.raw_events import field_column
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.numeric import Numeric
from supermoe_jax.data.encoding.vocabulary import Classes, Vocabulary
from supermoe_jax.data.reading import readers

OUTSIDE = "a value out of vocabulary"


class SampledSnapshot(NamedTuple):
  """A snapshot of the sample."""

  user: str
  snapshot: int  # its index in the record
  time: int
  n_events: int
  split: int
  until: int  # the end of the period that its answers must lie in; unused for a leave-one-out split
  dated: int  # 1 for the snapshot of a dated label, otherwise 0


class DerivedLabels:
  """The labels of sampled snapshots, from the tables `events` (of `raw_events`) and `asked` (of the snapshots)."""

  def __init__(
    self,
    con: duckdb.DuckDBPyConnection,
    dataset: Dataset,
    asked: Sequence[SampledSnapshot],
    dated: Mapping[str, Mapping[int, DatedMoment]],
  ):
    """Reads the table of users, if a task needs it.

    Args:
      con: the connection with the tables.
      dataset: the dataset, for its config, vocabularies and statistics.
      asked: the snapshots, in the order of their numbers in the sample.
      dated: for each user the snapshots of dated labels by time.
    """
    self._con, self._dataset, self._cfg, self._asked, self._dated = con, dataset, dataset.config, asked, dated
    users, tasks = self._cfg.data.users, self._cfg.labelled_tasks
    self._user_columns = sorted({t.user_column for t in tasks.values() if t.user_column})
    if users is not None:
      if self._user_columns:
        raw_events.load_raw_users(con, users, self._user_columns)
      raw_events.add_user_fields(con, self._cfg.data, users, user_fields(self._cfg))
    # The events that a task about the next event may ask about.
    self._next = "e.time >= a.time AND e.time < a.until"
    if self._cfg.data.split.mode == "leave_one_out":
      self._next = "e.position = a.n_events AND (a.split > 0 OR e.total < 3 OR e.position < e.total - 2)"

  def _rows(self, sql: str, **tables: pa.Table) -> list[tuple[Any, ...]]:
    for name, table in tables.items():
      self._con.register(name, table)
    return self._con.execute(sql).fetchall()

  def of(self, name: str, task: config.LabelledTask, *, before_appends: bool = False) -> dict[int, Any]:
    """Returns a task's labels: snapshot's number in the sample → label; unknown ones are missing or None.

    With `before_appends` values that an append added count as out of vocabulary.
    """
    derivations: dict[str, Callable[[str, Any, bool], dict[int, Any]]] = {
      config.NextEvent.kind: self._next_event,
      config.EventLabel.kind: self._event_label,
      config.FutureEvent.kind: self._future_event,
      config.FutureValues.kind: self._future_values,
      config.FutureAmount.kind: self._future_amount,
      config.TimeToEvent.kind: self._time_to_event,
      config.UserLabel.kind: self._user_label,
      config.DatedLabel.kind: self._dated_label,
    }
    found = derivations[task.kind](name, task, before_appends)
    # The snapshot of a dated label is none of another kind of task.
    return {i: label for i, label in found.items() if bool(self._asked[i].dated) == task.asks_at_rows}

  def _events(self, where: str) -> str:
    """Returns the SQL of the events that a condition can be asked of."""
    return events_sql(self._cfg.data, where, self._dataset.encoders)

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
        f"LEFT JOIN {self._events(task.where)} e ON {within} AND {asked} WHERE {end} <= a.until GROUP BY a.id"
      )
    )

  def _future_values(self, name: str, task: config.FutureValues, before_appends: bool) -> dict[int, Any]:
    del name, before_appends
    end, within = self._within(task.horizon_days)
    column = field_column(self._cfg.data, task.field)
    top = pa.table({"value": pa.array(self.values(task.field)[: task.top], pa.string())})
    asked = asked_sql(self._cfg.data, task.where)
    found = self._rows(
      f"SELECT a.id, list(DISTINCT e.{column}) FILTER (e.{column} IN (SELECT value FROM top)) FROM asked a "
      f"LEFT JOIN {self._events(task.where)} e ON {within} AND {asked} WHERE {end} <= a.until GROUP BY a.id",
      top=top,
    )
    return {i: tuple(sorted(values or ())) for i, values in found}

  def _future_amount(self, name: str, task: config.FutureAmount, before_appends: bool) -> dict[int, Any]:
    del name, before_appends
    end, within = self._within(task.horizon_days)
    value = clipped_sql(self._dataset, task.field) if task.field else "e.time"
    function = {"count": "count(", "moments": "count(DISTINCT ", "sum": "sum(", "mean": "avg(", "max": "max("}[task.of]
    empty = "NULL" if task.of in ("mean", "max") else "0"
    asked = asked_sql(self._cfg.data, task.where, task.source)
    return dict(
      self._rows(
        f"SELECT a.id, coalesce({function}{value}), {empty})::DOUBLE FROM asked a "
        f"LEFT JOIN {self._events(task.where)} e ON {within} AND {asked} WHERE {end} <= a.until GROUP BY a.id"
      )
    )

  def _time_to_event(self, name: str, task: config.TimeToEvent, before_appends: bool) -> dict[int, Any]:
    del name, before_appends
    return derive_times(self._con, self._cfg.data, task, self._events(task.where))

  def _next_event(self, name: str, task: config.NextEvent, before_appends: bool) -> dict[int, Any]:
    column = field_column(self._cfg.data, task.field)
    found = self._rows(
      f"SELECT a.id, arg_min(e.{column}, e.position) FROM asked a JOIN {self._events(task.where)} e "
      f'ON e."user" = a."user" AND {self._next} AND e.{column} IS NOT NULL '
      f"AND {asked_sql(self._cfg.data, task.where)} GROUP BY a.id"
    )
    known = set(self.values(task.field, before_appends))
    return {i: value if value in known else OUTSIDE for i, value in found}

  def moments(self, task: config.NextEvent, most: int, *, before_appends: bool = False) -> dict[int, tuple[str, ...]]:
    """Returns the values of the next moment that `task` asks about: snapshot's number in the sample → values, sorted.

    They are the first `most` of the files that are in the vocabulary. Where there is no such moment none is returned.
    """
    column = field_column(self._cfg.data, task.field)
    found = self._rows(
      f"SELECT a.id, e.{column}, min(e.position) FROM asked a JOIN {self._events(task.where)} e "
      f'ON e."user" = a."user" AND {self._next} AND e.{column} IS NOT NULL '
      f"AND {asked_sql(self._cfg.data, task.where)} "
      f"GROUP BY a.id, e.time, e.{column} QUALIFY e.time = min(e.time) OVER (PARTITION BY a.id) ORDER BY 1, 3"
    )
    known, out = set(self.values(task.field, before_appends)), dict[int, list[str]]()
    for i, value, _ in found:
      out.setdefault(i, []).extend([value] if value in known else [])
    return {i: tuple(sorted(values[:most])) for i, values in out.items()}

  def _event_label(self, name: str, task: config.EventLabel, before_appends: bool) -> dict[int, Any]:
    column, tables = f"e.{field_column(self._cfg.data, task.field)}", {}
    regression = task.answer == "regression"
    if task.positive:
      values = self.values(task.field, before_appends)
      tables["vocabulary"] = pa.table({"value": pa.array(values, pa.string())})
      yes = ", ".join(map(readers.literal, task.positive))
      said = f"CASE WHEN {column} IN (SELECT value FROM vocabulary) THEN ({column} IN ({yes}))::INTEGER::DOUBLE END"
    else:
      said = column if task.at_least is None else f"({column} >= {task.at_least!r})::INTEGER::DOUBLE"
    out: dict[int, Any] = {}
    for i, position, answer in self._rows(
      f"SELECT a.id, e.position, {said} FROM asked a JOIN {self._events(task.where)} e "
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
      return {i: value for i, value, _ in found if value in self.classes(name)}
    scale = self._dataset.encoders.labels[name]
    assert isinstance(scale, Numeric)  # `user_table` encodes numbers this way
    return {i: (n - scale.mean) / scale.std for i, _, n in found if n is not None and math.isfinite(n)}

  def _dated_label(self, name: str, task: config.DatedLabel, before_appends: bool) -> dict[int, Any]:
    del task, before_appends
    moments = [(i, self._dated[a.user][a.time]) for i, a in enumerate(self._asked) if a.dated]
    return {i: moment.labels[name] for i, moment in moments if name in moment.labels}

  def values(self, field: str, before_appends: bool = False) -> list[str]:
    """Returns the values of a field's vocabulary, in the order of their codes."""
    encoder = self._dataset.encoders.categorical[field]
    assert isinstance(encoder, Vocabulary)  # config.resolve checked
    appends = self._dataset.manifest.get("appends", ()) if before_appends else ()
    return encoder.values[: len(encoder.values) - sum(a["vocabularies"][field]["added"] for a in appends)]

  def classes(self, name: str) -> tuple[str, ...]:
    """Returns the classes of a multi-class label, in the order of their indices."""
    encoder = self._dataset.encoders.labels[name]
    assert isinstance(encoder, Classes)  # `user_table` encodes classes this way
    return encoder.values
