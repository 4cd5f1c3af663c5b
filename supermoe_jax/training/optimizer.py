"""The optimizer: AdamW behind a global gradient clip, with a warm-up and cosine schedule."""

from __future__ import annotations

import jax
import optax

from supermoe_jax import config


def schedule(train: config.Train) -> optax.Schedule:
  """Linear warm-up to the peak, then a cosine down to `final_learning_rate` of it at the last step."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=train.learning_rate,
    warmup_steps=train.warmup_steps,
    decay_steps=train.steps,
    end_value=train.learning_rate * train.final_learning_rate,
  )


def make_optimizer(train: config.Train) -> optax.GradientTransformation:
  """Returns AdamW; vectors (biases, norms) are not decayed."""

  def decayed(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda p: p.ndim > 1, params)

  return optax.chain(
    optax.clip_by_global_norm(train.clip_norm),
    optax.adamw(schedule(train), weight_decay=train.weight_decay, mask=decayed),
  )
