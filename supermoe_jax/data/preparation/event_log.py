"""Reads, checks and orders event logs in DuckDB, then hands them out one shard of users at a time.

Every event has its place in the log, `ord`: files in the order listed, rows in the order of their file. Events of a
user at equal times stay in that order. Ties are never broken by a value, which would leak it into the sequence.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.data.encoding.splits import training_user_sql, user_hash_sql
from supermoe_jax.data.encoding.vocabulary import Encoders, Hashing
from supermoe_jax.data.preparation.log_database import BATCH_ROWS, LogDatabase
from supermoe_jax.data.preparation.log_statistics import FieldStatistics, LogStatistics
from supermoe_jax.data.reading.field_sql import field_columns
from supermoe_jax.data.reading.readers import literal
from supermoe_jax.data.reading.sources import Reading, SourceReader

TIE = 'hash("user", time)'

# The number of days since 1970; DuckDB's division rounds towards 0.
_DAY = f"time // {config.MICROSECONDS_PER_DAY} - (time % {config.MICROSECONDS_PER_DAY} < 0)::INTEGER"


class EventLog(LogDatabase):
  """All events of a config, checked, in a DuckDB database on disk; use it as a context manager.

  The database has the relations `events` and `ordered_users` of `EventTables`.

  Attributes:
    columns: the column of each field in `events`.
  """

  def __init__(self, data: config.Data, scratch: pathlib.Path, *, part: bool = False):
    """Reads the sources; see `LogDatabase`."""
    self.columns = field_columns(data)
    super().__init__(data, scratch, part=part)

  def _read(self) -> tuple[Reading, LogStatistics]:
    reading = SourceReader(self._con, self.data).read(part=self._part)
    if reading.dropped:
      self._con.execute("DELETE FROM rows WHERE fault > 0")
    return reading, self._tables.settle()

  @property
  def _tables(self) -> EventTables:
    return EventTables(self._con, self.data)

  @property
  def events_sql(self) -> str:
    """See `LogDatabase.events_sql`."""
    return "events"

  def values_sql(self, name: str) -> str:
    """See `LogDatabase.values_sql`."""
    return self._tables.values_sql(name)

  def count_events(self, user: str) -> int:
    """See `LogDatabase.count_events`."""
    ((count,),) = self.query(f'SELECT count(*) FROM events WHERE "user" = {literal(user)}')
    return int(count)

  def shards(
    self, encoders: Encoders, n_shards: int, done: Collection[int] = ()
  ) -> Iterator[tuple[int, list[str], pa.Table]]:
    """See `EventTables.shards`."""
    return self._tables.shards(encoders, n_shards, done)


class EventTables:
  """The events of whole users in a DuckDB database: the relations `events` and `ordered_users`.

  `events` has a row per event: `user` VARCHAR, `time` BIGINT microseconds since 1970 UTC, `source` INTEGER, `ord`
  BIGINT, `training` BOOLEAN, and for each field the column that `field_columns` names. Its type is VARCHAR for
  categorical fields, VARCHAR[] with all values for fields of lists, and DOUBLE (after log1p where configured) for
  numeric fields; NULL where absent. `ordered_users` has a row per user: `user`, `uid`, from 0 in the order of the ids'
  hashes, and `last_event`, the time of the user's last event.
  """

  def __init__(self, con: duckdb.DuckDBPyConnection, data: config.Data):
    self._con, self._data = con, data
    self._columns = field_columns(data)

  def _query(self, sql: str) -> list[tuple[Any, ...]]:
    return self._con.execute(sql).fetchall()

  def values_sql(self, name: str) -> str:
    """Returns a query of the values of a field; see `LogDatabase.values_sql`."""
    column, field = self._columns[name], self._data.fields[name]
    if field.many:
      values = f"SELECT unnest({column}[:{field.many}]) AS value, training FROM events"
    else:
      value = f"{column} + 0" if field.kind == "numeric" else column  # turns -0.0 into 0.0
      values = f"SELECT {value} AS value, training FROM events WHERE {column} IS NOT NULL"
    return f"SELECT value, training, count(*) AS n FROM ({values}) GROUP BY value, training"

  # ------------------------------------------------------------------------------------------------ from rows to events

  def settle(self) -> LogStatistics:
    """Makes the relations from the table `rows`, which holds usable rows only, and returns their statistics."""
    self._find_ties()
    duplicates = self._find_duplicates()
    self._mark_training()
    self.number_users()
    return self._statistics(duplicates)

  def _find_ties(self) -> None:
    """Creates `tied`, the hashes of user and time that several rows share.

    Only these rows can be tied or duplicates. Comparing columns is slow, so it is limited to them.
    """
    self._con.execute(f"CREATE TEMP TABLE tied AS SELECT {TIE} AS tie FROM rows GROUP BY tie HAVING count(*) > 1")

  def _find_duplicates(self) -> int:
    """Returns the number of rows that repeat an earlier one in user, time, source and every field.

    Removes these rows if so configured.
    """
    equal = ['"user"', "time", "source", *self._columns.values()]
    columns = ", ".join(equal)
    self._con.execute(
      f"CREATE TEMP TABLE duplicates AS SELECT {columns}, min(ord) AS first, count(*) - 1 AS repeats "
      f"FROM (SELECT *, {TIE} AS tie FROM rows) SEMI JOIN tied USING (tie) GROUP BY {columns} HAVING repeats > 0"
    )
    ((repeats,),) = self._query("SELECT coalesce(sum(repeats), 0)::BIGINT FROM duplicates")
    if repeats and self._data.duplicates == "drop":
      same = " AND ".join(f"rows.{c} IS NOT DISTINCT FROM d.{c}" for c in equal)
      self._con.execute(f"DELETE FROM rows USING duplicates d WHERE {same} AND rows.ord > d.first")
    self._con.execute("DROP TABLE duplicates")
    return repeats

  def number_users(self) -> None:
    """Creates `ordered_users` from `events`, in the order of the records."""
    hashed = user_hash_sql('"user"')
    self._con.execute(
      'CREATE TABLE ordered_users AS SELECT "user", last_event, '
      f'row_number() OVER (ORDER BY {hashed}, "user") - 1 AS uid '
      'FROM (SELECT "user", max(time) AS last_event FROM events GROUP BY "user") ORDER BY uid'
    )

  def _mark_training(self) -> None:
    """Creates `events`: the rows, and whether each lies in the training period or belongs to a training user."""
    split = self._data.split
    columns = ", ".join(['"user"', "time", "source", "ord", *self._columns.values()])
    if split.mode == "temporal":
      train_end = config.parse_time(split.train_end, "config.data.split.train_end")
      self._con.execute(f"CREATE VIEW events AS SELECT {columns}, time < {train_end} AS training FROM rows")
    elif split.mode == "user":
      training = training_user_sql('"user"', split)
      if split.log_end:
        training += f" AND time < {config.parse_time(split.log_end, 'config.data.split.log_end')}"
      self._con.execute(f"CREATE TABLE events AS SELECT {columns}, {training} AS training FROM rows")
    else:
      self._con.execute(
        f"CREATE TABLE events AS SELECT {columns}, left_over > 2 OR total < 3 AS training FROM ("
        'SELECT *, count(*) OVER (PARTITION BY "user") AS total, '
        'row_number() OVER (PARTITION BY "user" ORDER BY time DESC, ord DESC) AS left_over FROM rows)'
      )

  def _statistics(self, duplicates: int) -> LogStatistics:
    names = list(self._data.sources)
    (row,) = self._query(
      "SELECT count(*), (SELECT count(*) FROM ordered_users), count_if(training), min(time), max(time), "
      + ", ".join(self._facts_sql(name) for name in self._columns)
      + " FROM events"
    )
    events, users, training, first, last, *found = row
    kept = dict(self._query("SELECT source, count(*) FROM rows GROUP BY source"))
    return LogStatistics(
      events=events,
      users=users,
      training=training,
      first=first,
      last=last,
      tied=self._count_tied(),
      duplicates=duplicates,
      kept=[kept.get(i, 0) for i in range(len(names))],
      days=dict(self._query(f"SELECT {_DAY} AS day, count(*) FROM events GROUP BY day ORDER BY day")),
      # A statistic of no values is NULL.
      fields={
        n: FieldStatistics(**{k: v for k, v in of.items() if v is not None}) for n, of in zip(self._columns, found)
      },
    )

  def _facts_sql(self, name: str) -> str:
    """Returns the SQL of a struct of a field's statistics."""
    names, column, field = list(self._data.sources), self._columns[name], self._data.fields[name]
    carriers = [names.index(s) for s in field.sources] or range(len(names))
    facts = {
      "absent": f"count_if({column} IS NULL AND source IN ({', '.join(map(str, carriers))}))",
      "present": f"count({column})",
      "training": f"count({column}) FILTER (training)",
    }
    if field.many:
      facts["cut"] = f"sum(greatest(len({column}) - {field.many}, 0))::BIGINT"
    if field.kind == "numeric":
      of = {"sum": "sum", "deviation": "stddev_pop", "low": "min", "high": "max"}
      facts |= {fact: f"{function}({column}) FILTER (training)" for fact, function in of.items()}
      facts |= {"least": f"min({column})", "greatest": f"max({column})"}
    return "{" + ", ".join(f"'{fact}': {sql}" for fact, sql in facts.items()) + "}"

  def _count_tied(self) -> int:
    ((tied,),) = self._query(
      f"SELECT coalesce(sum(n), 0)::BIGINT FROM (SELECT count(*) AS n FROM (SELECT *, {TIE} AS tie FROM rows) "
      'SEMI JOIN tied USING (tie) GROUP BY "user", time) WHERE n > 1'
    )
    self._con.execute("DROP TABLE tied")
    return tied

  # ------------------------------------------------------------------------------------------------------------- shards

  def shards(
    self, encoders: Encoders, n_shards: int, done: Collection[int] = ()
  ) -> Iterator[tuple[int, list[str], pa.Table]]:
    """Yields the encoded events of each of `n_shards` shards that is not in `done`; holds one shard at a time.

    Users are ordered by a hash of their ids, and each shard has the next n-th of them.

    Yields: for each shard with users, its index, the users' ids, and their events sorted by user, time and place in the
      log. The events have the columns that `histories.read_block` reads: `uid`, the user's number in the order of
      users, `time`, `source`, `training`, the codes, the numbers.
    """
    # Separate connections, because queries elsewhere must not end this stream.
    with contextlib.closing(self._con.cursor()) as con, contextlib.closing(self._con.cursor()) as ids:
      joins, codes = [], []
      place: dict[str, int] = {}
      for i, name in enumerate([*encoders.categorical, *self._data.extra_value_fields]):
        encoder, column, table = encoders.categorical[name], f"e.{self._columns[name]}", f"codes_{i}"
        if self._data.fields[name].many:
          place[name] = place.get(name, 0) + 1
          column = f"{column}[{place[name]}]"
        if isinstance(encoder, Hashing):
          # MD5 takes long, so each value is hashed once instead of at each of its events.
          joined = f"({encoder.codes_sql(f'SELECT DISTINCT {column} AS value FROM events e')}) {table}"
        else:
          con.register(table, encoder.table())
          joined = table
        joins.append(f"LEFT JOIN {joined} ON {column} = {table}.value")
        codes.append(f"({encoder.code_sql(column, table)})::INTEGER AS code_{i}")
      numbers = [f"e.{self._columns[name]} AS number_{i}" for i, name in enumerate(encoders.numeric)]
      columns = ", ".join(["u.uid", "e.time", "e.source", "e.training", *codes, *numbers])
      ((users,),) = con.execute("SELECT count(*) FROM ordered_users").fetchall()
      wanted = f"WHERE u.uid * {n_shards} // {users} NOT IN ({', '.join(map(str, done))})" if done else ""
      stream = con.sql(
        f'SELECT {columns} FROM events e JOIN ordered_users u USING ("user") {" ".join(joins)} {wanted} '
        "ORDER BY u.uid, e.time, e.ord"
      ).to_arrow_reader(BATCH_ROWS)
      for shard, rows in _cut(stream, n_shards, users):
        first, last = (-(-n * users // n_shards) for n in (shard, shard + 1))
        of_shard = ids.sql(f'SELECT "user" FROM ordered_users WHERE uid >= {first} AND uid < {last} ORDER BY uid')
        yield shard, of_shard.to_arrow_table()["user"].to_pylist(), rows


def _cut(stream: Iterator[pa.RecordBatch], n_shards: int, users: int) -> Iterator[tuple[int, pa.Table]]:
  """Cuts batches of events sorted by user into shards; a shard may span batches."""
  current = 0
  parts: list[pa.RecordBatch] = []
  for batch in stream:
    shard = batch.column(0).to_numpy() * n_shards // users
    starts = np.flatnonzero(np.diff(shard, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], batch.num_rows], strict=True):
      if parts and shard[start] != current:
        yield current, pa.Table.from_batches(parts)
        parts = []
      current = int(shard[start])
      parts.append(batch.slice(start, stop - start))
  if parts:
    yield current, pa.Table.from_batches(parts)
