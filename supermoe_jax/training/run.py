"""Opens a trained run for evaluation and embedding."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.batch import Features
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.distributed import processes
from supermoe_jax.errors import ConfigError, RunError
from supermoe_jax.layers.catalogue import Catalogue
from supermoe_jax.layers.heads import LinearHead
from supermoe_jax.training.checkpoints.checkpoint import Checkpoints, RestoredModel
from supermoe_jax.training.checkpoints.validated import usual_checkpoint
from supermoe_jax.training.run_directory import check_encoding
from supermoe_jax.training.step import abstract_model, place_on_mesh

if TYPE_CHECKING:  # loaded only by a config that names a memory
  from supermoe_jax.layers.memory.remembered import Remembered

NEWEST: Literal["newest"] = "newest"


class Answered(NamedTuple):
  """The answers of a model for B rows of one snapshot each.

  Attributes:
    z: float32 `[B, D]`, the user representations.
    answers: for each task with labels, float32: `[B]` or `[B, outputs]` logits or numbers, `[B, m]` logits for the m
      events that an event label asks about, or `[B, D + K]` states that rank a catalogue, with K gains of a memory.
    expert: int32 `[M, B, K]`, the experts of the snapshots' tokens in each MoE layer.
    task_expert: int32 `[M, B, T, K]`, the experts of the tasks' own tokens; None without such tokens.
    gate: float32 `[B, T, E]`, each task's gate over experts; None without gates.
    remembered: the K kinds of counts of each next-event task whose head has a memory, of B rows with one site each.
  """

  z: jax.Array
  answers: dict[str, jax.Array]
  expert: jax.Array
  task_expert: jax.Array | None
  gate: jax.Array | None
  remembered: dict[str, tuple[Remembered, ...]]


class Run:
  """A run directory's config, dataset and parameters, on the mesh of the config.

  If there are several processes, each holds the same run, and all must make the same calls in the same order.
  """

  def __init__(self, workdir: str | pathlib.Path, checkpoint: int | Literal["newest"] | None = None):
    """Opens a run at the step `checkpoint`, or at its newest whole checkpoint.

    Without `checkpoint`, a run whose training stops by itself opens at the best one on validation.

    Raises:
      ConfigError: `workdir` is not a run directory.
      RunError: the run has no checkpoint yet, or its dataset was prepared again with another outcome.
      DataError: its dataset is missing, or was prepared from another config.
    """
    self.workdir = pathlib.Path(workdir)
    self.cfg: config.Config = config.load_json(self.workdir / "config.json")
    self.dataset = Dataset(self.cfg.data.path)
    self.dataset.check_matches(self.cfg, appended=False)
    try:
      self.mesh = device_mesh.make_mesh(self.cfg.train.mesh)
    except ConfigError:  # a model that was trained on other devices runs on these too
      self.mesh = device_mesh.mesh_of_processes(self.cfg.train.mesh)
    self.graph, abstract = abstract_model(self.cfg, self.dataset.schema, self.mesh.devices.flat[0].platform)
    layouts = sharding.shardings(self.mesh, abstract)
    placed = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), abstract, layouts)
    checkpoints = Checkpoints(self.workdir)
    if checkpoint is None:
      checkpoint = usual_checkpoint(self.workdir, self.cfg.train.steps)
    if not checkpoints.steps:
      raise RunError(f"{self.workdir} holds no checkpoint yet; run 'supermoe train --workdir {self.workdir}' first.")
    check_encoding(self.workdir, self.dataset)
    with jax.set_mesh(self.mesh):
      found = checkpoints.restore_model(placed, None if checkpoint == NEWEST else checkpoint)
    assert found is not None
    self.step, self.variables, self.statistics = found

  @classmethod
  def of(
    cls,
    workdir: pathlib.Path,
    cfg: config.Config,
    dataset: Dataset,
    mesh: Mesh,
    graph: nnx.GraphDef,
    model: RestoredModel,
  ) -> Run:
    """Returns a run from parts that are in memory: the `model`, whose structure is `graph`, lies on `mesh`."""
    run = cls.__new__(cls)
    run.workdir, run.cfg, run.dataset, run.mesh, run.graph = workdir, cfg, dataset, mesh, graph
    run.step, run.variables, run.statistics = model
    return run

  def answer(self, features: Features, given: Mapping[str, np.ndarray] | None = None) -> Answered:
    """Returns every task's answers for B rows of one snapshot each; experts drop no token, and dropout is off.

    `given` holds, for event labels, the codes `[B, m, G]` of the events asked about; an event label that is not in
    `given` is not asked.
    """
    with jax.set_mesh(self.mesh):
      found = self._answer(self.variables, *place_on_mesh(self._own((features, dict(given or {}))), self.mesh))
      return found if jax.process_count() == 1 else jax.tree.map(processes.whole, found)

  def encode(self, features: Features, *, answers: bool = False) -> jax.Array:
    """Returns only the user representations, float32 `[B, D]`, of B rows of one snapshot each, as in `answer`.

    With `answers` the K numbers of `answer_columns` follow: `[B, D + K]`. Each process passes the rows of its own
    devices, see `device_mesh.host_rows`; the result covers all rows.
    """
    with jax.set_mesh(self.mesh):
      return _encoding(self._key, answers)(self.variables, place_on_mesh(features, self.mesh))

  @property
  def answer_columns(self) -> tuple[str, ...]:
    """Returns the names of the K numbers of `encode`: tasks, with the number of the output where there are many.

    They are the answers, before any link, of all tasks that ask about snapshots and rank no catalogue.
    """
    model = nnx.merge(self.graph, self.variables, copy=True)
    sizes = [(n, head) for n, head in model.heads.items() if isinstance(head, LinearHead)]
    return tuple(name if h.single else f"{name} {i}" for name, h in sizes for i in range(1, h.linear.out_features + 1))

  def event_experts(self, features: Features) -> np.ndarray:
    """Returns the experts of the events of B rows in each MoE layer: int32 `[M, B, L, K]`; padding has experts too.

    This is a separate program, so that the program of `answer` does not hold the routing of every event.
    """
    with jax.set_mesh(self.mesh):
      return processes.whole(_routing(self._key)(self.variables, place_on_mesh(self._own(features), self.mesh)))

  def _own(self, batch: Any) -> Any:
    """Returns the rows of a batch that this process' devices hold."""
    if jax.process_count() == 1:
      return batch
    rows = len(jax.tree.leaves(batch)[0])
    index, count = device_mesh.host_rows(self.mesh, rows)
    return jax.tree.map(lambda x: x[index * rows // count : (index + 1) * rows // count], batch)

  @functools.cached_property
  def _answer(self) -> Callable[[nnx.State, Features, dict[str, jax.Array]], Answered]:
    return _answering(self._key)

  @functools.cached_property
  def _key(self) -> _AnswerKey:
    tasks = {n: dataclasses.replace(t, weight=1.0) for n, t in self.cfg.active_tasks.items()}
    text = json.dumps([config.to_dict(part) for part in (self.cfg.model, tasks, self.dataset.schema)])
    return _AnswerKey(text, self.mesh, self.graph)

  def catalogue(self, task: str) -> Catalogue:
    """Returns the catalogue that a next-event task ranks."""
    model = nnx.merge(self.graph, self.variables, copy=True)
    with jax.set_mesh(self.mesh):
      return model.heads[task].catalogue(model.encoder.event_embedding.table(model.tasks[task].field))


@dataclasses.dataclass(frozen=True)
class _AnswerKey:
  """The cache key of a model's programs: `text` and `mesh` identify it, and the structure `graph` follows from them."""

  text: str
  mesh: Mesh
  graph: nnx.GraphDef = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=4)
def _answering(key: _AnswerKey) -> Callable[[nnx.State, Features, dict[str, jax.Array]], Answered]:
  """Returns the compiled `(variables, features, given) → Answered`, one for all runs of a model."""

  def answer(variables: nnx.State, features: Features, given: dict[str, jax.Array]) -> Answered:
    model = nnx.merge(key.graph, variables, copy=True)
    encoded = model.encode(features, dropless=True)
    answers = {}
    for name, task in model.tasks.items():
      if not task.has_labels or (task.about_events and name not in given):
        continue
      if task.about_events:
        answers[name] = model.answers(name, encoded, events=False, given=given[name])
      else:
        answers[name] = model.answers(name, encoded, events=False)[:, 0]
    experts = encoded.experts
    tokens = None if experts.task_expert is None else experts.task_expert[:, :, 0]
    gate = None if encoded.gates is None else encoded.gates[:, 0]
    return Answered(encoded.z[:, 0], answers, experts.stats.expert[:, :, 0], tokens, gate, model.kept_counts(encoded))

  return jax.jit(answer)


@functools.lru_cache(maxsize=4)
def _encoding(key: _AnswerKey, answers: bool) -> Callable[[nnx.State, Features], jax.Array]:
  """Returns the compiled `(variables, features) → z [B, D]`, one for all runs of a model; `answers` follow if asked."""

  def encode(variables: nnx.State, features: Features) -> jax.Array:
    model = nnx.merge(key.graph, variables, copy=True)
    encoded = model.encode(features, dropless=True)
    z = encoded.z[:, 0]
    asked = [n for n, head in model.heads.items() if answers and isinstance(head, LinearHead)]
    rows = [model.answers(n, encoded, events=False)[:, 0].reshape(len(z), -1).astype(z.dtype) for n in asked]
    return jnp.concatenate([z, *rows], axis=1)

  return jax.jit(encode)


@functools.lru_cache(maxsize=4)
def _routing(key: _AnswerKey) -> Callable[[nnx.State, Features], jax.Array]:
  """Returns the compiled `(variables, features) → int32 [M, B, L, K]`, one for all runs of a model."""

  def routing(variables: nnx.State, features: Features) -> jax.Array:
    model = nnx.merge(key.graph, variables, copy=True)
    return model.encode(features, dropless=True).experts.event_expert

  return jax.jit(routing)
