"""Full ranking: the place of a target among the whole catalogue, in chunks that never hold `[questions, items]`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnames="chunk")
def _rank(
  state: jax.Array, target: jax.Array, seen: jax.Array, rows: jax.Array, bias: jax.Array, chunk: int
) -> jax.Array:
  def score(items: jax.Array) -> jax.Array:  # [n, m] → [n, m]
    return jnp.einsum("nd,nmd->nm", state, rows[items]) + bias[items]

  items = rows.shape[0]
  mine = score(target[:, None])
  padded = -(-items // chunk) * chunk
  rows_in_chunks = jnp.pad(rows, ((0, padded - items), (0, 0))).reshape(-1, chunk, rows.shape[1])
  bias_in_chunks = jnp.pad(bias, (0, padded - items), constant_values=-jnp.inf).reshape(-1, chunk)

  def count(better: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    rows_here, bias_here, first = part
    above = (state @ rows_here.T + bias_here >= mine) & (first + jnp.arange(chunk) != target[:, None])
    return better + jnp.sum(above, axis=1, dtype=jnp.int32), None

  first = jnp.arange(0, padded, chunk)
  better, _ = jax.lax.scan(count, jnp.zeros(len(state), jnp.int32), (rows_in_chunks, bias_in_chunks, first))
  real = (seen >= 0) & (seen != target[:, None])
  return 1 + better - jnp.sum(real & (score(jnp.maximum(seen, 0)) >= mine), axis=1, dtype=jnp.int32)


def target_ranks(
  state: jax.Array | np.ndarray,
  target: np.ndarray,
  seen: Sequence[np.ndarray] | None,
  rows: jax.Array,
  bias: jax.Array,
  chunk: int,
) -> np.ndarray:
  """Ranks each target among all items by `state · row + bias`; equal scores count against the target.

  Args:
    state: float32 `[n, D]`.
    target: int `[n]`, item indices; a negative one is unknown to the catalogue and ranks at infinity.
    seen: for each question the item indices that cannot be recommended, or None. A target that is among them ranks at
      infinity.
    rows: float32 `[items, D]`.
    bias: float32 `[items]`.
    chunk: items scored at a time.

  Returns: float `[n]`; 1 is best.
  """
  chunk = min(chunk, rows.shape[0])
  lost = target < 0
  width = max((len(s) for s in seen), default=0) if seen is not None else 0
  width = 1 << max(width - 1, 0).bit_length()  # few sizes, few compilations
  padded = np.full((len(target), width), -1, np.int32)
  for i, items in enumerate(seen or ()):
    padded[i, : len(items)] = items
    lost[i] |= bool(np.any(items == target[i]))
  rank = np.asarray(
    _rank(jnp.asarray(state), jnp.asarray(np.maximum(target, 0)), jnp.asarray(padded), rows, bias, chunk)
  )
  return np.where(lost, np.inf, rank)
