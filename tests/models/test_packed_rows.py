"""Users packed into one row are encoded, and count in every loss, as if each had a row alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config
from supermoe_jax.data import batches, prepare
from supermoe_jax.data.batches import Batch, Features
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.windows import join
from supermoe_jax.models.supermoe import Encoded
from supermoe_jax.training import losses, statistics
from supermoe_jax.training.losses import TaskLoss
from supermoe_jax.training.step import build
from tests.fixtures.small_log import every_task_config, write_log
from tests.fixtures.small_model import filled, random_features
from tests.fixtures.unpacking import alone, users

SETTINGS = {
  "none": {},
  "token": {"conditioning": "token"},
  "shuffled": {"conditioning": "token", "task_ids": "shuffled"},
  "gate": {"conditioning": "gate"},
  "mmoe": {"conditioning": "mmoe"},
  "ple": {"conditioning": "ple"},
  "gru": {"encoder": "gru", "conditioning": "mmoe"},
  "long": {"dispatch": "dense"},  # in rows that are attended to in loops
}
TOLERANCE = 1e-6
ROOM, LONG_ROOM, SNAPSHOTS = 24, 560, 12


def filled_up(x: np.ndarray, size: int) -> np.ndarray:
  """`size` rows, the last ones of padding."""
  return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])


def part(features: Features, row: int) -> Features:
  """A row's events and snapshots without padding."""
  n, valid = int(features.length[row]), features.query_valid[row]
  return Features(*(x[row][valid] if k.startswith("query_") else x[row][:n] for k, x in features._asdict().items()))


@functools.cache
def packed(room: int = ROOM) -> Features:
  """Two rows of several users each, of 10, 7 and 4 events, one of them without snapshots; and rows of padding."""
  parts = [part(random_features(seed), row) for seed in (0, 1) for row in (0, 1, 2)]
  parts[4] = parts[4]._replace(**{k: x[:0] for k, x in parts[4]._asdict().items() if k.startswith("query_")})
  rows = [join(parts[:3], room, SNAPSHOTS), join(parts[3:], room, SNAPSHOTS)]
  return Features(*(filled_up(np.stack(column), len(parts)) for column in zip(*rows)))


@functools.cache
def encode(kind: str):
  graph, state = nnx.split(filled(**SETTINGS[kind]))
  run = jax.jit(lambda state, features: nnx.merge(graph, state, copy=True).encode(features, dropless=True))
  return lambda features: jax.tree.map(np.asarray, run(state, features))


def of_user(encoded: Encoded, features: Features, row: int, user: int) -> dict[str, np.ndarray]:
  """What is encoded of a user: their events' states, and all that there is of their snapshots."""
  own = features.query_segment[row] == user
  out = {"events": encoded.events[row, features.segment[row] == user], "z": encoded.z[row, own]}
  return out | {k: getattr(encoded, k)[row, own] for k in ("views", "gates") if getattr(encoded, k) is not None}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_user_is_encoded_as_in_a_row_alone(kind: str) -> None:
  features = packed(LONG_ROOM if kind == "long" else ROOM)
  own = alone(Batch(features, {}, {}), {}).features
  both, each = encode(kind)(features), encode(kind)(own)
  assert len(users(features)) == 6
  for i, (row, user) in enumerate(users(features)):
    for name, mine in of_user(both, features, row, user).items():
      np.testing.assert_allclose(mine, of_user(each, own, i, 1)[name], rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("kind", SETTINGS)
def test_nothing_of_a_user_reaches_another_in_the_row(kind: str) -> None:
  features = packed(LONG_ROOM if kind == "long" else ROOM)
  changed = Features(*(x.copy() for x in features))
  row, user = 0, 2
  events, snapshots = features.segment[row] == user, features.query_segment[row] == user
  changed.codes[row, events] = 1
  changed.source[row, events] = 2
  changed.numeric[row, events] = 9.0
  changed.time[row, events] += 1e4
  changed.gap[row, events] = 77.0
  changed.query_events[row, snapshots] = 1
  changed.query_aggregates[row, snapshots] = -3.0
  before, after = encode(kind)(features), encode(kind)(changed)
  for at, other in users(features):
    mine, theirs = of_user(before, features, at, other), of_user(after, features, at, other)
    for name in mine:
      if (at, other) == (row, user):
        assert not np.array_equal(mine[name], theirs[name])
      else:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


# ----------------------------------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
  folder = tmp_path_factory.mktemp("rich")
  write_log(folder)
  raw = every_task_config(folder)
  raw["model"] |= {"max_events": 90, "dropout": 0.0, "layers": 1, "moe_every": 1, "conditioning": "token"}
  raw["train"] |= {"packing": True, "snapshots_per_row": 10, "batch_rows": 4}
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  return cfg


@pytest.fixture(scope="module")
def rich_dataset(rich: config.Config) -> Dataset:
  return Dataset(rich.data.path)


@pytest.mark.slow
def test_the_loss_of_packed_rows_is_the_sum_of_the_users_alone(rich: config.Config, rich_dataset: Dataset) -> None:
  stream = batches.training(rich_dataset, rich)
  measured = statistics.measure(rich.active_tasks, rich_dataset.schema.outputs, stream, 10)
  graph, state = nnx.split(build(rich, rich_dataset.schema)())

  @jax.jit
  def total(state: nnx.State, batch: Batch) -> dict[str, TaskLoss]:
    model = nnx.merge(graph, state, copy=True)
    encoded = model.encode(batch.features, dropless=True)
    drawn = {"sampled": jnp.array([[2, 5, 3, 2, 9, 4]])}  # one draw of a sampled softmax's values
    return {n: losses.labelled_loss(model, n, encoded, batch.targets[n], measured[n], drawn) for n in model.view_names}

  size = rich.train.batch_rows
  several, met = 0, dict.fromkeys(rich.active_views, 0.0)
  for _, batch in zip(range(3), stream):
    own = alone(batch, rich.tasks)
    several += len(own.features.length) > 2 * size
    summed = {n: [0.0, 0.0] for n in met}
    for start in range(0, len(own.features.length), size):
      some = jax.tree.map(lambda x, start=start, size=size: filled_up(x[start : start + size], size), own)
      for name, loss in total(state, some).items():
        summed[name] = [a + float(b) for a, b in zip(summed[name], loss)]
    for name, loss in total(state, batch).items():
      assert [float(v) for v in loss] == pytest.approx(summed[name], rel=1e-5, abs=1e-5), name
      met[name] += float(loss.weight)
  assert several and min(met.values()) > 0


def test_label_rates_of_packed_rows_are_those_of_their_users(rich: config.Config, rich_dataset: Dataset) -> None:
  """ρ is a mean over rows, and a packed row asks for its users' labels together: in an epoch, as many as ever."""
  one_row = dataclasses.replace(rich, train=dataclasses.replace(rich.train, batch_rows=1))
  stream = batches.training(rich_dataset, one_row)
  rows = iter(stream).get_state()["rows_of_an_epoch"]
  assert rows < 0.8 * len(rich_dataset)
  measured = statistics.measure(rich.active_tasks, rich_dataset.schema.outputs, stream, rows)
  whole = dataclasses.replace(one_row, train=dataclasses.replace(one_row.train, packing=False))
  alone_rates = statistics.measure(
    rich.active_tasks, rich_dataset.schema.outputs, batches.training(rich_dataset, whole), len(rich_dataset)
  )
  assert measured["next_page"].rate * rows == pytest.approx(alone_rates["next_page"].rate * len(rich_dataset))
  assert measured["next_page"].constant_loss == pytest.approx(alone_rates["next_page"].constant_loss, rel=0.05)
