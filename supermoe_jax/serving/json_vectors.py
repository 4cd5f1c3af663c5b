"""Reads JSON values of fields of vectors, as preparation reads them in files: as float32 numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from supermoe_jax.serving.json_values import ColumnKind, ValueProblem, described, json_array
from supermoe_jax.serving.text_numbers import SPACES, number_of_text


def vector_reader(kind: ColumnKind, size: int, separator: str) -> Callable[[Any], bytes | None]:
  """Returns a function that reads a JSON value as the bytes of a vector of `size` numbers; None is absent.

  It takes a list of numbers or, if the files hold text, text: a JSON array, or numbers split at `separator`. An empty
  list is absent.
  """

  def read(value: Any) -> bytes | None:
    if value is None or value == "" or (isinstance(value, str) and value in kind.nulls):
      return None
    numbers = value
    if isinstance(value, str) and kind.name == "text" and not kind.list:
      array = json_array(value)
      numbers = [_number(part, kind) for part in value.split(separator)] if array is None else array
    if not isinstance(numbers, list | tuple):
      raise ValueProblem(f"{described(value)} is not a list of {size} numbers")
    if not numbers:
      return None
    if len(numbers) != size:
      raise ValueProblem(f"{described(value)} is a list of {len(numbers)}, not of {size} numbers")
    for number in numbers:
      if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(_float32(number)):
        raise ValueProblem(f"the list holds {described(number)}, which is not a finite number of float32")
    return np.array(numbers, np.float32).tobytes()

  return read


def _number(part: str, kind: ColumnKind) -> float | str:
  try:
    number = number_of_text(part.strip(SPACES), kind.decimal, kind.thousands)
  except ValueError:
    return part
  return part if number is None else number


def _float32(number: int | float) -> float:
  with np.errstate(over="ignore"):
    try:
      return float(np.float32(number))
    except OverflowError:  # an integer beyond float64
      return math.inf
