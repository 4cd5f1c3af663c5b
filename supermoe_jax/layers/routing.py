"""The router of a Mixture-of-Experts layer: which K of E experts a token goes to, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding


class Routing(NamedTuple):
  """What a router decided for N tokens.

  Attributes:
    expert: int32 `[N, K]`, the chosen experts.
    weight: float32 `[N, K]`, how their outputs are combined.
    balance_loss: float32, 1 when the experts are used alike and E when one (K = 1) takes all.
    z_loss: float32, the mean squared log-partition of the logits.
    load: float32 `[E]`, each expert's share of the choices; sums to 1.
  """

  expert: jax.Array
  weight: jax.Array
  balance_loss: jax.Array
  z_loss: jax.Array
  load: jax.Array


class Router(nnx.Module):
  """Chooses K of E experts for each token by the top-K of a softmax. All arithmetic is float32.

  With K ≥ 2 the chosen probabilities are renormalised; with K = 1 the probability itself is the weight, since a
  renormalised single choice is always 1 and would give the router no gradient.

  Source: top-K gating, arXiv 1701.06538; balance loss, arXiv 2101.03961; z-loss, arXiv 2202.08906.
  """

  def __init__(self, d_model: int, experts: int, k: int, *, rngs: nnx.Rngs):
    """Creates the router.

    Raises:
      ValueError: `k` is not in [1, experts].
    """
    if not 1 <= k <= experts:
      raise ValueError(f"k={k} must be between 1 and experts={experts}")
    self.experts, self.k = experts, k
    self.kernel = sharding.param(jax.random.normal(rngs.params(), (d_model, experts)) * 0.02, "embed", None)

  def __call__(self, x: jax.Array, valid: jax.Array) -> Routing:
    """Routes `x [N, D]`; tokens where `valid [N]` is False are never counted (the dispatch never sends them)."""
    logits = x.astype(jnp.float32) @ self.kernel.get_value().astype(jnp.float32)
    probability = jax.nn.softmax(logits, axis=-1)
    weight, expert = jax.lax.top_k(probability, self.k)
    if self.k > 1:
      weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    load, balance = balance_loss(probability, expert, valid)
    tokens = jnp.maximum(jnp.sum(valid), 1)
    z = jnp.sum(jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0)) / tokens
    return Routing(expert.astype(jnp.int32), weight, balance, z, load)


def balance_loss(probability: jax.Array, expert: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the load `[E]` and `E · Σ_e stop_grad(load_e) · mean probability_e` over the valid tokens.

  Shapes: `probability [N, E]`, `expert [N, K]`, `valid [N]`. Sums run over the whole (global) batch.
  """
  n_experts, k = probability.shape[-1], expert.shape[-1]
  tokens = jnp.maximum(jnp.sum(valid), 1).astype(jnp.float32)
  chosen = jnp.sum(jax.nn.one_hot(expert, n_experts, dtype=jnp.float32), axis=-2)
  load = jax.lax.stop_gradient(jnp.sum(jnp.where(valid[:, None], chosen, 0.0), axis=0) / (k * tokens))
  mean = jnp.sum(jnp.where(valid[:, None], probability, 0.0), axis=0) / tokens
  return load, n_experts * jnp.sum(load * mean)
