"""Splits an event log into parts, each with all events of the users whose id hashes lie in one range.

Any machine may process any part. Machines leave their results in one folder, which all of them must be able to reach:

    files/00000003.json    the counts of a file
    parts/00012/           a part with users: its events, its users in order, the counts of each field's values, and,
                           written last, its statistics
    failures/              errors

Machines may do the same work twice, even at the same time: each writes into a folder of its own and moves complete
results into place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax.atomic_files import replacing_file
from supermoe_jax.data.encoding import splits
from supermoe_jax.data.preparation.event_log import EventTables
from supermoe_jax.data.preparation.log_database import BATCH_ROWS
from supermoe_jax.data.preparation.log_statistics import LogStatistics
from supermoe_jax.data.reading import readers
from supermoe_jax.data.reading.field_sql import field_columns
from supermoe_jax.data.reading.sources import FileCounts, SourceFile, SourceReader, create_rows
from supermoe_jax.errors import ConfigError, DataError

IPC_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


@dataclasses.dataclass(frozen=True)
class PartFolder:
  """The folder with the results for the files and the parts of a log."""

  folder: pathlib.Path

  def clear(self) -> None:
    """Empties the folder, or creates it, with its subfolders."""
    shutil.rmtree(self.folder, ignore_errors=True)
    for name in ("files", "parts", "failures"):
      (self.folder / name).mkdir(parents=True)

  @contextlib.contextmanager
  def own_folder(self) -> Iterator[pathlib.Path]:
    """Yields a new temporary folder, which is removed at the end."""
    with tempfile.TemporaryDirectory(dir=self.folder, prefix="own-", ignore_cleanup_errors=True) as own:
      yield pathlib.Path(own)

  @property
  def failures(self) -> WorkerFailures:
    """Returns the records of errors on workers."""
    return WorkerFailures(self.folder / "failures")

  def found(self, file: SourceFile) -> pathlib.Path:
    """Returns the path of the counts of a file."""
    return self.folder / "files" / f"{file.number:08d}.json"

  def counts(self, file: SourceFile) -> FileCounts:
    """Reads the counts of a file."""
    return FileCounts(**json.loads(self.found(file).read_text()))

  def __getitem__(self, part: int) -> pathlib.Path:
    """Returns the folder of a part."""
    return self.folder / "parts" / f"{part:05d}"

  def settled(self) -> dict[int, LogStatistics]:
    """Returns the statistics of each part that has users, by part number in order."""
    files = sorted((self.folder / "parts").glob("*/facts.json"))
    return {int(file.parent.name): LogStatistics.of_json(json.loads(file.read_text())) for file in files}


class PartReader(contextlib.ExitStack):
  """Reader of event files that sorts their rows by part; use it as a context manager."""

  def __init__(self, data: config.Data, parts: PartFolder, count: int):
    """Opens a database in a temporary folder of `parts`; the log has `count` parts."""
    super().__init__()
    self._parts = parts
    self._own = self.enter_context(parts.own_folder())
    self._con = self.enter_context(_database(data, self._own))
    self._reader = SourceReader(self._con, data)
    # Parts follow the order of users, which is the order of the hash's text: these are its first digits.
    hashed = splits.user_hash_sql('"user"')
    self._part = f"((('0x' || {hashed}[:8])::UBIGINT * {count}) >> 32)::INTEGER"
    self._columns = ", ".join(['"user"', "time", "source", "ord", *field_columns(data).values()])

  def read(self, file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """Yields the usable rows of a file in batches of one part each, as (part number, packed rows).

    Raises:
      DataError: the file or, unless `data.on_bad_rows` allows to drop it, a row cannot be used.
    """
    try:
      counts = self._reader.read_file(file)
      with replacing_file(self._own / "counts.json") as part:
        part.write_text(json.dumps(counts._asdict()))
      (self._own / "counts.json").replace(self._parts.found(file))
      with contextlib.closing(self._con.cursor()) as con:
        stream = con.sql(f"SELECT {self._part} AS part, {self._columns} FROM rows WHERE fault = 0 ORDER BY part")
        for batch in stream.to_arrow_reader(BATCH_ROWS):
          numbers = batch.column(0).to_numpy()
          starts = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
          rows = batch.select(range(1, batch.num_columns))
          for start, stop in zip(starts, [*starts[1:], batch.num_rows], strict=True):
            yield int(numbers[start]), _packed(rows.slice(start, stop - start))
    finally:
      self._con.execute("DELETE FROM rows")


def _packed(rows: pa.RecordBatch) -> bytes:
  sink = pa.BufferOutputStream()
  with pa.ipc.new_stream(sink, rows.schema, options=IPC_OPTIONS) as writer:
    writer.write_batch(rows)
  return sink.getvalue().to_pybytes()


def settle_part(data: config.Data, parts: PartFolder, part: int, packed: Iterable[bytes]) -> None:
  """Settles a part: makes its events, users, counts and statistics from all its packed rows, in any order."""
  with parts.own_folder() as own, _database(data, own) as con:
    create_rows(con, data)
    for rows in _batches(packed):
      con.register("packed", rows)
      con.execute("INSERT INTO rows BY NAME SELECT * FROM packed")
      con.unregister("packed")
    tables = EventTables(con, data)
    facts = tables.settle()
    folder = own / "part"
    folder.mkdir()
    for name, query in (
      ("events", "SELECT * FROM events"),
      ("users", "SELECT * FROM ordered_users ORDER BY uid"),
      ("values", _counted_sql(data, tables)),
    ):
      with replacing_file(folder / f"{name}.parquet") as file:
        con.execute(f"COPY ({query}) TO {readers.literal(str(file))} (FORMAT parquet, COMPRESSION zstd)")
    with replacing_file(folder / "facts.json") as file:
      file.write_text(json.dumps(dataclasses.asdict(facts)))
    try:
      folder.rename(parts[part])
    except OSError:
      if not (parts[part] / "facts.json").is_file():  # else another machine was first
        raise


def _counted_sql(data: config.Data, tables: EventTables) -> str:
  """Returns a query of the count `n` of each value: `field` (its number), `value` or `number`, `training`, `n`."""
  counted = ["SELECT 0 AS field, '' AS value, 0.0::DOUBLE AS number, false AS training, 0::BIGINT AS n WHERE false"]
  for i, (name, field) in enumerate(data.fields.items()):
    if field.kind != "numeric" or field.encoding == "quantile":
      value = "NULL, value" if field.kind == "numeric" else "value, NULL"
      counted.append(f"SELECT {i}, {value}, training, n FROM ({tables.values_sql(name)})")
  return " UNION ALL ".join(counted)


def _batches(packed: Iterable[bytes]) -> Iterator[pa.Table]:
  """Yields the packed rows as tables that are large enough for one insertion."""
  waiting: list[pa.Table] = []
  for content in packed:
    waiting.append(pa.ipc.open_stream(content).read_all())
    if sum(rows.num_rows for rows in waiting) >= BATCH_ROWS:
      yield pa.concat_tables(waiting)
      waiting = []
  if waiting:
    yield pa.concat_tables(waiting)


@contextlib.contextmanager
def open_part(data: config.Data, parts: PartFolder, part: int) -> Iterator[EventTables]:
  """Yields the events of a settled part."""
  with parts.own_folder() as own, _database(data, own) as con:
    con.execute(f"CREATE VIEW events AS SELECT * FROM {parquet_sql([parts[part] / 'events.parquet'])}")
    tables = EventTables(con, data)
    tables.number_users()
    yield tables


def parquet_sql(files: Iterable[pathlib.Path], options: str = "") -> str:
  """Returns the SQL of a scan of Parquet files."""
  return f"read_parquet([{', '.join(readers.literal(str(file)) for file in files)}]{options})"


@contextlib.contextmanager
def _database(data: config.Data, own: pathlib.Path) -> Iterator[duckdb.DuckDBPyConnection]:
  """Yields a connection to a database in memory, which spills into the folder `own`."""
  con = readers.connect(memory=data.memory, spill=own / "spill")
  try:
    yield con
  finally:
    con.close()


# ------------------------------------------------------------------------------------------------------------- failures


class WorkerFailures:
  """Errors of workers, kept as files for the process that waits: not every runner passes errors on reliably.

  A `DataError` or `ConfigError` is lasting: each retry would raise it again. Any other error may pass with a retry.
  """

  KINDS: tuple[tuple[type[Exception], Callable[[str], Exception]], ...] = (
    (DataError, DataError),
    (ConfigError, ConfigError),
    (OSError, OSError),
    (duckdb.Error, OSError),
  )
  LASTING, PASSING = "lasting", "passing"  # endings of the notes

  def __init__(self, folder: pathlib.Path):
    self.folder = folder

  def clear(self) -> None:
    """Removes all notes of errors."""
    shutil.rmtree(self.folder, ignore_errors=True)
    self.folder.mkdir(parents=True)

  @contextlib.contextmanager
  def noting(self, place: str) -> Iterator[None]:
    """Notes errors of the block under `place`. Suppresses lasting errors, since raising them would cause a retry."""
    try:
      yield
    except tuple(kind for kind, _ in self.KINDS) as error:
      lasting = isinstance(error, DataError | ConfigError)
      kind = next(i for i, (kind, _) in enumerate(self.KINDS) if isinstance(error, kind))
      note = self.folder / f"{place}.{uuid.uuid4().hex}"
      note.write_text(json.dumps({"kind": kind, "message": str(error)}))
      note.replace(self.folder / f"{place}.{self.LASTING if lasting else self.PASSING}")
      if not lasting:
        raise

  def before(self, place: str) -> bool:
    """Returns whether a lasting error was noted at a place whose name sorts before `place`."""
    return any(file.stem < place for file in self.folder.glob(f"*.{self.LASTING}"))

  def first(self, *, passing: bool = False) -> Exception | None:
    """Returns the first lasting error by place; with `passing`, if there is none, the first that may pass."""
    files = sorted(self.folder.glob(f"*.{self.LASTING}"))
    files += sorted(self.folder.glob(f"*.{self.PASSING}")) if passing else []
    for file in files:
      saved: dict[str, Any] = json.loads(file.read_text())
      return self.KINDS[saved["kind"]][1](saved["message"])
    return None
