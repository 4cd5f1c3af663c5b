"""Packs several narrow rows into one line that fills a whole number of a TPU's tiles.

XLA:TPU works on tiles of 128 numbers of an array's last dimension. A table `[R, 64]` would therefore take twice its
memory. XLA keeps it in another order instead, and copies the whole table into tiles and back in every step. To avoid
this, p rows of width D with neighbouring codes lie side by side: `[R / p, p·D]`, a reshape of `[R, D]`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

LANES = 128

# Most tiles that reading one row may take because of its neighbours in the line.
_MOST_TILES = 8

# NONE stands for no row; it is larger than any row. Where no two indices may be the same, the numbers from MOST_ROWS to
# NONE stand for no row too.
NONE = jnp.iinfo(jnp.int32).max
MOST_ROWS = NONE - 2**24


def rows_per_line(width: int, platform: str) -> int:
  """Returns p for rows of `width` numbers: on TPUs as few as fill tiles; 1 elsewhere or if that takes many tiles."""
  p = LANES // math.gcd(LANES, width)
  return p if platform == "tpu" and p * width <= _MOST_TILES * LANES else 1


def rows_at(rows: jax.Array, index: jax.Array, there: jax.Array) -> jax.Array:
  """Returns `rows[index]`, with 0 where not `there`.

  The mask is a product, which XLA:CPU fuses into a vectorised gather of several threads; a select takes four times as
  long.
  """
  return jnp.take(rows, index, axis=0, mode="clip") * there[..., None].astype(rows.dtype)


def take_rows(lines: jax.Array, index: jax.Array, there: jax.Array, width: int) -> jax.Array:
  """Returns the rows `index [...]` of `lines [L, p·D]`, as `rows_at` does: `[..., D]`. It reads whole lines.

  With one number per row, `lines [R]` gives `[...]`, with any number where not `there`.
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
  """Returns `lines [L, p·D]` with `value [n, D]` written to the rows `row [n]`; `NONE` is written nowhere.

  Each row occurs once, and the rows of a line are adjacent. With one number per row, pass `lines [R]` and `value [n]`.
  """
  n, width = len(row), value.shape[-1]
  p = lines.shape[-1] // width if lines.ndim == 2 else 1
  each, there = jnp.arange(n, dtype=jnp.int32), row != NONE
  if p == 1:
    # All indices differ, also where there is no row; otherwise XLA:TPU would sort them.
    return lines.at[jnp.where(there, row, NONE - each)].set(value, mode="drop", unique_indices=True)
  line = jnp.where(there, row // p, NONE)
  group = jnp.cumsum(line != jnp.concatenate([jnp.full_like(line[:1], -1), line[:-1]])) - 1
  touched = jnp.full_like(line, NONE).at[group].set(line, indices_are_sorted=True)
  before = jnp.take(lines, touched, axis=0, mode="clip").reshape(n * p, width)
  index = jnp.where(there, group * p + row % p, n * p + each)
  after = before.at[index].set(value, mode="drop", unique_indices=True).reshape(n, p * width)
  return put_rows(lines, touched, after)
