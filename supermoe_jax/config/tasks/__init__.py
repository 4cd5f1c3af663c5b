"""The kinds of tasks, a file each; the docstring of each class says what its label is.

A task asks at *sites*: every kind at snapshots, and those about the following event at every event of a training row
too. A new kind is a subclass of `LabelledTask` in `TASK_KINDS`, and a class in `supermoe_jax.data.tasks` that makes its
labels.
"""

from supermoe_jax.config.tasks.contrast import Contrast
from supermoe_jax.config.tasks.event_label import EventLabel
from supermoe_jax.config.tasks.future_event import FutureEvent
from supermoe_jax.config.tasks.future_values import FutureValues
from supermoe_jax.config.tasks.next_event import NextEvent
from supermoe_jax.config.tasks.task import NOT_PREPARED, Answer, LabelledTask, SampleSpace, Task, parse_sample_space
from supermoe_jax.config.tasks.user_label import UserLabel

TASK_KINDS: dict[str, type[Task]] = {
  t.kind: t for t in (NextEvent, EventLabel, FutureEvent, FutureValues, UserLabel, Contrast)
}

__all__ = [
  "NOT_PREPARED",
  "TASK_KINDS",
  "Answer",
  "Contrast",
  "EventLabel",
  "FutureEvent",
  "FutureValues",
  "LabelledTask",
  "NextEvent",
  "SampleSpace",
  "Task",
  "UserLabel",
  "parse_sample_space",
]
