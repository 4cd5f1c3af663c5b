"""Defines the metrics of a training step, and adds up the metrics of its micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from supermoe_jax import sharding
from supermoe_jax.batch import Batch
from supermoe_jax.layers.routing import RoutingSums, auxiliary
from supermoe_jax.training import losses, table_step
from supermoe_jax.training.task_losses import TaskLoss

T = TypeVar("T")


class StepMetrics(NamedTuple):
  """The metrics of a step, as sums, so that steps can be added up before ratios are taken.

  Attributes:
    loss: float32, the whole loss.
    tasks: Σ δωℓ and Σ δω of each task.
    weights: float32, w of each task.
    balance_loss, z_loss: float32, mean over the MoE layers.
    load: float32 `[M, E]`, each expert's share of the choices.
    entropy: float32 `[M]`, the entropy of the routers, in nats.
    routed, dropped: int32 `[M]`, choices that reached an expert, and choices that exceeded a capacity.
    task_dropped: int32, the dropped choices of each task's own tokens; empty without such tokens.
    slice_routed, slice_dropped: int32, the choices of the passes over contrast slices.
    events: int32, events that are not padding.
    snapshots: int32, snapshots that are not padding.
    positions: int32, events that the rows have room for.
    gradient_norm: float32, the norm before clipping, of parameters and rows together.
    learning_rate: float32.
    skipped: int32, 1 where the loss or the gradients are not finite, so that the step changed nothing.
    tables: the counts of each table, except tables that a full softmax scores.
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
  """The quantities of a pass over some rows that are summed over micro-batches; see `StepMetrics` and `Loss`."""

  tasks: dict[str, TaskLoss]
  pull: jax.Array
  routing: RoutingSums
  routed: jax.Array
  dropped: jax.Array
  task_dropped: jax.Array
  slice_routed: jax.Array
  slice_dropped: jax.Array


class PassMeans(NamedTuple):
  """The quantities of a pass over some rows that are averaged over micro-batches; see `StepMetrics`."""

  loss: jax.Array
  weights: jax.Array


class PassReport(NamedTuple):
  """The report of a pass over some rows: `sums` and `means`."""

  sums: PassSums
  means: PassMeans


def pass_report(out: losses.Loss) -> PassReport:
  """Returns the report of a pass, from its loss."""
  routing, stats = out.encoded.experts.sums, out.encoded.experts.stats
  by_task = jnp.sum(stats.task_dropped, axis=0)
  sums = PassSums(out.tasks, out.pull, routing, stats.routed, stats.dropped, by_task, *out.slices)
  return PassReport(sums, PassMeans(out.total, out.weights))


def sum_over_parts(function: Callable[[Batch, jax.Array], T], batch: Batch, key: jax.Array, parts: int) -> T:
  """Returns the sum of `function(rows, key)` over `parts` equal micro-batches.

  They are computed one after the other, so that only one is in memory. Each device deals its rows out to the
  micro-batches in turn, so that no row moves between devices.
  """

  def split(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(jnp.asarray(x).reshape(len(x) // parts, parts, *x.shape[1:]), 0, 1)
    return sharding.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

  rows = jax.tree.map(split, batch)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(parts))
  one = jax.tree.map(lambda x: x[0], (rows, keys))
  nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *one))

  def add(total: T, part: tuple[Batch, jax.Array]) -> tuple[T, None]:
    return jax.tree.map(jnp.add, total, function(*part)), None

  return jax.lax.scan(add, nothing, (rows, keys))[0]


def accumulate_over_parts(
  function: Callable[[Batch, jax.Array], tuple[T, PassReport]], batch: Batch, key: jax.Array, parts: int
) -> tuple[T, PassReport]:
  """Calls `function(rows, key)` on `parts` micro-batches; see `sum_over_parts`.

  Returns: the mean of the function's results, a tree of float arrays, and the report of all micro-batches together.
  """
  if parts == 1:
    return function(batch, key)
  value, total = sum_over_parts(function, batch, key, parts)
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
  """Returns the metrics of a step of `batch`; `names` are all tasks, `views` the tasks with tokens of their own.

  A model without such tokens has no `task_dropped`.
  """
  sums, means = of
  aux, layers = jax.vmap(auxiliary)(sums.routing), max(len(sums.routed), 1)
  return StepMetrics(
    loss=means.loss,
    tasks=sums.tasks,
    weights=dict(zip(names, means.weights)),
    balance_loss=jnp.sum(aux.balance_loss) / layers,
    z_loss=jnp.sum(aux.z_loss) / layers,
    load=sums.routing.load,
    entropy=sums.routing.mean_entropy,
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
