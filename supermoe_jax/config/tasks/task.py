"""Defines the settings that all kinds of tasks share; `config.kind_checks` checks them."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Literal

# The form of a task's answer decides its head, loss and metrics. `catalogue`: a ranking of a field's values; `binary`:
# yes or no; `multilabel`: yes or no for each of several values; `multiclass`: one of several classes; `regression`: a
# number; `amount`: an amount in its own unit; `survival`: the chances of an event by each of several days; `contrast`:
# none.
Answer = Literal["catalogue", "binary", "multilabel", "multiclass", "regression", "amount", "survival", "contrast"]

# Settings that change a task's training or evaluation, but not its prepared labels.
NOT_PREPARED = (
  "weight",
  "exclude_seen",
  "softmax",
  "negatives",
  "sampling",
  "ties",
  "most_values",
  "memory",
  "sample_space",
  "in_space_weight",
  "out_space_weight",
  "given",
  "loss",
  "power",
)


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
  """A task: its settings, and the properties of its kind that the rest of the package reads.

  Each kind is a subclass, whose docstring describes the label. The class of the same kind in `supermoe_jax.data.tasks`
  makes the labels.
  """

  kind: ClassVar[str]
  has_labels: ClassVar[bool] = True
  asks_at_events: ClassVar[bool] = False  # asks at every event of a training row, not only at snapshots
  about_events: ClassVar[bool] = False  # a snapshot asks about each of several events that follow it
  asks_at_rows: ClassVar[bool] = False  # asks at snapshots of its own, at the rows of a table of dated labels

  weight: float = 1.0  # prior π of the weighting; `static` uses it unchanged

  @property
  @abc.abstractmethod
  def answer(self) -> Answer:
    """Returns the form of the answer."""

  @property
  def given_fields(self) -> tuple[str, ...]:
    """Returns the fields of the event in question that the answer may depend on."""
    return ()

  @property
  def asked_events(self) -> int:
    """Returns the number of events that a snapshot asks about; 1 for a question about the user."""
    return 1

  @property
  def asked_values(self) -> int:
    """Returns the number of values that an answer judges, each with one label; 1 for a single label."""
    return 1

  @property
  def horizon(self) -> float | None:
    """Returns the length in days of the label's window after a snapshot; None for a label without a window."""
    return None

  @property
  def label_ends(self) -> tuple[float, ...]:
    """Returns the lengths in days after a snapshot that change its label once they are wholly observed."""
    return () if self.horizon is None else (self.horizon,)

  @property
  def user_column(self) -> str:
    """Returns the column of the table of users that holds the label; empty where events hold it."""
    return ""

  @property
  def dated_column(self) -> str:
    """Returns the column of a table of dated labels that holds the label; empty where something else holds it."""
    return ""

  @property
  def own_files(self) -> tuple[str, ...]:
    """Returns the patterns of the files that hold the task's labels and nothing else; empty for most kinds."""
    return ()

  @property
  def excludes_seen(self) -> bool:
    """Returns whether evaluation leaves out values that the user's history already has."""
    return False

  def values_of_a_moment(self, tie_rate: float, split_mode: str) -> int:
    """Returns the most values of one moment that all count as right; 0 where the order of simultaneous events counts.

    `tie_rate` is the share of the log's events that share user and time with another event; `split_mode` is
    `data.split.mode`.
    """
    del tie_rate, split_mode
    return 0


@dataclasses.dataclass(frozen=True)
class LabelledTask(Task):
  """A task with labels.

  `sample_space="click == 1"` restricts a task to samples by another task's label (`==`, `!=`, `<`, `<=`, `>`, `>=`). A
  sample where that label is unknown is left out. A sample inside the space has the weight `in_space_weight`, a sample
  outside has `out_space_weight`, which by default leaves it out.
  Source of the two weights' names: EasyRec's `in_task_space_weight` and `out_task_space_weight`.
  """

  sample_space: str = ""
  in_space_weight: float = 1.0
  out_space_weight: float = 0.0
