"""Numbers as standard-normal quantiles of their ranks."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.data.encoding.numeric import MAX_KNOTS, Numeric, Quantile
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.preparation import fitting
from supermoe_jax.data.tasks.event_label import EventLabelKind
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import histories

TRAIN_END = config.parse_time("2021-01-01", "") // 1_000_000
FIELDS = {"item": {}, "price": {"kind": "numeric", "encoding": "quantile"}}


def score(rank):
  return statistics.NormalDist().inv_cdf(rank)


@pytest.fixture
def fitted(write, make_data, open_log):
  """Writes prices up to the end of the training period, and from then on; returns encoder and encoded prices."""

  def run(prices, late=(), **changes):
    n, values = len(prices), [*prices, *late]
    time = [TRAIN_END - n + i for i in range(n)] + [TRAIN_END + i for i in range(len(late))]
    columns = {"user": ["a"] * len(values), "time": time, "item": ["x"] * len(values), "price": values}
    data = make_data(write("e.parquet", columns), fields=FIELDS, **changes)
    with open_log(data) as log:
      encoders = fitting.fit_encoders(log, data)
      (history,) = histories(log, encoders)
    return encoders.numeric["price"], history.numeric[:, 0]

  return run


def test_a_number_has_the_quantile_of_its_middle_rank(fitted):
  encoder, encoded = fitted([5.0, 1.0, 1.0, 7.0])
  assert encoder.knots == (1.0, 5.0, 7.0)
  np.testing.assert_allclose(encoded, [score(5 / 8), score(2 / 8), score(2 / 8), score(7 / 8)], rtol=1e-6)


@pytest.mark.parametrize("draw", ["lognormal", "standard_cauchy", "normal", "standard_exponential"])
def test_encoded_numbers_of_any_distribution_are_about_standard_normal(draw, fitted):
  numbers = getattr(np.random.default_rng(0), draw)(size=20_000)
  encoder, encoded = fitted(numbers.tolist())
  assert len(encoder.knots) == len(encoder.scores) == MAX_KNOTS
  shares = np.array([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])
  np.testing.assert_allclose(np.quantile(encoded, shares), [score(s) for s in shares], atol=0.05)
  assert (np.argsort(encoded, kind="stable") == np.argsort(numbers, kind="stable")).mean() > 0.99


def test_a_constant_becomes_zero(fitted):
  encoder, encoded = fitted([3.0, 3.0, None])
  assert encoder == Quantile((3.0,), (0.0,))
  assert encoded[:2].tolist() == [0.0, 0.0]


def test_absent_numbers_and_nan_stay_absent(fitted):
  _, encoded = fitted([1.0, None, float("nan"), 2.0])
  assert np.isnan(encoded).tolist() == [False, True, True, False]


def test_infinity_is_an_error_that_may_be_dropped(fitted):
  with pytest.raises(DataError, match="'price' holds 'inf', which is not a number"):
    fitted([1.0, float("inf")])
  encoder, encoded = fitted([1.0, float("inf"), 2.0], on_bad_rows="drop")
  assert encoder.knots == (1.0, 2.0) and len(encoded) == 2


def test_a_field_without_a_number_in_training_is_an_error(fitted):
  with pytest.raises(DataError, match=r"'price' .* has no value at all in the training period, and 1 after it"):
    fitted([None], late=[1.0])


def test_numbers_after_training_do_not_change_the_encoder(fitted):
  assert fitted([1.0, 2.0, 4.0])[0] == fitted([1.0, 2.0, 4.0], late=[100.0, -5.0])[0]


def test_numbers_beyond_those_of_training_keep_their_order(fitted):
  _, encoded = fitted([1.0, 2.0, 4.0], late=[-1e9, 0.0, 0.99, 4.01, 9.0, 1e9])
  expected = [-1e9, 0.0, 0.99, 1.0, 2.0, 4.0, 4.01, 9.0, 1e9]
  late = np.concatenate([encoded[3:6], encoded[:3], encoded[6:]])
  assert (np.diff(late) > 0).all(), list(zip(expected, late))
  assert np.abs(late).max() < 4


def test_a_file_may_hold_the_numbers_as_text(write, make_data, read):
  data = make_data(
    write("e.csv", {"user": ["a"] * 3, "time": [1, 2, 3], "item": ["x"] * 3, "price": ["10", "2", "1"]}),
    fields=FIELDS,
    source={"time_unit": "s"},
  )
  ((history,), _) = read(data)
  np.testing.assert_allclose(history.numeric[:, 0], [score(5 / 6), score(3 / 6), score(1 / 6)], rtol=1e-6)


def test_encoders_are_the_same_after_saving(tmp_path):
  encoders = Encoders({}, {"price": Quantile((1.0, 2.5), (-0.1, 0.3)), "age": Numeric(1.0, 2.0)})
  encoders.save(tmp_path)
  assert Encoders.load(tmp_path).numeric == encoders.numeric


numbers = st.floats(allow_nan=False, allow_infinity=False)  # the smallest and the largest there are among them


@settings(max_examples=200, deadline=None)
@example([-2.2e-309, 2.2e-309], [0.0, 1e308])
@example([-1.7e308, 1.7e308], [-1.7e308, 0.0, 1.7e308])
@given(st.lists(numbers, min_size=1, max_size=60, unique=True), st.lists(numbers, min_size=2, max_size=20))
def test_encoding_never_turns_the_order_of_numbers_round(knots, values):
  n = len(knots)
  encoder = Quantile.of(sorted(knots), [(i + 0.5) / n for i in range(n)])
  encoded = encoder.encode_all(np.sort(values))
  assert np.isfinite(encoded).all() and (np.diff(encoded) >= 0).all()
  assert [encoder.encode(v) for v in np.sort(values)] == encoded.tolist()


@pytest.mark.parametrize("least", [1.0, 3.0, 4.0, 50.0, 2000.0, -3.0])
def test_a_threshold_of_an_event_label_means_the_raw_number(least, write, make_data, open_log):
  prices = [1.0, 1.0, 3.0, 4.0, 4.0, 9.0, 100.0]
  late = [-5.0, 0.0, 2.9, 3.0, 3.1, 50.0, 49.0, 1999.0, 2000.0, 2001.0]
  n = len(prices)
  time = [TRAIN_END - n + i for i in range(n + len(late))]
  columns = {"user": ["a"] * len(time), "time": time, "item": ["x"] * len(time), "price": [*prices, *late]}
  data = make_data(write("e.parquet", columns), fields=FIELDS)
  task = config.EventLabel(field="price", at_least=least)
  with open_log(data) as log:
    encoders = fitting.fit_encoders(log, data)
    (history,) = histories(log, encoders)
  labels = EventLabelKind("like", task, data, encoders).event_labels(history)
  assert labels.known.all()
  assert labels.value.tolist() == [float(p >= least) for p in [*prices, *late]]
