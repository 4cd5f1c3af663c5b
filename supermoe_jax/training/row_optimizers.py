"""Optimizes the rows of tables: it moves the rows that a batch touched, and no others.

optax moves every parameter in every step. Here a row without a gradient keeps its value and its moments, and does not
decay; each optimizer's docstring states the consequences. Arithmetic is float32, whatever dtype the rows are kept in.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from supermoe_jax import config

# The state that an optimizer keeps of each row, by name: float32 or int32 `[...]` or `[..., D]`.
RowState = dict[str, jax.Array]


class RowOptimizer(Protocol):
  """An optimizer that moves rows against their gradients."""

  def initial_state(self, rows: jax.Array | jax.ShapeDtypeStruct) -> RowState:
    """Returns the state of `rows [..., D]` before the first step; it has the leading dimensions of the rows."""
    ...

  def move(
    self, row: jax.Array, slots: RowState, gradient: jax.Array, rate: jax.Array, typical: jax.Array
  ) -> tuple[jax.Array, RowState]:
    """Returns float32 rows and their slots after one step.

    Args:
      row: `[..., D]`, the rows before the step.
      slots: their state.
      gradient: `[..., D]`.
      rate: the learning rate.
      typical: the mean of g² over all numbers that the step moves in this table.
    """
    ...


@dataclasses.dataclass(frozen=True)
class RowAdagrad:
  """Adagrad with one sum of squares a row: `s += mean(g²)`, `row -= rate · g / (√(s + n · typical) + ε)`.

  A row's steps shrink with its own gradients, however often other rows are touched. With n = 0 its first step has the
  length of the rate, so that rows that are met once or twice learn these events by heart. With `prior_updates` n a row
  moves as if it had had n updates of the table's typical gradient before. The state takes four bytes a row.

  Source: Adagrad, https://jmlr.org/papers/v12/duchi11a.html; row-wise as in arXiv 1906.00091 and TorchRec. The prior is
  this project's own.
  """

  prior_updates: float = 0.0
  epsilon: float = 1e-8

  def initial_state(self, rows: jax.Array | jax.ShapeDtypeStruct) -> RowState:
    """Returns the state before the first step; see `RowOptimizer`."""
    return {"sum": jnp.zeros(rows.shape[:-1], jnp.float32)}

  def move(
    self, row: jax.Array, slots: RowState, gradient: jax.Array, rate: jax.Array, typical: jax.Array
  ) -> tuple[jax.Array, RowState]:
    """Returns rows and slots after one step; see `RowOptimizer`."""
    total = slots["sum"] + jnp.mean(jnp.square(gradient), axis=-1)
    before = self.prior_updates * typical if self.prior_updates else 0.0
    return row - rate * gradient / (jnp.sqrt(total + before) + self.epsilon)[..., None], {"sum": total}


@dataclasses.dataclass(frozen=True)
class LazyAdam:
  """Adam whose moments fade only when their row is touched, and whose bias correction counts the row's own steps.

  So a row's first step has the length of the rate, whenever it comes. The state takes eight bytes for each number of
  the table, and four a row.

  Source: arXiv 1412.6980; lazy as in TensorFlow Addons' LazyAdam, which counts the steps of all rows together.
  """

  b1: float = 0.9
  b2: float = 0.999
  epsilon: float = 1e-8

  def initial_state(self, rows: jax.Array | jax.ShapeDtypeStruct) -> RowState:
    """Returns the state before the first step; see `RowOptimizer`."""
    steps = jnp.zeros(rows.shape[:-1], jnp.int32)
    # Two separate arrays, since a step is donated each buffer.
    return {"mean": jnp.zeros(rows.shape, jnp.float32), "square": jnp.zeros(rows.shape, jnp.float32), "steps": steps}

  def move(
    self, row: jax.Array, slots: RowState, gradient: jax.Array, rate: jax.Array, typical: jax.Array
  ) -> tuple[jax.Array, RowState]:
    """Returns rows and slots after one step; see `RowOptimizer`."""
    steps = slots["steps"] + 1
    mean = self.b1 * slots["mean"] + (1 - self.b1) * gradient
    square = self.b2 * slots["square"] + (1 - self.b2) * jnp.square(gradient)
    t = steps.astype(jnp.float32)[..., None]
    # 1 - bᵗ, without the digits that the difference loses while t is small.
    unbiased = mean / -jnp.expm1(t * math.log(self.b1))
    deviation = jnp.sqrt(square / -jnp.expm1(t * math.log(self.b2))) + self.epsilon
    return row - rate * unbiased / deviation, {"mean": mean, "square": square, "steps": steps}


@dataclasses.dataclass(frozen=True)
class Sgd:
  """Plain gradient descent, `row -= rate · g`, without a state."""

  def initial_state(self, rows: jax.Array | jax.ShapeDtypeStruct) -> RowState:
    """Returns the state before the first step; see `RowOptimizer`."""
    return {}

  def move(
    self, row: jax.Array, slots: RowState, gradient: jax.Array, rate: jax.Array, typical: jax.Array
  ) -> tuple[jax.Array, RowState]:
    """Returns rows and slots after one step; see `RowOptimizer`."""
    return row - rate * gradient, {}


def make_row_optimizer(tables: config.Tables) -> RowOptimizer:
  """Returns the optimizer that a config names."""
  made: dict[str, RowOptimizer] = {"adagrad": RowAdagrad(tables.prior_updates), "adam": LazyAdam(), "sgd": Sgd()}
  return made[tables.optimizer]


def round_stochastically(row: jax.Array, dtype: jnp.dtype, code: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds float32 `row [..., D]` to bfloat16 up or down at random, so that the mean of the result is the row itself.

  Plain rounding loses every step smaller than 1/512 of the value. The draw depends on the key and the row's `code
  [...]` only, so it is the same on any mesh. A `dtype` other than bfloat16 is cast without a draw.

  Source: arXiv 1502.02551.
  """
  if dtype != jnp.bfloat16:
    return row.astype(dtype)
  draw = jax.vmap(lambda c: jax.random.bits(jax.random.fold_in(key, c), row.shape[-1:], jnp.uint16))
  noise = draw(code.reshape(-1)).reshape(row.shape)
  bits = jax.lax.bitcast_convert_type(row, jnp.uint32) + noise.astype(jnp.uint32)
  finite = jnp.isfinite(row)
  cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(finite, cut, row).astype(dtype)
