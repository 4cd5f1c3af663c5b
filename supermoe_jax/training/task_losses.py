"""Computes each task's loss from its supervision indicators, and its gradient at the representation.

The module `losses` combines the losses, and explains the symbols.

A head reads the representation: the states of events and snapshots. A task that has stopped moves its head only: no
gradient of its loss reaches the representation or a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from supermoe_jax import config, sharding
from supermoe_jax.batch import Batch, Targets
from supermoe_jax.layers import catalogue
from supermoe_jax.layers.heads import NextValueHead, scaled_gradient
from supermoe_jax.models.encoder import Encoded
from supermoe_jax.models.supermoe import SuperMoE, safe_value
from supermoe_jax.training.answer_forms import form_by_loss
from supermoe_jax.training.sampled_softmax import drawing_rows, log_expected_count, sampled_softmax

if TYPE_CHECKING:  # loaded only by a config that names a memory
  from supermoe_jax.layers.memory.remembered import Remembered


class TaskStatistics(NamedTuple):
  """Constants of a task, measured on training rows: numbers on the host, or scalars inside a step.

  Attributes:
    rate: ρ, the mean of Σ δω per row; 0 if no label was met.
    constant_loss: b, the mean loss per label of the best constant prediction.
    snapshot_weight: ω of a label at a snapshot, for a task that asks at events too. Events are far more frequent. This
      weight gives events and snapshots half of the loss each, since the snapshots' tokens hold the user representation.
    independent: n, how many independent labels of equal weight tell as much as a row's labels, on average.
    averaged: the square of a label's gradient over that of a row's mean, on average. It is `rate` for independent
      labels, and the share of rows with a label if all labels of a row are copies of one.
    gradient_scale: 1; 0 for a task that has stopped to pull on the encoder, so that its loss only moves its head.
  """

  rate: Any
  constant_loss: Any
  snapshot_weight: Any = 1.0
  independent: Any = 1.0
  averaged: Any = 1.0
  gradient_scale: Any = 1.0


class TaskLoss(NamedTuple):
  """The sums of one task over a batch: `total = Σ δωℓ` and `weight = Σ δω`, both float32 scalars."""

  total: jax.Array
  weight: jax.Array


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


def normalised(loss: TaskLoss, statistics: TaskStatistics, rows: int, norm: str) -> jax.Array:
  """Returns L^_t of a batch of `rows` rows; 0 without a label."""
  if norm == "rate":
    by = statistics.rate * rows
  else:
    by = loss.weight if norm == "batch" else jnp.ones(())
  there = (loss.weight > 0) & (by > 0)
  return jnp.where(there, loss.total / (jnp.where(there, by, 1.0) * statistics.constant_loss), 0.0)


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


def task_sums(
  model: SuperMoE,
  name: str,
  encoded: Encoded,
  slices: Mapping[str, jax.Array],
  batch: Batch,
  statistics: TaskStatistics,
  drawn: Mapping[str, jax.Array],
) -> TaskLoss:
  """Returns the sums of one task.

  `slices [B, 2, D]` holds the contrast tasks' z, and `drawn` the codes of the sampled softmaxes.
  """
  task = model.tasks[name]
  if task.has_labels:
    return labelled_loss(model, name, encoded, batch.targets[name], statistics, drawn)
  z = scaled_gradient(slices[name], statistics.gradient_scale)
  return info_nce(z, batch.slices[name].known, cast(config.Contrast, task).temperature)


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
  scale = statistics.gradient_scale
  if encoded.views is None or model.sharing is not None:
    return _loss_of_answers(model, name, encoded, targets, weight, drawn, scale)
  half = jnp.where(jnp.arange(sites) < events, 1.0, 0.5) * weight
  by_view = _loss_of_answers(model, name, encoded, targets, half, drawn, scale)
  only_z, at_snapshots = encoded._replace(views=None), jax.tree.map(lambda x: x[:, events:], targets)
  by_z = _loss_of_answers(model, name, only_z, at_snapshots, half[events:], drawn, scale, events=False)
  return jax.tree.map(jnp.add, by_view, by_z)


def _loss_of_answers(
  model: SuperMoE,
  name: str,
  encoded: Encoded,
  targets: Targets,
  weight: jax.Array,
  drawn: Mapping[str, jax.Array],
  scale: jax.Array | float,
  *,
  events: bool = True,
) -> TaskLoss:
  """Returns the sums of a task with weights `weight [sites]`; without `events` the sites are the snapshots' only."""
  task, value = model.tasks[name], safe_value(targets)
  given = targets.given if task.about_events else None
  answers = model.answers(name, encoded, events=events, given=given, gradient_scale=scale)
  if task.answer == "catalogue":
    also = jnp.where(jnp.asarray(targets.known)[..., None], targets.also, 0)
    right = jnp.concatenate([value[..., None], also], axis=-1)
    remembered = model.remembered(name, encoded, events=events)
    loss = _next_value_loss(model, name, cast(config.NextEvent, task), answers, right, remembered, drawn, scale)
  else:
    loss = form_by_loss(task).loss(answers, value)
  return task_loss(targets, loss, weight)


def _next_value_loss(
  model: SuperMoE,
  name: str,
  task: config.NextEvent,
  state: jax.Array,
  right: jax.Array,
  remembered: tuple[Remembered, ...],
  drawn: Mapping[str, jax.Array],
  scale: jax.Array | float,
) -> jax.Array:
  """Returns the softmax loss `[B, sites]`, full or sampled, of any of the codes `right [B, sites, m]`; 0: none."""
  table, head = model.encoder.event_embedding.table(task.field), model.heads[name]
  assert isinstance(head, NextValueHead)
  if task.softmax == "full":
    whole = head.catalogue(table)
    whole = whole._replace(rows=scaled_gradient(whole.rows, scale))
    return catalogue.cross_entropy(state, right, whole, remembered=remembered)
  every = drawing_rows(len(drawn[name]), task.negatives)
  # Look all rows up before some are left out, since the remaining rows may not divide over the batch's devices.
  codes, vectors = drawn[name][::every].reshape(-1), scaled_gradient(table(drawn[name]), scale)[::every]
  # Every device scores its own states against all drawn values, so the values' rows travel, not the states.
  others = sharding.constrain(vectors.reshape(codes.size, -1), None, None)
  flat = sharding.constrain(codes, None)
  log_count = log_expected_count(task.sampling, flat - 2, table.size - 2, codes.size)
  own = scaled_gradient(table(right), scale)
  return sampled_softmax(state, own, right, others, flat, log_count, remembered)


class Representation(NamedTuple):
  """What the tasks share: the states that their heads read.

  Attributes:
    events: `[B, L, D]`, the states of the events.
    z: `[B, S, D]`, the states of the snapshots.
    views: `[B, S, T, D]`, the states of the task tokens; None without them.
    slices: `[B, 2, D]`, z of two slices of each row, for each contrast task.
  """

  events: jax.Array
  z: jax.Array
  views: jax.Array | None
  slices: dict[str, jax.Array]

  def read_by(self, model: SuperMoE, encoded: Encoded) -> Encoded:
    """Returns what the heads read: these states, and all else from `encoded`."""
    states = encoded._replace(events=self.events, z=self.z)
    return model.share(states) if self.views is None else states._replace(views=self.views)


def measured_pull(
  measures: jax.Array,
  sums: Callable[[str, Representation, TaskStatistics], TaskLoss],
  at: Representation,
  statistics: Mapping[str, TaskStatistics],
) -> jax.Array:
  """Returns Σ ‖∂ Σ δωℓ / ∂ row‖² / b² of each task, over the rows of the representation, float32 `[T]`.

  `sums(task, representation, statistics)` gives a task's sums. If `measures` is false, nothing is computed and all are
  0. A task that has stopped is measured as if it pulled, so that its head's share of the loss stays as it was.
  """

  def square(name: str, at: Representation) -> jax.Array:
    pulling = statistics[name]._replace(gradient_scale=1.0)
    gradient = jax.grad(lambda at: sums(name, at, pulling).total)(at)
    return sum((jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)), jnp.zeros(()))

  def measure(at: Representation) -> jax.Array:
    return jnp.stack([square(n, at) / jnp.square(s.constant_loss) for n, s in statistics.items()])

  return jax.lax.cond(measures, measure, lambda at: jnp.zeros(len(statistics)), jax.lax.stop_gradient(at))


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
