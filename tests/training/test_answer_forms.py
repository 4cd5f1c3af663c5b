"""Losses of amounts: against scikit-learn and SciPy, and their best constant answers by search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats
from sklearn import metrics as sk

from supermoe_jax import config
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
  answer, wanted = form.constant_answer(first, weight.sum()), form.constant_loss(first, second, weight.sum())

  def mean_loss(constant: float) -> float:
    return float(jnp.mean(form.loss(jnp.full(len(AMOUNTS), constant), jnp.array(AMOUNTS, jnp.float32))))

  best = optimize.minimize_scalar(mean_loss, bounds=(-5, 8), method="bounded")
  assert answer[0] == pytest.approx(best.x, abs=0.02)
  assert wanted == pytest.approx(mean_loss(answer[0]), rel=1e-3)


def test_a_zero_inflated_head_starts_at_the_chance_and_the_mean_of_the_logarithm() -> None:
  form, weight = form_by_loss(TASKS["zero_inflated"]), np.ones(len(AMOUNTS))
  first, second = form.moments(AMOUNTS, weight, 3)
  answer = form.constant_answer(first, weight.sum())
  positive = AMOUNTS[AMOUNTS > 0]
  assert 1 / (1 + np.exp(-answer[0])) == pytest.approx(len(positive) / len(AMOUNTS), abs=0.01)
  assert answer[1] == pytest.approx(np.log(positive).mean())
  assert np.log1p(np.exp(answer[2])) + LEAST_DEVIATION == pytest.approx(1)
  assert form.constant_loss(first, second, weight.sum()) > 0


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("amount", [0.0, 1e-3, 1e6])
def test_losses_and_gradients_are_finite_however_wrong_an_answer(name: str, amount: float) -> None:
  form = form_by_loss(TASKS[name])
  for far in (-100.0, -20.0, 0.0, 20.0, 100.0):
    logits = jnp.full(3, far) if name == "zero_inflated" else jnp.array(far)
    value, gradient = jax.value_and_grad(lambda x: form.loss(x, jnp.array(amount)))(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
