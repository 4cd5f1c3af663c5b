"""Weighs the losses of the tasks.

A weigher gives weights w `[T]`, positive, of sum T, through which no gradient flows. The weights of the loss methods
depend only on a state that earlier batches shaped. So the weight of a task that is present does not depend on which
other tasks are present. A batch without a label of a task leaves the task's part of the state unchanged.

The gradient methods (`pcgrad`, `cagrad`) find the weights from the inner products of the tasks' gradients. They take
the gradients at the representation instead of at all shared parameters: an approximation that costs T passes through
the heads rather than T through the model.

Shapes: T tasks, in the order of their names. For the symbols a, b, δ, ω, ℓ and L^ see `losses`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from supermoe_jax import config

State = dict[str, Any]

# Steps that solve CAGrad's inner problem; it is convex in T weights, and each step costs T² products.
CAGRAD_STEPS = 200


class WeightInputs(NamedTuple):
  """The inputs of the weights, apart from the state.

  Attributes:
    present: bool `[T]`, a: whether the batch has a label of the task.
    gram: float32 `[T, T]`, inner products of the tasks' gradients, for a weigher that needs them; else None.
    key: the key of random orders.
  """

  present: jax.Array
  gram: jax.Array | None
  key: jax.Array


class ObservedLosses(NamedTuple):
  """The losses of a step, from which a weigher learns.

  Attributes:
    present: bool `[T]`, a: whether the batch has a label of the task.
    total, labels: float32 `[T]`, Σ δωℓ / b, and Σ δω.
    after: float32 `[T]`, mean loss of a label, divided by b, on the same batch after the step, for a weigher that needs
      it; else None.
  """

  present: jax.Array
  total: jax.Array
  labels: jax.Array
  after: jax.Array | None = None

  @property
  def mean(self) -> jax.Array:
    """Returns the mean loss of a label, divided by b, `[T]`; 0 for absent tasks."""
    return jnp.where(self.present, self.total / jnp.where(self.present, self.labels, 1.0), 0.0)


def _sum_to_tasks(share: jax.Array) -> jax.Array:
  return share * share.shape[0] / jnp.sum(share)


@dataclasses.dataclass(frozen=True)
class Weigher:
  """A weigher with fixed weights in the proportion of `prior`; the other weighers are subclasses."""

  prior: tuple[float, ...]
  needs_gram: ClassVar[bool] = False
  needs_after: ClassVar[bool] = False

  def initial(self) -> State:
    """Returns the state before the first step; it holds the config's numbers, so that one program serves them all."""
    return {"prior": jnp.array(self.prior, jnp.float32)}

  def weights(self, state: State, observed: WeightInputs) -> jax.Array:
    """Returns w `[T]`."""
    del observed
    return _sum_to_tasks(state["prior"])

  def update(self, state: State, seen: ObservedLosses) -> State:
    """Returns the state after a step."""
    del seen
    return state


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
    return _sum_to_tasks(jax.nn.softmax(-state["log"]))

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
    return _sum_to_tasks(jax.nn.softmax(state["log"]) / state["last"])

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
class SeesawWeights(Weigher):
  """A weigher that gives most to the task furthest behind the loss that it could reach alone.

  `w ∝ softmax(log π + r/μ) / avg`, `r = log(avg/R)`. avg is a moving average of the task's loss, weighted by its
  labels. R is the loss that a model of that task alone reaches; if it is not given, R is avg when the task's warm-up
  ends. Large μ is plain log-loss balancing; at μ = 1 the average cancels and the weights are fixed, π/R; μ → 0 serves
  the worst task only. The method is this project's own.
  """

  references: tuple[float, ...] = ()  # 0: not given
  decay: float = 0.98
  mu: float = 1.0  # the best of .3, 1 and 3 on validation, in `experiments/seesaw_simulated.py`
  warmup_steps: int = 50

  def initial(self) -> State:
    """Returns the state before the first step."""
    zero = jnp.zeros(len(self.prior))
    moving = dict.fromkeys(("total", "count", "steps"), zero)
    return {**super().initial(), **moving, "reference": jnp.array(self.references, jnp.float32)}

  def weights(self, state: State, observed: WeightInputs) -> jax.Array:
    """Returns w `[T]`."""
    del observed
    average = self.average(state)
    referred = state["reference"] > 0
    behind = jnp.where(referred, jnp.log(average / jnp.where(referred, state["reference"], 1.0)), 0.0)
    share = jax.nn.softmax(jnp.log(state["prior"]) + behind / self.mu)
    return _sum_to_tasks(share / average)

  def average(self, state: State) -> jax.Array:
    """Returns the moving average of each loss, divided by b, `[T]`; before the first label 1, a constant's loss."""
    seen = state["count"] > 0
    return jnp.where(seen, jnp.maximum(state["total"] / jnp.where(seen, state["count"], 1.0), 1e-6), 1.0)

  def update(self, state: State, seen: ObservedLosses) -> State:
    """Returns the state after a step."""
    new = {
      **state,
      "total": self.decay * state["total"] + seen.total,
      "count": self.decay * state["count"] + seen.labels,
      "steps": state["steps"] + 1,
    }
    ends = (new["steps"] >= self.warmup_steps) & (new["reference"] == 0)
    new["reference"] = jnp.where(ends, self.average(new), new["reference"])
    return {k: jnp.where(seen.present, new[k], state[k]) for k in new}


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


def make_weigher(settings: config.Weighting, tasks: Mapping[str, config.Task]) -> Weigher:
  """Returns the weigher of a config for `tasks`, in their order."""
  prior = tuple(task.weight for task in tasks.values())
  equal = (1.0,) * len(tasks)
  if settings.method == "uncertainty":
    return Uncertainty(equal, settings.learning_rate)
  if settings.method == "famo":
    return Famo(equal, settings.learning_rate, settings.weight_decay)
  if settings.method == "seesaw":
    references = tuple(settings.references.get(n, 0.0) for n in tasks)
    return SeesawWeights(prior, references, settings.decay, settings.mu, settings.warmup_steps)
  if settings.method == "pcgrad":
    return PcGrad(equal, tuple(zlib.crc32(n.encode()) & 0x7FFFFFFF for n in tasks))
  if settings.method == "cagrad":
    return CaGrad(equal, settings.c)
  return Weigher(prior if settings.method == "static" else equal)
