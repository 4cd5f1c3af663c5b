"""Shards of a dataset: the events of some users become records in a file, in as many processes as there are cores.

A shard is written under another name and renamed when it is whole; then a note beside it says what it holds. A
preparation that was cut finds by these notes which shards it need not make again.

Files: `event_log/1.0.0/event_log-users.array_record-00000-of-00012`, ArrayRecord, as TensorFlow Datasets names them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from supermoe_jax.atomic_files import replacing_file
from supermoe_jax.data.format import records

TFDS_NAME, TFDS_VERSION, TFDS_SPLIT = "event_log", "1.0.0", "users"

# TensorFlow Datasets stores a module's name with a dataset and never imports it. It stays as earlier versions wrote it.
MODULE_NAME = "supermoe_jax.data.records"

DIRECTORY = f"{TFDS_NAME}/{TFDS_VERSION}"  # of the shards, in that of the dataset

SHARD_EVENTS = 250_000  # of which there are as many shards as this gives
MOST_SHARDS = 4096

# Each record is compressed alone, for records are read in any order.
WRITER_OPTIONS = "group_size:1,snappy"


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of records.

  Attributes:
    file: its name.
    users: how many records it has.
    bytes: how many bytes they have before compression.
    tally: the state of their `Tally`.
  """

  file: str
  users: int
  bytes: int
  tally: Mapping[str, Any]

  @property
  def events(self) -> int:
    """How many events its users have."""
    return sum(int(n) * count for n, count in self.tally["lengths"].items())


def count_shards(events: int, users: int) -> int:
  """How many shards a dataset gets; it depends on the data alone."""
  return max(1, min(-(-events // SHARD_EVENTS), MOST_SHARDS, users))


def shard_name(index: int, count: int, split: str = TFDS_SPLIT) -> str:
  """The file of a shard, as TensorFlow Datasets names it."""
  return f"{TFDS_NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


class ShardFile:
  """A file of records that is being written.

  Attributes:
    records: how many it has.
    bytes: how many bytes they have before compression.
  """

  def __init__(self, writer: ArrayRecordWriter):
    self._writer = writer
    self.records = self.bytes = 0

  def write(self, records: Iterable[bytes]) -> None:
    """Appends records."""
    for record in records:
      self._writer.write(record)
      self.records, self.bytes = self.records + 1, self.bytes + len(record)


@contextlib.contextmanager
def writing_shard(file: pathlib.Path) -> Iterator[ShardFile]:
  """Gives a file of records to be written, which has its name when the block ends without an error."""
  with replacing_file(file) as part:
    writer = ArrayRecordWriter(str(part), WRITER_OPTIONS)
    try:
      yield ShardFile(writer)
    finally:
      writer.close()


def move_shard(file: pathlib.Path, directory: pathlib.Path) -> None:
  """Moves a shard and its note into a directory of the same file system."""
  for moved in (file, note_file(file)):  # a note stands beside a whole shard only
    moved.replace(directory / moved.name)


def finished_shards(directory: pathlib.Path, count: int) -> dict[int, Shard]:
  """The shards of `count` that an earlier preparation finished in the directory, by their index."""
  out = {}
  for index in range(count):
    file = directory / shard_name(index, count)
    if file.is_file() and note_file(file).is_file():
      out[index] = Shard(**json.loads(note_file(file).read_text()))
  return out


def write_info(
  directory: pathlib.Path, arrays: Mapping[str, records.RecordArray], splits: Mapping[str, tuple[Sequence[int], int]]
) -> None:
  """Writes what TensorFlow Datasets needs to read the shards: `dataset_info.json` and `vectors.json`.

  Args:
    directory: of the shards.
    arrays: of their records, by name.
    splits: of each split how many records each of its shards has, and their bytes before compression.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info, naming

  features = records.tfds_features(arrays)
  version = tfds.core.Version(TFDS_VERSION)
  identity = dataset_info.DatasetIdentity(TFDS_NAME, version, str(directory), module_name=MODULE_NAME)
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  info.set_file_format("array_record")
  infos = []
  for name, (lengths, size) in splits.items():
    template = naming.ShardedFileTemplate(
      data_dir=directory,
      dataset_name=TFDS_NAME,
      split=name,
      filetype_suffix="array_record",
      template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    infos.append(
      tfds.core.SplitInfo(name=name, shard_lengths=list(lengths), num_bytes=size, filename_template=template)
    )
  info.set_splits(tfds.core.splits.SplitDict(infos))
  info.write_to_directory(directory)


def read_info(directory: pathlib.Path) -> dict[str, tuple[list[int], int]]:
  """The splits that `write_info` named in a directory."""
  info = json.loads((directory / "dataset_info.json").read_text())
  return {s["name"]: ([int(n) for n in s["shardLengths"]], int(s["numBytes"])) for s in info["splits"]}


def remove_notes(directory: pathlib.Path) -> None:
  """Removes what only an unfinished preparation needs."""
  for file in directory.glob("*.note"):
    file.unlink()


def note_file(file: pathlib.Path) -> pathlib.Path:
  """Returns the path of the note beside a shard."""
  return file.with_name(file.name + ".note")
