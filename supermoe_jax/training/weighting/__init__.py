"""Weighs the losses of the tasks.

A weigher gives weights w `[T]`, positive, of sum T, through which no gradient flows. The weights depend on a state that
earlier batches shaped. So the weight of a task that is present does not depend on which other tasks are present. A
batch without a label of a task leaves the task's part of the state unchanged.

The methods of others, with which `seesaw` is compared, are in the module `comparisons`, which is read only if a config
names one of them.

Shapes: T tasks, in the order of their names. For the symbols a, b, δ, ω, ℓ and L^ see `losses`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from supermoe_jax import config

State = dict[str, Any]

# Steps at which `seesaw` measures the tasks' gradients: all of the first ones, when they change fast, then few.
FIRST_MEASURED, MEASURED_EVERY = 8, 16


class WeightInputs(NamedTuple):
  """The inputs of the weights, apart from the state.

  Attributes:
    present: bool `[T]`, a: whether the batch has a label of the task.
    gram: float32 `[T, T]`, inner products of the tasks' gradients, for a weigher that needs them; else None.
    key: the key of random orders.
    independent: float32 `[T]`, n: how many independent labels a row has that weigh alike, in the mean.
    averaged: float32 `[T]`, the square of a label's gradient over that of the mean over a row's labels.
  """

  present: jax.Array
  gram: jax.Array | None
  key: jax.Array
  independent: jax.Array
  averaged: jax.Array


class ObservedLosses(NamedTuple):
  """The losses of a step, from which a weigher learns.

  Attributes:
    present: bool `[T]`, a: whether the batch has a label of the task.
    total, labels: float32 `[T]`, Σ δωℓ / b, and Σ δω.
    after: float32 `[T]`, mean loss of a label, divided by b, on the same batch after the step, for a weigher that needs
      it; else None.
    pull: float32 `[T]`, the sum over the batch's rows of the squares of `∂ Σ δωℓ / ∂(events, z)`, divided by b², for a
      weigher that needs it; else None.
  """

  present: jax.Array
  total: jax.Array
  labels: jax.Array
  after: jax.Array | None = None
  pull: jax.Array | None = None

  @property
  def mean(self) -> jax.Array:
    """Returns the mean loss of a label, divided by b, `[T]`; 0 for absent tasks."""
    return jnp.where(self.present, self.total / jnp.where(self.present, self.labels, 1.0), 0.0)


def sum_to_tasks(share: jax.Array) -> jax.Array:
  """Scales positive shares `[T]` to sum T."""
  return share * share.shape[0] / jnp.sum(share)


@dataclasses.dataclass(frozen=True)
class Weigher:
  """A weigher with fixed weights in the proportion of `prior`; the other weighers are subclasses."""

  prior: tuple[float, ...]
  needs_gram: ClassVar[bool] = False
  needs_after: ClassVar[bool] = False
  needs_pull: ClassVar[bool] = False

  def initial(self) -> State:
    """Returns the state before the first step; it holds the config's numbers, so that one program serves them all."""
    return {"prior": jnp.array(self.prior, jnp.float32)}

  def measures(self, state: State) -> jax.Array:
    """Returns whether the step with this state measures the tasks' pulls, bool."""
    del state
    return jnp.bool_(False)

  def weights(self, state: State, observed: WeightInputs) -> jax.Array:
    """Returns w `[T]`."""
    del observed
    return sum_to_tasks(state["prior"])

  def update(self, state: State, seen: ObservedLosses) -> State:
    """Returns the state after a step."""
    del seen
    return state


@dataclasses.dataclass(frozen=True)
class SeesawWeights(Weigher):
  """A weigher that sets how hard each task pulls on the encoder: by the number of its labels.

  `w ∝ π · n^β / ‖g‖`. ‖g‖ is the norm of the gradient of L^ at the representation, so that w‖g‖ is the task's pull. At
  equal weights the size of the gradients decides: the pulls of MovieLens 1M's five tasks span 27 to 1. n is the number
  of independent labels per row. A mean over few labels is mostly noise. For a given noise of the sum, β = 1/2 gives the
  most progress, if one label of each task says as much about where its gradient points (`docs/seesaw.md` derives it).
  β = 0 makes all pulls equal.

  ‖g‖ comes from a moving average of the square of a label's gradient, and is measured at some steps only, since a
  measurement passes back through all heads once more. The method is this project's own.
  """

  needs_pull: ClassVar[bool] = True
  exponent: float = 0.5  # β
  decay: float = 0.9  # of the moving average, per measurement

  def initial(self) -> State:
    """Returns the state before the first step."""
    zero = jnp.zeros(len(self.prior))
    return {**super().initial(), "square": zero, "labels": zero, "steps": zero}

  def measures(self, state: State) -> jax.Array:
    """Returns whether the step with this state measures: the first steps do, and then every `MEASURED_EVERY`-th."""
    done = jnp.max(state["steps"])
    return (done < FIRST_MEASURED) | (done % MEASURED_EVERY == 0)

  def weights(self, state: State, observed: WeightInputs) -> jax.Array:
    """Returns w `[T]`; a task that was never measured has the geometric mean of the others' gradients."""
    seen = (state["square"] > 0) & (state["labels"] > 0)
    of_a_label = 0.5 * jnp.log(jnp.where(seen, state["square"] / jnp.where(seen, state["labels"], 1.0), 1.0))
    typical = jnp.sum(jnp.where(seen, of_a_label, 0.0)) / jnp.maximum(jnp.sum(seen), 1)
    log_norm = jnp.where(seen, of_a_label, typical) - 0.5 * jnp.log(observed.averaged)
    log = jnp.log(state["prior"]) + self.exponent * jnp.log(observed.independent) - log_norm
    return sum_to_tasks(jax.nn.softmax(log))

  def update(self, state: State, seen: ObservedLosses) -> State:
    """Returns the state after a step; a step without a measurement changes the count of steps only."""
    assert seen.pull is not None
    measured = seen.present & self.measures(state)
    new = {"square": self.decay * state["square"] + seen.pull, "labels": self.decay * state["labels"] + seen.labels}
    moved = {k: jnp.where(measured, new[k], state[k]) for k in new}
    return {**state, **moved, "steps": jnp.where(seen.present, state["steps"] + 1, state["steps"])}


def make_weigher(settings: config.Weighting, tasks: Mapping[str, config.Task]) -> Weigher:
  """Returns the weigher of a config for `tasks`, in their order."""
  prior = tuple(task.weight for task in tasks.values())
  if settings.method == "equal":
    return Weigher((1.0,) * len(tasks))
  if settings.method == "static":
    return Weigher(prior)
  if settings.method == "seesaw":
    return SeesawWeights(prior, settings.labels_exponent, settings.gradient_decay)
  others = importlib.import_module("supermoe_jax.training.weighting.comparisons")
  weigher: Weigher = others.comparison_weigher(settings, tasks)
  return weigher
