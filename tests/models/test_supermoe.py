"""What the representation of a user may depend on: bit for bit, the past and nothing else."""

import jax
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.data import batches
from supermoe_jax.data.batches import Features
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.models.supermoe import SuperMoE
from supermoe_jax.training.step import build
from tests.fixtures.small_model import LABELLED, TASKS, B, L, S, filled, jitted, random_features, random_given


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
      changed = changed._replace(segment=features.segment.copy())
      changed.segment[row] = 1
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
    query_segment=features.query_segment.copy(),
    query_gap=features.query_gap.copy(),
  )
  changed.query_events[:, 1:] = 1
  changed.query_gap[:, 1:] = 1234.0
  changed.query_segment[:, 1:] = 0
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


def test_every_task_answers_at_its_sites_in_its_own_shape() -> None:
  model = filled()
  out = jitted(model)(random_features())
  assert {n: a.shape for n, a in out.answers.items()} == {
    "click": (B, L + 2 * S),
    "next": (B, L + S, 16),
    "quiet": (B, S),
    "topics": (B, S, 3),
    "plan": (B, S, 1),  # one class is still a dimension
    "age": (B, S),
  }
  encoded = jax.eval_shape(lambda f: model.encode(f, dropless=True), random_features())
  given = jax.ShapeDtypeStruct((B, 2 * S, 2), np.int32)
  asked = jax.eval_shape(lambda e, g: model.answers("click", e, events=False, given=g), encoded, given)
  assert asked.shape == (B, 2 * S)
  assert jax.eval_shape(lambda e: model.answers("next", e, events=False), encoded).shape == (B, S, 16)


def test_a_task_without_labels_has_neither_head_nor_view() -> None:
  model = filled(conditioning="token")
  assert list(model.tasks) == list(TASKS)
  assert model.view_names == LABELLED
  assert set(model.heads) == set(LABELLED)
  alone = filled({"pairs": TASKS["pairs"]}, conditioning="token")
  assert jax.eval_shape(lambda f: alone.encode(f, dropless=True), random_features()).views is None


def test_the_answer_about_an_event_depends_on_what_is_given_of_it() -> None:
  ask, features, given = jitted(filled()), random_features(), random_given()
  one, changed = ask(features, given), given.copy()
  changed[:, [2, L + 3], 0] = 1 + given[:, [2, L + 3], 0] % 8
  two = ask(features, changed)
  differs = (one.answers.pop("click") != two.answers.pop("click")).all(axis=0)
  assert np.flatnonzero(differs).tolist() == [2, L + 3]
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_events_asked_about_at_a_snapshot_are_asked_of_that_snapshot() -> None:
  model = filled(conditioning="token")
  encoded = model.encode(random_features(), dropless=True)
  states = model.states("click", encoded, events=True)
  np.testing.assert_array_equal(states[:, :L], encoded.events)
  for snapshot in range(S):
    for event in range(2):
      np.testing.assert_array_equal(states[:, L + 2 * snapshot + event], encoded.views[:, snapshot, 0])
  np.testing.assert_array_equal(model.states("next", encoded, events=False), encoded.views[:, :, 1])


@pytest.mark.parametrize("given", [None, np.zeros((B, S, 2), np.int32)])
def test_an_event_label_without_its_given_codes_is_an_error(given: np.ndarray | None) -> None:
  model = filled()
  encoded = jax.eval_shape(lambda f: model.encode(f, dropless=True), random_features())
  with pytest.raises(ValueError, match=r"task 'click' needs given of shape \(4, 16, 2\)"):
    jax.eval_shape(lambda e: model.answers("click", e, events=True, given=given), encoded)


def test_codes_given_to_another_task_are_an_error() -> None:
  model = filled()
  encoded = jax.eval_shape(lambda f: model.encode(f, dropless=True), random_features())
  with pytest.raises(ValueError, match="task 'quiet' is no event label"):
    jax.eval_shape(lambda e: model.answers("quiet", e, events=True, given=random_given()), encoded)
