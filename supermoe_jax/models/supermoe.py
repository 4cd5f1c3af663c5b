"""SUPERMOE: one sparse encoder of behaviour sequences, one representation of a user at a moment, several tasks.

This is the project's own design for the method whose abstract is arXiv 2207.04648.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.data.batches import CALENDAR, Features
from supermoe_jax.data.dataset import Schema
from supermoe_jax.layers.attention import visibility
from supermoe_jax.layers.event_embedding import EventEmbedding, QueryEmbedding
from supermoe_jax.layers.heads import BinaryHead, NextValueHead
from supermoe_jax.layers.moe import Mlp, MoE, MoEOutput, Stats
from supermoe_jax.layers.routing import Aux
from supermoe_jax.layers.transformer import Block, Context, Stack


class ExpertRecord(NamedTuple):
  """What the MoE layers did; every array has a dimension of M layers in front (none: M = 0).

  Attributes:
    aux: terms for the loss, `[M]` each.
    stats: see `layers.moe.Stats`; its `expert [M, B, S, K]` is that of the snapshots' tokens only.
  """

  aux: Aux
  stats: Stats


class Encoded(NamedTuple):
  """States of the events `[B, L, D]`, the user representations `z [B, S, D]`, and the experts' record."""

  events: jax.Array
  z: jax.Array
  experts: ExpertRecord


class Encoder(nnx.Module):
  """Turns a row of L events and S snapshots into one user representation a snapshot, in one pass.

  A snapshot's z depends on the events it sees and on nothing else: not on later events, other snapshots, padding, or,
  when nothing is dropped, other rows.
  """

  def __init__(self, model: config.Model, schema: Schema, *, balance_bias: bool = False, rngs: nnx.Rngs):
    d = model.d_model
    self.event_embedding = EventEmbedding(
      d, len(schema.sources), schema.categorical, len(schema.numeric), CALENDAR, rngs=rngs
    )
    self.query_embedding = QueryEmbedding(d, CALENDAR, schema.aggregates, rngs=rngs)
    self.dropout = nnx.Dropout(model.dropout)
    self.stack = Stack(_make_block(model, balance_bias), model.layers, model.moe_every, remat=model.remat, rngs=rngs)
    self.norm = nnx.RMSNorm(d, rngs=rngs)
    self.experts, self.k = model.experts, model.experts_per_token

  def __call__(self, features: Features, *, dropless: bool, rngs: nnx.Rngs | None = None) -> Encoded:
    """Encodes a batch; with `rngs`, dropout is on."""
    events = self.event_embedding(features.codes, features.source, features.numeric, features.calendar, features.gap)
    queries = self.query_embedding(features.query_calendar, features.query_gap, features.query_aggregates)
    length = events.shape[1]
    x = sharding.constrain(jnp.concatenate([events, queries], axis=1), "batch", None, None)
    x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
    is_event = jnp.arange(length) < features.length[:, None]
    is_snapshot = features.query_valid
    visible, position = visibility(is_event.astype(jnp.int32), is_snapshot.astype(jnp.int32), features.query_events)
    context = Context(
      position=position,
      time=jnp.concatenate([features.time, features.query_time], axis=1),
      visible=visible,
      valid=jnp.concatenate([is_event, is_snapshot], axis=1),
    )
    x, record = self.stack(x, context, dropless=dropless, rngs=rngs)
    x = self.norm(x)
    return Encoded(x[:, :length], x[:, length:], self._record(record, features))

  def _record(self, record: MoEOutput | None, features: Features) -> ExpertRecord:
    batch, snapshots = features.query_valid.shape
    if record is not None:
      stats = record.stats
      return ExpertRecord(record.aux, stats._replace(expert=stats.expert[:, :, -snapshots:]))
    none, counts = jnp.zeros(0), jnp.zeros(0, jnp.int32)
    expert = jnp.zeros((0, batch, snapshots, self.k), jnp.int32)
    stats = Stats(jnp.zeros((0, self.experts)), counts, counts, jnp.zeros((0, 0), jnp.int32), none, expert)
    return ExpertRecord(Aux(none, none, none), stats)


def _make_block(model: config.Model, balance_bias: bool) -> Callable[[int, nnx.Rngs], Block]:
  """Returns the constructor of the block at a place of a group of `moe_every`, the last of which holds experts."""
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
        jitter=model.router_jitter,
        balance_bias=balance_bias,
        dtype=dtype,
        rngs=rngs,
      )
    else:
      feed_forward = Mlp(d, model.d_hidden, activation=model.activation, dtype=dtype, rngs=rngs)
    return Block(d, model.heads, feed_forward, dropout=model.dropout, dtype=dtype, rngs=rngs)

  return make


class SuperMoE(nnx.Module):
  """The encoder with a head for each task."""

  def __init__(
    self,
    model: config.Model,
    schema: Schema,
    tasks: Mapping[str, config.Task],
    *,
    balance_bias: bool = False,
    rngs: nnx.Rngs,
  ):
    self.encoder = Encoder(model, schema, balance_bias=balance_bias, rngs=rngs)
    self.tasks = dict(tasks)
    heads: dict[str, nnx.Module] = {}
    for name, task in tasks.items():
      if isinstance(task, config.NextEvent):
        heads[name] = NextValueHead(model.d_model, schema.outputs[name], rngs=rngs)
      else:
        many = schema.outputs[name] if isinstance(task, config.FutureValues) else None
        heads[name] = BinaryHead(model.d_model, many, rngs=rngs)
    self.heads = nnx.Dict(heads)

  def encode(self, features: Features, *, dropless: bool, rngs: nnx.Rngs | None = None) -> Encoded:
    """See `Encoder`."""
    return self.encoder(features, dropless=dropless, rngs=rngs)

  def answers(self, name: str, encoded: Encoded, *, events: bool) -> jax.Array:
    """A task's logits at the snapshots, `[B, S]` or `[B, S, outputs]`.

    For a next event they are scores of the catalogue, `[B, T, items]`; with `events` the L events' states come first.
    """
    task, head = self.tasks[name], self.heads[name]
    if isinstance(task, config.NextEvent):
      assert isinstance(head, NextValueHead)
      h = jnp.concatenate([encoded.events, encoded.z], axis=1) if events else encoded.z
      return head.scores(h, self.encoder.event_embedding.fields[task.field])
    assert isinstance(head, BinaryHead)
    return head(encoded.z)
