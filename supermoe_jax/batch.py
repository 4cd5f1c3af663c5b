"""Defines the contract between the data and the model: the arrays of a batch, and the sizes that a model is built from.

`supermoe_jax.data` makes these arrays with NumPy; `supermoe_jax.models` and `supermoe_jax.training` read them with JAX.
Neither side needs to know the other. Code 0 means absent and code 1 out of vocabulary; a field's values begin at 2.

Shapes: B rows, L events, S snapshots, F columns of codes, G numeric fields, A aggregates, V numbers of all vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

# A NumPy array on the host, or a JAX array inside a step.
Array = Any

# The codes of no value, of a value out of vocabulary, and of the first value of a field.
ABSENT, UNKNOWN, FIRST_VALUE = 0, 1, 2

# Numbers that describe a moment in the calendar: sine and cosine of the phase of the day, the week and the year.
CALENDAR = 6


class Features(NamedTuple):
  """The inputs of the encoder.

  Attributes:
    codes: int32 `[B, L, F]`, columns as in `UserHistory`; 0 absent, padding, or a field that is no input.
    source: int32 `[B, L]`; 0 padding, otherwise 1 + the source's index.
    numeric: float32 `[B, L, G]`; NaN absent, padding, or a field that is no input.
    calendar: float32 `[B, L, 6]`, phases of day, week and year.
    time: float32 `[B, L]`, hours since the first event of its user in the row.
    gap: float32 `[B, L]`, hours since the user's previous event; 0 for the first.
    segment: int32 `[B, L]`, the user of each event: the users of a row follow one another, numbered from 1; 0 is
      padding. Only a packed row holds several users.
    query_events: int32 `[B, S]`, the number of its user's events in the row that a snapshot sees.
    query_segment: int32 `[B, S]`, the user of each snapshot; 0 where there is no snapshot.
    query_time: float32 `[B, S]`, hours since its user's first event in the row.
    query_gap: float32 `[B, S]`, hours since the last event that the snapshot sees.
    query_calendar: float32 `[B, S, 6]`, the snapshot's phases of day, week and year.
    query_aggregates: float32 `[B, S, A]`, the snapshot's standardised aggregates.
    vectors: float16 `[B, L, V]`, the scaled vectors of each vector field, one field after the other; NaN absent or
      padding.
  """

  codes: Array
  source: Array
  numeric: Array
  calendar: Array
  time: Array
  gap: Array
  segment: Array
  query_events: Array
  query_segment: Array
  query_time: Array
  query_gap: Array
  query_calendar: Array
  query_aggregates: Array
  vectors: Array

  @property
  def length(self) -> Array:
    """Returns the number of events that are not padding, int `[B]`."""
    return (self.segment > 0).sum(axis=-1)

  @property
  def query_valid(self) -> Array:
    """Returns whether there is a snapshot, bool `[B, S]`."""
    return self.query_segment > 0


class Targets(NamedTuple):
  """A task's labels for a batch.

  Sites are the places that a task asks about. Most tasks have the S snapshots. A next-event task has the L events, then
  the S snapshots. An event label has the L events, then the m events after snapshot 0, the m events after snapshot 1,
  and so on. A packed row holds its users' sites one after another.

  Attributes:
    value: float32 `[B, sites]` of 0 and 1 or standardised numbers, float32 `[B, S, values]` of 0 and 1, or int32
      `[B, sites]` codes of a next event or indices of classes; 0 where no label is known.
    known: bool `[B, sites]`, the supervision indicator δ: there is a label, and the sample space counts the site.
    weight: float32 `[B, sites]`, the sample weight ω; 0 where no label is known.
    given: int32 `[B, sites, G]`, codes that an event label may see of the event asked about; G is 0 for other kinds.
    also: int32 `[B, sites, A]`, codes that are as right as `value`, 0 for none: the other values of the moment that a
      next event lies in. A is 0 for other kinds, and where the order of simultaneous events counts.
  """

  value: Array
  known: Array
  weight: Array
  given: Array
  also: Array


class Slices(NamedTuple):
  """Two slices of the history of one user per row, for a contrast task.

  Attributes:
    features: shapes as in `Features`, with leading dimensions `[B, 2]`; L is the most events of a slice. Each slice has
      one snapshot, which sees the whole slice and nothing else: no aggregates.
    known: bool `[B]`, whether the user's training history is long enough for slices.
  """

  features: Features
  known: Array


class Batch(NamedTuple):
  """A batch: `features`, `targets` of each active task with labels, and `slices` of each active contrast task."""

  features: Features
  targets: dict[str, Targets]
  slices: dict[str, Slices]


class ValueCounts(NamedTuple):
  """The place of a user's own counts of a field's most frequent values among the aggregates.

  Column `first + w·values + v` counts the value of code v + 2 in window w; the last window is the whole history.
  """

  first: int
  windows: int
  values: int

  @property
  def columns(self) -> slice:
    """Returns the columns of the aggregates, `windows · values` of them."""
    return slice(self.first, self.first + self.windows * self.values)


@dataclasses.dataclass(frozen=True)
class Schema:
  """The sizes and names of a dataset that a model is built from.

  Attributes:
    sources: the names of the event sources; an event's source is its type.
    categorical: the number of codes of each categorical field, including 0 (absent) and 1 (out of vocabulary).
    numeric: the names of the numeric fields.
    aggregates: A, the length of a snapshot's aggregates; 0 without aggregates.
    outputs: the number of outputs of each task with labels.
    inputs: the categorical fields that the model may see.
    numeric_inputs: the columns of the numeric fields that the model may see.
    extra_columns: the field of each further column of the codes, after the columns of `categorical`.
    shares: for each field that uses another field's table, the name of that other field.
    vectors: the number of numbers of each vector field. These fields have a column in the codes too.
    value_counts: the fields whose values the aggregates count, in the order of their columns.
    factors: the first column of the factors among the aggregates, and the one after their last.
  """

  sources: tuple[str, ...]
  categorical: Mapping[str, int]
  numeric: tuple[str, ...]
  aggregates: int
  outputs: Mapping[str, int]
  inputs: tuple[str, ...]
  numeric_inputs: tuple[int, ...]
  extra_columns: tuple[str, ...] = ()
  shares: Mapping[str, str] = dataclasses.field(default_factory=dict)
  vectors: Mapping[str, int] = dataclasses.field(default_factory=dict)
  value_counts: Mapping[str, ValueCounts] = dataclasses.field(default_factory=dict)
  factors: tuple[int, int] = (0, 0)

  @property
  def plain_aggregates(self) -> tuple[int, ...]:
    """Returns the columns of the aggregates that are neither counts of values nor factors."""
    places = (range(*self.factors), *(range(*of.columns.indices(self.aggregates)) for of in self.value_counts.values()))
    others = {column for place in places for column in place}
    return tuple(i for i in range(self.aggregates) if i not in others)

  def field(self, name: str) -> int:
    """Returns the column of a categorical field in the codes."""
    return list(self.categorical).index(name)
