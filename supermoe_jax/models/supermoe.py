"""Defines the SUPERMOE model: a sparse encoder of event sequences represents a user at a moment for several tasks.

This is the project's own design for the method whose abstract is arXiv 2207.04648.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import config
from supermoe_jax.batch import Batch, Features, Schema, Targets
from supermoe_jax.layers.event_embedding import EventEmbedding
from supermoe_jax.layers.heads import EventLabelHead, FutureValuesHead, LinearHead, NextValueHead, scaled_gradient
from supermoe_jax.layers.table import ONE_DEVICE, Layout
from supermoe_jax.models.encoder import Encoded, Encoder, ExpertRecord, task_key

if TYPE_CHECKING:  # loaded only by a config that names one of them
  from supermoe_jax.layers.memory.head_memory import HeadMemory
  from supermoe_jax.layers.memory.remembered import Remembered
  from supermoe_jax.models.baselines import PLE, GRUEncoder, MMoE

BASELINES = "supermoe_jax.models.baselines"
MEMORY = "supermoe_jax.layers.memory.head_memory"

__all__ = ["Encoded", "Encoder", "ExpertRecord", "SuperMoE"]


class SuperMoE(nnx.Module):
  """A model of an encoder and a head for each task with labels.

  At snapshots a head reads its task's view of the user; by default (`conditioning="none"`) the view is z itself. At
  events a head reads the event's state. A task without labels (contrast) has neither view nor head: its loss compares
  z.

  Attributes:
    tasks: the active tasks by name, including tasks without labels.
    view_names: the names of the T tasks with labels, in the order of `Encoded.views`.
    heads: the head of each task in `view_names`.
    scored_whole: the names of the tables that a full softmax scores, so that every row has a gradient.
  """

  def __init__(
    self,
    model: config.Model,
    schema: Schema,
    tasks: Mapping[str, config.Task],
    *,
    balance_bias: bool = False,
    layout: Layout = ONE_DEVICE,
    rngs: nnx.Rngs,
  ):
    """Creates the model; its tables have the layout `layout`.

    A task's initial parameters do not depend on the other tasks, except in PLE, where they depend on the task's place.
    """
    self.tasks = dict(tasks)
    self.view_names = tuple(n for n, t in tasks.items() if t.has_labels)
    if model.aggregates == "token":
      schema = dataclasses.replace(schema, value_counts={}, factors=(0, schema.aggregates))  # none is plain
    d = model.d_model
    self.encoder: Encoder | GRUEncoder
    if model.encoder == "gru":
      self.encoder = importlib.import_module(BASELINES).GRUEncoder(model, schema, layout=layout, rngs=rngs)
    else:
      self.encoder = Encoder(model, schema, self.view_names, balance_bias=balance_bias, layout=layout, rngs=rngs)
    key = rngs.params()
    events = self.encoder.event_embedding
    self.heads = nnx.Dict(
      {n: _head(tasks[n], n, d, schema, events, nnx.Rngs(task_key(key, n))) for n in self.view_names}
    )
    asked = [cast(config.NextEvent, t) for t in tasks.values() if t.answer == "catalogue"]
    self.scored_whole = frozenset(events.owner[t.field] for t in asked if t.softmax == "full")
    self.sharing = _sharing(model, len(self.view_names), rngs)

  def asked(self, batch: Batch, negatives: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns every code that the loss of a batch of B rows looks up in each table: int32 `[B, n]`, with repetitions.

    `negatives [B, k]` holds the codes that each sampled softmax draws, by task.
    """
    events = self.encoder.event_embedding
    rows = len(batch.features.length)
    parts = [events.asked(batch.features.codes)]
    parts += [events.asked(slices.features.codes) for slices in batch.slices.values()]
    for name, task in self.tasks.items():
      if task.given_fields:
        given = batch.targets[name].given
        parts += [{events.owner[field]: given[..., i]} for i, field in enumerate(task.given_fields)]
      elif name in negatives:
        field = events.owner[cast(config.NextEvent, task).field]
        right = safe_value(batch.targets[name]), batch.targets[name].also, negatives[name]
        parts += [{field: codes} for codes in right]
    return {
      field: jnp.concatenate([p[field].reshape(rows, -1) for p in parts if field in p], axis=1)
      for field in events.tables
    }

  def encode(self, features: Features, *, dropless: bool, rngs: nnx.Rngs | None = None) -> Encoded:
    """Encodes rows as `Encoder` does, and fills in the tasks' views and what their heads remember."""
    encoded = self.share(self.encoder(features, dropless=dropless, rngs=rngs))
    remembered = {n: m.counts(features, training=rngs is not None) for n, m in self.memories.items()}
    return encoded._replace(remembered=remembered)

  @property
  def memories(self) -> dict[str, HeadMemory]:
    """Returns the memories of the heads that have one, by task."""
    heads = ((n, self.heads[n]) for n in self.view_names)
    return {n: h.memory for n, h in heads if isinstance(h, NextValueHead) and h.memory is not None}

  def remembered(self, name: str, encoded: Encoded, *, events: bool) -> tuple[Remembered, ...]:
    """Returns what a next-event task's head remembers at the sites of `answers`: K kinds of counts, or none."""
    counts = (encoded.remembered or {}).get(name, ())
    return tuple(counts if events else (r.at(slice(encoded.events.shape[1], None)) for r in counts))

  def share(self, encoded: Encoded) -> Encoded:
    """Fills in the views that MMoE or PLE makes of `encoded.z`; returns `encoded` unchanged without these layers."""
    if self.sharing is None:
      return encoded
    views, gates = self.sharing(encoded.z)
    return encoded._replace(views=views, gates=gates)

  def kept_counts(self, encoded: Encoded) -> dict[str, tuple[Remembered, ...]]:
    """Returns the counts of rows with one snapshot, by task, in a form that is small enough to be kept."""
    return {n: m.at_snapshot(self.remembered(n, encoded, events=False)) for n, m in self.memories.items()}

  def view(self, name: str, encoded: Encoded) -> jax.Array:
    """Returns the view that a task's head reads at the snapshots: `[B, S, D]`."""
    return encoded.z if encoded.views is None else encoded.views[:, :, self.view_names.index(name)]

  def states(self, name: str, encoded: Encoded, *, events: bool) -> jax.Array:
    """Returns the input of a task's head, `[B, sites, D]`: its view at the S snapshots.

    With `events` the L events' states come first. An event label asks about m events per snapshot, so each view is
    repeated m times: S·m sites, or L + S·m with `events`.
    """
    view, task = self.view(name, encoded), self.tasks[name]
    if task.about_events:
      view = jnp.repeat(view, task.asked_events, axis=1)
    return jnp.concatenate([encoded.events, view], axis=1) if events else view

  def answers(
    self,
    name: str,
    encoded: Encoded,
    *,
    events: bool,
    given: jax.Array | None = None,
    gradient_scale: jax.Array | float = 1.0,
  ) -> jax.Array:
    """Returns a task's answers: logits, or numbers for a regression.

    Args:
      name: the task.
      encoded: the result of `encode`.
      events: whether a task that also asks at events does so here; the L events come first. Other tasks ask at the
        snapshots only.
      given: for event labels only, int32 `[B, sites, G]`, the codes of the asked events' G fields `task.given_fields`.
      gradient_scale: the factor of the gradient that leaves the head, towards states and tables.

    Returns: `[B, S]` (binary, regression, amount), `[B, S, outputs]` (multi-label, multi-class, hazards,
      zero-inflated amount), `[B, sites]` (event label; sites as in `states`) or `[B, sites, D + K]` (next event: the
      states that a catalogue is scored against, with the gains of a memory's K kinds).

    Raises:
      ValueError: `given` is missing, has another shape, or is passed for a task that takes none.
    """
    task, head = self.tasks[name], self.heads[name]
    if isinstance(head, EventLabelHead):
      h = self.states(name, encoded, events=events)
      wanted = (*h.shape[:2], len(task.given_fields))
      if given is None or given.shape != wanted:
        found = None if given is None else given.shape
        raise ValueError(f"task {name!r} needs given of shape {wanted} (B, sites, fields), not {found}")
      known = self.encoder.event_embedding.values(task.given_fields, given)
      return head(scaled_gradient(h, gradient_scale), scaled_gradient(known, gradient_scale))
    if given is not None and given.shape[-1]:
      raise ValueError(f"task {name!r} is no event label: it takes no given")
    if isinstance(head, NextValueHead):
      h = self.states(name, encoded, events=events)
      return head.state(scaled_gradient(h, gradient_scale), encoded.aggregates)
    assert isinstance(head, LinearHead)
    answers = head(scaled_gradient(self.view(name, encoded), gradient_scale))
    return head.add_aggregates(answers, encoded.aggregates)


def safe_value(targets: Targets) -> jax.Array:
  """Returns y~: the labels, with 0 where no label is known."""
  known = jnp.asarray(targets.known)
  wide = known[..., None] if jnp.ndim(targets.value) > known.ndim else known
  return jnp.where(wide, targets.value, 0)


def _head(
  task: config.Task,
  name: str,
  d_model: int,
  schema: Schema,
  events: EventEmbedding,
  rngs: nnx.Rngs,
) -> NextValueHead | EventLabelHead | LinearHead:
  if task.answer == "catalogue":
    next_event = cast(config.NextEvent, task)
    table = events.table(next_event.field)
    own = schema.value_counts.get(next_event.field)
    columns = None if own is None else own.columns
    memory = None
    if next_event.memory:
      place = d_model, schema.field(next_event.field), table.size, table.extent.stripes
      layer, repeats = importlib.import_module(MEMORY).HeadMemory, not next_event.exclude_seen
      memory = layer(next_event.memory, *place, repeats=repeats, rngs=rngs)
    return NextValueHead(d_model, table, columns, bias=next_event.softmax == "full", memory=memory, rngs=rngs)
  if task.about_events:
    return EventLabelHead(d_model, rngs=rngs)
  if task.answer == "multilabel" and (counts := schema.value_counts.get(cast(config.FutureValues, task).field)):
    return FutureValuesHead(d_model, schema.outputs[name], counts, schema.plain_aggregates, rngs=rngs)
  many = task.answer in ("multilabel", "multiclass", "survival") or schema.outputs[name] > 1
  return LinearHead(d_model, schema.outputs[name] if many else None, schema.plain_aggregates, rngs=rngs)


def _sharing(model: config.Model, tasks: int, rngs: nnx.Rngs) -> MMoE | PLE | None:
  """Returns the layer that makes the tasks' views of z; None if every task reads z or the encoder makes the views."""
  if tasks and model.conditioning == "mmoe":
    return importlib.import_module(BASELINES).MMoE(
      model.d_model, model.view_hidden, model.view_experts, tasks, rngs=rngs
    )
  if tasks and model.conditioning == "ple":
    experts = model.view_experts, model.task_experts
    return importlib.import_module(BASELINES).PLE(
      model.d_model, model.view_hidden, *experts, tasks, model.ple_levels, rngs=rngs
    )
  return None
