"""Declares the kinds of tasks by their settings; the docstring of each class describes its label."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from supermoe_jax.config.tables import TextFormat
from supermoe_jax.config.tasks.task import Answer, LabelledTask, Task

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
  where: str = ""  # only events that fulfil the condition are asked about; see `config.tasks.condition`
  most_values: int = 32  # set: values of a moment that count; more are left out, the first of the files stay
  # Counts that add to the scores, each with a gain that the state decides: "repeat", the user's own earlier values;
  # "recent", the same with less weight for older ones; "follow", values that followed the user's last ones in training.
  memory: tuple[str, ...] = ()

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
  where: str = ""  # only events that fulfil the condition are asked about

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


@dataclasses.dataclass(frozen=True)
class FutureEvent(LabelledTask):
  """The occurrence of any event of `source` in [τ, τ + horizon_days); `negate` asks that none occurs (churn).

  `source` names a source, or a value of the column `type` of a source; empty: events of any type. With `where` only
  events that fulfil the condition count.
  """

  kind: ClassVar[str] = "future_event"

  source: str = ""
  where: str = ""
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


@dataclasses.dataclass(frozen=True)
class FutureValues(LabelledTask):
  """The values of `field`, of its `top` most frequent, that occur in [τ, τ + horizon_days): a binary label each."""

  kind: ClassVar[str] = "future_values"

  field: str = ""
  top: int = 50
  where: str = ""  # only events that fulfil the condition count
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


@dataclasses.dataclass(frozen=True)
class FutureAmount(LabelledTask):
  """The amount of a numeric field in [τ, τ + horizon_days): its sum, mean or maximum over events, or their number.

  `source` and `where` choose the events, as for `FutureEvent`. `of="count"` is the number of events, and "moments" that
  of different times with an event, such as orders of several products. The sum and the number of no event are 0; their
  mean and maximum are unknown.

  `loss` is the form of the training loss. `tweedie`: the deviance of a Tweedie distribution, for amounts with many
  zeros and a heavy tail. `poisson`: the deviance of a Poisson distribution, for counts. `zero_inflated`: a probability
  of 0 and a log-normal amount otherwise (arXiv 1912.07753). `log1p`: the squared error of sign(y)·log(1 + |y|), which
  also takes negative amounts, such as returns; its answers are typical amounts, lower than means.
  """

  kind: ClassVar[str] = "future_amount"

  field: str = ""  # numeric; not for "count" and "moments"
  of: Literal["sum", "mean", "max", "count", "moments"] = "sum"
  source: str = ""
  where: str = ""
  horizon_days: float = 28.0
  loss: Literal["tweedie", "poisson", "zero_inflated", "log1p"] = "tweedie"
  power: float = 1.5  # tweedie: the power of the mean that the variance is proportional to, in (1, 2)

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "amount"

  @property
  def horizon(self) -> float | None:
    """See `Task`."""
    return self.horizon_days


@dataclasses.dataclass(frozen=True)
class TimeToEvent(LabelledTask):
  """The days from τ to the user's next event of `source`, and whether it was observed: a time that may be censored.

  `source` and `where` choose the events, as for `FutureEvent`. The `edges` cut the days up to `horizon_days` into
  intervals, and the answer is a chance for each interval: that of the event there, if it did not happen earlier (a
  discrete-time hazard).

  A snapshot is followed up to the last edge that lies within the period of its split, such as the training period. An
  interval that the period does not wholly hold counts neither for an event nor for its absence, because only events
  could be seen there. A label without an event before the end of its follow-up is censored there: it says that all
  intervals until then were survived. A snapshot whose first interval is not wholly within the period has no label.
  """

  kind: ClassVar[str] = "time_to_event"

  source: str = ""
  where: str = ""
  horizon_days: float = 28.0  # later events count as none; the label is censored there
  intervals: int = 16  # number of intervals, evenly spaced in log(1 + days)
  edges_days: tuple[float, ...] = ()  # the intervals' ends instead, in days, ascending up to `horizon_days`

  @property
  def edges(self) -> tuple[float, ...]:
    """Returns the ends of the intervals in days after τ, ascending; the last is the horizon."""
    if self.edges_days:
      return self.edges_days
    whole = math.log1p(self.horizon_days)
    inner = (math.expm1(whole * k / self.intervals) for k in range(1, self.intervals))
    return (*(float(f"{edge:.6g}") for edge in inner), self.horizon_days)

  @property
  def answer(self) -> Answer:
    """See `Task`."""
    return "survival"

  @property
  def horizon(self) -> float | None:
    """See `Task`."""
    return self.horizon_days

  @property
  def label_ends(self) -> tuple[float, ...]:
    """See `Task`."""
    return self.edges


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


@dataclasses.dataclass(frozen=True)
class DatedLabel(LabelledTask, TextFormat):
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

  The settings of `TextFormat`, such as `delimiter`, say how a table of text is written.
  """

  kind: ClassVar[str] = "dated_label"
  asks_at_rows: ClassVar[bool] = True

  files: tuple[str, ...] = ()  # paths or globs
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic"] = "auto"
  user: str = "user_id"
  time: str = "timestamp"
  time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"  # as of a source
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
