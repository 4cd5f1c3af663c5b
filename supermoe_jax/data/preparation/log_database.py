"""Keeps an event log in a DuckDB database after reading, so that encoders can be fitted and users listed."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Self

import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.atomic_files import replacing_file
from supermoe_jax.data.preparation.log_statistics import LogStatistics, log_counts
from supermoe_jax.data.reading import readers
from supermoe_jax.data.reading.sources import FILE_PLACES, Reading

BATCH_ROWS = 1 << 17  # handed from DuckDB to NumPy at a time


class LogDatabase(abc.ABC):
  """An event log in a DuckDB database on disk; use it as a context manager.

  The table `ordered_users` has a row per user: `user`; `uid`, from 0 in the order of the ids' hashes, so that any
  stretch of users is a sample; and `last_event`, the time of the user's last event.

  Attributes:
    data: the config that the log was read with.
    facts: statistics of the events.
    counts: numbers of rows read, kept and dropped, and further findings, ready for JSON.
    start: the first event's time, microseconds since 1970 UTC.
    end: the last event's time.
    user_type: the DuckDB type of the user column in the first source's first file.
    resumed: whether an earlier preparation had read the log.
  """

  facts: LogStatistics

  def __init__(self, data: config.Data, scratch: pathlib.Path, *, part: bool = False):
    """Reads the log into a database in `scratch`, an existing directory; sorts larger than the memory spill there too.

    With `part` it is a part of a log, which may have no event in training, and sources without files. A finished
    database of the same data in `scratch` is used again.

    Raises:
      DataError: a file or a value cannot be used; `data.on_bad_rows` decides whether such rows may be dropped instead.
    """
    self.data, self._part = data, part
    self.start = self.end = 0
    self.user_type = ""
    self.counts: dict[str, Any] = {}
    self.resumed = False
    self._database, self._known = scratch / "log.duckdb", scratch / "log.json"
    if not (self._known.is_file() and self._database.is_file()):  # interrupted between the two
      self._known.unlink(missing_ok=True)
      for file in scratch.glob(self._database.name + "*"):
        file.unlink()
    self._con = readers.connect(self._database, memory=data.memory, spill=scratch / "spill")
    # Searching the best compression of each column took half of the reading time, for files that are soon removed.
    self._con.execute("SET force_compression = 'dictionary'")
    try:
      if self._known.is_file():
        self._recall()
      else:
        reading, self.facts = self._read()
        self.counts = log_counts(data, reading, self.facts, part=part)
        self.user_type = reading.user_type
        self._remember()
      assert self.facts.first is not None and self.facts.last is not None  # `log_counts` has seen an event
      self.start, self.end = self.facts.first, self.facts.last
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

  @abc.abstractmethod
  def _read(self) -> tuple[Reading, LogStatistics]:
    """Reads the log into the database."""

  def _remember(self) -> None:
    """Writes the database to disk, and a file with its counts and statistics."""
    self._con.execute("CHECKPOINT")
    known = {"counts": self.counts, "user_type": self.user_type, "facts": dataclasses.asdict(self.facts)}
    with replacing_file(self._known) as part:
      part.write_text(json.dumps(known))

  def _recall(self) -> None:
    known = json.loads(self._known.read_text())
    self.counts, self.user_type, self.resumed = known["counts"], known["user_type"], True
    self.facts = LogStatistics.of_json(known["facts"])

  def query(self, sql: str, **tables: pa.Table) -> list[tuple[Any, ...]]:
    """Returns the rows of a query over the database and over the tables given, each under its keyword."""
    for name, table in tables.items():
      self._con.register(name, table)
    try:
      return self._con.execute(sql).fetchall()
    finally:
      for name in tables:
        self._con.unregister(name)

  @property
  def scratch(self) -> pathlib.Path:
    """Returns the directory of work files."""
    return self._database.parent

  def arrow(self, sql: str) -> pa.Table:
    """Returns the result of a query over the database as an Arrow table."""
    return self._con.sql(sql).to_arrow_table()

  @property
  @abc.abstractmethod
  def events_sql(self) -> str:
    """Returns the SQL of a relation with all kept events; `EventTables` names its columns."""

  def place(self, order: int) -> tuple[str, int]:
    """Returns the file and the row, from 1, of the event with the place `order` in the log."""
    files = [file for source in self.counts["sources"].values() for file in source["files"]]
    number, row = divmod(order, FILE_PLACES)
    return files[number], row + 1

  @abc.abstractmethod
  def values_sql(self, name: str) -> str:
    """Returns a query of the kept values of a field: `value`, `training`, and `n`, its count in training or after it.

    Numbers are counted where the field's encoding needs it.
    """

  @abc.abstractmethod
  def count_events(self, user: str) -> int:
    """Returns the number of events of a user."""

  @contextlib.contextmanager
  def row_batches(self, sql: str, batch: int = BATCH_ROWS, **tables: pa.Table) -> Iterator[pa.RecordBatchReader]:
    """Yields a reader of the rows of a query, `batch` rows at a time; other arguments as in `query`."""
    with contextlib.closing(self._con.cursor()) as con:  # a separate one: queries elsewhere must not end the stream
      for name, table in tables.items():
        con.register(name, table)
      yield con.sql(sql).to_arrow_reader(batch)

  def users(self) -> contextlib.AbstractContextManager[pa.RecordBatchReader]:
    """Returns all users as `dataset.read_users` does; the record is the user's number in the order of the hashes."""
    return self.row_batches('SELECT "user", uid AS record, last_event FROM ordered_users ORDER BY uid')

  def count_users(self, named: Iterable[str]) -> int:
    """Returns how many of the named users have an event."""
    table = pa.table({"user": pa.array(named, pa.string())})
    ((count,),) = self.query('SELECT count(*) FROM ordered_users SEMI JOIN named USING ("user")', named=table)
    return count
