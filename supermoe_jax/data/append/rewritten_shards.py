"""Writes records that replace earlier ones of a dataset into additional shard files."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable

from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.format import shard_files
from supermoe_jax.data.format.shard_files import ShardFile

FILE_EVENTS = 2_000_000  # after which another file begins; every append adds files


class RewrittenShards(contextlib.ExitStack):
  """Writer of rewritten records, in files that receive their names in `finish`; use it as a context manager.

  Attributes:
    users: the users of the records, in order.
    last_events: the time of each user's last event, microseconds since 1970 UTC.
    lengths: the number of records of each file.
    bytes: the size of all records before compression.
    files: file name → number of records; filled by `finish`.
  """

  def __init__(self, directory: pathlib.Path, records: int):
    """Creates `directory`; the dataset already holds `records` records."""
    super().__init__()
    directory.mkdir(parents=True)
    self._directory, self._records = directory, records
    self._file: ShardFile | None = None
    self._events = 0  # of the users in the open file
    self.users: list[str] = []
    self.last_events: list[int] = []
    self.lengths: list[int] = []
    self.files: dict[str, int] = {}
    self.bytes = 0

  @property
  def places(self) -> range:
    """Returns the place of each rewritten record among all records of the dataset."""
    return range(self._records, self._records + len(self.users))

  def add(self, block: UserBlock, records: Iterable[bytes]) -> None:
    """Writes the records of the users of a block."""
    if self._file is None:
      self._file, self._events = self.enter_context(shard_files.writing_shard(self._unnamed(len(self.lengths)))), 0
    self._file.write(records)
    self.users += block.users
    self.last_events += block.time[block.offsets[1:] - 1].tolist()
    self._events += len(block.time)
    if self._events >= FILE_EVENTS:
      self._end_file()

  def _unnamed(self, number: int) -> pathlib.Path:
    return self._directory / f"unnamed-{number}"

  def _end_file(self) -> None:
    if self._file is not None:
      self.close()
      self.lengths.append(self._file.records)
      self.bytes += self._file.bytes
      self._file = None

  def finish(self, split: str) -> None:
    """Ends the last file and gives every file its name."""
    self._end_file()
    for i, length in enumerate(self.lengths):
      name = shard_files.shard_name(i, len(self.lengths), split)
      self._unnamed(i).replace(self._directory / name)
      self.files[name] = length
