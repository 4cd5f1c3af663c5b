"""Inputs on which every dispatch strategy must equal `dense`, and the comparison, on one process or several."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from supermoe_jax import sharding
from supermoe_jax.layers.moe import MoE

B, L, D, H, E, K = 8, 16, 8, 16, 8, 2
LENGTH = (16, 10, 3, 0, 16, 16, 7, 9)  # one row is all padding
CASES = ("random", "ties", "an expert gets nothing", "an expert gets everything")


PLAIN: dict[str, object] = {}
RICH = {"activation": "swiglu", "shared_experts": 1, "tasks": 3, "balance_bias": True, "k": 3}
SINGLE = {"k": 1}


def make(dispatch: str, settings: dict = PLAIN) -> MoE:
  """A layer whose capacity no choice can exceed: an expert is chosen at most once by a token."""
  moe = MoE(D, H, E, **{"k": K, "dispatch": dispatch, "capacity_factor": float(E), **settings}, rngs=nnx.Rngs(0))
  others = (moe.up_bias, moe.down_bias, moe.router.task_kernel, moe.router.balance_bias)
  for i, variable in enumerate(others):
    if variable is not None:
      variable[...] = jax.random.normal(jax.random.key(i), variable.shape)
  return moe


def inputs(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokens `[B, L, D]`, whose first channel is 1; valid `[B, L]`; and the router's kernel `[D, E]`."""
  rng = np.random.default_rng(CASES.index(case))
  x = rng.normal(size=(B, L, D)).astype(np.float32)
  x[..., 0] = 1.0
  kernel = rng.normal(size=(D, E)).astype(np.float32)
  if case == "ties":
    kernel[:, 1::2] = kernel[:, ::2]  # experts 2i and 2i + 1 tie; what is 0 ties with everything
    x[:, ::3] = 0.0
  if case == "an expert gets nothing":
    kernel[0, 3] = -50.0
  if case == "an expert gets everything":
    kernel[0, 5] = 50.0
  return x, np.arange(L) < np.array(LENGTH)[:, None], kernel


def objective(graph: nnx.GraphDef, dropless: bool, state: nnx.State, x: jax.Array, valid: jax.Array):
  moe = nnx.merge(graph, state)
  task = jnp.broadcast_to(jnp.arange(L) % 4 - 1, (B, L)) if moe.router.tasks else None
  out = moe(x, valid, task, dropless=dropless)
  total = jnp.sum(jnp.sin(out.y) * jnp.arange(D)) + 10 * sum(out.aux)
  return total, (out.y, out.aux, out.stats)


def gradient(graph: nnx.GraphDef, dropless: bool) -> Callable:
  return jax.jit(functools.partial(jax.value_and_grad(objective, argnums=(2, 3), has_aux=True), graph, dropless))


def on_one_device(settings: dict = PLAIN) -> Callable[[str], dict]:
  """The oracle's answers, by case."""
  return _on_one_device(tuple(settings.items()))


@functools.cache
def _on_one_device(settings: tuple) -> Callable[[str], dict]:
  graph, state = nnx.split(make("dense", dict(settings)))
  run = gradient(graph, False)

  @functools.cache
  def answer(case: str) -> dict:
    x, valid, kernel = inputs(case)
    return _named(run(with_kernel(state, kernel), x, valid))

  return answer


def on_mesh(mesh: Mesh, dispatch: str, settings: dict = PLAIN, *, dropless: bool = False) -> Callable[[str], dict]:
  """The answers of a strategy on `mesh`, by case."""
  graph, state = nnx.split(sharding.create(lambda: make(dispatch, settings), mesh))
  run = gradient(graph, dropless)
  everywhere = NamedSharding(mesh, PartitionSpec())
  whole = jax.jit(lambda tree: jax.tree.map(_whole, tree), out_shardings=everywhere)

  def answer(case: str) -> dict:
    x, valid, kernel = inputs(case)
    with jax.set_mesh(mesh):
      placed = with_kernel(state, _place(kernel, everywhere))
      out = run(
        placed,
        _place(x, NamedSharding(mesh, sharding.spec("batch", None, None))),
        _place(valid, NamedSharding(mesh, sharding.spec("batch", None))),
      )
      return _named(jax.tree.map(lambda a: a.addressable_data(0), whole(out)))

  return answer


def _whole(x: jax.Array) -> jax.Array:
  explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
  return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim)) if explicit else x


def _place(value: np.ndarray, where: NamedSharding) -> jax.Array:
  return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def with_kernel(state: nnx.State, kernel: np.ndarray | jax.Array) -> nnx.State:
  out = jax.tree.map(lambda leaf: leaf, state)
  out["router"]["kernel"].set_value(kernel)
  return out


def _named(out: tuple) -> dict[str, np.ndarray]:
  """Every number that must agree, by name."""
  (_, (y, aux, stats)), (parameters, x) = out
  named = {"y": y, "gradient of x": x, **aux._asdict(), "load": stats.load, "routed": stats.routed}
  named |= {"dropped": stats.dropped, "entropy": stats.entropy, "dropped by task": stats.task_dropped}
  named |= {f"gradient of {'.'.join(path)}": v.get_value() for path, v in nnx.to_flat_state(parameters)}
  return {name: np.asarray(value) for name, value in named.items()}


def assert_equal(mine: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
  """To 1e-5 of the largest number of each kind."""
  assert mine.keys() == wanted.keys()
  for name, value in wanted.items():
    scale = max(1.0, float(np.abs(value).max(initial=0.0)))
    np.testing.assert_allclose(mine[name], value, rtol=0, atol=1e-5 * scale, err_msg=name)
