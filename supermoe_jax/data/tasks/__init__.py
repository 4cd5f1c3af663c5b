"""Makes the labels of tasks: a file for each kind, and the registry of kinds.

Each class makes the labels of the kind of the same name in `supermoe_jax.config.tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supermoe_jax import config
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.tasks.dated_label import DatedLabelKind
from supermoe_jax.data.tasks.event_label import EventLabelKind
from supermoe_jax.data.tasks.future_amount import FutureAmountKind
from supermoe_jax.data.tasks.future_event import FutureEventKind
from supermoe_jax.data.tasks.future_values import FutureValuesKind
from supermoe_jax.data.tasks.kind import TaskKind, TaskKindAtEvents
from supermoe_jax.data.tasks.next_event import NextEventKind
from supermoe_jax.data.tasks.time_to_event import TimeToEventKind
from supermoe_jax.data.tasks.user_label import UserLabelKind

# The classes of the kinds with labels, by `config.Task.kind`.
KINDS: dict[str, type[TaskKind[Any]]] = {
  config.NextEvent.kind: NextEventKind,
  config.EventLabel.kind: EventLabelKind,
  config.FutureEvent.kind: FutureEventKind,
  config.FutureValues.kind: FutureValuesKind,
  config.FutureAmount.kind: FutureAmountKind,
  config.TimeToEvent.kind: TimeToEventKind,
  config.UserLabel.kind: UserLabelKind,
  config.DatedLabel.kind: DatedLabelKind,
}


def bind(tasks: Mapping[str, config.LabelledTask], data: config.Data, encoders: Encoders) -> dict[str, TaskKind[Any]]:
  """Returns each task bound to the encoders of its dataset.

  Raises:
    DataError: a task names a value that is not in the data.
  """
  return {name: KINDS[task.kind](name, task, data, encoders) for name, task in tasks.items()}


def question(task: config.Task) -> str:
  """Returns a task's question in words."""
  if task.has_labels:
    return KINDS[task.kind].question(task)
  return CONTRAST_QUESTION.format(task=task)


CONTRAST_QUESTION = (
  "whether two slices of up to {task.slice_events} events are of one user; trained by contrast, without a metric"
)

__all__ = ["KINDS", "TaskKind", "TaskKindAtEvents", "bind", "question"]
