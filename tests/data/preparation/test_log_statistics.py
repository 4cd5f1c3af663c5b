"""Facts of parts of a log come to those of the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax.data.preparation.log_statistics import FieldStatistics

NUMBERS = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


def facts(numbers: list[float]) -> FieldStatistics:
  if not numbers:
    return FieldStatistics(absent=1)
  array = np.array(numbers)
  return FieldStatistics(
    1, len(numbers), len(numbers), 2, float(array.sum()), float(array.std()), min(numbers), max(numbers)
  )


@settings(deadline=None)
@given(st.lists(st.lists(NUMBERS, max_size=20), min_size=1, max_size=8))
def test_statistics_of_parts_are_those_of_the_whole(parts: list[list[float]]) -> None:
  merged, whole = FieldStatistics.merge([facts(p) for p in parts]), facts([x for p in parts for x in p])
  assert (merged.absent, merged.training, merged.present) == (len(parts), whole.training, whole.present)
  assert (merged.low, merged.high) == (whole.low, whole.high)
  if whole.training:
    scale = max(1.0, abs(whole.low), abs(whole.high))
    assert merged.mean == pytest.approx(whole.mean, abs=1e-12 * scale)
    assert merged.deviation == pytest.approx(whole.deviation, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(NUMBERS, st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_a_constant_does_not_deviate_however_it_is_divided(number: float, sizes: list[int]) -> None:
  assert FieldStatistics.merge([facts([number] * n) for n in sizes]).deviation == 0.0 or sum(n > 0 for n in sizes) < 2


def test_one_part_is_the_whole_to_the_last_bit() -> None:
  one = facts([0.1, 0.7, 1e-9, 123.456])
  assert FieldStatistics.merge([one]) == one
  assert FieldStatistics.merge([FieldStatistics(), one, FieldStatistics()]) == one


def test_numbers_beyond_all_measure_are_no_error() -> None:
  huge = facts([1e308])
  assert math.isinf(FieldStatistics.merge([huge, facts([1.7e308])]).sum)
