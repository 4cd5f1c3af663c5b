"""Evaluates a task's condition on events (`where`) and its event type (`source`) on users' histories."""

from __future__ import annotations

from collections.abc import Callable

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
from supermoe_jax.data.encoding.vocabulary import Encoders, Vocabulary
from supermoe_jax.data.tasks.listing import SHOWN_VALUES
from supermoe_jax.errors import DataError, nearest

# A function that returns whether each event of a history fulfils a condition: bool `[N]`.
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
    parts.append(_bound(f"{key}.where", parse_condition(where, f"{key}.where"), encoders, data))
  if not parts:
    return None
  return lambda history: np.logical_and.reduce([part(history) for part in parts])


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


def _of_type(key: str, name: str, data: config.Data, encoders: Encoders) -> EventCondition:
  if name in data.sources:
    index = list(data.sources).index(name)
    return lambda history: history.source == index
  source, field, value = data.typed(name)
  index = list(data.sources).index(source)
  of_value = _categorical(key, Comparison(field, "==", (value,)), encoders)
  return lambda history: (history.source == index) & of_value(history)


def _bound(key: str, condition: Condition, encoders: Encoders, data: config.Data) -> EventCondition:
  if isinstance(condition, Comparison):
    if condition.field in encoders.numeric:
      return _numeric(condition, encoders, data)
    return _categorical(key, condition, encoders)
  if isinstance(condition, Negation):
    part = _bound(key, condition.part, encoders, data)
    return lambda history: ~part(history)
  parts = [_bound(key, p, encoders, data) for p in condition.parts]
  join = np.logical_and if isinstance(condition, AllOf) else np.logical_or
  return lambda history: join.reduce([p(history) for p in parts])


def _numeric(compared: Comparison, encoders: Encoders, data: config.Data) -> EventCondition:
  """Compares encoded numbers: every encoding keeps the order of numbers."""
  column = list(encoders.numeric).index(compared.field)
  encoder, encoding = encoders.numeric[compared.field], data.fields[compared.field].encoding
  constants = [encoder.encode(float(c), encoding) for c in compared.constants]

  def holds(history: UserHistory | UserBlock) -> np.ndarray:
    values = history.numeric[:, column]
    if compared.operator in OPERATORS:
      found = OPERATORS[compared.operator](values, constants[0])
    else:
      found = np.isin(values, constants, invert=compared.operator == "not in")
    return np.asarray(found & np.isfinite(values))

  return holds


def _categorical(key: str, compared: Comparison, encoders: Encoders) -> EventCondition:
  vocabulary = encoders.categorical[compared.field]
  assert isinstance(vocabulary, Vocabulary)  # config.resolve checked
  column = list(encoders.categorical).index(compared.field)
  codes = [value_code(key, compared.field, constant_text(c), vocabulary) for c in compared.constants]
  wanted = np.full(vocabulary.n_codes, compared.operator in ("!=", "not in"))
  wanted[codes] = not wanted[codes[0]]
  wanted[ABSENT] = False
  return lambda history: wanted[history.codes[:, column]]
