"""Task heads: they map a user representation or an event's state to the answers of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers.catalogue import Catalogue
from supermoe_jax.layers.event_embedding import RAMPS, aggregate_ramps
from supermoe_jax.layers.table import EmbeddingTable
from supermoe_jax.sharding import linear, set_bias

if TYPE_CHECKING:  # loaded only by a config that names it
  from supermoe_jax.layers.memory.head_memory import HeadMemory


@jax.custom_vjp
def scaled_gradient(x: jax.Array, scale: jax.Array | float) -> jax.Array:
  """Returns x unchanged, and multiplies the gradient that passes back through it by `scale`."""
  del scale
  return x


scaled_gradient.defvjp(lambda x, scale: (x, scale), lambda scale, g: (g * jnp.asarray(scale, g.dtype), None))


class LinearHead(nnx.Module):
  """Linear head with one number per state (a yes-or-no logit or a regression), or `outputs` numbers.

  The ramps of the user's plain aggregates add to the answers; they count for nothing at first. So what a piecewise
  linear model of the aggregates knows costs no room in a representation that many tasks share. Source: a wide part
  beside a deep one, arXiv 1606.07792.
  """

  def __init__(self, d_model: int, outputs: int | None = None, plain: tuple[int, ...] = (), *, rngs: nnx.Rngs):
    """Creates a head; `plain` are the columns of the plain aggregates, see `batch.Schema.plain_aggregates`."""
    self.single = outputs is None
    self.linear = linear(d_model, outputs or 1, names=("embed", None), rngs=rngs)
    self.plain = plain
    wide = len(plain) * RAMPS
    self.wide = linear(wide, outputs or 1, names=(None, None), bias=False, zero=True, rngs=rngs) if wide else None

  def __call__(self, z: jax.Array) -> jax.Array:
    """Maps `z [..., D]` to `[...]`, or to `[..., outputs]`, which keeps its last dimension when `outputs` is 1."""
    answers = self.linear(z)
    return answers[..., 0] if self.single else answers

  def add_aggregates(self, answers: jax.Array, aggregates: jax.Array) -> jax.Array:
    """Returns `answers [...]` or `[..., outputs]` plus the scores of the user's plain `aggregates [..., A]`."""
    if self.wide is None:
      return answers
    added = self.wide(aggregate_ramps(aggregates, self.plain))
    return answers + (added[..., 0] if self.single else added)

  def start_at(self, answer: jax.Array) -> None:
    """Sets the biases to a constant answer `[outputs]`, the mean of the first answers to many states."""
    set_bias(self.linear, answer)


class FutureValuesHead(LinearHead):
  """Linear head with a number per value, to which the user's own counts of that value add; these start at 0.

  The weight of a window is a part that all values share plus one of the value's own.
  """

  def __init__(
    self, d_model: int, outputs: int, counts: tuple[int, int, int], plain: tuple[int, ...] = (), *, rngs: nnx.Rngs
  ):
    """Creates a head over `outputs` values; `counts` is a `batch.ValueCounts`. Values without counts have none."""
    super().__init__(d_model, outputs, plain, rngs=rngs)
    self.first, self.windows, self.values = counts
    self.counted, self.outputs = min(outputs, self.values), outputs
    self.shared = sharding.param(jnp.zeros(self.windows), None)
    self.own = sharding.param(jnp.zeros((self.windows, self.counted)), None, None)

  def add_aggregates(self, answers: jax.Array, aggregates: jax.Array) -> jax.Array:
    """Returns `answers [..., outputs]` plus the scores of the user's counts and of the plain `aggregates [..., A]`."""
    answers = super().add_aggregates(answers, aggregates)
    columns = aggregates[..., self.first : self.first + self.windows * self.values]
    counts = columns.reshape(*columns.shape[:-1], self.windows, self.values)[..., : self.counted]
    score = jnp.einsum("...wv,wv->...v", counts, self.shared.get_value()[:, None] + self.own.get_value())
    return answers + jnp.pad(score, [(0, 0)] * (score.ndim - 1) + [(0, self.outputs - self.counted)])


class EventLabelHead(nnx.Module):
  """Head for a label of an event, from the state before the event and the values known beforehand.

  With h the state and g the sum of the known values' embeddings, the answer is linear in h, g and h·g (channel by
  channel), plus a small MLP of the three. It starts at 0.
  """

  def __init__(self, d_model: int, *, rngs: nnx.Rngs):
    self.linear = linear(3 * d_model, 1, names=("embed", None), zero=True, rngs=rngs)
    self.up = linear(3 * d_model, d_model, names=("embed", "mlp"), rngs=rngs)
    self.down = linear(d_model, 1, names=("mlp", None), bias=False, zero=True, rngs=rngs)

  def __call__(self, h: jax.Array, g: jax.Array) -> jax.Array:
    """Maps states `h [..., D]` and events `g [..., D]` (0: nothing is known of them) to logits, or numbers, `[...]`."""
    x = jnp.concatenate([h, g, h * g], axis=-1)
    return (self.linear(x) + self.down(jax.nn.gelu(self.up(x))))[..., 0]

  def start_at(self, answer: jax.Array) -> None:
    """Makes all first answers the constant `answer [1]`."""
    set_bias(self.linear, answer)


class NextValueHead(nnx.Module):
  """Head that scores a field's values against a state, with the field's own embeddings as output weights (tied).

  Item i of the catalogue is code i + 2: the codes absent and out-of-vocabulary are not values. With a bias, every value
  has a score of its own, which every state's gradient moves. A sampled softmax uses no bias, because it touches few
  values.
  """

  def __init__(
    self,
    d_model: int,
    table: EmbeddingTable,
    counts: slice | None = None,
    *,
    bias: bool = True,
    memory: HeadMemory | None = None,
    rngs: nnx.Rngs,
  ):
    """Creates a head over the values of `table`, which it does not keep; `counts`: the columns of own counts.

    The scores add what `memory` of K kinds remembers. At first they are nothing else.
    """
    self.query = linear(d_model, d_model, names=("embed", "heads"), zero=memory is not None, rngs=rngs)
    zeros = jnp.zeros(table.extent.shape)  # one per row
    self.bias = nnx.Param(zeros, logical=(None, "rows"), size=table.size) if bias else None
    self.first: int = counts.start if counts else 0
    self.stop: int = counts.stop if counts else 0
    width = self.stop - self.first
    self.own = linear(width, d_model, names=(None, "heads"), bias=False, zero=True, rngs=rngs) if width else None
    self.memory = memory

  def start_at(self, answer: jax.Array) -> None:
    """Sets the values' own scores to `answer [values]`; a head without a bias, or with a memory, stays as it is."""
    if self.bias is not None and self.memory is None:
      rows = self.bias.get_value()
      self.bias[...] = jnp.pad(answer, (2, rows.size - 2 - len(answer))).reshape(rows.shape)

  def state(self, h: jax.Array, aggregates: jax.Array) -> jax.Array:
    """Returns what is compared with the catalogue, `[B, sites, D + K]`, from `h [B, sites, D]`: vectors and gains.

    The last S sites are the snapshots, to which the user's counts in `aggregates [B, S, A]` add. Events have none.
    """
    query = self.query(h)
    if self.own is not None:
      own = self.own(aggregates[..., self.first : self.stop])
      query += jnp.pad(own, ((0, 0), (query.shape[1] - own.shape[1], 0), (0, 0)))
    return query if self.memory is None else jnp.concatenate([query, self.memory.gain(h)], axis=-1)

  def catalogue(self, table: EmbeddingTable) -> Catalogue:
    """Returns the catalogue that states are compared with."""
    rows = table.rows.get_value()
    bias = jnp.zeros(table.extent.shape) if self.bias is None else self.bias.get_value()
    return Catalogue(rows, bias, table.size)
