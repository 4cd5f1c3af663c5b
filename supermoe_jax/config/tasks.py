"""The kinds of tasks, each declared by a few words; the docstring of each says what its label is.

A task asks at *sites*: every kind at snapshots, and those about the following event (`AT_EVENTS`) at every event of a
training row too.
"""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar, Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class Supervised:
  """What every task with labels has.

  `sample_space="click == 1"` restricts a task to the samples where another task's label compares so (`==`, `!=`, `<`,
  `<=`, `>`, `>=`); where that label is unknown, so is the membership, and the sample is left out. Samples inside count
  `in_space_weight`, outside `out_space_weight`; by default the outside is left out.
  Source of the two weights' names: EasyRec's `in_task_space_weight` and `out_task_space_weight`.
  """

  weight: float = 1.0  # prior π of the weighting; used as it is by `static`
  sample_space: str = ""
  in_space_weight: float = 1.0
  out_space_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class NextEvent(Supervised):
  """The value of `field` in the next event that has one: softmax over its vocabulary, ranked in full."""

  kind: ClassVar[str] = "next_event"
  field: str = ""
  exclude_seen: bool = False  # evaluation: values already in the user's history cannot be recommended
  softmax: Literal["full", "sampled"] = "full"  # training loss; sampled: with log-Q correction
  negatives: int = 1024  # sampled: values drawn a batch (or up to twice as many), shared by its sites
  sampling: Literal["log_uniform", "uniform"] = "log_uniform"  # sampled: by Zipf's law of the rank by count, or evenly


@dataclasses.dataclass(frozen=True)
class EventLabel(Supervised):
  """What the next event that has `field` says in it, such as a click or a rating, before it is known.

  With `positive` (of a vocabulary field) or `at_least` (of a numeric one) a yes-or-no question, otherwise the number
  itself. The answer may depend on the state of the user before the event and on the fields `given` of the event itself.
  A snapshot asks about the `per_snapshot` events that follow it, each from the state at the snapshot.
  """

  kind: ClassVar[str] = "event_label"
  field: str = ""
  positive: tuple[str, ...] = ()
  at_least: float | None = None
  given: tuple[str, ...] = ()  # categorical fields of the event that are known beforehand, such as the item shown
  per_snapshot: int = 10


@dataclasses.dataclass(frozen=True)
class FutureEvent(Supervised):
  """Whether any event of `source` happens in [τ, τ + horizon_days); `negate` for "nothing happens" (churn)."""

  kind: ClassVar[str] = "future_event"
  source: str = ""
  horizon_days: float = 28.0
  negate: bool = False


@dataclasses.dataclass(frozen=True)
class FutureValues(Supervised):
  """Which of the `top` most frequent values of `field` occur in [τ, τ + horizon_days): one binary label each."""

  kind: ClassVar[str] = "future_values"
  field: str = ""
  top: int = 50
  horizon_days: float = 28.0


@dataclasses.dataclass(frozen=True)
class UserLabel(Supervised):
  """What the user table's `column` holds; users without a value have no label.

  `binary`: whether it is one of `positive`. `multiclass`: which of the values that training users have.
  `regression`: the number, standardised by the training users' mean and deviation.
  """

  kind: ClassVar[str] = "user_label"
  column: str = ""
  type: Literal["binary", "multiclass", "regression"] = "binary"
  positive: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Contrast:
  """Two slices of one user's training history belong together, slices of different users do not (InfoNCE).

  It has no label and no metric. Source: CoLES, arXiv 2002.08232.
  """

  kind: ClassVar[str] = "contrast"
  weight: float = 1.0
  slice_events: int = 32  # most events of a slice
  least_events: int = 4  # fewest; users with a shorter training history than two such slices have no pair
  temperature: float = 0.1


Task = NextEvent | EventLabel | FutureEvent | FutureValues | UserLabel | Contrast
LabelledTask = NextEvent | EventLabel | FutureEvent | FutureValues | UserLabel
TASK_KINDS: dict[str, type] = {
  t.kind: t for t in (NextEvent, EventLabel, FutureEvent, FutureValues, UserLabel, Contrast)
}

# Kinds that ask about the following event: at every event of a training row, and at its snapshots.
AT_EVENTS = (NextEvent, EventLabel)

# Settings of a task that do not change what is prepared, only how it is trained or evaluated.
NOT_PREPARED = (
  "weight",
  "exclude_seen",
  "softmax",
  "negatives",
  "sampling",
  "sample_space",
  "in_space_weight",
  "out_space_weight",
  "given",
)

Answer = Literal["catalogue", "binary", "multilabel", "multiclass", "regression", "contrast"]


def answer(task: Task) -> Answer:
  """What form a task's answer has; it decides head, loss and metrics."""
  if isinstance(task, NextEvent):
    return "catalogue"
  if isinstance(task, EventLabel):
    return "binary" if task.positive or task.at_least is not None else "regression"
  if isinstance(task, FutureEvent):
    return "binary"
  if isinstance(task, FutureValues):
    return "multilabel"
  return task.type if isinstance(task, UserLabel) else "contrast"


class SampleSpace(NamedTuple):
  """A parsed `sample_space`: the label of `task` compared with `value`."""

  task: str
  operator: str
  value: float


def parse_sample_space(text: str) -> SampleSpace | None:
  """Parses `click == 1`; None where it cannot be read."""
  found = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(==|!=|<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)\s*", text)
  return SampleSpace(found[1], found[2], float(found[3])) if found else None
