"""A trained run, opened for evaluation and embedding."""

from __future__ import annotations

import functools
import pathlib
from typing import NamedTuple

import jax
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.data.batches import Features
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.layers.heads import NextValueHead
from supermoe_jax.layers.table import EmbeddingTable
from supermoe_jax.training.checkpoint import Checkpoints, RunError
from supermoe_jax.training.loop import check_encoding
from supermoe_jax.training.step import abstract_model, place


class Answered(NamedTuple):
  """A model's answers for B rows of one snapshot.

  Attributes:
    z: float32 `[B, D]`, the user representations.
    answers: for each task float32 `[B]` or `[B, outputs]` logits, or `[B, D]` states to rank a catalogue with.
    expert: int32 `[M, B, K]`, the experts that the snapshots' tokens went to in each MoE layer.
  """

  z: jax.Array
  answers: dict[str, jax.Array]
  expert: jax.Array


class Run:
  """A run directory's config, dataset and newest parameters, on the mesh of the config."""

  def __init__(self, workdir: str | pathlib.Path):
    """Opens a run.

    Raises:
      ConfigError: `workdir` is not a run directory.
      RunError: it holds no checkpoint yet, or its dataset was prepared again with another outcome.
      DataError: its dataset is gone or another.
    """
    self.workdir = pathlib.Path(workdir)
    self.cfg: config.Config = config.load_json(self.workdir / "config.json")
    self.dataset = Dataset(self.cfg.data.path)
    self.dataset.check_matches(self.cfg)
    sizes = self.cfg.train.mesh
    try:
      self.mesh = sharding.make_mesh(sizes)
    except config.ConfigError:  # what was trained on many devices runs on one as well
      self.mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    self._graph, abstract = abstract_model(self.cfg, self.dataset.schema)
    layouts = sharding.shardings(self.mesh, abstract)
    placed = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), abstract, layouts)
    with Checkpoints(self.workdir, self.cfg.train) as checkpoints:
      latest = checkpoints.latest
      if latest is None:
        raise RunError(f"{self.workdir} holds no checkpoint yet; run 'supermoe train --workdir {self.workdir}' first.")
      check_encoding(self.workdir, self.dataset)
      self.step = latest
      self._variables = checkpoints.restore_model(latest, placed)

  def answer(self, features: Features) -> Answered:
    """Encodes B rows of one snapshot each and asks every task; nothing is dropped, dropout is off."""
    with jax.set_mesh(self.mesh):
      return self._answer(self._variables, place(features, self.mesh))

  @functools.cached_property
  def _answer(self):  # type: ignore[no-untyped-def]
    graph = self._graph

    def answer(variables: nnx.State, features: Features) -> Answered:
      model = nnx.merge(graph, variables, copy=True)
      encoded = model.encode(features, dropless=True)
      answers = {}
      for name in model.tasks:
        head = model.heads[name]
        answers[name] = (
          head.state(encoded.z) if isinstance(head, NextValueHead) else model.answers(name, encoded, events=False)
        )[:, 0]
      return Answered(encoded.z[:, 0], answers, encoded.experts.stats.expert[:, :, 0])

    return jax.jit(answer)

  def catalogue(self, task: str) -> tuple[jax.Array, jax.Array]:
    """The vectors `[items, D]` and biases `[items]` that a next-event task ranks."""
    model = nnx.merge(self._graph, self._variables, copy=True)
    head = model.heads[task]
    table: EmbeddingTable = model.encoder.event_embedding.fields[model.tasks[task].field]
    return head.catalogue(table)
