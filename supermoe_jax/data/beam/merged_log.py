"""Merges the parts of an event log that workers have read into one log."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence

import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.data.beam.event_parts import PartFolder, parquet_sql
from supermoe_jax.data.format.shard_files import MOST_SHARDS
from supermoe_jax.data.preparation.log_database import LogDatabase
from supermoe_jax.data.preparation.log_statistics import LogStatistics
from supermoe_jax.data.reading import paths
from supermoe_jax.data.reading.readers import literal
from supermoe_jax.data.reading.sources import Reading, SourceFile, SourceReader

PART_BYTES = 32 * 2**20  # of input files a part

# Reads the given files into the given number of parts.
ReadFiles = Callable[[Sequence[SourceFile], int], None]


class MergedLog(LogDatabase):
  """A log whose events lie in parts; its database holds the users and the value counts of all parts.

  Attributes:
    parts: the folder of the parts.
  """

  def __init__(self, data: config.Data, scratch: pathlib.Path, parts: PartFolder, read: ReadFiles):
    """Has `read` read the files into `parts`, and merges the results; otherwise like `LogDatabase`.

    Raises:
      OSError: a result of reading is missing.
    """
    self.parts, self._read_files = parts, read
    super().__init__(data, scratch)

  def _read(self) -> tuple[Reading, LogStatistics]:
    self.parts.clear()
    reader = SourceReader(self._con, self.data)
    files, reading = reader.open()
    self._read_files(files, count_parts(self.data))
    for file in files:
      if not self.parts.found(file).is_file():
        raise missing_file(self.parts.folder)
      reading.add(file, self.parts.counts(file))
    reader.check_joins(files, reading)
    settled = self.settled
    facts = LogStatistics.merge(list(settled.values()), self.data)
    left_out = facts.duplicates if self.data.duplicates == "drop" else 0
    if facts.events + left_out + sum(reading.dropped.values()) != reading.rows:
      raise missing_file(self.parts.folder)
    if settled:
      self._merge(settled)
    return reading, facts

  @functools.cached_property
  def settled(self) -> dict[int, LogStatistics]:
    """Returns the statistics of each part that has users, by part number in order."""
    return self.parts.settled()

  def _merge(self, settled: dict[int, LogStatistics]) -> None:
    """Creates the tables `ordered_users` and `counted`, the counts of each field's values in all parts."""
    users = [str(self.parts[part] / "users.parquet") for part in settled]
    before = [0]
    for facts in settled.values():
      before.append(before[-1] + facts.users)
    self._con.register("places", pa.table({"filename": users, "first": pa.array(before[:-1], pa.int64())}))
    self._con.execute(
      'CREATE TABLE ordered_users AS SELECT "user", last_event, uid + first AS uid '
      f"FROM {parquet_sql(map(pathlib.Path, users), ', filename = true')} JOIN places USING (filename) ORDER BY uid"
    )
    self._con.unregister("places")
    values = parquet_sql(self.parts[part] / "values.parquet" for part in settled)
    self._con.execute(
      "CREATE TABLE counted AS SELECT field, value, number, training, sum(n)::BIGINT AS n "
      f"FROM {values} GROUP BY field, value, number, training ORDER BY field"
    )

  @property
  def events_sql(self) -> str:
    """See `LogDatabase.events_sql`."""
    return parquet_sql(self.parts[part] / "events.parquet" for part in self.settled)

  def values_sql(self, name: str) -> str:
    """Returns a query of a field's values; see `LogDatabase.values_sql`."""
    index = list(self.data.fields).index(name)
    value = "number" if self.data.fields[name].kind == "numeric" else "value"
    return f"SELECT {value} AS value, training, n FROM counted WHERE field = {index}"

  def count_events(self, user: str) -> int:
    """See `LogDatabase.count_events`."""
    events = parquet_sql(self.parts[part] / "events.parquet" for part in self.settled)
    ((count,),) = self.query(f'SELECT count(*) FROM {events} WHERE "user" = {literal(user)}')
    return int(count)


def count_parts(data: config.Data) -> int:
  """Returns the number of parts that a log is divided into, which depends only on the size of its files."""
  stamps = paths.file_stamps([pattern for source in data.sources.values() for pattern in source.files])
  return max(1, min(-(-sum(size for size, _ in stamps.values()) // PART_BYTES), MOST_SHARDS))


def missing_file(folder: pathlib.Path) -> OSError:
  """Returns the error for a result that a worker wrote but that cannot be found."""
  return OSError(f"{folder} lacks a file that a worker wrote: all machines must reach this directory, under this path")
