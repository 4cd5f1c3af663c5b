"""The sparse Mixture-of-Experts layer and its dense counterpart."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers import dispatch
from supermoe_jax.layers.linear import linear
from supermoe_jax.layers.routing import Router


class MoEOutput(NamedTuple):
  """`y [B, L, D]`, the layer's losses, and what happened.

  Attributes:
    y: combined outputs; 0 for padding.
    balance_loss: see `routing.Routing`.
    z_loss: see `routing.Routing`.
    load: float32 `[E]`, share of the choices.
    routed: int32, choices that reached an expert.
    dropped: int32, choices that exceeded an expert's capacity; `routed + dropped = K · valid tokens`.
    expert: int32 `[B, L, K]`, the chosen experts.
  """

  y: jax.Array
  balance_loss: jax.Array
  z_loss: jax.Array
  load: jax.Array
  routed: jax.Array
  dropped: jax.Array
  expert: jax.Array


class Mlp(nnx.Module):
  """Two linear maps with a GELU between them: `[…, D] → […, d_hidden] → […, D]`."""

  def __init__(self, d_model: int, d_hidden: int, *, rngs: nnx.Rngs):
    self.up = linear(d_model, d_hidden, names=("embed", "mlp"), rngs=rngs)
    self.down = linear(d_hidden, d_model, names=("mlp", "embed"), rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies the layer to `x [..., D]`."""
    return self.down(jax.nn.gelu(self.up(x)))


class MoE(nnx.Module):
  """E expert MLPs of which each token visits K.

  Training gives each expert `⌈capacity_factor · K · tokens / E⌉` rows and counts what exceeds them; with
  `dropless=True` (evaluation, export) nothing is dropped, and a token's result cannot depend on the others.

  Source: sparse MoE, arXiv 1701.06538; capacity, arXiv 2101.03961.
  """

  def __init__(
    self, d_model: int, d_hidden: int, experts: int, k: int, *, capacity_factor: float = 1.25, rngs: nnx.Rngs
  ):
    """Creates the layer.

    Raises:
      ValueError: `k` is not in [1, experts].
    """
    self.router = Router(d_model, experts, k, rngs=rngs)
    self.experts, self.capacity_factor = experts, capacity_factor

    def kernel(n_in: int, n_out: int) -> jax.Array:
      return jax.random.normal(rngs.params(), (experts, n_in, n_out)) * n_in**-0.5

    self.up = sharding.param(kernel(d_model, d_hidden), "expert", "embed", "mlp")
    self.up_bias = sharding.param(jnp.zeros((experts, d_hidden)), "expert", "mlp")
    self.down = sharding.param(kernel(d_hidden, d_model), "expert", "mlp", "embed")
    self.down_bias = sharding.param(jnp.zeros((experts, d_model)), "expert", "embed")

  def apply_experts(self, x: jax.Array, group: jax.Array | None) -> jax.Array:
    """Runs rows `x [G, C, D]` through expert `group[g]`, or expert g when `group` is None."""

    def weights(parameter: nnx.Param) -> jax.Array:
      value = parameter.get_value().astype(x.dtype)
      return value if group is None else value[group]

    hidden = jnp.einsum("gcd,gdh->gch", x, weights(self.up)) + weights(self.up_bias)[:, None]
    hidden = jax.nn.gelu(hidden)
    return jnp.einsum("gch,ghd->gcd", hidden, weights(self.down)) + weights(self.down_bias)[:, None]

  def __call__(self, x: jax.Array, valid: jax.Array, *, dropless: bool = False) -> MoEOutput:
    """Applies the layer to `x [B, L, D]`; tokens where `valid [B, L]` is False are never routed or counted."""
    flat, mask = x.reshape(-1, x.shape[-1]), valid.reshape(-1)
    routing = self.router(flat, mask)
    arguments = (flat, routing.expert, routing.weight, mask, self.apply_experts, self.experts)
    sent = (
      dispatch.sorted_dropless(*arguments) if dropless else dispatch.sorted_capacity(*arguments, self.capacity_factor)
    )
    routed = self.router.k * jnp.sum(mask) - sent.dropped
    expert = routing.expert.reshape(*valid.shape, self.router.k)
    return MoEOutput(
      sent.y.reshape(x.shape), routing.balance_loss, routing.z_loss, routing.load, routed, sent.dropped, expert
    )
