"""Defines the losses of each form of answers: the loss of a sample, and the loss of the best constant answer.

The loss of a next event (`catalogue`) is in `layers.catalogue` and `training.sampled_softmax`, and the loss of a
contrast in `training.losses`; only a catalogue's constant loss is here.
Shapes: n labels, C classes, outputs or values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE


class AnswerForm:
  """A form of answers; this base class is the form of yes-or-no answers."""

  def loss(self, logits: jax.Array, value: jax.Array) -> jax.Array:
    """Returns the loss ℓ of each sample; `logits` and `value` have one shape."""
    return optax.sigmoid_binary_cross_entropy(logits, value)

  def moments(self, value: np.ndarray, weight: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns Σ ω y and Σ ω y² of labels `value [n, …]` with weights `[n]`, float64 `[outputs]` each."""
    columns = value.reshape(len(value), outputs).astype(np.float64)
    return weight @ columns, weight @ columns**2

  def constant_answer(self, first: np.ndarray, weight: float) -> np.ndarray:
    """Returns the best constant answer `[outputs]`, as a head gives it; half a label of each kind is added.

    So the answer is finite where all labels are alike, and 0 (undecided) without a label.
    """
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

  def constant_answer(self, first: np.ndarray, weight: float) -> np.ndarray:
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

  def constant_answer(self, first: np.ndarray, weight: float) -> np.ndarray:
    """See `AnswerForm`: the mean."""
    return first / max(weight, 1.0)

  def constant_loss(self, first: np.ndarray, second: np.ndarray, weight: float) -> float:
    """See `AnswerForm`: the variance."""
    share = first / max(weight, 1e-12)
    return float(np.mean(second / max(weight, 1e-12) - share**2))


FORMS: dict[config.Answer, AnswerForm] = {
  "binary": AnswerForm(),
  "catalogue": OneOfCatalogue(),
  "multiclass": OneOfClasses(),
  "multilabel": SeveralAnswers(),
  "regression": Number(),
}
