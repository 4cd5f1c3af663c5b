"""The tables' part of a training step: rows come, gradients go back, and only what was touched moves.

    asked = {name: distinct(codes)}                       what the batch asks for
    found = {name: fetch(rows, asked[name])}              unique rows, where the batch lies
    loss, gradients = value_and_grad(objective)(found)    of these rows, not of the tables
    touched = {name: collect(gradients)}                  at their owners, duplicates summed
    rows, slots = apply(rows, slots, touched)             in place, where the buffers are donated

A table whose every row a full softmax scores has a gradient for every row, laid out as the rows are; for a large
catalogue sample the softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supermoe_jax import sharding
from supermoe_jax.layers.exchange import Touched
from supermoe_jax.training import row_optimizers
from supermoe_jax.training.row_optimizers import RowOptimizer, Slots


class Counts(NamedTuple):
  """What a table saw in a step, int32 scalars over all devices.

  Attributes:
    asked: different codes, summed over the devices that the batch is spread over.
    out_of_range: codes that are no rows; they look up to 0.
    lost: gradients that found no cell on their way to the owner, and moved nothing.
  """

  asked: jax.Array
  out_of_range: jax.Array
  lost: jax.Array


# The gradients of touched rows, or, `[G, M, D]`, of all rows.
Gradient = Touched | jax.Array


def square_norm(gradients: Mapping[str, Gradient]) -> jax.Array:
  """The sum of the squares of all rows' gradients, float32."""
  parts = (g.gradient if isinstance(g, Touched) else g.astype(jnp.float32) for g in gradients.values())
  return sum((jnp.sum(jnp.square(part)) for part in parts), jnp.zeros(()))


class Rule(NamedTuple):
  """How rows move.

  Attributes:
    optimizer: moves them.
    rate: the learning rate.
    scale: multiplies the gradients: clipping.
    decay: a touched row shrinks by `rate · decay`, apart from its gradient (decoupled, as AdamW's). Others do not.
    key: of stochastic rounding, for bfloat16 rows; None: to the nearest.
  """

  optimizer: RowOptimizer
  rate: jax.Array | float
  scale: jax.Array | float = 1.0
  decay: float = 0.0
  key: jax.Array | None = None


def apply(rows: jax.Array, slots: Slots, gradient: Gradient, rule: Rule) -> tuple[jax.Array, Slots]:
  """Moves the touched rows `[G, M, D]`, or all of them; slots are `[G, M]` or `[G, M, D]` each.

  Returns: rows and slots, of the same shapes, dtypes and layouts.
  """
  g, m, d = rows.shape
  rate, scale = jnp.asarray(rule.rate, jnp.float32), jnp.asarray(rule.scale, jnp.float32)
  if not isinstance(gradient, Touched):
    code = jnp.arange(g * m, dtype=jnp.int32).reshape(g, m)
    before, all_ = rows.astype(jnp.float32), gradient.astype(jnp.float32)
    return _moved(before, slots, all_, code, rows.dtype, rule._replace(rate=rate, scale=scale))

  def local(
    rows: jax.Array,
    slots: Slots,
    row: jax.Array,
    value: jax.Array,
    gradient: jax.Array,
    rate: jax.Array,
    scale: jax.Array,
  ) -> tuple[jax.Array, Slots]:
    here = m // sharding.ways("rows")  # stripes of this device
    code = row // here * m + sharding.index("rows") * here + row % here
    flat = rows.reshape(-1, d)
    kept = {n: s.reshape(-1, *s.shape[2:]) for n, s in slots.items()}
    mine = {n: jnp.take(s, row, axis=0, mode="clip") for n, s in kept.items()}
    after, mine = _moved(value, mine, gradient, code, rows.dtype, rule._replace(rate=rate, scale=scale))
    flat = flat.at[row].set(after, mode="drop")
    kept = {n: s.at[row].set(mine[n], mode="drop") for n, s in kept.items()}
    return flat.reshape(rows.shape), {n: kept[n].reshape(s.shape) for n, s in slots.items()}

  names = (None, "rows", None)
  slot_names = {n: names[: s.ndim] for n, s in slots.items()}
  inputs = (names, slot_names, ("rows",), ("rows", None), ("rows", None), (), ())
  arguments = rows, slots, gradient.row, gradient.value, gradient.gradient, rate, scale
  return sharding.on_shards(local, inputs, (names, slot_names), *arguments)


def _moved(
  before: jax.Array, slots: Slots, gradient: jax.Array, code: jax.Array, dtype: jnp.dtype, rule: Rule
) -> tuple[jax.Array, Slots]:
  """Moves float32 rows `before [..., D]` of the codes `code [...]`, and rounds them to what they are kept in."""
  after, slots = rule.optimizer.move(before, slots, gradient * rule.scale, jnp.asarray(rule.rate))
  after = after - rule.rate * rule.decay * before
  if rule.key is None:
    return after.astype(dtype), slots
  return row_optimizers.rounded(after, dtype, code, rule.key), slots
