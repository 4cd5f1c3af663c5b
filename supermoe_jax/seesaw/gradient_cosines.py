"""Measures the cosines between the tasks' gradients at the shared representation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from supermoe_jax import config
from supermoe_jax.batch import Batch
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.training import task_losses
from supermoe_jax.training.run import Run
from supermoe_jax.training.sampled_softmax import drawn_codes
from supermoe_jax.training.step import place_on_mesh
from supermoe_jax.training.task_losses import TaskStatistics

# Number of training batches that cosines are averaged over.
BATCHES = 8


def gradient_cosines(run: Run, n_batches: int = BATCHES) -> dict[str, Any] | None:
  """Returns the mean cosine between each two tasks' gradients at the shared representation, dropout off.

  Returns: `tasks` and `matrix [T][T]`, whose entry is None if no training batch had labels of both tasks. None instead
    if tasks share no representation (`conditioning` token), or no task has labels.
  """
  if run.cfg.model.conditioning == "token" or not run.cfg.active_views:
    return None
  names = list(run.cfg.active_views)
  place_of = [list(run.cfg.active_tasks).index(n) for n in names]
  total, count = np.zeros((len(names),) * 2), np.zeros((len(names),) * 2)
  stream = training_batches.training_batches(run.dataset, run.cfg, seed=run.cfg.train.seed + 2)
  with jax.set_mesh(run.mesh):
    constants = jax.device_put(run.statistics, NamedSharding(run.mesh, PartitionSpec()))
    for batch in itertools.islice(stream, n_batches):
      gram = np.asarray(_gram(_Static(run), run.variables, place_on_mesh(batch, run.mesh), constants), np.float64)
      gram = gram[np.ix_(place_of, place_of)]
      length = np.sqrt(np.diagonal(gram))
      met = np.outer(length > 0, length > 0)
      total += np.where(met, gram / np.where(met, np.outer(length, length), 1.0), 0.0)
      count += met
  mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
  return {"tasks": names, "matrix": [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in mean]}


class _Static:
  """A run's static inputs of `_gram`; equal for runs of one model, which so share a compiled program."""

  def __init__(self, run: Run):
    self.graph, self.norm = run.graph, run.cfg.train.norm
    self._same = str((config.to_dict(run.cfg.model), self.norm, sorted(run.cfg.active_tasks), run.cfg.data.path))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Static) and self._same == other._same

  def __hash__(self) -> int:
    return hash(self._same)


@functools.partial(jax.jit, static_argnums=0)
def _gram(static: _Static, variables: nnx.State, batch: Batch, statistics: Mapping[str, TaskStatistics]) -> jax.Array:
  model = nnx.merge(static.graph, variables, copy=True)
  encoded = model.encode(batch.features, dropless=True)
  drawn = drawn_codes(model, batch, jax.random.key(0))
  return task_losses.gradient_products(model, encoded, batch, statistics, static.norm, drawn)
