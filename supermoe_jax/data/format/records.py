"""Defines a user's record: its arrays, how they are made from histories, and how they are encoded and decoded.

A record is a `tf.Example`, as TensorFlow Datasets writes it. Each array is one bytes value, little-endian and in C
order, so that decoding does not touch its elements.

Shapes: N events of the user, S snapshots, m events that a snapshot of an event label asks about; U users of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from supermoe_jax import config
from supermoe_jax.batch import Schema
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.tasks import KINDS
from supermoe_jax.data.tasks.labels import RecordArray, Snapshots, TaskLabels

if TYPE_CHECKING:
  import tensorflow_datasets as tfds

Record = dict[str, Any]

# The arrays that make up the history.
EVENTS = ("time", "source", "codes", "numeric")

USER, N_TRAIN, USER_SPLIT = "user", "n_train", "user_split"  # the parts of a record that are no arrays


def record_arrays(schema: Schema, tasks: Mapping[str, config.LabelledTask]) -> dict[str, RecordArray]:
  """Returns the arrays of a user's record; a record also has `user`, `n_train` and `user_split`."""
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
    out |= KINDS[task.kind].record_arrays(name, task, schema.outputs[name])
  return out


def tfds_features(parts: Mapping[str, RecordArray]) -> tfds.features.FeaturesDict:
  """Returns a record's parts as TFDS features."""
  import tensorflow_datasets as tfds  # takes a second; a process that only writes records does without

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
  """Yields the record of each user of a block; `owner [U]` holds each user's split for user labels."""
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
  # One message serves all users of the block: filling its parts is faster than making them.
  example = tf_example_pb2.Example()
  feature = example.features.feature
  user_value, n_train_value = feature[USER].bytes_list.value, feature[N_TRAIN].int64_list.value
  split_value = feature[USER_SPLIT].int64_list.value
  columns = []
  for name, part in parts.items():
    array = np.ascontiguousarray(arrays[name], np.dtype(part.dtype).newbyteorder("<"))
    width = array.itemsize * int(np.prod(part.row))
    value = feature[name].bytes_list.value
    columns.append((value, array.tobytes(), width, events if part.of_events else looks))
  for i, (user, n_train, split) in enumerate(zip(block.users, block.n_train.tolist(), owner.tolist(), strict=True)):
    user_value[:], n_train_value[:], split_value[:] = [user.encode()], [n_train], [split]
    for value, content, width, offsets in columns:
      value[:] = [content[offsets[i] * width : offsets[i + 1] * width]]
    yield example.SerializeToString(deterministic=True)  # otherwise the order of the parts varies


def decode_record(content: bytes, parts: Mapping[str, RecordArray]) -> Record:
  """Returns the record encoded in bytes that `encode_records` made; its arrays are read-only.

  Raises:
    ValueError: the bytes are no such record.
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
