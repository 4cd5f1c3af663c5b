"""Counts what a next-event head remembers: how often each value of a catalogue lies in the past of a state.

Most values have no count, so counts are kept in a sparse form, and become dense for a chunk of the catalogue at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Remembered(NamedTuple):
  """Counts of one kind at the S sites of B rows, from L events of each row and up to C values an event.

  The count of code j at site s of row b is `Σ_l weight[b, s, l] · Σ_c number[b, l, c] · [code[b, l, c] = j]`, and 0
  where that sum is negative. A score adds `gain · log(1 + count)`.

  Attributes:
    weight: float32 `[B, S, L]`, how much of an event a site remembers.
    code: int32 `[B, L, C]`, codes of values; 0 for none.
    number: float32 `[B, L, C]`.
  """

  weight: jax.Array
  code: jax.Array
  number: jax.Array

  def at(self, sites: slice) -> Remembered:
    """Returns the counts at some of the sites."""
    return self._replace(weight=self.weight[:, sites])

  def of_one_site(self, events: int) -> Remembered:
    """Returns the counts of rows with one site in the form L = 1, from the `events` events of the largest weight.

    Its arrays are `[B, 1, 1]`, `[B, 1, events · C]` and `[B, 1, events · C]`.
    """
    b, events = len(self.code), min(events, self.code.shape[1])
    weight, chosen = jax.lax.top_k(self.weight[:, 0], events)
    code, number = (jnp.take_along_axis(x, chosen[:, :, None], axis=1) for x in (self.code, self.number))
    return Remembered(
      jnp.ones((b, 1, 1), jnp.float32), code.reshape(b, 1, -1), (number * weight[:, :, None]).reshape(b, 1, -1)
    )

  def logs_of_chunk(self, place: jax.Array, width: int) -> jax.Array:
    """Returns `log(1 + count)` of `width` values at all sites, `[B·S, width]`.

    `place [B, L, C]` is the place among these values of each of the codes; codes elsewhere have the place `width`.
    """
    weight, _, number = self
    if weight.shape[1] == 1:  # of a single site the sum over events needs no product
      row, flat = jnp.arange(len(number))[:, None], (number * weight[:, 0, :, None]).reshape(len(number), -1)
      counts = _zeros(number, (len(number), width))
      return _log(counts.at[row, place.reshape(len(number), -1)].add(flat, mode="drop"))

    def of_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
      weight, place, number = row
      event = jnp.arange(len(place))[:, None]
      return weight @ _zeros(number, (len(place), width)).at[event, place].add(number, mode="drop")

    return _log(jax.lax.map(of_row, (weight, place, number)).reshape(-1, width))

  def logs_of(self, codes: jax.Array) -> jax.Array:
    """Returns `log(1 + count)` of the codes `[N]` at all sites: `[B, S, N]`."""

    def of_row(weight: jax.Array, code: jax.Array, number: jax.Array) -> jax.Array:
      return weight @ _by_event(code, number, codes)

    return _log(jax.vmap(of_row)(*self))

  def logs_at(self, codes: jax.Array) -> jax.Array:
    """Returns `log(1 + count)` of each site's own codes `[B, S, m]`: `[B, S, m]`."""

    def of_row(weight: jax.Array, code: jax.Array, number: jax.Array, codes: jax.Array) -> jax.Array:
      found = _by_event(code, number, codes.reshape(-1)).reshape(-1, *codes.shape)
      return jnp.einsum("sl,lsm->sm", weight, found)

    return _log(jax.vmap(of_row)(*self, codes))


def _by_event(code: jax.Array, number: jax.Array, asked: jax.Array) -> jax.Array:
  """Returns the numbers of the codes `asked [N]`, which may repeat, at each event: `[L, N]`; 0 for code 0."""
  order = jnp.sort(asked)
  place = jnp.searchsorted(order, code)
  there = (order[jnp.minimum(place, len(order) - 1)] == code) & (code > 0)
  event = jnp.arange(len(code))[:, None]
  found = jnp.zeros((len(code), len(order))).at[event, jnp.where(there, place, len(order))].add(number, mode="drop")
  return found[:, jnp.searchsorted(order, asked)]


def _zeros(like: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns zeros that vary over the devices as `like` does."""
  return jnp.zeros(shape, like.dtype) + 0 * like.reshape(-1)[0]


def _log(count: jax.Array) -> jax.Array:
  return jnp.log1p(jnp.maximum(count, 0.0))
