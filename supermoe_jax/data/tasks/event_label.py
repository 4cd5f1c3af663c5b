"""Makes the labels of the task kind `event_label`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import ABSENT, UNKNOWN
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory
from supermoe_jax.data.encoding.vocabulary import Encoders, Vocabulary
from supermoe_jax.data.tasks.calendar import Calendar
from supermoe_jax.data.tasks.event_condition import event_condition, value_code
from supermoe_jax.data.tasks.kind import TaskKindAtEvents
from supermoe_jax.data.tasks.labels import (
  LabelInputs,
  Labels,
  RecordArray,
  Snapshots,
  TaskLabels,
  at_events,
  first_unseen,
  last_answer,
)
from supermoe_jax.data.tasks.listing import listed, where


@dataclasses.dataclass(frozen=True, eq=False)
class EventAnswer:
  """The label of single events: yes or no, or the standardised number.

  Attributes:
    column: the field's column, among the codes if `positive` is given, otherwise among the numbers.
    positive: bool `[codes]`, the codes of the field that count as positive.
    at_least: the smallest standardised number that counts as positive.
  """

  column: int
  positive: np.ndarray | None = None
  at_least: np.float32 | None = None

  def carried(self, history: UserHistory | UserBlock) -> np.ndarray:
    """Returns whether each event has the field: bool `[N]`."""
    if self.positive is not None:
      return history.codes[:, self.column] > ABSENT
    return np.isfinite(history.numeric[:, self.column])

  def __call__(self, history: UserHistory | UserBlock) -> Labels:
    """Returns the labels of all events, `[N]`; unknown where the field is absent or its value out of vocabulary."""
    if self.positive is not None:
      codes = history.codes[:, self.column]
      return Labels(self.positive[codes].astype(np.float32), codes > UNKNOWN)
    number, known = history.numeric[:, self.column], self.carried(history)
    value = number if self.at_least is None else number >= self.at_least
    return Labels(np.where(known, value, 0).astype(np.float32), known)


def following_events(
  carried: np.ndarray, block: UserBlock, snapshots: Snapshots, per_snapshot: int, times: Calendar | None
) -> np.ndarray:
  """Returns the next events that carry a field, within the period of the snapshot's split.

  Without a calendar (leave one out) only the very next event counts.

  Shapes: `carried [N]` → int64 `[S, per_snapshot]`, positions in the block; -1 for none.
  """
  n = len(block.time)
  start, limit = first_unseen(block, snapshots), last_answer(block, snapshots, times)
  if times is None:
    out = np.full((len(start), per_snapshot), -1, np.int64)
    out[:, 0] = np.where((start < limit) & carried[np.minimum(start, n - 1)], start, -1)
    return out
  carriers = np.flatnonzero(carried)
  place = np.searchsorted(carriers, start)[:, None] + np.arange(per_snapshot)
  event = np.append(carriers, n)[np.minimum(place, len(carriers))]
  return np.where(event < limit[:, None], event, -1)


class EventLabelKind(TaskKindAtEvents[config.EventLabel]):
  """See `config.EventLabel`."""

  def __init__(self, name: str, task: config.EventLabel, data: config.Data, encoders: Encoders):
    """See `TaskKind`.

    Raises:
      DataError: a positive value is not in the field's vocabulary; most likely it is misspelt.
    """
    super().__init__(name, task, data, encoders)
    columns = list(encoders.categorical)
    self._given = [columns.index(field) for field in task.given]
    self._answer = self._event_answer()
    self._asked = event_condition(f"config.tasks.{name}", task.where, "", data, encoders)

  def _event_answer(self) -> EventAnswer:
    task, encoders = self.task, self.encoders
    if not task.positive:
      least = None if task.at_least is None else self._standardised(task.at_least)
      return EventAnswer(list(encoders.numeric).index(task.field), at_least=least)
    encoder = encoders.categorical[task.field]
    assert isinstance(encoder, Vocabulary)  # config.resolve checked
    positive = np.zeros(encoder.n_codes, bool)
    for value in task.positive:
      positive[value_code(f"config.tasks.{self.name}.positive", task.field, value, encoder)] = True
    return EventAnswer(list(encoders.categorical).index(task.field), positive)

  def _standardised(self, number: float) -> np.float32:
    return self.encoders.numeric[self.task.field].encode(number, self.data.fields[self.task.field].encoding)

  @classmethod
  def label_dtype(cls, task: config.EventLabel) -> type:
    """See `TaskKind`."""
    return np.float32

  @classmethod
  def record_arrays(cls, name: str, task: config.EventLabel, outputs: int) -> dict[str, RecordArray]:
    """See `TaskKind`."""
    row = (task.per_snapshot,)
    return {
      f"known_{name}": RecordArray(np.uint8, row),
      f"event_{name}": RecordArray(np.int32, row),
      f"label_{name}": RecordArray(cls.label_dtype(task), row),
    }

  @classmethod
  def question(cls, task: config.EventLabel) -> str:
    """See `TaskKind`."""
    if task.positive:
      asked = f"whether {task.field} of the next event is {listed(task.positive)}"
    elif task.at_least is not None:
      asked = f"whether {task.field} of the next event is at least {task.at_least:g}"
    else:
      asked = f"the number {task.field} of the next event, in standard deviations from its mean"
    asked += where(task.where)
    if task.given:
      asked += f", given its {', '.join(task.given)}"
    return asked + f"; asked of the {task.per_snapshot} events after a snapshot"

  def label(self, inputs: LabelInputs) -> TaskLabels:
    """See `TaskKind`."""
    block, snapshots = inputs.block, inputs.snapshots
    event = following_events(self.carried(block), block, snapshots, self.task.per_snapshot, inputs.times)
    of_user = np.where(event < 0, -1, event - block.offsets[snapshots.user][:, None])
    return TaskLabels(at_events(self.event_labels(block), event), of_user.astype(np.int32))

  def of_record(self, record: Mapping[str, Any], chosen: np.ndarray) -> Labels:
    """See `TaskKind`."""
    return Labels(record[f"label_{self.name}"][chosen], record[f"known_{self.name}"][chosen].astype(bool))

  def event_labels(self, history: UserHistory | UserBlock) -> Labels:
    """See `TaskKindAtEvents`."""
    value, known = self._answer(history)
    return Labels(value, known if self._asked is None else known & self._asked(history))

  def carried(self, history: UserHistory | UserBlock) -> np.ndarray:
    """See `TaskKindAtEvents`."""
    carried = self._answer.carried(history)
    return carried if self._asked is None else carried & self._asked(history)

  def given(self, history: UserHistory, event: np.ndarray) -> np.ndarray:
    """See `TaskKind`."""
    if not self._given:
      return super().given(history, event)
    codes = history.codes[np.maximum(event, 0)][..., self._given]
    return np.where(event[..., None] >= 0, codes, 0).astype(np.int32)

  def encoded(self, number: float) -> float:
    """See `TaskKind`."""
    return float(self._standardised(number)) if self.task.answer == "regression" else number
