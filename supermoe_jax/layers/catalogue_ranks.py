"""Ranks the targets of states among all rows of a table, a chunk of rows at a time; see `layers.catalogue`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from supermoe_jax import sharding
from supermoe_jax.layers.catalogue import BIAS, CHUNK, ROWS, Catalogue, DeviceRows, scores_of_chunk

if TYPE_CHECKING:  # loaded only by a config that names a memory
  from supermoe_jax.layers.memory.remembered import Remembered


def rank_codes(
  state: jax.Array,
  target: jax.Array,
  seen: jax.Array,
  catalogue: Catalogue,
  chunk: int = CHUNK,
  remembered: tuple[Remembered, ...] = (),
) -> jax.Array:
  """Returns the rank of each state's best target among all items, int32 `[n]`; 1 is best.

  A state has the targets `target [n, t]`, codes. The rank is that of the target with the highest score. Neither the
  other targets nor the codes `seen [n, m]` count against it. Every other item that does not score less does: one with
  an equal score, and one whose score is not a number. `seen` holds each code once and no target; 0 stands for none in
  both. Scores are products with `state [n, D + K]`, and gains of the K kinds of counts `remembered`, of n rows with one
  site each; n must divide over all devices.

  One product scores all items. So rows that are equal score alike, whether or not one is the target or was seen. A
  first pass over the chunks finds the target's score, a second one compares; a single chunk needs one pass.
  """

  def local(
    state: jax.Array,
    target: jax.Array,
    seen: jax.Array,
    rows: jax.Array,
    bias: jax.Array,
    *counts: dict[str, jax.Array],
  ) -> jax.Array:
    device, memory = (
      DeviceRows.of(rows, bias, catalogue.size, chunk),
      [type(r)(**c) for r, c in zip(remembered, counts)],
    )
    parts, passes = device.chunks, min(device.chunks, 2)

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      own, better = sums
      part = device.chunk(i % parts)
      scores = scores_of_chunk(state, part, device.logs(memory, part, i % parts))
      mine = device.among(part, target, i % parts)
      best = jnp.max(jnp.where(mine, scores, -jnp.inf), axis=1)  # not a number if one of the scores is none
      own = jnp.where(i < parts, jnp.maximum(own, best), own)
      ahead = ~(scores < own[:, None]) & ~mine & (part.code > 0)
      place, there = device.places(seen, i % parts)
      hidden = jnp.take_along_axis(ahead, place, axis=1) & there
      count = jnp.sum(ahead, axis=1, dtype=jnp.int32) - jnp.sum(hidden, axis=1, dtype=jnp.int32)
      return own, better + jnp.where(i >= (passes - 1) * parts, count, 0)

    # What the loop carries varies over devices as the states do.
    return jax.lax.fori_loop(0, passes * parts, add, (state[:, 0] * 0 - jnp.inf, jnp.ones_like(target[:, 0])))[1]

  of_rows = ("rows", None, None)
  counted = {"weight": of_rows, "code": of_rows, "number": of_rows}
  names = ("rows", None), ("rows", None), ("rows", None), ROWS, BIAS, *[counted] * len(remembered)
  arguments = state, target, seen, catalogue.rows, catalogue.bias, *(r._asdict() for r in remembered)
  return sharding.on_shards(local, names, ("rows",), *arguments)
