"""Metrics of times that may be censored, against slow references in plain Python."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.evaluation import influence, probes, survival
from supermoe_jax.evaluation.answer_forms import form_of
from supermoe_jax.evaluation.concordance import pair_counts
from supermoe_jax.evaluation.results_table import results_words

EDGES = (1.0, 3.0, 7.0, 15.0)


@st.composite
def times(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
  """Times with ties, some of them censored, and predicted days with ties."""
  rng = np.random.default_rng(draw(st.integers(0, 10_000)))
  n = draw(st.integers(1, 40))
  days, marks = draw(st.sampled_from([1, 5, 50])), draw(st.sampled_from([1, 4, 60]))
  value = np.stack([rng.integers(0, days, n), rng.random(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))], axis=1)
  return value.astype(np.float32), rng.integers(0, marks, n).astype(np.float64)


def slow_pairs(value: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  ordered, right = np.zeros(len(value)), np.zeros(len(value))
  for i, j in itertools.permutations(range(len(value)), 2):
    later = value[j, 0] > value[i, 0] or (value[j, 0] == value[i, 0] and not value[j, 1])
    if value[i, 1] and later:
      for label in (i, j):
        ordered[label] += 1
        right[label] += 1.0 if predicted[i] < predicted[j] else 0.5 * (predicted[i] == predicted[j])
  return ordered, right


@settings(max_examples=300, deadline=None)
@given(times())
def test_pairs_are_counted_as_one_by_one(drawn: tuple[np.ndarray, np.ndarray]) -> None:
  value, predicted = drawn
  found, (ordered, right) = pair_counts(value, predicted), slow_pairs(value, predicted)
  np.testing.assert_array_equal(found.ordered, ordered)
  np.testing.assert_array_equal(found.right, right)
  measured = survival.survival_metrics(value, predicted, EDGES)
  assert measured == {"concordance": pytest.approx(right.sum() / ordered.sum()) if ordered.any() else None}


def censored(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
  """Exponential times of different rates, each followed up to an edge of its own; and the rates."""
  rate = rng.lognormal(-2, 1, n)
  until = rng.choice(EDGES, n)
  days = rng.exponential(1 / rate)
  return np.stack([np.minimum(days, until), days < until], axis=1).astype(np.float32), rate


def test_the_influence_on_a_concordance_is_that_of_leaving_a_label_out() -> None:
  rng = np.random.default_rng(0)
  value, rate = censored(rng, 300)
  days = np.round(1 / rate + rng.exponential(5, 300), 1)
  found = influence.concordance_influence(value, days)
  assert found is not None and found.psi.sum() == pytest.approx(0, abs=1e-12)
  for i in range(0, 300, 23):
    kept = np.arange(300) != i
    without = survival.survival_metrics(value[kept], days[kept], EDGES)["concordance"]
    assert without is not None
    assert found.value - without == pytest.approx(found.psi[i], rel=0.05, abs=1e-5)


def test_the_interval_of_a_concordance_covers_the_truth_as_often_as_it_says() -> None:
  rng = np.random.default_rng(1)
  value, rate = censored(rng, 100_000)
  truth = survival.survival_metrics(value, 1 / rate, EDGES)["concordance"]
  inside = 0
  for _ in range(300):
    value, rate = censored(rng, 150)
    bounds = influence.user_interval("survival", influence.concordance_influence(value, 1 / rate), np.arange(150))
    assert bounds is not None and truth is not None
    inside += bounds[0] <= truth <= bounds[1]
  assert 0.91 <= inside / 300 <= 0.98


def slow_kaplan_meier(value: np.ndarray, day: float) -> float:
  left = 1.0
  for time in sorted({t for t, observed in value if observed and t <= day}):
    left *= 1 - np.sum((value[:, 0] == time) & (value[:, 1] > 0)) / np.sum(value[:, 0] >= time)
  return 1 - left


def test_observed_chances_are_the_kaplan_meier_estimate() -> None:
  value, _ = censored(np.random.default_rng(2), 400)
  wanted = [slow_kaplan_meier(value, edge) for edge in EDGES]
  np.testing.assert_allclose(survival.observed_chances(value, EDGES), wanted, rtol=1e-6)
  chances = np.tile([0.1, 0.2, 0.5, 0.6], (400, 1))
  listed = survival.calibration_by_day(value, chances, EDGES)
  assert [d["days"] for d in listed] == list(EDGES)
  assert [d["predicted"] for d in listed] == pytest.approx([0.1, 0.2, 0.5, 0.6])
  assert [d["observed"] for d in listed] == pytest.approx(wanted)
  assert all(d["interval"][0] < d["observed"] < d["interval"][1] for d in listed)
  error = np.mean(np.abs(np.array(wanted) - [0.1, 0.2, 0.5, 0.6]))
  assert survival.survival_metrics(value, chances, EDGES)["share_error"] == pytest.approx(error)


def test_the_interval_of_an_observed_chance_covers_the_truth_as_often_as_it_says() -> None:
  rng, inside, truth = np.random.default_rng(3), 0, 1 - np.exp(-0.1 * 7)
  for _ in range(400):
    until = rng.choice(EDGES, 200)
    days = rng.exponential(10, 200)
    value = np.stack([np.minimum(days, until), days < until], axis=1).astype(np.float32)
    at_seven = survival.calibration_by_day(value, np.zeros((200, 4)), EDGES)[2]
    inside += at_seven["interval"][0] <= truth <= at_seven["interval"][1]
  assert 0.92 <= inside / 400 <= 0.98


def test_nothing_is_measured_beyond_the_last_edge_that_anyone_is_followed_to() -> None:
  value = np.array([[0.5, 1], [7.0, 0], [3.5, 1], [7.0, 0]], np.float32)
  for last in (0.7, 0.9):  # what is predicted by day 15 is nobody's business
    chances = np.tile([0.25, 0.25, 0.5, last], (4, 1))
    found = survival.survival_metrics(value, chances, EDGES)
    assert found["share_error"] == pytest.approx(0)
    happened = np.array([[1, 1, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]])
    assert found["brier"] == pytest.approx(np.mean(np.square(happened - chances[:, :3]), axis=0) @ [1, 2, 4] / 7)
  listed = survival.calibration_by_day(value, chances, EDGES)
  assert [d["observed"] for d in listed] == [0.25, 0.25, 0.5, None]
  assert listed[-1]["interval"] is None and listed[-1]["followed"] == 0
  everyone = np.array([[0.5, 1], [3.5, 1]], np.float32)
  assert survival.known_edges(everyone, EDGES) == 4  # after the events of all nothing is unknown


def test_many_edges_are_listed_up_to_eight_with_the_last() -> None:
  edges = tuple(range(1, 18))
  listed = survival.calibration_by_day(np.array([[17.0, 0.0], [2.0, 1.0]]), np.full((2, 17), 0.5), edges)
  assert [d["days"] for d in listed] == [2, 5, 8, 11, 14, 17]
  assert listed[-1]["followed"] == 1


def test_the_log_loss_is_that_of_the_interval_of_the_event_or_of_survival() -> None:
  value = np.array([[0.5, 1], [3.0, 1], [3.0, 0], [15.0, 0], [14.0, 1]], np.float32)
  chances = np.array([0.1, 0.3, 0.6, 0.8])
  likelihood = [0.1, 0.6 - 0.3, 1 - 0.3, 1 - 0.8, 0.8 - 0.6]
  found = survival.survival_metrics(value, np.tile(chances, (5, 1)), EDGES)
  assert found["log_loss"] == pytest.approx(-np.mean(np.log(likelihood)))


def test_without_early_censoring_the_brier_score_is_the_mean_squared_error() -> None:
  value = np.array([[0.5, 1], [3.0, 1], [15.0, 0], [14.0, 1]], np.float32)
  chances = np.random.default_rng(0).random((4, 4)).cumsum(axis=1) / 4
  happened = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
  wanted = np.mean(np.square(happened - chances), axis=0) @ [1, 2, 4, 8] / 15
  assert survival.survival_metrics(value, chances, EDGES)["brier"] == pytest.approx(wanted)


def test_the_brier_score_of_censored_times_is_that_of_whole_ones_on_average() -> None:
  rng = np.random.default_rng(4)
  rate = rng.lognormal(-2, 1, 200_000)
  days, until = rng.exponential(1 / rate), rng.choice(EDGES, 200_000, p=[0.3, 0.3, 0.2, 0.2])
  whole = np.stack([np.minimum(days, 15), days < 15], axis=1).astype(np.float32)
  cut = np.stack([np.minimum(days, until), days < until], axis=1).astype(np.float32)
  chances = 1 - np.exp(-rate[:, None] * 0.7 * np.array(EDGES))
  measured = [survival.survival_metrics(value, chances, EDGES)["brier"] for value in (whole, cut)]
  assert measured[1] == pytest.approx(measured[0], rel=0.02)


def test_answers_become_chances_and_expected_days() -> None:
  form = form_of(config.TimeToEvent(horizon_days=15.0, edges_days=EDGES))
  hazards = np.array([0.2, 0.5, 0.1, 0.3])
  chances = form.predictions(np.log(hazards / (1 - hazards))[None])
  survived = np.cumprod(1 - hazards)
  np.testing.assert_allclose(chances[0], 1 - survived)
  happens = hazards * np.append(1, survived[:-1])
  middles = np.array([0.5, 2.0, 5.0, 11.0])
  assert form.scores(chances)[0] == pytest.approx(happens @ middles + survived[-1] * 15)
  assert form.metric_names(()) == ["brier", "concordance", "log_loss", "share_error"]


def test_boosted_trees_learn_hazards_from_censored_times() -> None:
  rng = np.random.default_rng(5)
  x = rng.integers(0, 2, (20_000, 1)).astype(np.float32)
  days, until = rng.exponential(np.where(x[:, 0] > 0, 4, 12)), rng.choice(EDGES, 20_000)
  value = np.stack([np.minimum(days, until), days < until], axis=1).astype(np.float32)
  chances = probes.HazardProbe(x, value, EDGES)(np.array([[0.0], [1.0]], np.float32))
  np.testing.assert_allclose(chances, 1 - np.exp(-np.array(EDGES) / np.array([[12.0], [4.0]])), atol=0.03)
  same = probes.HazardProbe(x, np.tile(np.float32([15.0, 0.0]), (20_000, 1)), EDGES)(x[:2])
  np.testing.assert_array_equal(same, np.zeros((2, 4)))


def test_labels_without_an_order_are_said_to_have_none() -> None:
  task = types.MappingProxyType({"labels": 3, "metrics": {"concordance": None}})
  result = {"main_metric": {"days_to_refill": "concordance"}, "splits": {"test": {"days_to_refill": task}}}
  assert results_words(result) == [
    "days_to_refill: no two of its 3 labels in test have an order, so there is no concordance"
  ]


@pytest.mark.parametrize("events", [0, 1, 2])
def test_trees_of_hazards_take_any_number_of_events(events: int) -> None:
  value = np.tile(np.float32([16.0, 0.0]), (700, 1))
  value[:events] = 3.5, 1.0
  x = np.random.default_rng(0).normal(size=(700, 3)).astype(np.float32)
  chances = probes.HazardProbe(x, value, tuple(range(1, 17)))(x[:5])
  assert chances.shape == (5, 16) and (np.diff(chances, axis=1) >= 0).all() and chances.max() < 0.9
