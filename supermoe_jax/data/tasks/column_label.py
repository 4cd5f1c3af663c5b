"""Defines what task kinds have in common whose label is one value of a table: yes or no, a class, or a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from supermoe_jax import config
from supermoe_jax.data.encoding.vocabulary import Classes, Numeric
from supermoe_jax.data.tasks.kind import TaskKind
from supermoe_jax.errors import ConfigError

ColumnTask = TypeVar("ColumnTask", bound=config.UserLabel | config.DatedLabel)


class ColumnLabelKind(TaskKind[ColumnTask]):
  """A kind whose label is the value of a table's column."""

  @classmethod
  def outputs(cls, name: str, task: ColumnTask, codes: Mapping[str, int], classes: Mapping[str, int]) -> int:
    """See `TaskKind`."""
    if task.type != "multiclass":
      return 1
    if name not in classes:
      raise ConfigError(
        f"config.tasks.{name}: how many classes column {task.column!r} has is known once the dataset is prepared; run "
        f"'supermoe prepare' first, or leave the task out by --config.exclude_tasks={name}"
      )
    return classes[name]

  def encoded(self, number: float) -> float:
    """See `TaskKind`."""
    if self.task.type != "regression":
      return number
    statistics = self.encoders.labels[self.name]
    assert isinstance(statistics, Numeric)  # reading the table encodes numbers so
    return float(statistics.encode(number))

  def class_values(self) -> tuple[str, ...] | None:
    """See `TaskKind`."""
    if self.task.type != "multiclass":
      return None
    classes = self.encoders.labels[self.name]
    assert isinstance(classes, Classes)  # reading the table encodes multi-class labels so
    return tuple(classes.values)
