"""A user's record: its parts, how they are made from histories, and how they become bytes and come back.

A record is a `tf.Example`, as TensorFlow Datasets writes it: each array is one value of bytes, little-endian and in C
order, which is read without looking at its elements.

Shapes: N events of the user, S snapshots, m events that a snapshot of an event label asks about; U users of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from supermoe_jax import config
from supermoe_jax.batch import Schema
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.format.schema import make_event_answer
from supermoe_jax.data.tasks import labels
from supermoe_jax.data.tasks.labels import Calendar, Labels, Snapshots

if TYPE_CHECKING:
  import tensorflow_datasets as tfds

Record = dict[str, Any]

# The parts that make up the history.
EVENTS = ("time", "source", "codes", "numeric")

USER, N_TRAIN, USER_SPLIT = "user", "n_train", "user_split"  # the parts that are no arrays


class TaskLabels(NamedTuple):
  """A task's labels at the snapshots of a block of users.

  Attributes:
    labels: `[S]`, `[S, values]`, or `[S, m]` of an event label.
    event: int32 `[S, m]`, the events of the user that an event label asks about; -1 none. None for other kinds.
  """

  labels: Labels
  event: np.ndarray | None = None


def label_type(task: config.LabelledTask) -> type:
  """How a record holds the task's labels."""
  answer = config.answer(task)
  if answer in ("catalogue", "multiclass"):
    return np.int32
  return np.float32 if answer == "regression" or isinstance(task, config.EventLabel) else np.uint8


@dataclasses.dataclass(frozen=True)
class RecordArray:
  """An array of a record: its type, the shape of a row, and whether it has a row an event, or one a snapshot."""

  dtype: type
  row: tuple[int, ...] = ()
  of_events: bool = False


def record_arrays(schema: Schema, tasks: Mapping[str, config.LabelledTask]) -> dict[str, RecordArray]:
  """The arrays of a user's record; besides, it has `user`, `n_train` and `user_split`."""
  out = {
    "time": RecordArray(np.int64, of_events=True),
    "source": RecordArray(np.int32, of_events=True),
    "snapshot_time": RecordArray(np.int64),
    "snapshot_events": RecordArray(np.int32),
    "snapshot_split": RecordArray(np.int32),
  }
  if schema.categorical:
    out["codes"] = RecordArray(np.int32, (len(schema.categorical) + len(schema.extra_columns),), of_events=True)
  if schema.numeric:
    out["numeric"] = RecordArray(np.float32, (len(schema.numeric),), of_events=True)
  for name, task in tasks.items():
    if isinstance(task, config.EventLabel):
      row: tuple[int, ...] = (task.per_snapshot,)
      out[f"known_{name}"], out[f"event_{name}"] = RecordArray(np.uint8, row), RecordArray(np.int32, row)
    else:
      row = (schema.outputs[name],) if isinstance(task, config.FutureValues) else ()
      out[f"known_{name}"] = RecordArray(np.uint8)
    out[f"label_{name}"] = RecordArray(label_type(task), row)
  return out


def tfds_features(parts: Mapping[str, RecordArray]) -> tfds.features.FeaturesDict:
  """The same, as TFDS features."""
  import tensorflow_datasets as tfds  # takes a second, which a process that only writes records does not need

  encoding = tfds.features.Encoding.BYTES
  arrays = {n: tfds.features.Tensor(shape=(None, *p.row), dtype=p.dtype, encoding=encoding) for n, p in parts.items()}
  return tfds.features.FeaturesDict({USER: tfds.features.Text(), N_TRAIN: np.int32, USER_SPLIT: np.int32, **arrays})


def encode_records(
  block: UserBlock,
  snapshots: Snapshots,
  labels: Mapping[str, TaskLabels],
  owner: np.ndarray,
  parts: Mapping[str, RecordArray],
) -> Iterator[bytes]:
  """Yields the record of each user of a block; `owner [U]` are the splits that the users belong to for user labels."""
  arrays = {
    "time": block.time,
    "source": block.source,
    "codes": block.codes,
    "numeric": block.numeric,
    "snapshot_time": snapshots.time,
    "snapshot_events": snapshots.n_events,
    "snapshot_split": snapshots.split,
  }
  for name, (label, event) in labels.items():
    arrays |= {f"label_{name}": label.value, f"known_{name}": label.known}
    if event is not None:
      arrays[f"event_{name}"] = event
  events = block.offsets.tolist()
  looks = np.searchsorted(snapshots.user, np.arange(len(block.users) + 1)).tolist()
  columns = []
  for name, part in parts.items():
    array = np.ascontiguousarray(arrays[name], np.dtype(part.dtype).newbyteorder("<"))
    width = array.itemsize * int(np.prod(part.row))
    columns.append((name, array.tobytes(), width, events if part.of_events else looks))
  for i, (user, n_train, split) in enumerate(zip(block.users, block.n_train.tolist(), owner.tolist(), strict=True)):
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature[USER].bytes_list.value.append(user.encode())
    feature[N_TRAIN].int64_list.value.append(n_train)
    feature[USER_SPLIT].int64_list.value.append(split)
    for name, content, width, offsets in columns:
      feature[name].bytes_list.value.append(content[offsets[i] * width : offsets[i + 1] * width])
    yield example.SerializeToString(deterministic=True)  # else the order of the parts is any


def decode_record(content: bytes, parts: Mapping[str, RecordArray]) -> Record:
  """The record in the bytes that `encode` made; its arrays cannot be written to.

  Raises:
    ValueError: these are no such bytes.
  """
  try:
    feature = tf_example_pb2.Example.FromString(content).features.feature
    record: Record = {
      USER: feature[USER].bytes_list.value[0].decode(),
      N_TRAIN: feature[N_TRAIN].int64_list.value[0],
      USER_SPLIT: feature[USER_SPLIT].int64_list.value[0],
    }
    for name, part in parts.items():
      array = np.frombuffer(feature[name].bytes_list.value[0], np.dtype(part.dtype).newbyteorder("<"))
      record[name] = array.reshape(-1, *part.row) if part.row else array
  except (DecodeError, IndexError) as error:
    raise ValueError(f"no record of this dataset: {error}") from error
  return record


class Labeller:
  """Makes every task's labels at users' snapshots."""

  def __init__(self, cfg: config.Config, encoders: Encoders, times: Calendar | None):
    """`times` is None for leave one out.

    Raises:
      DataError: a positive value of an event label is not in the field's vocabulary.
    """
    self._tasks, self._times = cfg.labelled_tasks, times
    self._columns = {n: i for i, n in enumerate(encoders.categorical)}
    self._sources = list(cfg.data.sources)
    self._answers = {
      n: make_event_answer(n, t, cfg.data, encoders) for n, t in self._tasks.items() if isinstance(t, config.EventLabel)
    }

  def __call__(
    self, block: UserBlock, snapshots: Snapshots, owner: np.ndarray, user_labels: Mapping[str, np.ndarray]
  ) -> dict[str, TaskLabels]:
    """The labels of users who belong to the splits `owner [U]`; `user_labels [U]` of each such task are NaN unknown."""
    return {n: self._label(n, t, block, snapshots, owner, user_labels) for n, t in self._tasks.items()}

  def _label(
    self,
    name: str,
    task: config.LabelledTask,
    block: UserBlock,
    snapshots: Snapshots,
    owner: np.ndarray,
    user_labels: Mapping[str, np.ndarray],
  ) -> TaskLabels:
    times = self._times
    if isinstance(task, config.NextEvent):
      return TaskLabels(labels.next_event(block, snapshots, self._columns[task.field], times))
    if isinstance(task, config.EventLabel):
      answer = self._answers[name]
      event = labels.following_events(answer.carried(block), block, snapshots, task.per_snapshot, times)
      of_user = np.where(event < 0, -1, event - block.offsets[snapshots.user][:, None])
      return TaskLabels(labels.at_events(answer(block), event), of_user.astype(np.int32))
    if isinstance(task, config.UserLabel):
      return TaskLabels(labels.user_label(user_labels[name], snapshots, owner))
    assert times is not None  # config.resolve rejects tasks about the future without a calendar
    if isinstance(task, config.FutureEvent):
      source = self._sources.index(task.source)
      return TaskLabels(labels.future_event(block, snapshots, times, source, task.horizon_days, task.negate))
    column = self._columns[task.field]
    return TaskLabels(labels.future_values(block, snapshots, times, column, task.top, task.horizon_days))
