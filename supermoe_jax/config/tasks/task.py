"""Defines the settings and checks that all kinds of tasks share."""

from __future__ import annotations

import abc
import dataclasses
import re
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from supermoe_jax.errors import ConfigError, nearest

if TYPE_CHECKING:
  from supermoe_jax.config.schema import Config, Data

# The form of a task's answer decides its head, loss and metrics. `catalogue`: a ranking of a field's values; `binary`:
# yes or no; `multilabel`: yes or no for each of several values; `multiclass`: one of several classes; `regression`: a
# number; `contrast`: none.
Answer = Literal["catalogue", "binary", "multilabel", "multiclass", "regression", "contrast"]

# Settings that change a task's training or evaluation, but not its prepared labels.
NOT_PREPARED = (
  "weight",
  "exclude_seen",
  "softmax",
  "negatives",
  "sampling",
  "ties",
  "most_values",
  "sample_space",
  "in_space_weight",
  "out_space_weight",
  "given",
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

  def check(self, path: str, config: Config) -> None:  # noqa: B027 - a kind may have nothing to check
    """Raises ConfigError, with the key `path` in its message, for settings that can never work."""


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


class SampleSpace(NamedTuple):
  """A parsed `sample_space`: a comparison of the label of `task` with `value`."""

  task: str
  operator: str
  value: float


def parse_sample_space(text: str) -> SampleSpace | None:
  """Returns the parsed form of a text such as `click == 1`; None for text that is no comparison."""
  found = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(==|!=|<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)\s*", text)
  return SampleSpace(found[1], found[2], float(found[3])) if found else None


# ------------------------------------------------------------------------------------------- checks that kinds share


def require(condition: bool, message: str) -> None:
  """Raises ConfigError with the message unless the condition holds."""
  if not condition:
    raise ConfigError(message)


def require_single_values(path: str, field: str, data: Data) -> None:
  """Raises ConfigError for a field of lists."""
  require(
    field not in data.fields or not data.fields[field].many,
    f"{path}: {field!r} holds lists, which are inputs only; a task needs a field of single values.",
  )


def require_event_field(path: str, field: str, data: Data) -> None:
  """Raises ConfigError for a field of the table of users."""
  require(
    field not in data.fields or data.fields[field].table == "events",
    f"{path}.field={field!r} is of the table of users (config.data.fields.{field}.table), the same at every event; ask "
    "about its column by a task of kind 'user_label'.",
  )


def require_vocabulary_field(path: str, field: str, data: Data) -> None:
  """Raises ConfigError unless `field` is a vocabulary field of events with single values."""
  require_single_values(path, field, data)
  require_event_field(path, field, data)
  vocabularies = [n for n, f in data.fields.items() if f.kind == "vocabulary"]
  require(field in vocabularies, f"{path}.field={field!r} is not a vocabulary field{nearest(field, vocabularies)}")


def require_no_buckets(path: str, field: str, data: Data, settings: str = "") -> None:
  """Raises ConfigError for a field with buckets, whose values share codes.

  `settings` is text for the message: the settings of a second field that the task could ask about instead.
  """
  require(
    not data.fields[field].buckets,
    f"{path}.field={field!r}: with config.data.fields.{field}.buckets={data.fields[field].buckets} values share codes, "
    f"so that a task cannot tell them apart; name a second field of the same column{settings} without buckets, such as "
    f"{field}_asked=dict(column={data.fields[field].column or field!r}{', input=False' if settings else ''}).",
  )


def require_following_events(path: str, data: Data) -> None:
  """Raises ConfigError where no event can follow an evaluated snapshot."""
  require(
    data.split.mode != "user" or data.split.snapshots != "end",
    f"{path}: with config.data.split.snapshots='end' and mode='user' no event follows a snapshot, so nothing could "
    "be evaluated; set snapshots='every_events' or 'calendar', or leave the task out.",
  )


def require_window(path: str, horizon_days: float, data: Data) -> None:
  """Raises ConfigError where no label can have a window after a snapshot."""
  require(horizon_days > 0, f"{path}.horizon_days={horizon_days} must be positive.")
  require(
    data.split.mode != "leave_one_out",
    f"{path}: a task about the future needs config.data.split.mode='temporal' or 'user'; leave_one_out has no "
    "calendar.",
  )
  require(
    data.split.snapshots != "end",
    f"{path}: with config.data.split.snapshots='end' nothing follows a training snapshot, so that every answer about "
    "the future would be the same; set snapshots='every_events' or 'calendar', or leave the task out.",
  )
