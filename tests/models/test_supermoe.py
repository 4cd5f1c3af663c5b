"""What the representation of a user may depend on: bit for bit, the past and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.data import batches
from supermoe_jax.data.batches import Features
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.layers.heads import BinaryHead
from supermoe_jax.models.supermoe import SuperMoE
from supermoe_jax.training.step import build


@pytest.fixture(scope="module")
def model(cfg: config.Config, dataset: Dataset) -> SuperMoE:
  return build(cfg, dataset.schema)()


@pytest.fixture(scope="module")
def encode(model: SuperMoE):
  """A jitted `features → z`, dropless as in evaluation."""
  graph, state = nnx.split(model)
  jitted = jax.jit(lambda s, f: nnx.merge(graph, s, copy=True).encode(f, dropless=True).z)
  return lambda features: np.asarray(jitted(state, features))


@pytest.fixture(scope="module")
def features(cfg: config.Config, dataset: Dataset) -> Features:
  return next(iter(batches.training(dataset, cfg))).features


def test_events_at_or_after_a_snapshot_do_not_change_it(encode, features: Features) -> None:
  before = encode(features)
  for row in range(len(features.length)):
    for snapshot in np.flatnonzero(features.query_valid[row]):
      n = features.query_events[row, snapshot]
      changed = features._replace(
        **{k: getattr(features, k).copy() for k in ("codes", "source", "numeric", "time", "gap")}
      )
      changed.codes[row, n:] = 1
      changed.source[row, n:] = 2
      changed.numeric[row, n:] = 9.0
      changed.time[row, n:] = 1e4
      changed.gap[row, n:] = 77.0
      changed = changed._replace(length=features.length.copy())
      changed.length[row] = len(features.codes[row])
      np.testing.assert_array_equal(encode(changed)[row, snapshot], before[row, snapshot])


def test_earlier_events_do_change_it(encode, features: Features) -> None:
  row = int(np.argmax(features.length))
  snapshot = int(np.argmax(features.query_events[row] * features.query_valid[row]))
  changed = features._replace(codes=features.codes.copy())
  changed.codes[row, 0] = 1 + changed.codes[row, 0] % 2
  assert not np.array_equal(encode(changed)[row, snapshot], encode(features)[row, snapshot])


def test_other_snapshots_of_the_pass_do_not_change_it(encode, features: Features) -> None:
  before = encode(features)
  changed = features._replace(
    query_events=features.query_events.copy(),
    query_valid=features.query_valid.copy(),
    query_gap=features.query_gap.copy(),
  )
  changed.query_events[:, 1:] = 1
  changed.query_gap[:, 1:] = 1234.0
  changed.query_valid[:, 1:] = False
  np.testing.assert_array_equal(encode(changed)[:, 0], before[:, 0])


def test_other_rows_do_not_change_it(encode, features: Features) -> None:
  before = encode(features)
  mixed = Features(*(np.concatenate([part[:1], np.roll(part[1:], 3, axis=0)]) for part in features))
  np.testing.assert_array_equal(encode(mixed)[0], before[0])
  np.testing.assert_array_equal(encode(mixed)[4], before[1])


def test_what_padding_holds_changes_nothing(encode, features: Features) -> None:
  changed = features._replace(codes=features.codes.copy(), numeric=features.numeric.copy())
  padding = np.arange(features.codes.shape[1]) >= features.length[:, None]
  changed.codes[padding] = 2
  changed.numeric[padding] = -5.0
  real = features.query_valid
  np.testing.assert_array_equal(encode(changed)[real], encode(features)[real])


def test_a_row_without_events_stays_finite(encode, features: Features) -> None:
  empty = Features(*(np.zeros_like(part) for part in features))
  assert np.isfinite(encode(empty)).all()


def test_removing_a_task_leaves_z_and_the_other_answers(
  cfg: config.Config, dataset: Dataset, features: Features
) -> None:
  fewer = config.override(cfg, ["--config.exclude_tasks=quiet"])
  whole, less = build(cfg, dataset.schema)(), build(fewer, dataset.schema)()
  nnx.update(less.encoder, nnx.state(whole.encoder))
  for name in less.heads:
    nnx.update(less.heads[name], nnx.state(whole.heads[name]))

  def everything(model: SuperMoE) -> tuple[jax.Array, dict[str, jax.Array]]:
    graph, state = nnx.split(model)

    def answer(state: nnx.State, features: Features) -> tuple[jax.Array, dict[str, jax.Array]]:
      merged = nnx.merge(graph, state, copy=True)
      encoded = merged.encode(features, dropless=True)
      return encoded.z, {n: merged.answers(n, encoded, events=True) for n in less.tasks}

    return jax.jit(answer)(state, features)

  (z, answers), (fewer_z, fewer_answers) = everything(whole), everything(less)
  np.testing.assert_array_equal(z, fewer_z)
  for name in less.tasks:
    np.testing.assert_array_equal(answers[name], fewer_answers[name])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_every_mesh_gives_the_same_numbers(
  model: SuperMoE, encode, features: Features, sizes: tuple[int, int, int]
) -> None:
  mesh = sharding.make_mesh(config.Mesh(*sizes))
  graph, state = nnx.split(model)
  placed = jax.device_put(state, sharding.shardings(mesh, state))
  with jax.set_mesh(mesh):
    z = jax.jit(lambda s, f: nnx.merge(graph, s, copy=True).encode(f, dropless=True).z)(
      placed, jax.device_put(features, sharding.batch_sharding(mesh))
    )
  np.testing.assert_allclose(z, encode(features), atol=1e-5)


def test_a_model_without_experts_works(cfg: config.Config, dataset: Dataset, features: Features) -> None:
  plain = config.override(cfg, ["--config.model.moe_every=0"])
  graph, state = nnx.split(build(plain, dataset.schema)())
  encoded = jax.jit(lambda s, f: nnx.merge(graph, s, copy=True).encode(f, dropless=False))(state, features)
  assert encoded.experts.stats.load.shape == (0, 4)
  assert np.isfinite(encoded.z).all()


def test_one_value_in_question_keeps_its_dimension() -> None:
  model = BinaryHead(4, 1, rngs=nnx.Rngs(0))
  assert model(jnp.ones((2, 3, 4))).shape == (2, 3, 1)
  assert BinaryHead(4, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4))).shape == (2, 3)
