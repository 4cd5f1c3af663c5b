"""Sorting whole numbers, in the form that each backend compiles and runs best."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from supermoe_jax import sharding


def ascending(x: jax.Array) -> jax.Array:
  """`x [n]` in ascending order.

  Equal numbers are all alike, so the sort need not be stable: for TPUs a stable one carries the places along, and takes
  three times as long to compile. Elsewhere it is, which XLA:CPU runs faster.
  """
  return jax.lax.sort(x, is_stable=sharding.platform() != "tpu")


def order(group: jax.Array, groups: int) -> jax.Array:
  """The permutation that brings `group [n]`, int32 in [0, groups), into order, equal ones in the order they come in.

  A group and a place go into one number where both fit: a sort of one array, not of two or three.
  """
  n = len(group)
  each = jnp.arange(n, dtype=jnp.int32)
  if groups * n <= jnp.iinfo(jnp.int32).max:
    return ascending(group * n + each) % n
  return jax.lax.sort((group, each), num_keys=2, is_stable=False)[1]
