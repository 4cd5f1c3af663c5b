"""Records that take the place of earlier ones: shards beside those of a dataset."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from supermoe_jax.data import shards
from supermoe_jax.data.histories import UserBlock


class Rewritten:
  """Records written anew, in files that get their names at the end.

  Attributes:
    users: whose they are, in order.
    last_events: the time of each user's last event, microseconds.
    lengths: how many records each file has.
    bytes: how many bytes the records have before compression.
    files: by name how many records each has, once they have names.
  """

  def __init__(self, directory: pathlib.Path, records: int):
    """The dataset holds so many `records` already."""
    directory.mkdir(parents=True)
    self._directory, self._records = directory, records
    self.users: list[str] = []
    self.last_events: list[int] = []
    self.lengths: list[int] = []
    self.files: dict[str, int] = {}
    self.bytes = 0

  @property
  def places(self) -> range:
    """The place of each among all records of the dataset."""
    return range(self._records, self._records + len(self.users))

  def add(self, block: UserBlock, records: Iterator[bytes]) -> None:
    """Writes the records of users into a file of their own."""
    count, size = shards.write_records(self._directory / f"unnamed-{len(self.lengths)}", records)
    self.users += block.users
    self.last_events += block.time[block.offsets[1:] - 1].tolist()
    self.lengths.append(count)
    self.bytes += size

  def finish(self, split: str) -> None:
    """Names the files."""
    for i, length in enumerate(self.lengths):
      name = shards.shard_name(i, len(self.lengths), split)
      (self._directory / f"unnamed-{i}").replace(self._directory / name)
      self.files[name] = length
