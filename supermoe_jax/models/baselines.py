"""Implements strong simple models to compare with: a recurrent encoder, and the task views of MMoE and PLE over any z.

The shared-bottom model is `SuperMoE` with `conditioning="none"`: every head reads z.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.batch import Features, Schema
from supermoe_jax.layers.attention import visibility
from supermoe_jax.layers.moe import Mlp
from supermoe_jax.layers.table import ONE_DEVICE, Layout
from supermoe_jax.models.encoder import Encoded, embed_rows, make_embeddings, no_experts, shown_aggregates


class ExpertMlps(nnx.Module):
  """E parallel MLPs, each with one hidden layer and a GELU: `[B, S, D] → [B, S, E, D]`."""

  def __init__(self, d_model: int, hidden: int, experts: int, *, rngs: nnx.Rngs):
    # The MLPs are small and every token visits each one, so every device holds them whole, except for the hidden units.
    up = jax.random.normal(rngs.params(), (experts, d_model, hidden)) * d_model**-0.5
    down = jax.random.normal(rngs.params(), (experts, hidden, d_model)) * hidden**-0.5
    self.up = sharding.param(up, None, "embed", "mlp")
    self.up_bias = sharding.param(jnp.zeros((experts, hidden)), None, "mlp")
    self.down = sharding.param(down, None, "mlp", "embed")
    self.down_bias = sharding.param(jnp.zeros((experts, d_model)), None, "embed")

  def __call__(self, x: jax.Array) -> jax.Array:
    """Runs every MLP on every token of `x [B, S, D]`; products accumulate in float32."""
    up, down = (sharding.constrain(p.get_value(), None, None, None).astype(x.dtype) for p in (self.up, self.down))
    hidden = jnp.einsum("bsd,edh->bseh", x, up, preferred_element_type=jnp.float32) + self.up_bias.get_value()
    hidden = sharding.constrain(jax.nn.gelu(hidden).astype(x.dtype), "batch", None, None, "mlp")
    out = jnp.einsum("bseh,ehd->bsed", hidden, down, preferred_element_type=jnp.float32) + self.down_bias.get_value()
    return sharding.constrain(out, "batch", None, None, None).astype(x.dtype)


class TaskGates(nnx.Module):
  """Softmax over experts for each task, in float32; all experts weigh alike at first.

  Source: multi-gate mixture-of-experts, https://doi.org/10.1145/3219819.3220007.
  """

  def __init__(self, d_model: int, experts: int, tasks: int):
    self.kernel = sharding.param(jnp.zeros((tasks, d_model, experts)), None, "embed", None)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `x [B, S, D]` to gates, float32 `[B, S, T, E]`, which sum to 1 over E."""
    kernel = self.kernel.get_value().astype(jnp.float32)
    logits = jnp.einsum("bsd,tde->bste", x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.softmax(logits, axis=-1)


def _mix(gates: jax.Array, outputs: jax.Array) -> jax.Array:
  """Returns outputs `[B, S, E, D]` mixed by gates `[B, S, T, E]`: `[B, S, T, D]`."""
  return jnp.einsum("bste,bsed->bstd", gates, outputs, preferred_element_type=jnp.float32).astype(outputs.dtype)


class MMoE(nnx.Module):
  """Multi-gate mixture-of-experts: E experts that all tasks share, and a gate over them for each task.

  Source: https://doi.org/10.1145/3219819.3220007.
  """

  def __init__(self, d_model: int, hidden: int, experts: int, tasks: int, *, rngs: nnx.Rngs):
    """Creates `experts` MLPs of `hidden` units, and gates for `tasks` tasks."""
    self.experts = ExpertMlps(d_model, hidden, experts, rngs=rngs)
    self.gates = TaskGates(d_model, experts, tasks)

  def __call__(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps `z [B, S, D]` to the tasks' views `[B, S, T, D]` and their gates, float32 `[B, S, T, E]`."""
    gates = self.gates(z)
    return _mix(gates, self.experts(z)), gates


class PLE(nnx.Module):
  """Progressive layered extraction: levels of experts, some shared and some for one task only.

  At each level, the gate of a task mixes the task's own experts and the shared ones, by the task's state. The shared
  state is mixed from all experts; the last level has none, because nothing uses it. All states start as z.

  Source: https://doi.org/10.1145/3383313.3412236.
  """

  def __init__(
    self,
    d_model: int,
    hidden: int,
    shared_experts: int,
    task_experts: int,
    tasks: int,
    levels: int,
    *,
    rngs: nnx.Rngs,
  ):
    """Creates `levels` levels of `shared_experts` MLPs and `task_experts` for each of `tasks` tasks.

    Raises:
      ValueError: there is no level, or one kind has no expert.
    """
    if min(shared_experts, task_experts, levels) < 1:
      raise ValueError(
        f"shared_experts={shared_experts}, task_experts={task_experts}, levels={levels}: at least 1 each"
      )
    self.levels = nnx.List(
      [
        _Level(d_model, hidden, shared_experts, task_experts, tasks, shares=i + 1 < levels, rngs=rngs)
        for i in range(levels)
      ]
    )

  def __call__(self, z: jax.Array) -> tuple[jax.Array, None]:
    """Maps `z [B, S, D]` to the tasks' views `[B, S, T, D]` and None. The gates of the levels are not returned."""
    shared: jax.Array | None = z
    own = [z] * len(self.levels[0].tasks)
    for level in self.levels:
      assert shared is not None  # only the last level returns none
      shared, own = level(shared, own)
    return jnp.stack(own, axis=2), None


class _Level(nnx.Module):
  """Level of PLE; with `shares` it returns a shared state."""

  def __init__(self, d_model: int, hidden: int, shared: int, own: int, tasks: int, *, shares: bool, rngs: nnx.Rngs):
    self.shared = ExpertMlps(d_model, hidden, shared, rngs=rngs)
    self.shared_gate = TaskGates(d_model, shared + tasks * own, 1) if shares else None
    # The initial experts of a task do not depend on the number of tasks.
    key = rngs.params()
    keys = [jax.random.fold_in(key, t) for t in range(tasks)]
    self.tasks = nnx.List([ExpertMlps(d_model, hidden, own, rngs=nnx.Rngs(params=k)) for k in keys])
    self.gates = nnx.List([TaskGates(d_model, own + shared, 1) for _ in range(tasks)])

  def __call__(self, shared: jax.Array, own: list[jax.Array]) -> tuple[jax.Array | None, list[jax.Array]]:
    """Maps the shared state `[B, S, D]` and the T tasks' own states to the states of the next level."""
    common = self.shared(shared)
    outputs = [mlps(x) for mlps, x in zip(self.tasks, own, strict=True)]
    mixed = [
      _mix(gate(x), jnp.concatenate([out, common], axis=2))[:, :, 0] for gate, x, out in zip(self.gates, own, outputs)
    ]
    if self.shared_gate is None:
      return None, mixed
    return _mix(self.shared_gate(shared), jnp.concatenate([*outputs, common], axis=2))[:, :, 0], mixed


class GRUEncoder(nnx.Module):
  """Encoder of gated recurrent units over events; a snapshot reads the state after the last event that it sees.

  Events and snapshots are embedded as for the transformer, and z has the same property: it depends on the events that
  its snapshot sees and on nothing else.

  Source: arXiv 1406.1078; over events for the next one, arXiv 1511.06939.
  """

  def __init__(self, model: config.Model, schema: Schema, *, layout: Layout = ONE_DEVICE, rngs: nnx.Rngs):
    """Creates `model.layers` layers of `model.d_model` units; `layout` is for the tables."""
    d, dtype = model.d_model, jnp.dtype(model.dtype)
    self.event_embedding, self.query_embedding = make_embeddings(model, schema, layout, rngs)
    self.cells = nnx.List([nnx.GRUCell(d, d, dtype=dtype, rngs=rngs) for _ in range(model.layers)])
    self.query_mlp = Mlp(d, 2 * d, rngs=rngs)
    self.dropout, self.value_dropout = nnx.Dropout(model.dropout), model.value_dropout
    self.norm = nnx.RMSNorm(d, rngs=rngs)
    self.experts, self.k = model.experts, model.experts_per_token

  def __call__(self, features: Features, *, dropless: bool, rngs: nnx.Rngs | None = None) -> Encoded:
    """Encodes a batch; with `rngs`, dropout is on. Nothing is ever dropped, so `dropless` has no effect."""

    def drop(x: jax.Array) -> jax.Array:
      return self.dropout(x, deterministic=rngs is None, rngs=rngs)

    events, queries = embed_rows(self.event_embedding, self.query_embedding, features, self.value_dropout, rngs)
    states = sharding.constrain(events, "batch", None, None)
    visible, position = visibility(features.segment, features.query_segment, features.query_events)
    (batch, length), snapshots = features.segment.shape, features.query_segment.shape[1]
    first = (position[:, :length] == 0) & (features.segment > 0)
    for cell in self.cells:
      states = _recurrent(cell, drop(states), first)
    seen, last = position[:, length:], visible.end[:, length:] - 1
    before = jnp.take_along_axis(states, jnp.maximum(last, 0)[..., None], axis=1)
    before = jnp.where((seen > 0)[..., None], before, 0.0)
    state, aggregates = self.norm(drop(before) + self.query_mlp(queries)), features.query_aggregates
    z = self.query_embedding.add_aggregates(state, aggregates)
    record = no_experts(self.experts, self.k, batch, length, snapshots)
    return Encoded(
      self.norm(drop(states)), z, None, None, record, shown_aggregates(features, training=rngs is not None)
    )


def _recurrent(cell: nnx.GRUCell, x: jax.Array, first: jax.Array) -> jax.Array:
  """Returns the states `[B, L, D]` of a recurrent layer after each input of `x [B, L, D]`.

  The state is 0 at the start, and again before each input with `first [B, L]`, which marks the first event of a user.
  """
  graph, state = nnx.split(cell)

  def step(h: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    x, first = now
    h, _ = nnx.merge(graph, state)(jnp.where(first[:, None], 0.0, h), x)
    return h, h

  _, states = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), (x.swapaxes(0, 1), first.swapaxes(0, 1)))
  return states.swapaxes(0, 1)
