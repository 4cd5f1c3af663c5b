import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.layers import attention
from supermoe_jax.layers.attention import Attention, GapBias, Visibility, rotate, visibility, with_task_tokens
from tests.fixtures.small_model import noise

L, S, D = 150, 3, 8  # more than one block of queries
T = L + S


# Compiled: one by one their operations would take longer to compile.
who_sees_whom = jax.jit(visibility)
with_tokens = jax.jit(with_task_tokens, static_argnames=("snapshots", "tasks"))


@pytest.fixture(scope="module")
def layer() -> Attention:
  return noise(lambda: Attention(D, 2, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def attend(layer: Attention):
  """The jitted layer."""
  graph, state = nnx.split(layer)
  jitted = jax.jit(lambda s, *inputs: nnx.merge(graph, s)(*inputs))
  return lambda *inputs: np.asarray(jitted(state, *inputs))


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, jax.Array, np.ndarray, Visibility]:
  """Row 0: user 1 with 60 events and a snapshot, user 2 with 90 and two. Row 1: one user, 90 events, then padding."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, T, D)).astype(np.float32)
  time = np.sort(rng.uniform(0, 1000, (2, T)), axis=1).astype(np.float32)
  event = np.arange(L)
  segment = np.array([np.where(event < 60, 1, 2), event < 90], np.int32)
  query_events = np.array([[30, 10, 90], [0, 40, 90]], np.int32)
  visible, position = who_sees_whom(segment, np.array([[1, 2, 2], [1, 1, 1]], np.int32), query_events)
  return x, position, time, visible


@pytest.fixture(scope="module")
def token_inputs(inputs) -> tuple[np.ndarray, jax.Array, np.ndarray, Visibility]:
  """The same rows, with two task tokens a snapshot."""
  x, position, time, visible = inputs
  visible, position = with_tokens(visible, position, snapshots=S, tasks=2)
  tokens = np.random.default_rng(4).normal(size=(2, 2 * S, D)).astype(np.float32)
  time = np.concatenate([time, np.repeat(time[:, L:], 2, axis=1)], axis=1)
  return np.concatenate([x, tokens], axis=1), position, time, visible


def as_mask(visible: Visibility) -> np.ndarray:
  """`[B, T, T]`, whether i sees j."""
  start, end = (np.asarray(a)[:, :, None] for a in visible[:2])
  j = np.arange(start.shape[1])
  also = j == np.asarray(visible.also)[:, :, None] if visible.also is not None else False
  return ((start <= j) & (j < end)) | also | np.eye(len(j), dtype=bool)


def table(visible: Visibility) -> list[str]:
  return ["".join(str(int(v)) for v in row) for row in as_mask(visible)[0]]


def plain(layer: Attention, x: jax.Array, position: jax.Array, time: jax.Array, visible: Visibility) -> jax.Array:
  """The same by `jax.nn.dot_product_attention`, with every score at once."""
  b, t, d = x.shape
  q, k, v = jnp.moveaxis(layer.qkv(x).reshape(b, t, layer.heads, 3, d // layer.heads), 3, 0)
  bias = GapBias(layer.gap.get_value()[None], layer.time_unit)(time, time)
  mask = jnp.asarray(as_mask(visible))[:, None]
  mixed = jax.nn.dot_product_attention(rotate(q, position), rotate(k, position), v, bias=bias, mask=mask)
  return layer.out(mixed.reshape(b, t, d))


def test_who_sees_whom() -> None:
  visible, position = who_sees_whom(np.array([[1, 1, 1, 0]]), np.array([[1, 1, 1, 0]]), np.array([[0, 2, 9, 2]]))
  assert table(visible) == [
    "10000000",
    "11000000",
    "11100000",
    "00010000",  # padding sees itself; nobody else sees it
    "00001000",
    "11000100",
    "11100010",  # never more events than there are
    "00000001",
  ]
  assert position.tolist() == [[0, 1, 2, 0, 0, 2, 3, 0]]


def test_who_sees_whom_when_users_share_a_row() -> None:
  segment, query_segment = np.array([[1, 1, 2, 2, 2, 0]]), np.array([[2, 1, 2, 3]])
  visible, position = who_sees_whom(segment, query_segment, np.array([[1, 9, 9, 9]]))
  assert table(visible) == [
    "1000000000",
    "1100000000",
    "0010000000",
    "0011000000",
    "0011100000",
    "0000010000",
    "0010001000",
    "1100000100",
    "0011100010",
    "0000000001",  # a user without events
  ]
  assert position.tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 3, 0]]


def test_a_task_token_sees_what_its_snapshot_sees_and_the_snapshot() -> None:
  visible, position = who_sees_whom(np.array([[1, 1, 0]]), np.array([[1, 1, 0]]), np.array([[1, 2, 0]]))
  visible, position = with_tokens(visible, position, snapshots=3, tasks=2)
  assert table(visible) == [
    "100000000000",
    "110000000000",
    "001000000000",
    "100100000000",
    "110010000000",
    "000001000000",
    "100100100000",
    "100100010000",
    "110010001000",
    "110010000100",
    "000001000010",  # of padding: padding
    "000001000001",
  ]
  assert position.tolist() == [[0, 1, 0, 1, 2, 0, 1, 1, 2, 2, 0, 0]]


def test_nobody_sees_what_comes_later_in_the_row(inputs, token_inputs) -> None:
  assert not np.triu(as_mask(inputs[3]), 1).any()
  assert not np.triu(as_mask(token_inputs[3]), 1).any()


@pytest.fixture(scope="module")
def values_and_gradients(layer: Attention, token_inputs):
  """By form, its outputs and the gradients of a weighted sum of them by parameters and inputs."""
  graph, state = nnx.split(layer)
  x, *rest = token_inputs
  weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

  @functools.cache
  def of(form, long: int):
    def loss(s: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
      out = form(nnx.merge(graph, s), x, *rest)
      return jnp.sum(out * weight), out

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(attention, "LONG", long)
      gradient, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)
    return out, jax.tree.leaves(gradient)

  return of


@pytest.mark.parametrize("long", [attention.LONG, T - 1], ids=["blocks", "loops"])
def test_blocks_and_loops_of_queries_equal_the_plain_formula_in_value_and_gradient(
  values_and_gradients, long: int
) -> None:
  out, gradient = values_and_gradients(Attention.__call__, long)
  wanted, wanted_gradient = values_and_gradients(plain, attention.LONG)
  np.testing.assert_allclose(out, wanted, atol=1e-5)
  for one, two in zip(gradient, wanted_gradient, strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_without_task_tokens_too_the_layer_equals_the_plain_formula(layer: Attention, attend, inputs) -> None:
  x, *rest = inputs
  np.testing.assert_allclose(attend(*inputs), jax.jit(lambda x: plain(layer, x, *rest))(x), atol=1e-5)


def test_long_rows_never_hold_the_scores_of_all_pairs() -> None:
  b, heads, d, t = 1, 4, 128, 2048
  assert t > attention.LONG
  layer = nnx.eval_shape(lambda: Attention(d, heads, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(layer)

  def loss(s: nnx.State, x: jax.Array, *rest) -> jax.Array:
    return jnp.sum(jnp.square(nnx.merge(graph, s)(x, *rest)))

  whole = jax.ShapeDtypeStruct((b, t), jnp.int32)
  x, time = jax.ShapeDtypeStruct((b, t, d), jnp.float32), jax.ShapeDtypeStruct((b, t), jnp.float32)
  step = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x, whole, time, Visibility(whole, whole)).compile()
  all_pairs = b * heads * t * t * 4
  assert step.memory_analysis().temp_size_in_bytes < 0.4 * all_pairs


def test_packed_users_equal_the_users_alone(attend, inputs) -> None:
  x, position, time, visible = inputs
  together = attend(x, position, time, visible)[0]
  for user, events, snapshots, n_events in (1, slice(0, 60), [0], [30]), (2, slice(60, 150), [1, 2], [10, 90]):
    n = events.stop - events.start
    here = np.r_[events, L + np.array(snapshots)]
    segment, query_segment, query_events = (np.zeros((2, k), np.int32) for k in (L, S, S))
    segment[:, :n] = 1
    query_segment[:, : len(snapshots)] = 1
    query_events[:, : len(snapshots)] = n_events
    alone_visible, alone_position = who_sees_whom(segment, query_segment, query_events)
    there = np.r_[0:n, L : L + len(snapshots)]
    alone_x, alone_time = np.zeros_like(x), np.zeros_like(time)
    alone_x[:, there], alone_time[:, there] = x[:1, here], time[:1, here]
    alone = attend(alone_x, alone_position, alone_time, alone_visible)[0]
    np.testing.assert_allclose(together[here], alone[there], atol=1e-5, err_msg=f"user {user}")


def test_what_is_not_visible_changes_nothing(attend, inputs) -> None:
  x, position, time, visible = inputs
  seen = as_mask(visible)
  changed = np.zeros(T, bool)
  changed[[20, 45, 100, 140, L + 2]] = True
  other = np.where(changed[:, None], np.float32(5), x)
  one, two = attend(x, position, time, visible), attend(other, position, time, visible)
  untouched = ~(seen & changed).any(-1)
  np.testing.assert_array_equal(one[untouched], two[untouched])
  assert (one[~untouched] != two[~untouched]).any(-1).all()
  assert 0 < untouched[:, L:].sum() < 2 * S


def test_bfloat16_stays_close_to_float32(layer: Attention, attend, inputs) -> None:
  half = Attention(D, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  nnx.update(half, nnx.state(layer))
  graph, state = nnx.split(half)
  out = jax.jit(lambda s, *inputs: nnx.merge(graph, s)(*inputs))(state, *inputs)
  assert out.dtype == jnp.float32
  wanted = attend(*inputs)
  assert 0 < np.abs(out - wanted).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_the_output_has_the_dtype_of_the_input(dtype, inputs) -> None:
  x, *rest = inputs
  layer = nnx.eval_shape(lambda: Attention(D, 2, dtype=dtype, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(layer)
  assert jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x, *rest), state, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rotary_scores_depend_on_distance_only() -> None:
  q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
  turn = jax.jit(rotate)
  score = [np.vdot(turn(q, np.array([[p]])), turn(k, np.array([[p + d]]))) for p, d in ((7, -7), (37, -7), (37, 7))]
  assert score[0] == pytest.approx(score[1], rel=1e-4)
  assert score[0] != pytest.approx(score[2], rel=1e-2)


@pytest.mark.parametrize(
  ("unit", "per_hour", "knots"), [("seconds", 3600, (0, 1, 24, 672)), ("hours", 1, (0, 24, 672))]
)
def test_the_gap_bias_is_piecewise_linear_in_log_time(unit: str, per_hour: int, knots: tuple[int, ...]) -> None:
  time = np.array([[0.0, 0.001, 0.5, 30.0, 900.0]], np.float32)
  weight = np.random.default_rng(0).normal(size=(len(knots), 2)).astype(np.float32)
  bias = GapBias(jnp.asarray(weight)[None], unit)(time, time)[0]
  gap = np.log1p(np.abs(np.subtract.outer(time[0], time[0])) * per_hour)
  log_knots = np.log1p(np.array(knots) * per_hour)
  wanted = sum(weight[i][:, None, None] * np.maximum(gap - knot, 0) for i, knot in enumerate(log_knots))
  np.testing.assert_allclose(bias, wanted, rtol=1e-4, atol=1e-4)


def test_seconds_of_a_session_and_places_in_an_order_are_told_apart(layer: Attention) -> None:
  """In hours, gaps of five seconds and of a minute are both 0: a bias of any usual size moved nothing."""
  assert layer.time_unit == "seconds"
  bias = GapBias(jnp.ones((1, 4, 1)), layer.time_unit)(np.zeros((1, 1)), np.array([[1, 5, 60]]) / 3600)[0, 0, 0]
  assert (np.diff(bias) > 1).all()


def test_a_width_that_cannot_be_rotated_is_an_error() -> None:
  with pytest.raises(ValueError, match="multiple of 2 × heads=6"):
    Attention(8, 3, rngs=nnx.Rngs(0))
