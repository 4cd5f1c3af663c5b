"""Declares the settings of the task kind `dated_label`: labels with a time, in a table of their own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from supermoe_jax.config.tasks.task import Answer, LabelledTask, require

if TYPE_CHECKING:
  from supermoe_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class DatedLabel(LabelledTask):
  """The value of `column` in a table of users and times, such as fraud flags, defaults or answers to surveys.

  A user may have several rows. Each row adds a snapshot at its own time τ, and the model sees the events strictly
  before τ. The added snapshots carry the labels of tasks of this kind only; every other task's label is unknown there,
  and this task's label is unknown at all other snapshots. So a table of dated labels changes no label of another task.

  `binary`: whether the value is one of `positive`; without `positive` the column holds 0 and 1 (or false and true).
  `multiclass`: one of the values that training rows have. `regression`: the number, standardised by the training rows'
  mean and standard deviation. A row without a value has no label.

  The row's time decides its split. Mode `temporal`: before `train_end` (and not before `train_start`) it is for
  training; from `train_end` plus `gap_days` until `gap_days` before the first test snapshot it is for validation; from
  the first test snapshot until the end of the log it is for test. Mode `user`: a row up to the end of the log (and not
  before `train_start`) belongs to the split of its user. Rows outside these periods are left out and counted.

  `delay_days` is the time after τ at which a label becomes known, such as the time until a default is certain. A label
  for training or validation must become known within its period. Other labels there are left out and counted. A label
  for test is in the table, so it is known.
  """

  kind: ClassVar[str] = "dated_label"
  asks_at_rows: ClassVar[bool] = True

  files: tuple[str, ...] = ()  # paths or globs
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic"] = "auto"
  user: str = "user_id"
  time: str = "timestamp"
  time_unit: Literal["auto", "s", "ms", "us"] = "auto"  # as of a source
  time_format: str = ""  # as of a source
  column: str = "label"
  type: Literal["binary", "multiclass", "regression"] = "binary"
  positive: tuple[str, ...] = ()
  delay_days: float = 0.0

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return self.type

  @property
  def dated_column(self) -> str:
    """See `Task`."""
    return self.column

  @property
  def own_files(self) -> tuple[str, ...]:
    """See `Task`."""
    return self.files

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    split = config.data.split
    require(bool(self.files), f"{path}.files is empty: name the files of the table of dated labels.")
    for key in ("user", "time", "column"):
      require(bool(getattr(self, key)), f"{path}.{key} is empty: name the column.")
    require(
      self.user != self.time and self.column not in (self.user, self.time),
      f"{path}: user={self.user!r}, time={self.time!r} and column={self.column!r} must be three columns.",
    )
    require(
      split.mode != "leave_one_out",
      f"{path}: a dated label needs config.data.split.mode='temporal' or 'user'; leave_one_out has no periods that a "
      "label's time could lie in.",
    )
    require(self.delay_days >= 0, f"{path}.delay_days={self.delay_days} must not be negative.")
    require(
      not self.positive or self.type == "binary", f"{path}.positive has no meaning with type={self.type!r}; remove it."
    )
