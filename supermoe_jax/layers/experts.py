"""Runs expert MLPs, many at a time, on one device's share of their weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from supermoe_jax import sharding

# Logical names of the dimensions of an expert's weights. SwiGLU has a gate and, as usual, no biases.
NAMES: dict[str, tuple[str, ...]] = {
  "up": ("expert", "embed", "mlp"),
  "up_bias": ("expert", "mlp"),
  "gate": ("expert", "embed", "mlp"),
  "down": ("expert", "mlp", "embed"),
  "down_bias": ("expert", "embed"),
}

ACTIVATIONS = {
  "gelu": ("up", "up_bias", "down", "down_bias"),
  "swiglu": ("up", "gate", "down"),
}


def check_activation(activation: str) -> None:
  """Raises ValueError when there is no such activation."""
  if activation not in ACTIVATIONS:
    raise ValueError(f"activation={activation!r} must be one of {', '.join(map(repr, ACTIVATIONS))}")


@dataclasses.dataclass(frozen=True)
class Experts:
  """E' experts that this device holds, of E in all. Their hidden units may be spread over devices too.

  In that case outputs are partial: their sum over `axes("mlp")` is the experts' output. The caller sums after
  combining, when there are fewer numbers.

  Attributes:
    weights: weights by name as in `NAMES`, of shapes `[E', D, H']`, `[E', H']`, `[E', H', D]`, `[E', D]`; products are
      computed in the dtype of the rows and accumulate in float32.
    total: E.
  """

  weights: dict[str, jax.Array]
  total: int

  @property
  def held(self) -> int:
    """Returns E', the number of experts on this device."""
    return self.weights["up"].shape[0]

  def whole(self) -> Experts:
    """Returns all E experts, with their weights gathered onto this device (its share of each one's hidden units)."""
    if self.held == self.total:
      return self
    gather = {n: jax.lax.all_gather(w, sharding.axes("expert"), tiled=True) for n, w in self.weights.items()}
    return Experts(gather, self.total)

  def __call__(self, x: jax.Array, group: jax.Array | None = None) -> jax.Array:
    """Runs rows `x [G, C, D]` through expert `group[g]`, or expert g when `group` is None: `[G, C, D]`."""
    w = self._in(x.dtype)
    if group is not None:
      w = {n: v[group] for n, v in w.items()}
    up = jnp.einsum("gcd,gdh->gch", x, w["up"], preferred_element_type=jnp.float32)
    if "gate" in w:
      hidden = jax.nn.silu(jnp.einsum("gcd,gdh->gch", x, w["gate"], preferred_element_type=jnp.float32)) * up
    else:
      hidden = jax.nn.gelu(up + w["up_bias"][:, None])
    out = jnp.einsum("gch,ghd->gcd", hidden.astype(x.dtype), w["down"], preferred_element_type=jnp.float32)
    if "down_bias" in w:
      out = out + self._once(w["down_bias"])[:, None]
    return out.astype(x.dtype)

  def ragged(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Runs rows `x [R, D]`, sorted by expert with `sizes [E']` rows each; rows beyond the sum of sizes give 0."""
    w, rows = self._in(x.dtype), len(x)
    expert = jnp.repeat(jnp.arange(self.held), sizes, total_repeat_length=rows)
    inside = (jnp.arange(rows) < jnp.sum(sizes))[:, None]

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
      # Rows beyond the groups are undefined in the product and in its gradient, so both sides set them to 0.
      y = jax.lax.ragged_dot(jnp.where(inside, x, 0), kernel, sizes, preferred_element_type=jnp.float32)
      return jnp.where(inside, y, 0)

    up = product(x, w["up"])
    if "gate" in w:
      hidden = jax.nn.silu(product(x, w["gate"])) * up
    else:
      hidden = jax.nn.gelu(up + w["up_bias"][expert])
    out = product(hidden.astype(x.dtype), w["down"])
    if "down_bias" in w:
      out = jnp.where(inside, out + self._once(w["down_bias"])[expert], 0)
    return out.astype(x.dtype)

  def _in(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Returns the weights in the products' dtype; they are cast here, so that devices add up gradients in float32."""
    return {n: w.astype(dtype) for n, w in self.weights.items()}

  def _once(self, bias: jax.Array) -> jax.Array:
    """Returns the bias on one of the devices that share an expert's hidden units, and 0 on the others."""
    return bias if sharding.ways("mlp") == 1 else jnp.where(sharding.index("mlp") == 0, bias, 0)
