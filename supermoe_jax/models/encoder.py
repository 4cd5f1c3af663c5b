"""Encodes a row of events and snapshots as one representation per snapshot, and each task's view of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.batch import ABSENT, CALENDAR, Features, Schema
from supermoe_jax.layers.attention import visibility, with_task_tokens
from supermoe_jax.layers.event_embedding import EventEmbedding, QueryEmbedding
from supermoe_jax.layers.moe import Mlp, MoE, MoEOutput, Stats
from supermoe_jax.layers.routing import RoutingSums
from supermoe_jax.layers.table import ONE_DEVICE, Layout
from supermoe_jax.layers.transformer import Block, Context, Stack

if TYPE_CHECKING:  # loaded only by a config that names a memory
  from supermoe_jax.layers.memory.remembered import Remembered


class ExpertRecord(NamedTuple):
  """Record of the MoE layers' routing; every array has a leading dimension of M layers (M = 0 without any).

  Attributes:
    sums: the sums from which `layers.routing.auxiliary` makes the terms for the loss.
    stats: see `layers.moe.Stats`; its `expert [M, B, S, K]` covers the snapshots' tokens only.
    task_expert: int32 `[M, B, S, T, K]`, the experts of the task tokens; None without task tokens.
    event_expert: int32 `[M, B, L, K]`, the experts of the events; a program that does not use it does not keep it.
  """

  sums: RoutingSums
  stats: Stats
  task_expert: jax.Array | None
  event_expert: jax.Array


class Encoded(NamedTuple):
  """Output of an encoder for B rows of L events and S snapshots, with T tasks.

  Attributes:
    events: `[B, L, D]`, the states of the events, the same for all tasks.
    z: `[B, S, D]`, the user representations, independent of the tasks.
    views: `[B, S, T, D]`, each task's view of a user; None where every task sees z itself.
    gates: float32 `[B, S, T, E]`, the weights of the experts that a view is mixed from; None where no gates mix views.
    experts: record of the MoE layers.
    aggregates: `[B, S, A]`, those of the features, in which some heads read a user's own counts of values; in training
      half of the snapshots have none.
    remembered: the counts of each task whose head has a memory, at the L events and S snapshots.
  """

  events: jax.Array
  z: jax.Array
  views: jax.Array | None
  gates: jax.Array | None
  experts: ExpertRecord
  aggregates: jax.Array
  remembered: Mapping[str, tuple[Remembered, ...]] | None = None


def task_key(key: jax.Array, name: str) -> jax.Array:
  """Returns the key of a task's initial parameters, which depends on the task's name but not on the other tasks."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def make_embeddings(
  model: config.Model, schema: Schema, layout: Layout, rngs: nnx.Rngs
) -> tuple[EventEmbedding, QueryEmbedding]:
  """Creates the event and snapshot embeddings with which every encoder reads a row."""
  d = model.d_model
  fields = schema.categorical, schema.inputs, schema.numeric_inputs
  events = EventEmbedding(
    d,
    len(schema.sources),
    *fields,
    CALENDAR,
    time_unit=model.time_unit,
    extra_columns=schema.extra_columns,
    shares=schema.shares,
    vectors=schema.vectors,
    layout=layout,
    rngs=rngs,
  )
  plain = schema.plain_aggregates if model.aggregates == "beside" else None
  sizes = d, CALENDAR, schema.aggregates, plain, range(*schema.factors)
  return events, QueryEmbedding(*sizes, time_unit=model.time_unit, rngs=rngs)


def embed_rows(
  event_embedding: EventEmbedding,
  query_embedding: QueryEmbedding,
  features: Features,
  value_dropout: float = 0.0,
  rngs: nnx.Rngs | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the embeddings of a batch: of its events `[B, L, D]` and of its snapshots `[B, S, D]`.

  With `rngs` each categorical value and each vector of an event is absent with the probability `value_dropout`. So no
  event is known by one value alone, and users are not learned by heart by their rare values.
  """
  codes, vectors = features.codes, features.vectors
  if rngs is not None and value_dropout:
    kept = jax.random.bernoulli(rngs.dropout(), 1 - value_dropout, codes.shape)
    codes = jnp.where(kept, codes, ABSENT)
    if event_embedding.vectors is not None:
      vectors = event_embedding.without_some_vectors(vectors, value_dropout, rngs.dropout())
  events = event_embedding(codes, features.source, features.numeric, features.calendar, features.gap, vectors)
  return events, query_embedding(features.query_calendar, features.query_gap, features.query_aggregates)


class Encoder(nnx.Module):
  """Encoder that turns a row of L events and S snapshots into one user representation per snapshot, in one pass.

  A snapshot's z depends on the events it sees and on nothing else: not on later events, other snapshots, padding, the
  tasks, other users of the row, or, when nothing is dropped, other rows.

  With `conditioning="token"` each snapshot gets T task tokens, the snapshot's embedding plus a learned vector of the
  task. A task token sees its snapshot, and what the snapshot sees. The routers see the task. The states of the task
  tokens, plus the map of the aggregates, are the tasks' views, which depend on the same events only.
  """

  def __init__(
    self,
    model: config.Model,
    schema: Schema,
    tasks: Sequence[str] = (),
    *,
    balance_bias: bool = False,
    layout: Layout = ONE_DEVICE,
    rngs: nnx.Rngs,
  ):
    """Creates the encoder.

    `layout` is for its tables. `tasks` are the names of the T tasks that have a view (unless `conditioning` gives
    none).
    """
    d = model.d_model
    self.tokens = len(tasks) if model.conditioning == "token" else 0
    self.shuffled = model.task_ids == "shuffled"
    self.event_embedding, self.query_embedding = make_embeddings(model, schema, layout, rngs)
    self.dropout, self.value_dropout = nnx.Dropout(model.dropout), model.value_dropout
    make = _make_block(model, balance_bias, self.tokens)
    self.stack = Stack(make, model.layers, model.moe_every, remat=model.remat, rngs=rngs)
    self.norm = nnx.RMSNorm(d, rngs=rngs)
    self.experts, self.k = model.experts, model.experts_per_token
    # These come last and depend on names, so that all other parameters are the same whatever tasks there are.
    key = rngs.params()
    vectors = [jax.random.normal(task_key(key, name), (d,)) * d**-0.5 for name in tasks]
    self.task_vectors = sharding.param(jnp.stack(vectors), None, "embed") if self.tokens else None

  def __call__(self, features: Features, *, dropless: bool, rngs: nnx.Rngs | None = None) -> Encoded:
    """Encodes a batch; with `rngs`, dropout is on."""
    events, queries = embed_rows(self.event_embedding, self.query_embedding, features, self.value_dropout, rngs)
    (batch, length, d), snapshots = events.shape, queries.shape[1]
    visible, position = visibility(features.segment, features.query_segment, features.query_events)
    x = jnp.concatenate([events, queries], axis=1)
    context = Context(
      position=position,
      time=jnp.concatenate([features.time, features.query_time], axis=1),
      visible=visible,
      valid=jnp.concatenate([features.segment, features.query_segment], axis=1) > 0,
    )
    if self.task_vectors is not None:
      tokens = queries[:, :, None] + self.task_vectors.get_value()
      x = jnp.concatenate([x, tokens.reshape(batch, snapshots * self.tokens, d)], axis=1)
      context = self._with_task_tokens(context, features)
    # A dropped event is one of many; a dropped snapshot is a user that nothing is learned from.
    context = context._replace(urgent=jnp.broadcast_to(jnp.arange(x.shape[1]) >= length, x.shape[:2]))
    x = sharding.constrain(x, "batch", None, None)
    x = self.dropout(x, deterministic=rngs is None, rngs=rngs)

    end = length + snapshots
    x, experts = self.stack(x, context, dropless=dropless, rngs=rngs)
    x = self.norm(x)
    aggregates, views = features.query_aggregates, None
    z = self.query_embedding.add_aggregates(x[:, length:end], aggregates)
    if self.task_vectors is not None:
      tokens = x[:, end:].reshape(batch, snapshots, self.tokens, d)
      views = self.query_embedding.add_aggregates(tokens, aggregates[:, :, None])
    record = self._record(experts, batch, length, snapshots)
    return Encoded(x[:, :length], z, views, None, record, shown_aggregates(features, training=rngs is not None))

  def _with_task_tokens(self, context: Context, features: Features) -> Context:
    batch, snapshots = features.query_valid.shape
    visible, position = with_task_tokens(context.visible, context.position, snapshots, self.tokens)
    task = jnp.broadcast_to(jnp.arange(self.tokens, dtype=jnp.int32), (batch, snapshots, self.tokens))
    if self.shuffled:
      # Of a hash its last bit chooses what `shown_aggregates` hides, so it is left out here.
      task = (task + snapshot_hash(features, 2 * self.tokens)[..., None] // 2) % self.tokens
    none = jnp.full(context.valid.shape, -1, jnp.int32)
    return Context(
      position=position,
      time=jnp.concatenate([context.time, jnp.repeat(features.query_time, self.tokens, axis=1)], axis=1),
      visible=visible,
      valid=jnp.concatenate([context.valid, jnp.repeat(features.query_valid, self.tokens, axis=1)], axis=1),
      task=jnp.concatenate([none, task.reshape(batch, -1)], axis=1),
    )

  def _record(self, out: MoEOutput | None, batch: int, length: int, snapshots: int) -> ExpertRecord:
    if out is None:
      return no_experts(self.experts, self.k, batch, length, snapshots, self.tokens)
    stats, end = out.stats, length + snapshots
    task_expert = None
    if self.tokens:
      chosen = stats.expert[:, :, end:]
      task_expert = chosen.reshape(len(chosen), batch, snapshots, self.tokens, self.k)
    events, own = stats.expert[:, :, :length], stats.expert[:, :, length:end]
    return ExpertRecord(out.sums, stats._replace(expert=own), task_expert, events)


def shown_aggregates(features: Features, *, training: bool) -> jax.Array:
  """Returns the aggregates `[B, S, A]` that heads read; in training half of the snapshots have none.

  Where heads always read a user's counts, these would be left out of z, which other models read alone. A hash of the
  snapshot chooses the half, always the same one, so that a batch means the same however it is split.
  """
  shown = features.query_aggregates
  return jnp.where(snapshot_hash(features, 2)[..., None] > 0, shown, 0.0) if training else shown


def snapshot_hash(features: Features, size: int) -> jax.Array:
  """Returns an int32 in [0, size) for each snapshot `[B, S]`: a hash of its own place in time and of nothing else."""

  def bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.uint32)

  h = jnp.asarray(features.query_events).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
  for part in (bits(features.query_gap), bits(features.query_time)):
    # The finalizer of MurmurHash3: every input bit affects every output bit.
    h = (h ^ part) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    h = h ^ (h >> 16)
  return (h % jnp.uint32(size)).astype(jnp.int32)


def no_experts(experts: int, k: int, batch: int, length: int, snapshots: int, tokens: int = 0) -> ExpertRecord:
  """Returns the record of an encoder without MoE layers; its arrays are empty, M = 0."""
  none, counts = jnp.zeros(0), jnp.zeros(0, jnp.int32)
  expert = jnp.zeros((0, batch, snapshots, k), jnp.int32)
  by_expert = jnp.zeros((0, experts))
  sums = RoutingSums(none, by_expert, by_expert, none, none, jnp.zeros((0, tokens, experts)))
  stats = Stats(by_expert, counts, counts, jnp.zeros((0, tokens), jnp.int32), none, expert)
  task_expert = jnp.zeros((0, batch, snapshots, tokens, k), jnp.int32) if tokens else None
  return ExpertRecord(sums, stats, task_expert, jnp.zeros((0, batch, length, k), jnp.int32))


def _make_block(model: config.Model, balance_bias: bool, tokens: int) -> Callable[[int, nnx.Rngs], Block]:
  """Returns a function that creates the block at a place in a group of `moe_every` blocks; the last holds experts."""
  d, dtype = model.d_model, jnp.dtype(model.dtype)

  def make(place: int, rngs: nnx.Rngs) -> Block:
    feed_forward: Mlp | MoE
    if place + 1 == model.moe_every:
      feed_forward = MoE(
        d,
        model.d_expert,
        model.experts,
        model.experts_per_token,
        activation=model.activation,
        shared_experts=model.shared_experts,
        capacity_factor=model.capacity_factor,
        dispatch=model.dispatch,
        tasks=tokens,
        jitter=model.router_jitter,
        balance_bias=balance_bias,
        dtype=dtype,
        rngs=rngs,
      )
    else:
      feed_forward = Mlp(d, model.d_hidden, activation=model.activation, dtype=dtype, rngs=rngs)
    return Block(d, model.heads, feed_forward, time_unit=model.time_unit, dropout=model.dropout, dtype=dtype, rngs=rngs)

  return make
