import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from supermoe_jax import config, sharding
from supermoe_jax.layers.moe import Mlp, MoE, MoEOutput
from supermoe_jax.layers.routing import BalanceBias
from tests.fixtures import dispatch_oracle as oracle

B, L, D, H = 2, 24, 8, 16


@pytest.fixture(scope="module")
def x() -> jax.Array:
  return jax.random.normal(jax.random.key(0), (B, L, D))


@pytest.fixture(scope="module")
def valid() -> jax.Array:
  return jnp.arange(L)[None] < jnp.array([24, 10])[:, None]


def apply(moe: MoE, x: jax.Array, valid: jax.Array, *, dropless: bool = False) -> MoEOutput:
  graph, state = nnx.split(moe)
  return jax.jit(lambda s, x, v: nnx.merge(graph, s)(x, v, dropless=dropless))(state, x, valid)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dropless", [True, False])
def test_experts_copied_from_a_dense_mlp_reproduce_it(
  x: jax.Array, valid: jax.Array, dropless: bool, activation: str
) -> None:
  mlp = Mlp(D, H, activation=activation, rngs=nnx.Rngs(0))
  moe = MoE.from_dense(mlp, 4, capacity_factor=4.0, rngs=nnx.Rngs(1))
  out = apply(moe, x, valid, dropless=dropless)
  np.testing.assert_allclose(out.y, jnp.where(valid[..., None], mlp(x), 0.0), atol=1e-5)


def test_one_expert_with_its_gate_at_one_is_the_dense_mlp(x: jax.Array, valid: jax.Array) -> None:
  mlp = Mlp(D, H, rngs=nnx.Rngs(0))
  out = apply(MoE.from_dense(mlp, 1, 1, rngs=nnx.Rngs(1)), x, valid)  # the softmax over one expert is 1
  np.testing.assert_allclose(out.y, jnp.where(valid[..., None], mlp(x), 0.0), atol=1e-5)
  assert float(out.aux.balance_loss) == pytest.approx(1)


def test_upcycling_that_would_not_reproduce_the_mlp_is_an_error() -> None:
  mlp = Mlp(D, H, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="use k=2"):
    MoE.from_dense(mlp, 4, 1, rngs=nnx.Rngs(1))
  with pytest.raises(ValueError, match="shared_experts would add"):
    MoE.from_dense(mlp, 4, shared_experts=1, rngs=nnx.Rngs(1))
  with pytest.raises(ValueError, match="activation='swiglu' is not the MLP's, 'gelu'"):
    MoE.from_dense(mlp, 4, activation="swiglu", rngs=nnx.Rngs(1))


@pytest.mark.parametrize("shape", [(0, 3, D), (2, 0, D)])
@pytest.mark.parametrize("dropless", [True, False])
def test_an_empty_batch_gives_an_empty_result(shape: tuple[int, ...], dropless: bool) -> None:
  out = MoE(D, H, 4, 2, rngs=nnx.Rngs(0))(jnp.zeros(shape), jnp.zeros(shape[:2], bool), dropless=dropless)
  assert out.y.shape == shape
  assert int(out.stats.routed + out.stats.dropped) == 0
  assert np.isfinite(out.aux.z_loss)


def test_more_padding_changes_nothing_when_nothing_drops(x: jax.Array, valid: jax.Array) -> None:
  moe = MoE(D, H, 4, 2, rngs=nnx.Rngs(0))
  more = apply(moe, jnp.pad(x, ((0, 0), (0, 8), (0, 0))), jnp.pad(valid, ((0, 0), (0, 8))), dropless=True)
  np.testing.assert_array_equal(more.y[:, :L], apply(moe, x, valid, dropless=True).y)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"activation": "relu"}, "activation='relu' must be one of 'gelu', 'swiglu'"),
    ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
    ({"k": 5}, "between 1 and experts=4"),
    ({"dispatch": "sort"}, "dispatch='sort' must be 'auto' or one of"),
  ],
)
def test_settings_that_cannot_work_are_an_error(settings: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    MoE(D, H, 4, **{"k": 2, **settings}, rngs=nnx.Rngs(0))


@functools.cache
def limited(factor: float):
  graph, state = nnx.split(MoE(D, H, 4, 2, capacity_factor=factor, rngs=nnx.Rngs(0)))
  return jax.jit(lambda x, v: nnx.merge(graph, state)(x, v).stats)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(0, L), min_size=B, max_size=B), st.sampled_from([0.3, 0.9, 1.25, 2.0]))
def test_routed_and_dropped_add_up_to_k_times_the_valid_tokens(seed: int, lengths: list[int], factor: float) -> None:
  x = jax.random.normal(jax.random.key(seed), (B, L, D))
  stats = limited(factor)(x, jnp.arange(L)[None] < jnp.array(lengths)[:, None])
  assert int(stats.routed + stats.dropped) == 2 * sum(lengths)
  assert int(stats.dropped) == 0 or factor < 2.0


def test_without_a_capacity_nothing_is_ever_dropped(x: jax.Array, valid: jax.Array) -> None:
  assert int(apply(MoE(D, H, 4, 2, capacity_factor=0.3, rngs=nnx.Rngs(0)), x, valid).stats.dropped) > 0
  assert int(apply(MoE(D, H, 4, 2, capacity_factor=0.3, rngs=nnx.Rngs(0)), x, valid, dropless=True).stats.dropped) == 0
  assert int(apply(MoE(D, H, 4, 2, capacity_factor=None, rngs=nnx.Rngs(0)), x, valid).stats.dropped) == 0


@pytest.mark.parametrize("dropless", [True, False])
@pytest.mark.parametrize("held", [3.0, np.nan])
def test_what_padding_holds_changes_nothing_nor_any_gradient(
  x: jax.Array, valid: jax.Array, held: float, dropless: bool
) -> None:
  moe = MoE(D, H, 4, 2, shared_experts=1, capacity_factor=1.0, rngs=nnx.Rngs(0))
  graph, state = nnx.split(moe)

  @jax.jit
  def run(x: jax.Array):
    def loss(state: nnx.State, x: jax.Array):
      out = nnx.merge(graph, state)(x, valid, dropless=dropless)
      return jnp.sum(out.y**2) + out.aux.balance_loss + out.aux.z_loss, (out.y, out.aux, out.stats.load)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

  one, other = run(x), run(jnp.where(valid[..., None], x, held))
  for mine, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    np.testing.assert_array_equal(mine, wanted)
  assert not np.asarray(one[0][1][0])[~np.asarray(valid)].any()


def test_other_users_do_not_change_a_user_when_nothing_drops(x: jax.Array, valid: jax.Array) -> None:
  moe = MoE(D, H, 4, 2, shared_experts=1, rngs=nnx.Rngs(0))
  together = apply(moe, x, valid, dropless=True)
  others = apply(moe, x.at[1].set(x[0, 0]), jnp.ones_like(valid), dropless=True)
  np.testing.assert_array_equal(together.y[0], others.y[0])


def test_drops_are_counted_by_task(x: jax.Array, valid: jax.Array) -> None:
  moe = MoE(D, H, 4, 2, tasks=3, capacity_factor=0.3, rngs=nnx.Rngs(0))
  task = jnp.where(jnp.arange(L) % 4 == 3, -1, jnp.arange(L) % 4) * jnp.ones((B, 1), jnp.int32)
  stats = moe(x, valid, task).stats
  everyone = moe(x, valid, jnp.zeros_like(task)).stats
  assert stats.task_dropped.shape == (3,)
  assert 0 < int(stats.task_dropped.sum()) < int(stats.dropped)
  assert int(everyone.task_dropped[0]) == int(everyone.dropped)


def test_shared_experts_add_an_mlp_that_every_valid_token_visits(x: jax.Array, valid: jax.Array) -> None:
  moe = MoE(D, H, 4, 2, shared_experts=2, rngs=nnx.Rngs(0))
  whole = apply(moe, x, valid, dropless=True).y
  shared = moe.shared(x)
  assert moe.shared.up.kernel.shape == (D, 2 * H)
  moe.shared = None
  np.testing.assert_allclose(
    whole, apply(moe, x, valid, dropless=True).y + jnp.where(valid[..., None], shared, 0), atol=1e-5
  )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_swiglu_with_shared_experts_and_bias_is_the_same_on_a_mesh(axis_type: AxisType) -> None:
  def make() -> MoE:
    return MoE(D, H, 8, 2, activation="swiglu", shared_experts=1, balance_bias=True, rngs=nnx.Rngs(0))

  x, valid, _ = oracle.inputs("random")
  mesh = sharding.make_mesh(config.Mesh(data=2, expert=2, tensor=2), axis_type=axis_type)
  graph, state = nnx.split(sharding.create(make, mesh))
  with jax.set_mesh(mesh):
    out = jax.jit(lambda s, x, v: nnx.merge(graph, s)(x, v, dropless=True).y)(state, x, valid)
  np.testing.assert_allclose(out, apply(make(), x, valid, dropless=True).y, atol=1e-5)


def test_bfloat16_products_are_close_and_the_router_is_float32(x: jax.Array, valid: jax.Array) -> None:
  exact = MoE(D, H, 4, 2, rngs=nnx.Rngs(0))
  low = MoE(D, H, 4, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  mine, wanted = apply(low, x, valid, dropless=True), apply(exact, x, valid, dropless=True)
  assert mine.y.dtype == jnp.float32
  np.testing.assert_allclose(mine.y, wanted.y, atol=0.03)
  assert not np.array_equal(mine.y, wanted.y)
  np.testing.assert_array_equal(mine.stats.expert, wanted.stats.expert)
  np.testing.assert_array_equal(mine.aux.z_loss, wanted.aux.z_loss)
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(low, nnx.Param)))


def test_jit_equals_eager_and_one_seed_gives_one_result(x: jax.Array, valid: jax.Array) -> None:
  moe, same = (MoE(D, H, 4, 2, rngs=nnx.Rngs(0)) for _ in range(2))
  np.testing.assert_allclose(apply(moe, x, valid).y, moe(x, valid).y, atol=1e-6)
  np.testing.assert_array_equal(apply(moe, x, valid).y, apply(same, x, valid).y)


def test_it_works_inside_a_linen_model(x: jax.Array, valid: jax.Array) -> None:
  class Model(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
      layer = nnx.bridge.to_linen(MoE, d_model=D, d_hidden=H, experts=4, k=2, balance_bias=True, name="moe")
      return linen.Dense(1)(x + layer(x, valid).y)

  model = Model()
  variables = linen.meta.unbox(model.init(jax.random.key(0), x, valid))
  gradient = jax.grad(lambda p: model.apply({**variables, "params": p}, x, valid).sum())(variables["params"])
  assert variables["params"]["moe"]["up"].shape == (4, D, H)
  assert float(jnp.abs(gradient["moe"]["router"]["kernel"]).max()) > 0
  assert set(variables) == {"params", BalanceBias.__name__}
