"""Users packed into one row count in every loss as if each had a row alone, and are encoded so in long rows too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config
from supermoe_jax.batch import Batch
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.training import task_losses, task_statistics
from supermoe_jax.training.step import model_constructor
from supermoe_jax.training.task_losses import TaskLoss
from tests.fixtures.small_model import filled, noise, packed, rows_of
from tests.fixtures.unpacking import alone, users

LONG = 560  # a row of more than 512 is attended to in loops


@pytest.mark.nightly  # in the quick tier loops equal the plain formula, whoever shares a row
@pytest.mark.slow
def test_a_user_in_a_long_packed_row_is_encoded_as_in_a_row_alone() -> None:
  features = packed(LONG)
  own, places = alone(Batch(features, {}, {}), {}).features, users(features)
  graph, state = nnx.split(filled(dispatch="dense"))
  run = jax.jit(lambda state, features: nnx.merge(graph, state, copy=True).encode(features, dropless=True))
  both, each = run(state, rows_of(features, len(places))), run(state, own)
  for i, (row, user) in enumerate(places):
    events, snapshots = features.segment[row] == user, features.query_segment[row] == user
    np.testing.assert_allclose(both.events[row, events], each.events[i, : events.sum()], rtol=0, atol=1e-6)
    np.testing.assert_allclose(both.z[row, snapshots], each.z[i, : snapshots.sum()], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def rich(every_task: config.Config) -> config.Config:
  """Packed rows of a small model with task tokens."""
  settings = {"max_events": 90, "dropout": 0.0, "layers": 1, "moe_every": 1, "conditioning": "token"}
  rows = {"packing": True, "snapshots_per_row": 10, "batch_rows": 4}
  model, train = dataclasses.replace(every_task.model, **settings), dataclasses.replace(every_task.train, **rows)
  return dataclasses.replace(every_task, model=model, train=train)


def filled_up(x: np.ndarray, size: int) -> np.ndarray:
  """`size` rows, the last ones of padding."""
  return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])


def test_the_loss_of_packed_rows_is_the_sum_of_the_users_alone(
  rich: config.Config, every_task_dataset: Dataset
) -> None:
  stream = training_batches.training_batches(every_task_dataset, rich)
  measured = task_statistics.measure_tasks(rich.active_tasks, every_task_dataset.schema.outputs, stream, 10).statistics
  graph, state = nnx.split(noise(model_constructor(rich, every_task_dataset.schema)))

  @jax.jit
  def total(state: nnx.State, batch: Batch) -> dict[str, TaskLoss]:
    model = nnx.merge(graph, state, copy=True)
    encoded = model.encode(batch.features, dropless=True)
    drawn = {"sampled": jnp.array([[2, 5, 3, 2, 9, 4]])}  # one draw of a sampled softmax's values
    return {
      n: task_losses.labelled_loss(model, n, encoded, batch.targets[n], measured[n], drawn) for n in model.view_names
    }

  size = rich.train.batch_rows
  several, met = 0, dict.fromkeys(rich.active_views, 0.0)
  for _, batch in zip(range(3), stream):
    batch = batch._replace(slices={})  # which have no part in these losses
    own = alone(batch, rich.tasks)
    several += len(own.features.length) > 2 * size
    summed = {n: [0.0, 0.0] for n in met}
    for start in range(0, len(own.features.length), size):
      some = jax.tree.map(lambda x, start=start: filled_up(x[start : start + size], size), own)
      for name, loss in total(state, some).items():
        summed[name] = [a + float(b) for a, b in zip(summed[name], loss)]
    for name, loss in total(state, batch).items():
      assert [float(v) for v in loss] == pytest.approx(summed[name], rel=1e-5, abs=1e-5), name
      met[name] += float(loss.weight)
  assert several and min(met.values()) > 0


def test_label_rates_of_packed_rows_are_those_of_their_users(rich: config.Config, every_task_dataset: Dataset) -> None:
  """ρ is a mean over rows, and a packed row asks for its users' labels together: in an epoch, as many as ever."""
  one_row = dataclasses.replace(rich, train=dataclasses.replace(rich.train, batch_rows=1))
  stream = training_batches.training_batches(every_task_dataset, one_row)
  rows = iter(stream).get_state()["rows_of_an_epoch"]
  assert rows < 0.8 * len(every_task_dataset)
  measured = task_statistics.measure_tasks(
    rich.active_tasks, every_task_dataset.schema.outputs, stream, rows
  ).statistics
  whole = dataclasses.replace(one_row, train=dataclasses.replace(one_row.train, packing=False))
  alone_rates = task_statistics.measure_tasks(
    rich.active_tasks,
    every_task_dataset.schema.outputs,
    training_batches.training_batches(every_task_dataset, whole),
    len(every_task_dataset),
  ).statistics
  assert measured["next_page"].rate * rows == pytest.approx(alone_rates["next_page"].rate * len(every_task_dataset))
  assert measured["next_page"].constant_loss == pytest.approx(alone_rates["next_page"].constant_loss, rel=0.05)
