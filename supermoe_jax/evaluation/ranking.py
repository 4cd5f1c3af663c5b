"""Ranks targets among the whole catalogue, in chunks of items, so that no array has the shape `[questions, items]`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from supermoe_jax import sharding
from supermoe_jax.distributed import processes
from supermoe_jax.layers import catalogue
from supermoe_jax.layers.catalogue import Catalogue


@functools.partial(jax.jit, static_argnames=("size", "chunk"))
def _rank(
  state: jax.Array, target: jax.Array, seen: jax.Array, rows: jax.Array, bias: jax.Array, size: int, chunk: int
) -> jax.Array:
  return catalogue.rank_codes(state, target, seen, Catalogue(rows, bias, size), chunk)


def target_ranks(
  state: jax.Array | np.ndarray,
  target: np.ndarray,
  seen: Sequence[np.ndarray] | None,
  items: Catalogue,
  chunk: int,
) -> np.ndarray:
  """Returns the rank of each question's best target among all items, by `state · row + bias`.

  A question can have several targets. The rank is that of the target with the highest score, and the other targets do
  not count against it. Equal scores count against it, and so do scores that are not numbers: a broken model ranks it
  last. A question without a target that can be recommended has an infinite rank.

  Args:
    state: float32 `[n, D]`.
    target: int `[n, t]` or `[n]`, the item indices of each question's targets. A negative index is no target: the
      catalogue does not know the item, or the question has fewer targets than t.
    seen: for each question, the indices of items that cannot be recommended, targets included; None: every item can.
    items: the catalogue, on the mesh in use.
    chunk: items scored at a time.

  Returns: float `[n]`; 1 is best.
  """
  target = target.reshape(len(target), -1)
  hidden = [np.unique(s) for s in seen or ()]
  width = max(map(len, hidden), default=0)
  width = 1 << max(width - 1, 0).bit_length()  # a power of two: few sizes, few compilations
  n = len(target)
  room = -(-n // sharding.ways("rows")) * sharding.ways("rows")
  codes = np.zeros((room, width), np.int32)
  for i, some in enumerate(hidden):
    codes[i, : len(some)] = some + 2
  asked = np.zeros((room, target.shape[1]), np.int32)
  asked[:n] = np.where(target < 0, 0, target + 2)
  for i, some in enumerate(hidden):
    asked[i][np.isin(target[i], some)] = 0
  padded = np.zeros((room, np.shape(state)[1]), np.float32)
  padded[:n] = state
  rank = _rank(padded, asked, codes, items.rows, items.bias, items.size, chunk)
  return np.where(asked[:n].any(axis=1), processes.whole(rank)[:n], np.inf)
