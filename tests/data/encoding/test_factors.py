"""Factors of the values that users have had: against plain references, through preparation, append and check."""

from __future__ import annotations

import collections
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE
from supermoe_jax.data.append import append
from supermoe_jax.data.check import check
from supermoe_jax.data.check.check import CheckError
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.aggregates import Aggregator, FactoredField
from supermoe_jax.data.encoding.factors import LEAST_WEIGHT, NUMBERS_WEIGHT, USUAL_PRIOR, Factors, fit_factors
from supermoe_jax.data.encoding.histories import UserHistory, end_to_end
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.preparation import prepare
from supermoe_jax.errors import DataError
from supermoe_jax.plan import shapes
from tests.fixtures.small_log import raw_config, write_log

DAY = config.MICROSECONDS_PER_DAY


def some_factors(rng: np.random.Generator, numbers: bool, codes: int = 7, size: int = 3) -> Factors:
  weight = rng.random(codes).astype(np.float32)
  weight[:FIRST_VALUE] = 0
  direction, above = rng.normal(size=(2, codes, size)).astype(np.float32)
  usual = rng.normal(size=codes).astype(np.float32)
  return Factors(weight, direction, usual, above) if numbers else Factors(weight, direction)


def plain_factors(of: Factors, codes: np.ndarray, number: np.ndarray | None = None) -> np.ndarray:
  """The factors of a user with these codes and numbers, event by event."""
  row, beyond = np.zeros((2, len(of.weight)))
  times: collections.Counter[int] = collections.Counter()
  for i, values in enumerate(codes):
    for code in values.tolist() if codes.ndim > 1 else [int(values)]:
      times[code] += 1
      if code < len(row):
        row[code] = of.weight[code] * math.log(1 + times[code])
        if number is not None and not np.isnan(number[i]) and times[code] == 1:
          beyond[code] = of.weight[code] * math.log(2) * (number[i] - of.usual[code])
  found = row @ of.direction / (np.sqrt((row**2).sum()) or 1.0)
  return found if number is None else found + beyond @ of.above / np.sqrt(1 + (beyond**2).sum())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 99_999), st.lists(st.integers(1, 25), min_size=1, max_size=4), st.integers(1, 3), st.booleans())
def test_factors_of_snapshots_equal_a_plain_reference(seed: int, lengths: list[int], many: int, numbers: bool) -> None:
  rng = np.random.default_rng(seed)
  of = some_factors(rng, numbers)
  histories = [
    UserHistory(
      f"u{i}",
      np.arange(n, dtype=np.int64) * DAY,
      np.zeros(n, np.int32),
      rng.integers(0, 9, (n, many)).astype(np.int32),  # 7 and 8 were added after fitting
      np.where(rng.random((n, 1)) < 0.2, np.nan, rng.normal(size=(n, 1))).astype(np.float32),
      n,
    )
    for i, n in enumerate(lengths)
  ]
  aggregator = Aggregator(
    (), ("till",), {}, {}, factors={"shop": FactoredField(tuple(range(many)), of, 0 if numbers else None)}
  )
  place = [aggregator.names.index(f"factor shop {i}") for i in (1, 2, 3)]
  user = np.repeat(np.arange(len(lengths)), 2)
  n_events = np.array([int(rng.integers(1, lengths[u] + 1)) for u in user])
  rows = aggregator(end_to_end(histories), user, n_events * DAY, n_events)
  for row, u, n in zip(rows, user, n_events):
    seen = histories[u].numeric[:n, 0] if numbers else None
    np.testing.assert_allclose(row[place], plain_factors(of, histories[u].codes[:n], seen), atol=1e-5)


def test_fitted_directions_are_singular_vectors_of_the_weighted_matrix() -> None:
  rng = np.random.default_rng(0)
  counts = rng.poisson(1.0, (30, 8))
  counts[:, 0] += 1  # a value that every user has
  user, value = np.nonzero(counts)
  of = fit_factors(user * 10, value + FIRST_VALUE, counts[user, value], 8 + FIRST_VALUE + 5, 8)
  weight = np.maximum(np.log(30 / (1 + (counts > 0).sum(0))), LEAST_WEIGHT)
  np.testing.assert_allclose(of.weight, [0, 0, *weight, 0, 0, 0, 0, 0], rtol=1e-6)
  assert of.weight[FIRST_VALUE] == np.float32(LEAST_WEIGHT)
  matrix = np.log1p(counts) * weight
  matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
  wanted = np.linalg.svd(matrix, full_matrices=False)[2]
  got = of.direction[FIRST_VALUE : FIRST_VALUE + 8].T
  np.testing.assert_allclose(np.abs(np.sum(got * wanted, axis=1)), 1.0, atol=1e-4)
  assert not of.direction[:FIRST_VALUE].any() and not of.direction[FIRST_VALUE + 8 :].any()


def test_numbers_are_a_second_half_of_the_matrix_and_usual_ones_say_nothing() -> None:
  rng = np.random.default_rng(1)
  user, value = np.nonzero(rng.random((40, 6)) < 0.6)
  code, one = value + FIRST_VALUE, np.ones(len(user), np.int64)
  number = rng.normal(size=len(user)) + value
  known = np.where(rng.random(len(user)) < 0.9, 1, 0)
  of = fit_factors(user, code, one, 6 + FIRST_VALUE, 12, np.where(known, number, np.nan))
  plain = fit_factors(user, code, one, 6 + FIRST_VALUE, 12)
  np.testing.assert_array_equal(of.weight, plain.weight)
  usual = [(number * known)[value == v].sum() / (known[value == v].sum() + USUAL_PRIOR) for v in range(6)]
  np.testing.assert_allclose(of.usual[FIRST_VALUE:], usual, atol=1e-6)
  matrix = np.zeros((2, 40, 6))
  matrix[0, user, value] = math.log(2) * of.weight[code]
  matrix[1, user, value] = matrix[0, user, value] * (number - np.array(usual)[value]) * known
  matrix[0] /= np.maximum(np.linalg.norm(matrix[0], axis=1, keepdims=True), 1e-9)
  matrix[1] *= NUMBERS_WEIGHT / np.sqrt(1 + np.sum(matrix[1] ** 2, axis=1, keepdims=True))
  wanted = np.linalg.svd(np.concatenate(list(matrix), axis=1), full_matrices=False)[2]
  got = np.concatenate([of.direction[FIRST_VALUE:], of.above[FIRST_VALUE:] / NUMBERS_WEIGHT]).T
  np.testing.assert_allclose(np.abs(np.sum(got * wanted[: len(got)], axis=1)), 1.0, atol=1e-4)
  assert of.size == 12 and of.sha256 != Factors(of.weight, of.direction).sha256
  held = np.arange(FIRST_VALUE, FIRST_VALUE + 3)
  np.testing.assert_allclose(plain_factors(of, held, of.usual[held]), plain_factors(of, held), atol=1e-6)


def test_the_usual_number_is_the_mean_of_users_first_numbers_and_absent_ones_say_nothing(
  tmp_path: pathlib.Path,
) -> None:
  """Fitted from files: `b` is first met without a number, and `c` first with 9."""
  rows = [("a", 1, 4.0), ("a", 2, 8.0), ("b", 3, None), ("b", 4, 8.0), ("c", 5, 9.0), ("c", 6, 1.0)]
  lines = [f"{u},2024-01-0{day},{v},{'' if x is None else x}" for u in (1, 2) for v, day, x in rows]
  (tmp_path / "log.csv").write_text(
    "\n".join(["user_id,time,item,rating", *lines, "1,2024-02-01,a,5", "2,2024-02-01,a,5"])
  )
  data = {
    "path": str(tmp_path / "dataset"),
    "sources": {"log": {"files": str(tmp_path / "log.csv"), "time": "time"}},
    "fields": {"item": {}, "rating": {"kind": "numeric"}},
    "split": {"train_end": "2024-01-20", "validation": ("2024-01-20",), "test": ("2024-01-25",), "every_days": 3.0},
    "aggregates": {"factors": ("item",), "factor_size": 2, "factor_numbers": {"item": "rating"}},
  }
  cfg = config.resolve({"data": data, "tasks": {"next": {"kind": "next_event", "field": "item"}}})
  prepare.prepare(cfg)
  dataset = Dataset(tmp_path / "dataset")
  of, rating = dataset.encoders.factors["item"], dataset.encoders.numeric["rating"]
  shrunk = {v: 2 * float(rating.encode(x)) / (2 + USUAL_PRIOR) for v, x in (("a", 4.0), ("c", 9.0))} | {"b": 0.0}
  for value, wanted in shrunk.items():
    assert of.usual[dataset.encoders.categorical["item"].code(value)] == pytest.approx(wanted, abs=1e-5)
  check.check_dataset(dataset.path)


def test_users_of_one_kind_are_near_without_a_common_value() -> None:
  # Ann and Bob share no value, but both share values with the others of their kind.
  kinds = {"ann": "ab", "k1": "abcd", "k2": "abcd", "bob": "cd", "eve": "wx", "l1": "wxyz", "l2": "wxyz"}
  pairs = [(i, ord(v) - 95) for i, values in enumerate(kinds.values()) for v in values]
  user, code = map(np.array, zip(*pairs))
  of = fit_factors(user, code, np.ones(len(user), np.int64), 40, 2)
  held = [np.array([ord(v) - 95 for v in values]) for values in kinds.values()]
  ann, bob, eve = (plain_factors(of, held[i]) for i in (0, 3, 4))
  assert ann @ bob > 0.2 > 0.01 > abs(ann @ eve)


def test_there_are_no_more_factors_than_users_or_values() -> None:
  user, code = np.array([0, 0, 1]), np.array([2, 3, 2])
  assert fit_factors(user, code, np.ones(3, np.int64), 9, 64).size == 2
  assert fit_factors(user[:1], code[:1], np.ones(1, np.int64), 9, 64).size == 1


CHOSEN = {
  "factors": ["page", "device", "tags"],
  "factor_size": 2,
  "factor_numbers": {"page": "seconds", "tags": "seconds"},
}


def write_tagged_log(folder: pathlib.Path) -> dict:
  write_log(folder)
  raw = raw_config(folder)
  raw["data"]["fields"]["tags"] = {"column": "page", "sources": ["visits"], "many": 2}
  raw["data"]["aggregates"] |= CHOSEN
  return raw


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict:
  raw = write_tagged_log(tmp_path_factory.mktemp("factors"))
  prepare.prepare(config.resolve(raw))
  return raw


def test_a_dataset_has_factors_that_come_back_from_its_files_and_that_check_derives_again(raw: dict) -> None:
  dataset = Dataset(raw["data"]["path"])
  assert dataset.aggregator is not None
  names = [n for n in dataset.aggregator.names if n.startswith("factor ")]
  assert dataset.aggregator.names[dataset.aggregator.factor_columns] == names
  assert names == [f"factor {field} {i}" for field in CHOSEN["factors"] for i in (1, 2)]
  again = Encoders.load(dataset.path / "encoders")
  for name, of in dataset.encoders.factors.items():
    np.testing.assert_array_equal(again.factors[name].direction, of.direction)
    assert again.factors[name].sha256 == of.sha256
    assert (of.usual is not None) == (name in CHOSEN["factor_numbers"])
    assert of.usual is None or (np.abs(of.usual[FIRST_VALUE:]).max() > 0.01 and np.abs(of.above).max() > 0.01)
  assert shapes.largest_schema(dataset.config).aggregates == dataset.schema.aggregates
  assert (dataset.aggregate_scale < 1e30)[[dataset.aggregator.names.index(n) for n in names]].all()
  check.check_dataset(dataset.path)


@pytest.mark.parametrize("field", CHOSEN["factors"])
def test_check_finds_a_wrong_factor(raw: dict, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
  right = Aggregator.__call__

  def wrong(self: Aggregator, *args: np.ndarray) -> np.ndarray:
    rows = right(self, *args)
    rows[-1, self.names.index(f"factor {field} 2")] += 0.001
    return rows

  monkeypatch.setattr(Aggregator, "__call__", wrong)
  with pytest.raises(CheckError, match=f"aggregate 'factor {field} 2': .* holds .*, the raw files give"):
    check.check_dataset(raw["data"]["path"])


def test_factors_are_fitted_on_training_only(tmp_path: pathlib.Path) -> None:
  raw = write_tagged_log(tmp_path)
  raw["data"]["split"] |= {"log_end": "2024-05-20", "test": []}  # the same training, without its last weeks
  prepare.prepare(config.resolve(raw))
  whole = write_tagged_log(tmp_path)
  whole["data"]["path"] = str(tmp_path / "whole")
  prepare.prepare(config.resolve(whole))
  one, two = (Dataset(r["data"]["path"]).encoders.factors for r in (raw, whole))
  assert {n: f.sha256 for n, f in one.items()} == {n: f.sha256 for n, f in two.items()}


def test_an_append_keeps_the_factors(tmp_path: pathlib.Path) -> None:
  raw = write_tagged_log(tmp_path)
  prepare.prepare(config.resolve(raw))
  before = Dataset(raw["data"]["path"]).encoders.factors
  more = tmp_path / "more.csv"
  more.write_text("user,time,page,device,seconds\n" + "".join(f"1,2024-06-2{i},page99,web,1\n" for i in range(9)))
  append.append(pathlib.Path(raw["data"]["path"]), {"visits": [str(more)]})
  dataset = Dataset(raw["data"]["path"])
  assert {n: f.sha256 for n, f in dataset.encoders.factors.items()} == {n: f.sha256 for n, f in before.items()}
  check.check_dataset(dataset.path)


def test_values_that_no_sampled_user_has_are_an_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  raw = write_tagged_log(tmp_path)
  monkeypatch.setattr("supermoe_jax.data.preparation.fitting.FACTORED_USERS", 0)
  with pytest.raises(DataError, match=r"none of the 0 users .* field 'page' in training; leave the field out"):
    prepare.prepare(config.resolve(raw))


def test_the_numbers_do_not_depend_on_the_last_digits_of_a_product() -> None:
  rng = np.random.default_rng(3)
  counts = rng.poisson(0.4, (300, 60))
  user, value = np.nonzero(counts)
  of = fit_factors(user, value + FIRST_VALUE, counts[user, value], 62, 20)
  turned = rng.permutation(len(user))  # the same matrix, whose sums take another order
  again = fit_factors(user[turned], value[turned] + FIRST_VALUE, counts[user, value][turned], 62, 20)
  assert of.sha256 == again.sha256
  assert np.array_equal(np.round(of.direction, 6), of.direction.astype(np.float64).round(6).astype(np.float32))


def test_directions_without_weight_are_left_out() -> None:
  # Two values that all users have alike: one direction, however many are asked for.
  user, code = np.repeat(np.arange(9), 2), np.tile([2, 3], 9)
  assert fit_factors(user, code, np.ones(18, np.int64), 5, 64).size == 1
