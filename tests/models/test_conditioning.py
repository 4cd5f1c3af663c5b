"""The tasks' views of a user: what they depend on, and what they leave alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.data.batches import Features
from supermoe_jax.models.encoder import shift
from tests.fixtures.small_model import (
  LABELLED,
  TASKS,
  B,
  E,
  K,
  L,
  S,
  T,
  build,
  copy_tasks,
  filled,
  jitted,
  outputs,
  random_features,
  random_given,
  without,
)  # fmt: skip

FEATURES = random_features()
REAL = FEATURES.query_valid
SETTINGS = {
  "none": {},
  "token": {"conditioning": "token"},
  "gate": {"conditioning": "gate"},
  "mmoe": {"conditioning": "mmoe"},
  "ple": {"conditioning": "ple"},
  "gru": {"encoder": "gru", "conditioning": "mmoe"},
}
VIEWED = [name for name in SETTINGS if name != "none"]


@functools.cache
def model(kind: str):
  return filled(**SETTINGS[kind])


@functools.cache
def run(kind: str):
  return jitted(model(kind))


@functools.cache
def plain(kind: str):
  return run(kind)(FEATURES)


def assert_same(one, two, where) -> None:
  """z, views and gates of the snapshots `where [B, S]` are the same, bit for bit."""
  for name in ("z", "views", "gates"):
    mine, other = getattr(one, name), getattr(two, name)
    assert (mine is None) == (other is None)
    if mine is not None:
      np.testing.assert_array_equal(mine[where], other[where], err_msg=name)


def assert_close(one, two) -> None:
  np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def changed_after(features: Features, row: int, n: int) -> Features:
  """The same, but for everything that could be told of the row's events from number n on, and one event more."""
  copied = features._replace(**{k: getattr(features, k).copy() for k in ("codes", "source", "numeric", "time", "gap")})
  copied.codes[row, n:] = 1
  copied.source[row, n:] = 2
  copied.numeric[row, n:] = 9.0
  copied.time[row, n:] = 1e4
  copied.gap[row, n:] = 77.0
  segment = features.segment.copy()
  segment[row] = 1
  return copied._replace(segment=segment)


@pytest.mark.parametrize("kind", SETTINGS)
def test_events_at_or_after_a_snapshot_change_neither_z_nor_views(kind: str) -> None:
  for row in range(B):
    for snapshot in np.flatnonzero(REAL[row]):
      changed = run(kind)(changed_after(FEATURES, row, FEATURES.query_events[row, snapshot]))
      assert_same(changed, plain(kind), (row, snapshot))


@pytest.mark.parametrize("kind", SETTINGS)
def test_earlier_events_change_z_and_every_view(kind: str) -> None:
  changed = FEATURES._replace(codes=FEATURES.codes.copy())
  changed.codes[0, 2, 0] = 1 + changed.codes[0, 2, 0] % 8
  one, two = run(kind)(changed), plain(kind)
  assert (one.z[0] != two.z[0]).any(-1).all()
  if two.views is not None:
    assert (one.views[0] != two.views[0]).any(-1).all()


@pytest.mark.parametrize("kind", SETTINGS)
def test_other_snapshots_padding_and_other_rows_change_neither_z_nor_views(kind: str) -> None:
  snapshots = FEATURES._replace(
    query_events=FEATURES.query_events.copy(),
    query_segment=FEATURES.query_segment.copy(),
    query_gap=FEATURES.query_gap.copy(),
    query_aggregates=FEATURES.query_aggregates.copy(),
  )
  snapshots.query_events[:, 1:] = 1
  snapshots.query_segment[:, 1:] = 0
  snapshots.query_gap[:, 1:] = 1234.0
  snapshots.query_aggregates[:, 1:] = -3.0
  assert_same(run(kind)(snapshots), plain(kind), (slice(None), 0))

  padding = np.arange(L) >= FEATURES.length[:, None]
  padded = FEATURES._replace(codes=FEATURES.codes.copy(), numeric=FEATURES.numeric.copy(), gap=FEATURES.gap.copy())
  padded.codes[padding] = 2
  padded.numeric[padding] = -5.0
  padded.gap[padding] = 3.0
  assert_same(run(kind)(padded), plain(kind), REAL)

  others = random_features(seed=5)
  mixed = Features(*(np.concatenate([mine[:1], other[1:]]) for mine, other in zip(FEATURES, others)))
  assert_same(run(kind)(mixed), plain(kind), 0)


@pytest.mark.parametrize("kind", SETTINGS)
def test_fields_that_are_no_inputs_change_nothing(kind: str) -> None:
  changed = FEATURES._replace(codes=FEATURES.codes.copy(), numeric=FEATURES.numeric.copy())
  changed.codes[..., 1] = 3
  changed.numeric[..., 1] = 8.0
  jax.tree.map(np.testing.assert_array_equal, run(kind)(changed), plain(kind))


@pytest.mark.parametrize("kind", ["none", "token", "gate", "mmoe"])
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


@pytest.mark.parametrize("kind", ["none", "token", "gate", "mmoe", "ple"])
def test_the_parameters_of_a_task_change_its_own_view_and_answer_only(kind: str) -> None:
  for t, name in ((1, "next"), (4, "plan")):
    changed = copy_tasks(model(kind), filled(**SETTINGS[kind]))
    for path, variable in nnx.to_flat_state(nnx.state(changed)):
      if path[-1] == "task_kernel":
        variable[:, t] = 3 * variable[:, t]
      elif path[-1] == "task_vectors" or (path[-2:] == ("gates", "kernel")):
        variable[t] = 3 * variable[t]
      elif path[:2] == ("heads", name) or (path[0] == "sharing" and path[3:5] in (("tasks", t), ("gates", t))):
        variable[...] = variable.get_value() + 1.0
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


@pytest.mark.parametrize("kind", ["token", "mmoe"])
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


@pytest.mark.parametrize("kind", ["none", "token", "gate", "mmoe"])
def test_a_task_starts_the_same_whatever_others_there_are(kind: str) -> None:
  whole, fewer = build(**SETTINGS[kind]), build(without(TASKS, ["click", "topics"]), **SETTINGS[kind])
  started = nnx.to_flat_state(nnx.state(fewer))
  wanted = dict(nnx.to_flat_state(nnx.state(copy_tasks(whole, fewer))))
  for path, variable in started:
    np.testing.assert_array_equal(variable.get_value(), wanted[path].get_value(), err_msg=str(path))


@pytest.mark.parametrize("kind", ["token", "gate"])
def test_the_loss_of_a_task_moves_no_other_head_or_vector(kind: str) -> None:
  graph, state = nnx.split(model(kind))

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
    per_task = {"token": ("encoder", "task_vectors"), "gate": ("encoder", "gates", "kernel")}[kind]
    rows = moved[per_task].reshape(T, -1).sum(axis=1)
    assert (rows > 0).tolist() == [s == t for s in range(T)]


@pytest.mark.parametrize("kind", VIEWED)
def test_views_differ_from_z_and_from_each_other(kind: str) -> None:
  out = plain(kind)
  assert out.views.shape == (*out.z.shape[:2], T, out.z.shape[2])
  several = np.concatenate([out.z[:, :, None], out.views], axis=2)[REAL]
  for i in range(T + 1):
    for j in range(i):
      assert (np.abs(several[:, i] - several[:, j]).max(axis=-1) > 1e-4).all()


def test_z_is_the_same_with_and_without_task_tokens_or_gates() -> None:
  np.testing.assert_array_equal(plain("gate").z, plain("none").z)
  assert_close(plain("token").z, plain("none").z)  # rows of another length: products that round differently


def loud_router(**settings):
  """A model with task tokens in which task t chooses experts t and t + 1 (mod E), whatever the token holds."""
  tokens = filled(conditioning="token", **settings)
  loud = np.zeros((2, T, E), np.float32)
  for t in range(T):
    loud[:, t, t % E], loud[:, t, (t + 1) % E] = 60.0, 30.0
  tokens.encoder.stack.scanned.blocks[-1].feed_forward.router.task_kernel[...] = loud
  return tokens


@pytest.mark.parametrize("task_ids", ["true", "shuffled"])
def test_the_router_is_told_the_task_or_a_shifted_one(task_ids: str) -> None:
  told = np.broadcast_to(np.arange(T), (B, S, T))
  if task_ids == "shuffled":
    told = (told + np.asarray(shift(FEATURES, T))[..., None]) % T
  out = jitted(loud_router(task_ids=task_ids))(FEATURES)
  assert out.task_expert.shape == (2, B, S, T, K)
  for layer in out.task_expert:
    np.testing.assert_array_equal(layer[REAL], np.stack([told % E, (told + 1) % E], axis=-1)[REAL])
  np.testing.assert_array_equal(out.expert[:, REAL], plain("none").expert[:, REAL])  # snapshots have no task


def test_shuffled_ids_reach_the_router_only() -> None:
  deaf = filled(conditioning="token", task_ids="shuffled")
  deaf.encoder.stack.scanned.blocks[-1].feed_forward.router.task_kernel[...] = 0.0
  wanted = run("token")(FEATURES, state=nnx.state(deaf))
  np.testing.assert_array_equal(jitted(deaf)(FEATURES).views, wanted.views)


def test_shifts_depend_on_the_snapshot_alone_and_take_every_value() -> None:
  rng = np.random.default_rng(0)
  n = 3000
  many = FEATURES._replace(
    query_events=rng.integers(0, 50, (n, 1)).astype(np.int32),
    query_gap=rng.uniform(0, 500, (n, 1)).astype(np.float32),
    query_time=rng.uniform(0, 5000, (n, 1)).astype(np.float32),
  )
  shifts = np.asarray(shift(many, T))
  share = np.bincount(shifts[:, 0], minlength=T) / n
  assert np.abs(share - 1 / T).max() < 0.03
  turned = Features(*(part[::-1] for part in many))
  np.testing.assert_array_equal(np.asarray(shift(turned, T))[::-1], shifts)


def test_dropped_choices_are_counted_for_each_task() -> None:
  graph, state = nnx.split(loud_router(capacity_factor=0.5))
  stats = jax.jit(lambda s, f: nnx.merge(graph, s, copy=True).encode(f, dropless=False).experts.stats)(state, FEATURES)
  tokens = FEATURES.length.sum() + REAL.sum() * (1 + T)
  np.testing.assert_array_equal(stats.routed + stats.dropped, [K * tokens] * 2)
  assert stats.task_dropped.shape == (2, T)
  # Experts 0 to 2 are wanted by three or four tasks of the six, and take half of an even share.
  capacity = -(-K * B * (L + S * (1 + T)) // E) // 2 + 1
  wanted = REAL.sum() * np.bincount([e % E for t in range(T) for e in (t, t + 1)], minlength=E)
  assert (np.sum(stats.task_dropped, axis=1) >= np.maximum(wanted - capacity, 0).sum()).all()
  assert (np.sum(stats.task_dropped, axis=1) <= stats.dropped).all()
  assert (stats.task_dropped <= K * REAL.sum()).all()


@pytest.mark.parametrize(
  "settings",
  [
    {"experts": 1, "experts_per_token": 1},
    {"experts": 3, "experts_per_token": 3, "shared_experts": 1, "activation": "swiglu", "moe_every": 2},
  ],
)
def test_a_gate_that_is_the_router_sees_z(settings) -> None:
  gated = filled({n: TASKS[n] for n in LABELLED if n != "next"}, conditioning="gate", **settings)
  router = gated.encoder.stack.scanned.blocks[-1].feed_forward.router
  gated.encoder.gates.kernel[0], gated.encoder.gates.kernel[1] = router.kernel[-1], 2 * router.kernel[-1]
  out = jitted(gated)(FEATURES)
  np.testing.assert_allclose(out.views[REAL][:, 0], out.z[REAL], atol=1e-5)
  if settings["experts"] > 1:
    assert np.abs(out.views[REAL][:, 1] - out.z[REAL]).max() > 1e-3
  np.testing.assert_allclose(out.gates.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("kind", ["token", "gate", "gru", "ple"])
def test_a_mesh_gives_the_numbers_of_one_device(kind: str) -> None:
  mesh = sharding.make_mesh(config.Mesh(2, 2, 2))
  graph, state = nnx.split(model(kind))
  placed = jax.device_put(state, sharding.shardings(mesh, state))
  with jax.set_mesh(mesh):
    out = jax.jit(lambda s, f, g: outputs(nnx.merge(graph, s, copy=True), f, g))(
      placed, *jax.device_put((FEATURES, random_given()), sharding.batch_sharding(mesh))
    )
  wanted = plain(kind)
  for name in ("z", "views", "gates"):
    mine, other = getattr(out, name), getattr(wanted, name)
    if other is not None:
      np.testing.assert_allclose(np.asarray(mine)[REAL], other[REAL], atol=2e-5, err_msg=name)
  for name in LABELLED:
    np.testing.assert_allclose(out.answers[name], wanted.answers[name], atol=1e-4, err_msg=name)
