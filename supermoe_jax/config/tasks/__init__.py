"""Tasks: what all have in common (`task`), and their kinds (`kinds`) with the registry.

A task asks at *sites*: every kind at snapshots, and those about the following event at every event of a training row
too. A new kind is a subclass of `LabelledTask` in `TASK_KINDS`, and a class in `supermoe_jax.data.tasks` that makes its
labels.
"""

from supermoe_jax.config.tasks.kinds import Contrast, EventLabel, FutureEvent, FutureValues, NextEvent, UserLabel
from supermoe_jax.config.tasks.task import NOT_PREPARED, Answer, LabelledTask, SampleSpace, Task, parse_sample_space

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
