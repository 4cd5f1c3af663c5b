"""SUPERMOE: one sparse encoder of behaviour sequences, one representation of a user at a moment, several tasks.

This is the project's own design for the method whose abstract is arXiv 2207.04648.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from supermoe_jax.layers.moe import Mlp, MoE, MoEOutput
from supermoe_jax.layers.transformer import Block, Context


class ExpertRecord(NamedTuple):
  """What the MoE layers did, one entry a layer (M layers; none: M = 0).

  Attributes:
    balance_loss, z_loss: float32 `[M]`.
    load: float32 `[M, E]`.
    routed, dropped: int32 `[M]`.
    query_expert: int32 `[M, B, S, K]`, the experts of the query tokens.
  """

  balance_loss: jax.Array
  z_loss: jax.Array
  load: jax.Array
  routed: jax.Array
  dropped: jax.Array
  query_expert: jax.Array


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

  def __init__(self, model: config.Model, schema: Schema, *, rngs: nnx.Rngs):
    d = model.d_model
    self.event_embedding = EventEmbedding(
      d, len(schema.sources), schema.categorical, len(schema.numeric), CALENDAR, rngs=rngs
    )
    self.query_embedding = QueryEmbedding(d, CALENDAR, schema.aggregates, rngs=rngs)
    self.dropout = nnx.Dropout(model.dropout)
    blocks = []
    for i in range(model.layers):
      sparse = model.moe_every > 0 and (i + 1) % model.moe_every == 0
      feed_forward = (
        MoE(d, model.d_expert, model.experts, model.experts_per_token, capacity_factor=model.capacity_factor, rngs=rngs)
        if sparse
        else Mlp(d, model.d_hidden, rngs=rngs)
      )
      blocks.append(Block(d, model.heads, feed_forward, dropout=model.dropout, rngs=rngs))
    self.blocks = nnx.List(blocks)
    self.norm = nnx.RMSNorm(d, rngs=rngs)
    self.experts, self.k = model.experts, model.experts_per_token

  def __call__(self, features: Features, *, dropless: bool, rngs: nnx.Rngs | None = None) -> Encoded:
    """Encodes a batch; with `rngs`, dropout is on."""
    events = self.event_embedding(features.codes, features.source, features.numeric, features.calendar, features.gap)
    queries = self.query_embedding(features.query_calendar, features.query_gap, features.query_aggregates)
    length = events.shape[1]
    x = sharding.constrain(jnp.concatenate([events, queries], axis=1), "batch", None, None)
    x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
    position = jnp.broadcast_to(jnp.arange(length), events.shape[:2])
    context = Context(
      position=jnp.concatenate([position, features.query_events], axis=1),
      time=jnp.concatenate([features.time, features.query_time], axis=1),
      visible=visibility(features.length, features.query_events, length),
      valid=jnp.concatenate([position < features.length[:, None], features.query_valid], axis=1),
    )
    records = []
    for block in self.blocks:
      x, record = block(x, context, dropless=dropless, rngs=rngs)
      if record is not None:
        records.append(record)
    x = self.norm(x)
    return Encoded(x[:, :length], x[:, length:], self._record(records, features))

  def _record(self, records: list[MoEOutput], features: Features) -> ExpertRecord:
    batch, snapshots = features.query_valid.shape
    if not records:
      none, counts = jnp.zeros(0), jnp.zeros(0, jnp.int32)
      expert = jnp.zeros((0, batch, snapshots, self.k), jnp.int32)
      return ExpertRecord(none, none, jnp.zeros((0, self.experts)), counts, counts, expert)
    return ExpertRecord(
      jnp.stack([r.balance_loss for r in records]),
      jnp.stack([r.z_loss for r in records]),
      jnp.stack([r.load for r in records]),
      jnp.stack([r.routed for r in records]),
      jnp.stack([r.dropped for r in records]),
      jnp.stack([r.expert[:, -snapshots:] for r in records]),
    )


class SuperMoE(nnx.Module):
  """The encoder with a head for each task."""

  def __init__(self, model: config.Model, schema: Schema, tasks: Mapping[str, config.Task], *, rngs: nnx.Rngs):
    self.encoder = Encoder(model, schema, rngs=rngs)
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
