"""The multi-task loss with task indicators.

For task t with supervision indicator δ, per-sample loss ℓ, and B rows in a batch:

    y~  = where(δ, y, 0)                                  masked labels may be anything, NaN included
    L_t = 1 / (ρ_t · B) · Σ where(δ, ℓ(f(z), y~), 0)
    L   = Σ_t a_t · w_t · L_t / b_t + α · balance + β · z-loss

ρ_t is the mean number of labels a row under the sampler, fixed before training, so that L_t is unbiased and adds up over
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


@dataclasses.dataclass(frozen=True)
class TaskStatistics:
  """Constants of a task, measured on training rows.

  Attributes:
    rate: ρ, mean number of labels a row; 0 when none was met.
    constant_loss: b, mean loss a label of the best constant prediction.
  """

  rate: float
  constant_loss: float


class TaskLoss(NamedTuple):
  """A task in a batch: `total = Σ δℓ` and `count = Σ δ`, both float32 scalars."""

  total: jax.Array
  count: jax.Array


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


def task_loss(task: config.Task, logits: jax.Array, targets: Targets) -> TaskLoss:
  """Sums a task's loss over the samples that have a label; the others contribute nothing, whatever they hold."""
  known = jnp.asarray(targets.known)
  wide = known[..., None] if jnp.ndim(targets.value) > known.ndim else known
  value = jnp.where(wide, targets.value, 0)
  loss = jnp.where(known, per_sample(task, logits, value), 0.0)
  return TaskLoss(jnp.sum(loss), jnp.sum(known, dtype=jnp.float32))


def combine(
  losses: Mapping[str, TaskLoss], tasks: Mapping[str, config.Task], statistics: Mapping[str, TaskStatistics], rows: int
) -> jax.Array:
  """Returns `Σ_t a_t · w_t · L_t / b_t` for a batch of `rows` rows, with fixed weights w."""
  total = jnp.zeros(())
  for name, loss in losses.items():
    s = statistics[name]
    if s.rate:  # otherwise no label was met in the training data: the task contributes nothing
      normalised = loss.total / (s.rate * rows * s.constant_loss)
      total += jnp.where(loss.count > 0, tasks[name].weight * normalised, 0.0)
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
    name: task_loss(task, model.answers(name, encoded, events=True), batch.targets[name])
    for name, task in model.tasks.items()
  }
  total = combine(tasks, model.tasks, statistics, len(batch.features.length))
  total += train.balance_weight * jnp.sum(encoded.experts.balance_loss)
  total += train.z_weight * jnp.sum(encoded.experts.z_loss)
  return Loss(total, tasks, encoded)


def measure(
  tasks: Mapping[str, config.Task], outputs: Mapping[str, int], batches: Iterable[Batch], n_batches: int
) -> dict[str, TaskStatistics]:
  """Measures each task's label rate and constant loss over `n_batches` training batches."""
  rows = 0
  count = dict.fromkeys(tasks, 0)
  total = {n: np.zeros(outputs[n]) for n in tasks}
  for batch in itertools.islice(batches, n_batches):
    rows += len(batch.features.length)
    for name, task in tasks.items():
      targets = batch.targets[name]
      value = targets.value[targets.known]
      count[name] += len(value)
      if isinstance(task, config.NextEvent):
        total[name] += np.bincount(value - 2, minlength=outputs[name])
      else:
        total[name] += value.reshape(len(value), -1).sum(axis=0)
  return {n: TaskStatistics(count[n] / rows, _constant_loss(tasks[n], total[n], count[n])) for n in tasks}


def _constant_loss(task: config.Task, total: np.ndarray, count: int) -> float:
  """Entropy of the labels' distribution; 1 where it says nothing (no label, or all alike)."""
  share = total / max(count, 1)
  if isinstance(task, config.NextEvent):
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)))
  else:
    both = np.stack([share, 1 - share])
    entropy = np.mean(-np.sum(both * np.log(np.where(both > 0, both, 1)), axis=0))
  return float(entropy) if entropy > 1e-6 else 1.0
