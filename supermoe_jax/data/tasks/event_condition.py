"""Evaluates a task's condition on events (`where`) and its event type (`source`) on users' histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import ABSENT, FIRST_VALUE
from supermoe_jax.config.tasks.condition import (
  OPERATORS,
  AllOf,
  Comparison,
  Condition,
  Constant,
  Negation,
  parse_condition,
)
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory
from supermoe_jax.data.encoding.moment_condition import moment_condition
from supermoe_jax.data.encoding.numeric import NumberEncoder
from supermoe_jax.data.encoding.vocabulary import Encoders, Vocabulary
from supermoe_jax.data.tasks.listing import SHOWN_VALUES
from supermoe_jax.errors import DataError, nearest

# A function that returns whether each event of a history fulfils a condition: bool `[N]`. It can be pickled, because
# the processes that write a dataset receive it.
EventCondition = Callable[[UserHistory | UserBlock], np.ndarray]


def event_condition(key: str, where: str, source: str, data: config.Data, encoders: Encoders) -> EventCondition | None:
  """Returns the condition that an event is of the type `source` and fulfils `where`; None if both are empty.

  `key` is the task's config key. `source` is the name of a source, or a value of the column `type` of a source.

  Raises:
    DataError: a constant, or the type, never occurs in the training period.
  """
  parts: list[EventCondition] = []
  if source:
    parts.append(_of_type(f"{key}.source", source, data, encoders))
  if where:
    encodings = {name: field.encoding for name, field in data.fields.items()}
    parts.append(bind_condition(f"{key}.where", where, encoders.categorical, encoders.numeric, encodings))
  return _All(tuple(parts)) if parts else None


def bind_condition(
  key: str,
  where: str,
  categorical: Mapping[str, object],
  numeric: Mapping[str, NumberEncoder],
  encodings: Mapping[str, str],
) -> EventCondition:
  """Returns the condition that an event fulfils `where`, the text of the config key `key`.

  Args:
    key: the config key that messages name.
    where: the condition.
    categorical: the encoders of the columns of codes, in order.
    numeric: the encoders of the numeric fields, in order.
    encodings: the `encoding` of each numeric field; see `config.Field`.

  Raises:
    DataError: a constant never occurs in the training period.
  """
  return _bound(key, parse_condition(where, key), categorical, numeric, encodings)


def value_code(key: str, field: str, value: str, vocabulary: Vocabulary) -> int:
  """Returns the code of a field's value that the config names.

  Raises:
    DataError: the value is not in the vocabulary; most likely it is misspelt.
  """
  code = vocabulary.code(value)
  if code >= FIRST_VALUE:
    return code
  hint = nearest(value, vocabulary.values).partition("; valid")[0]
  shown = ", ".join(repr(v) for v in vocabulary.values[:SHOWN_VALUES])
  more = ", …" if len(vocabulary.values) > SHOWN_VALUES else ""
  raise DataError(
    f"{key}: {value!r} never occurs in the vocabulary of field {field!r}, which is of the training period{hint} "
    f"(it holds {shown}{more})."
  )


def constant_text(constant: Constant) -> str:
  """Returns a constant as the text of a vocabulary's value: whole numbers have no decimal point."""
  if isinstance(constant, str):
    return constant
  return str(int(constant)) if constant.is_integer() else str(constant)


@dataclasses.dataclass(frozen=True)
class _OfSource:
  """Whether events are of the source with the index `source`."""

  source: int

  def __call__(self, history: UserHistory | UserBlock) -> np.ndarray:
    return history.source == self.source


@dataclasses.dataclass(frozen=True, eq=False)
class _OfCodes:
  """Whether events have, in a column of codes, a code that is `wanted [codes]`."""

  column: int
  wanted: np.ndarray

  def __call__(self, history: UserHistory | UserBlock) -> np.ndarray:
    return self.wanted[history.codes[:, self.column]]


@dataclasses.dataclass(frozen=True)
class _OfNumbers:
  """Whether an encoded number compares so with encoded constants: every encoding keeps the order of numbers."""

  column: int
  operator: str
  constants: tuple[np.float32, ...]

  def __call__(self, history: UserHistory | UserBlock) -> np.ndarray:
    values = history.numeric[:, self.column]
    if self.operator in OPERATORS:
      found = OPERATORS[self.operator](values, self.constants[0])
    else:
      found = np.isin(values, self.constants, invert=self.operator == "not in")
    return np.asarray(found & np.isfinite(values))


@dataclasses.dataclass(frozen=True)
class _None:
  """Whether events do not fulfil a condition."""

  part: EventCondition

  def __call__(self, history: UserHistory | UserBlock) -> np.ndarray:
    return ~self.part(history)


@dataclasses.dataclass(frozen=True)
class _All:
  """Whether events fulfil all of several conditions."""

  parts: tuple[EventCondition, ...]

  def __call__(self, history: UserHistory | UserBlock) -> np.ndarray:
    return np.logical_and.reduce([part(history) for part in self.parts])


@dataclasses.dataclass(frozen=True)
class _Any:
  """Whether events fulfil one of several conditions."""

  parts: tuple[EventCondition, ...]

  def __call__(self, history: UserHistory | UserBlock) -> np.ndarray:
    return np.logical_or.reduce([part(history) for part in self.parts])


def _of_type(key: str, name: str, data: config.Data, encoders: Encoders) -> EventCondition:
  if name in data.sources:
    return _OfSource(list(data.sources).index(name))
  source, field, value = data.typed(name)
  of_value = _of_values(key, Comparison(field, "==", (value,)), encoders.categorical)
  return _All((_OfSource(list(data.sources).index(source)), of_value))


def _bound(
  key: str,
  condition: Condition,
  categorical: Mapping[str, object],
  numeric: Mapping[str, NumberEncoder],
  encodings: Mapping[str, str],
) -> EventCondition:
  if isinstance(condition, Comparison):
    if condition.function:
      return moment_condition(condition, numeric, encodings)
    if condition.field not in numeric:
      return _of_values(key, condition, categorical)
    encoder, encoding = numeric[condition.field], encodings[condition.field]
    constants = tuple(encoder.encode(float(c), encoding) for c in condition.constants)
    return _OfNumbers(list(numeric).index(condition.field), condition.operator, constants)
  if isinstance(condition, Negation):
    return _None(_bound(key, condition.part, categorical, numeric, encodings))
  parts = tuple(_bound(key, p, categorical, numeric, encodings) for p in condition.parts)
  return _All(parts) if isinstance(condition, AllOf) else _Any(parts)


def _of_values(key: str, compared: Comparison, categorical: Mapping[str, object]) -> EventCondition:
  vocabulary = categorical[compared.field]
  assert isinstance(vocabulary, Vocabulary)  # config.resolve checked
  codes = [value_code(key, compared.field, constant_text(c), vocabulary) for c in compared.constants]
  wanted = np.full(vocabulary.n_codes, compared.operator in ("!=", "not in"))
  wanted[codes] = not wanted[codes[0]]
  wanted[ABSENT] = False
  return _OfCodes(list(categorical).index(compared.field), wanted)
