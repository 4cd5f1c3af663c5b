"""Ranks targets among the whole catalogue, in chunks of items, so that no array has the shape `[questions, items]`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from supermoe_jax import sharding
from supermoe_jax.batch import FIRST_VALUE
from supermoe_jax.distributed import processes
from supermoe_jax.layers import catalogue_ranks
from supermoe_jax.layers.catalogue import Catalogue
from supermoe_jax.training.run import Run

if TYPE_CHECKING:  # loaded only by a config that names a memory
  from supermoe_jax.layers.memory.remembered import Remembered

# Questions to rank at a time.
RANKED_AT_ONCE = 1024


@functools.partial(jax.jit, static_argnames=("size", "chunk"))
def _rank(
  state: jax.Array,
  target: jax.Array,
  seen: jax.Array,
  remembered: tuple[Remembered, ...],
  rows: jax.Array,
  bias: jax.Array,
  size: int,
  chunk: int,
) -> jax.Array:
  return catalogue_ranks.rank_codes(state, target, seen, Catalogue(rows, bias, size), chunk, remembered)


def target_ranks(
  state: jax.Array | np.ndarray,
  target: np.ndarray,
  seen: Sequence[np.ndarray] | None,
  items: Catalogue,
  chunk: int,
  remembered: Sequence[Remembered] = (),
) -> np.ndarray:
  """Returns the rank of each question's best target among all items, by `state · row + bias`, plus what is remembered.

  A question can have several targets. The rank is that of the target with the highest score, and the other targets do
  not count against it. Equal scores count against it, and so do scores that are not numbers: a broken model ranks it
  last. A question without a target that can be recommended has an infinite rank.

  Args:
    state: float32 `[n, D + K]`: vectors, and gains of the K kinds of counts.
    target: int `[n, t]` or `[n]`, the item indices of each question's targets. A negative index is no target: the
      catalogue does not know the item, or the question has fewer targets than t.
    seen: for each question, the indices of items that cannot be recommended, targets included; None: every item can.
    items: the catalogue, on the mesh in use.
    chunk: items scored at a time.
    remembered: K kinds of counts, of n rows with one site each.

  Returns: float `[n]`; 1 is best.
  """
  target = target.reshape(len(target), -1)
  hidden = [np.unique(s) for s in seen or ()]
  width = max(map(len, hidden), default=0)
  width = 1 << max(width - 1, 0).bit_length()  # a power of two: few sizes, few compilations
  n = len(target)
  room = -(-n // sharding.ways("rows")) * sharding.ways("rows")
  codes = np.zeros((room, width), np.int32)
  for i, some in enumerate(hidden):
    codes[i, : len(some)] = some + 2
  asked = np.zeros((room, target.shape[1]), np.int32)
  asked[:n] = np.where(target < 0, 0, target + 2)
  for i, some in enumerate(hidden):
    asked[i][np.isin(target[i], some)] = 0
  padded = np.zeros((room, np.shape(state)[1]), np.float32)
  padded[:n] = state
  counts = jax.tree.map(lambda x: np.pad(x, [(0, room - n), *[(0, 0)] * (np.ndim(x) - 1)]), tuple(remembered))
  rank = _rank(padded, asked, codes, counts, items.rows, items.bias, items.size, chunk)
  return np.where(asked[:n].any(axis=1), processes.whole(rank)[:n], np.inf)


class QuestionRanks:
  """Ranks the questions of a next-event task as their answers come, so that no more than some are kept at a time."""

  def __init__(self, run: Run, name: str):
    """Ranks nothing yet; `name` is the task of `run`."""
    self._mesh, self._chunk = run.mesh, run.cfg.evaluate.catalogue_chunk
    self._items = run.catalogue(name)
    self._waiting: list[tuple[Any, ...]] = []
    self._ranks: list[np.ndarray] = []

  def add(
    self,
    state: np.ndarray,
    target: np.ndarray,
    seen: Sequence[np.ndarray] | None,
    remembered: Sequence[Remembered],
  ) -> None:
    """Adds n questions; `target [n, t]` and `seen` hold codes, see `target_ranks`.

    Rows of `remembered` beyond n are padding.
    """
    hidden = None if seen is None else [s[s >= FIRST_VALUE] - FIRST_VALUE for s in seen]
    self._waiting.append(
      (state, target - FIRST_VALUE, hidden, jax.tree.map(lambda x: np.asarray(x)[: len(state)], tuple(remembered)))
    )
    if sum(len(part[0]) for part in self._waiting) >= RANKED_AT_ONCE:
      self._rank_waiting(RANKED_AT_ONCE)

  def _rank_waiting(self, at_least: int) -> None:
    """Ranks the questions that wait, `RANKED_AT_ONCE` at a time for one program; fewer than `at_least` wait on."""
    if not self._waiting:
      return
    state, target, seen, remembered = zip(*self._waiting)
    hidden = None if seen[0] is None else [codes for part in seen for codes in part]
    waiting = np.concatenate(state), np.concatenate(target), jax.tree.map(lambda *x: np.concatenate(x), *remembered)
    n, at = len(waiting[0]), 0
    with jax.set_mesh(self._mesh):
      while n - at >= max(at_least, 1):
        part = slice(at, at + RANKED_AT_ONCE)
        states, targets, counts = jax.tree.map(lambda x, part=part: x[part], waiting)
        some = None if hidden is None else hidden[part]
        self._ranks.append(target_ranks(states, targets, some, self._items, self._chunk, counts))
        at += RANKED_AT_ONCE
    states, targets, counts = jax.tree.map(lambda x: x[at:], waiting)
    self._waiting = [(states, targets, None if hidden is None else hidden[at:], counts)] if n > at else []

  def ranks(self) -> np.ndarray:
    """Returns the rank of each question so far, float `[n]`."""
    self._rank_waiting(1)
    return np.concatenate([np.zeros(0), *self._ranks])
