"""A number far beyond all others is found with its row: an error, a clipped number, or a warning."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.data.append import append
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.numeric import MOST_DEVIATIONS, Numeric
from supermoe_jax.data.preparation import outlying_numbers, prepare
from supermoe_jax.errors import DataError

Write = Callable[..., pathlib.Path]
ROWS = 300


def columns(**changed: float) -> dict[str, list[Any]]:
  """Rides of thirty riders over a hundred days; `at_N=x` makes the fare of row N (from 1) x."""
  fares = [5.0 + i % 11 for i in range(ROWS)]
  for name, fare in changed.items():
    fares[int(name.removeprefix("at_")) - 1] = fare
  days = [f"2024-{1 + i // 90:02}-{1 + i // 3 % 28:02}T{i % 24:02}:00:00" for i in range(ROWS)]
  return {"rider": [f"r{i % 30}" for i in range(ROWS)], "started": days, "zone": ["a", "b"] * 150, "fare": fares}


def raw(*files: pathlib.Path, encoding: str = "standardise", **data: Any) -> dict[str, Any]:
  return {
    "data": {
      "path": str(files[0].parent / "dataset"),
      "sources": {"rides": {"files": [str(f) for f in files], "user": "rider", "time": "started"}},
      "fields": {"zone": {}, "paid": {"column": "fare", "kind": "numeric", "encoding": encoding}},
      "split": {"train_end": "2024-02-20", "validation": ["2024-02-20"], "test": ["2024-03-10"]},
      **data,
    },
    "tasks": {"next": {"kind": "next_event", "field": "zone"}},
  }


def prepared(*files: pathlib.Path, **settings: Any) -> Dataset:
  cfg = config.resolve(raw(*files, **settings))
  prepare.prepare(cfg)
  return Dataset(cfg.data.path)


def numbers(dataset: Dataset) -> np.ndarray:
  return np.concatenate([dataset.history(dataset[i]).numeric[:, 0] for i in range(len(dataset))])


@pytest.mark.parametrize("row", [10, ROWS])
def test_a_number_beyond_float32_is_an_error_with_its_row(write: Write, name: str, row: int) -> None:
  file = write(name, columns(**{f"at_{row}": -1e200}))
  with pytest.raises(DataError, match=rf"row {row}: column 'fare' holds -1e\+?200, beyond .* 3\.4e\+38") as caught:
    prepared(file)
  assert str(file) in str(caught.value) and "config.data.on_bad_rows='drop'" in str(caught.value)
  assert "config.data.fields.paid.encoding='log1p' or 'quantile' takes it" in str(caught.value)
  dropped = prepared(file, on_bad_rows="drop")
  assert dropped.manifest["reading"]["dropped"] == {"unparsable_field_paid": 1}
  check.check_dataset(dropped.path, sample=30)


@pytest.mark.parametrize("encoding", ["log1p", "quantile"])
def test_the_encodings_that_the_error_names_take_it(write: Write, encoding: str) -> None:
  found = prepared(write("rides.csv", columns(at_10=1e200)), encoding=encoding)
  assert found.manifest["events"] == ROWS and np.isfinite(numbers(found)).all()


def test_a_number_after_training_is_clipped_and_said(write: Write) -> None:
  file = write("rides.csv", columns(at_299=1e25, at_300=-1e9))
  found = prepared(file)
  values = numbers(found)
  assert sorted(values[np.abs(values) > 10]) == [-MOST_DEVIATIONS, MOST_DEVIATIONS]
  said = "field paid: 2 numbers lie more than 1,000 deviations from the mean of training and were clipped to there"
  assert f"{said}, first: 1e+25 ({file} row 299)" in found.manifest["warnings"]


def test_an_append_counts_clipped_numbers_in_addition(write: Write) -> None:
  found = prepared(write("rides.csv", columns(at_300=1e25)))
  more = {name: values[-5:] for name, values in columns(at_297=-1e30).items()}
  file = write("more.parquet", more)
  manifest = append.append(found.path, {"rides": [str(file)]})
  assert manifest["clipped_numbers"]["paid"]["count"] == 2
  assert "field paid: 2 numbers lie more than 1,000" in " ".join(manifest["warnings"])
  assert np.abs(numbers(Dataset(found.path))).max() == MOST_DEVIATIONS


@pytest.mark.parametrize("encoding", ["standardise", "log1p"])
def test_one_number_of_training_that_hides_the_others_is_said(write: Write, encoding: str) -> None:
  file = write("rides.csv", columns(at_20=1e25))
  hidden = [w for w in prepared(file, encoding=encoding).manifest["warnings"] if "the others look alike" in w]
  if encoding == "standardise":
    assert hidden[0].startswith(f"field paid: one number, 1e+25 ({file} row 20), makes up nearly all of the deviation")
  else:
    assert not hidden


def test_a_rare_number_among_equal_ones_hides_nothing(write: Write) -> None:
  rare = columns()
  rare["fare"] = [float(i == 20) for i in range(ROWS)]
  assert prepared(write("rides.csv", rare)).manifest["hiding_numbers"] == {}


def test_a_regression_of_users_names_a_number_that_is_too_large(write: Write) -> None:
  ages = [20.0 + i for i in range(30)]
  people = {"who": [f"r{i}" for i in range(30)], "years": ages}
  task = {"years": {"kind": "user_label", "column": "years", "type": "regression"}}
  rides = write("rides.csv", columns())

  def settings(years: list[float]) -> config.Config:
    file = write("people.csv", people | {"years": years})
    found = raw(rides, users={"files": [str(file)], "user": "who"})
    return config.resolve(found | {"tasks": task})

  with pytest.raises(DataError, match=r"people\.csv: row 4: column 'years' holds '1e\+200', which is beyond 3\.4e\+38"):
    prepare.prepare(settings([*ages[:3], 1e200, *ages[4:]]))
  manifest = prepare.prepare(settings(ages))
  assert manifest["user_table"]["user_labels"]["years"]["clipped"] == 0


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.floats(allow_nan=False, allow_infinity=False))
def test_a_standardised_number_is_finite_and_bounded_whatever_it_was(mean: float, std: float, value: float) -> None:
  encoder = Numeric.of(mean, std)
  found = float(encoder.encode(value))
  assert abs(found) <= MOST_DEVIATIONS
  inside = abs((value - encoder.mean) / encoder.std) <= MOST_DEVIATIONS
  assert bool(encoder.clips(np.array([value]))[0]) == (not inside)
  if inside:
    assert found == np.float32((value - encoder.mean) / encoder.std)


def test_counts_of_parts_add_up_and_the_first_row_stays() -> None:
  one = {"a": {"count": 2, "value": 9.0, "file": "x", "row": 1}}
  two = {
    "a": {"count": 3, "value": 8.0, "file": "y", "row": 7},
    "b": {"count": 1, "value": math.pi, "file": "y", "row": 2},
  }
  merged = outlying_numbers.merge_clipped(one, two)
  assert merged == {"a": {"count": 5, "value": 9.0, "file": "x", "row": 1}, "b": two["b"]}
