"""Opens a prepared dataset: random access to users, with the schema and the manifest.

A dataset directory holds a TFDS dataset in ArrayRecord (one record per user, no TensorFlow needed), the fitted encoders
and `manifest.json`. The manifest is written last: a directory without it is not a dataset.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_data_source import ArrayRecordDataSource

from supermoe_jax import config
from supermoe_jax.batch import Schema
from supermoe_jax.data.dataset.bounded_cache import BoundedCache
from supermoe_jax.data.encoding import vectors
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory, end_to_end
from supermoe_jax.data.encoding.splits import TRAIN, user_split
from supermoe_jax.data.encoding.vectors import Vectors
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.format import integrity, records, shard_files
from supermoe_jax.data.format.records import RecordArray
from supermoe_jax.data.format.schema import make_aggregator, make_schema
from supermoe_jax.data.format.stray_rows import StrayTimes
from supermoe_jax.data.reading import paths
from supermoe_jax.errors import DataError

try:
  import resource
except ImportError:  # Windows has no such limit
  resource = None  # type: ignore[assignment]

FORMAT_VERSION = 4

USERS = "users.parquet"  # the table with the user of each record

# The cache of decoded records and of their snapshots' aggregates holds this many bytes of arrays. The two were most of
# the cost of a training row, and a small dataset shows its records many times. What does not fit is made again.
KEPT_BYTES = 512 * 2**20

# Aggregates of all of a user's snapshots cost little more than of a few, unless there are this many times more.
MANY_SNAPSHOTS = 16

# Threads that read all records, and the number of records that each reads at a time.
READERS = 4
READ_AT_ONCE = 256

# Open files of a process in addition to a dataset's shards; a shard stays open once it was read.
OTHER_FILES = 256


def prepared_tie_rate(manifest: Mapping[str, Any]) -> float:
  """Returns the share of the prepared events that share user and time with another one, without appended events.

  `ties="auto"` follows it, so that an append never changes what a task asks.
  """
  rates = [append["tie_rate_before"] for append in manifest.get("appends", ()) if "tie_rate_before" in append]
  return float(rates[0] if rates else manifest["reading"]["tie_rate"])


class Dataset:
  """A prepared dataset: random access to users, with the schema and the manifest."""

  def __init__(self, path: str | pathlib.Path):
    """Opens a dataset directory.

    Raises:
      DataError: there is no dataset at `path`, or it is not as it was written.
    """
    self.path = pathlib.Path(path)
    self.manifest: dict[str, Any] = integrity.read_manifest(self.path, FORMAT_VERSION)
    self.config = config.resolve_prepared(self.manifest["config"])
    self.encoders = Encoders.load(self.path / "encoders")
    self._vectors = [e for e in self.encoders.categorical.values() if isinstance(e, Vectors)]
    for encoder in self._vectors:
      _ = encoder.rows  # opened now, because an append may replace the files
    self.aggregator = make_aggregator(self.config.data, self.encoders)
    statistics = self.manifest["aggregates"]
    self.aggregate_mean = np.array(statistics["mean"], np.float32)
    self.aggregate_scale = np.array(statistics["scale"], np.float32)
    self._parts = records.record_arrays(self.schema, self.config.labelled_tasks)
    _allow_files(len(self.manifest["shards"]) + OTHER_FILES)
    try:
      files = [str(self.path / shard_files.DIRECTORY / name) for name in self.manifest["shards"]]
      self._source = ArrayRecordDataSource(files)
    except RuntimeError as error:  # ArrayRecord's error about a file's end, which holds the number of records
      raise DataError(f"a shard of {self.path} is damaged ({error}); prepare the dataset again.") from error
    self._kept = BoundedCache(KEPT_BYTES)
    # The place of each user's record in the shards; None: users and records have one order, as before any append.
    self.places: np.ndarray | None = None
    if self.manifest.get("appends"):
      self.places = read_users(self.path, ["record"])["record"].to_numpy()
    held = len(self._source) if self.places is None else len(self.places)
    if held != self.manifest["users"]:
      raise DataError(f"{self.path} holds {held} users, its manifest says {self.manifest['users']}; prepare again.")
    # Found now, because an append may replace the table of users.
    self._training_users = self._held_in() if self.config.data.split.mode == "user" else None

  def __repr__(self) -> str:
    manifest, known = self.manifest, self.manifest["labels"]
    lines = [
      f"Dataset({str(self.path)!r}: {manifest['users']:,} users, {manifest['events']:,} events from "
      f"{manifest['log']['first']} to {manifest['log']['last']})"
    ]
    for name, splits in known.items():
      lines.append(f"  {name}: " + ", ".join(f"{n['known']:,} labels in {split}" for split, n in splits.items()))
    lines += [f"  warning: {warning}" for warning in self.manifest["warnings"]]
    return "\n".join(lines)

  @property
  def training_users(self) -> np.ndarray:
    """Returns the users that training may read, ascending: all users that the split `user` does not hold out."""
    return np.arange(len(self)) if self._training_users is None else self._training_users

  @functools.cached_property
  def schema(self) -> Schema:
    """Returns the schema, the sizes that a model is built from."""
    return make_schema(self.config, self.encoders)

  @property
  def stray_times(self) -> StrayTimes | None:
    """Returns the stray times of the log; None if it has none."""
    saved = self.manifest.get("stray_times")
    return None if saved is None else StrayTimes.from_json(saved)

  @property
  def last_usual_event(self) -> int:
    """Returns the time of the last event, stray ones aside (see `stray_times`), in microseconds since 1970 UTC."""
    strays = self.stray_times
    return strays.last if strays else int(self.manifest["last_event_microseconds"])

  @property
  def tie_rate(self) -> float:
    """Returns the share of events that decides about `ties="auto"`; see `prepared_tie_rate`."""
    return prepared_tie_rate(self.manifest)

  @functools.cached_property
  def hidden_codes(self) -> tuple[int, ...]:
    """Returns the columns of the codes that the model must not see."""
    columns = [*self.schema.categorical, *self.schema.extra_columns]
    return tuple(i for i, n in enumerate(columns) if n not in self.schema.inputs)

  @functools.cached_property
  def hidden_numeric(self) -> tuple[int, ...]:
    """Returns the columns of the numbers that the model must not see."""
    return tuple(i for i in range(len(self.schema.numeric)) if i not in self.schema.numeric_inputs)

  @functools.cached_property
  def vector_columns(self) -> tuple[int, ...]:
    """Returns the columns of the codes of vectors."""
    return tuple(map(self.schema.field, self.schema.vectors))

  def vectors(self, codes: np.ndarray, own: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Returns the vectors with `codes […, K]` as batches hold them: float16 `[…, V]`; histories here have no `own`."""
    assert own is None
    return vectors.looked_up(self._vectors, codes)

  def check_matches(self, wanted: config.Config, *, appended: bool = True) -> None:
    """Raises DataError if the dataset was prepared from another data section or other task labels.

    With `appended` False, `wanted` may lack the files that were given to 'supermoe append' by name. So a model that was
    trained before an append is of use after it.
    """
    # Hashes would differ for a setting that is new in the code; here it has its default on both sides.
    before, now = dataset_identity(self.manifest, wanted.data_identity(), appended), wanted.data_identity()
    if before != now:
      changed = config.differences(before, now)
      raise DataError(
        f"{self.path} was prepared with another configuration ({'; '.join(changed[:4])}). Prepare again with "
        "--overwrite, or name another config.data.path."
      )

  def check_files(self) -> None:
    """Raises DataError if a file that the dataset was prepared from has changed or is missing, or a file is new."""
    then, now = self.manifest["files"], input_files(self.config)
    if then != now:
      file = min(f for f in then.keys() | now.keys() if then.get(f) != now.get(f))
      what = "has changed" if file in then and file in now else ("is not there" if file in then else "is new")
      raise DataError(
        f"the files that {self.path} was prepared from have changed; prepare again with --overwrite, or, where files "
        f"are new, add them with 'supermoe append'. The first of them is {file}, which {what} (relative paths start at "
        "the working directory)."
      )

  def __len__(self) -> int:
    return self.manifest["users"]

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns a user's record; `records.tfds_features` lists its parts, whose arrays are read-only.

    Raises:
      DataError: the record's shard is damaged.
    """
    kept = self._kept.get(("record", int(index)))
    if kept is None:
      kept = self._read(int(index))
      self._kept.offer(("record", int(index)), kept, sum(a.nbytes for a in kept.values() if isinstance(a, np.ndarray)))
    return dict(kept)

  def _read(self, index: int) -> dict[str, Any]:
    return self.decode(self.contents([int(index if self.places is None else self.places[index])])[0])

  @property
  def records(self) -> int:
    """Returns the number of records in the shards, including records that an append has replaced."""
    return len(self._source)

  def contents(self, places: Sequence[int]) -> list[bytes]:
    """Returns the bytes of the records at these places among all records of the shards.

    Raises:
      DataError: the shard is damaged, or the process may not open all shards.
    """
    try:
      return self._source.__getitems__(list(places))
    except RuntimeError as error:  # ArrayRecord's error about a wrong checksum
      if os.strerror(errno.EMFILE) in str(error):
        n = len(self.manifest["shards"])
        raise DataError(
          f"{self.path} has {n} shards, and this process may not open so many files; raise the limit: ulimit -n {2 * n}"
        ) from error
      which = f"record {places[0]}" if len(places) == 1 else f"one of {len(places)} records"
      raise DataError(f"{which} of {self.path} is damaged ({error}); prepare the dataset again.") from error

  def decode(self, content: bytes, parts: Mapping[str, RecordArray] | None = None) -> dict[str, Any]:
    """Returns the record encoded in `content`, or some parts of it.

    Raises:
      DataError: the bytes are no record of this dataset.
    """
    try:
      return records.decode_record(content, self._parts if parts is None else parts)
    except ValueError as error:
      raise DataError(f"a record of {self.path} is damaged ({error}); prepare the dataset again.") from error

  def _held_in(self) -> np.ndarray:
    """Returns the training users of the split `user`."""
    users = read_users(self.path, ["user"])["user"].to_pylist()
    return np.flatnonzero([user_split(user, self.config.data.split) == TRAIN for user in users])

  @functools.cached_property
  def training_sizes(self) -> np.ndarray:
    """Returns each user's numbers of training events and of training snapshots that see an event: int32 `[N, 2]`.

    The first access reads every record.
    """
    sizes = np.zeros((len(self), 2), np.int32)

    def read(start: int) -> None:
      for index in range(start, min(start + READ_AT_ONCE, len(self))):
        record = self[index]
        n_train, seen = int(record["n_train"]), record["snapshot_events"][record["snapshot_split"] == TRAIN]
        sizes[index] = n_train, np.sum((seen > 0) & (seen <= n_train))

    with concurrent.futures.ThreadPoolExecutor(READERS) as readers:
      list(readers.map(read, range(0, len(self), READ_AT_ONCE)))
    return sizes

  def history(self, record: Mapping[str, Any]) -> UserHistory:
    """Returns the events of a record."""
    n = len(record["time"])
    none = np.zeros((n, 0))
    return UserHistory(
      record["user"],
      record["time"],
      record["source"],
      record.get("codes", none.astype(np.int32)),
      record.get("numeric", none.astype(np.float32)),
      int(record["n_train"]),
    )

  def histories(self, users: np.ndarray) -> UserBlock:
    """Returns the histories of the users with the indices `users [U]`, read in one go and not cached.

    Raises:
      DataError: a shard is damaged.
    """
    places = users if self.places is None else self.places[users]
    events = {n: p for n, p in self._parts.items() if n in records.EVENTS}
    return end_to_end([self.history(self.decode(c, events)) for c in self.contents(places.tolist())])

  def snapshot_aggregates(
    self, index: int, record: Mapping[str, Any], history: UserHistory, chosen: np.ndarray
  ) -> np.ndarray:
    """Returns the standardised aggregates `[S, A]` at the snapshots `chosen [S]` of the user with this index."""
    time, n_events = record["snapshot_time"], record["snapshot_events"]
    kept = self._kept.get(("aggregates", int(index)))
    if kept is None:
      size = 4 * len(time) * self.schema.aggregates
      if size > self._kept.room or len(time) > MANY_SNAPSHOTS * len(chosen):
        return self.aggregates(history.block, np.zeros(len(chosen), np.int64), time[chosen], n_events[chosen])
      kept = self.aggregates(history.block, np.zeros(len(time), np.int64), time, n_events)
      self._kept.offer(("aggregates", int(index)), kept, kept.nbytes)
    return kept[chosen]

  def aggregates(self, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    """Returns standardised aggregates `[S, A]` at snapshots of a block's users; A is 0 if the config has none.

    Snapshot s is that of the user `user[s]` at `time[s]`, and sees `n_events[s]` events.
    """
    if self.aggregator is None:
      return np.zeros((len(time), 0), np.float32)
    return (self.aggregator(block, user, time, n_events) - self.aggregate_mean) / self.aggregate_scale


def dataset_identity(manifest: Mapping[str, Any], wanted: Mapping[str, Any], appended: bool) -> dict[str, Any]:
  """Returns the settings that a dataset was prepared from, for comparison with `wanted`, a `Config.data_identity`.

  Without `appended`, files that were appended by name are left out unless `wanted` names them too.
  """
  found = config.resolve_prepared(manifest["config"]).data_identity()
  for name, source in found["data"]["sources"].items() if not appended else ():
    named = wanted["data"]["sources"].get(name, source)["files"]
    beyond = {f for a in manifest.get("appends", ()) for f in a["beyond_patterns"].get(name, ())} - set(named)
    source["files"] = type(source["files"])(f for f in source["files"] if f not in beyond)
  return found


def _allow_files(count: int) -> None:
  """Raises the limit of open files to `count` where the system permits: it is often 1024, where 65,536 are allowed."""
  if resource is None:
    return
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_users(path: pathlib.Path, columns: Sequence[str] = ("user", "record", "last_event")) -> pa.Table:
  """Returns the table of users in the dataset's order: `user`; `record`, its place in the shards; `last_event` (µs).

  Raises:
    DataError: the table is damaged.
  """
  try:
    return pq.read_table(path / USERS, columns=list(columns), page_checksum_verification=True)
  except (OSError, pa.ArrowException) as error:
    raise DataError(f"{path / USERS} is damaged ({error}); prepare the dataset again.") from error


def read_user_rows(path: pathlib.Path, start: int, stop: int) -> pa.Table:
  """Returns `user` and `record` of the users from `start` to before `stop`; see `read_users`.

  Raises:
    DataError: the table is damaged.
  """
  try:
    return rows_between(path / USERS, ("user", "record"), start, stop)
  except (OSError, pa.ArrowException) as error:
    raise DataError(f"{path / USERS} is damaged ({error}); prepare the dataset again.") from error


def rows_between(file: pathlib.Path, columns: Sequence[str] | None, start: int, stop: int) -> pa.Table:
  """Returns the rows from `start` to before `stop` of a Parquet file; reads only the row groups that hold them."""
  with pq.ParquetFile(file) as parquet:
    groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    ends = np.cumsum(groups)
    wanted = np.flatnonzero((ends > start) & (ends - groups < stop))
    found = parquet.read_row_groups(wanted.tolist(), columns=None if columns is None else list(columns))
    begin = int(ends[wanted[0]] - groups[wanted[0]]) if len(wanted) else 0
  return found.slice(start - begin, stop - start)


def input_files(cfg: config.Config) -> dict[str, list[int]]:
  """Returns the size in bytes and the time of change of every file that the config reads; see `paths.file_stamps`."""
  patterns = [p for s in cfg.data.sources.values() for p in (*s.files, *((s.items.file,) if s.items else ()))]
  patterns += cfg.data.users.files if cfg.data.users else ()
  patterns += [p for task in cfg.tasks.values() for p in task.own_files]
  return paths.file_stamps(patterns)
