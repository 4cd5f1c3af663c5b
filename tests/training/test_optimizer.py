"""The learning rate over a run, which parameters decay, and how gradients are clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supermoe_jax import config, device_mesh
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.training import optimizer, table_step, task_statistics
from supermoe_jax.training.step import compiled_program, create_state, place_on_mesh
from tests.fixtures import short_runs

TRAIN = config.Train(steps=100, warmup_steps=10, learning_rate=0.4, final_learning_rate=0.1)


def test_the_learning_rate_rises_to_its_peak_and_falls_until_the_last_step() -> None:
  rate = optimizer.schedule(TRAIN)
  assert [float(rate(step)) for step in (0, 5, 10, 55, 100)] == pytest.approx([0, 0.2, 0.4, 0.22, 0.04])


def test_only_matrices_of_maps_and_experts_decay_and_by_rate_and_decay() -> None:
  kept = {"norm": {"scale": jnp.ones(2)}, "lin": {"bias": jnp.ones(2)}, "task_vectors": jnp.ones((2, 2))}
  decayed = {"lin": {"kernel": jnp.ones((2, 2))}, "moe": {n: jnp.ones((2, 2)) for n in ("up", "gate", "down")}}
  params = {"kept": kept, "decayed": decayed}
  adamw = optimizer.make_optimizer(config.Train(steps=100, warmup_steps=0, learning_rate=0.4, weight_decay=0.1))
  updates, _ = adamw.update(jax.tree.map(jnp.zeros_like, params), adamw.init(params), params)
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates["kept"]))
  for leaf in jax.tree.leaves(updates["decayed"]):
    np.testing.assert_allclose(leaf, -0.04, rtol=1e-6)


def test_clipped_gradients_of_parameters_and_of_rows_have_the_norm_that_is_set_together(
  cfg: config.Config, dataset: Dataset
) -> None:
  settings = {"warmup_steps": 0, "clip_norm": 0.05, "tables.optimizer": "sgd", "tables.weight_decay": 0.0}
  clipped = config.override(short_runs.short(cfg), [f"--config.train.{k}={v}" for k, v in settings.items()])
  mesh = device_mesh.make_mesh(clipped.train.mesh)
  _, state = create_state(clipped, dataset.schema, mesh)
  before = jax.device_get(table_step.table_values(state.model))
  batch = next(iter(training_batches.training_batches(dataset, clipped)))
  measured = task_statistics.measure_tasks(clipped.active_tasks, dataset.schema.outputs, [batch], 1).statistics
  state, metrics = compiled_program(clipped, dataset.schema, mesh).step(state, place_on_mesh(batch, mesh), measured)
  tasks = len(clipped.active_tasks)
  assert metrics.gradient_norm > 2 * 0.05 * tasks
  # The first step of AdamW keeps a tenth of the gradient; one of SGD moves rows by the rate times the gradient.
  parameters = [10 * np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.optimizer[0].mu)]
  after = jax.device_get(table_step.table_values(state.model))
  rows = [(np.asarray(before[n], np.float64) - after[n]) / clipped.train.tables.learning_rate for n in before]
  assert all(np.abs(moved).max() > 0 for moved in rows)
  total = np.sqrt(sum(np.sum(np.square(part)) for part in parameters + rows))
  assert sum(np.sum(np.square(part)) for part in rows) > 1e-4 * total**2  # more than the tolerance hides
  assert tasks > 1 and total == pytest.approx(0.05 * tasks, rel=1e-5)
