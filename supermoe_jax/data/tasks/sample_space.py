"""Applies sample spaces: another task's label decides which samples of a task count."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from supermoe_jax.config.tasks.condition import OPERATORS
from supermoe_jax.data.tasks.labels import Labels


class LabelComparison(NamedTuple):
  """A sample space; its number is in the units of the compared label.

  Attributes:
    task: the task whose label is compared.
    operator: one of `==`, `!=`, `<`, `<=`, `>`, `>=`.
    number: the number that the label is compared with.
    classes: float32 `[classes]`, the number of each class; None where the label itself is compared.
  """

  task: str
  operator: str
  number: float
  classes: np.ndarray | None = None

  def __call__(self, other: Labels) -> Labels:
    """Returns whether samples lie in the space, as bool labels, from the compared task's labels at the same samples."""
    value = other.value if self.classes is None else self.classes[other.value.astype(np.int64)]
    return Labels(OPERATORS[self.operator](value, np.float32(self.number)), other.known)


def supervision(
  known: np.ndarray, inside: Labels | None, weights: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the supervision indicators δ (bool) and the sample weights ω (float32); all arrays have one shape.

  Args:
    known: whether there is a label.
    inside: whether the sample lies in the task's sample space, and whether this is known; None without a space.
    weights: the weights of samples inside and outside. A sample with weight 0, or of unknown membership, is left out.
  """
  if inside is None:
    return known, known * np.float32(weights[0])
  weight = (known & inside.known) * np.where(inside.value, *weights)
  return weight > 0, weight.astype(np.float32)
