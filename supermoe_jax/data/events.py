"""Event logs: read, checked and ordered in DuckDB, then handed out one shard of users at a time.

Every event has its place in the log, `ord`: files in the order listed, rows in the order of their file. Events of a
user at equal times stay in that order. Ties are never broken by a value, which would leak it into the sequence.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.data import parsing, readers
from supermoe_jax.data.field_values import field_columns
from supermoe_jax.data.readers import DataError
from supermoe_jax.data.replace import replacing_file
from supermoe_jax.data.sources import SourceReader
from supermoe_jax.data.splits import training_user_sql, user_hash_sql

if TYPE_CHECKING:
  from supermoe_jax.data.vocabulary import Encoders

__all__ = ["DataError", "EventLog"]

BATCH_ROWS = 1 << 17  # events handed from DuckDB to NumPy at a time

TIE = 'hash("user", time)'


class EventLog:
  """All events of a config, checked, in a DuckDB database on disk; use it as a context manager.

  Its relation `events` has a row an event: `user` VARCHAR, `time` BIGINT microseconds since 1970 UTC, `source` INTEGER,
  `ord` BIGINT, `training` BOOLEAN, and for each field the column that `columns` names: VARCHAR for categorical fields,
  VARCHAR[] for those of many values, all of them, DOUBLE (log1p already taken where configured) for numeric ones, NULL
  where absent. Its table `ordered_users` has a row a user: `user`, and `uid`, from 0 in the order of the hashes of the
  ids: any stretch of users is a sample.

  Attributes:
    data: the config that it was read from.
    counts: what was read, kept, dropped and found, ready for JSON.
    start: the first event's time, microseconds since 1970 UTC.
    end: the last event's time.
    user_type: the DuckDB type of the user column in the first source's first file.
    columns: the column of each field in `events`.
    resumed: whether it was read before.
  """

  def __init__(self, data: config.Data, scratch: pathlib.Path, *, part: bool = False):
    """Reads the sources into a database in `scratch`, an existing directory; sorts beyond the memory spill there too.

    With `part` it is a part of a log, which may have no event in training, and sources without files.

    A database of the same data that stands there already is taken, if it was read to its end.

    Raises:
      DataError: a file or a value cannot be used; `data.on_bad_rows` says whether such rows may be dropped instead.
    """
    self.data, self._part = data, part
    self.columns = field_columns(data)
    self.start = self.end = 0
    self.user_type = ""
    self.counts: dict[str, Any] = {}
    self.resumed = False
    self._database, self._facts_file = scratch / "events.duckdb", scratch / "events.json"
    if not self._facts_file.is_file():
      for file in scratch.glob(self._database.name + "*"):
        file.unlink()
    self._con = readers.connect(self._database, memory=data.memory, spill=scratch / "spill")
    # To look for the best compression of each column took half of the time of reading, for files that are soon removed.
    self._con.execute("SET force_compression = 'dictionary'")
    try:
      if self._facts_file.is_file():
        self._recall()
      else:
        self._read()
        self._remember()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the database; its files stay in the scratch directory."""
    self._con.close()

  def _remember(self) -> None:
    """Puts the database on disk, and beside it what is known of it."""
    self._con.execute("CHECKPOINT")
    facts = {"counts": self.counts, "start": self.start, "end": self.end, "user_type": self.user_type}
    with replacing_file(self._facts_file) as part:
      part.write_text(json.dumps(facts))

  def _recall(self) -> None:
    facts = json.loads(self._facts_file.read_text())
    self.counts, self.start, self.end = facts["counts"], facts["start"], facts["end"]
    self.user_type, self.resumed = facts["user_type"], True

  def query(self, sql: str, **tables: pa.Table) -> list[tuple[Any, ...]]:
    """Returns the rows of a query over `events` and over the tables given, each under its keyword."""
    for name, table in tables.items():
      self._con.register(name, table)
    try:
      return self._con.execute(sql).fetchall()
    finally:
      for name in tables:
        self._con.unregister(name)

  def values_sql(self, name: str) -> str:
    """A query of the values of a categorical field that are kept, none absent: `value` and the event's `training`."""
    column, many = self.columns[name], self.data.fields[name].many
    if many:
      return f"SELECT unnest({column}[:{many}]) AS value, training FROM events"
    return f"SELECT {column} AS value, training FROM events WHERE {column} IS NOT NULL"

  def arrow(self, sql: str) -> pa.Table:
    """Returns the result of a query over `events` as an Arrow table."""
    return self._con.sql(sql).to_arrow_table()

  @contextlib.contextmanager
  def stream(self, sql: str, **tables: pa.Table) -> Iterator[pa.RecordBatchReader]:
    """Gives the rows of a query, as `query` does, a batch at a time."""
    with contextlib.closing(self._con.cursor()) as con:  # its own: queries elsewhere must not end the stream
      for name, table in tables.items():
        con.register(name, table)
      yield con.sql(sql).to_arrow_reader(BATCH_ROWS)

  def users(self) -> contextlib.AbstractContextManager[pa.RecordBatchReader]:
    """Every user, as `dataset.read_users` has them: the record is the user's number in the order of the hashes."""
    return self.stream('SELECT "user", uid AS record, last_event FROM ordered_users ORDER BY uid')

  def count_users(self, named: Iterable[str]) -> int:
    """How many of the users named have an event."""
    table = pa.table({"user": pa.array(named, pa.string())})
    ((count,),) = self.query('SELECT count(*) FROM ordered_users SEMI JOIN named USING ("user")', named=table)
    return count

  # ------------------------------------------------------------------------------------------------------------ reading

  def _read(self) -> None:
    reader = SourceReader(self._con, self.data)
    reader.read()
    self.user_type = reader.user_type
    dropped: dict[str, int] = {}
    for source in reader.counts.values():
      for reason, n in source["dropped"].items():
        dropped[reason] = dropped.get(reason, 0) + n
    if dropped:
      self._con.execute("DELETE FROM rows WHERE fault > 0")
    read = sum(source["rows_read"] for source in reader.counts.values())
    if read == sum(dropped.values()):
      listed = ", ".join(f"{reason}: {n}" for reason, n in dropped.items())
      raise DataError(f"No event is left of {read} rows ({listed}); correct config.data.sources.")
    self._find_ties()
    duplicates = self._find_duplicates()
    if duplicates and self.data.duplicates == "drop":
      dropped["duplicate"] = duplicates
    self._number_users()
    self._mark_training()
    self.counts = {
      "rows_read": read,
      "dropped": dropped,
      "duplicate_rows": duplicates,
      **self._facts(),
      "user_rows_dropped": reader.user_rows_dropped,
      "sources": reader.counts,
    }
    self.counts["rows_kept"] = self.counts["events"]
    kept = dict(self.query("SELECT source, count(*) FROM rows GROUP BY source"))
    for name, source in reader.counts.items():
      source["rows_kept"] = kept.get(list(self.data.sources).index(name), 0)

  def _find_ties(self) -> None:
    """Creates `tied`, the hashes of user and time that several rows have: only such rows can be tied, or duplicates.

    Comparing columns is slow; it is kept to these rows.
    """
    self._con.execute(f"CREATE TEMP TABLE tied AS SELECT {TIE} AS tie FROM rows GROUP BY tie HAVING count(*) > 1")

  def _find_duplicates(self) -> int:
    """Counts rows that repeat an earlier one in user, time, source and every field; removes them if so configured."""
    equal = ['"user"', "time", "source", *self.columns.values()]
    columns = ", ".join(equal)
    self._con.execute(
      f"CREATE TEMP TABLE duplicates AS SELECT {columns}, min(ord) AS first, count(*) - 1 AS repeats "
      f"FROM (SELECT *, {TIE} AS tie FROM rows) SEMI JOIN tied USING (tie) GROUP BY {columns} HAVING repeats > 0"
    )
    ((repeats,),) = self.query("SELECT coalesce(sum(repeats), 0)::BIGINT FROM duplicates")
    if repeats and self.data.duplicates == "drop":
      same = " AND ".join(f"rows.{c} IS NOT DISTINCT FROM d.{c}" for c in equal)
      self._con.execute(f"DELETE FROM rows USING duplicates d WHERE {same} AND rows.ord > d.first")
    self._con.execute("DROP TABLE duplicates")
    return repeats

  def _number_users(self) -> None:
    """Creates `ordered_users`, in the order in which records stand."""
    hashed = user_hash_sql('"user"')
    self._con.execute(
      'CREATE TABLE ordered_users AS SELECT "user", last_event, '
      f'row_number() OVER (ORDER BY {hashed}, "user") - 1 AS uid '
      'FROM (SELECT "user", max(time) AS last_event FROM rows GROUP BY "user") ORDER BY uid'
    )

  def _mark_training(self) -> None:
    """Creates `events`: the rows, and whether each lies in the training period, or is of a training user."""
    split = self.data.split
    columns = ", ".join(['"user"', "time", "source", "ord", *self.columns.values()])
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

  def _facts(self) -> dict[str, Any]:
    """Counts what the log holds, and sets its first and last time."""
    names = list(self.data.sources)
    nulls = []
    for name, column in self.columns.items():
      carriers = [names.index(s) for s in self.data.fields[name].sources] or range(len(names))
      nulls.append(f"count_if({column} IS NULL AND source IN ({', '.join(map(str, carriers))}))")
    (row,) = self.query(
      "SELECT count(*), (SELECT count(*) FROM ordered_users), count_if(training), min(time), max(time), "
      + ", ".join(nulls)
      + " FROM events"
    )
    events, users, training, self.start, self.end = row[:5]
    if not training and not self._part and self.data.split.mode == "user":
      raise DataError(
        f"None of the {users} users has an event in training: by their hash all belong to validation or test, or their "
        "events lie after config.data.split.log_end. Lower user_validation and user_test, or bring more users."
      )
    if not training and not self._part:
      raise DataError(
        f"No event lies before config.data.split.train_end={self.data.split.train_end}: the log runs from "
        f"{parsing.date(self.start)} to {parsing.date(self.end)}. Set a train_end within it."
      )
    ((tied,),) = self.query(
      f"SELECT coalesce(sum(n), 0)::BIGINT FROM (SELECT count(*) AS n FROM (SELECT *, {TIE} AS tie FROM rows) "
      'SEMI JOIN tied USING (tie) GROUP BY "user", time) WHERE n > 1'
    )
    self._con.execute("DROP TABLE tied")
    return {
      "events": events,
      "users": users,
      "training_events": training,
      "tie_rate": tied / events,
      "nulls": dict(zip(self.columns, row[5:], strict=True)),
      "first": parsing.date(self.start),
      "last": parsing.date(self.end),
    }

  # ------------------------------------------------------------------------------------------------------------- shards

  def shards(
    self, encoders: Encoders, n_shards: int, done: Collection[int] = ()
  ) -> Iterator[tuple[int, list[str], pa.Table]]:
    """Yields the encoded events of the users of each of `n_shards` shards that is not `done`; holds one at a time.

    Users are ordered by a hash of their ids, and each shard has the next n-th of them.

    Returns: of each shard with users its index, the users' ids, and their events sorted by user, time and place in the
      log, as `histories.read_block` reads them: `uid`, the user's number in that order, `time`, `source`, `training`,
      the codes, the numbers.
    """
    # Connections of their own: queries elsewhere must not end this stream.
    with contextlib.closing(self._con.cursor()) as con, contextlib.closing(self._con.cursor()) as ids:
      joins, codes = [], []
      place: dict[str, int] = {}
      for i, name in enumerate([*encoders.categorical, *self.data.further_values]):
        encoder, column, table = encoders.categorical[name], f"e.{self.columns[name]}", f"codes_{i}"
        if self.data.fields[name].many:
          place[name] = place.get(name, 0) + 1
          column = f"{column}[{place[name]}]"
        if (known := encoder.table()) is not None:
          con.register(table, known)
          joins.append(f"LEFT JOIN {table} ON {column} = {table}.value")
        codes.append(f"({encoder.code_sql(column, table)})::INTEGER AS code_{i}")
      numbers = [f"e.{self.columns[name]} AS number_{i}" for i, name in enumerate(encoders.numeric)]
      columns = ", ".join(["u.uid", "e.time", "e.source", "e.training", *codes, *numbers])
      users = self.counts["users"]
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
