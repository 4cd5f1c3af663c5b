"""Runs the tables' part of a training step: it fetches rows, collects their gradients and moves only touched rows.

    asked = {name: distinct_codes(codes)}                 the rows that the batch asks for
    found = {name: fetch(rows, asked[name])}              unique rows, where the batch lies
    loss, gradients = value_and_grad(objective)(found)    by these rows, not by the tables
    touched = {name: collect(gradients)}                  at their owners, duplicates summed
    rows, slots = move_rows(rows, slots, touched)         in place, where the buffers are donated

A full softmax scores every row of its table. Such a table has a gradient for every row, laid out as the rows are; for a
large catalogue, sample the softmax.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from supermoe_jax import sharding
from supermoe_jax.batch import Batch
from supermoe_jax.layers import table
from supermoe_jax.layers.exchange import Extent, Touched
from supermoe_jax.layers.table import Fetched, TableRows
from supermoe_jax.layers.tpu_lines import NONE, put_rows, take_rows
from supermoe_jax.training import losses, row_optimizers
from supermoe_jax.training.row_optimizers import RowOptimizer, RowState

# The gradients of touched rows, or of all rows in the layout of the rows.
Gradient = Touched | jax.Array

# The rows and slots of a table on one device: `[R / p, p·D]`, and `[R]` or `[R / p, p·D]` for each slot.
Kept = tuple[jax.Array, RowState]

# Rows that a CPU moves at a time.
_MOVED_AT_ONCE = 1024


class TableCounts(NamedTuple):
  """The counts of a table in a step, int32 scalars over all devices.

  Attributes:
    touched: rows that were moved.
    out_of_range: codes that name no row; they look up to 0.
    lost: gradients that found no cell on their way to the owner, and moved nothing.
  """

  touched: jax.Array
  out_of_range: jax.Array
  lost: jax.Array


def table_values(state: nnx.State) -> dict[str, Any]:
  """Returns the values of the tables of `state`, by name: rows `[G, M / p, p·D]`, or layouts of rows."""
  found = (v for _, v in nnx.to_flat_state(nnx.filter_state(state, TableRows)))
  return {v.get_metadata()["table"]: v.get_value() for v in found}


def with_table_values(rows: nnx.State, by_name: Mapping[str, Any]) -> nnx.State:
  """Returns the tables `rows` with other values, given by the tables' names."""

  def fill(variable: nnx.Variable) -> nnx.Variable:
    return variable.replace(by_name[variable.get_metadata()["table"]])

  return jax.tree.map(fill, rows, is_leaf=lambda v: isinstance(v, nnx.Variable))


class TablePlan(NamedTuple):
  """The rows of each table that a batch asks for.

  Attributes:
    places: the places of the rows asked for, as `layers.table.distinct_codes` gives them; a table that a full softmax
      scores has none.
    extents: the extent of each table in `places`.
    outside: for each table in `places`, the number of codes that name no row, `[S]`.
    drawn: the codes that sampled softmaxes drew, by task.
    cells: the room of each pair of devices in an exchange, as a multiple of an even share of the ids.
  """

  places: dict[str, jax.Array]
  extents: dict[str, Extent]
  outside: dict[str, jax.Array]
  drawn: dict[str, jax.Array]
  cells: float

  def fetch(self, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Fetches the rows that a step differentiates by: `[S·U, D]` that are asked for, or all for a full softmax."""
    return {
      n: table.fetch(value, self.places[n], self.extents[n], self.cells).rows if n in self.places else value
      for n, value in rows.items()
    }

  def readable(self, found: Mapping[str, jax.Array]) -> dict[str, Fetched | jax.Array]:
    """Returns the result of `fetch` in the form that an `EmbeddingTable` reads."""
    return {n: Fetched(self.places[n], value) if n in self.places else value for n, value in found.items()}

  def collect(self, rows: Mapping[str, jax.Array], gradient: Mapping[str, jax.Array]) -> dict[str, Gradient]:
    """Brings the gradients by the result of `fetch` to the owners of the rows."""
    return {
      n: table.collect(rows[n], self.places[n], g, self.cells) if n in self.places else g for n, g in gradient.items()
    }

  def counts(self, touched: Mapping[str, Gradient]) -> dict[str, TableCounts]:
    """Returns the counts to report, for each table in `places`."""
    out = {}
    for name in self.places:
      part = touched[name]
      assert isinstance(part, Touched)
      moved = jnp.sum(part.row != NONE, dtype=jnp.int32)
      out[name] = TableCounts(moved, jnp.sum(self.outside[name]), jnp.sum(part.lost))
    return out


def plan_tables(graph: nnx.GraphDef, model: nnx.State, batch: Batch, key: jax.Array) -> TablePlan:
  """Returns the rows that the loss of `batch`, with the key of a step, will ask the tables of a `SuperMoE` for."""
  whole = nnx.merge(graph, model, copy=True)
  fields = whole.encoder.event_embedding.tables
  drawn = losses.drawn_codes(whole, batch, key)
  asked = whole.asked(batch, drawn)
  found = {n: table.distinct_codes(c, fields[n].extent) for n, c in asked.items() if n not in whole.scored_whole}
  return TablePlan(
    {n: place for n, (place, _) in found.items()},
    {n: fields[n].extent for n in found},
    {n: outside for n, (_, outside) in found.items()},
    drawn,
    next((f.cells for f in fields.values()), table.CELLS),
  )


def row_state(optimizer: RowOptimizer, rows: Any, width: int) -> RowState:
  """Returns the optimizer's first state of a table's rows, D = `width` wide: `[G, M]` each, or laid out as the rows."""
  g, lines, wide = rows.shape
  logical = jax.ShapeDtypeStruct((g, lines * wide // width, width), rows.dtype)
  return {k: s.reshape(rows.shape) if s.ndim == 3 else s for k, s in optimizer.initial_state(logical).items()}


def row_state_shardings(
  kept: Mapping[str, RowState], layouts: Mapping[str, NamedSharding]
) -> dict[str, dict[str, NamedSharding]]:
  """Returns the layouts of each table's slots, which follow the layout of its rows."""
  return {
    n: {k: NamedSharding(layouts[n].mesh, PartitionSpec(*layouts[n].spec[: s.ndim])) for k, s in of.items()}
    for n, of in kept.items()
  }


def square_norm(gradients: Mapping[str, Gradient]) -> jax.Array:
  """Returns the sum of the squares of all rows' gradients, float32."""
  parts = (g.gradient if isinstance(g, Touched) else g.astype(jnp.float32) for g in gradients.values())
  return sum((jnp.sum(jnp.square(part)) for part in parts), jnp.zeros(()))


class MoveRule(NamedTuple):
  """A rule by which a step moves rows.

  Attributes:
    optimizer: moves the rows.
    rate: the learning rate.
    scale: multiplies the gradients, to clip them.
    decay: a touched row shrinks by `rate · decay`, apart from its gradient (decoupled, as AdamW's). Other rows do not.
    key: the key of stochastic rounding, for bfloat16 rows; None: rounds to the nearest.
    finite: bool, whether loss and gradients are finite; if not, no row moves, whatever the gradients hold.
  """

  optimizer: RowOptimizer
  rate: jax.Array | float
  scale: jax.Array | float = 1.0
  decay: float = 0.0
  key: jax.Array | None = None
  finite: jax.Array | bool = True


def move_rows(
  rows: jax.Array, slots: RowState, gradient: Gradient, rule: MoveRule, width: int | None = None
) -> tuple[jax.Array, RowState]:
  """Moves the touched rows, or all rows: `[G, M / p, p·D]`, with slots `[G, M]` or shaped as the rows.

  `width` is D; it is needed if all rows have a gradient and p is not 1. A TPU then unpacks the rows meanwhile, which
  costs little since tables that a full softmax scores are small.

  Returns: rows and slots, of the same shapes, dtypes and layouts.
  """
  d = width or (gradient.gradient if isinstance(gradient, Touched) else gradient).shape[-1]
  m = rows.shape[1] * rows.shape[2] // d
  names = (None, "rows", None)
  slot_names = {n: names[: s.ndim] for n, s in slots.items()}
  scale = jnp.asarray(rule.scale, jnp.float32)
  numbers = jnp.stack([jnp.asarray(rule.rate, jnp.float32), scale, jnp.square(scale) * _mean_square(gradient, d)])

  def code(row: jax.Array) -> jax.Array:
    here = m // sharding.ways("rows")  # stripes of this device
    return row // here * m + sharding.index("rows") * here + row % here

  def all_(
    rows: jax.Array, slots: RowState, gradient: jax.Array, numbers: jax.Array, finite: jax.Array
  ) -> tuple[jax.Array, RowState]:
    row = jnp.arange(rows.size // d, dtype=jnp.int32)
    before = rows.reshape(-1, d), {n: s.reshape(-1, d) if s.ndim == 3 else s.reshape(-1) for n, s in slots.items()}
    its = gradient.astype(jnp.float32).reshape(-1, d)
    after = _moved(before[0].astype(jnp.float32), before[1], its, code(row), rows.dtype, rule, numbers)
    flat, moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    return flat.reshape(rows.shape), {n: moved[n].reshape(s.shape) for n, s in slots.items()}

  def some(
    rows: jax.Array, slots: RowState, row: jax.Array, gradient: jax.Array, numbers: jax.Array
  ) -> tuple[jax.Array, RowState]:
    def move(kept: Kept, row: jax.Array, gradient: jax.Array) -> Kept:
      lines, slots = kept
      there = row != NONE
      value = take_rows(lines, row, there, d).astype(jnp.float32)
      mine = {n: take_rows(s, row, there, d) for n, s in slots.items()}
      after, mine = _moved(value, mine, gradient, code(row), lines.dtype, rule, numbers)
      return put_rows(lines, row, after), {n: put_rows(s, row, mine[n]) for n, s in slots.items()}

    kept = rows.reshape(-1, rows.shape[-1]), {n: s.reshape(-1, *s.shape[2:]) for n, s in slots.items()}
    flat, moved = _in_parts(move, kept, row, gradient)
    return flat.reshape(rows.shape), {n: moved[n].reshape(s.shape) for n, s in slots.items()}

  outputs = names, slot_names
  if not isinstance(gradient, Touched):
    inputs: Any = (names, slot_names, names, (None,), ())
    return sharding.on_shards(all_, inputs, outputs, rows, slots, gradient, numbers, jnp.asarray(rule.finite))
  inputs = (names, slot_names, ("rows",), ("rows", None), (None,))
  touched = jnp.where(rule.finite, gradient.row, NONE)
  return sharding.on_shards(some, inputs, outputs, rows, slots, touched, gradient.gradient, numbers)


def _in_parts(
  move: Callable[[Kept, jax.Array, jax.Array], Kept], kept: Kept, row: jax.Array, gradient: jax.Array
) -> Kept:
  """Returns `move(kept, row, gradient)`; a CPU moves `_MOVED_AT_ONCE` rows at a time.

  A row is then still in the caches and the TLB when it is written: XLA:CPU waits for memory with every row that it
  writes. The loop ends after the last real row, since `NONE` comes last.
  """
  size = min(_MOVED_AT_ONCE, len(row))
  if sharding.platform() != "cpu" or not size:
    return move(kept, row, gradient)

  def one(i: jax.Array, kept: Kept) -> Kept:
    first = jnp.minimum(i * size, len(row) - size)  # the last part overlaps rows that have moved
    part, its = (jax.lax.dynamic_slice_in_dim(x, first, size) for x in (row, gradient))
    return move(kept, jnp.where(first + jnp.arange(size) < i * size, NONE, part), its)

  there = jnp.sum(row != NONE, dtype=jnp.int32)
  return jax.lax.fori_loop(0, (there + size - 1) // size, one, kept)


def move_all_rows(
  rows: Mapping[str, jax.Array],
  slots: Mapping[str, RowState],
  gradients: Mapping[str, Gradient],
  rule: MoveRule,
  width: int,
) -> tuple[dict[str, jax.Array], dict[str, RowState]]:
  """Applies `move_rows` to every table, with rows of `width` numbers; each table rounds with a key of its own."""
  moved = {}
  for name, value in rows.items():
    key = None if rule.key is None else jax.random.fold_in(rule.key, zlib.crc32(name.encode()))
    moved[name] = move_rows(value, slots[name], gradients[name], rule._replace(key=key), width)
  return {n: value for n, (value, _) in moved.items()}, {n: kept for n, (_, kept) in moved.items()}


def _mean_square(gradient: Gradient, width: int) -> jax.Array:
  """Returns the mean of g² over all numbers of the rows whose gradient is not 0; 0 without such rows.

  Rows of padding, whose number depends on the mesh, have no gradient.
  """
  rows = gradient.gradient if isinstance(gradient, Touched) else gradient
  per_line = rows.shape[-1] // width
  moved = jnp.any(rows.reshape(*rows.shape[:-1], per_line, width) != 0, axis=-1)
  return square_norm({"": gradient}) / (jnp.maximum(jnp.sum(moved), 1) * width)


def _moved(
  before: jax.Array,
  slots: RowState,
  gradient: jax.Array,
  code: jax.Array,
  dtype: jnp.dtype,
  rule: MoveRule,
  numbers: jax.Array,
) -> tuple[jax.Array, RowState]:
  """Moves float32 rows `before [..., D]` of the codes `code [...]`, and rounds them to `dtype`.

  `numbers [3]` are the rule's rate and scale, and the mean of g² over all numbers of the rows that move.
  """
  rate, scale, typical = numbers
  after, slots = rule.optimizer.move(before, slots, gradient * scale, rate, typical)
  after = after - rate * rule.decay * before
  if rule.key is None:
    return after.astype(dtype), slots
  return row_optimizers.round_stochastically(after, dtype, code, rule.key), slots
