"""Event logs: read, checked and ordered in DuckDB, then handed out one user at a time.

Every event has its place in the log, `ord`: files in the order listed, rows in the order of their file. Events of a
user at equal times stay in that order. Ties are never broken by a value, which would leak it into the sequence.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from supermoe_jax import config
from supermoe_jax.data import parsing, readers
from supermoe_jax.data.field_values import field_columns
from supermoe_jax.data.readers import DataError
from supermoe_jax.data.sources import SourceReader
from supermoe_jax.data.splits import training_user_sql

if TYPE_CHECKING:
  from supermoe_jax.data.numeric import NumberEncoder
  from supermoe_jax.data.vocabulary import Encoders

__all__ = ["DataError", "EventLog", "UserHistory"]

BATCH_ROWS = 1 << 17  # events handed from DuckDB to NumPy at a time


@dataclasses.dataclass(frozen=True)
class UserHistory:
  """The events of one user, in stable time order.

  Shapes: N events, F columns of codes: one of each categorical field (kinds vocabulary and hash) in config order, then
  one of each further value of fields of many, as `config.Data.further_values` lists them; G numeric fields in config
  order.

  Attributes:
    user: the user's id as text.
    time: int64 `[N]`, microseconds since 1970 UTC, ascending.
    source: int32 `[N]`, the index of the event's source in config order.
    codes: int32 `[N, F]`: 0 absent, 1 out of vocabulary, 2 and up the values.
    numeric: float32 `[N, G]`, standardised or as quantiles; NaN where absent.
    n_train: how many events, the first ones, lie in the training period; where users are divided, 0 of a user outside
      training.
  """

  user: str
  time: np.ndarray
  source: np.ndarray
  codes: np.ndarray
  numeric: np.ndarray
  n_train: int


class EventLog:
  """All events of a config, checked, in a DuckDB database on disk; use it as a context manager.

  Its relation `events` has a row an event: `user` VARCHAR, `time` BIGINT microseconds since 1970 UTC, `source` INTEGER,
  `ord` BIGINT, `training` BOOLEAN, and for each field the column that `columns` names: VARCHAR for categorical fields,
  VARCHAR[] for those of many values, all of them, DOUBLE (log1p already taken where configured) for numeric ones, NULL
  where absent.

  Attributes:
    data: the config that it was read from.
    counts: what was read, kept, dropped and found, ready for JSON.
    start: the first event's time, microseconds since 1970 UTC.
    end: the last event's time.
    user_type: the DuckDB type of the user column in the first source's first file.
    columns: the column of each field in `events`.
  """

  def __init__(self, data: config.Data, scratch: pathlib.Path):
    """Reads the sources into a database in `scratch`, an existing directory; sorts beyond the memory spill there too.

    Raises:
      DataError: a file or a value cannot be used; `data.on_bad_rows` says whether such rows may be dropped instead.
    """
    self.data = data
    self.columns = field_columns(data)
    self.start = self.end = 0
    self.user_type = ""
    self.counts: dict[str, Any] = {}
    self._database = scratch / "events.duckdb"
    self._con = readers.connect(self._database, memory=data.memory, spill=scratch / "spill")
    try:
      self._read()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the database and removes it."""
    self._con.close()
    for file in self._database.parent.glob(self._database.name + "*"):
      file.unlink()

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
    duplicates = self._find_duplicates()
    if duplicates and self.data.duplicates == "drop":
      dropped["duplicate"] = duplicates
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
    for index, source in enumerate(reader.counts.values()):
      source["rows_kept"] = kept.get(index, 0)

  def _find_duplicates(self) -> int:
    """Counts rows that repeat an earlier one in user, time, source and every field; removes them if so configured."""
    equal = ['"user"', "time", "source", *self.columns.values()]
    columns, hashed = ", ".join(equal), f"hash({', '.join(equal)})"
    # Comparing every column of every row is slow; it is kept to the rows whose hashes are equal.
    self._con.execute(
      f"CREATE TEMP TABLE alike AS SELECT {hashed} AS hashed FROM rows GROUP BY ALL HAVING count(*) > 1"
    )
    self._con.execute(
      f"CREATE TEMP TABLE duplicates AS SELECT {columns}, min(ord) AS first, count(*) - 1 AS repeats "
      f"FROM (SELECT *, {hashed} AS hashed FROM rows) SEMI JOIN alike USING (hashed) GROUP BY {columns} "
      "HAVING repeats > 0"
    )
    ((repeats,),) = self.query("SELECT coalesce(sum(repeats), 0)::BIGINT FROM duplicates")
    if repeats and self.data.duplicates == "drop":
      same = " AND ".join(f"rows.{c} IS NOT DISTINCT FROM d.{c}" for c in equal)
      self._con.execute(f"DELETE FROM rows USING duplicates d WHERE {same} AND rows.ord > d.first")
    self._con.execute("DROP TABLE duplicates")
    self._con.execute("DROP TABLE alike")
    return repeats

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
      'SELECT count(*), count(DISTINCT "user"), count_if(training), min(time), max(time), '
      + ", ".join(nulls)
      + " FROM events"
    )
    events, users, training, self.start, self.end = row[:5]
    if not training and self.data.split.mode == "user":
      raise DataError(
        f"None of the {users} users has an event in training: by their hash all belong to validation or test, or their "
        "events lie after config.data.split.log_end. Lower user_validation and user_test, or bring more users."
      )
    if not training:
      raise DataError(
        f"No event lies before config.data.split.train_end={self.data.split.train_end}: the log runs from "
        f"{parsing.date(self.start)} to {parsing.date(self.end)}. Set a train_end within it."
      )
    ((tied,),) = self.query(
      'SELECT coalesce(sum(n), 0)::BIGINT FROM (SELECT count(*) AS n FROM events GROUP BY "user", time) WHERE n > 1'
    )
    return {
      "events": events,
      "users": users,
      "training_events": training,
      "tie_rate": tied / events,
      "nulls": dict(zip(self.columns, row[5:], strict=True)),
      "first": parsing.date(self.start),
      "last": parsing.date(self.end),
    }

  # ---------------------------------------------------------------------------------------------------------- histories

  def histories(self, encoders: Encoders) -> Iterator[UserHistory]:
    """Yields each user's encoded events, users in the order of their ids as text; holds one batch at a time."""
    # A connection of its own: queries elsewhere must not end this stream.
    con = self._con.cursor()
    con.execute("SET TimeZone = 'UTC'")
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
    columns = ", ".join(['e."user"', "e.time", "e.source", "e.training", *codes, *numbers])
    stream = con.sql(
      f'SELECT {columns} FROM events e {" ".join(joins)} ORDER BY e."user", e.time, e.ord'
    ).to_arrow_reader(BATCH_ROWS)
    try:
      yield from _cut_per_user(stream, len(codes), list(encoders.numeric.values()))
    finally:
      con.close()


def _cut_per_user(
  stream: Iterator[pa.RecordBatch], n_codes: int, numbers: Sequence[NumberEncoder]
) -> Iterator[UserHistory]:
  """Cuts batches of sorted events into users; a user may span batches."""
  user = ""
  parts: list[list[np.ndarray]] = []  # of the current user, the columns of `_arrays` from each batch
  for batch in stream:
    if not batch.num_rows:
      continue
    users = batch.column(0)
    changes = np.flatnonzero(pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)) + 1
    starts = np.concatenate([[0], changes, [batch.num_rows]])
    arrays = _arrays(batch, n_codes, numbers)
    names = users.take(pa.array(starts[:-1])).to_pylist()
    for name, start, stop in zip(names, starts[:-1], starts[1:], strict=True):
      if name != user and parts:
        yield _history(user, parts)
        parts = []
      user = name
      parts.append([a[start:stop] for a in arrays])
  if parts:
    yield _history(user, parts)


def _arrays(batch: pa.RecordBatch, n_codes: int, numbers: Sequence[NumberEncoder]) -> list[np.ndarray]:
  """The columns time, source, training, codes `[N, F]` and numeric `[N, G]`, encoded, of a batch of N events."""
  columns = [c.to_numpy(zero_copy_only=False) for c in batch.columns[1:]]
  time, source, training, *rest = columns
  n = batch.num_rows
  codes = np.stack(rest[:n_codes], axis=1) if n_codes else np.zeros((n, 0))
  encoded = [e.encode_all(values.astype(np.float64)) for e, values in zip(numbers, rest[n_codes:], strict=True)]
  numeric = np.stack(encoded, axis=1) if encoded else np.zeros((n, 0))
  return [time.astype(np.int64), source.astype(np.int32), training, codes.astype(np.int32), numeric.astype(np.float32)]


def _history(user: str, parts: list[list[np.ndarray]]) -> UserHistory:
  # concatenate copies, so that a history that is kept does not keep its whole batch
  time, source, training, codes, numeric = (np.concatenate(p) for p in zip(*parts, strict=True))
  return UserHistory(user, time, source, codes, numeric, int(training.sum()))
