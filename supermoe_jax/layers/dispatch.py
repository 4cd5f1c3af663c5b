"""Sends tokens to their experts and combines the results, by one of several strategies.

The strategies have one signature and compute the same numbers, with different traffic. A strategy runs on each device,
inside `sharding.on_shards`. It takes this device's `Tokens`, its `Experts`, and the capacity factor (None: nothing may
be dropped). It returns the combined outputs, as partial sums over `axes("mlp")`, and which choices reached an expert.
Tokens that are not valid are neither sent nor counted, and their output is 0.

Traffic over the `expert` axis of W devices, per layer, for n tokens on a device:

    dense, sorted   the experts' weights, to every device        any mesh; nothing where W = 1
    all_to_all      capacity_factor · K · n tokens, both ways    large W
    gather          (W - 1) · n tokens, back in float32          small W
    ragged          the K · n choices themselves, both ways      TPU and GPU only

Without a capacity, `all_to_all` and `gather` fall back to `sorted`: cells for the worst case would be W times as many.

Capacity bounds the choices of one expert from one group of tokens. A group is the tokens of one device or, with
`gather`, of the W devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from supermoe_jax import sharding
from supermoe_jax.layers import expert_buffer
from supermoe_jax.layers.experts import Experts

# Fewest rows in a block of one expert when nothing may be dropped.
BLOCK = 64


class Tokens(NamedTuple):
  """The n tokens of this device: `x [n, D]`, their choices `expert, weight [n, K]`, and which are `valid [n]`.

  Where experts are full, `urgent [n]` tokens are served first; see `expert_buffer.rank_choices`.
  """

  x: jax.Array
  expert: jax.Array
  weight: jax.Array
  valid: jax.Array
  urgent: jax.Array


class Dispatched(NamedTuple):
  """Combined expert outputs, float32 `y [n, D]`, and bool `kept [n, K]`, True for choices that reached an expert."""

  y: jax.Array
  kept: jax.Array


Strategy = Callable[[Tokens, Experts, float | None], Dispatched]


def dense(tokens: Tokens, experts: Experts, capacity_factor: float | None) -> Dispatched:
  """Runs every expert on every token, at E times the work; never drops. It is the simple reference for the others."""
  experts = experts.whole()
  everything = experts(jnp.broadcast_to(tokens.x, (experts.total, *tokens.x.shape)))
  gate = jnp.einsum("nk,nke->ne", tokens.weight, jax.nn.one_hot(tokens.expert, experts.total))
  gate = jnp.where(tokens.valid[:, None], gate, 0.0)
  y = jnp.einsum("ne,end->nd", gate, everything, preferred_element_type=jnp.float32)
  return Dispatched(y, jnp.broadcast_to(tokens.valid[:, None], tokens.expert.shape))


def sorted_(tokens: Tokens, experts: Experts, capacity_factor: float | None) -> Dispatched:
  """Sorts choices by expert into a buffer `[E, C, D]`; tokens stay on their device, weights come to them.

  Without a capacity, shapes are still static and nothing is dropped, so a token's result cannot depend on other tokens.
  A TPU then uses one grouped product. Other backends use blocks of rows, each of one expert, which copy its weights.
  Compiled for v5e with 8,192 tokens a device, D 1024, hidden 4096 and E 16, the product takes 387 MiB and 4.8 GB of
  traffic, the blocks 2,256 MiB and 9.7 GB.

  Source: capacity, arXiv 2101.03961; block-sparse dispatch, arXiv 2211.15841.
  """
  experts = experts.whole()
  if capacity_factor is None:
    return (_in_groups if sharding.platform() == "tpu" else _in_blocks)(tokens, experts)
  x, expert, weight, valid, urgent = tokens
  capacity = _capacity(capacity_factor, expert, experts.total)
  ranked = expert_buffer.rank_choices(expert, valid, experts.total, urgent)
  slot, kept, n_slots = _cells(expert, ranked, capacity, experts.total)
  y = expert_buffer.run_through_buffer(
    x, weight, slot, n_slots, lambda b: _flat(experts(b.reshape(experts.total, capacity, -1)))
  )
  return Dispatched(y, kept)


def _in_blocks(tokens: Tokens, experts: Experts) -> Dispatched:
  """Runs each expert on its own blocks of rows, at most `K·n / rows + E` blocks however the choices fall."""
  x, expert, weight, valid, _ = tokens
  rows = max(BLOCK, expert.size // (4 * experts.total))  # at most 5 E blocks, which each fetch their expert's weights
  blocks = expert.size // rows + experts.total
  ranked = expert_buffer.rank_choices(expert, valid, experts.total)
  used = (ranked.load + rows - 1) // rows
  end = jnp.cumsum(used)
  slot = jnp.where(ranked.sent, (end - used)[expert] * rows + ranked.rank, blocks * rows)
  group = jnp.minimum(jnp.searchsorted(end, jnp.arange(blocks), side="right"), experts.total - 1)
  y = expert_buffer.run_through_buffer(
    x, weight, slot, blocks * rows, lambda b: _flat(experts(b.reshape(blocks, rows, -1), group))
  )
  return Dispatched(y, ranked.sent)


def _in_groups(tokens: Tokens, experts: Experts) -> Dispatched:
  """Sorts the choices by expert and runs one grouped product over groups of any size."""
  x, expert, weight, valid, _ = tokens
  ranked = expert_buffer.rank_choices(expert, valid, experts.total)
  slot = jnp.where(ranked.sent, expert_buffer.sorted_places(expert, ranked), expert.size)
  return Dispatched(
    expert_buffer.run_through_buffer(x, weight, slot, expert.size, lambda rows: experts.ragged(rows, ranked.load)),
    ranked.sent,
  )


def all_to_all(tokens: Tokens, experts: Experts, capacity_factor: float | None) -> Dispatched:
  """Sorts choices into a buffer `[E, C, D]`, sends each expert's C rows to its device, and returns the results.

  Cells have a fixed size, so that the exchange is one plain all-to-all on every backend.

  Source: arXiv 2006.16668.
  """
  ways = sharding.ways("expert")
  if capacity_factor is None or ways == 1:
    return sorted_(tokens, experts, capacity_factor)
  x, expert, weight, valid, urgent = tokens
  capacity = _capacity(capacity_factor, expert, experts.total)
  ranked = expert_buffer.rank_choices(expert, valid, experts.total, urgent)
  slot, kept, n_slots = _cells(expert, ranked, capacity, experts.total)

  def run(buffer: jax.Array) -> jax.Array:
    axis = sharding.axes("expert")
    buffer = buffer.reshape(experts.total, capacity, -1)
    arrived = jax.lax.all_to_all(buffer, axis, split_axis=0, concat_axis=1, tiled=True)  # [E / W, W · C, D]
    return _flat(jax.lax.all_to_all(experts(arrived), axis, split_axis=1, concat_axis=0, tiled=True))

  return Dispatched(expert_buffer.run_through_buffer(x, weight, slot, n_slots, run), kept)


def gather(tokens: Tokens, experts: Experts, capacity_factor: float | None) -> Dispatched:
  """Gathers the tokens of all W devices, runs this device's experts on them, and sums each device's part back."""
  if capacity_factor is None or sharding.ways("expert") == 1:
    return sorted_(tokens, experts, capacity_factor)
  axis = sharding.axes("expert")
  x, expert, weight, valid, urgent = (jax.lax.all_gather(part, axis, tiled=True) for part in tokens)
  capacity = _capacity(capacity_factor, expert, experts.total)
  here = expert - experts.held * sharding.index("expert")
  ranked = expert_buffer.rank_choices(here, valid, experts.held, urgent)
  slot, kept, n_slots = _cells(here, ranked, capacity, experts.held)
  y = expert_buffer.run_through_buffer(
    x, weight, slot, n_slots, lambda b: _flat(experts(b.reshape(experts.held, capacity, -1)))
  )
  kept = jax.lax.psum_scatter(kept.astype(jnp.int32), axis, tiled=True) > 0
  return Dispatched(jax.lax.psum_scatter(y, axis, tiled=True), kept)


def ragged(tokens: Tokens, experts: Experts, capacity_factor: float | None) -> Dispatched:
  """Sorts choices by expert and multiplies groups of any size; over several devices it sends choices without padding.

  Over several devices, a device receives at most `capacity_factor · K · n` choices, or all without a capacity. If more
  are sent to it, each sender keeps the same share of its choices of each expert. On one device nothing is dropped.
  XLA:CPU has no ragged all-to-all, and its grouped product costs E times the work.
  """
  ways = sharding.ways("expert")
  if ways == 1:
    return _in_groups(tokens, experts)
  x, expert, weight, valid, urgent = tokens
  ranked = expert_buffer.rank_choices(expert, valid, experts.total, None if capacity_factor is None else urgent)
  most = ways * expert.size
  room = most if capacity_factor is None else min(most, math.ceil(capacity_factor * expert.size))
  plan, load = _exchange_plan(ranked.load, ways, room)
  kept = ranked.sent & (ranked.rank < load[expert])
  slot = jnp.where(kept, expert_buffer.sorted_places(expert, ranked._replace(load=load)), expert.size)
  y = expert_buffer.run_through_buffer(x, weight, slot, expert.size, lambda rows: _exchange(rows, experts, plan, room))
  return Dispatched(y, kept)


class _ExchangePlan(NamedTuple):
  """Row counts and offsets, int32, of a ragged exchange between W devices, as seen from this device.

  Attributes:
    send_start, sent: `[W]`, the first row for each device, and how many rows it has room for.
    arrive_start: `[W]`, where these rows begin in each device's buffer.
    received: `[W]`, rows from each device.
    return_start: `[W]`, where this device's results begin at each sender, which is where it sent the rows from.
    group: `[W, E / W]`, rows received from each device for each expert of this device.
  """

  send_start: jax.Array
  sent: jax.Array
  arrive_start: jax.Array
  received: jax.Array
  return_start: jax.Array
  group: jax.Array


def _exchange_plan(load: jax.Array, ways: int, room: int) -> tuple[_ExchangePlan, jax.Array]:
  """Returns the plan for `load [E]` choices here and `room` rows in a device's buffer, and the choices sent, `[E]`."""
  axis, me = sharding.axes("expert"), sharding.index("expert")
  wanted = jax.lax.all_gather(load, axis).reshape(ways, ways, -1)  # sender, receiver, expert of the receiver
  arriving = jnp.sum(wanted, axis=(0, 2), keepdims=True)
  share = room / jnp.maximum(arriving, 1) * (1 - 1e-6)  # rounding must not make a row more than there is room for
  counts = jnp.where(arriving <= room, wanted, jnp.floor(wanted * share).astype(jnp.int32))
  sent = jnp.sum(counts, axis=2)
  start = jnp.cumsum(sent, axis=1) - sent
  arrive = jnp.cumsum(sent, axis=0) - sent
  plan = _ExchangePlan(start[me], sent[me], arrive[me], sent[:, me], start[:, me], counts[:, me])
  return plan, counts[me].reshape(-1)


def _exchange(rows: jax.Array, experts: Experts, plan: _ExchangePlan, room: int) -> jax.Array:
  """Sends sorted `rows [K·n, D]` to their experts' devices, runs the experts, and returns the results in place."""
  axis = sharding.axes("expert")
  arrived = _ragged_all_to_all(
    rows, _like(rows, room), plan.send_start, plan.sent, plan.arrive_start, plan.received, axis
  )
  # Rows arrive sorted by sender, then expert; the grouped product needs them sorted by expert.
  ways, held = plan.group.shape
  group = jnp.tile(jnp.arange(held), ways)
  group = jnp.repeat(group, plan.group.reshape(-1), total_repeat_length=room)
  here = jnp.arange(room) < jnp.sum(plan.received)
  ranked = expert_buffer.rank_choices(group[:, None], here, held)
  place = jnp.where(here[:, None], expert_buffer.sorted_places(group[:, None], ranked), room)
  one = jnp.ones_like(place, rows.dtype)
  done = expert_buffer.run_through_buffer(arrived, one, place, room, lambda r: experts.ragged(r, ranked.load)).astype(
    rows.dtype
  )
  back_start = jnp.cumsum(plan.received) - plan.received
  return _ragged_all_to_all(done, _like(done, len(rows)), back_start, plan.received, plan.return_start, plan.sent, axis)


def _like(rows: jax.Array, n: int) -> jax.Array:
  """Returns zeros `[n, D]` that vary over the same devices as `rows`, as the exchange's type check requires."""
  return jnp.where(jnp.zeros((n, 1), bool), rows[:1], 0)


def _ragged_all_to_all(
  rows: jax.Array,
  into: jax.Array,
  start: jax.Array,
  sent: jax.Array,
  arrive_start: jax.Array,
  received: jax.Array,
  axis: tuple[str, ...],
) -> jax.Array:
  return jax.lax.ragged_all_to_all(rows, into, start, sent, arrive_start, received, axis_name=axis[0])


STRATEGIES: dict[str, Strategy] = {
  "dense": dense,
  "sorted": sorted_,
  "all_to_all": all_to_all,
  "gather": gather,
  "ragged": ragged,
}


def check_strategy(name: str) -> None:
  """Raises ValueError when `name` is neither "auto" nor a strategy."""
  if name != "auto" and name not in STRATEGIES:
    raise ValueError(f"dispatch={name!r} must be 'auto' or one of {', '.join(map(repr, STRATEGIES))}")


def choose_strategy(name: str, k: int, capacity_factor: float | None, dtype: jnp.dtype) -> str:
  """Returns `name`, or for "auto" the strategy chosen for the mesh in use and tokens of `dtype`.

  Raises:
    ValueError: there is no such strategy, or the backend lacks what it needs.
  """
  check_strategy(name)
  ways = sharding.ways("expert")
  if name == "ragged" and ways > 1 and sharding.platform() == "cpu":
    raise ValueError("dispatch='ragged' over several devices needs a TPU or GPU: XLA:CPU has no ragged all-to-all")
  if name != "auto":
    return name
  if ways == 1 or capacity_factor is None:
    return "sorted"
  # Bytes per token, both ways together. Of both numbers the share (W - 1) / W travels; see the table above.
  size = jnp.dtype(dtype).itemsize
  return "gather" if ways * (size + 4) < 2 * size * capacity_factor * k else "all_to_all"


def _capacity(factor: float, expert: jax.Array, experts: int) -> int:
  """Returns the rows an expert accepts of choices `expert [n, K]`: `factor` times its even share, at most n."""
  n, k = expert.shape
  return min(math.ceil(factor * k * n / experts), n)


def _cells(
  expert: jax.Array, ranked: expert_buffer.RankedChoices, capacity: int, experts: int
) -> tuple[jax.Array, jax.Array, int]:
  """Returns slots `[n, K]` in a buffer of `capacity` rows an expert, which choices have one, and the slots' number."""
  kept = ranked.sent & (ranked.rank < capacity)
  n_slots = experts * capacity
  return jnp.where(kept, expert * capacity + ranked.rank, n_slots), kept, n_slots


def _flat(buffer: jax.Array) -> jax.Array:
  return buffer.reshape(-1, buffer.shape[-1])
