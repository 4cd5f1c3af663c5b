"""The contract between the data and the model: what a batch holds, and the sizes that a model is built from.

`supermoe_jax.data` makes these arrays with NumPy, `supermoe_jax.models` and `supermoe_jax.training` read them with JAX;
neither needs to know the other. Code 0 means absent and code 1 out of vocabulary; the values of a field begin at 2.

Shapes: B rows, L events, S snapshots, F columns of codes, G numeric fields, A aggregates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

# A NumPy array on the host, a JAX array inside a step.
Array = Any

# The codes of no value, of a value out of vocabulary, and of the first value of a field.
ABSENT, UNKNOWN, FIRST_VALUE = 0, 1, 2

# Numbers that describe a moment in the calendar: sine and cosine of the phase of the day, the week and the year.
CALENDAR = 6


class Features(NamedTuple):
  """What the encoder sees.

  Attributes:
    codes: int32 `[B, L, F]`, columns as in `UserHistory`; 0 absent, padding, or a field that is no input.
    source: int32 `[B, L]`; 0 padding, otherwise 1 + the source's index.
    numeric: float32 `[B, L, G]`; NaN absent, padding, or a field that is no input.
    calendar: float32 `[B, L, 6]`, phases of day, week and year.
    time: float32 `[B, L]`, hours since the first event of its user in the row.
    gap: float32 `[B, L]`, hours since the user's previous event; 0 for the first.
    segment: int32 `[B, L]`, the user of each event: the users of a row lie one behind the other, numbered from 1; 0 is
      padding. Only a packed row holds more than one.
    query_events: int32 `[B, S]`, how many of its user's events in the row a snapshot sees.
    query_segment: int32 `[B, S]`, the user of each snapshot; 0 where there is none.
    query_time: float32 `[B, S]`, hours since its user's first event in the row.
    query_gap: float32 `[B, S]`, hours since the last event that the snapshot sees.
    query_calendar: float32 `[B, S, 6]`.
    query_aggregates: float32 `[B, S, A]`, standardised.
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

  @property
  def length(self) -> Array:
    """int `[B]`, events that are not padding."""
    return (self.segment > 0).sum(axis=-1)

  @property
  def query_valid(self) -> Array:
    """bool `[B, S]`, whether there is a snapshot."""
    return self.query_segment > 0


class Targets(NamedTuple):
  """A task's answers for a batch.

  Sites are the S snapshots; of a next-event task the L events before them; of an event label the L events, then the m
  events after snapshot 0, those after snapshot 1, and so on. The sites of a packed row are those of its users, one
  behind the other.

  Attributes:
    value: float32 `[B, sites]` of 0 and 1 or standardised numbers, float32 `[B, S, values]` of 0 and 1, or int32
      `[B, sites]` codes of a next event or indices of classes; 0 where nothing is known.
    known: bool `[B, sites]`, the supervision indicator δ: there is a label, and the site counts by the sample space.
    weight: float32 `[B, sites]`, the sample weight ω; 0 where not known.
    given: int32 `[B, sites, G]`, codes that an event label may see of the event asked about; G is 0 for other kinds.
  """

  value: Array
  known: Array
  weight: Array
  given: Array


class Slices(NamedTuple):
  """Two slices of one user of each row, for a contrast task.

  Attributes:
    features: shapes as in `Features`, with the dimensions `[B, 2, …]`, L the most events of a slice and one snapshot
      each, which sees the whole slice and nothing else: no aggregates.
    known: bool `[B]`, whether the user's training history is long enough for slices.
  """

  features: Features
  known: Array


class Batch(NamedTuple):
  """`features`, the `targets` of each active task with labels, and the `slices` of each active contrast task."""

  features: Features
  targets: dict[str, Targets]
  slices: dict[str, Slices]


@dataclasses.dataclass(frozen=True)
class Schema:
  """What a model must know of a dataset to be built.

  Attributes:
    sources: names of the event sources; an event's type.
    categorical: codes of each categorical field, 0 absent and 1 out of vocabulary included.
    numeric: names of the numeric fields.
    aggregates: A, the length of a snapshot's aggregates; 0 without.
    outputs: of each task with labels, the number of its outputs.
    inputs: the categorical fields that the model may see.
    numeric_inputs: the columns, among the numeric fields, of those that the model may see.
    extra_columns: the field of each further column of the codes, which follow those of `categorical`.
    shares: the field whose table a field has, where it is another's.
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

  def field(self, name: str) -> int:
    """The column of a categorical field in the codes."""
    return list(self.categorical).index(name)
