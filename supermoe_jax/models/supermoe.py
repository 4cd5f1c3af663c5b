"""SUPERMOE: one sparse encoder of behaviour sequences, one representation of a user at a moment, several tasks.

This is the project's own design for the method whose abstract is arXiv 2207.04648.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import config
from supermoe_jax.data.batches import Features
from supermoe_jax.data.schema import Schema
from supermoe_jax.layers.heads import EventLabelHead, LinearHead, NextValueHead
from supermoe_jax.models.baselines import PLE, GRUEncoder, MMoE
from supermoe_jax.models.encoder import Encoded, Encoder, ExpertRecord, task_key

__all__ = ["Encoded", "Encoder", "ExpertRecord", "SuperMoE"]


class SuperMoE(nnx.Module):
  """The encoder with a head for each task that has labels.

  At snapshots a head reads its task's view of the user, which by default (`conditioning="none"`) is z itself; at events
  it reads the event's state. A task without labels (contrast) has neither view nor head: its loss compares z.

  Attributes:
    tasks: the active tasks by name, those without labels included.
    view_names: the T tasks with labels, in the order of `Encoded.views`.
    heads: by the names of `view_names`.
  """

  def __init__(
    self,
    model: config.Model,
    schema: Schema,
    tasks: Mapping[str, config.Task],
    *,
    balance_bias: bool = False,
    rngs: nnx.Rngs,
  ):
    """Creates the model; initial parameters of a task do not depend on the others (but PLE's, on its place)."""
    self.tasks = dict(tasks)
    self.view_names = tuple(n for n, t in tasks.items() if not isinstance(t, config.Contrast))
    d = model.d_model
    self.encoder: Encoder | GRUEncoder
    if model.encoder == "gru":
      self.encoder = GRUEncoder(model, schema, rngs=rngs)
    else:
      self.encoder = Encoder(model, schema, self.view_names, balance_bias=balance_bias, rngs=rngs)
    key = rngs.params()
    self.heads = nnx.Dict({n: _head(tasks[n], n, d, schema, nnx.Rngs(task_key(key, n))) for n in self.view_names})
    self.sharing = _sharing(model, len(self.view_names), rngs)

  def encode(self, features: Features, *, dropless: bool, rngs: nnx.Rngs | None = None) -> Encoded:
    """See `Encoder`; with the tasks' views, whatever makes them."""
    return self.share(self.encoder(features, dropless=dropless, rngs=rngs))

  def share(self, encoded: Encoded) -> Encoded:
    """Fills in the views that MMoE or PLE make of `encoded.z`; without one of them, returns `encoded` as it is."""
    if isinstance(self.sharing, MMoE):
      views, gates = self.sharing(encoded.z)
      return encoded._replace(views=views, gates=gates)
    if isinstance(self.sharing, PLE):
      return encoded._replace(views=self.sharing(encoded.z))
    return encoded

  def view(self, name: str, encoded: Encoded) -> jax.Array:
    """What a task's head reads at the snapshots: `[B, S, D]`."""
    return encoded.z if encoded.views is None else encoded.views[:, :, self.view_names.index(name)]

  def states(self, name: str, encoded: Encoded, *, events: bool) -> jax.Array:
    """What a task's head reads, `[B, sites, D]`: its view at the S snapshots, with `events` after the L events' states.

    An event label asks about m events a snapshot, so that the view stands there m times: L + S·m sites, or S·m.
    """
    view, task = self.view(name, encoded), self.tasks[name]
    if isinstance(task, config.EventLabel):
      view = jnp.repeat(view, task.per_snapshot, axis=1)
    return jnp.concatenate([encoded.events, view], axis=1) if events else view

  def answers(self, name: str, encoded: Encoded, *, events: bool, given: jax.Array | None = None) -> jax.Array:
    """A task's answers: logits, or numbers for a regression.

    Args:
      name: the task.
      encoded: what `encode` returned.
      events: whether a task that asks at events too does so here; the L events come first. Others ask at the snapshots.
      given: event label only, int32 `[B, sites, G]`, codes of the asked events' G fields `task.given`.

    Returns: `[B, S]` (binary, regression), `[B, S, outputs]` (multi-label, multi-class), `[B, sites]` (event label;
      sites as in `states`) or `[B, sites, items]` (next event).

    Raises:
      ValueError: `given` is missing, of another shape, or of a task that takes none.
    """
    task, head = self.tasks[name], self.heads[name]
    if isinstance(head, EventLabelHead):
      assert isinstance(task, config.EventLabel)
      h = self.states(name, encoded, events=events)
      wanted = (*h.shape[:2], len(task.given))
      if given is None or given.shape != wanted:
        found = None if given is None else given.shape
        raise ValueError(f"task {name!r} needs given of shape {wanted} (B, sites, fields), not {found}")
      return head(h, self.encoder.event_embedding.values(task.given, given))
    if given is not None and given.shape[-1]:
      raise ValueError(f"task {name!r} is no event label: it takes no given")
    if isinstance(head, NextValueHead):
      assert isinstance(task, config.NextEvent)
      table = self.encoder.event_embedding.fields[task.field]
      return head.scores(self.states(name, encoded, events=events), table)
    assert isinstance(head, LinearHead)
    return head(self.view(name, encoded))


def _head(
  task: config.Task, name: str, d_model: int, schema: Schema, rngs: nnx.Rngs
) -> NextValueHead | EventLabelHead | LinearHead:
  if isinstance(task, config.NextEvent):
    return NextValueHead(d_model, schema.outputs[name], rngs=rngs)
  if isinstance(task, config.EventLabel):
    return EventLabelHead(d_model, rngs=rngs)
  many = config.answer(task) in ("multilabel", "multiclass")
  return LinearHead(d_model, schema.outputs[name] if many else None, rngs=rngs)


def _sharing(model: config.Model, tasks: int, rngs: nnx.Rngs) -> MMoE | PLE | None:
  """What makes the tasks' views of z, if anything does."""
  if tasks and model.conditioning == "mmoe":
    return MMoE(model.d_model, model.view_hidden, model.view_experts, tasks, rngs=rngs)
  if tasks and model.conditioning == "ple":
    experts = model.view_experts, model.task_experts
    return PLE(model.d_model, model.view_hidden, *experts, tasks, model.ple_levels, rngs=rngs)
  return None
