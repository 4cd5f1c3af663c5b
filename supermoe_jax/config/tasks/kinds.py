"""Declares the kinds of tasks by their settings; the docstring of each class describes its label."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from supermoe_jax.config.tasks.task import (
  Answer,
  LabelledTask,
  Task,
  require,
  require_event_field,
  require_following_events,
  require_no_buckets,
  require_single_values,
  require_vocabulary_field,
  require_window,
)
from supermoe_jax.errors import nearest

if TYPE_CHECKING:
  from supermoe_jax.config.schema import Config


# The share of events that share user and time with another from which ties="auto" is "set".
TIES_ARE_COMMON = 0.1


@dataclasses.dataclass(frozen=True)
class NextEvent(LabelledTask):
  """The value of `field` in the next event that has one: a softmax over its vocabulary, ranked in full.

  With `ties="set"` the events of one moment are a set. The question, at the end of each moment, is about the next
  moment that has a value, and any of its values is right: the loss is −log of the sum of their probabilities, and the
  best of them is ranked, without the others. With "order" it is about the very next event, in the order of the files.
  "auto" is "set" where simultaneous events are common in the log (`TIES_ARE_COMMON`), except for a leave-one-out split,
  whose held-out questions are about one event each.
  """

  kind: ClassVar[str] = "next_event"
  asks_at_events: ClassVar[bool] = True

  field: str = ""
  exclude_seen: bool = False  # evaluation leaves out values already in the user's history
  softmax: Literal["full", "sampled"] = "full"  # form of the training loss; sampled has a log-Q correction
  negatives: int = 1024  # sampled: values drawn per batch (up to twice this number), shared by all its sites
  sampling: Literal["log_uniform", "uniform"] = "log_uniform"  # sampled: by Zipf's law of the frequency rank, or evenly
  ties: Literal["auto", "set", "order"] = "auto"  # simultaneous events
  most_values: int = 32  # set: values of a moment that count; more are left out, the first of the files stay

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "catalogue"

  @property
  def excludes_seen(self) -> bool:
    """See `Task`."""
    return self.exclude_seen

  def values_of_a_moment(self, tie_rate: float, split_mode: str) -> int:
    """See `Task`."""
    common = tie_rate >= TIES_ARE_COMMON and split_mode != "leave_one_out"
    return self.most_values if self.ties == "set" or (self.ties == "auto" and common) else 0

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    data = config.data
    require_vocabulary_field(path, self.field, data)
    require_no_buckets(path, self.field, data)
    require(data.fields[self.field].input, f"{path}.field={self.field!r} is no input, so it has no embeddings to rank.")
    require(self.negatives > 0, f"{path}.negatives={self.negatives} must be positive.")
    require(self.most_values > 0, f"{path}.most_values={self.most_values} must be positive.")
    require_following_events(path, data)


@dataclasses.dataclass(frozen=True)
class EventLabel(LabelledTask):
  """The value of `field` in the next event that has it, such as a click or a rating, before it is known.

  With `positive` (for a vocabulary field) or `at_least` (for a numeric one) the answer is yes or no. Otherwise it is
  the number itself. It may depend on the user's state before the event and on the event's own fields `given`. A
  snapshot asks about the `per_snapshot` events that follow it, each from the state at the snapshot.
  """

  kind: ClassVar[str] = "event_label"
  asks_at_events: ClassVar[bool] = True
  about_events: ClassVar[bool] = True

  field: str = ""
  positive: tuple[str, ...] = ()
  at_least: float | None = None
  given: tuple[str, ...] = ()  # categorical fields of the event known beforehand, such as the item shown
  per_snapshot: int = 10

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "binary" if self.positive or self.at_least is not None else "regression"

  @property
  def given_fields(self) -> tuple[str, ...]:
    """See `Task`."""
    return self.given

  @property
  def asked_events(self) -> int:
    """See `Task`."""
    return self.per_snapshot

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    data = config.data
    for name in (self.field, *self.given):
      require_single_values(path, name, data)
    require_event_field(path, self.field, data)
    require(self.field in data.fields, f"{path}.field={self.field!r} is not a field{nearest(self.field, data.fields)}")
    kind = data.fields[self.field].kind
    if self.positive:
      require(kind == "vocabulary", f"{path}.positive needs a vocabulary field; {self.field!r} is {kind}.")
      require(self.at_least is None, f"{path}: positive and at_least exclude each other; keep one.")
      require_no_buckets(path, self.field, data, " with input=False")
    else:
      require(kind == "numeric", f"{path}: name the values of {self.field!r} that are positive; it is a {kind} field.")
    for name in self.given:
      require(name in data.fields, f"{path}.given: {name!r} is not a field{nearest(name, data.fields)}")
      require(
        data.fields[name].kind != "numeric", f"{path}.given: {name!r} is numeric; only categorical fields can be."
      )
      require(data.fields[name].input, f"{path}.given: {name!r} is no input, so it has no embeddings.")
      require(name != self.field, f"{path}.given holds {name!r}, the field that is asked for.")
    require(self.per_snapshot > 0, f"{path}.per_snapshot={self.per_snapshot} must be positive.")
    require_following_events(path, data)


@dataclasses.dataclass(frozen=True)
class FutureEvent(LabelledTask):
  """The occurrence of any event of `source` in [τ, τ + horizon_days); `negate` asks that none occurs (churn)."""

  kind: ClassVar[str] = "future_event"

  source: str = ""
  horizon_days: float = 28.0
  negate: bool = False

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "binary"

  @property
  def horizon(self) -> float | None:
    """See `Task`."""
    return self.horizon_days

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    require_window(path, self.horizon_days, config.data)
    sources = config.data.sources
    require(self.source in sources, f"{path}.source={self.source!r} is not a source{nearest(self.source, sources)}")


@dataclasses.dataclass(frozen=True)
class FutureValues(LabelledTask):
  """The values of `field`, of its `top` most frequent, that occur in [τ, τ + horizon_days): a binary label each."""

  kind: ClassVar[str] = "future_values"

  field: str = ""
  top: int = 50
  horizon_days: float = 28.0

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "multilabel"

  @property
  def asked_values(self) -> int:
    """See `Task`."""
    return self.top

  @property
  def horizon(self) -> float | None:
    """See `Task`."""
    return self.horizon_days

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    data = config.data
    require_vocabulary_field(path, self.field, data)
    require_window(path, self.horizon_days, data)
    require_no_buckets(path, self.field, data, " with input=False")
    require(self.top > 0, f"{path}.top={self.top} must be positive.")


@dataclasses.dataclass(frozen=True)
class UserLabel(LabelledTask):
  """The value of the user table's `column`; users without a value have no label.

  `binary`: whether the value is one of `positive`. `multiclass`: one of the values that training users have.
  `regression`: the number, standardised by the training users' mean and standard deviation.
  """

  kind: ClassVar[str] = "user_label"

  column: str = ""
  type: Literal["binary", "multiclass", "regression"] = "binary"
  positive: tuple[str, ...] = ()

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return self.type

  @property
  def user_column(self) -> str:
    """See `Task`."""
    return self.column

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    require(config.data.users is not None, f"{path}: a user label needs config.data.users.")
    require(bool(self.column), f"{path}.column is empty: name the user table's column.")
    for name, field in config.data.fields.items():
      require(
        field.table == "events" or not field.input or (field.column or name) != self.column,
        f"{path}.column={self.column!r} is also the column of the input config.data.fields.{name}, which would tell "
        f"the label; leave one of the two out, or set config.data.fields.{name}.input=False.",
      )
    require(
      bool(self.positive) or self.type != "binary",
      f"{path}.positive is empty: name the values that count as positive, or set type='multiclass' or 'regression'.",
    )
    require(
      not self.positive or self.type == "binary", f"{path}.positive has no meaning with type={self.type!r}; remove it."
    )


@dataclasses.dataclass(frozen=True)
class DatedLabel(LabelledTask):
  """The value of `column` in a table of users and times, such as fraud flags, defaults or answers to surveys.

  A user may have several rows. Each row adds a snapshot at its own time τ, and the model sees the events strictly
  before τ. The added snapshots carry the labels of tasks of this kind only; every other task's label is unknown there,
  and this task's label is unknown at all other snapshots. So a table of dated labels changes no label of another task.

  `binary`: whether the value is one of `positive`; without `positive` the column holds 0 and 1 (or false and true).
  `multiclass`: one of the values that training rows have. `regression`: the number, standardised by the training rows'
  mean and standard deviation. A row without a value has no label.

  The row's time decides its split. Mode `temporal`: before `train_end` (and not before `train_start`) it is for
  training; from `train_end` plus `gap_days` until `gap_days` before the first test snapshot it is for validation; from
  the first test snapshot until the end of the log it is for test. Mode `user`: a row up to the end of the log (and not
  before `train_start`) belongs to the split of its user. Rows outside these periods are left out and counted.

  `delay_days` is the time after τ at which a label becomes known, such as the time until a default is certain. A label
  for training or validation must become known within its period. Other labels there are left out and counted. A label
  for test is in the table, so it is known.
  """

  kind: ClassVar[str] = "dated_label"
  asks_at_rows: ClassVar[bool] = True

  files: tuple[str, ...] = ()  # paths or globs
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic"] = "auto"
  user: str = "user_id"
  time: str = "timestamp"
  time_unit: Literal["auto", "s", "ms", "us"] = "auto"  # as of a source
  time_format: str = ""  # as of a source
  column: str = "label"
  type: Literal["binary", "multiclass", "regression"] = "binary"
  positive: tuple[str, ...] = ()
  delay_days: float = 0.0

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return self.type

  @property
  def dated_column(self) -> str:
    """See `Task`."""
    return self.column

  @property
  def own_files(self) -> tuple[str, ...]:
    """See `Task`."""
    return self.files

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    split = config.data.split
    require(bool(self.files), f"{path}.files is empty: name the files of the table of dated labels.")
    for key in ("user", "time", "column"):
      require(bool(getattr(self, key)), f"{path}.{key} is empty: name the column.")
    require(
      self.user != self.time and self.column not in (self.user, self.time),
      f"{path}: user={self.user!r}, time={self.time!r} and column={self.column!r} must be three columns.",
    )
    require(
      split.mode != "leave_one_out",
      f"{path}: a dated label needs config.data.split.mode='temporal' or 'user'; leave_one_out has no periods that a "
      "label's time could lie in.",
    )
    require(self.delay_days >= 0, f"{path}.delay_days={self.delay_days} must not be negative.")
    require(
      not self.positive or self.type == "binary", f"{path}.positive has no meaning with type={self.type!r}; remove it."
    )


@dataclasses.dataclass(frozen=True)
class Contrast(Task):
  """Contrastive learning: two slices of one user's training history belong together, those from different users do not.

  The loss is InfoNCE. The task has no label and no metric. Source: CoLES, arXiv 2002.08232.
  """

  kind: ClassVar[str] = "contrast"
  has_labels: ClassVar[bool] = False

  slice_events: int = 32  # most events in a slice
  least_events: int = 4  # fewest events; users with fewer than twice as many training events have no pair
  temperature: float = 0.1

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "contrast"

  def check(self, path: str, config: Config) -> None:
    """See `Task`."""
    require(
      1 <= self.least_events <= self.slice_events <= config.model.max_events,
      f"{path}: 1 ≤ least_events={self.least_events} ≤ slice_events={self.slice_events} ≤ "
      f"model.max_events={config.model.max_events} must hold.",
    )
    require(self.temperature > 0, f"{path}.temperature={self.temperature} must be positive.")
