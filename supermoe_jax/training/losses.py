"""Computes the multi-task loss, in which a sample counts only for the tasks that it has a label of.

For task t with supervision indicator δ, sample weight ω, per-sample loss ℓ, and B rows in a batch:

    y~  = where(δ, y, 0)                                  masked labels may have any value, even NaN
    L_t = 1 / (ρ_t · B) · Σ δ · ω · where(δ, ℓ(f(z), y~), 0)
    L^_t = L_t / b_t
    L   = Σ_t a_t · stop_grad(w_t) · L^_t + α · balance + β · z-loss − γ · information

ρ_t is the mean of Σ δω per row under the sampler, fixed before training, so that L_t is unbiased and adds up over
micro-batches (`norm="rate"`; `batch` divides by the batch's own Σ δω, `sum` by nothing). b_t is the loss of the best
constant prediction, so that all tasks start on one scale. a_t is 1, or 0 in a batch without a label of task t. The
module `weighting` gives the weights w.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import config
from supermoe_jax.batch import Batch, Slices
from supermoe_jax.layers.routing import RoutingSums, auxiliary
from supermoe_jax.models.encoder import Encoded
from supermoe_jax.models.supermoe import SuperMoE
from supermoe_jax.training import weighting
from supermoe_jax.training.sampled_softmax import drawn_codes
from supermoe_jax.training.task_losses import (
  Representation,
  TaskLoss,
  TaskStatistics,
  gradient_products,
  measured_pull,
  normalised,
  task_sums,
)


class Loss(NamedTuple):
  """The loss of a batch and its parts.

  Attributes:
    total: float32, the loss that a step differentiates.
    tasks: the sums of each task.
    seen: which tasks have a label in the batch, and their losses, `[T]` each.
    weights: float32 `[T]`, the task weights w.
    pull: float32 `[T]`, see `weighting.ObservedLosses`; 0 where the weigher does not measure.
    encoded: the encoder's output: the states, and the record of the experts.
    slices: int32, the experts' counts `(routed, dropped)` in the passes over contrast slices.
  """

  total: jax.Array
  tasks: dict[str, TaskLoss]
  seen: weighting.ObservedLosses
  weights: jax.Array
  pull: jax.Array
  encoded: Encoded
  slices: tuple[jax.Array, jax.Array]


def _encoded_slices(
  model: SuperMoE, slices: Slices, rngs: nnx.Rngs | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns z of a contrast's slices `[B, 2, D]`, and the experts' counts `(routed, dropped)`."""
  flat = jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), slices.features)
  encoded = model.encode(flat, dropless=False, rngs=rngs)
  stats = encoded.experts.stats
  return encoded.z[:, 0].reshape(len(slices.known), 2, -1), (jnp.sum(stats.routed), jnp.sum(stats.dropped))


def combine(
  losses: Mapping[str, TaskLoss],
  statistics: Mapping[str, TaskStatistics],
  weights: jax.Array,
  rows: int,
  norm: str = "rate",
) -> jax.Array:
  """Returns `Σ_t a_t · stop_grad(w_t) · L^_t` of a batch of `rows` rows; `weights [T]` has the order of `losses`."""
  terms = [normalised(loss, statistics[name], rows, norm) for name, loss in losses.items()]
  w = jax.lax.stop_gradient(weights)
  # Not a product with a_t, since the weight of an absent task may not be finite.
  return sum((jnp.where(losses[n].weight > 0, w[i] * terms[i], 0.0) for i, n in enumerate(losses)), jnp.zeros(()))


def observed_losses(
  losses: Mapping[str, TaskLoss], statistics: Mapping[str, TaskStatistics]
) -> weighting.ObservedLosses:
  """Returns the tasks' losses in a batch, `[T]` each, in the order of `losses`."""
  total = jnp.stack([loss.total / statistics[n].constant_loss for n, loss in losses.items()])
  labels = jnp.stack([loss.weight for loss in losses.values()])
  return weighting.ObservedLosses(labels > 0, total, labels)


def total_loss(
  model: SuperMoE,
  batch: Batch,
  statistics: Mapping[str, TaskStatistics],
  train: config.Train,
  weigher: weighting.Weigher,
  state: weighting.State,
  *,
  key: jax.Array,
  drawn: Mapping[str, jax.Array] | None = None,
  routing: RoutingSums | None = None,
  parts: int = 1,
  training: bool = True,
) -> Loss:
  """Encodes a batch, or a part of one, and returns its loss.

  Args:
    model: the model.
    batch: B rows.
    statistics: the constants of each active task.
    train: the settings of training: norm and regularisers.
    weigher: gives the task weights.
    state: the weigher's state before this batch.
    key: the key of dropout, jitter, sampled softmaxes and random orders.
    drawn: the codes of the sampled softmaxes; None: `key` draws them.
    routing: for a part of a batch, the sums of the whole batch, see `routing_sums`; None: the batch is whole.
    parts: the number of parts of the batch, whose losses' mean is the loss of the whole batch.
    training: whether dropout and jitter are on.
  """
  if drawn is None:
    drawn = drawn_codes(model, batch, key)
  encoded, rngs = _encode(model, batch, key, training)
  of_slices: dict[str, jax.Array] = {}
  slices = (jnp.int32(0), jnp.int32(0))
  for name in (n for n, t in model.tasks.items() if not t.has_labels):
    of_slices[name], counts = _encoded_slices(model, batch.slices[name], rngs)
    slices = (slices[0] + counts[0], slices[1] + counts[1])
  tasks = {n: task_sums(model, n, encoded, of_slices, batch, statistics[n], drawn) for n in model.tasks}
  measured = {n: statistics[n] for n in tasks}
  met = observed_losses(tasks, statistics)
  gram, pull = None, jnp.zeros(len(tasks))
  if weigher.needs_gram:
    gram = gradient_products(model, encoded, batch, statistics, train.norm, drawn)
  if weigher.needs_pull:
    at = Representation(encoded.events, encoded.z, encoded.views if model.sharing is None else None, of_slices)

    def sums(name: str, at: Representation, of: TaskStatistics) -> TaskLoss:
      return task_sums(model, name, at.read_by(model, encoded), at.slices, batch, of, drawn)

    pull = measured_pull(weigher.measures(state), sums, at, measured)
  constants = (jnp.stack([jnp.float32(getattr(s, k)) for s in measured.values()]) for k in ("independent", "averaged"))
  inputs = weighting.WeightInputs(met.present, gram, jax.random.fold_in(key, 1), *constants)
  weights = jax.lax.stop_gradient(weigher.weights(state, inputs))
  total = combine(tasks, statistics, weights, len(batch.features.length), train.norm)
  own = encoded.experts.sums
  total += regularisers(own, train) if routing is None else _part_of_regularisers(own, routing, parts, train)
  return Loss(total, tasks, met, weights, pull, encoded, slices)


def _encode(model: SuperMoE, batch: Batch, key: jax.Array, training: bool) -> tuple[Encoded, nnx.Rngs | None]:
  rngs = nnx.Rngs(key) if training else None
  return model.encode(batch.features, dropless=False, rngs=rngs), rngs


def routing_sums(model: SuperMoE, batch: Batch, key: jax.Array) -> RoutingSums:
  """Returns the sums of the MoE layers' routing in the pass of `total_loss` with the same arguments: `[M, …]` each."""
  return jax.lax.stop_gradient(_encode(model, batch, key, True)[0].experts.sums)


def regularisers(routing: RoutingSums, train: config.Train) -> jax.Array:
  """Returns the regularisers `α · balance + β · z-loss − γ · information`, summed over the MoE layers."""
  aux = jax.vmap(auxiliary)(routing)
  total = train.balance_weight * jnp.sum(aux.balance_loss) + train.z_weight * jnp.sum(aux.z_loss)
  return total - train.task_information * jnp.sum(aux.mutual_information)


def _part_of_regularisers(part: RoutingSums, whole: RoutingSums, parts: int, train: config.Train) -> jax.Array:
  """Returns a term whose mean over all parts of a batch has value and gradient of `regularisers(whole)`.

  The regularisers depend on sums over the whole batch, and each part adds to these sums. So its gradient is the slope
  at the whole batch's sums times the gradient of its own.
  """
  value, slope = jax.value_and_grad(regularisers)(whole, train)
  along = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, part)), jnp.zeros(()))
  return value + parts * (along - jax.lax.stop_gradient(along))
