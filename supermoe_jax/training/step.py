"""The training step: one pure, jitted, donated function on a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supermoe_jax import config, sharding
from supermoe_jax.data.batches import Batch
from supermoe_jax.data.dataset import Schema
from supermoe_jax.layers.routing import BalanceBias, rebalanced
from supermoe_jax.models.supermoe import SuperMoE
from supermoe_jax.training import losses
from supermoe_jax.training.losses import TaskLoss, TaskStatistics
from supermoe_jax.training.optimizer import make_optimizer, schedule


class TrainState(NamedTuple):
  """Everything that a step changes.

  Attributes:
    step: int32, steps done.
    model: the model's variables: parameters, and the routers' balancing biases if there are any.
    optimizer: optax' state, of the parameters.
    key: the key of all randomness; a step folds its number into it.
  """

  step: jax.Array
  model: nnx.State
  optimizer: optax.OptState
  key: jax.Array


class StepMetrics(NamedTuple):
  """What a step reports; sums, so that steps can be added up before ratios are taken.

  Attributes:
    loss: float32, the whole loss.
    tasks: Σ δωℓ and Σ δω of each task.
    balance_loss, z_loss: float32, mean over the MoE layers.
    load: float32 `[M, E]`.
    entropy: float32 `[M]`, of the routers, in nats.
    routed, dropped: int32 `[M]`.
    events: int32, events that are not padding.
    gradient_norm: float32, before clipping.
    learning_rate: float32.
  """

  loss: jax.Array
  tasks: dict[str, TaskLoss]
  balance_loss: jax.Array
  z_loss: jax.Array
  load: jax.Array
  entropy: jax.Array
  routed: jax.Array
  dropped: jax.Array
  events: jax.Array
  gradient_norm: jax.Array
  learning_rate: jax.Array


Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def build(cfg: config.Config, schema: Schema) -> Callable[[], SuperMoE]:
  """Returns the constructor of the model; call it under `nnx.eval_shape` or `jax.jit` to choose where it lives."""
  return lambda: SuperMoE(
    cfg.model,
    schema,
    cfg.active_tasks,
    balance_bias=cfg.train.balance_rate > 0,
    rngs=nnx.Rngs(params=cfg.train.seed),
  )


def abstract_model(cfg: config.Config, schema: Schema) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns the model's structure and its variables' shapes, without allocating any."""
  return nnx.split(nnx.eval_shape(build(cfg, schema)))


def create_state(cfg: config.Config, schema: Schema, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
  """Creates the state directly in its place on the mesh; no host ever holds the whole of it."""
  graph, abstract = abstract_model(cfg, schema)
  layouts = state_shardings(cfg, abstract, mesh)
  optimizer = make_optimizer(cfg.train)

  def initial() -> TrainState:
    model = nnx.state(build(cfg, schema)())
    moments = optimizer.init(nnx.filter_state(model, nnx.Param))
    return TrainState(jnp.int32(0), model, moments, jax.random.PRNGKey(cfg.train.seed))

  with jax.set_mesh(mesh):
    return graph, jax.jit(initial, out_shardings=layouts)()


def state_shardings(cfg: config.Config, model: nnx.State, mesh: Mesh) -> Any:
  """A `TrainState` of layouts: the optimizer's moments lie with their parameters, the rest is replicated."""
  replicated = NamedSharding(mesh, PartitionSpec())
  layout = sharding.shardings(mesh, model)
  params, where = nnx.filter_state(model, nnx.Param), nnx.filter_state(layout, nnx.Param)
  optimizer = make_optimizer(cfg.train)
  moments = optax.tree.map_params(
    optimizer,
    lambda _, lies: lies,
    jax.eval_shape(optimizer.init, params),
    where,
    transform_non_params=lambda _: replicated,
  )
  layouts: Any = (replicated, layout, moments, replicated)
  return TrainState(*layouts)


def make_step(
  cfg: config.Config, graph: nnx.GraphDef, statistics: Mapping[str, TaskStatistics], mesh: Mesh, layouts: Any
) -> Step:
  """Returns the step `(state, batch) → (state, metrics)`; the state's buffers are donated."""
  optimizer = make_optimizer(cfg.train)
  rate = schedule(cfg.train)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    rngs_key = jax.random.fold_in(state.key, state.step)
    params, biases = nnx.split_state(state.model, nnx.Param, BalanceBias)

    def objective(params: nnx.State) -> tuple[jax.Array, losses.Loss]:
      model = nnx.merge(graph, params, biases, copy=True)
      out = losses.loss(model, batch, statistics, cfg.train, rngs=nnx.Rngs(dropout=rngs_key))
      return out.total, out

    (_, out), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    updates, moments = optimizer.update(gradient, state.optimizer, params)
    aux, stats = out.encoded.experts
    layers = max(len(stats.load), 1)
    metrics = StepMetrics(
      loss=out.total,
      tasks=out.tasks,
      balance_loss=jnp.sum(aux.balance_loss) / layers,
      z_loss=jnp.sum(aux.z_loss) / layers,
      load=stats.load,
      entropy=stats.entropy,
      routed=stats.routed,
      dropped=stats.dropped,
      events=jnp.sum(batch.features.length),
      gradient_norm=optax.global_norm(gradient),
      learning_rate=jnp.asarray(rate(state.step)),
    )
    # The only biases are those of the scanned MoE layers: one variable [M, E], or none.
    biases = jax.tree.map(lambda bias: rebalanced(bias, stats.load, cfg.train.balance_rate), biases)
    model = nnx.merge_state(optax.apply_updates(params, updates), biases)
    return TrainState(state.step + 1, model, moments, state.key), metrics

  replicated = NamedSharding(mesh, PartitionSpec())
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(layouts, sharding.batch_sharding(mesh)),
    out_shardings=(layouts, replicated),
  )


def place(batch: Any, mesh: Mesh) -> Any:
  """Puts a batch of host arrays on the mesh, rows over the batch axes."""
  return jax.device_put(batch, sharding.batch_sharding(mesh))
