"""How hard each task pulls on the encoder: the measurement, the weights, and tasks that have stopped."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config
from supermoe_jax.batch import Batch
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.training import losses, task_losses, task_statistics, weighting
from supermoe_jax.training.step import model_constructor
from supermoe_jax.training.task_losses import TaskStatistics
from tests.fixtures.short_runs import ONE_BLOCK, only

KEY = jax.random.key(5)
KEPT = ("next_page", "sampled", "long", "bought", "tier", "alike")


@pytest.fixture(scope="module")
def few(every_task: config.Config) -> config.Config:
  """A task of each kind of label rate: at events, at snapshots, of users, and of pairs."""
  seesaw = "--config.train.weighting.method=seesaw"
  return config.override(every_task, [only(every_task, *KEPT), *ONE_BLOCK, seesaw])


@pytest.fixture(scope="module")
def batch(few: config.Config, every_task_dataset: Dataset) -> Batch:
  parts = list(itertools.islice(training_batches.training_batches(every_task_dataset, few), 2))
  return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


@pytest.fixture(scope="module")
def measured(few: config.Config, every_task_dataset: Dataset) -> dict[str, TaskStatistics]:
  stream = training_batches.training_batches(every_task_dataset, few)
  return task_statistics.measure_tasks(few.active_tasks, every_task_dataset.schema.outputs, stream, 30).statistics


@pytest.fixture(scope="module")
def parts(few: config.Config, every_task_dataset: Dataset, measured: dict[str, TaskStatistics]) -> Any:
  """`(model's variables, weigher, jitted (model, batch, state) → Loss, jitted (model, batch) → products)`."""
  graph, model = nnx.split(model_constructor(few, every_task_dataset.schema)())
  # Heads that start at 0 pass no gradient on.
  model = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(KEY, p.shape, p.dtype), model)
  weigher = weighting.make_weigher(few.train.weighting, few.active_tasks)

  @jax.jit
  def loss(model: nnx.State, batch: Batch, state: weighting.State) -> losses.Loss:
    merged = nnx.merge(graph, model, copy=True)
    return losses.total_loss(merged, batch, measured, few.train, weigher, state, key=KEY, training=False)

  @jax.jit
  def products(model: nnx.State, batch: Batch) -> jax.Array:
    merged = nnx.merge(graph, model, copy=True)
    drawn = losses.drawn_codes(merged, batch, KEY)
    encoded = merged.encode(batch.features, dropless=False)
    return task_losses.gradient_products(merged, encoded, batch, measured, "rate", drawn)

  return model, weigher, loss, products


def test_what_is_measured_is_the_square_of_the_gradient(
  parts: Any, few: config.Config, batch: Batch, measured: dict[str, TaskStatistics]
) -> None:
  model, weigher, loss, products = parts
  pull = np.asarray(loss(model, batch, weigher.initial()).pull)
  square = np.diagonal(products(model, batch))
  for i, (name, task) in enumerate(few.active_tasks.items()):
    if task.has_labels:
      by = measured[name].rate * len(batch.features.length)
      assert pull[i] / by**2 == pytest.approx(square[i], rel=1e-3), name
    assert pull[i] > 0
  late = {**weigher.initial(), "steps": jnp.full(len(pull), weighting.FIRST_MEASURED + 1.0)}
  np.testing.assert_array_equal(loss(model, batch, late).pull, 0)


def test_every_task_pulls_by_its_labels_whatever_the_size_of_its_gradients(
  parts: Any, few: config.Config, batch: Batch, measured: dict[str, TaskStatistics]
) -> None:
  """At equal weights the strongest task pulls many times as hard as the weakest."""
  model, weigher, loss, products = parts
  first = loss(model, batch, weigher.initial())
  state = weigher.update(weigher.initial(), first.seen._replace(pull=first.pull))
  w = np.asarray(loss(model, batch, state).weights)
  norm = np.sqrt(np.diagonal(products(model, batch)))
  met = np.asarray(first.seen.labels)
  pulls, plain = {}, {}
  for i, (name, task) in enumerate(few.active_tasks.items()):
    if not task.has_labels:
      continue
    of, rows = measured[name], len(batch.features.length)
    # The norm in a batch with as many labels as there are on average, of labels that are independent.
    usual = norm[i] * np.sqrt(of.rate * rows / met[i]) * np.sqrt(of.rate / of.averaged)
    pulls[name], plain[name] = w[i] * usual / np.sqrt(of.independent), usual / np.sqrt(of.independent)
  assert max(pulls.values()) / min(pulls.values()) == pytest.approx(1, rel=1e-3)
  assert max(plain.values()) / min(plain.values()) > 3


def test_micro_batches_measure_what_the_whole_batch_does(parts: Any, few: config.Config, batch: Batch) -> None:
  model, weigher, loss, _ = parts
  whole = np.asarray(loss(model, batch, weigher.initial()).pull)
  half = len(batch.features.length) // 2
  sums = sum(
    np.asarray(loss(model, jax.tree.map(lambda a, i=i: a[i * half : (i + 1) * half], batch), weigher.initial()).pull)
    for i in range(2)
  )
  for i, (name, task) in enumerate(few.active_tasks.items()):
    if task.has_labels and name != "sampled":  # draws are a batch's own, and a contrast is about pairs of rows
      assert sums[i] == pytest.approx(whole[i], rel=1e-3), name


def test_labels_of_users_count_once_and_those_of_values_each(measured: dict[str, TaskStatistics]) -> None:
  assert measured["tier"].independent == measured["tier"].averaged <= 1 < measured["tier"].rate
  assert measured["bought"].independent == pytest.approx(measured["bought"].rate)
  assert measured["next_page"].independent < measured["next_page"].averaged == pytest.approx(measured["next_page"].rate)


@pytest.mark.parametrize("packing", [False, True])
def test_a_users_label_counts_once_a_user_also_in_rows_of_several(
  few: config.Config, every_task_dataset: Dataset, packing: bool
) -> None:
  cfg = config.override(few, [f"--config.train.packing={packing}"])
  batches = list(itertools.islice(training_batches.training_batches(every_task_dataset, cfg), 6))
  found = task_statistics.measure_tasks(cfg.active_tasks, every_task_dataset.schema.outputs, batches, 6)
  users = rows = 0
  for batch in batches:
    for known, owner in zip(batch.targets["tier"].known, batch.features.query_segment, strict=True):
      users, rows = users + len({int(u) for u, k in zip(owner, known, strict=True) if k}), rows + 1
  assert found.statistics["tier"].independent == found.statistics["tier"].averaged == pytest.approx(users / rows)


def test_a_task_that_has_stopped_moves_its_head_and_nothing_else(
  few: config.Config, every_task_dataset: Dataset, measured: dict[str, TaskStatistics], batch: Batch
) -> None:
  graph, model = nnx.split(model_constructor(few, every_task_dataset.schema)())
  model = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(KEY, p.shape, p.dtype), model)
  names = list(few.active_tasks)

  @jax.jit
  def gradient(model: nnx.State, pulls: jax.Array, chosen: jax.Array) -> nnx.State:
    def total(model: nnx.State) -> jax.Array:
      merged = nnx.merge(graph, model, copy=True)
      drawn, encoded = losses.drawn_codes(merged, batch, KEY), merged.encode(batch.features, dropless=True)
      slices = {n: losses._encoded_slices(merged, s, None)[0] for n, s in batch.slices.items()}
      of = {n: measured[n]._replace(gradient_scale=pulls) for n in names}
      sums = [task_losses.task_sums(merged, n, encoded, slices, batch, of[n], drawn).total for n in names]
      return jnp.sum(jnp.stack(sums) * chosen)

    return jax.grad(total)(model)

  def moved(name: str, pulls: float) -> set[tuple[Any, ...]]:
    found = gradient(model, jnp.float32(pulls), jnp.float32([n == name for n in names]))
    return {path for path, v in nnx.to_flat_state(found) if np.any(np.asarray(v.get_value()))}

  for name, task in few.active_tasks.items():
    going, stopped = moved(name, 1.0), moved(name, 0.0)
    of_head = {path for path in going if path[:2] == ("heads", name)}
    assert stopped == of_head, name
    assert going > of_head and bool(of_head) == task.has_labels, name
