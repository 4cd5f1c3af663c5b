"""What the representation of a user and the tasks' views of it depend on, bit for bit, and what they leave alone."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.batch import Batch, Features
from supermoe_jax.models.encoder import snapshot_hash
from tests.fixtures import grids
from tests.fixtures.small_model import (
  LABELLED,
  SETTINGS,
  TASKS,
  B,
  E,
  Everything,
  K,
  L,
  S,
  T,
  changed_after,
  copy_tasks,
  filled,
  jitted,
  model,
  outputs,
  packed,
  plain,
  random_features,
  random_given,
  rows_of,
  run,
  without,
)  # fmt: skip
from tests.fixtures.unpacking import alone, users

FEATURES = random_features()
REAL = FEATURES.query_valid
VIEWED = [name for name in SETTINGS if name != "none"]
PACKED_TOLERANCE = 1e-6


def assert_same(one: Everything, two: Everything, where) -> None:
  """z, views and gates of the snapshots `where [B, S]` are the same, bit for bit."""
  for name in ("z", "views", "gates"):
    mine, other = getattr(one, name), getattr(two, name)
    assert (mine is None) == (other is None)
    if mine is not None:
      np.testing.assert_array_equal(mine[where], other[where], err_msg=name)


def assert_close(one, two) -> None:
  np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def copied(features: Features) -> Features:
  return Features(*(x.copy() for x in features))


def of_user(encoded: Everything, features: Features, row: int, user: int) -> dict[str, np.ndarray]:
  """What is encoded of a user: their events' states, and all that there is of their snapshots."""
  own = features.query_segment[row] == user
  out = {"events": encoded.events[row, features.segment[row] == user], "z": encoded.z[row, own]}
  return out | {k: getattr(encoded, k)[row, own] for k in ("views", "gates") if getattr(encoded, k) is not None}


# ------------------------------------------------------------------------------------------------- every conditioning


@pytest.mark.parametrize("kind", SETTINGS)
def test_events_at_or_after_a_snapshot_change_neither_z_nor_views(kind: str) -> None:
  for row in range(B):
    for snapshot in np.flatnonzero(REAL[row]):
      changed = run(kind)(changed_after(FEATURES, row, FEATURES.query_events[row, snapshot]))
      assert_same(changed, plain(kind), (row, snapshot))


@pytest.mark.parametrize("kind", SETTINGS)
def test_earlier_events_change_z_and_every_view(kind: str) -> None:
  changed = copied(FEATURES)
  changed.codes[0, 2, 0] = 1 + changed.codes[0, 2, 0] % 8
  one, two = run(kind)(changed), plain(kind)
  assert (one.z[0] != two.z[0])[REAL[0]].any(-1).all()
  if two.views is not None:
    assert (one.views[0] != two.views[0])[REAL[0]].any(-1).all()


@pytest.mark.parametrize("kind", SETTINGS)
def test_other_snapshots_change_neither_z_nor_views(kind: str) -> None:
  changed = copied(FEATURES)
  changed.query_events[:, 1:] = 1
  changed.query_segment[:, 1:] = 0
  changed.query_gap[:, 1:] = 1234.0
  changed.query_aggregates[:, 1:] = -3.0
  assert_same(run(kind)(changed), plain(kind), (slice(None), 0))


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_padding_holds_changes_neither_z_nor_views(kind: str) -> None:
  changed, padding = copied(FEATURES), np.arange(L) >= FEATURES.length[:, None]
  changed.codes[padding] = 2
  changed.numeric[padding] = -5.0
  changed.gap[padding] = 3.0
  assert_same(run(kind)(changed), plain(kind), REAL)


@pytest.mark.parametrize("kind", SETTINGS)
def test_other_rows_change_neither_z_nor_views(kind: str) -> None:
  others = random_features(seed=5)
  mixed = run(kind)(Features(*(np.concatenate([mine[:2], other[2:]]) for mine, other in zip(FEATURES, others))))
  for name in ("z", "views", "gates"):
    if getattr(mixed, name) is not None:
      np.testing.assert_array_equal(getattr(mixed, name)[:2], getattr(plain(kind), name)[:2], err_msg=name)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_rows_place_changes_z_and_views_by_no_more_than_the_order_of_sums(kind: str) -> None:
  """On some processors the products of MMoE, PLE and GRU add up the rows at their edge in another order."""
  most = PACKED_TOLERANCE if kind in ("mmoe", "ple", "gru") else 0.0
  others = random_features(seed=5)
  mixed = run(kind)(Features(*(np.concatenate([other[2:], mine[:2]]) for mine, other in zip(FEATURES, others))))
  for name in ("z", "views", "gates"):
    if getattr(mixed, name) is not None:
      moved, wanted = getattr(mixed, name)[2:], getattr(plain(kind), name)[:2]
      np.testing.assert_allclose(moved, wanted, rtol=0, atol=most, err_msg=name)


@pytest.mark.parametrize("kind", SETTINGS)
def test_fields_that_are_no_inputs_change_nothing(kind: str) -> None:
  changed = copied(FEATURES)
  changed.codes[..., 1] = 3
  changed.numeric[..., 1] = 8.0
  jax.tree.map(np.testing.assert_array_equal, run(kind)(changed), plain(kind))


@pytest.mark.parametrize("kind", SETTINGS)
def test_rows_without_events_stay_finite(kind: str) -> None:
  empty = run(kind)(Features(*map(np.zeros_like, FEATURES)))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(empty))


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_user_in_a_packed_row_is_encoded_as_in_a_row_alone(kind: str) -> None:
  own = alone(Batch(packed(), {}, {}), {}).features
  both, places = run(kind)(packed()), users(packed())
  assert len(places) == 6
  for start in (0, B):
    each = run(kind)(rows_of(Features(*(x[start : start + B] for x in own)), B))
    for i, (row, user) in enumerate(places[start : start + B]):
      wanted = of_user(each, Features(*(x[start : start + B] for x in own)), i, 1)
      for name, mine in of_user(both, packed(), row, user).items():
        np.testing.assert_allclose(mine, wanted[name], rtol=0, atol=PACKED_TOLERANCE, err_msg=name)


@pytest.mark.parametrize("kind", SETTINGS)
def test_nothing_of_a_user_reaches_another_in_a_packed_row(kind: str) -> None:
  features, changed = packed(), copied(packed())
  row, user = 0, 2
  events, snapshots = features.segment[row] == user, features.query_segment[row] == user
  changed.codes[row, events] = 1
  changed.source[row, events] = 2
  changed.numeric[row, events] = 9.0
  changed.time[row, events] += 1e4
  changed.gap[row, events] = 77.0
  changed.query_events[row, snapshots] = 1
  changed.query_aggregates[row, snapshots] = -3.0
  before, after = run(kind)(features), run(kind)(changed)
  for at, other in users(features):
    mine, theirs = of_user(before, features, at, other), of_user(after, features, at, other)
    for name in mine:
      if (at, other) == (row, user):
        assert not np.array_equal(mine[name], theirs[name])
      else:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("kind", VIEWED)
def test_views_differ_from_z_and_from_each_other(kind: str) -> None:
  out = plain(kind)
  assert out.views.shape == (*out.z.shape[:2], T, out.z.shape[2])
  several = np.concatenate([out.z[:, :, None], out.views], axis=2)[REAL]
  for i in range(T + 1):
    for j in range(i):
      assert (np.abs(several[:, i] - several[:, j]).max(axis=-1) > 1e-4).all()


# ------------------------------------------------------------------------------------------------------------ the tasks


@pytest.mark.parametrize("kind", grids.quick_few(["token"], ["none", "token", "mmoe"]))
def test_removing_a_task_leaves_z_and_the_other_tasks(kind: str) -> None:
  tasks = without(TASKS, ["next", "topics"])
  fewer = copy_tasks(model(kind), filled(tasks, **SETTINGS[kind]))
  one, two = jitted(fewer)(FEATURES), plain(kind)
  # With fewer tokens a row is shorter and its products are other programs, which round differently.
  same = assert_close if kind == "token" else np.testing.assert_array_equal
  same(one.z, two.z)
  same(one.events, two.events)
  kept = [LABELLED.index(n) for n in fewer.view_names]
  assert len(kept) == T - 2
  for mine, whole in ((one.views, two.views), (one.gates, two.gates)):
    if whole is not None:
      assert_close(mine, whole[:, :, kept])
  for name in fewer.view_names:
    assert_close(one.answers[name], two.answers[name])


@pytest.mark.parametrize("kind", ["none", "token", "mmoe", "ple"])
def test_the_parameters_of_a_task_change_its_own_view_and_answer_only(kind: str) -> None:
  for t, name in ((1, "next"), (4, "plan")):
    changed = filled(**SETTINGS[kind])
    for path, variable in nnx.to_flat_state(nnx.state(changed)):
      value = np.array(variable.get_value())
      if path[-1] == "task_kernel":
        value[:, t] *= 3
      elif path[-1] == "task_vectors" or (path[-2:] == ("gates", "kernel")):
        value[t] *= 3
      elif path[:2] == ("heads", name) or (path[0] == "sharing" and path[3:5] in (("tasks", t), ("gates", t))):
        value += 1
      variable.set_value(value)
    one, two = run(kind)(FEATURES, state=nnx.state(changed)), plain(kind)
    np.testing.assert_array_equal(one.z, two.z)
    np.testing.assert_array_equal(one.events, two.events)
    if two.views is not None and kind != "ple":  # all tasks' experts have a part in PLE's shared state
      differs = (one.views != two.views).any(-1)[REAL]
      assert differs[:, t].all()
      assert not np.delete(differs, t, axis=1).any()
    for other in LABELLED:
      if kind != "ple" or other == name:
        assert np.array_equal(one.answers[other], two.answers[other]) == (other != name), other


@pytest.mark.parametrize("kind", grids.quick_few(["mmoe"], ["token", "mmoe"]))
def test_permuted_tasks_give_permuted_outputs(kind: str) -> None:
  order = ["age", "pairs", "next", "click", "plan", "quiet", "topics"]
  other = copy_tasks(model(kind), filled({n: TASKS[n] for n in order}, **SETTINGS[kind]))
  one, two = jitted(other)(FEATURES), plain(kind)
  picked = [LABELLED.index(n) for n in other.view_names]
  assert picked != sorted(picked)
  np.testing.assert_array_equal(one.z, two.z)
  assert_close(one.views, two.views[:, :, picked])
  for name in LABELLED:
    assert_close(one.answers[name], two.answers[name])


def test_z_is_the_same_with_and_without_task_tokens() -> None:
  assert_close(plain("token").z, plain("none").z)  # rows of another length: products that round differently


def loud_router(**settings):
  """A model with task tokens in which task t chooses experts t and t + 1 (mod E), whatever the token holds."""
  tokens = filled(conditioning="token", **settings)
  loud = np.zeros((2, T, E), np.float32)
  for t in range(T):
    loud[:, t, t % E], loud[:, t, (t + 1) % E] = 60.0, 30.0
  tokens.encoder.stack.scanned.blocks[-1].feed_forward.router.task_kernel.set_value(loud)
  return tokens


@pytest.mark.parametrize("task_ids", ["true", "shuffled"])
def test_the_router_is_told_the_task_or_a_shifted_one(task_ids: str) -> None:
  told = np.broadcast_to(np.arange(T), (B, S, T))
  if task_ids == "shuffled":
    told = (told + np.asarray(snapshot_hash(FEATURES, 2 * T))[..., None] // 2) % T
  kind = {"true": "token", "shuffled": "shuffled"}[task_ids]
  out = run(kind)(FEATURES, state=nnx.state(loud_router()))
  assert out.task_expert.shape == (2, B, S, T, K)
  for layer in out.task_expert:
    np.testing.assert_array_equal(layer[REAL], np.stack([told % E, (told + 1) % E], axis=-1)[REAL])
  np.testing.assert_array_equal(out.expert[:, REAL], plain("none").expert[:, REAL])  # snapshots have no task


def test_shuffled_ids_reach_the_router_only() -> None:
  deaf = filled(conditioning="token")
  kernel = deaf.encoder.stack.scanned.blocks[-1].feed_forward.router.task_kernel
  kernel.set_value(np.zeros(kernel.shape, np.float32))
  told, shuffled = (run(kind)(FEATURES, state=nnx.state(deaf)) for kind in ("token", "shuffled"))
  np.testing.assert_array_equal(told.views, shuffled.views)
  assert not np.array_equal(plain("token").views, plain("shuffled").views)


def test_dropped_choices_are_counted_for_each_task() -> None:
  graph, state = nnx.split(loud_router(capacity_factor=0.1))
  stats = jax.jit(lambda s, f: nnx.merge(graph, s, copy=True).encode(f, dropless=False).experts.stats)(state, FEATURES)
  tokens = FEATURES.length.sum() + REAL.sum() * (1 + T)
  np.testing.assert_array_equal(stats.routed + stats.dropped, [K * tokens] * 2)
  assert stats.task_dropped.shape == (2, T)
  # Experts 0 to 2 are wanted by three or four tasks of the six, and take a tenth of an even share.
  capacity = math.ceil(0.1 * K * B * (L + S * (1 + T)) / E)
  wanted = REAL.sum() * np.bincount([e % E for t in range(T) for e in (t, t + 1)], minlength=E)
  assert np.maximum(wanted - capacity, 0).sum() > 0
  assert (np.sum(stats.task_dropped, axis=1) >= np.maximum(wanted - capacity, 0).sum()).all()
  assert (np.sum(stats.task_dropped, axis=1) <= stats.dropped).all()
  assert (stats.task_dropped <= K * REAL.sum()).all()


MESHES = [
  ("token", (1, 4, 2)),
  ("token", (2, 2, 2)),
  ("mmoe", (2, 2, 2)),
  ("gru", (2, 2, 2)),
  ("ple", (2, 2, 2)),
  ("none", (8, 1, 1)),
]


@pytest.mark.parametrize(("kind", "sizes"), grids.quick_few(MESHES[:1], MESHES))
def test_a_mesh_gives_the_numbers_of_one_device(kind: str, sizes: tuple[int, int, int]) -> None:
  mesh = device_mesh.make_mesh(config.Mesh(*sizes))
  graph, state = nnx.split(model(kind))
  twice = 2 if sizes[0] == 8 else 1  # a device has whole rows
  inputs = jax.tree.map(lambda x: np.concatenate([x] * twice), (FEATURES, random_given()))
  placed = jax.device_put(state, sharding.shardings(mesh, state))
  with jax.set_mesh(mesh):
    out = jax.jit(lambda s, f, g: outputs(nnx.merge(graph, s, copy=True), f, g))(
      placed, *jax.device_put(inputs, sharding.batch_sharding(mesh))
    )
  for part in range(twice):
    rows = slice(part * B, (part + 1) * B)
    for name in ("z", "views", "gates"):
      mine, other = getattr(out, name), getattr(plain(kind), name)
      if other is not None:
        np.testing.assert_allclose(np.asarray(mine)[rows][REAL], other[REAL], atol=2e-5, err_msg=name)
    for name in LABELLED:
      np.testing.assert_allclose(out.answers[name][rows], plain(kind).answers[name], atol=1e-4, err_msg=name)


# ---------------------------------------------------------------------------------------------------------- the answers


def test_the_answer_about_an_event_depends_on_what_is_given_of_it() -> None:
  given = random_given()
  changed = given.copy()
  changed[:, [2, L + 3], 0] = 1 + given[:, [2, L + 3], 0] % 8
  one, two = run("none")(FEATURES, given), run("none")(FEATURES, changed)
  differs = (one.answers.pop("click") != two.answers.pop("click")).all(axis=0)
  assert np.flatnonzero(differs).tolist() == [2, L + 3]
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_events_asked_about_at_a_snapshot_are_asked_of_that_snapshot() -> None:
  out = plain("token")
  np.testing.assert_array_equal(out.states["click"][:, :L], out.events)
  for snapshot in range(S):
    for event in range(2):
      np.testing.assert_array_equal(out.states["click"][:, L + 2 * snapshot + event], out.views[:, snapshot, 0])
  np.testing.assert_array_equal(out.states["next"][:, L:], out.views[:, :, 1])
