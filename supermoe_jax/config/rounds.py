"""Defines the rounds of a training that stops by itself (`config.train.steps="auto"`).

Each round is a cosine of the learning rate, so each ends with a model that has settled, and from the second on a round
is as long as all before it together. Source: warm restarts, arXiv 1608.03983.
"""

from __future__ import annotations

from typing import Literal

FIRST_ROUND = 125  # steps
MOST_ROUNDS = 6

# Least gain of the validation score, as a share of it, for which a further round is trained.
LEAST_GAIN = 1e-3

Steps = int | Literal["auto"]


def round_ends(steps: Steps) -> tuple[int, ...]:
  """Returns the step at which each round ends at the latest; a number of steps is one round."""
  if steps == "auto":
    return tuple(FIRST_ROUND * 2**i for i in range(MOST_ROUNDS))
  return (steps,)
