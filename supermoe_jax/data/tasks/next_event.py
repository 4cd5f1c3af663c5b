"""Makes the labels of the task kind `next_event`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import ABSENT, FIRST_VALUE, UNKNOWN
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.data.tasks.event_condition import event_condition
from supermoe_jax.data.tasks.kind import TaskKindAtEvents
from supermoe_jax.data.tasks.labels import (
  LabelInputs,
  Labels,
  Snapshots,
  TaskLabels,
  first_unseen,
  last_answer,
  next_carrier,
)
from supermoe_jax.data.tasks.listing import where


def label_next_event(block: UserBlock, snapshots: Snapshots, codes: np.ndarray, times: Calendar | None) -> Labels:
  """Returns the code of the next event that has one in `codes [N]`, within the period of the snapshot's split.

  Without a calendar (leave one out) only the very next event counts.
  """
  at = first_unseen(block, snapshots)
  if times is not None:
    at = next_carrier(codes > ABSENT)[at]
  known = at < last_answer(block, snapshots, times)
  value = np.where(known, codes[np.minimum(at, len(codes) - 1)], 0)
  return Labels(value.astype(np.int32), known & (value > 0))


class NextEventKind(TaskKindAtEvents[config.NextEvent]):
  """See `config.NextEvent`."""

  def __init__(self, name: str, task: config.NextEvent, data: config.Data, encoders: Encoders):
    """See `TaskKind`."""
    super().__init__(name, task, data, encoders)
    self._column = list(encoders.categorical).index(task.field)
    self._asked = event_condition(f"config.tasks.{name}", task.where, "", data, encoders)

  def _codes(self, history: UserHistory | UserBlock) -> np.ndarray:
    """Returns the field's code of each event that the task asks about, and ABSENT for the others: int32 `[N]`."""
    codes = history.codes[:, self._column]
    return codes if self._asked is None else np.where(self._asked(history), codes, ABSENT)

  @classmethod
  def outputs(cls, name: str, task: config.NextEvent, codes: Mapping[str, int], classes: Mapping[str, int]) -> int:
    """See `TaskKind`."""
    return codes[task.field] - FIRST_VALUE

  @classmethod
  def question(cls, task: config.NextEvent) -> str:
    """See `TaskKind`."""
    seen = ", those already in the history left out" if task.exclude_seen else ""
    return f"which {task.field} comes next{where(task.where)}, ranked among all{seen}"

  def label(self, inputs: LabelInputs) -> TaskLabels:
    """See `TaskKind`."""
    return TaskLabels(label_next_event(inputs.block, inputs.snapshots, self._codes(inputs.block), inputs.times))

  def event_labels(self, history: UserHistory | UserBlock) -> Labels:
    """See `TaskKindAtEvents`."""
    codes = self._codes(history)
    return Labels(codes, codes > ABSENT)

  def carried(self, history: UserHistory | UserBlock) -> np.ndarray:
    """See `TaskKindAtEvents`."""
    return self._codes(history) > ABSENT

  def teachable(self, labels: Labels) -> np.ndarray:
    """Returns whether training can use each label; an out-of-vocabulary value has no row in the catalogue."""
    return labels.known & (labels.value > UNKNOWN)
