"""Rows that fill no whole number of a TPU's tiles, several to a line that does.

XLA:TPU works on tiles of 128 numbers of an array's last dimension. A table `[R, 64]` would take twice its memory so;
XLA keeps it in another order instead, and copies the whole of it into tiles and back in every step. So p rows of width
D, neighbours by their code, lie side by side: `[R / p, p·D]`, which is `[R, D]` read otherwise.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

LANES = 128

# Most tiles that reading one row may take for the sake of those beside it.
_MOST_TILES = 8

# Stands for no row: larger than any. So are the numbers below it, for when no two may be the same.
NONE = jnp.iinfo(jnp.int32).max
MOST_ROWS = NONE - 2**24


def rows_per_line(width: int, platform: str) -> int:
  """Returns p for rows of `width` numbers: on TPUs as few as fill tiles, 1 where that were many tiles, or elsewhere."""
  p = LANES // math.gcd(LANES, width)
  return p if platform == "tpu" and p * width <= _MOST_TILES * LANES else 1


def rows_at(rows: jax.Array, index: jax.Array, there: jax.Array) -> jax.Array:
  """`rows[index]`, 0 where not `there`.

  By a product, which XLA:CPU fuses into a vectorised gather of several threads; a select takes four times as long.
  """
  return jnp.take(rows, index, axis=0, mode="clip") * there[..., None].astype(rows.dtype)


def take_rows(lines: jax.Array, index: jax.Array, there: jax.Array, width: int) -> jax.Array:
  """The rows `index [...]` of `lines [L, p·D]`, as `rows_at`: `[..., D]`. A line is read whole.

  Of one number a row, `lines [R]` gives `[...]`, and any number where not `there`.
  """
  if lines.ndim == 1:
    return jnp.take(lines, index, mode="clip")
  p = lines.shape[-1] // width
  if p == 1:
    return rows_at(lines, index, there)
  found = rows_at(lines, index // p, there)
  first, *others = jnp.split(found, p, axis=-1)
  for place, row in enumerate(others, 1):
    first = jnp.where((index % p == place)[..., None], row, first)
  return first


def put_rows(lines: jax.Array, row: jax.Array, value: jax.Array) -> jax.Array:
  """`lines [L, p·D]` with `value [n, D]` at the rows `row [n]`: each once, those of a line together; `NONE`: nowhere.

  Of one number a row, `lines [R]` and `value [n]` will do.
  """
  n, width = len(row), value.shape[-1]
  p = lines.shape[-1] // width if lines.ndim == 2 else 1
  each, there = jnp.arange(n, dtype=jnp.int32), row != NONE
  if p == 1:
    # No two are one row, those that are none included: else XLA:TPU would sort them.
    return lines.at[jnp.where(there, row, NONE - each)].set(value, mode="drop", unique_indices=True)
  line = jnp.where(there, row // p, NONE)
  group = jnp.cumsum(line != jnp.concatenate([jnp.full_like(line[:1], -1), line[:-1]])) - 1
  touched = jnp.full_like(line, NONE).at[group].set(line, indices_are_sorted=True)
  before = jnp.take(lines, touched, axis=0, mode="clip").reshape(n * p, width)
  index = jnp.where(there, group * p + row % p, n * p + each)
  after = before.at[index].set(value, mode="drop", unique_indices=True).reshape(n, p * width)
  return put_rows(lines, touched, after)
