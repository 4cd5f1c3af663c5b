"""Turns events of a prepared dataset into readable text: time, event type, and the values of the fields."""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np

from supermoe_jax.batch import ABSENT, FIRST_VALUE
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.histories import UserHistory
from supermoe_jax.data.encoding.numeric import NumberEncoder, Numeric
from supermoe_jax.data.encoding.vocabulary import Hashing, Vocabulary
from supermoe_jax.report.figures.drawing import number

# Events hold numbers with 24 bits: a decoded number below this share of mean and deviation was 0 in the log.
_ROUNDED = 1e-6

_EPOCH = datetime.datetime(1970, 1, 1)


@dataclasses.dataclass(frozen=True)
class ReadableEvent:
  """One event as text: its `time`, its `source`, and `values`, pairs of a field and its value."""

  time: str
  source: str
  values: list[tuple[str, str]]


class EventReader:
  """A reader of a dataset's events.

  It leaves out vectors, and fields with hashed values, which have no names; see `unnamed`.
  """

  def __init__(self, dataset: Dataset):
    self._dataset = dataset
    schema = dataset.schema
    self._columns = [*schema.categorical, *schema.extra_columns]
    encoders = {n: dataset.encoders.categorical[schema.shares.get(n, n)] for n in schema.categorical}
    self._vocabularies = {n: e for n, e in encoders.items() if isinstance(e, Vocabulary)}
    self.unnamed = [n for n, e in encoders.items() if isinstance(e, Hashing)]

  def events(self, history: UserHistory, start: int, stop: int) -> list[ReadableEvent]:
    """Returns the events [start, stop) of a history, the newest first."""
    return [self._event(history, i) for i in range(stop - 1, start - 1, -1)]

  def _event(self, history: UserHistory, i: int) -> ReadableEvent:
    values: dict[str, list[str]] = {}
    for column, code in zip(self._columns, history.codes[i]):
      if column in self._vocabularies and code != ABSENT:
        values.setdefault(column, []).append(_value(self._vocabularies[column], int(code)))
    for column, scaled in zip(self._dataset.schema.numeric, history.numeric[i]):
      if np.isfinite(scaled):
        encoding = self._dataset.config.data.fields[column].encoding
        values[column] = [number_text(self._dataset.encoders.numeric[column], float(scaled), encoding)]
    source = self._dataset.schema.sources[int(history.source[i])]
    return ReadableEvent(moment_text(int(history.time[i])), source, [(n, ", ".join(v)) for n, v in values.items()])


def _value(encoder: Vocabulary, code: int) -> str:
  place = code - FIRST_VALUE
  return encoder.values[place] if 0 <= place < len(encoder.values) else "(out of vocabulary)"


def number_text(encoder: NumberEncoder, scaled: float, encoding: str) -> str:
  """Returns the log's number for its encoded value `scaled`; beyond a quantile encoder's knots "< knot" or "> knot"."""
  if isinstance(encoder, Numeric):
    value = scaled * encoder.std + encoder.mean
    if abs(value) < _ROUNDED * (encoder.std + abs(encoder.mean)):
      value = 0.0
    return number(float(np.sign(value) * np.expm1(abs(value))) if encoding == "log1p" else value)
  low, high = encoder.scores[0], encoder.scores[-1]
  sign = "< " if scaled < low else "> " if scaled > high else ""
  return sign + number(float(np.interp(scaled, encoder.scores, encoder.knots)))


def moment_text(time: int) -> str:
  """Returns a time in microseconds since 1970 UTC as date and minute; the date alone at midnight."""
  when = _EPOCH + datetime.timedelta(microseconds=time)
  return when.strftime("%Y-%m-%d" if when.time() == datetime.time() else "%Y-%m-%d %H:%M")
