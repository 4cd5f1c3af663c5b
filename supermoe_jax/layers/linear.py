"""Linear maps whose parameters carry logical names for sharding."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx


def linear(
  n_in: int,
  n_out: int,
  *,
  rngs: nnx.Rngs,
  names: tuple[str | None, str | None] = ("embed", None),
  bias: bool = True,
  zero: bool = False,
  dtype: jnp.dtype | None = None,
) -> nnx.Linear:
  """Returns `nnx.Linear(n_in, n_out)` whose kernel `[n_in, n_out]` remembers the logical `names` of its dimensions.

  With `zero` it starts at 0: an input that training never varies then stays without effect. `dtype` is that of the
  computation (None: of input and parameters); parameters are float32.
  """
  return nnx.Linear(
    n_in,
    n_out,
    use_bias=bias,
    dtype=dtype,
    kernel_init=nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal(),
    kernel_metadata={"logical": names},
    bias_metadata={"logical": names[1:]},
    rngs=rngs,
  )
