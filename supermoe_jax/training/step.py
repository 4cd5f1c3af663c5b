"""Makes the training step: one pure, jitted function on a mesh, which takes over the buffers of its state."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supermoe_jax import config, sharding
from supermoe_jax.batch import Batch, Schema
from supermoe_jax.layers.routing import BalanceBias, rebalanced
from supermoe_jax.layers.table import Layout, TableRows
from supermoe_jax.models.supermoe import SuperMoE
from supermoe_jax.training import losses, row_optimizers, step_metrics, table_step, weighting
from supermoe_jax.training.optimizer import make_optimizer, schedule
from supermoe_jax.training.row_optimizers import RowState
from supermoe_jax.training.step_metrics import StepMetrics
from supermoe_jax.training.task_losses import TaskStatistics

if TYPE_CHECKING:  # loaded only by a config that names a memory
  from supermoe_jax.layers.memory.head_memory import FollowRows

# Training settings that the compiled step does not depend on.
RUN_ONLY: tuple[str, ...] = ("seed", "workers", "checkpoint_every", "checkpoints_kept", "validate", "log_every")
RUN_ONLY += ("nonfinite_steps", "hang_seconds", "user_folds", "user_fold")


class TrainState(NamedTuple):
  """The state of training: everything that a step changes.

  Attributes:
    step: int32, the number of steps done, including skipped steps.
    skipped: int32, the number of steps that changed nothing else, since their loss or gradients were not finite.
    model: the model's variables: parameters, tables, and the routers' balancing biases if there are any.
    optimizer: the optax state of the parameters.
    slots: the row optimizer's state of each table.
    weighting: the state of the task weights.
    key: the key of all randomness; each step folds its number into it.
  """

  step: jax.Array
  skipped: jax.Array
  model: nnx.State
  optimizer: optax.OptState
  slots: dict[str, RowState]
  weighting: weighting.State
  key: jax.Array


# Jitted `(TrainState, Batch, {task: TaskStatistics}) → (TrainState, StepMetrics)`.
Step = jax.stages.Wrapped


def model_constructor(cfg: config.Config, schema: Schema, platform: str | None = None) -> Callable[..., SuperMoE]:
  """Returns a function that makes the model; call it under `nnx.eval_shape` or `jax.jit` to choose where it lives.

  The function takes the key of the initial parameters; without a key it uses the config's seed. `platform` is the
  platform of the devices that hold the tables; None: the platform of the mesh in use, or else JAX' default.
  """

  mesh, kept = cfg.train.mesh, cfg.train.tables
  ways = mesh.data * mesh.expert * mesh.tensor
  layout = Layout(ways, kept.cells, kept.dtype, platform)

  def make(key: jax.Array | None = None) -> SuperMoE:
    return SuperMoE(
      cfg.model,
      schema,
      cfg.active_tasks,
      balance_bias=cfg.train.balance_rate > 0,
      layout=layout,
      rngs=nnx.Rngs(params=cfg.train.seed if key is None else key),
    )

  return make


def abstract_model(cfg: config.Config, schema: Schema, platform: str | None = None) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns the model's structure and its variables' shapes, without allocating; see `model_constructor`."""
  return nnx.split(nnx.eval_shape(model_constructor(cfg, schema, platform)))


def create_state(
  cfg: config.Config,
  schema: Schema,
  mesh: Mesh,
  answers: Mapping[str, np.ndarray] | None = None,
  followers: Mapping[str, FollowRows] | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
  """Returns the model's structure and a new state, created in its place on the mesh; no host ever holds all of it.

  The heads of the tasks in `answers` start at these constant answers `[outputs]`, see `task_statistics.Measured`. The
  heads of the tasks in `followers` remember these counts; without them, a memory of followers is empty.
  """
  program = compiled_program(cfg, schema, mesh)
  with jax.set_mesh(mesh):
    keys = jax.random.key(cfg.train.seed), jax.random.PRNGKey(cfg.train.seed)
    state = program.initial(*keys, dict(answers or {}), dict(followers or {}))
  everywhere = NamedSharding(mesh, PartitionSpec())
  return program.graph, state._replace(weighting=jax.device_put(initial_weights(cfg), everywhere))


def abstract_state(cfg: config.Config, schema: Schema, mesh: Mesh) -> TrainState:
  """Returns the shapes and layouts of the state, without allocating it; a checkpoint is restored into them."""
  program, seed = compiled_program(cfg, schema, mesh), cfg.train.seed
  with jax.set_mesh(mesh):  # the keys are made inside `eval_shape`, since the mesh's devices may not exist
    shapes = jax.eval_shape(lambda: program.initial(jax.random.key(seed), jax.random.PRNGKey(seed), {}, {}))
  return jax.tree.map(
    lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout), shapes, program.layouts
  )


def initial_weights(cfg: config.Config) -> weighting.State:
  """Returns the state of the task weights before the first step."""
  state = weighting.make_weigher(cfg.train.weighting, cfg.active_tasks).initial()
  # Copies: a weigher's state may hold one array twice, and a step takes over each buffer only once.
  return jax.tree.map(jnp.copy, state)


class StepProgram(NamedTuple):
  """The compiled parts of a run; runs that differ only in their seed and the weights of tasks share one program.

  Attributes:
    graph: the model's structure.
    layouts: a `TrainState` of layouts.
    initial: `(key of the parameters, key of the training, the heads' first answers, followers) → TrainState`.
    step: see `make_step`.
  """

  graph: nnx.GraphDef
  layouts: TrainState
  initial: Callable[[jax.Array, jax.Array, dict[str, np.ndarray], dict[str, FollowRows]], TrainState]
  step: Step


def compiled_program(cfg: config.Config, schema: Schema, mesh: Mesh) -> StepProgram:
  """Returns the program of a config; a process compiles it once for all seeds and task weights."""
  train = dataclasses.replace(cfg.train, **{n: getattr(config.Train(), n) for n in RUN_ONLY})
  tasks = {n: dataclasses.replace(t, weight=1.0) for n, t in cfg.active_tasks.items()}
  same = dataclasses.replace(cfg, tasks=tasks, exclude_tasks=(), train=train, seesaw=config.Seesaw())
  # The order of keys has no meaning in a config; in a schema it is the order of the columns.
  text = json.dumps(config.to_dict(same), sort_keys=True) + json.dumps(config.to_dict(schema))
  return _program(_ProgramKey(text, mesh, same, schema))


@dataclasses.dataclass(frozen=True)
class _ProgramKey:
  """The cache key of a program: `text` and `mesh` identify it, and `text` holds all that matters of the rest."""

  text: str
  mesh: Mesh
  cfg: config.Config = dataclasses.field(compare=False)
  schema: Schema = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=4)
def _program(key: _ProgramKey) -> StepProgram:
  cfg, schema, mesh = key.cfg, key.schema, key.mesh
  platform = mesh.devices.flat[0].platform
  graph, abstract = abstract_model(cfg, schema, platform)
  layouts = state_shardings(cfg, abstract, mesh)
  optimizer, mover = make_optimizer(cfg.train), row_optimizers.make_row_optimizer(cfg.train.tables)
  weigher = weighting.make_weigher(cfg.train.weighting, cfg.active_tasks)

  def initial(
    parameters: jax.Array,
    training: jax.Array,
    answers: Mapping[str, jax.Array],
    followers: Mapping[str, FollowRows],
  ) -> TrainState:
    made = model_constructor(cfg, schema, platform)(parameters)
    for name, answer in answers.items():
      made.heads[name].start_at(answer)
    for name, rows in followers.items():
      made.memories[name].fill(rows)
    model = nnx.state(made)
    moments = optimizer.init(nnx.filter_state(model, nnx.Param))
    slots = {n: table_step.row_state(mover, v, cfg.model.d_model) for n, v in table_step.table_values(model).items()}
    return TrainState(jnp.int32(0), jnp.int32(0), model, moments, slots, weigher.initial(), training)

  return StepProgram(graph, layouts, jax.jit(initial, out_shardings=layouts), make_step(cfg, graph, mesh, layouts))


def state_shardings(cfg: config.Config, model: nnx.State, mesh: Mesh) -> Any:
  """Returns the layouts of a `TrainState`, from the shapes of the model's variables.

  The optimizer's moments lie with their parameters, and slots with their rows. Whatever is not sharded is replicated.
  """
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
  weigher = weighting.make_weigher(cfg.train.weighting, cfg.active_tasks)
  weights = jax.tree.map(lambda _: replicated, jax.eval_shape(weigher.initial))
  mover, rows = row_optimizers.make_row_optimizer(cfg.train.tables), table_step.table_values(model)
  kept = jax.eval_shape(lambda: {n: table_step.row_state(mover, v, cfg.model.d_model) for n, v in rows.items()})
  slots = table_step.row_state_shardings(kept, table_step.table_values(layout))
  layouts: Any = (replicated, replicated, layout, moments, slots, weights, replicated)
  return TrainState(*layouts)


def make_step(cfg: config.Config, graph: nnx.GraphDef, mesh: Mesh, layouts: Any) -> Step:
  """Returns the step `(state, batch, statistics) → (state, metrics)`, which donates the state's buffers.

  A step whose loss or gradients are not finite is counted, but changes nothing else. With `steps_per_call` k > 1 one
  call makes k steps on k batches `[k, B, ...]`, and the metrics have the leading dimension k too.
  """
  optimizer, mover = make_optimizer(cfg.train), row_optimizers.make_row_optimizer(cfg.train.tables)
  rate, kept = schedule(cfg.train), cfg.train.tables
  names = tuple(cfg.active_tasks)
  regularised = cfg.model.moe_every > 0 and any(
    (cfg.train.balance_weight, cfg.train.z_weight, cfg.train.task_information)
  )
  weigher = weighting.make_weigher(cfg.train.weighting, cfg.active_tasks)

  def step(state: TrainState, batch: Batch, statistics: Mapping[str, TaskStatistics]) -> tuple[TrainState, StepMetrics]:
    key = jax.random.fold_in(state.key, state.step)
    # What remains are counts that heads remember, which no step changes.
    rows, params, biases, counts = nnx.split_state(state.model, TableRows, nnx.Param, BalanceBias, ...)
    plan = table_step.plan_tables(graph, state.model, batch, key)
    found = plan.fetch(table_step.table_values(rows))

    def merged(params: nnx.State, found: dict[str, jax.Array]) -> SuperMoE:
      tables = table_step.with_table_values(rows, plan.readable(found))
      return nnx.merge(graph, tables, params, biases, counts, copy=True)

    routing = None  # of the whole batch, which the regularisers of its parts depend on
    if cfg.train.accumulate > 1 and regularised:
      whole = merged(params, found)
      routing = step_metrics.sum_over_parts(
        lambda part, key: losses.routing_sums(whole, part, key), batch, key, cfg.train.accumulate
      )

    def objective(
      params: nnx.State, found: dict[str, jax.Array], part: Batch, key: jax.Array
    ) -> tuple[jax.Array, step_metrics.PassReport]:
      out = losses.total_loss(
        merged(params, found),
        part,
        statistics,
        cfg.train,
        weigher,
        state.weighting,
        key=key,
        drawn=plan.drawn,
        routing=routing,
        parts=cfg.train.accumulate,
      )
      return out.total, step_metrics.pass_report(out)

    def differentiated(part: Batch, key: jax.Array) -> tuple[Any, step_metrics.PassReport]:
      gradients, told = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, found, part, key)
      return gradients, told

    (gradient, by_rows), told = step_metrics.accumulate_over_parts(differentiated, batch, key, cfg.train.accumulate)
    touched = plan.collect(table_step.table_values(rows), by_rows)
    norm = jnp.sqrt(jnp.square(optax.global_norm(gradient)) + table_step.square_norm(touched))
    most = cfg.train.clip_norm * len(names)  # the weights of the tasks sum to their number
    scale = jnp.where(norm > most, most / norm, 1.0)

    finite = jnp.isfinite(told.means.loss) & jnp.isfinite(norm)

    def kept_if_finite(new: Any, old: Any) -> Any:
      return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    updates, moments = optimizer.update(jax.tree.map(lambda g: g * scale, gradient), state.optimizer, params)
    moved, moments = kept_if_finite((optax.apply_updates(params, updates), moments), (params, state.optimizer))
    now = jnp.asarray(rate(state.step))
    draw = jax.random.fold_in(key, 2) if kept.dtype == "bfloat16" and kept.rounding == "stochastic" else None
    pace = kept.learning_rate * now / cfg.train.learning_rate
    rule = table_step.MoveRule(mover, pace, scale, kept.weight_decay, draw, finite)
    after, slots = table_step.move_all_rows(
      table_step.table_values(rows), state.slots, touched, rule, cfg.model.d_model
    )
    seen = losses.observed_losses(told.sums.tasks, statistics)._replace(pull=told.sums.pull)
    if weigher.needs_after:
      again = plan.fetch(after)
      _, then = step_metrics.accumulate_over_parts(
        lambda *part: objective(moved, again, *part), batch, key, cfg.train.accumulate
      )
      seen = seen._replace(after=losses.observed_losses(then.sums.tasks, statistics).mean)
    weights = kept_if_finite(weigher.update(state.weighting, seen), state.weighting)
    # Only the scanned MoE layers have biases: one variable [M, E], or none.
    balanced = jax.tree.map(lambda bias: rebalanced(bias, told.sums.routing.load, cfg.train.balance_rate), biases)
    tables = table_step.with_table_values(rows, after)
    model = nnx.merge_state(moved, tables, kept_if_finite(balanced, biases), counts)
    skipped = (~finite).astype(jnp.int32)
    metrics = step_metrics.make_step_metrics(
      told,
      names,
      tuple(cfg.active_views),
      batch,
      gradient_norm=norm,
      learning_rate=now,
      skipped=skipped,
      counts=plan.counts(touched),
    )
    return TrainState(state.step + 1, state.skipped + skipped, model, moments, slots, weights, state.key), metrics

  def steps(
    state: TrainState, batches: Batch, statistics: Mapping[str, TaskStatistics]
  ) -> tuple[TrainState, StepMetrics]:
    return jax.lax.scan(lambda state, batch: step(state, batch, statistics), state, batches)

  several = cfg.train.steps_per_call > 1
  replicated = NamedSharding(mesh, PartitionSpec())
  return jax.jit(
    steps if several else step,
    donate_argnums=0,
    in_shardings=(layouts, sharding.batch_sharding(mesh, stacked=several), replicated),
    out_shardings=(layouts, replicated),
  )


def place_on_mesh(batch: Any, mesh: Mesh, *, stacked: bool = False) -> Any:
  """Puts a batch on the mesh, with its rows over the batch axes; each host passes its own rows, see `host_rows`.

  `stacked`: several batches are stacked, and the rows are the second dimension.
  """
  layout = sharding.batch_sharding(mesh, stacked=stacked)
  if jax.process_count() == 1:
    return jax.device_put(batch, layout)  # all arrays at once
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(layout, np.asarray(x)), batch)
