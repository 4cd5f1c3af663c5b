"""Computes the sampled softmax: a next-event loss over a few drawn values instead of a whole catalogue."""

from __future__ import annotations

import functools
import zlib
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp

from supermoe_jax import config, sharding
from supermoe_jax.batch import Batch
from supermoe_jax.models.supermoe import SuperMoE

if TYPE_CHECKING:  # loaded only by a config that names a memory
  from supermoe_jax.layers.memory.remembered import Remembered


def draw_items(how: str, items: int, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
  """Draws item indices with replacement, int32 of `shape`.

  `log_uniform`: `P(i) ∝ log((i + 2) / (i + 1))`, Zipf's law for items in order of frequency. `uniform`: all items are
  equally likely.
  """
  if how == "uniform":
    return jax.random.randint(key, shape, 0, items, jnp.int32)
  u = jax.random.uniform(key, shape)
  return jnp.clip(jnp.exp(u * jnp.log(items + 1.0)).astype(jnp.int32) - 1, 0, items - 1)


def log_expected_count(how: str, item: jax.Array, items: int, draws: int) -> jax.Array:
  """Returns the logarithm of the number of times that `draws` draws are expected to give `item`."""
  if how == "uniform":
    return jnp.full(item.shape, jnp.log(draws / items))
  i = item.astype(jnp.float32)
  return jnp.log(draws * jnp.log1p(1 / (i + 1)) / jnp.log(items + 1.0))


def drawing_rows(rows: int, negatives: int) -> int:
  """Returns k, where every k-th row of a batch draws values: `rows // negatives`, but at least 1.

  So a softmax costs no more, and gathers no more, on more devices.
  """
  return max(1, rows // negatives)


def drawn_codes(model: SuperMoE, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
  """Returns the codes that each sampled softmax of a batch of B rows draws: int32 `[B, k]` by task.

  All sites share the drawn values. Their number is at least the task's `negatives` and less than twice that, since all
  drawing rows draw equally many. The codes are laid out like the batch, so that each device fetches some. A row that
  draws none has code 0 (absent).
  """
  rows, out = len(batch.features.length), {}
  for name, task in model.tasks.items():
    if task.answer != "catalogue":
      continue
    task = cast(config.NextEvent, task)
    if task.softmax == "sampled":
      items = model.encoder.event_embedding.table(task.field).size - 2
      each, every = -(-task.negatives // rows), drawing_rows(rows, task.negatives)
      drawn = draw_items(task.sampling, items, (rows, each), jax.random.fold_in(key, zlib.crc32(name.encode())))
      codes = jnp.where(jnp.arange(rows)[:, None] % every == 0, drawn + 2, 0)
      out[name] = sharding.constrain(codes, "batch", None)
  return out


def sampled_softmax(
  state: jax.Array,
  own: jax.Array,
  target: jax.Array,
  others: jax.Array,
  drawn: jax.Array,
  log_count: jax.Array,
  remembered: tuple[Remembered, ...] = (),
) -> jax.Array:
  """Returns −log P(any of a site's targets), by N shared values: an estimate of the full softmax's loss.

  Σ exp(score) over all other values is estimated from the drawn values, each divided by its expected count (log-Q
  correction). A drawn value that is one of a site's own targets does not count against it. So the loss and its gradient
  converge to the full softmax's as N grows.

  With K kinds of counts `remembered`, the last K numbers of a state are their gains, and the scores are exact for all
  targets and drawn values.

  Shapes: `state [..., D + K]`, `own [..., m, D]`, `target [..., m]` (different codes, 0 for none but the first),
  `others [N, D]`, `drawn, log_count [N]` → `[...]`; `own` holds the rows of `target`, and `others` the rows of `drawn`.

  Source: importance sampling of a softmax, https://doi.org/10.1109/TNN.2007.912312; log-Q correction for retrieval,
  https://doi.org/10.1145/3298689.3346996.
  """
  there = (target > 0) | (jnp.arange(target.shape[-1]) == 0)  # a site without a target has the row of code 0
  state, gains = state[..., : others.shape[1]], state[..., others.shape[1] :]
  mine, theirs = jnp.einsum("...d,...md->...m", state, own), state @ others.T
  for k, counts in enumerate(remembered):
    mine += gains[..., k, None] * counts.logs_at(target)
    theirs += gains[..., k, None] * counts.logs_of(drawn)
  mine = jnp.where(there, mine, -jnp.inf)
  among = functools.reduce(jnp.logical_or, (drawn == target[..., i, None] for i in range(target.shape[-1])))
  scores = jnp.where(among, -jnp.inf, theirs - log_count)
  every = jax.nn.logsumexp(jnp.concatenate([mine, scores], axis=-1), axis=-1)
  return every - jax.nn.logsumexp(mine, axis=-1)
