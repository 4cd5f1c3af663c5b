"""Evaluates comparisons of whole moments, such as `sum(amount) >= 50`: a basket of at least 50.

The moment of an event holds all events of the same user, source and time. The result is the same for all of them.

Shapes: N events of a history or a block, M moments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from supermoe_jax.config.tasks.condition import OPERATORS, Comparison
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory
from supermoe_jax.data.encoding.numeric import NumberEncoder, Numeric

# Records hold numbers as float32. A sum that differs from its constant by no more than this rounding counts as equal:
# otherwise 20 + 30 >= 50 would be a matter of chance. `SINGLE` is the spacing of float32, twice its largest rounding.
SINGLE, DOUBLE = 2.0**-23, 2.0**-50


def moment_condition(
  compared: Comparison, numeric: Mapping[str, NumberEncoder], encodings: Mapping[str, str]
) -> ComparedMoments:
  """Returns whether the moments of events fulfil a comparison with a function.

  `numeric` holds the encoders of the numeric fields, in order, and `encodings` the `encoding` of each.
  """
  (constant,) = compared.constants
  assert not isinstance(constant, str)  # config.resolve checked
  if compared.function == "count":
    return ComparedMoments("count", compared.operator, constant)
  column, encoding = list(numeric).index(compared.field), encodings[compared.field]
  encoder = numeric[compared.field]
  if compared.function in ("max", "min"):  # every encoding keeps the order of numbers
    return ComparedMoments(compared.function, compared.operator, encoder.encode(constant, encoding), column)
  assert isinstance(encoder, Numeric)  # config.resolve checked
  return ComparedMoments(compared.function, compared.operator, constant, column, encoder, encoding)


@dataclasses.dataclass(frozen=True)
class ComparedMoments:
  """Whether the moments of events fulfil a comparison; events of a moment without a number fail it.

  Attributes:
    function: one of `MOMENT_FUNCTIONS`.
    operator: one of `OPERATORS`.
    constant: the constant; for `max` and `min` encoded.
    column: the field's column among the numbers; unused for `count`.
    encoder: the encoder that gives the raw numbers back, for `sum` and `mean`.
    encoding: the field's encoding.
  """

  function: str
  operator: str
  constant: float | np.float32
  column: int = 0
  encoder: Numeric | None = None
  encoding: str = ""

  def __call__(self, history: UserHistory | UserBlock) -> np.ndarray:
    """Returns bool `[N]`."""
    if not len(history.time):
      return np.zeros(0, bool)
    order, starts = _moments(history)
    lengths = np.diff(starts, append=len(order))
    out = np.empty(len(order), bool)
    out[order] = np.repeat(self._of_moments(history.numeric[order], starts, lengths), lengths)
    return out

  def _of_moments(self, numeric: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns whether each moment fulfils the comparison: bool `[M]`."""
    compare = OPERATORS[self.operator]
    if self.function == "count":
      return np.asarray(compare(lengths, self.constant))
    values = numeric[:, self.column]
    known = np.isfinite(values)
    number = np.add.reduceat(known.astype(np.int64), starts)
    if self.encoder is None:
      pick, neutral = (np.maximum, -np.inf) if self.function == "max" else (np.minimum, np.inf)
      return np.asarray(compare(pick.reduceat(np.where(known, values, neutral), starts), self.constant) & (number > 0))
    amounts, roundings = _amounts(np.where(known, values, 0), self.encoder, self.encoding)
    total, rounding = (np.add.reduceat(np.where(known, x, 0), starts) for x in (amounts, roundings))
    times = number if self.function == "mean" else 1
    difference = total - self.constant * times
    difference = np.where(np.abs(difference) <= rounding, 0, difference)
    return np.asarray(compare(difference, 0) & (number > 0))


def _amounts(values: np.ndarray, encoder: Numeric, encoding: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns raw numbers from encoded ones, and how far rounding may have moved them: float64 `[N]` both."""
  amounts = encoder.decode_all(values, encoding)
  rounding = SINGLE * encoder.std * np.abs(values.astype(np.float64))
  rounding += DOUBLE * (abs(encoder.mean) + encoder.std * np.abs(values))
  return amounts, rounding * (1 + np.abs(amounts)) if encoding == "log1p" else rounding


def _moments(history: UserHistory | UserBlock) -> tuple[np.ndarray, np.ndarray]:
  """Returns the order of the events by moment, int64 `[N]`, and where the moments begin in it, int64 `[M]`."""
  keys = [history.source, history.time]
  if isinstance(history, UserBlock):
    keys.append(history.owner)
  order = np.lexsort(keys)
  new = np.ones(len(order), bool)
  new[1:] = np.logical_or.reduce([np.diff(key[order]) != 0 for key in keys])
  return order, np.flatnonzero(new)
