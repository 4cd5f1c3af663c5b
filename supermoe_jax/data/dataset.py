"""A prepared dataset: random access to users, with the schema and the manifest.

A dataset directory holds a TFDS dataset in ArrayRecord (one record a user, no TensorFlow needed), the fitted encoders
and `manifest.json`, which is written last: a directory without it is not a dataset.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import pathlib
import threading
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from supermoe_jax import config
from supermoe_jax.data import files, integrity
from supermoe_jax.data.aggregates import Aggregator
from supermoe_jax.data.events import DataError, UserHistory
from supermoe_jax.data.labels import TRAIN, Comparison, EventAnswer
from supermoe_jax.data.vocabulary import FIRST_VALUE, Classes, Encoders, Numeric, Vocabulary

FORMAT_VERSION = 3
TFDS_NAME, TFDS_VERSION, TFDS_SPLIT = "event_log", "1.0.0", "users"

SHOWN_VALUES = 20  # of a vocabulary, in a message about a value that it does not hold

# Decoded records, and the aggregates of their snapshots, are kept up to this many bytes of arrays: the two made most of
# what a training row costs, and a small dataset shows its records many times. Beyond it they are made again.
KEPT_BYTES = 512 * 2**20

# All snapshots of a user cost little more than a few, unless they are this many times as many.
MANY_SNAPSHOTS = 16

# Threads that read all records, and how many each reads at a time.
READERS = 4
READ_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Schema:
  """What a model must know of a dataset to be built.

  Attributes:
    sources: names of the event sources; an event's type.
    categorical: codes of each categorical field, 0 absent and 1 out of vocabulary included.
    numeric: names of the numeric fields.
    aggregates: A, the length of a snapshot's aggregates; 0 without.
    outputs: of each task with labels, the number of its outputs.
    inputs: the categorical fields that the model may see.
    numeric_inputs: the columns, among the numeric fields, of those that the model may see.
    further: the field of each further column of the codes, which follow those of `categorical`.
  """

  sources: tuple[str, ...]
  categorical: Mapping[str, int]
  numeric: tuple[str, ...]
  aggregates: int
  outputs: Mapping[str, int]
  inputs: tuple[str, ...]
  numeric_inputs: tuple[int, ...]
  further: tuple[str, ...] = ()

  def field(self, name: str) -> int:
    """The column of a categorical field in the codes."""
    return list(self.categorical).index(name)


class Dataset:
  """A prepared dataset: random access to users, with the schema and the manifest."""

  def __init__(self, path: str | pathlib.Path):
    """Opens a dataset directory.

    Raises:
      DataError: there is no dataset at `path`, or it is not as it was written.
    """
    self.path = pathlib.Path(path)
    self.manifest: dict[str, Any] = integrity.read_manifest(self.path, FORMAT_VERSION)
    self.config = config.resolve(self.manifest["config"])
    self.encoders = Encoders.load(self.path / "encoders")
    self.aggregator = make_aggregator(self.config.data, self.encoders)
    statistics = self.manifest["aggregates"]
    self.aggregate_mean = np.array(statistics["mean"], np.float32)
    self.aggregate_scale = np.array(statistics["scale"], np.float32)
    builder = tfds.builder_from_directory(str(self.path / TFDS_NAME / TFDS_VERSION))
    self._source = builder.as_data_source(split=TFDS_SPLIT)
    self._kept = _Kept(KEPT_BYTES)
    if len(self._source) != self.manifest["users"]:
      raise DataError(
        f"{self.path} holds {len(self._source)} users, its manifest says {self.manifest['users']}; prepare again."
      )

  @functools.cached_property
  def schema(self) -> Schema:
    """The sizes that a model is built from."""
    return make_schema(self.config, self.encoders)

  @functools.cached_property
  def hidden_codes(self) -> tuple[int, ...]:
    """The columns of the codes that the model must not see."""
    columns = [*self.schema.categorical, *self.schema.further]
    return tuple(i for i, n in enumerate(columns) if n not in self.schema.inputs)

  @functools.cached_property
  def hidden_numeric(self) -> tuple[int, ...]:
    """The columns of the numbers that the model must not see."""
    return tuple(i for i in range(len(self.schema.numeric)) if i not in self.schema.numeric_inputs)

  def check_matches(self, wanted: config.Config) -> None:
    """Raises DataError if the dataset was prepared from another data section or other task labels."""
    if wanted.data_hash() != self.manifest["data_hash"]:
      changed = config.differences(self.config.data_identity(), wanted.data_identity())
      raise DataError(
        f"{self.path} was prepared with another configuration ({'; '.join(changed[:4])}). Prepare again with "
        "--overwrite, or name another config.data.path."
      )

  def check_files(self) -> None:
    """Raises DataError if a file that the dataset was prepared from has changed since, or is not there."""
    then, now = self.manifest["files"], input_files(self.config)
    if then != now:
      file = min(f for f in then.keys() | now.keys() if then.get(f) != now.get(f))
      what = "has changed" if file in then and file in now else ("is not there" if file in then else "is new")
      raise DataError(
        f"the files that {self.path} was prepared from have changed; prepare again with --overwrite. The first of them "
        f"is {file}, which {what} (relative paths start at the working directory)."
      )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns a user's record; `records.features` lists its parts, arrays that cannot be written to.

    Raises:
      DataError: the record's shard is damaged.
    """
    kept = self._kept.get(("record", int(index)))
    if kept is None:
      kept = self._read(int(index))
      kept["user"] = kept["user"].decode()
      arrays = [v for v in kept.values() if isinstance(v, np.ndarray)]
      for array in arrays:
        array.setflags(write=False)
      self._kept.offer(("record", int(index)), kept, sum(a.nbytes for a in arrays))
    return dict(kept)

  def _read(self, index: int) -> dict[str, Any]:
    try:
      found: dict[str, Any] = self._source[index]
    except RuntimeError as error:  # ArrayRecord's: a checksum that does not fit
      raise DataError(f"record {index} of {self.path} is damaged ({error}); prepare the dataset again.") from error
    return found

  @functools.cached_property
  def training_sizes(self) -> np.ndarray:
    """Of each user the training events and the training snapshots that see one: int32 `[N, 2]`; reads every record."""
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
    """The events of a record."""
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

  def snapshot_aggregates(
    self, index: int, record: Mapping[str, Any], history: UserHistory, chosen: np.ndarray
  ) -> np.ndarray:
    """Standardised aggregates `[S, A]` at the snapshots `chosen [S]` of the user with this index."""
    time, n_events = record["snapshot_time"], record["snapshot_events"]
    kept = self._kept.get(("aggregates", int(index)))
    if kept is None:
      size = 4 * len(time) * self.schema.aggregates
      if size > self._kept.room or len(time) > MANY_SNAPSHOTS * len(chosen):
        return self.aggregates(history, time[chosen], n_events[chosen])
      kept = self.aggregates(history, time, n_events)
      self._kept.offer(("aggregates", int(index)), kept, kept.nbytes)
    return kept[chosen]

  def aggregates(self, history: UserHistory, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    """Standardised aggregates `[S, A]` at snapshots; A is 0 when the config has none."""
    if self.aggregator is None:
      return np.zeros((len(time), 0), np.float32)
    return (self.aggregator(history, time, n_events) - self.aggregate_mean) / self.aggregate_scale


class _Kept:
  """What was made and is kept as long as there is room; threads may share it.

  Nothing gives way for another: epochs go through all records in turn, so the one used last is the last to be used
  again.
  """

  def __init__(self, room: int):
    self.room = room  # bytes left
    self._kept: dict[Hashable, Any] = {}
    self._lock = threading.Lock()
    self.get = self._kept.get

  def __reduce__(self) -> tuple[type[_Kept], tuple[int]]:
    return _Kept, (KEPT_BYTES,)  # another process keeps its own

  def offer(self, key: Hashable, value: Any, size: int) -> None:
    """Keeps the value of `size` bytes if there is room."""
    with self._lock:
      if size <= self.room and key not in self._kept:
        self._kept[key] = value
        self.room -= size


def input_files(cfg: config.Config) -> dict[str, list[int]]:
  """Size in bytes and time of change of every file that the config reads; see `files.stamps`."""
  patterns = [p for s in cfg.data.sources.values() for p in (*s.files, *((s.items.file,) if s.items else ()))]
  patterns += cfg.data.users.files if cfg.data.users else ()
  return files.stamps(patterns)


def make_schema(cfg: config.Config, encoders: Encoders) -> Schema:
  """The schema of data encoded by `encoders`."""
  aggregator, fields = make_aggregator(cfg.data, encoders), cfg.data.fields
  return Schema(
    tuple(cfg.data.sources),
    {n: e.n_codes for n, e in encoders.categorical.items()},
    tuple(encoders.numeric),
    len(aggregator.names) if aggregator else 0,
    {n: _n_outputs(n, t, encoders) for n, t in cfg.labelled_tasks.items()},
    tuple(n for n in encoders.categorical if fields[n].input),
    tuple(i for i, n in enumerate(encoders.numeric) if fields[n].input),
    cfg.data.further_values,
  )


def _n_outputs(name: str, task: config.LabelledTask, encoders: Encoders) -> int:
  if isinstance(task, config.NextEvent):
    return encoders.categorical[task.field].n_codes - FIRST_VALUE
  if isinstance(task, config.UserLabel) and task.type == "multiclass":
    return len(_classes(name, encoders).values)
  return task.top if isinstance(task, config.FutureValues) else 1


def _classes(name: str, encoders: Encoders) -> Classes:
  encoder = encoders.labels[name]
  assert isinstance(encoder, Classes)  # that is how `user_table` encodes a multiclass label
  return encoder


def make_aggregator(data: config.Data, encoders: Encoders) -> Aggregator | None:
  """The aggregates of a config, of the events' fields that are inputs only; None when they are switched off."""
  if not data.aggregates.enabled:
    return None
  columns = list(encoders.categorical)
  counted = {}
  for name in data.aggregates.fields:
    encoder = encoders.categorical[name]
    assert isinstance(encoder, Vocabulary)  # config.resolve checked
    counted[name] = (columns.index(name), tuple(encoder.values[: data.aggregates.top_values]))
  # The mean of a user's own number is that number.
  own = {n for n, f in data.fields.items() if f.input and f.table == "events"}
  numeric = {n: i for i, n in enumerate(encoders.numeric) if n in own}
  return Aggregator(data.aggregates.windows_days, tuple(data.sources), numeric, counted)


def make_event_answer(name: str, task: config.EventLabel, data: config.Data, encoders: Encoders) -> EventAnswer:
  """What an event label says of single events.

  Raises:
    DataError: a positive value is not in the field's vocabulary: it is most likely misspelt.
  """
  if not task.positive:
    statistics = encoders.numeric[task.field]
    least = None if task.at_least is None else statistics.encode(task.at_least, data.fields[task.field].encoding)
    return EventAnswer(list(encoders.numeric).index(task.field), at_least=least)
  encoder = encoders.categorical[task.field]
  assert isinstance(encoder, Vocabulary)  # config.resolve checked
  positive = np.zeros(encoder.n_codes, bool)
  for value in task.positive:
    code = encoder.code(value)
    if code < FIRST_VALUE:
      hint = config.nearest(value, encoder.values).partition("; valid")[0]
      shown = ", ".join(repr(v) for v in encoder.values[:SHOWN_VALUES])
      more = ", …" if len(encoder.values) > SHOWN_VALUES else ""
      raise DataError(
        f"config.tasks.{name}.positive: {value!r} never occurs in the vocabulary of field {task.field!r}, which is of "
        f"the training period{hint} (it holds {shown}{more})."
      )
    positive[code] = True
  return EventAnswer(list(encoders.categorical).index(task.field), positive)


def make_comparison(cfg: config.Config, name: str, encoders: Encoders) -> Comparison | None:
  """The sample space of a task; numbers in it are as the data have them, so they are encoded as the labels are.

  Raises:
    ConfigError: it compares classes that are no numbers.
  """
  space = config.parse_sample_space(cfg.labelled_tasks[name].sample_space)
  if space is None:
    return None
  other = cfg.labelled_tasks[space.task]
  if config.answer(other) == "multiclass":
    values = _classes(space.task, encoders).values
    try:
      return Comparison(*space, np.array([float(v) for v in values], np.float32))
    except ValueError:
      raise config.ConfigError(
        f"config.tasks.{name}.sample_space={cfg.labelled_tasks[name].sample_space!r}: the classes of {space.task} are "
        f"not all numbers ({', '.join(map(repr, values[:SHOWN_VALUES]))}); compare a binary task."
      ) from None
  if config.answer(other) == "regression":
    if isinstance(other, config.EventLabel):
      number = encoders.numeric[other.field].encode(space.value, cfg.data.fields[other.field].encoding)
    else:
      statistics = encoders.labels[space.task]
      assert isinstance(statistics, Numeric)  # that is how `user_table` encodes a number
      number = statistics.encode(space.value)
    return Comparison(space.task, space.operator, float(number))
  return Comparison(*space)
