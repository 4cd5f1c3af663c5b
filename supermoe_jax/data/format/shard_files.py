"""Writes and finds the shards of a dataset: ArrayRecord files with the records of some users each.

A shard is written under a temporary name and renamed when it is whole. A note file next to it then records its
content. An interrupted preparation finds by these notes which shards it need not make again.

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

# TensorFlow Datasets stores a module's name with a dataset and never imports it. The name is that of earlier versions.
MODULE_NAME = "supermoe_jax.data.records"

DIRECTORY = f"{TFDS_NAME}/{TFDS_VERSION}"  # the shards' directory within the dataset's directory

SHARD_EVENTS = 250_000  # events per shard, about
MOST_SHARDS = 4096

# Each record is compressed alone, because records are read in any order.
WRITER_OPTIONS = "group_size:1,snappy"


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of records.

  Attributes:
    file: its name.
    users: the number of records, one for each user.
    bytes: the size of the records before compression.
    tally: the state of their `RecordCounts`.
  """

  file: str
  users: int
  bytes: int
  tally: Mapping[str, Any]

  @property
  def events(self) -> int:
    """Returns the number of its users' events."""
    return sum(int(n) * count for n, count in self.tally["lengths"].items())


def count_shards(events: int, users: int) -> int:
  """Returns the number of shards of a dataset, which depends on the data alone."""
  return max(1, min(-(-events // SHARD_EVENTS), MOST_SHARDS, users))


def shard_name(index: int, count: int, split: str = TFDS_SPLIT) -> str:
  """Returns the file name of a shard, as TensorFlow Datasets names it."""
  return f"{TFDS_NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


class ShardFile:
  """A file of records during its writing.

  Attributes:
    records: the number of records written so far.
    bytes: their size before compression.
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
  """Yields a file of records to write to, which gets its name when the block ends without an error."""
  with replacing_file(file) as part:
    writer = ArrayRecordWriter(str(part), WRITER_OPTIONS)
    try:
      yield ShardFile(writer)
    finally:
      writer.close()


def move_shard(file: pathlib.Path, directory: pathlib.Path) -> None:
  """Moves a shard and its note into a directory of the same file system."""
  for moved in (file, note_file(file)):  # only a whole shard has a note
    moved.replace(directory / moved.name)


def finished_shards(directory: pathlib.Path, count: int) -> dict[int, Shard]:
  """Returns the shards, of `count` in all, that an earlier preparation finished in the directory, by their index."""
  out = {}
  for index in range(count):
    file = directory / shard_name(index, count)
    if file.is_file() and note_file(file).is_file():
      out[index] = Shard(**json.loads(note_file(file).read_text()))
  return out


def write_info(
  directory: pathlib.Path, arrays: Mapping[str, records.RecordArray], splits: Mapping[str, tuple[Sequence[int], int]]
) -> None:
  """Writes the files that TensorFlow Datasets needs to read the shards: `dataset_info.json` and `features.json`.

  Args:
    directory: the directory of the shards.
    arrays: the arrays of their records, by name.
    splits: for each split, the number of records of each shard, and the size of all records before compression.
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
  """Returns the splits that `write_info` wrote in a directory."""
  info = json.loads((directory / "dataset_info.json").read_text())
  return {s["name"]: ([int(n) for n in s["shardLengths"]], int(s["numBytes"])) for s in info["splits"]}


def remove_notes(directory: pathlib.Path) -> None:
  """Removes the notes, which only an unfinished preparation needs."""
  for file in directory.glob("*.note"):
    file.unlink()


def note_file(file: pathlib.Path) -> pathlib.Path:
  """Returns the path of a shard's note."""
  return file.with_name(file.name + ".note")
