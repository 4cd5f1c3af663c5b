"""Plans which users share a row of L events, so that few positions are padding.

The plan is made once, from the number of each user's events: best fit fills the rows, the longest histories first. It
depends on these sizes alone, so every host and every restart makes the same plan. In each epoch, users of equal size
swap places at random. The number of rows stays the same, so a position in the stream of rows is a plain count.

Shapes: N users, n of them with training events, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset

# Number of epochs whose order is cached: batches are made ahead, and may span two epochs.
EPOCHS_KEPT = 2


class RowSizes(NamedTuple):
  """The sizes by which users fill rows, int32 `[N]` each.

  Attributes:
    events: the number of events in a user's training window, at most L.
    snapshots: the number of training snapshots that see an event of it, at most S.
  """

  events: np.ndarray
  snapshots: np.ndarray


def row_sizes(dataset: Dataset, cfg: config.Config) -> RowSizes:
  """Returns the sizes of a dataset's users in rows of a config; the first call reads every record."""
  events, snapshots = dataset.training_sizes.T
  return RowSizes(np.minimum(events, cfg.model.max_events), np.minimum(snapshots, cfg.train.snapshots_per_row))


class PackingPlan:
  """The rows of an epoch and their users.

  A row holds at most L events of at most S users, so that each user gets a snapshot if it has any. A user without
  training events has no place, because there is nothing to learn from. A user whose history fills a row has it alone.
  """

  def __init__(self, sizes: RowSizes, cfg: config.Config, seed: int):
    """Fills the rows; `seed` draws the users' places in each epoch.

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
    """Returns R, the number of rows of an epoch."""
    return len(self._first) - 1

  def users(self, epoch: int, row: int) -> np.ndarray:
    """Returns the indices of the users in a row of an epoch, longer histories first."""
    return self._order(epoch)[self._places[self._first[row] : self._first[row + 1]]]

  def _order(self, epoch: int) -> np.ndarray:
    """Returns the users by size, users of equal size in the epoch's own order: `[n]`."""
    order = self._orders.get(epoch)
    if order is None:
      draw = np.random.default_rng((self._seed, epoch)).random(len(self._users))
      order = self._users[np.lexsort((draw, -self._of_size))]
      # Two threads may make an order twice, which does no harm: both are equal.
      self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) < EPOCHS_KEPT} | {epoch: order}
    return order

  def describe(self) -> str:
    """Returns a sentence on what packing saves in padding, and what it costs in snapshots."""
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
  """Returns the row of each item, by best fit: an item goes into the fullest row with room for it, or into a new row.

  Args:
    sizes: int `[n]`, from the largest to the smallest; 1 ≤ size ≤ `room`.
    room: the total size that a row holds.
    most: the largest number of items in a row.

  Returns: int32 `[n]`; rows are numbered from 0 without gaps.
  """
  row_of = np.empty(len(sizes), np.int32)
  held = np.zeros(len(sizes), np.int32)  # number of items in each row
  open_rows = [np.empty(0, np.int32) for _ in range(room + 1)]  # rows by the room that is left in them
  rows = done = 0
  values, counts = np.unique(sizes, return_counts=True)
  for size, left in zip(values[::-1].tolist(), counts[::-1].tolist()):
    while left:
      free = next((r for r in range(size, room + 1) if len(open_rows[r])), None)
      if free is None:
        more = -(-left // min(room // size, most))
        open_rows[room] = np.arange(rows, rows + more, dtype=np.int32)
        rows, free = rows + more, room
      # A row that got an item is the fullest and gets the next one, until it is full. So each takes all it can at once.
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

  When the last round does not suffice for all, a random draw decides who gets one.
  """
  given = np.zeros_like(wanted)
  while room and len(short := np.flatnonzero(given < wanted)):
    if len(short) > room:
      short = rng.choice(short, room, replace=False)
    given[short] += 1
    room -= len(short)
  return given
