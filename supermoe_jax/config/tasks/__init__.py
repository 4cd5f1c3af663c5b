"""Defines the settings of tasks: their common part (`task`), the kinds (`kinds`) and the registry of kinds.

A task asks at *sites*: every kind asks at snapshots, and kinds about the following event also ask at every event of a
training row. A new kind is a subclass of `LabelledTask` in `TASK_KINDS`, and a class in `supermoe_jax.data.tasks` that
makes its labels.
"""

from supermoe_jax.config.tasks.kinds import (
  Contrast,
  DatedLabel,
  EventLabel,
  FutureAmount,
  FutureEvent,
  FutureValues,
  NextEvent,
  TimeToEvent,
  UserLabel,
)
from supermoe_jax.config.tasks.task import NOT_PREPARED, Answer, LabelledTask, Task

TASK_KINDS: dict[str, type[Task]] = {
  t.kind: t
  for t in (
    NextEvent,
    EventLabel,
    FutureEvent,
    FutureValues,
    FutureAmount,
    TimeToEvent,
    UserLabel,
    DatedLabel,
    Contrast,
  )
}

__all__ = [
  "NOT_PREPARED",
  "TASK_KINDS",
  "Answer",
  "Contrast",
  "DatedLabel",
  "EventLabel",
  "FutureAmount",
  "FutureEvent",
  "FutureValues",
  "LabelledTask",
  "NextEvent",
  "Task",
  "TimeToEvent",
  "UserLabel",
]
