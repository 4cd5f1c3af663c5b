"""Weighs the losses of the tasks by the methods of others, with which studies compare.

The gradient methods (`pcgrad`, `cagrad`) find the weights from the inner products of the tasks' gradients. They take
the gradients at the representation instead of at all shared parameters: an approximation that costs T passes through
the heads rather than T through the model. Their weights depend on the tasks that are present.

Shapes: T tasks, in the order of their names. For the symbols see `losses` and `weighting`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from supermoe_jax import config
from supermoe_jax.training.weighting import ObservedLosses, State, Weigher, WeightInputs, sum_to_tasks

# Steps that solve CAGrad's inner problem; it is convex in T weights, and each step costs T² products.
CAGRAD_STEPS = 200


@dataclasses.dataclass(frozen=True)
class _Learned(Weigher):
  """A weigher whose log weights `[T]` Adam moves, task by task, so that an absent task's moments stay as they are."""

  learning_rate: float = 0.025

  def initial(self) -> State:
    """Returns the state before the first step."""
    zero = jnp.zeros(len(self.prior))
    return {**super().initial(), "log": zero, "adam": jax.vmap(self._adam.init)(zero)}

  @property
  def _adam(self) -> optax.GradientTransformation:
    return optax.adam(self.learning_rate)

  def _move(self, state: State, gradient: jax.Array, present: jax.Array) -> State:
    updates, adam = jax.vmap(self._adam.update)(gradient, state["adam"])
    moved = {**state, "log": state["log"] + updates, "adam": adam}
    return jax.tree.map(lambda new, old: jnp.where(present, new, old), moved, state)


@dataclasses.dataclass(frozen=True)
class Uncertainty(_Learned):
  """A weigher with precisions `exp(-s)`, learned by descent on `Σ a (exp(-s) L^ + s)`.

  An absent task is masked, its regulariser included.
  Source: homoscedastic uncertainty, arXiv 1705.07115; here the weights are scaled to sum T.
  """

  def weights(self, state: State, observed: WeightInputs) -> jax.Array:
    """Returns w `[T]`."""
    del observed
    return sum_to_tasks(jax.nn.softmax(-state["log"]))

  def update(self, state: State, seen: ObservedLosses) -> State:
    """Returns the state after a step."""
    return self._move(state, 1 - jnp.exp(-state["log"]) * seen.mean, seen.present)


@dataclasses.dataclass(frozen=True)
class Famo(_Learned):
  """A weigher with weights `softmax(ξ) / L^`; ξ moves so that all log losses fall alike.

  It measures the loss of each batch again after the step.
  Source: FAMO, arXiv 2306.03792. FAMO takes the losses of the batch; here an absent task keeps its last loss.
  """

  needs_after: ClassVar[bool] = True
  weight_decay: float = 1e-3

  def initial(self) -> State:
    """Returns the state before the first step."""
    return {**super().initial(), "last": jnp.ones(len(self.prior))}

  def weights(self, state: State, observed: WeightInputs) -> jax.Array:
    """Returns w `[T]`."""
    del observed
    return sum_to_tasks(jax.nn.softmax(state["log"]) / state["last"])

  def update(self, state: State, seen: ObservedLosses) -> State:
    """Returns the state after a step."""
    assert seen.after is not None
    present = seen.present & (seen.mean > 0) & (seen.after > 0)
    fall = jnp.log(jnp.where(present, seen.mean, 1.0)) - jnp.log(jnp.where(present, seen.after, 1.0))
    z = jnp.where(present, jax.nn.softmax(jnp.where(present, state["log"], -1e30)), 0.0)
    gradient = z * (fall - jnp.sum(z * fall)) + self.weight_decay * state["log"]
    moved = self._move(state, gradient, present)
    return {**moved, "last": jnp.where(present, seen.after, state["last"])}


@dataclasses.dataclass(frozen=True)
class PcGrad(Weigher):
  """A weigher that removes from each task's gradient the parts that oppose other tasks' gradients, in random order.

  w are the coefficients of the sum of the gradients. `orders` holds a number made from each task's name, so that the
  order is the same however the tasks are listed.
  Source: gradient surgery, arXiv 2001.06782.
  """

  needs_gram: ClassVar[bool] = True
  orders: tuple[int, ...] = ()

  def weights(self, state: State, observed: WeightInputs) -> jax.Array:
    """Returns w `[T]`."""
    del state
    gram, t = observed.gram, len(self.prior)
    assert gram is not None
    length = jnp.diagonal(gram)

    def place(i: int) -> jax.Array:
      """Returns a random number for each task: task i projects on the others in the order of these numbers."""
      key = jax.random.fold_in(observed.key, self.orders[i])
      return jnp.stack([jax.random.uniform(jax.random.fold_in(key, o)) for o in self.orders])

    rows = []
    for i in range(t):
      order = jnp.argsort(place(i))

      def project(c: jax.Array, s: jax.Array, i: int = i) -> tuple[jax.Array, None]:
        dot = c @ gram[:, s]
        opposes = (dot < 0) & (s != i) & (length[s] > 0)
        return c.at[s].add(jnp.where(opposes, -dot / jnp.where(opposes, length[s], 1.0), 0.0)), None

      coefficients, _ = jax.lax.scan(project, jnp.eye(t)[i], order)
      rows.append(jnp.where(observed.present[i], coefficients, 0.0))
    w = sum(rows, jnp.zeros(t))
    return _sum_to_present(w, observed.present)


@dataclasses.dataclass(frozen=True)
class CaGrad(Weigher):
  """A weigher that finds the direction within `c` of the mean gradient whose worst agreement with a task is largest.

  Source: conflict-averse gradient descent, arXiv 2110.14048; exponentiated gradient solves the inner problem.
  """

  needs_gram: ClassVar[bool] = True
  c: float = 0.4

  def weights(self, state: State, observed: WeightInputs) -> jax.Array:
    """Returns w `[T]`."""
    del state
    assert observed.gram is not None
    present = observed.present & (jnp.diagonal(observed.gram) > 0)
    n = jnp.maximum(jnp.sum(present), 1)
    mean = present / n
    scale = jnp.maximum(jnp.mean(jnp.diagonal(observed.gram)), 1e-30)
    gram = observed.gram / scale
    radius = self.c * jnp.sqrt(jnp.maximum(mean @ gram @ mean, 1e-12))

    def spread(log: jax.Array) -> jax.Array:
      return jnp.where(present, jax.nn.softmax(jnp.where(present, log, -1e30)), 0.0)

    def length(w: jax.Array) -> jax.Array:
      return jnp.sqrt(jnp.maximum(w @ gram @ w, 1e-12))

    def descend(i: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      log, best, least = carry
      w = spread(log)
      value = w @ gram @ mean + radius * length(w)
      better = value < least
      best, least = jnp.where(better, w, best), jnp.where(better, value, least)
      slope = gram @ mean + radius * (gram @ w) / length(w)
      slope -= jnp.sum(w * slope)
      rate = 2.0 / jnp.sqrt(1.0 + i) / jnp.maximum(jnp.max(jnp.abs(slope) * present), 1e-12)
      return log - rate * slope, best, least

    start = jnp.zeros(len(self.prior))
    # The problem has a kink where gradients cancel, and steps jump over it: the best point seen is the answer.
    _, w, _ = jax.lax.fori_loop(0, CAGRAD_STEPS, descend, (start, spread(start), jnp.float32(jnp.inf)))
    toward = radius / length(w)
    # A task without a gradient at the representation (a contrast) keeps the weight of the mean.
    alone = observed.present & ~present
    return _sum_to_present(jnp.where(alone, 1.0 / n, mean + toward * w), observed.present)


def _sum_to_present(w: jax.Array, present: jax.Array) -> jax.Array:
  """Scales weights to mean 1 over the tasks present; absent tasks, which have no term in the loss, get 1."""
  w = jnp.where(present, w, 0.0)
  total = jnp.sum(w)
  return jnp.where(present, w * jnp.sum(present) / jnp.where(total > 0, total, 1.0), 1.0)


def comparison_weigher(settings: config.Weighting, tasks: Mapping[str, config.Task]) -> Weigher:
  """Returns the weigher of a config that names a method of others, for `tasks`, in their order."""
  equal = (1.0,) * len(tasks)
  if settings.method == "uncertainty":
    return Uncertainty(equal, settings.learning_rate)
  if settings.method == "famo":
    return Famo(equal, settings.learning_rate, settings.weight_decay)
  if settings.method == "pcgrad":
    return PcGrad(equal, tuple(zlib.crc32(n.encode()) & 0x7FFFFFFF for n in tasks))
  assert settings.method == "cagrad"
  return CaGrad(equal, settings.c)
