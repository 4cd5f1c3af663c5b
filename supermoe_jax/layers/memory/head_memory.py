"""Implements the memory of a next-event head: what a user had before, and what followed it for other users.

A dot product of a state and an item's vector forgets which single items occurred. So the head adds the logarithms of
counts that cost nothing to keep, each times a gain that the state decides:

    score(item) = state · vector + Σ_k gain_k(state) · log(1 + count_k(item))

    repeat   the item's share of the user's past values, times the number of items
    recent   the same, where older values weigh less: `FADE` per value
    follow   how often, in training histories, the item followed the user's last ones, see `FollowTable`

Counts are relative to chance: they sum to about the number of items, so that an item of chance alone has the count 1,
and a gain of 1 is the right one where half of the next values are remembered ones. Gains start at 1, and the dot
product at 0, so a new head answers as the counts do. Where a user's own values are never right, their gains start at
−1.

The form is the project's own. Its parts are known: a copy mechanism, arXiv 1603.06393; item-to-item collaborative
filtering, https://doi.org/10.1109/MIC.2003.1167344; a personalised gate for repeats, arXiv 1812.02646.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax.layers import exchange, table
from supermoe_jax.layers.attention import Visibility, visibility
from supermoe_jax.layers.memory.remembered import Remembered
from supermoe_jax.sharding import linear, set_bias

# The weight of the event before the last one in `recent`, and of each earlier one against the one after it.
FADE = 0.7

# Values that `follow` keeps of each value, and the user's last values that it looks at, at most.
FOLLOWERS, LAST = 32, 50

# Codes are kept as two whole float32 numbers, since rows are fetched as float32: code = high · _BASE + low.
_BASE = 1 << 12


class MemoryRows(nnx.Variable):
  """Counts that a head remembers. They are fitted on the training period before the first step, and never learned."""


class FollowRule(NamedTuple):
  """How counts of pairs are made and read; see `data.dataset.pair_counts.PairSetting`.

  Attributes:
    decay: a pair's weight, per moment between its values.
    window: events that a value looks ahead.
    backward: the weight of a pair in the opposite order.
    fade: the weight of the k-th last value of the user is `fade^k`.
    last: the number of last values that count, at most `LAST`.
    simultaneous: 1 if the values of one moment form a set and do not follow each other; else 0.
  """

  decay: jax.Array | float = 0.9
  window: jax.Array | float = 50.0
  backward: jax.Array | float = 0.25
  fade: jax.Array | float = 0.7
  last: jax.Array | float = 20.0
  simultaneous: jax.Array | float = 0.0


class FollowRows(NamedTuple):
  """The values that follow each value most, as `FollowTable` takes them; codes 0 and 1 have none.

  Attributes:
    code: int32 `[size, C]`, codes of followers; 0 for none.
    number: float32 `[size, C]`, their damped counts.
    out: float32 `[size]`, the factor by which a count is damped for the value that is followed.
    into: float32 `[size]`, the factor for the value that follows.
    rule: how the counts are made and read.
  """

  code: jax.Array
  number: jax.Array
  out: jax.Array
  into: jax.Array
  rule: FollowRule


class FollowTable(nnx.Module):
  """The `FOLLOWERS` values that follow each value most in training histories, spread over devices as a table is."""

  def __init__(self, size: int, ways: int = 1):
    """Creates an empty table for `size` codes, whose rows `ways` devices can share."""
    self.extent = exchange.Extent(size, exchange.stripes(size, ways))
    self.rows = MemoryRows(jnp.zeros((*self.extent.shape, 3 * FOLLOWERS + 2)), logical=(None, "rows", None), size=size)
    self.rule = MemoryRows(jnp.asarray(FollowRule(), jnp.float32), logical=(None,))

  def fill(self, rows: FollowRows) -> None:
    """Puts the counts of a training period into the table."""
    code, number = (jnp.asarray(x)[:, :FOLLOWERS] for x in (rows.code, rows.number))
    high, low = (code // _BASE).astype(jnp.float32), (code % _BASE).astype(jnp.float32)
    whole = jnp.concatenate(
      [
        *(jnp.pad(x, ((0, 0), (0, FOLLOWERS - x.shape[1]))) for x in (high, low, number)),
        rows.out[:, None],
        rows.into[:, None],
      ],
      axis=1,
    )
    shape = self.rows.get_value().shape
    self.rows[...] = jnp.pad(whole, ((0, shape[0] * shape[1] - len(whole)), (0, 0))).reshape(shape)
    self.rule[...] = jnp.stack([jnp.asarray(x, jnp.float32) for x in rows.rule])

  def __call__(self, codes: jax.Array) -> FollowRows:
    """Looks up `codes [B, L]`: the arrays of the result are `[B, L, C]` and `[B, L]`."""
    place, _ = table.distinct_codes(codes, self.extent)
    found = table.look_up(table.fetch(self.rows.get_value(), place, self.extent), codes, self.extent)
    high, low, number = (found[..., i * FOLLOWERS : (i + 1) * FOLLOWERS] for i in range(3))
    code = high.astype(jnp.int32) * _BASE + low.astype(jnp.int32)
    rule = FollowRule(*self.rule.get_value())
    return FollowRows(code, number, found[..., -2], found[..., -1], rule)


class HeadMemory(nnx.Module):
  """The memory of a head: gains from the state, and counts from the row."""

  def __init__(
    self,
    kinds: Sequence[str],
    d_model: int,
    column: int,
    size: int,
    ways: int = 1,
    *,
    repeats: bool = True,
    rngs: nnx.Rngs,
  ):
    """Creates a memory of the K `kinds` for the field of a `column` of the codes.

    The field has `size` codes, and `ways` devices can share their rows. Without `repeats` a user's own values are never
    right.
    """
    self.kinds, self.column, self.values = tuple(kinds), column, size - 2
    self.gain = linear(d_model, len(self.kinds), names=("embed", None), zero=True, rngs=rngs)
    set_bias(self.gain, jnp.array([1.0 if repeats or kind == "follow" else -1.0 for kind in self.kinds]))
    self.follow = FollowTable(size, ways) if "follow" in self.kinds else None

  def fill(self, rows: FollowRows) -> None:
    """Puts the counts of a training period into the memory of followers."""
    assert self.follow is not None, "these kinds remember no followers"
    self.follow.fill(rows)

  def counts(self, row: Any, *, training: bool) -> tuple[Remembered, ...]:
    """Returns the counts of each kind at the L events and S snapshots of each row of `batch.Features`.

    In training the pairs of a row's own users do not count in `follow`, since they hold what is asked.
    """
    visible, _ = visibility(row.segment, row.query_segment, row.query_events)
    codes = row.codes[:, :, self.column]
    codes = jnp.where((row.segment > 0) & (codes > 1), codes, 0)  # neither absent nor out of vocabulary
    order = event_order(row.segment, row.gap, codes)
    out = []
    for kind in self.kinds:
      if kind == "follow":
        assert self.follow is not None
        out.append(followed(self.follow(codes), codes, order, visible, training=training))
      else:
        fade = FADE if kind == "recent" else 1.0
        weight = past_weights(order, visible, fade)
        weight *= self.values / jnp.maximum(jnp.sum(weight, axis=2, keepdims=True), 1.0)
        out.append(Remembered(weight, codes[:, :, None], jnp.ones((*codes.shape, 1))))
    return tuple(out)

  def at_snapshot(self, counts: Sequence[Remembered]) -> tuple[Remembered, ...]:
    """Returns the counts of rows with one site each, small enough to be kept for every question."""
    kept = (LAST if kind == "follow" else r.code.shape[1] for kind, r in zip(self.kinds, counts, strict=True))
    return tuple(r.of_one_site(events) for r, events in zip(counts, kept))


class EventOrder(NamedTuple):
  """The order of the events that have a value, `[B, L]` each; users of a row follow one another.

  Attributes:
    there: bool, whether the event has a value.
    place: int32, how many events of the row have a value, up to and including this one.
    moment: int32, the number of moments with a value, up to and including this one's.
    segment: int32, the user of the event; 0 is padding.
  """

  there: jax.Array
  place: jax.Array
  moment: jax.Array
  segment: jax.Array


def event_order(segment: jax.Array, gap: jax.Array, codes: jax.Array) -> EventOrder:
  """Returns the order of the events of rows with the values `codes [B, L]`, 0 for none.

  `segment [B, L]` and `gap [B, L]` are those of `batch.Features`.
  """
  there = codes > 0
  later = (gap > 0) | jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)))
  time = jnp.cumsum(later, axis=1, dtype=jnp.int32)
  before = jax.lax.cummax(jnp.where(there, time, -1), axis=1)  # of the last value up to here
  new = there & (time > jnp.pad(before[:, :-1], ((0, 0), (1, 0)), constant_values=-1))
  place, moment = (jnp.cumsum(x, axis=1, dtype=jnp.int32) for x in (there, new))
  return EventOrder(there, place, moment, jnp.asarray(segment))


def past_weights(
  order: EventOrder, visible: Visibility, fade: jax.Array | float, last: jax.Array | float = jnp.inf
) -> jax.Array:
  """Returns how much each site remembers of each event, `[B, L + S, L]`: `fade^k` for its k-th last value, k < `last`.

  k is 0 for the last value that the site sees. Values that it does not see weigh 0.
  """
  event = jnp.arange(order.place.shape[1])
  seen = (event >= visible.start[:, :, None]) & (event < visible.end[:, :, None]) & order.there[:, None, :]
  places = jnp.pad(order.place, ((0, 0), (1, 0)))  # place e: of the events before e
  k = jnp.take_along_axis(places, visible.end, axis=1)[:, :, None] - order.place[:, None, :]
  k = jnp.where(seen, k, 0).astype(jnp.float32)
  return jnp.where(seen & (k < last), jnp.asarray(fade, jnp.float32) ** k, 0.0)


def followed(
  rows: FollowRows, codes: jax.Array, order: EventOrder, visible: Visibility, *, training: bool
) -> Remembered:
  """Returns how often values followed the last ones of each site; `rows` are those of `codes [B, L]`.

  In training the pairs of the row's own users are taken out of the counts, as far as they lie in the row. A row does
  not say whether its users were counted. Of a log whose users were not all counted, pairs may thus be taken out that
  were never in, and counts are then too low, never too high.
  """
  rule = rows.rule
  weight = past_weights(order, visible, rule.fade, jnp.minimum(rule.last, LAST))
  if not training:
    return Remembered(weight, rows.code, rows.number)
  own = own_pairs(codes, order, rule) * rows.out[:, :, None] * rows.into[:, None, :]
  # What is not among the kept followers was never counted in the first place.
  kept = jnp.any(rows.code[:, :, None, :] == codes[:, None, :, None], axis=3)
  code = jnp.concatenate([rows.code, jnp.broadcast_to(codes[:, None, :], own.shape)], axis=2)
  return Remembered(weight, code, jnp.concatenate([rows.number, jnp.where(kept, -own, 0.0)], axis=2))


def own_pairs(codes: jax.Array, order: EventOrder, rule: FollowRule) -> jax.Array:
  """Returns the weights of a row's own pairs, `[B, L, L]`: of event l's value, wherever it stands, before event m.

  The weights are those of `data.dataset.pair_counts`, before damping. Both events belong to one user.
  """
  apart = order.place[:, None, :] - order.place[:, :, None]  # of event m after event l
  moments = order.moment[:, None, :] - order.moment[:, :, None]
  moments = jnp.where(rule.simultaneous > 0, moments, apart)
  both = order.there[:, None, :] & order.there[:, :, None] & (order.segment[:, None, :] == order.segment[:, :, None])
  pair = both & (apart > 0) & (apart <= rule.window) & (moments > 0)
  ahead = jnp.where(pair, rule.decay ** jnp.where(pair, moments, 0).astype(jnp.float32), 0.0)
  weight = ahead + rule.backward * ahead.swapaxes(1, 2)
  same = (codes[:, None, :] == codes[:, :, None]) & both
  return same.astype(jnp.float32) @ weight
