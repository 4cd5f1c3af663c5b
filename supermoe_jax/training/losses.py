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
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.batch import Batch, Slices, Targets
from supermoe_jax.layers import catalogue
from supermoe_jax.layers.heads import NextValueHead
from supermoe_jax.layers.routing import RoutingSums, auxiliary
from supermoe_jax.models.encoder import Encoded
from supermoe_jax.models.supermoe import SuperMoE, safe_value
from supermoe_jax.training import weighting
from supermoe_jax.training.answer_forms import form_by_loss
from supermoe_jax.training.sampled_softmax import drawing_rows, drawn_codes, log_expected_count, sampled_softmax


class TaskStatistics(NamedTuple):
  """Constants of a task, measured on training rows: numbers on the host, or scalars inside a step.

  Attributes:
    rate: ρ, the mean of Σ δω per row; 0 if no label was met.
    constant_loss: b, the mean loss per label of the best constant prediction.
    snapshot_weight: ω of a label at a snapshot, for a task that asks at events too. Events are far more frequent. This
      weight gives events and snapshots half of the loss each, since the snapshots' tokens hold the user representation.
  """

  rate: Any
  constant_loss: Any
  snapshot_weight: Any = 1.0


class TaskLoss(NamedTuple):
  """The sums of one task over a batch: `total = Σ δωℓ` and `weight = Σ δω`, both float32 scalars."""

  total: jax.Array
  weight: jax.Array


class Loss(NamedTuple):
  """The loss of a batch and its parts.

  Attributes:
    total: float32, the whole loss, which a step differentiates.
    tasks: the sums of each task.
    seen: which tasks have a label in the batch, and their losses, `[T]` each.
    weights: float32 `[T]`, the task weights w.
    encoded: the encoder's output: the states, and the record of the experts.
    slices: int32, the experts' counts `(routed, dropped)` in the passes over contrast slices.
  """

  total: jax.Array
  tasks: dict[str, TaskLoss]
  seen: weighting.ObservedLosses
  weights: jax.Array
  encoded: Encoded
  slices: tuple[jax.Array, jax.Array]


def task_loss(targets: Targets, loss: jax.Array, weight: jax.Array | float = 1.0) -> TaskLoss:
  """Returns the sums of `loss` over samples with a label; other samples contribute nothing, whatever they hold.

  `weight` multiplies ω; it has the shape of `targets.known` or broadcasts to it.
  """
  known = jnp.asarray(targets.known)
  omega = jnp.where(known, targets.weight * weight, 0.0)
  return TaskLoss(jnp.sum(omega * jnp.where(known, loss, 0.0)), jnp.sum(omega))


def snapshot_weight(task: config.Task, statistics: TaskStatistics, events: int, sites: int) -> jax.Array | float:
  """Returns the factor of ω at each of `sites` sites.

  It is 1, except at the snapshots of a task that also asks at events, whose first `events` sites are the events.
  """
  if not task.asks_at_events:
    return 1.0
  return jnp.where(jnp.arange(sites) < events, 1.0, statistics.snapshot_weight)


# ------------------------------------------------------------------------------------------------------------ contrast


def info_nce(z: jax.Array, known: jax.Array, temperature: float) -> TaskLoss:
  """Returns the InfoNCE loss of pairs `z [B, 2, D]`: each slice must find its partner in all pairs with `known [B]`.

  Source: CoLES, arXiv 2002.08232; the loss, arXiv 1807.03748.
  """
  b = len(known)
  unit = (z / jnp.sqrt(jnp.sum(z**2, axis=-1, keepdims=True) + 1e-12)).reshape(2 * b, -1)
  there = jnp.repeat(known, 2)
  score = unit @ unit.T / temperature
  score = jnp.where(there[None, :] & ~jnp.eye(2 * b, dtype=bool), score, -1e30)
  partner = jnp.arange(2 * b) ^ 1
  own = jnp.take_along_axis(score, partner[:, None], axis=1)[:, 0]
  loss = jnp.where(there, jax.nn.logsumexp(score, axis=1) - jnp.where(there, own, 0.0), 0.0)
  return TaskLoss(jnp.sum(loss), jnp.sum(there, dtype=jnp.float32))


# ------------------------------------------------------------------------------------------------------- the whole loss


def labelled_loss(
  model: SuperMoE,
  name: str,
  encoded: Encoded,
  targets: Targets,
  statistics: TaskStatistics,
  drawn: Mapping[str, jax.Array],
) -> TaskLoss:
  """Returns the sums of one task with labels, from encoded states; `drawn` holds the sampled softmaxes' codes.

  If the encoder makes the tasks' views beside z (`conditioning` is "token"), the head answers at the
  snapshots from the view and from z, and each answer has half of the weight: z is what is exported.
  """
  task, sites = model.tasks[name], targets.known.shape[1]
  events = encoded.events.shape[1] if task.asks_at_events else 0
  weight = jnp.broadcast_to(snapshot_weight(task, statistics, events, sites), (sites,))
  if encoded.views is None or model.sharing is not None:
    return _loss_of_answers(model, name, encoded, targets, weight, drawn)
  half = jnp.where(jnp.arange(sites) < events, 1.0, 0.5) * weight
  by_view = _loss_of_answers(model, name, encoded, targets, half, drawn)
  at_snapshots = jax.tree.map(lambda x: x[:, events:], targets)
  by_z = _loss_of_answers(model, name, encoded._replace(views=None), at_snapshots, half[events:], drawn, events=False)
  return jax.tree.map(jnp.add, by_view, by_z)


def _loss_of_answers(
  model: SuperMoE,
  name: str,
  encoded: Encoded,
  targets: Targets,
  weight: jax.Array,
  drawn: Mapping[str, jax.Array],
  *,
  events: bool = True,
) -> TaskLoss:
  """Returns the sums of a task with weights `weight [sites]`; without `events` the sites are the snapshots' only."""
  task, value = model.tasks[name], safe_value(targets)
  answers = model.answers(name, encoded, events=events, given=targets.given if task.about_events else None)
  if task.answer == "catalogue":
    also = jnp.where(jnp.asarray(targets.known)[..., None], targets.also, 0)
    right = jnp.concatenate([value[..., None], also], axis=-1)
    loss = _next_value_loss(model, name, cast(config.NextEvent, task), answers, right, drawn)
  else:
    loss = form_by_loss(task).loss(answers, value)
  return task_loss(targets, loss, weight)


def _next_value_loss(
  model: SuperMoE,
  name: str,
  task: config.NextEvent,
  state: jax.Array,
  right: jax.Array,
  drawn: Mapping[str, jax.Array],
) -> jax.Array:
  """Returns the softmax loss `[B, sites]`, full or sampled, of any of the codes `right [B, sites, m]`; 0: none."""
  table, head = model.encoder.event_embedding.table(task.field), model.heads[name]
  assert isinstance(head, NextValueHead)
  if task.softmax == "full":
    return catalogue.cross_entropy(state, right, head.catalogue(table))
  every = drawing_rows(len(drawn[name]), task.negatives)
  # Look all rows up before some are left out, since the remaining rows may not divide over the batch's devices.
  codes, vectors = drawn[name][::every].reshape(-1), table(drawn[name])[::every]
  # Every device scores its own states against all drawn values, so the values' rows travel, not the states.
  others = sharding.constrain(vectors.reshape(codes.size, -1), None, None)
  flat = sharding.constrain(codes, None)
  log_count = log_expected_count(task.sampling, flat - 2, table.size - 2, codes.size)
  return sampled_softmax(state, table(right), right, others, flat, log_count)


def _contrast(
  model: SuperMoE, task: config.Contrast, slices: Slices, rngs: nnx.Rngs | None
) -> tuple[TaskLoss, tuple[jax.Array, jax.Array]]:
  flat = jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), slices.features)
  encoded = model.encode(flat, dropless=False, rngs=rngs)
  z = encoded.z[:, 0].reshape(len(slices.known), 2, -1)
  stats = encoded.experts.stats
  return info_nce(z, slices.known, task.temperature), (jnp.sum(stats.routed), jnp.sum(stats.dropped))


def normalised(loss: TaskLoss, statistics: TaskStatistics, rows: int, norm: str) -> jax.Array:
  """Returns L^_t of a batch of `rows` rows; 0 without a label."""
  if norm == "rate":
    by = statistics.rate * rows
  else:
    by = loss.weight if norm == "batch" else jnp.ones(())
  there = (loss.weight > 0) & (by > 0)
  return jnp.where(there, loss.total / (jnp.where(there, by, 1.0) * statistics.constant_loss), 0.0)


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
  order = jax.random.fold_in(key, 1)
  encoded, rngs = _encode(model, batch, key, training)
  tasks: dict[str, TaskLoss] = {}
  slices = (jnp.int32(0), jnp.int32(0))
  for name, task in model.tasks.items():
    if not task.has_labels:
      tasks[name], counts = _contrast(model, cast(config.Contrast, task), batch.slices[name], rngs)
      slices = (slices[0] + counts[0], slices[1] + counts[1])
    else:
      tasks[name] = labelled_loss(model, name, encoded, batch.targets[name], statistics[name], drawn)
  met = observed_losses(tasks, statistics)
  gram = None
  if weigher.needs_gram:
    gram = gradient_products(model, encoded, batch, statistics, train.norm, drawn)
  weights = jax.lax.stop_gradient(weigher.weights(state, weighting.WeightInputs(met.present, gram, order)))
  total = combine(tasks, statistics, weights, len(batch.features.length), train.norm)
  own = encoded.experts.sums
  total += regularisers(own, train) if routing is None else _part_of_regularisers(own, routing, parts, train)
  return Loss(total, tasks, met, weights, encoded, slices)


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


def gradient_products(
  model: SuperMoE,
  encoded: Encoded,
  batch: Batch,
  statistics: Mapping[str, TaskStatistics],
  norm: str,
  drawn: Mapping[str, jax.Array],
) -> jax.Array:
  """Returns the inner products of the tasks' gradients `∂L^_t / ∂(events, z)` at the representation: float32 `[T, T]`.

  All tasks share `z [B, S, D]`; tasks that ask at events share the events' states `[B, L, D]` too. Contrast tasks read
  neither, so their products are 0.
  """
  at = jax.lax.stop_gradient((encoded.events, encoded.z))
  rows = len(batch.features.length)
  parts: list[tuple[jax.Array, jax.Array] | None] = []
  for name, task in model.tasks.items():
    if not task.has_labels:
      parts.append(None)
      continue

    def one(at: tuple[jax.Array, jax.Array], name: str = name) -> jax.Array:
      states = model.share(encoded._replace(events=at[0], z=at[1]))
      part = labelled_loss(model, name, states, batch.targets[name], statistics[name], drawn)
      return normalised(part, statistics[name], rows, norm)

    parts.append(jax.grad(one)(at))
  zero = jnp.zeros(())
  products = [
    [sum((jnp.vdot(a, b) for a, b in zip(one, other)), zero) if one and other else zero for other in parts]
    for one in parts
  ]
  return jax.lax.stop_gradient(jnp.stack([jnp.stack(row) for row in products]))
