"""Which users share a row of L events, so that few of its positions are padding.

The plan is made once, of how many events each user has: rows are filled by best fit, the longest histories first. It
depends on nothing but these sizes, so every host and every restart makes the same one. Each epoch, users of equal size
change places at random; the number of rows stays, so a place in the stream of rows is a plain count.

Shapes: N users, n of them with training events, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset

# Epochs whose order is kept: batches are made ahead, and may span two.
EPOCHS_KEPT = 2


class RowSizes(NamedTuple):
  """What rows are filled with; int32 `[N]` each.

  Attributes:
    events: events of a user's training window, at most L.
    snapshots: training snapshots that see an event of it, at most S.
  """

  events: np.ndarray
  snapshots: np.ndarray


def row_sizes(dataset: Dataset, cfg: config.Config) -> RowSizes:
  """The sizes of a dataset's users in rows of a config; the first call reads every record."""
  events, snapshots = dataset.training_sizes.T
  return RowSizes(np.minimum(events, cfg.model.max_events), np.minimum(snapshots, cfg.train.snapshots_per_row))


class PackingPlan:
  """The rows of an epoch and who lies in them.

  A row holds at most L events of at most S users, so that each has a snapshot if there is any of them. A user without
  training events has no place: there is nothing to learn from. Users whose history fills a row have it to themselves.
  """

  def __init__(self, sizes: RowSizes, cfg: config.Config, seed: int):
    """Fills the rows; `seed` is that of the users' places in each epoch.

    Raises:
      ValueError: no user has training events.
    """
    self._sizes, self._seed = sizes, seed
    self._room, self._snapshots = cfg.model.max_events, cfg.train.snapshots_per_row
    users = np.argsort(-sizes.events, kind="stable")
    self._users = users[sizes.events[users] > 0]
    if not len(self._users):
      raise ValueError("no user has training events, so there is no row to fill")
    self._of_size = sizes.events[self._users]
    row = fill_rows(self._of_size, self._room, self._snapshots)
    self._places = np.argsort(row, kind="stable")  # places in the order of sizes, row by row
    self._first = np.append(0, np.cumsum(np.bincount(row)))
    self._orders: dict[int, np.ndarray] = {}

  def __len__(self) -> int:
    """R, the rows of an epoch."""
    return len(self._first) - 1

  def users(self, epoch: int, row: int) -> np.ndarray:
    """The indices of the users who lie in a row in an epoch, those with more events first."""
    return self._order(epoch)[self._places[self._first[row] : self._first[row + 1]]]

  def _order(self, epoch: int) -> np.ndarray:
    """The users by size, those of equal size in the epoch's own order: `[n]`."""
    order = self._orders.get(epoch)
    if order is None:
      draw = np.random.default_rng((self._seed, epoch)).random(len(self._users))
      order = self._users[np.lexsort((draw, -self._of_size))]
      # Threads may make one order twice, which harms nobody: it is the same.
      self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) < EPOCHS_KEPT} | {epoch: order}
    return order

  def describe(self) -> str:
    """Says what packing brings, and what it costs in snapshots."""
    events, users = int(self._of_size.sum()), len(self._users)
    alone, packed = (1 - events / (rows * self._room) for rows in (len(self._sizes.events), len(self)))
    wanted = int(self._sizes.snapshots.sum())
    by_row = np.add.reduceat(self._sizes.snapshots[self._users][self._places], self._first[:-1])
    given = int(np.minimum(by_row, self._snapshots).sum())
    text = (
      f"packing: {users:,} users in {len(self):,} rows of {self._room} events; {packed:.1%} of the positions are "
      f"padding, {alone:.1%} with one user a row"
    )
    if users < len(self._sizes.events):
      text += f"; {len(self._sizes.events) - users:,} users without training events have no place"
    if given < wanted:
      text += (
        f"; an epoch asks at {given:,} of the {wanted:,} snapshots that users would have in rows of their own, for "
        f"they share the {self._snapshots} of a row: raise config.train.snapshots_per_row for more"
      )
    return text


def fill_rows(sizes: np.ndarray, room: int, most: int) -> np.ndarray:
  """Puts items into rows: each into the fullest row that it still fits, into a new one if there is none.

  Args:
    sizes: int `[n]`, from the largest to the smallest; 1 ≤ size ≤ `room`.
    room: what a row holds.
    most: the most items of a row.

  Returns: int32 `[n]`, the row of each item; rows are numbered from 0 without gaps.
  """
  row_of = np.empty(len(sizes), np.int32)
  held = np.zeros(len(sizes), np.int32)  # items of each row
  open_rows = [np.empty(0, np.int32) for _ in range(room + 1)]  # by how much room they have left
  rows = done = 0
  values, counts = np.unique(sizes, return_counts=True)
  for size, left in zip(values[::-1].tolist(), counts[::-1].tolist()):
    while left:
      free = next((r for r in range(size, room + 1) if len(open_rows[r])), None)
      if free is None:
        more = -(-left // min(room // size, most))
        open_rows[room] = np.arange(rows, rows + more, dtype=np.int32)
        rows, free = rows + more, room
      # Row by row, each gets as many as it has room for: then it is the fullest, so these are single steps at once.
      takes = np.minimum(free // size, most - held[open_rows[free]])
      in_all = np.cumsum(takes)
      n = min(int(np.searchsorted(in_all, left)) + 1, len(takes))
      taken, open_rows[free] = open_rows[free][:n], open_rows[free][n:]
      takes = takes[:n]
      takes[-1] -= max(int(in_all[n - 1]) - left, 0)
      items = int(takes.sum())
      row_of[done : done + items] = np.repeat(taken, takes)
      held[taken] += takes
      after = free - size * takes
      for r in np.unique(after):
        open_rows[r] = np.append(open_rows[r], taken[(after == r) & (held[taken] < most)])
      done, left = done + items, left - items
  return row_of


def share_snapshots(wanted: np.ndarray, room: int, rng: np.random.Generator) -> np.ndarray:
  """Shares `room` snapshots among users who want `wanted [u]` of them, one each in turn: int `[u]`.

  Who gets one of the last, when they do not go round, is drawn.
  """
  given = np.zeros_like(wanted)
  while room and len(short := np.flatnonzero(given < wanted)):
    if len(short) > room:
      short = rng.choice(short, room, replace=False)
    given[short] += 1
    room -= len(short)
  return given
