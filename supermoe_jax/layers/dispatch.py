"""Ways of carrying tokens to their experts and back; one signature, the same numbers.

A strategy takes the tokens `x [N, D]`, the router's choices `expert [N, K]` and `weight [N, K]`, which tokens are
`valid [N]`, and `apply`, the experts' function: `apply(buffer [G, C, D], group) -> [G, C, D]`, where row g of the
buffer belongs to expert `group[g]`, or to expert g when `group` is None. It returns the combined output `[N, D]` and
the number of choices that were dropped. Tokens that are not valid are neither sent nor counted, and their output is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supermoe_jax import sharding

Apply = Callable[[jax.Array, jax.Array | None], jax.Array]

# Rows that one expert computes at a time in the dropless form; each expert wastes less than one such block.
BLOCK = 64


class Dispatched(NamedTuple):
  """Combined expert outputs `y [N, D]` and `dropped`, the int32 number of (token, choice) pairs without a place."""

  y: jax.Array
  dropped: jax.Array


def dense(
  x: jax.Array, expert: jax.Array, weight: jax.Array, valid: jax.Array, apply: Apply, n_experts: int
) -> Dispatched:
  """Every expert on every token: E times the work, nothing to go wrong. The oracle of the other strategies."""
  everything = apply(jnp.broadcast_to(x, (n_experts, *x.shape)), None)
  gate = jnp.einsum("nk,nke->ne", weight, jax.nn.one_hot(expert, n_experts, dtype=weight.dtype))
  gate = jnp.where(valid[:, None], gate, 0.0)
  return Dispatched(jnp.einsum("ne,end->nd", gate, everything.astype(jnp.float32)).astype(x.dtype), jnp.int32(0))


def sorted_capacity(
  x: jax.Array,
  expert: jax.Array,
  weight: jax.Array,
  valid: jax.Array,
  apply: Apply,
  n_experts: int,
  capacity_factor: float,
) -> Dispatched:
  """Sorts the choices by expert into a buffer `[E, C, D]`; what exceeds an expert's C rows is dropped and counted.

  `C = ⌈capacity_factor · K · N / E⌉`. Rows earlier in the batch have precedence.
  """
  n, k = expert.shape
  capacity = min(math.ceil(capacity_factor * k * n / n_experts), n * k)
  ranked = _rank(expert, valid, n_experts)
  kept = ranked.sent & (ranked.rank < capacity)
  slot = jnp.where(kept, ranked.expert * capacity + ranked.rank, n_experts * capacity)
  out = _through(x, slot, weight, lambda b: apply(b.reshape(n_experts, capacity, -1), None), n_experts * capacity)
  return Dispatched(out, jnp.sum(ranked.sent) - jnp.sum(kept))


def sorted_dropless(
  x: jax.Array, expert: jax.Array, weight: jax.Array, valid: jax.Array, apply: Apply, n_experts: int
) -> Dispatched:
  """Sorts the choices by expert into blocks of `BLOCK` rows, each of one expert; shapes are static, nothing drops.

  The choices fill at most `K·N/BLOCK + E` blocks however they fall on the experts, so that the result of a token cannot
  depend on the others.

  Source: block-sparse dispatch, arXiv 2211.15841.
  """
  n, k = expert.shape
  blocks = n * k // BLOCK + n_experts
  ranked = _rank(expert, valid, n_experts)
  used = (ranked.load + BLOCK - 1) // BLOCK
  end = jnp.cumsum(used)
  slot = (end - used)[jnp.minimum(ranked.expert, n_experts - 1)] * BLOCK + ranked.rank
  slot = jnp.where(ranked.sent, slot, blocks * BLOCK)
  group = jnp.minimum(jnp.searchsorted(end, jnp.arange(blocks), side="right"), n_experts - 1)
  out = _through(x, slot, weight, lambda b: apply(b.reshape(blocks, BLOCK, -1), group), blocks * BLOCK)
  return Dispatched(out, jnp.int32(0))


class _Ranked(NamedTuple):
  """For each choice `[N, K]`: its expert, whether it is sent, its rank among that expert's; and `load [E]`."""

  expert: jax.Array
  sent: jax.Array
  rank: jax.Array
  load: jax.Array


def _rank(expert: jax.Array, valid: jax.Array, n_experts: int) -> _Ranked:
  n, k = expert.shape
  flat = jnp.where(jnp.broadcast_to(valid[:, None], (n, k)), expert, n_experts).reshape(-1)
  order = jnp.argsort(flat, stable=True)
  start = jnp.searchsorted(flat[order], jnp.arange(n_experts + 1))
  rank_sorted = jnp.arange(n * k) - start[flat[order]]
  rank = jnp.zeros(n * k, jnp.int32).at[order].set(rank_sorted.astype(jnp.int32), unique_indices=True)
  return _Ranked(flat.reshape(n, k), (flat < n_experts).reshape(n, k), rank.reshape(n, k), jnp.diff(start))


def _through(
  x: jax.Array, slot: jax.Array, weight: jax.Array, apply: Callable[[jax.Array], jax.Array], n_slots: int
) -> jax.Array:
  """Scatters tokens to `slot [N, K]` (n_slots: nowhere), applies the experts, gathers back, combines in float32."""
  n, k = slot.shape
  choice = jnp.full(n_slots, n * k, jnp.int32)  # which of the N·K choices sits in a slot; N·K: none
  choice = choice.at[slot.reshape(-1)].set(jnp.arange(n * k, dtype=jnp.int32), mode="drop", unique_indices=True)
  out = apply(_to_slots(x, choice // k, slot)).reshape(n_slots, -1)
  back = _from_slots(out, slot, choice)
  y = jnp.einsum("nk,nkd->nd", weight, back.astype(jnp.float32))
  return sharding.constrain(y.astype(x.dtype), "batch", None)


# Slots and choices are matched one to one, so the transpose of either gather is a gather with the other's index. XLA
# would emit a scatter-add instead, which is many times slower on CPU and serialises on TPU.


@jax.custom_vjp
def _to_slots(x: jax.Array, token: jax.Array, slot: jax.Array) -> jax.Array:
  """`x [N, D]` to `[n_slots, D]` by the token in each slot; an empty slot (token N) is 0."""
  return jnp.take(x, token, axis=0, mode="fill", fill_value=0)


def _to_slots_forward(x: jax.Array, token: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _to_slots(x, token, slot), slot


def _to_slots_backward(slot: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
  return jnp.sum(jnp.take(gradient, slot, axis=0, mode="fill", fill_value=0), axis=1), None, None


_to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def _from_slots(out: jax.Array, slot: jax.Array, choice: jax.Array) -> jax.Array:
  """`out [n_slots, D]` to `[N, K, D]` by the slot of each choice; a dropped choice is 0."""
  return jnp.take(out, slot, axis=0, mode="fill", fill_value=0)


def _from_slots_forward(out: jax.Array, slot: jax.Array, choice: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _from_slots(out, slot, choice), choice


def _from_slots_backward(choice: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
  flat = gradient.reshape(-1, gradient.shape[-1])
  return jnp.take(flat, choice, axis=0, mode="fill", fill_value=0), None, None


_from_slots.defvjp(_from_slots_forward, _from_slots_backward)
