"""What a step reports of itself, and how that of its parts adds up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from supermoe_jax import sharding
from supermoe_jax.batch import Batch
from supermoe_jax.training import losses, table_step
from supermoe_jax.training.losses import TaskLoss

T = TypeVar("T")


class StepMetrics(NamedTuple):
  """What a step reports; sums, so that steps can be added up before ratios are taken.

  Attributes:
    loss: float32, the whole loss.
    tasks: Σ δωℓ and Σ δω of each task.
    weights: float32, w of each task.
    balance_loss, z_loss: float32, mean over the MoE layers.
    load: float32 `[M, E]`.
    entropy: float32 `[M]`, of the routers, in nats.
    routed, dropped: int32 `[M]`.
    task_dropped: int32, the drops of each task's own tokens, where it has any.
    slice_routed, slice_dropped: int32, of the passes over contrast slices.
    events: int32, events that are not padding.
    snapshots: int32, snapshots that are not padding.
    positions: int32, events that the rows have room for.
    gradient_norm: float32, before clipping, of parameters and rows together.
    learning_rate: float32.
    skipped: int32, 1 where the loss or the gradients are not finite, so that the step changed nothing.
    tables: what was asked of each table, but for those that a full softmax scores.
  """

  loss: jax.Array
  tasks: dict[str, TaskLoss]
  weights: dict[str, jax.Array]
  balance_loss: jax.Array
  z_loss: jax.Array
  load: jax.Array
  entropy: jax.Array
  routed: jax.Array
  dropped: jax.Array
  task_dropped: dict[str, jax.Array]
  slice_routed: jax.Array
  slice_dropped: jax.Array
  events: jax.Array
  snapshots: jax.Array
  positions: jax.Array
  gradient_norm: jax.Array
  learning_rate: jax.Array
  skipped: jax.Array
  tables: dict[str, table_step.TableCounts]


class PassSums(NamedTuple):
  """What a pass over some rows tells that adds up; see `StepMetrics`."""

  tasks: dict[str, TaskLoss]
  routed: jax.Array
  dropped: jax.Array
  task_dropped: jax.Array
  slice_routed: jax.Array
  slice_dropped: jax.Array


class PassMeans(NamedTuple):
  """What a pass over some rows tells that is averaged; see `StepMetrics`."""

  loss: jax.Array
  weights: jax.Array
  balance_loss: jax.Array
  z_loss: jax.Array
  load: jax.Array
  entropy: jax.Array


class PassReport(NamedTuple):
  """What a pass tells: `sums` and `means`."""

  sums: PassSums
  means: PassMeans


def pass_report(out: losses.Loss) -> PassReport:
  """What a loss tells besides its value."""
  aux, stats = out.encoded.experts.aux, out.encoded.experts.stats
  layers = max(len(stats.load), 1)
  by_task = jnp.sum(stats.task_dropped, axis=0)
  sums = PassSums(out.tasks, stats.routed, stats.dropped, by_task, *out.slices)
  balance, z = jnp.sum(aux.balance_loss) / layers, jnp.sum(aux.z_loss) / layers
  return PassReport(sums, PassMeans(out.total, out.weights, balance, z, stats.load, stats.entropy))


def accumulate_over_parts(
  function: Callable[[Batch, jax.Array], tuple[T, PassReport]], batch: Batch, key: jax.Array, parts: int
) -> tuple[T, PassReport]:
  """Calls `function(rows, key)` on equal parts of a batch, one after the other, so that only one is in memory.

  Returns the mean of what it returns, a tree of float arrays, and what was told of all parts. Each device's rows are
  dealt out to the parts in turn: none moves.
  """
  if parts == 1:
    return function(batch, key)

  def split(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(jnp.asarray(x).reshape(len(x) // parts, parts, *x.shape[1:]), 0, 1)
    return sharding.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

  rows = jax.tree.map(split, batch)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(parts))
  one = jax.tree.map(lambda x: x[0], (rows, keys))
  nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *one))

  def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, function(*part)), None

  (value, total), _ = jax.lax.scan(add, nothing, (rows, keys))
  value, means = jax.tree.map(lambda x: x / parts, (value, total.means))
  return value, PassReport(total.sums, means)


def make_step_metrics(
  of: PassReport,
  names: tuple[str, ...],
  views: tuple[str, ...],
  batch: Batch,
  *,
  gradient_norm: jax.Array,
  learning_rate: jax.Array,
  skipped: jax.Array,
  counts: dict[str, table_step.TableCounts],
) -> StepMetrics:
  """The metrics of a step of `batch`; `names` are the tasks, `views` those that have tokens of their own, if any."""
  sums, means = of
  return StepMetrics(
    loss=means.loss,
    tasks=sums.tasks,
    weights=dict(zip(names, means.weights)),
    balance_loss=means.balance_loss,
    z_loss=means.z_loss,
    load=means.load,
    entropy=means.entropy,
    routed=sums.routed,
    dropped=sums.dropped,
    task_dropped=dict(zip(views, sums.task_dropped)) if sums.task_dropped.size else {},
    slice_routed=sums.slice_routed,
    slice_dropped=sums.slice_dropped,
    events=jnp.sum(batch.features.length),
    snapshots=jnp.sum(batch.features.query_valid, dtype=jnp.int32),
    positions=jnp.int32(batch.features.segment.size),
    gradient_norm=gradient_norm,
    learning_rate=learning_rate,
    skipped=skipped,
    tables=counts,
  )
