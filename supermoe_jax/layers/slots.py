"""Carrying tokens to the slots of a buffer and back, at the cost of gathers only.

Each of a token's K choices has one slot or none, and a slot holds one choice or none. Since they are matched one to
one, the transpose of either gather is a gather with the other's index. XLA would emit a scatter-add instead, which is
many times slower on CPU and serialises on TPU. The price: derivatives by reverse mode only (`jax.grad`, no `jax.jvp`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supermoe_jax.layers import sorting


class Ranked(NamedTuple):
  """The choices of n tokens, counted by expert.

  Attributes:
    sent: bool `[n, K]`, whether the choice is for one of these experts; False for tokens that are not valid.
    rank: int32 `[n, K]`, place among the choices of the same expert; earlier tokens come first.
    load: int32 `[E]`, choices of each expert.
  """

  sent: jax.Array
  rank: jax.Array
  load: jax.Array


def rank(expert: jax.Array, valid: jax.Array, experts: int) -> Ranked:
  """Ranks the choices `expert [n, K]` of `valid [n]` tokens; those outside [0, experts) are sent nowhere."""
  n, k = expert.shape
  sent = valid[:, None] & (expert >= 0) & (expert < experts)
  flat = jnp.where(sent, expert, experts).reshape(-1)
  order = sorting.order(flat, experts + 1)
  start = jnp.searchsorted(flat[order], jnp.arange(experts + 1))
  rank_sorted = jnp.arange(n * k) - start[flat[order]]
  rank = jnp.zeros(n * k, jnp.int32).at[order].set(rank_sorted.astype(jnp.int32), unique_indices=True)
  return Ranked(sent, rank.reshape(n, k), jnp.diff(start).astype(jnp.int32))


def places(expert: jax.Array, ranked: Ranked) -> jax.Array:
  """Returns each choice's place `[n, K]` among all, in the order by expert; arbitrary for one that is not sent."""
  start = jnp.cumsum(ranked.load) - ranked.load
  return start[jnp.clip(expert, 0, len(ranked.load) - 1)] + ranked.rank


def through(
  x: jax.Array, weight: jax.Array, slot: jax.Array, n_slots: int, run: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """Puts each choice of `x [n, D]` into its `slot [n, K]` (n_slots: nowhere), runs the buffer and combines the results.

  `run` maps `[n_slots, D]`, where empty slots are 0, to `[n_slots, D]`. Returns float32 `[n, D]`, the sum over K of
  `weight [n, K]` times a choice's output; a choice without a slot adds nothing.
  """
  n, k = slot.shape
  choice = jnp.full(n_slots, n * k, jnp.int32)  # which of the n·K choices sits in a slot; n·K: none
  each = jnp.arange(n * k, dtype=jnp.int32)
  index = jnp.where(slot.reshape(-1) < n_slots, slot.reshape(-1), n_slots + each)  # all different, as promised below
  choice = choice.at[index].set(each, mode="drop", unique_indices=True)
  back = _from_slots(run(_to_slots(x, choice // k, slot)), slot, choice)
  return jnp.einsum("nk,nkd->nd", weight, back, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _to_slots(x: jax.Array, token: jax.Array, slot: jax.Array) -> jax.Array:
  """`x [n, D]` to `[n_slots, D]` by the token in each slot; an empty slot (token n) is 0."""
  return jnp.take(x, token, axis=0, mode="fill", fill_value=0)


def _to_slots_forward(x: jax.Array, token: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _to_slots(x, token, slot), slot


def _to_slots_backward(slot: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
  return jnp.sum(jnp.take(gradient, slot, axis=0, mode="fill", fill_value=0), axis=1), None, None


_to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def _from_slots(out: jax.Array, slot: jax.Array, choice: jax.Array) -> jax.Array:
  """`out [n_slots, D]` to `[n, K, D]` by the slot of each choice; a choice without one is 0."""
  return jnp.take(out, slot, axis=0, mode="fill", fill_value=0)


def _from_slots_forward(out: jax.Array, slot: jax.Array, choice: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _from_slots(out, slot, choice), choice


def _from_slots_backward(choice: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
  flat = gradient.reshape(-1, gradient.shape[-1])
  return jnp.take(flat, choice, axis=0, mode="fill", fill_value=0), None, None


_from_slots.defvjp(_from_slots_forward, _from_slots_backward)
