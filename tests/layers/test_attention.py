import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supermoe_jax.layers import attention
from supermoe_jax.layers.attention import Attention, Visibility, gap_bias, rotate, visibility, with_task_tokens

L, S, D = 150, 3, 8  # more than one block of queries
T = L + S


@pytest.fixture(scope="module")
def layer() -> Attention:
  layer = Attention(D, 2, rngs=nnx.Rngs(0))
  layer.gap[...] = jax.random.normal(jax.random.key(9), layer.gap.shape) * 0.1
  return layer


@pytest.fixture(scope="module")
def attend(layer: Attention):
  """The jitted layer."""
  graph, state = nnx.split(layer)
  jitted = jax.jit(lambda s, *inputs: nnx.merge(graph, s)(*inputs))
  return lambda *inputs: np.asarray(jitted(state, *inputs))


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, jax.Array, jax.Array, Visibility]:
  """Row 0: user 1 with 60 events and a snapshot, user 2 with 90 and two. Row 1: one user, 90 events, then padding."""
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (2, T, D))
  time = jnp.sort(jax.random.uniform(keys[1], (2, T)) * 1000, axis=1)
  event = np.arange(L)
  segment = jnp.array([np.where(event < 60, 1, 2), event < 90], jnp.int32)
  visible, position = visibility(segment, jnp.array([[1, 2, 2], [1, 1, 1]]), jnp.array([[30, 10, 90], [0, 40, 90]]))
  return x, position, time, visible


@pytest.fixture(scope="module")
def token_inputs(inputs) -> tuple[jax.Array, jax.Array, jax.Array, Visibility]:
  """The same rows, with two task tokens a snapshot."""
  x, position, time, visible = inputs
  visible, position = with_task_tokens(visible, position, S, 2)
  tokens = jax.random.normal(jax.random.key(4), (2, 2 * S, D))
  time = jnp.concatenate([time, jnp.repeat(time[:, L:], 2, axis=1)], axis=1)
  return jnp.concatenate([x, tokens], axis=1), position, time, visible


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
  bias = gap_bias(layer.gap.get_value()[None], time, time)
  mask = jnp.asarray(as_mask(visible))[:, None]
  mixed = jax.nn.dot_product_attention(rotate(q, position), rotate(k, position), v, bias=bias, mask=mask)
  return layer.out(mixed.reshape(b, t, d))


def test_who_sees_whom() -> None:
  visible, position = visibility(jnp.array([[1, 1, 1, 0]]), jnp.array([[1, 1, 1, 0]]), jnp.array([[0, 2, 9, 2]]))
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
  segment, query_segment = jnp.array([[1, 1, 2, 2, 2, 0]]), jnp.array([[2, 1, 2, 3]])
  visible, position = visibility(segment, query_segment, jnp.array([[1, 9, 9, 9]]))
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
  visible, position = visibility(jnp.array([[1, 1, 0]]), jnp.array([[1, 1, 0]]), jnp.array([[1, 2, 0]]))
  visible, position = with_task_tokens(visible, position, snapshots=3, tasks=2)
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


def test_blocks_of_queries_equal_the_plain_formula(layer: Attention, attend, inputs, token_inputs) -> None:
  np.testing.assert_allclose(attend(*inputs), plain(layer, *inputs), atol=1e-5)
  np.testing.assert_allclose(attend(*token_inputs), plain(layer, *token_inputs), atol=1e-5)


def test_long_rows_equal_the_plain_formula_in_value_and_gradient(layer: Attention, token_inputs, monkeypatch) -> None:
  monkeypatch.setattr(attention, "LONG", T - 1)
  graph, state = nnx.split(layer)
  x, *rest = token_inputs
  weight = jax.random.normal(jax.random.key(1), x.shape)

  def total(form):
    def loss(s: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
      out = form(nnx.merge(graph, s), x, *rest)
      return jnp.sum(out * weight), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x)

  (_, out), gradient = total(Attention.__call__)
  (_, wanted), wanted_gradient = total(plain)
  np.testing.assert_allclose(out, wanted, atol=1e-5)
  for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


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
    segment = jnp.zeros((2, L), jnp.int32).at[:, :n].set(1)
    query_segment = jnp.zeros((2, S), jnp.int32).at[:, : len(snapshots)].set(1)
    alone_visible, alone_position = visibility(
      segment, query_segment, jnp.zeros((2, S), jnp.int32).at[:, : len(snapshots)].set(jnp.array(n_events))
    )
    there = np.r_[0:n, L : L + len(snapshots)]
    alone_x = jnp.zeros_like(x).at[:, there].set(x[:1, here])
    alone_time = jnp.zeros_like(time).at[:, there].set(time[:1, here])
    alone = attend(alone_x, alone_position, alone_time, alone_visible)[0]
    np.testing.assert_allclose(together[here], alone[there], atol=1e-5, err_msg=f"user {user}")


def test_what_is_not_visible_changes_nothing(attend, inputs) -> None:
  x, position, time, visible = inputs
  seen = as_mask(visible)
  changed = np.zeros(T, bool)
  changed[[20, 45, 100, 140, L + 2]] = True
  one, two = attend(x, position, time, visible), attend(x.at[:, changed].set(5.0), position, time, visible)
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
  assert jax.eval_shape(lambda s: nnx.merge(graph, s)(x.astype(jnp.bfloat16), *rest), state).dtype == jnp.bfloat16


def test_rotary_scores_depend_on_distance_only() -> None:
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
  score = [jnp.vdot(rotate(q, jnp.array([[p + 7]])), rotate(k, jnp.array([[p]]))) for p in (0, 30)]
  assert float(score[0]) == pytest.approx(float(score[1]), rel=1e-4)


def test_the_gap_bias_is_piecewise_linear_in_log_time(layer: Attention) -> None:
  time = jnp.array([[0.0, 0.5, 30.0, 900.0]])
  weight = layer.gap.get_value()
  bias = gap_bias(weight[None], time, time)[0]
  gap = np.log1p(np.abs(np.subtract.outer(time[0], time[0])))
  wanted = sum(
    np.asarray(weight)[i][:, None, None] * np.maximum(gap - knot, 0) for i, knot in enumerate(attention.GAP_KNOTS)
  )
  np.testing.assert_allclose(bias, wanted, atol=1e-5)


def test_a_width_that_cannot_be_rotated_is_an_error() -> None:
  with pytest.raises(ValueError, match="multiple of 2 × heads=6"):
    Attention(8, 3, rngs=nnx.Rngs(0))
