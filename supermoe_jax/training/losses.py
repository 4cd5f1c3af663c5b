"""The multi-task loss with task indicators.

For task t with supervision indicator δ, per-sample loss ℓ, and B rows in a batch:

    y~  = where(δ, y, 0)                                  masked labels may be anything, NaN included
    L_t = 1 / (ρ_t · B) · Σ δ · ω · where(δ, ℓ(f(z), y~), 0)
    L   = Σ_t a_t · w_t · L_t / b_t + α · balance + β · z-loss

ρ_t is the mean of Σ δω a row under the sampler, fixed before training, so that L_t is unbiased and adds up over
micro-batches. b_t is the loss of the best constant prediction, so that tasks start on one scale. a_t is 0 in a batch
without a label of task t.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from supermoe_jax import config
from supermoe_jax.data.batches import Batch, Targets
from supermoe_jax.models.supermoe import Encoded, SuperMoE

# Times the usual number of batches after which `measure` no longer waits for rare labels.
LONGEST = 16


@dataclasses.dataclass(frozen=True)
class TaskStatistics:
  """Constants of a task, measured on training rows.

  Attributes:
    rate: ρ, mean of Σ δω a row; 0 when no label was met.
    constant_loss: b, mean loss a label of the best constant prediction.
    snapshot_weight: ω of a next-event label at a snapshot. There are many more at events; it gives both half of the
    loss,
      since the representation of a user is what the snapshots' tokens hold.
  """

  rate: float
  constant_loss: float
  snapshot_weight: float = 1.0


class TaskLoss(NamedTuple):
  """A task in a batch: `total = Σ δωℓ` and `weight = Σ δω`, both float32 scalars."""

  total: jax.Array
  weight: jax.Array


class Loss(NamedTuple):
  """The loss and its parts; `encoded` carries the experts' record."""

  total: jax.Array
  tasks: dict[str, TaskLoss]
  encoded: Encoded


def per_sample(task: config.Task, logits: jax.Array, value: jax.Array) -> jax.Array:
  """Returns ℓ for each sample; a task of many binary outputs averages over them.

  Shapes: next event `logits [..., items]`, `value [...]` codes ≥ 2; future values `logits, value [..., values]`;
  else `logits, value [...]`.
  """
  if isinstance(task, config.NextEvent):
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(value - 2, 0))
  loss = optax.sigmoid_binary_cross_entropy(logits, value)
  return jnp.mean(loss, axis=-1) if isinstance(task, config.FutureValues) else loss


def task_loss(task: config.Task, logits: jax.Array, targets: Targets, weight: jax.Array | float = 1.0) -> TaskLoss:
  """Sums a task's loss over the samples that have a label; the others contribute nothing, whatever they hold.

  `weight` is ω, of the shape of `targets.known` or one that broadcasts to it.
  """
  known = jnp.asarray(targets.known)
  wide = known[..., None] if jnp.ndim(targets.value) > known.ndim else known
  value = jnp.where(wide, targets.value, 0)
  weight = jnp.where(known, weight, 0.0)
  return TaskLoss(jnp.sum(weight * jnp.where(known, per_sample(task, logits, value), 0.0)), jnp.sum(weight))


def sample_weight(task: config.Task, statistics: TaskStatistics, events: int, snapshots: int) -> jax.Array | float:
  """Returns ω: 1, but for the snapshots of a next-event task (the last of its `events + snapshots` sites)."""
  if not isinstance(task, config.NextEvent):
    return 1.0
  return jnp.where(jnp.arange(events + snapshots) < events, 1.0, statistics.snapshot_weight)


def combine(
  losses: Mapping[str, TaskLoss], tasks: Mapping[str, config.Task], statistics: Mapping[str, TaskStatistics], rows: int
) -> jax.Array:
  """Returns `Σ_t a_t · w_t · L_t / b_t` for a batch of `rows` rows, with fixed weights w."""
  total = jnp.zeros(())
  for name, loss in losses.items():
    s = statistics[name]
    if s.rate:  # otherwise no label was met in the training data: the task contributes nothing
      normalised = loss.total / (s.rate * rows * s.constant_loss)
      total += jnp.where(loss.weight > 0, tasks[name].weight * normalised, 0.0)
  return total


def loss(
  model: SuperMoE,
  batch: Batch,
  statistics: Mapping[str, TaskStatistics],
  train: config.Train,
  *,
  rngs: Any | None = None,
) -> Loss:
  """Encodes a batch and returns its loss; with `rngs`, dropout is on."""
  encoded = model.encode(batch.features, dropless=False, rngs=rngs)
  tasks = {
    name: task_loss(
      task,
      model.answers(name, encoded, events=True),
      batch.targets[name],
      sample_weight(task, statistics[name], encoded.events.shape[1], encoded.z.shape[1]),
    )
    for name, task in model.tasks.items()
  }
  total = combine(tasks, model.tasks, statistics, len(batch.features.length))
  total += train.balance_weight * jnp.sum(encoded.experts.aux.balance_loss)
  total += train.z_weight * jnp.sum(encoded.experts.aux.z_loss)
  return Loss(total, tasks, encoded)


def measure(
  tasks: Mapping[str, config.Task],
  outputs: Mapping[str, int],
  batches: Iterable[Batch],
  n_batches: int,
  wanted: Mapping[str, int] | None = None,
) -> dict[str, TaskStatistics]:
  """Measures each task's label rate and constant loss over `n_batches` training batches.

  Goes on, up to `LONGEST` times as many, while a task has met fewer labels than `wanted` of it.
  """
  rows = 0
  count = dict.fromkeys(tasks, 0)
  at_snapshots = dict.fromkeys(tasks, 0)
  total = {n: np.zeros(outputs[n]) for n in tasks}
  for i, batch in enumerate(itertools.islice(batches, LONGEST * n_batches)):
    if i >= n_batches and all(count[n] >= least for n, least in (wanted or {}).items()):
      break
    rows += len(batch.features.length)
    for name, task in tasks.items():
      targets = batch.targets[name]
      value = targets.value[targets.known]
      count[name] += len(value)
      if isinstance(task, config.NextEvent):
        at_snapshots[name] += int(targets.known[:, batch.features.codes.shape[1] :].sum())
        total[name] += np.bincount(value - 2, minlength=outputs[name])
      else:
        total[name] += value.reshape(len(value), outputs[name]).sum(axis=0)
  return {n: _statistics(tasks[n], total[n], count[n], at_snapshots[n], rows) for n in tasks}


def _statistics(task: config.Task, total: np.ndarray, count: int, at_snapshots: int, rows: int) -> TaskStatistics:
  at_events = count - at_snapshots
  constant_loss = _constant_loss(task, total, count)
  if at_events and at_snapshots:
    return TaskStatistics(2 * at_events / rows, constant_loss, at_events / at_snapshots)
  return TaskStatistics(count / rows, constant_loss)


def _constant_loss(task: config.Task, total: np.ndarray, count: int) -> float:
  """Entropy of the labels' distribution; 1 where it says nothing (no label, or all alike)."""
  share = total / max(count, 1)
  if isinstance(task, config.NextEvent):
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)))
  else:
    both = np.stack([share, 1 - share])
    entropy = np.mean(-np.sum(both * np.log(np.where(both > 0, both, 1)), axis=0))
  return float(entropy) if entropy > 1e-6 else 1.0
