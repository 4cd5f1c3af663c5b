"""Losses of amounts and of times to an event: against scikit-learn, SciPy and search for their best constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats
from sklearn import metrics as sk

from supermoe_jax import config
from supermoe_jax.data.encoding.censored_times import interval_counts
from supermoe_jax.training.answer_forms import LEAST_DEVIATION, form_by_loss

TASKS = {
  "tweedie": config.FutureAmount(loss="tweedie", power=1.3),
  "poisson": config.FutureAmount(loss="poisson"),
  "zero_inflated": config.FutureAmount(loss="zero_inflated"),
  "log1p": config.FutureAmount(loss="log1p"),
}
AMOUNTS = np.random.default_rng(0).lognormal(2.0, 1.2, 400) * (np.random.default_rng(1).random(400) < 0.6)


@pytest.mark.parametrize(("name", "power"), [("tweedie", 1.3), ("poisson", 1.0)])
def test_deviances_equal_scikit_learn(name: str, power: float) -> None:
  mean = np.random.default_rng(2).lognormal(2, 1, len(AMOUNTS))
  found = form_by_loss(TASKS[name]).loss(jnp.log(mean), jnp.array(AMOUNTS))
  wanted = [sk.mean_tweedie_deviance([y], [m], power=power) for y, m in zip(AMOUNTS, mean)]
  np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)


def test_a_zero_inflated_amount_has_its_density() -> None:
  logits = np.array([0.3, 1.7, 0.4])
  deviation = np.log1p(np.exp(logits[2])) + LEAST_DEVIATION
  chance = 1 / (1 + np.exp(-logits[0]))
  loss = form_by_loss(TASKS["zero_inflated"]).loss(jnp.broadcast_to(logits, (3, 3)), jnp.array([0.0, 2.0, 9.0]))
  density = stats.lognorm(deviation, scale=np.exp(logits[1])).logpdf([2.0, 9.0])
  constant = 0.5 * np.log(2 * np.pi) + np.log([2.0, 9.0])  # what the loss leaves out
  np.testing.assert_allclose(loss[0], -np.log(1 - chance), rtol=1e-5)
  np.testing.assert_allclose(loss[1:], -np.log(chance) - density - constant, rtol=1e-5)


@pytest.mark.parametrize("name", ["tweedie", "poisson", "log1p"])
def test_the_constant_answer_is_the_best_constant_and_has_the_constant_loss(name: str) -> None:
  form, weight = form_by_loss(TASKS[name]), np.full(len(AMOUNTS), 1.5)
  first, second = form.moments(AMOUNTS, weight, 1)
  answer, wanted = form.constant_answer(first, second, weight.sum()), form.constant_loss(first, second, weight.sum())

  def mean_loss(constant: float) -> float:
    return float(jnp.mean(form.loss(jnp.full(len(AMOUNTS), constant), jnp.array(AMOUNTS, jnp.float32))))

  best = optimize.minimize_scalar(mean_loss, bounds=(-5, 8), method="bounded")
  assert answer[0] == pytest.approx(best.x, abs=0.02)
  assert wanted == pytest.approx(mean_loss(answer[0]), rel=1e-3)


def test_a_zero_inflated_head_starts_at_the_chance_and_the_mean_of_the_logarithm() -> None:
  form, weight = form_by_loss(TASKS["zero_inflated"]), np.ones(len(AMOUNTS))
  first, second = form.moments(AMOUNTS, weight, 3)
  answer = form.constant_answer(first, second, weight.sum())
  positive = AMOUNTS[AMOUNTS > 0]
  assert 1 / (1 + np.exp(-answer[0])) == pytest.approx(len(positive) / len(AMOUNTS), abs=0.01)
  assert answer[1] == pytest.approx(np.log(positive).mean())
  assert np.log1p(np.exp(answer[2])) + LEAST_DEVIATION == pytest.approx(1)
  assert form.constant_loss(first, second, weight.sum()) > 0


HAZARDS = form_by_loss(config.TimeToEvent(horizon_days=10.0, edges_days=(1.0, 4.0, 10.0)))
TIMES = np.float32([[0, 1], [0.99, 1], [1, 1], [9.9, 1], [10, 1], [1, 0], [4, 0], [10, 0]])


def test_the_loss_of_a_time_is_the_likelihood_of_the_intervals_that_count() -> None:
  hazard = np.array([0.1, 0.3, 0.25])
  survived = [0, 0, 1, 2, 2, 1, 2, 3]  # intervals before that of the event, or before the end of the follow-up
  for (_, observed), before, loss in zip(
    TIMES, survived, HAZARDS.loss(jnp.broadcast_to(jnp.log(hazard / (1 - hazard)), (8, 3)), jnp.array(TIMES))
  ):
    wanted = -np.log(1 - hazard[:before]).sum() - (np.log(hazard[before]) if observed else 0.0)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
  assert float(HAZARDS.loss(jnp.ones((1, 3)), jnp.zeros((1, 2)))[0]) == 0.0  # of an unknown label


def test_the_constant_hazards_are_the_best_constants_and_have_the_constant_loss() -> None:
  times = np.concatenate([TIMES, TIMES[[1, 2, 6, 7, 7]]])
  weight = np.arange(1.0, len(times) + 1) * 1e4
  first, second = HAZARDS.moments(times, weight, 3)
  answer = HAZARDS.constant_answer(first, second, weight.sum())

  def mean_loss(constant: np.ndarray) -> float:
    loss = HAZARDS.loss(jnp.broadcast_to(jnp.array(constant, jnp.float32), (len(times), 3)), jnp.array(times))
    return float(np.average(loss, weights=weight))

  assert HAZARDS.constant_loss(first, second, weight.sum()) == pytest.approx(mean_loss(answer), rel=1e-4)
  for change in np.eye(3):
    assert mean_loss(answer + 0.1 * change) > mean_loss(answer) < mean_loss(answer - 0.1 * change)
  counted = interval_counts(times, (1.0, 4.0, 10.0))
  np.testing.assert_array_equal(HAZARDS.moments(times, np.ones(len(times)), 3), counted)
  np.testing.assert_allclose(HAZARDS.constant_answer(np.zeros(3), np.zeros(3), 0.0), 0)


@pytest.mark.parametrize("time", TIMES.tolist())
def test_the_loss_and_gradient_of_a_time_are_finite_however_wrong_an_answer(time: list[float]) -> None:
  for far in (-100.0, 0.0, 100.0):
    value, gradient = jax.value_and_grad(lambda x: HAZARDS.loss(x, jnp.array(time)))(jnp.full(3, far))
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("amount", [0.0, 1e-3, 1e6])
def test_losses_and_gradients_are_finite_however_wrong_an_answer(name: str, amount: float) -> None:
  form = form_by_loss(TASKS[name])
  for far in (-100.0, -20.0, 0.0, 20.0, 100.0):
    logits = jnp.full(3, far) if name == "zero_inflated" else jnp.array(far)
    value, gradient = jax.value_and_grad(lambda x: form.loss(x, jnp.array(amount)))(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
