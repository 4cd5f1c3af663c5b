"""A prepared dataset: random access to users, with the schema and the manifest.

A dataset directory holds a TFDS dataset in ArrayRecord (one record a user, no TensorFlow needed), the fitted encoders
and `manifest.json`, which is written last: a directory without it is not a dataset.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from supermoe_jax import config
from supermoe_jax.data.events import DataError, UserHistory
from supermoe_jax.data.labels import Aggregator
from supermoe_jax.data.vocabulary import Encoders, Vocabulary

FORMAT_VERSION = 1
TFDS_NAME, TFDS_VERSION, TFDS_SPLIT = "event_log", "1.0.0", "users"


@dataclasses.dataclass(frozen=True)
class Schema:
  """What a model must know of a dataset to be built.

  Attributes:
    sources: names of the event sources; an event's type.
    categorical: codes of each categorical field, 0 absent and 1 out of vocabulary included.
    numeric: names of the numeric fields.
    aggregates: A, the length of a snapshot's aggregates; 0 without.
    outputs: of each task, the number of its outputs.
  """

  sources: tuple[str, ...]
  categorical: Mapping[str, int]
  numeric: tuple[str, ...]
  aggregates: int
  outputs: Mapping[str, int]

  def field(self, name: str) -> int:
    """The column of a categorical field in the codes."""
    return list(self.categorical).index(name)


class Dataset:
  """A prepared dataset: random access to users, with the schema and the manifest."""

  def __init__(self, path: str | pathlib.Path):
    """Opens a dataset directory.

    Raises:
      DataError: there is no whole dataset at `path`.
    """
    self.path = pathlib.Path(path)
    file = self.path / "manifest.json"
    if not file.is_file():
      raise DataError(f"{self.path} holds no prepared dataset (no manifest.json); run 'supermoe prepare' first.")
    try:
      self.manifest: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
      raise DataError(f"{file} is damaged ({error}); prepare the dataset again.") from None
    if self.manifest.get("format") != FORMAT_VERSION:
      raise DataError(
        f"{file} has format {self.manifest.get('format')!r}, this version reads {FORMAT_VERSION}; prepare again."
      )
    self.config = config.resolve(self.manifest["config"])
    self.encoders = Encoders.load(self.path / "encoders")
    self.aggregator = make_aggregator(self.config.data, self.encoders)
    statistics = self.manifest["aggregates"]
    self.aggregate_mean = np.array(statistics["mean"], np.float32)
    self.aggregate_scale = np.array(statistics["scale"], np.float32)
    builder = tfds.builder_from_directory(str(self.path / TFDS_NAME / TFDS_VERSION))
    for shard in builder.info.splits[TFDS_SPLIT].filepaths:
      if not pathlib.Path(shard).is_file():
        raise DataError(f"{shard} is missing; prepare again.")
    self._source = builder.as_data_source(split=TFDS_SPLIT)
    if len(self._source) != self.manifest["users"]:
      raise DataError(
        f"{self.path} holds {len(self._source)} users, its manifest says {self.manifest['users']}; prepare again."
      )

  @functools.cached_property
  def schema(self) -> Schema:
    """The sizes that a model is built from."""
    return make_schema(self.config, self.encoders)

  def check_matches(self, wanted: config.Config) -> None:
    """Raises DataError if the dataset was prepared from another data section or other task labels."""
    if wanted.data_hash() != self.manifest["data_hash"]:
      changed = config.differences(self.config.data_identity(), wanted.data_identity())
      raise DataError(
        f"{self.path} was prepared with another configuration ({'; '.join(changed[:4])}). Prepare again with "
        "--overwrite, or name another config.data.path."
      )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns a user's record; `prepare.features` lists its parts."""
    record = self._source[index]
    record["user"] = record["user"].decode()
    return record

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

  def aggregates(self, history: UserHistory, time: np.ndarray, n_events: np.ndarray) -> np.ndarray:
    """Standardised aggregates `[S, A]` at snapshots; A is 0 when the config has none."""
    if self.aggregator is None:
      return np.zeros((len(time), 0), np.float32)
    return (self.aggregator(history, time, n_events) - self.aggregate_mean) / self.aggregate_scale


def make_schema(cfg: config.Config, encoders: Encoders) -> Schema:
  """The schema of data encoded by `encoders`."""
  aggregator = make_aggregator(cfg.data, encoders)
  return Schema(
    tuple(cfg.data.sources),
    {n: e.n_codes for n, e in encoders.categorical.items()},
    tuple(encoders.numeric),
    len(aggregator.names) if aggregator else 0,
    {n: _n_outputs(t, encoders) for n, t in cfg.tasks.items()},
  )


def _n_outputs(task: config.Task, encoders: Encoders) -> int:
  if isinstance(task, config.NextEvent):
    return encoders.categorical[task.field].n_codes - 2
  return task.top if isinstance(task, config.FutureValues) else 1


def make_aggregator(data: config.Data, encoders: Encoders) -> Aggregator | None:
  """The aggregates of a config; None when they are switched off."""
  if not data.aggregates.enabled:
    return None
  columns = list(encoders.categorical)
  counted = {}
  for name in data.aggregates.fields:
    encoder = encoders.categorical[name]
    assert isinstance(encoder, Vocabulary)  # config.resolve checked
    counted[name] = (columns.index(name), tuple(encoder.values[: data.aggregates.top_values]))
  return Aggregator(data.aggregates.windows_days, tuple(data.sources), tuple(encoders.numeric), counted)
