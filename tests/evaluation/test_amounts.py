"""Metrics of amounts and their influences, against SciPy and slow references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from supermoe_jax import config
from supermoe_jax.evaluation import influence, metrics
from supermoe_jax.evaluation.answer_forms import form_of


@st.composite
def amounts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
  """Amounts with zeros and ties, and predictions that follow them, or do not."""
  rng = np.random.default_rng(draw(st.integers(0, 10_000)))
  n = draw(st.integers(2, 60))
  label = np.round(rng.lognormal(1, 1, n) * (rng.random(n) < 0.6), draw(st.integers(0, 2)))
  prediction = np.round(
    label * draw(st.sampled_from([0.0, 0.3, 1.0])) + rng.lognormal(0, 1, n), draw(st.integers(0, 2))
  )
  return label, prediction


def slow_gini(label: np.ndarray, score: np.ndarray) -> float:
  """The area between the Lorenz curve in the order of the score and the diagonal; ties share their labels."""
  shared = np.array([label[score == s].mean() for s in score])
  ordered = shared[np.argsort(score, kind="stable")]
  share = np.append(0, np.cumsum(ordered)) / ordered.sum()
  return 1 - float(np.sum(share[1:] + share[:-1])) / len(label)


@settings(max_examples=300, deadline=None)
@given(amounts())
def test_metrics_of_amounts_equal_references(pair: tuple[np.ndarray, np.ndarray]) -> None:
  label, prediction = pair
  found = metrics.amount_metrics(label, prediction)
  if len(set(label)) > 1 and len(set(prediction)) > 1:
    assert found["spearman"] == pytest.approx(stats.spearmanr(label, prediction).statistic)
  else:
    assert found["spearman"] is None
  if len(set(label)) > 1:
    assert found["gini"] == pytest.approx(slow_gini(label, prediction) / slow_gini(label, label))
  assert found["rmse"] == pytest.approx(np.sqrt(np.mean((label - prediction) ** 2)))
  assert found["mae"] == pytest.approx(np.mean(np.abs(label - prediction)))
  assert found["mean_ratio"] == (pytest.approx(prediction.sum() / label.sum()) if label.sum() else None)


def test_the_decile_error_is_the_distance_of_means_over_the_mean() -> None:
  prediction = np.arange(100.0)
  assert metrics.amount_metrics(prediction, prediction)["decile_error"] == pytest.approx(0)
  assert metrics.amount_metrics(prediction, 1.2 * prediction)["decile_error"] == pytest.approx(0.2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_the_influence_on_a_rank_correlation_is_that_of_leaving_a_label_out(seed: int, ties: bool) -> None:
  rng = np.random.default_rng(seed)
  label = rng.lognormal(0, 1, 300) * (rng.random(300) < 0.7)
  answer = label + rng.normal(0, 1, 300)
  if ties:
    label, answer = np.round(label), np.round(answer)
  found = influence.spearman_influence(label, answer)
  assert found is not None
  assert found.value == pytest.approx(stats.spearmanr(label, answer).statistic)
  for i in range(0, 300, 37):
    kept = np.arange(300) != i
    without = stats.spearmanr(label[kept], answer[kept]).statistic
    assert (found.value - without) * 299 == pytest.approx(found.psi[i] * 300, abs=0.06)


def test_the_interval_of_a_rank_correlation_covers_the_truth_as_often_as_it_says() -> None:
  rng, inside, rounds, rho = np.random.default_rng(0), 0, 300, 0.5
  truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's correlation of a bivariate normal distribution
  for _ in range(rounds):
    pair = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 150)
    bounds = influence.user_interval("amount", influence.spearman_influence(*pair.T), np.arange(150))
    assert bounds is not None
    inside += bounds[0] <= truth <= bounds[1]
  assert 0.91 <= inside / rounds <= 0.98


def test_answers_become_amounts_by_the_form_of_the_loss() -> None:
  def amount(loss: str, answer: np.ndarray) -> np.ndarray:
    return form_of(config.FutureAmount(loss=loss)).predictions(answer)

  answer = np.array([-1.0, 0.0, 2.0])
  np.testing.assert_allclose(amount("tweedie", answer), np.exp(answer))
  np.testing.assert_allclose(amount("poisson", answer), np.exp(answer))
  np.testing.assert_allclose(amount("log1p", answer), np.sign(answer) * np.expm1(np.abs(answer)))
  drawn = np.random.default_rng(0)
  happens = drawn.random(400_000) < 1 / (1 + np.exp(-0.5))
  deviation = np.log1p(np.exp(-0.4)) + 0.05
  sample = happens * drawn.lognormal(1.2, deviation, 400_000)
  assert amount("zero_inflated", np.array([[0.5, 1.2, -0.4]]))[0] == pytest.approx(sample.mean(), rel=0.01)
