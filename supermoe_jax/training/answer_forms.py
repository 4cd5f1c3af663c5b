"""Defines the losses of each form of answers: the loss of a sample, and the loss of the best constant answer.

The loss of a next event (`catalogue`) is in `layers.catalogue` and `training.sampled_softmax`, and the loss of a
contrast in `training.losses`; only a catalogue's constant loss is here.
Amounts have deviances with a logarithmic link, a zero-inflated log-normal, or the error of a logarithm. A deviance is
twice the log-likelihood that an answer falls short of the best one; it is 0 for a right answer. Times to an event,
which may be censored, have the likelihood of a discrete-time hazard.
Shapes: n labels, C classes, outputs or values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE

# Logarithms of amounts are cut to ±LARGEST_LOGARITHM before their exponential, which must not overflow.
LARGEST_LOGARITHM = 30.0

# Least deviation of a log-normal's logarithm: amounts that are all alike must not make its density infinite.
LEAST_DEVIATION = 0.05


class AnswerForm:
  """A form of answers; this base class is the form of yes-or-no answers."""

  def loss(self, logits: jax.Array, value: jax.Array) -> jax.Array:
    """Returns the loss ℓ of each sample; `logits` and `value` have one shape."""
    return optax.sigmoid_binary_cross_entropy(logits, value)

  def moments(self, value: np.ndarray, weight: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns Σ ω y and Σ ω y² of labels `value [n, …]` with weights `[n]`, float64 `[outputs]` each."""
    columns = value.reshape(len(value), outputs).astype(np.float64)
    return weight @ columns, weight @ columns**2

  def constant_answer(self, first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """Returns the best constant answer `[outputs]`, as a head gives it; half a label of each kind is added.

    So the answer is finite where all labels are alike, and 0 (undecided) without a label.

    Args:
      first: the labels' first moments, as of `moments`.
      second: their second moments, which most forms do not need.
      weight: their Σ ω.
    """
    del second
    return np.log(first + 0.5) - np.log(np.maximum(weight - first, 0.0) + 0.5)

  def constant_loss(self, first: np.ndarray, second: np.ndarray, weight: float) -> float:
    """Returns the mean loss of the best constant answer, from the labels' moments and their Σ ω `weight`."""
    del second
    share = first / max(weight, 1e-12)
    both = np.stack([share, 1 - share])
    return float(np.mean(-np.sum(both * np.log(np.where(both > 0, both, 1)), axis=0)))


class SeveralAnswers(AnswerForm):
  """A yes or no for each of several values; a sample's loss is the mean over the values."""

  def loss(self, logits: jax.Array, value: jax.Array) -> jax.Array:
    """See `AnswerForm`; `logits, value [..., values]`."""
    return jnp.mean(super().loss(logits, value), axis=-1)


class OneOfClasses(AnswerForm):
  """One of several classes, as an index."""

  first_code = 0

  def loss(self, logits: jax.Array, value: jax.Array) -> jax.Array:
    """See `AnswerForm`; `logits [..., classes]`, `value [...]`."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, value.astype(jnp.int32))

  def moments(self, value: np.ndarray, weight: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """See `AnswerForm`; the first moments are Σ ω of each class, the second are 0."""
    counts = np.bincount(value - self.first_code, weights=weight, minlength=outputs)
    return counts, np.zeros(outputs)

  def constant_answer(self, first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """See `AnswerForm`: the logarithms of the classes' shares."""
    return np.log((first + 0.5) / (weight + 0.5 * len(first)))

  def constant_loss(self, first: np.ndarray, second: np.ndarray, weight: float) -> float:
    """See `AnswerForm`: the entropy of the classes."""
    share = first / max(weight, 1e-12)
    return float(-np.sum(share * np.log(np.where(share > 0, share, 1))))


class OneOfCatalogue(OneOfClasses):
  """One of a field's values, as a code."""

  first_code = FIRST_VALUE


class Number(AnswerForm):
  """A number, with squared error."""

  def loss(self, logits: jax.Array, value: jax.Array) -> jax.Array:
    """See `AnswerForm`."""
    return jnp.square(logits - value)

  def constant_answer(self, first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """See `AnswerForm`: the mean."""
    return first / max(weight, 1.0)

  def constant_loss(self, first: np.ndarray, second: np.ndarray, weight: float) -> float:
    """See `AnswerForm`: the variance."""
    share = first / max(weight, 1e-12)
    return float(np.mean(second / max(weight, 1e-12) - share**2))


class TweedieAmount(AnswerForm):
  """The deviance of a Tweedie distribution, whose variance is proportional to the mean to the power p in (1, 2).

  The answer is the logarithm of the mean. Source: Jørgensen, "Exponential Dispersion Models", 1987.
  """

  def __init__(self, power: float):
    self._p = power

  def loss(self, logits: jax.Array, value: jax.Array) -> jax.Array:
    """See `AnswerForm`."""
    p, log_mean = self._p, _cut(logits)
    own = jnp.maximum(value, 0.0) ** (2 - p) / ((1 - p) * (2 - p))
    return 2 * (own - value * jnp.exp((1 - p) * log_mean) / (1 - p) + jnp.exp((2 - p) * log_mean) / (2 - p))

  def moments(self, value: np.ndarray, weight: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """See `AnswerForm`; the second moment is Σ ω y^(2 − p)."""
    value = value.astype(np.float64)
    return np.array([weight @ value]), np.array([weight @ np.maximum(value, 0.0) ** (2 - self._p)])

  def constant_answer(self, first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """See `AnswerForm`: the logarithm of the mean."""
    return _log_mean(first, weight)

  def constant_loss(self, first: np.ndarray, second: np.ndarray, weight: float) -> float:
    """See `AnswerForm`."""
    p, mean = self._p, max(float(first[0]), 0.0) / max(weight, 1e-12)
    return 2 * (float(second[0]) / max(weight, 1e-12) - mean ** (2 - p)) / ((1 - p) * (2 - p))


class PoissonAmount(AnswerForm):
  """The deviance of a Poisson distribution, for counts; the answer is the logarithm of the mean."""

  def loss(self, logits: jax.Array, value: jax.Array) -> jax.Array:
    """See `AnswerForm`."""
    log_mean = _cut(logits)
    own = jax.scipy.special.xlogy(value, jnp.maximum(value, 1e-30))
    return 2 * (own - value * log_mean - value + jnp.exp(log_mean))

  def moments(self, value: np.ndarray, weight: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """See `AnswerForm`; the second moment is Σ ω y log y."""
    value = value.astype(np.float64)
    return np.array([weight @ value]), np.array([weight @ (value * np.log(np.maximum(value, 1e-300)))])

  def constant_answer(self, first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """See `AnswerForm`: the logarithm of the mean."""
    return _log_mean(first, weight)

  def constant_loss(self, first: np.ndarray, second: np.ndarray, weight: float) -> float:
    """See `AnswerForm`."""
    mean = max(float(first[0]), 0.0) / max(weight, 1e-12)
    return 2 * (float(second[0]) / max(weight, 1e-12) - mean * float(np.log(max(mean, 1e-300))))


class ZeroInflatedAmount(AnswerForm):
  """A probability that the amount is positive, and a log-normal distribution of positive amounts.

  The answer `[..., 3]` holds the logit of the probability, the mean of the logarithm, and the inverse softplus of the
  logarithm's standard deviation. The loss leaves out what no answer changes: ½ log 2π and the logarithm of the amount.
  Source: arXiv 1912.07753.
  """

  def loss(self, logits: jax.Array, value: jax.Array) -> jax.Array:
    """See `AnswerForm`; `logits [..., 3]`, `value [...]`."""
    positive = value > 0
    mean, deviation = _cut(logits[..., 1]), jax.nn.softplus(logits[..., 2]) + LEAST_DEVIATION
    error = (jnp.log(jnp.where(positive, value, 1.0)) - mean) / deviation
    size = 0.5 * error**2 + jnp.log(deviation)
    happens = optax.sigmoid_binary_cross_entropy(logits[..., 0], positive.astype(logits.dtype))
    return happens + jnp.where(positive, size, 0.0)

  def moments(self, value: np.ndarray, weight: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """See `AnswerForm`; both are sums over positive amounts, of ω and ω log y, and of ω (log y)²."""
    positive = value > 0
    logarithm = np.log(np.where(positive, value, 1).astype(np.float64))
    first = np.array([weight @ positive, weight @ logarithm, 0.0])
    return first, np.array([0.0, weight @ logarithm**2, 0.0])

  def constant_answer(self, first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """See `AnswerForm`; the standard deviation starts at 1."""
    chance = super().constant_answer(first[:1], second[:1], weight)[0]
    return np.array([chance, first[1] / max(first[0], 1.0), np.log(np.expm1(1.0 - LEAST_DEVIATION))])

  def constant_loss(self, first: np.ndarray, second: np.ndarray, weight: float) -> float:
    """See `AnswerForm`; without the logarithm of the deviation, which depends on the amounts' unit of spread."""
    chance = super().constant_loss(first[:1], second[:1], weight)
    return chance + 0.5 * float(first[0]) / max(weight, 1e-12)


class LogarithmicAmount(Number):
  """The squared error of sign(y)·log(1 + |y|), which the answer predicts."""

  def loss(self, logits: jax.Array, value: jax.Array) -> jax.Array:
    """See `AnswerForm`."""
    return super().loss(logits, jnp.sign(value) * jnp.log1p(jnp.abs(value)))

  def moments(self, value: np.ndarray, weight: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """See `AnswerForm`; of the logarithms."""
    value = value.astype(np.float64)
    return super().moments(np.sign(value) * np.log1p(np.abs(value)), weight, outputs)


class Hazards(AnswerForm):
  """The chance of an event in each of K intervals, if it did not happen earlier, for times that may be censored.

  A label is `(days, observed)`, as of `config.TimeToEvent`; the answer `[..., K]` holds a logit for each interval. The
  loss is the negative log likelihood: an event counts in its own interval and as survival in all earlier ones, and a
  censored label counts as survival in the intervals that end by then.
  """

  def __init__(self, edges: Sequence[float]):
    self._edges = tuple(edges)

  def loss(self, logits: jax.Array, value: jax.Array) -> jax.Array:
    """See `AnswerForm`; `logits [..., K]`, `value [..., 2]`."""
    survived, happens = self._intervals(value)
    surprise = jnp.where(happens, jax.nn.softplus(-logits), jnp.where(survived, jax.nn.softplus(logits), 0.0))
    return jnp.sum(surprise, axis=-1)

  def _intervals(self, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns which intervals each label survived, and which holds its event: bool `[..., K]` each."""
    days, observed, interval = value[..., :1], value[..., 1:] > 0, jnp.arange(len(self._edges))
    number = jnp.sum(days >= jnp.array(self._edges, jnp.float32), axis=-1, keepdims=True)
    # In float32 an event just before the horizon may lie at it.
    number = jnp.where(observed, jnp.minimum(number, len(self._edges) - 1), number)
    return interval < number, observed & (interval == number)

  def moments(self, value: np.ndarray, weight: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """See `AnswerForm`; Σ ω of the events in each interval, and of the labels that count there."""
    survived, happens = (np.asarray(found) for found in self._intervals(jnp.asarray(value)))
    return weight @ happens, weight @ (survived | happens)

  def constant_answer(self, first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """See `AnswerForm`: the logits of the base rate of each interval."""
    return np.log(first + 0.5) - np.log(np.maximum(second - first, 0.0) + 0.5)

  def constant_loss(self, first: np.ndarray, second: np.ndarray, weight: float) -> float:
    """See `AnswerForm`."""
    share = first / np.maximum(second, 1e-12)
    both = np.stack([share, 1 - share])
    entropy = -np.sum(both * np.log(np.where(both > 0, both, 1)), axis=0)
    return float(second @ entropy) / max(weight, 1e-12)


def _cut(logarithm: jax.Array) -> jax.Array:
  return jnp.clip(logarithm, -LARGEST_LOGARITHM, LARGEST_LOGARITHM)


def _log_mean(first: np.ndarray, weight: float) -> np.ndarray:
  return np.log(np.maximum(first / max(weight, 1.0), 1e-6))


FORMS: dict[config.Answer, AnswerForm] = {
  "binary": AnswerForm(),
  "catalogue": OneOfCatalogue(),
  "multiclass": OneOfClasses(),
  "multilabel": SeveralAnswers(),
  "regression": Number(),
}

_AMOUNT_FORMS: dict[str, Callable[[config.FutureAmount], AnswerForm]] = {
  "tweedie": lambda task: TweedieAmount(task.power),
  "poisson": lambda task: PoissonAmount(),
  "zero_inflated": lambda task: ZeroInflatedAmount(),
  "log1p": lambda task: LogarithmicAmount(),
}


def form_by_loss(task: config.Task) -> AnswerForm:
  """Returns the form of a task's answers; that of an amount depends on its loss, that of a time on its intervals."""
  if isinstance(task, config.TimeToEvent):
    return Hazards(task.edges)
  return _AMOUNT_FORMS[task.loss](task) if isinstance(task, config.FutureAmount) else FORMS[task.answer]
