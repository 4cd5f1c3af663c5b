"""Implements the sparse Mixture-of-Experts layer, and its dense counterpart."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers import dispatch, experts
from supermoe_jax.layers.routing import Aux, Router, RoutingSums
from supermoe_jax.sharding import linear


class Stats(NamedTuple):
  """Routing statistics of an MoE layer for a batch, over all devices; nothing here has a gradient.

  Attributes:
    load: float32 `[E]`, each expert's share of the choices.
    routed: int32, choices that reached an expert.
    dropped: int32, choices that exceeded a capacity; `routed + dropped = K · valid tokens`.
    task_dropped: int32 `[T]`, dropped choices of the tokens of each task; `[0]` without tasks.
    entropy: float32, see `routing.RoutingSums`.
    expert: int32 `[B, L, K]`, the chosen experts.
  """

  load: jax.Array
  routed: jax.Array
  dropped: jax.Array
  task_dropped: jax.Array
  entropy: jax.Array
  expert: jax.Array


class MoEOutput(NamedTuple):
  """Output of an MoE layer: `y [B, L, D]`, 0 for padding; terms for the loss, the sums behind them, and statistics."""

  y: jax.Array
  aux: Aux
  sums: RoutingSums
  stats: Stats


class Mlp(nnx.Module):
  """Two linear maps with a GELU between them, or SwiGLU: `[…, D] → […, d_hidden] → […, D]`.

  Source: SwiGLU, arXiv 2002.05202.
  """

  def __init__(
    self,
    d_model: int,
    d_hidden: int,
    *,
    activation: str = "gelu",
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Creates the layer.

    Raises:
      ValueError: `activation` is neither "gelu" (with biases) nor "swiglu" (without).
    """
    experts.check_activation(activation)
    self.activation = activation
    names = experts.ACTIVATIONS[activation]
    bias = "up_bias" in names
    self.up = linear(d_model, d_hidden, names=("embed", "mlp"), bias=bias, dtype=dtype, rngs=rngs)
    self.gate = (
      linear(d_model, d_hidden, names=("embed", "mlp"), bias=False, dtype=dtype, rngs=rngs) if "gate" in names else None
    )
    self.down = linear(d_hidden, d_model, names=("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies the layer to `x [..., D]`; returns x's dtype."""
    if self.gate is None:
      hidden = jax.nn.gelu(self.up(x))
    else:
      hidden = jax.nn.silu(self.gate(x)) * self.up(x)
    return self.down(hidden).astype(x.dtype)

  def weights(self) -> dict[str, jax.Array]:
    """Returns the parameters by the names of `experts.NAMES`, without a dimension of experts."""
    named: dict[str, Any] = {"up": self.up.kernel, "down": self.down.kernel}
    if self.gate is None:
      named |= {"up_bias": self.up.bias, "down_bias": self.down.bias}
    else:
      named["gate"] = self.gate.kernel
    return {n: p.get_value() for n, p in named.items()}


class MoE(nnx.Module):
  """E expert MLPs with a router that sends each token to K, and optionally shared experts that every token visits.

      out = moe(x, valid)            # x [B, L, D], valid [B, L]
      loss += 0.01 * out.aux.balance_loss + 1e-3 * out.aux.z_loss

  In training each expert takes `⌈capacity_factor · K · n / E⌉` rows for the n tokens of a device; choices beyond that
  are dropped and counted, second choices first, and those of urgent tokens last. With `dropless=True` (evaluation,
  export) nothing is dropped: among batches of one shape, a token's result is bit for bit the same whatever else is in
  the batch. Dropless, tokens stay on their device and all experts' weights of the layer come to them, unless
  `dispatch="ragged"`.

  On the mesh in use (`jax.set_mesh`) experts are spread over its `expert` axis, their hidden units over `tensor`, and
  the batch over `data` and `expert`. Without a mesh everything is on one device. Create large layers in place with
  `sharding.create`.

  Source: sparse MoE, arXiv 1701.06538; capacity, arXiv 2101.03961; shared experts, arXiv 2401.06066.
  """

  def __init__(
    self,
    d_model: int,
    d_hidden: int,
    experts: int,
    k: int,
    *,
    activation: str = "gelu",
    shared_experts: int = 0,
    capacity_factor: float | None = 1.25,
    dispatch: str = "auto",
    tasks: int = 0,
    jitter: float = 0.0,
    balance_bias: bool = False,
    dtype: jnp.dtype | None = None,
    rngs: nnx.Rngs,
  ):
    """Creates the layer; parameters are float32.

    Args:
      d_model: D.
      d_hidden: hidden units of an expert.
      experts: E; on a mesh a multiple of its `expert` axis.
      k: K.
      activation: "gelu" (with biases) or "swiglu" (without).
      shared_experts: number of additional experts of the same width that every token visits.
      capacity_factor: rows that an expert takes in training, as a multiple of its even share; None: no limit.
      dispatch: a name in `dispatch.STRATEGIES`, or "auto".
      tasks: see `Router`.
      jitter: see `Router`.
      balance_bias: see `Router`.
      dtype: dtype of the experts' products, such as `jnp.bfloat16`; None: dtype of x. Products accumulate in float32,
        and the router always computes in float32.
      rngs: keys of the initial parameters.

    Raises:
      ValueError: `k` is not in [1, experts]; an unknown activation or dispatch; a capacity factor that is not positive.
    """
    _check(activation, dispatch, capacity_factor)
    self.router = Router(d_model, experts, k, tasks=tasks, jitter=jitter, balance_bias=balance_bias, rngs=rngs)
    self.experts, self.capacity_factor, self.dispatch, self.dtype = experts, capacity_factor, dispatch, dtype
    self.activation = activation

    def kernel(n_in: int, n_out: int) -> jax.Array:
      return jax.random.normal(rngs.params(), (experts, n_in, n_out)) * n_in**-0.5

    self.up = _param("up", kernel(d_model, d_hidden))
    self.gate = _param("gate", kernel(d_model, d_hidden)) if activation == "swiglu" else None
    self.down = _param("down", kernel(d_hidden, d_model))
    with_bias = activation == "gelu"
    self.up_bias = _param("up_bias", jnp.zeros((experts, d_hidden))) if with_bias else None
    self.down_bias = _param("down_bias", jnp.zeros((experts, d_model))) if with_bias else None
    self.shared = (
      Mlp(d_model, shared_experts * d_hidden, activation=activation, dtype=dtype, rngs=rngs) if shared_experts else None
    )

  @classmethod
  def from_dense(cls, mlp: Mlp, experts: int, k: int = 2, *, rngs: nnx.Rngs, **settings: Any) -> MoE:
    """Returns a layer upcycled from a dense MLP: every expert starts as a copy, so without drops the output is the
    MLP's.

    `settings` are arguments of `MoE`; activation and, by default, dtype are the MLP's. `rngs` initialise the new
    router.

    Raises:
      ValueError: `k=1` of several experts, whose output would be the MLP's times a probability; shared experts, which
        would add to it; another activation.

    Source: sparse upcycling, arXiv 2212.05055.
    """
    if k == 1 and experts > 1:
      raise ValueError("k=1 weighs the expert by its probability: the layer would not reproduce the MLP; use k=2")
    if settings.get("shared_experts"):
      raise ValueError("shared_experts would add to the copies' output: the layer would not reproduce the MLP")
    if settings.get("activation", mlp.activation) != mlp.activation:
      raise ValueError(f"activation={settings['activation']!r} is not the MLP's, {mlp.activation!r}")
    d_model, d_hidden = mlp.up.kernel.shape
    settings = {"activation": mlp.activation, "dtype": mlp.up.dtype, **settings}
    moe = cls(d_model, d_hidden, experts, k, rngs=rngs, **settings)
    for name, source in mlp.weights().items():
      target: nnx.Param = getattr(moe, name)
      target[...] = jnp.broadcast_to(source, target.shape)
    return moe

  @property
  def names(self) -> dict[str, tuple[str, ...]]:
    """Returns the names of the experts' weights, with the logical names of their dimensions."""
    return {n: experts.NAMES[n] for n in experts.ACTIVATIONS[self.activation]}

  def __call__(
    self,
    x: jax.Array,
    valid: jax.Array,
    task: jax.Array | None = None,
    *,
    urgent: jax.Array | None = None,
    dropless: bool = False,
    rngs: nnx.Rngs | None = None,
  ) -> MoEOutput:
    """Applies the layer.

    Args:
      x: `[B, L, D]`, tokens; the layer does not normalise them.
      valid: bool `[B, L]`; False is padding, which is never routed or counted and affects no result.
      task: int32 `[B, L]`, see `Router`.
      urgent: bool `[B, L]`, the tokens that are served first where an expert is full; None: all tokens are alike.
      dropless: as in evaluation: no capacity, no dependence on the other tokens.
      rngs: if given, jitter is on.

    Raises:
      ValueError: B, E or the number of hidden units does not divide by the devices that it is spread over; the strategy
        cannot run on this backend.
    """
    x = jnp.where(valid[..., None], x, 0)
    routing = self.router(x, valid, task, rngs=rngs)
    factor = None if dropless else self.capacity_factor
    dtype = self.dtype or x.dtype
    strategy = dispatch.STRATEGIES[dispatch.choose_strategy(self.dispatch, self.router.k, factor, dtype)]
    weights = {n: getattr(self, n).get_value() for n in self.names}
    shared = {n: w[None] for n, w in self.shared.weights().items()} if self.shared is not None else {}
    y, kept = sharding.on_shards(
      functools.partial(_on_device, strategy=strategy, total=self.experts, capacity_factor=factor),
      (
        *(("batch", None, None),) * 3,
        *(("batch", None),) * 2,
        self.names,
        {n: (None, *self.names[n][1:]) for n in shared},
      ),
      (("batch", None, None), ("batch", None, None)),
      *(x.astype(dtype), routing.expert, routing.weight, valid, valid if urgent is None else urgent, weights, shared),
    )
    return MoEOutput(y.astype(x.dtype), routing.aux, routing.sums, self._stats(routing, kept, valid, task))

  def _stats(self, routing: Any, kept: jax.Array, valid: jax.Array, task: jax.Array | None) -> Stats:
    dropped = valid[..., None] & ~kept
    by_task = jnp.zeros(self.router.tasks, jnp.int32)
    if task is not None:
      c = jax.nn.one_hot(task, self.router.tasks, dtype=jnp.int32)
      by_task = jnp.sum(c * jnp.sum(dropped, axis=-1)[..., None], axis=(0, 1))
    load, entropy = routing.sums.load, routing.sums.mean_entropy
    return Stats(load, jnp.sum(kept), jnp.sum(dropped), by_task, entropy, routing.expert)


def _check(activation: str, strategy: str, capacity_factor: float | None) -> None:
  experts.check_activation(activation)
  dispatch.check_strategy(strategy)
  if capacity_factor is not None and capacity_factor <= 0:
    raise ValueError(f"capacity_factor={capacity_factor} must be positive, or None for no capacity")


def _param(name: str, value: jax.Array) -> nnx.Param:
  return sharding.param(value, *experts.NAMES[name])


def _on_device(
  x: jax.Array,
  expert: jax.Array,
  weight: jax.Array,
  valid: jax.Array,
  urgent: jax.Array,
  weights: dict[str, jax.Array],
  shared: dict[str, jax.Array],
  *,
  strategy: dispatch.Strategy,
  total: int,
  capacity_factor: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Runs a strategy on this device's rows `x [b, L, D]`; returns `y [b, L, D]` and `kept [b, L, K]`."""
  if not x.size:
    return jnp.zeros_like(x, jnp.float32), jnp.zeros_like(expert, bool)
  k = expert.shape[-1]
  flat = x.reshape(-1, x.shape[-1]), expert.reshape(-1, k), weight.reshape(-1, k), valid.reshape(-1), urgent.reshape(-1)
  tokens = dispatch.Tokens(*flat)
  y, kept = strategy(tokens, experts.Experts(weights, total), capacity_factor)
  if shared:
    every = experts.Experts(shared, 1)(tokens.x[None])[0]
    y = y + jnp.where(tokens.valid[:, None], every, 0).astype(y.dtype)
  y = jax.lax.psum(y, sharding.axes("mlp"))
  return y.reshape(x.shape), kept.reshape(expert.shape)
