"""Shapes of a model's answers, what it refuses, how its tasks begin and learn, and what the hash of a snapshot is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config
from supermoe_jax.batch import Features
from supermoe_jax.models.encoder import Encoded, shown_aggregates, snapshot_hash
from tests.fixtures import grids
from tests.fixtures.small_model import (
  LABELLED,
  SCHEMA,
  SETTINGS,
  TASKS,
  B,
  E,
  L,
  S,
  T,
  build,
  filled,
  model,
  of_tasks,
  outputs,
  random_features,
  random_given,
  without,
)  # fmt: skip

FEATURES = random_features()
REAL = FEATURES.query_valid
NONE = model("none")  # what is made within a trace does not outlive it


def test_a_model_without_experts_works() -> None:
  graph, state = nnx.split(filled(moe_every=0))
  run = jax.jit(lambda s, f: nnx.merge(graph, s, copy=True).encode(f, dropless=False))
  encoded = run(state, random_features())
  assert encoded.experts.stats.load.shape == (0, E)
  assert np.isfinite(encoded.z).all()


def test_every_task_answers_at_its_sites_in_its_own_shape() -> None:
  out = jax.eval_shape(lambda f, g: outputs(NONE, f, g), random_features(), random_given())
  assert {n: a.shape for n, a in out.answers.items()} == {
    "click": (B, L + 2 * S),
    "next": (B, L + S, 16),
    "quiet": (B, S),
    "topics": (B, S, 3),
    "plan": (B, S, 1),  # one class is still a dimension
    "age": (B, S),
  }
  encoded = jax.eval_shape(lambda f: NONE.encode(f, dropless=True), random_features())
  given = jax.ShapeDtypeStruct((B, 2 * S, 2), np.int32)
  asked = jax.eval_shape(lambda e, g: NONE.answers("click", e, events=False, given=g), encoded, given)
  assert asked.shape == (B, 2 * S)
  assert jax.eval_shape(lambda e: NONE.answers("next", e, events=False), encoded).shape == (B, S, 16)


@pytest.mark.parametrize("kind", ["none", "token"])
def test_counts_of_values_reach_z_and_the_answers_about_these_values(kind: str) -> None:
  made, counts = model(kind), SCHEMA.value_counts["item"]
  more = FEATURES._replace(query_aggregates=FEATURES.query_aggregates.copy())
  more.query_aggregates[..., counts.first] += 1  # the first item's count in the first window

  @jax.jit
  def run(features: Features) -> tuple[Encoded, jax.Array, jax.Array, jax.Array]:
    encoded = made.encode(features, dropless=True)
    hidden = encoded._replace(aggregates=jnp.zeros_like(encoded.aggregates))
    topics = made.answers("topics", encoded, events=False) - made.answers("topics", hidden, events=False)
    next_item = made.answers("next", encoded, events=True) - made.answers("next", hidden, events=True)
    return encoded, topics, next_item, made.answers("quiet", encoded, events=False)

  (before, topics, next_item, quiet), (after, *others) = run(FEATURES), run(more)
  np.testing.assert_array_equal(before.events, after.events)
  assert np.all(np.any(np.asarray(before.z != after.z), axis=-1))
  moved = np.abs(np.asarray(others[0] - topics)).max(axis=(0, 1))
  assert moved[0] > 1e-3 and np.all(moved[1:] < 1e-4)  # the score of the item itself
  assert np.all(np.asarray(next_item)[:, :L] == 0) and np.all(np.any(np.asarray(next_item)[:, L:] != 0, axis=-1))
  assert np.all(np.asarray(others[2]) != np.asarray(quiet))  # through z


def test_heads_see_no_counts_where_training_hides_them() -> None:
  encoded = jax.jit(lambda f: NONE.encode(f, dropless=True, rngs=nnx.Rngs(0)))(FEATURES)
  np.testing.assert_array_equal(encoded.aggregates, shown_aggregates(FEATURES, training=True))
  np.testing.assert_array_equal(shown_aggregates(FEATURES, training=False), FEATURES.query_aggregates)


def test_a_task_without_labels_has_neither_head_nor_view() -> None:
  assert list(model("token").tasks) == list(TASKS)
  assert model("token").view_names == LABELLED
  assert set(model("token").heads) == set(LABELLED)
  alone = filled({"pairs": TASKS["pairs"]}, conditioning="token")
  assert jax.eval_shape(lambda f: alone.encode(f, dropless=True), random_features()).views is None


@pytest.mark.parametrize("given", [None, np.zeros((B, S, 2), np.int32)])
def test_an_event_label_without_its_given_codes_is_an_error(given: np.ndarray | None) -> None:
  encoded = jax.eval_shape(lambda f: NONE.encode(f, dropless=True), random_features())
  with pytest.raises(ValueError, match=r"task 'click' needs given of shape \(4, 42, 2\)"):
    jax.eval_shape(lambda e: NONE.answers("click", e, events=True, given=given), encoded)


def test_codes_given_to_another_task_are_an_error() -> None:
  encoded = jax.eval_shape(lambda f: NONE.encode(f, dropless=True), random_features())
  with pytest.raises(ValueError, match="task 'quiet' is no event label"):
    jax.eval_shape(lambda e: NONE.answers("quiet", e, events=True, given=random_given()), encoded)


# What is left out is not compiled.
STARTS = [("token", "heads"), *((kind, "") for kind in ("none", "token", "mmoe"))]


@pytest.mark.parametrize(("kind", "part"), grids.quick_few(STARTS[:1], STARTS))
def test_a_task_starts_the_same_whatever_others_there_are(kind: str, part: str) -> None:
  def started(tasks: dict[str, config.Task]) -> dict[tuple, jax.Array]:
    def make() -> list[tuple[tuple, nnx.Variable]]:
      flat = nnx.to_flat_state(nnx.state(build(tasks, **SETTINGS[kind])))
      return [(p, v) for p, v in flat if part in p or p[-1] in ("task_kernel", "task_vectors") or not part]

    paths = []
    values = jax.jit(lambda: [paths.append(path) or variable.get_value() for path, variable in make()])()
    return dict(zip(paths, map(np.asarray, values)))

  fewer = without(TASKS, ["click", "topics"])
  mine, whole = started(fewer), started(TASKS)
  picked = np.array([LABELLED.index(n) for n in LABELLED if n in fewer])
  assert len(mine) > len(picked)
  for path, value in mine.items():
    np.testing.assert_array_equal(value, of_tasks(path, whole[path], picked), err_msg=str(path))


@pytest.mark.nightly  # in the quick tier: the parameters of a task change no other answer
def test_the_loss_of_a_task_moves_no_other_head_or_vector() -> None:
  graph, state = nnx.split(model("token"))

  @jax.jit
  def gradient(state: nnx.State, weight: dict[str, jax.Array]) -> nnx.State:
    def loss(state: nnx.State) -> jax.Array:
      answers = outputs(nnx.merge(graph, state, copy=True), FEATURES, random_given()).answers
      return sum(weight[n] * jnp.sum(jnp.sin(a)) for n, a in answers.items())

    return jax.grad(loss)(state)

  for t, name in enumerate(LABELLED):
    of_task = nnx.to_flat_state(gradient(state, {n: jnp.float32(n == name) for n in LABELLED}))
    moved = {path: np.abs(variable.get_value()) for path, variable in of_task}
    for other in LABELLED:
      total = sum(g.sum() for path, g in moved.items() if path[:2] == ("heads", other))
      assert (total > 0) == (name == other), (name, other)
    rows = moved["encoder", "task_vectors"].reshape(T, -1).sum(axis=1)
    assert (rows > 0).tolist() == [s == t for s in range(T)]


def test_the_hash_depends_on_the_snapshot_alone_and_takes_every_value() -> None:
  rng = np.random.default_rng(0)
  n = 3000
  many = FEATURES._replace(
    query_events=rng.integers(0, 50, (n, 1)).astype(np.int32),
    query_gap=rng.uniform(0, 500, (n, 1)).astype(np.float32),
    query_time=rng.uniform(0, 5000, (n, 1)).astype(np.float32),
  )
  shifts = np.asarray(snapshot_hash(many, T))
  share = np.bincount(shifts[:, 0], minlength=T) / n
  assert np.abs(share - 1 / T).max() < 0.03
  # The shifts of tasks say nothing of what training hides from the heads.
  of_tasks, hidden = np.asarray(snapshot_hash(many, 2 * T))[:, 0] // 2, np.asarray(snapshot_hash(many, 2))[:, 0]
  assert np.abs([hidden[of_tasks == t].mean() - 0.5 for t in range(T)]).max() < 0.08
  turned = Features(*(part[::-1] for part in many))
  np.testing.assert_array_equal(np.asarray(snapshot_hash(turned, T))[::-1], shifts)
