"""Defines the settings of the tables that a config reads, and of the statistics that are made of the events."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

# The metadata of a setting that older versions lack: hashes leave it out while it has its default.
ADDED_LATER = {"added_later": True}


def _added(default: Any) -> Any:
  return dataclasses.field(default=default, metadata=ADDED_LATER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFormat:
  """How a table is written as text.

  `delimiter`, `header` and `columns` are for CSV and RecBole files, the others for text values in every format.
  """

  delimiter: str = _added("")  # what separates the values of a line; empty: guessed from the first lines
  # Whether the first line names the columns; auto: it does, and a first line that holds data is an error.
  header: Literal["auto", True, False] = _added("auto")
  columns: tuple[str, ...] = _added(())  # names of all columns in order: of a file without header, or to rename them
  decimal: Literal[".", ","] = _added(".")  # the decimal point of numbers
  thousands: str = _added("")  # what groups the digits of numbers by three, such as "." in 1.028,50; empty: nothing
  null_values: tuple[str, ...] = _added(())  # texts that mean "no value", such as "NULL"; the empty text always does


PLAIN_TEXT = TextFormat()


@dataclasses.dataclass(frozen=True)
class ItemTable(TextFormat):
  """A table joined to the events of a source by `key`, such as product attributes."""

  file: str = ""
  key: str = ""  # the key's column in the events
  table_key: str = ""  # the key's column in the table; empty: `key`, or "key" for a JSON object keyed by id
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic", "json_object"] = "auto"


@dataclasses.dataclass(frozen=True)
class Source(TextFormat):
  """A kind of event: files of one layout. The source's name is the event's type.

  With `type`, the values of this column are types too: a task's `source` may name one of them, as "buy", or as
  "events.buy" where several sources have types. The column is an input; without a field that reads it,
  `config.resolve` adds one of the column's name.
  """

  files: tuple[str, ...] = ()  # paths, globs or folders
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic", "sequences"] = "auto"  # auto: by the file's ending
  user: str = "user_id"
  time: str = "timestamp"
  # Unit of numeric times; auto: seconds, checked for plausibility.
  time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
  time_format: str = ""  # strptime format of textual times; empty: ISO 8601, UTC where it has no offset
  type: str = _added("")  # column whose values are types of events
  items: ItemTable | None = None


@dataclasses.dataclass(frozen=True)
class UserTable(TextFormat):
  """A table with columns about users, such as demographics, for user labels and for fields with `table="users"`."""

  files: tuple[str, ...] = ()
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic"] = "auto"
  user: str = "user_id"


@dataclasses.dataclass(frozen=True)
class Aggregates:
  """Point-in-time statistics of every snapshot, from events strictly before it. The model and the baselines read them.

  For each window, which ends at the snapshot, and for the whole history there are always the number of events of each
  source, the number of distinct event times, and the mean of each numeric field as the model reads it. The settings
  below add further ones. `amount` stands for sign(x)·log(1+|x|) of a number x.

  `sums` and `means`: the amount of the sum, and of the arithmetic mean, of the raw numbers. `trends`: the amount of the
  sum over a window minus the amount of the sum over the window of the same length before it; the whole history has no
  trend. `paces`: for every window the amounts of the number of distinct event times, and of the sums of `sums`, minus
  the amounts that the user's own average over the whole history would give. `distinct`: log1p of the number of distinct
  values. Values outside the vocabulary count as one value, and so do values that share a hash's bucket. `conditions`:
  log1p of the number of events that fulfil a condition in the language of a task's `where`, such as
  `{"returns": "quantity < 0"}`. `habits`: the shares of the distinct event times on each weekday and in each three
  hours of the day, in the time of the log, for the longest window and for the whole history.

  `factors`: what all values of a field that the user has had say, in a few numbers, learned from which values users of
  training share; see `data/encoding/factors.py`. `factor_numbers` adds what the numbers of these events say, as in
  `{"film": "rating"}`: where they are above or below the usual number of the value.
  """

  enabled: bool = True
  windows_days: tuple[float, ...] = (1.0, 7.0, 28.0, 90.0)  # the whole history is always added
  top_values: int = 0  # number of most frequent values counted for each field in `fields`
  fields: tuple[str, ...] = ()
  sums: tuple[str, ...] = _added(())  # numeric fields
  means: tuple[str, ...] = _added(())  # numeric fields
  trends: tuple[str, ...] = _added(())  # numeric fields
  distinct: tuple[str, ...] = _added(())  # any fields
  conditions: Mapping[str, str] = dataclasses.field(default_factory=dict, metadata=ADDED_LATER)  # name → condition
  paces: bool = _added(False)
  habits: bool = _added(False)
  factors: tuple[str, ...] = _added(())  # categorical fields
  factor_size: int = _added(64)  # largest number of factors of a field
  factor_numbers: Mapping[str, str] = dataclasses.field(default_factory=dict, metadata=ADDED_LATER)  # see `factors`

  @property
  def amounts(self) -> tuple[str, ...]:
    """Returns the numeric fields whose raw numbers are added up, each once."""
    return tuple(dict.fromkeys((*self.sums, *self.means, *self.trends)))
