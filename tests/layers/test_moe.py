import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax.layers.moe import Mlp, MoE, MoEOutput
from supermoe_jax.layers.routing import BalanceBias
from tests.fixtures import dispatch_oracle as oracle
from tests.fixtures import grids
from tests.fixtures.small_model import noise

B, L, D, H, E, K = 2, 24, 8, 16, 4, 2
X = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
VALID = np.arange(L) < np.array([24, 10])[:, None]


@functools.cache
def layer(**settings) -> MoE:
  """A layer of noise."""
  return noise(lambda: MoE(D, H, E, K, **settings, rngs=nnx.Rngs(0)))


@functools.cache
def program(dropless: bool = False, **settings):
  """The compiled layer as a function of its state and inputs."""
  graph = nnx.split(layer(**settings))[0]
  return jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs, dropless=dropless))


def apply(x: np.ndarray = X, valid: np.ndarray = VALID, *, dropless: bool = False, **settings) -> MoEOutput:
  out = program(dropless, **settings)(nnx.split(layer(**settings))[1], x, valid)
  return jax.tree.map(np.asarray, out)


@pytest.mark.parametrize(
  ("activation", "dropless"),
  grids.quick_few([("gelu", True), ("swiglu", False)], [(a, d) for a in ("gelu", "swiglu") for d in (True, False)]),
)
def test_experts_copied_from_a_dense_mlp_reproduce_it(activation: str, dropless: bool) -> None:
  mlp = noise(lambda: Mlp(D, H, activation=activation, rngs=nnx.Rngs(0)))
  moe = MoE.from_dense(mlp, E, capacity_factor=4.0, rngs=nnx.Rngs(1))
  out, wanted = jax.jit(lambda x, valid: (moe(x, valid, dropless=dropless), mlp(x)))(X, VALID)
  np.testing.assert_allclose(out.y, np.where(VALID[..., None], wanted, 0.0), atol=1e-5)


def test_one_expert_with_its_gate_at_one_is_the_dense_mlp() -> None:
  mlp = noise(lambda: Mlp(D, H, rngs=nnx.Rngs(0)))
  moe = MoE.from_dense(mlp, 1, 1, rngs=nnx.Rngs(1))
  out, wanted = jax.jit(lambda x, valid: (moe(x, valid), mlp(x)))(X, VALID)  # the softmax over one expert is 1
  np.testing.assert_allclose(out.y, np.where(VALID[..., None], wanted, 0.0), atol=1e-5)
  assert float(out.aux.balance_loss) == pytest.approx(1)


def test_upcycling_that_would_not_reproduce_the_mlp_is_an_error() -> None:
  mlp = noise(lambda: Mlp(D, H, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="use k=2"):
    MoE.from_dense(mlp, 4, 1, rngs=nnx.Rngs(1))
  with pytest.raises(ValueError, match="shared_experts would add"):
    MoE.from_dense(mlp, 4, shared_experts=1, rngs=nnx.Rngs(1))
  with pytest.raises(ValueError, match="activation='swiglu' is not the MLP's, 'gelu'"):
    MoE.from_dense(mlp, 4, activation="swiglu", rngs=nnx.Rngs(1))


@pytest.mark.parametrize("shape", [(0, 3, D), (2, 0, D)])
@pytest.mark.parametrize("dropless", [True, False])
def test_an_empty_batch_gives_an_empty_result(shape: tuple[int, ...], dropless: bool) -> None:
  out = apply(np.zeros(shape, np.float32), np.zeros(shape[:2], bool), dropless=dropless)
  assert out.y.shape == shape
  assert int(out.stats.routed + out.stats.dropped) == 0
  assert np.isfinite(out.aux.z_loss)


def test_more_padding_changes_nothing_when_nothing_drops() -> None:
  more = apply(np.pad(X, ((0, 0), (0, 8), (0, 0))), np.pad(VALID, ((0, 0), (0, 8))), dropless=True)
  np.testing.assert_array_equal(more.y[:, :L], apply(dropless=True).y)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"activation": "relu"}, "activation='relu' must be one of 'gelu', 'swiglu'"),
    ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
    ({"k": 5}, "between 1 and experts=4"),
    ({"dispatch": "sort"}, "dispatch='sort' must be 'auto' or one of 'dense', 'sorted', 'all_to_all'"),
  ],
)
def test_settings_that_cannot_work_are_an_error(settings: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    MoE(D, H, E, **{"k": K, **settings}, rngs=nnx.Rngs(0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(0, L), min_size=B, max_size=B), st.sampled_from([0.3, 1.25, 2.0]))
def test_what_exceeds_the_capacity_is_counted_as_dropped_and_the_rest_as_routed(
  seed: int, lengths: list[int], factor: float
) -> None:
  x = np.random.default_rng(seed).normal(size=X.shape).astype(np.float32)
  valid = np.arange(L) < np.array(lengths)[:, None]
  stats = apply(x, valid, capacity_factor=factor).stats
  capacity = min(int(np.ceil(factor * K * B * L / E)), B * L)
  flat = valid.reshape(-1)
  kept = oracle.first_served(stats.expert.reshape(-1, K), flat, flat, capacity, E)
  assert int(stats.routed) == kept.sum()
  assert int(stats.dropped) == K * sum(lengths) - kept.sum()
  assert int(stats.dropped) == 0 or factor < 2.0


def test_without_a_capacity_nothing_is_ever_dropped() -> None:
  assert int(apply(capacity_factor=0.3).stats.dropped) > 0
  assert int(apply(capacity_factor=0.3, dropless=True).stats.dropped) == 0
  assert int(apply(capacity_factor=None).stats.dropped) == 0


@functools.cache
def gradient(dropless: bool):
  """The compiled gradients of all that the layer gives, by parameters and inputs, and that."""
  graph, state = nnx.split(layer(shared_experts=1, capacity_factor=1.0))

  def loss(state: nnx.State, x: jax.Array):
    out = nnx.merge(graph, state)(x, VALID, dropless=dropless)
    return jnp.sum(out.y**2) + out.aux.balance_loss + out.aux.z_loss, (out.y, out.aux, out.stats.load)

  return functools.partial(jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)), state)


@pytest.mark.parametrize("dropless", [True, False])
@pytest.mark.parametrize("held", [3.0, np.nan])
def test_what_padding_holds_changes_nothing_nor_any_gradient(held: float, dropless: bool) -> None:
  run = gradient(dropless)
  one, other = run(X), run(np.where(VALID[..., None], X, np.float32(held)))
  for mine, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    np.testing.assert_array_equal(mine, wanted)
  assert not np.asarray(one[0][1][0])[~VALID].any()


def test_other_users_do_not_change_a_user_when_nothing_drops() -> None:
  changed = X.copy()
  changed[1] = X[0, 0]
  others = apply(changed, np.ones_like(VALID), dropless=True)
  np.testing.assert_array_equal(apply(dropless=True).y[0], others.y[0])


def test_drops_are_counted_by_task() -> None:
  state = nnx.split(layer(tasks=3, capacity_factor=0.3))[1]
  run = functools.partial(program(tasks=3, capacity_factor=0.3), state, X, VALID)
  task = np.broadcast_to(np.where(np.arange(L) % 4 == 3, -1, np.arange(L) % 4), (B, L))
  stats, everyone = run(task).stats, run(np.zeros_like(task)).stats
  assert stats.task_dropped.shape == (3,)
  assert 0 < int(stats.task_dropped.sum()) < int(stats.dropped)
  assert int(everyone.task_dropped[0]) == int(everyone.dropped)


def test_shared_experts_add_an_mlp_that_every_valid_token_visits() -> None:
  moe = layer(shared_experts=2)
  assert moe.shared.up.kernel.shape == (D, 2 * H)
  shared = jax.jit(lambda x: moe.shared(x))(X)
  alone = {k: v for k, v in nnx.split(moe)[1].items() if k != "shared"}
  rest = program(True)(nnx.State(alone), X, VALID).y
  whole = apply(dropless=True, shared_experts=2).y
  np.testing.assert_allclose(whole, rest + np.where(VALID[..., None], shared, 0), atol=1e-5)


def test_bfloat16_products_are_close_and_the_router_is_float32() -> None:
  mine, wanted = apply(dropless=True, dtype=jnp.bfloat16), apply(dropless=True)
  assert mine.y.dtype == jnp.float32
  np.testing.assert_allclose(mine.y, wanted.y, atol=0.03 * np.abs(wanted.y).max())
  assert not np.array_equal(mine.y, wanted.y)
  np.testing.assert_array_equal(mine.stats.expert, wanted.stats.expert)
  np.testing.assert_array_equal(mine.aux.z_loss, wanted.aux.z_loss)
  low = nnx.eval_shape(lambda: MoE(D, H, E, K, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(low, nnx.Param)))


@pytest.mark.nightly  # operation by operation it compiles for long; routing is compared in the quick tier
def test_jit_equals_eager() -> None:
  np.testing.assert_allclose(apply().y, layer()(X, VALID).y, atol=1e-6)


def test_one_seed_gives_one_layer() -> None:
  one, same, other = (nnx.state(MoE(D, H, E, K, rngs=nnx.Rngs(seed))) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, same)
  assert not np.array_equal(one["up"].get_value(), other["up"].get_value())


def test_it_works_inside_a_linen_model() -> None:
  class Model(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
      layer = nnx.bridge.to_linen(MoE, d_model=D, d_hidden=H, experts=4, k=2, balance_bias=True, name="moe")
      return linen.Dense(1)(x + layer(x, valid).y)

  model = Model()
  variables = linen.meta.unbox(jax.jit(model.init)(jax.random.key(0), X, VALID))
  loss = jax.jit(jax.grad(lambda p: model.apply({**variables, "params": p}, X, VALID).sum()))
  gradient = loss(variables["params"])
  assert variables["params"]["moe"]["up"].shape == (4, D, H)
  assert float(np.abs(gradient["moe"]["router"]["kernel"]).max()) > 0
  assert set(variables) == {"params", BalanceBias.__name__}
