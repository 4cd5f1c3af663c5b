"""Carries tokens to the slots of a buffer and back, at the cost of gathers only.

Each of a token's K choices has one slot or none, and a slot holds one choice or none. Since choices and slots match one
to one, the transpose of either gather is a gather with the other's index. XLA would emit a scatter-add instead, which
is many times slower on CPU and serialises on TPU. The price is that only reverse-mode derivatives work (`jax.grad`, no
`jax.jvp`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supermoe_jax import sharding


def ascending(x: jax.Array) -> jax.Array:
  """Returns `x [n]` in ascending order.

  Equal numbers are interchangeable, so the sort need not be stable. On TPUs a stable sort also carries positions, and
  takes three times as long to compile. Elsewhere the sort is stable, which XLA:CPU runs faster.
  """
  return jax.lax.sort(x, is_stable=sharding.platform() != "tpu")


def grouping_order(group: jax.Array, groups: int) -> jax.Array:
  """Returns the permutation that sorts `group [n]`, int32 in [0, groups); equal groups stay in their order.

  Where group and position fit into one number, they share one: one array is sorted, not two or three.
  """
  n = len(group)
  each = jnp.arange(n, dtype=jnp.int32)
  if groups * n <= jnp.iinfo(jnp.int32).max:
    return ascending(group * n + each) % n
  return jax.lax.sort((group, each), num_keys=2, is_stable=False)[1]


class RankedChoices(NamedTuple):
  """Choices of n tokens, counted by expert.

  Attributes:
    sent: bool `[n, K]`, whether the choice is for one of these experts; False for tokens that are not valid.
    rank: int32 `[n, K]`, position among the choices of the same expert; see `rank_choices`.
    load: int32 `[E]`, number of choices of each expert.
  """

  sent: jax.Array
  rank: jax.Array
  load: jax.Array


def rank_choices(expert: jax.Array, valid: jax.Array, experts: int, urgent: jax.Array | None = None) -> RankedChoices:
  """Ranks the choices `expert [n, K]` of `valid [n]` tokens; choices outside [0, experts) are not sent.

  Without `urgent` earlier tokens come first. With `urgent [n]`, where experts may be full, first choices come before
  second ones, urgent tokens before others, and equals in strides over all tokens: no row is always last.
  """
  n, k = expert.shape
  sent = valid[:, None] & (expert >= 0) & (expert < experts)
  flat = jnp.where(sent, expert, experts).reshape(-1)
  if urgent is None:
    in_order = grouping_order(flat, experts + 1)
  else:
    level = 2 * jnp.arange(k, dtype=jnp.int32) + ~urgent[:, None]
    group = jnp.where(sent, expert * 2 * k + level, experts * 2 * k).reshape(-1)
    in_order = _in_strides(group, experts * 2 * k + 1)
  start = jnp.searchsorted(flat[in_order], jnp.arange(experts + 1))
  rank_sorted = jnp.arange(n * k) - start[flat[in_order]]
  rank = jnp.zeros(n * k, jnp.int32).at[in_order].set(rank_sorted.astype(jnp.int32), unique_indices=True)
  return RankedChoices(sent, rank.reshape(n, k), jnp.diff(start).astype(jnp.int32))


def _in_strides(group: jax.Array, groups: int) -> jax.Array:
  """Returns the permutation that sorts `group [n]` as `grouping_order` does; equals come in strides of about √n."""
  n = len(group)
  stride = math.isqrt(n) | 1  # odd: a row's length is often a multiple of a power of two
  rounds = -(-n // stride)
  filled = jnp.pad(group, (0, rounds * stride - n), constant_values=groups)  # sorts behind all others
  order = grouping_order(filled.reshape(rounds, stride).T.reshape(-1), groups + 1)[:n]
  return order % rounds * stride + order // rounds


def sorted_places(expert: jax.Array, ranked: RankedChoices) -> jax.Array:
  """Returns each choice's position `[n, K]` among all choices sorted by expert; arbitrary for one that is not sent."""
  start = jnp.cumsum(ranked.load) - ranked.load
  return start[jnp.clip(expert, 0, len(ranked.load) - 1)] + ranked.rank


def run_through_buffer(
  x: jax.Array, weight: jax.Array, slot: jax.Array, n_slots: int, run: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """Puts each choice of `x [n, D]` into its `slot [n, K]`, runs the buffer and combines the results.

  A `slot` of n_slots means no slot. `run` maps `[n_slots, D]`, where empty slots are 0, to `[n_slots, D]`.

  Returns: float32 `[n, D]`, the sum over K of `weight [n, K]` times a choice's output; a choice without a slot adds 0.
  """
  n, k = slot.shape
  choice = jnp.full(n_slots, n * k, jnp.int32)  # the choice in each slot, of n·K; n·K: none
  each = jnp.arange(n * k, dtype=jnp.int32)
  index = jnp.where(slot.reshape(-1) < n_slots, slot.reshape(-1), n_slots + each)  # all different, as promised below
  choice = choice.at[index].set(each, mode="drop", unique_indices=True)
  back = _from_buffer(run(_to_buffer(x, choice // k, slot)), slot, choice)
  return jnp.einsum("nk,nkd->nd", weight, back, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _to_buffer(x: jax.Array, token: jax.Array, slot: jax.Array) -> jax.Array:
  """Returns `[n_slots, D]`, the row of `x [n, D]` for the token in each slot; an empty slot (token n) is 0."""
  return jnp.take(x, token, axis=0, mode="fill", fill_value=0)


def _to_buffer_forward(x: jax.Array, token: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _to_buffer(x, token, slot), slot


def _to_buffer_backward(slot: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
  return jnp.sum(jnp.take(gradient, slot, axis=0, mode="fill", fill_value=0), axis=1), None, None


_to_buffer.defvjp(_to_buffer_forward, _to_buffer_backward)


@jax.custom_vjp
def _from_buffer(out: jax.Array, slot: jax.Array, choice: jax.Array) -> jax.Array:
  """Returns `[n, K, D]`, each choice's row of `out [n_slots, D]` by its slot; a choice without a slot is 0."""
  return jnp.take(out, slot, axis=0, mode="fill", fill_value=0)


def _from_buffer_forward(out: jax.Array, slot: jax.Array, choice: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _from_buffer(out, slot, choice), choice


def _from_buffer_backward(choice: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
  flat = gradient.reshape(-1, gradient.shape[-1])
  return jnp.take(flat, choice, axis=0, mode="fill", fill_value=0), None, None


_from_buffer.defvjp(_from_buffer_forward, _from_buffer_backward)
