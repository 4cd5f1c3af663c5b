"""Defines the base class of task kinds: how a task's labels are made, stored and read."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.tasks.labels import LabelInputs, Labels, RecordArray, TaskLabels, label_shape

T = TypeVar("T", bound=config.LabelledTask)


class TaskKind(abc.ABC, Generic[T]):
  """A task bound to encoded data; each kind is a subclass, and the defaults suit one label per snapshot.

  The class methods need the task's settings only, so models and plans can call them before there is a dataset.
  """

  def __init__(self, name: str, task: T, data: config.Data, encoders: Encoders):
    """Binds a task to the encoders of its dataset.

    Raises:
      DataError: the task names a value that is not in the data.
    """
    self.name, self.task, self.data, self.encoders = name, task, data, encoders

  # ------------------------------------------------------------------------------------------------------- settings

  @classmethod
  def outputs(cls, name: str, task: T, codes: Mapping[str, int], classes: Mapping[str, int]) -> int:
    """Returns the number of outputs of the task's head.

    Args:
      name: the task's name.
      task: the task.
      codes: the number of codes of each categorical field.
      classes: the number of classes of each multi-class label.

    Raises:
      ConfigError: the task is multi-class, and `classes` lacks it.
    """
    del name, task, codes, classes
    return 1

  @classmethod
  def label_dtype(cls, task: T) -> type:
    """Returns the dtype of the label in records."""
    if task.answer in ("catalogue", "multiclass"):
      return np.int32
    return np.float32 if task.answer in ("regression", "amount", "survival") else np.uint8

  @classmethod
  def record_arrays(cls, name: str, task: T, outputs: int) -> dict[str, RecordArray]:
    """Returns the arrays that a user's record holds for the task."""
    row = label_shape(task.answer, outputs)
    return {f"known_{name}": RecordArray(np.uint8), f"label_{name}": RecordArray(cls.label_dtype(task), row)}

  @classmethod
  @abc.abstractmethod
  def question(cls, task: T) -> str:
    """Returns the task's question in words."""

  # --------------------------------------------------------------------------------------------------------- labels

  def check(self) -> None:
    """Raises ConfigError if the data cannot answer the task."""

  @abc.abstractmethod
  def label(self, inputs: LabelInputs) -> TaskLabels:
    """Returns the labels at the snapshots of a block of users."""

  # ---------------------------------------------------------------------------------------------------- supervision

  def of_record(self, record: Mapping[str, Any], chosen: np.ndarray) -> Labels:
    """Returns the labels of a user's record at the snapshots `chosen`; 0 where unknown."""
    value, known = record[f"label_{self.name}"][chosen], record[f"known_{self.name}"][chosen].astype(bool)
    value[~known] = 0
    return Labels(value, known)

  def asked_events(self, record: Mapping[str, Any], chosen: np.ndarray) -> np.ndarray:
    """Returns the events that the snapshots `chosen` ask about: int32 `[S, m]`, -1 for none.

    The record of a task about events holds them (`config.Task.about_events`); that of another task does not.
    """
    found: np.ndarray = record[f"event_{self.name}"][chosen]
    return found

  def teachable(self, labels: Labels) -> np.ndarray:
    """Returns whether training can use each label."""
    return labels.known

  def given(self, history: UserHistory, event: np.ndarray) -> np.ndarray:
    """Returns the codes that answers about the events `[...]` may depend on: int32 `[..., G]`; G is 0 by default."""
    del history
    return np.zeros((*event.shape, 0), np.int32)

  # --------------------------------------------------------------------------------------------------- sample space

  def encoded(self, number: float) -> float:
    """Returns a sample space's number in the units of this task's label."""
    return number

  def class_values(self) -> tuple[str, ...] | None:
    """Returns the values of a multi-class label, in the order of the classes; None for other labels."""
    return None


class TaskKindAtEvents(TaskKind[T]):
  """A kind that also asks at every event of a training row (`config.Task.asks_at_events`)."""

  @abc.abstractmethod
  def event_labels(self, history: UserHistory | UserBlock) -> Labels:
    """Returns the label of each event, `[N]`."""

  @abc.abstractmethod
  def carried(self, history: UserHistory | UserBlock) -> np.ndarray:
    """Returns whether each event has the field that the task asks about: bool `[N]`."""
