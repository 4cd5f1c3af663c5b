"""Makes the optimizer of all parameters but the rows of tables: AdamW, with a warm-up and cosine schedules.

Gradients arrive clipped, by a norm that includes the rows' gradients; see `step`.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import optax

from supermoe_jax import config

# Names of the parameters that weight decay pulls to 0.
_DECAYED = {"kernel", "up", "gate", "down"}


def _names(path: tuple[Any, ...]) -> list[str]:
  """Returns the last name on a parameter's path, in a list; a `value` after it belongs to the NNX variable."""
  names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
  return [n for n in names if n != "value"][-1:]


def schedule(train: config.Train) -> optax.Schedule:
  """Returns a linear warm-up to the peak, then a cosine down to `final_learning_rate` of the peak at the last step.

  If training stops by itself, each round is such a cosine, and the warm-up belongs to the first.
  """
  ends = config.round_ends(train.steps)
  first = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=train.learning_rate,
    warmup_steps=train.warmup_steps,
    decay_steps=ends[0],
    end_value=train.learning_rate * train.final_learning_rate,
  )
  if len(ends) == 1:
    return first
  lengths = (end - begun for begun, end in itertools.pairwise(ends))
  later = (optax.cosine_decay_schedule(train.learning_rate, n, train.final_learning_rate) for n in lengths)
  return optax.join_schedules([first, *later], list(ends[:-1]))


def make_optimizer(train: config.Train) -> optax.GradientTransformation:
  """Returns AdamW; weight decay applies to the matrices of linear maps and experts only, not to biases or norms."""

  def decayed(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(_DECAYED & set(_names(path))), params)

  return optax.adamw(schedule(train), weight_decay=train.weight_decay, mask=decayed)
