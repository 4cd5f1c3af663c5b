"""Holds the event histories of one user (`UserHistory`) and of many users laid end to end (`UserBlock`).

Preparation computes on whole blocks with a few array operations, so that a user with thirty events costs microseconds.
No result depends on which users share a block; a single user is a block too.

Shapes: U users of a block, N events of all of them, F columns of codes, G numeric fields.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from supermoe_jax.batch import FIRST_VALUE

if TYPE_CHECKING:
  import pyarrow as pa

  from supermoe_jax.data.encoding.numeric import NumberEncoder

# `UserBlock.before` searches for a user and a time as one integer, which must not overflow.
LARGEST_KEY = 2**62

BLOCK_EVENTS = 1 << 17  # the most that a block holds, unless it is a single user


@dataclasses.dataclass(frozen=True)
class UserHistory:
  """The events of one user, in stable time order.

  Shapes: N events, F columns of codes, G numeric fields in config order. The columns of codes are one per categorical
  field (kinds vocabulary and hash) in config order, then one per extra value of a list field, as
  `config.Data.extra_value_fields` lists them.

  Attributes:
    user: the user's id as text.
    time: int64 `[N]`, microseconds since 1970 UTC, ascending.
    source: int32 `[N]`, the index of the event's source in config order.
    codes: int32 `[N, F]`: 0 absent, 1 out of vocabulary, 2 and up the values.
    numeric: float32 `[N, G]`, standardised or as quantiles; NaN where absent.
    n_train: the number of events in the training period, which are the first ones; with split mode `user`, 0 for a
      user outside training.
    own_vectors: float32 `[n, size]` for each vector field: the vectors that the codes point to, if they come with the
      history, as in a request. None: the dataset has them.
  """

  user: str
  time: np.ndarray
  source: np.ndarray
  codes: np.ndarray
  numeric: np.ndarray
  n_train: int
  own_vectors: tuple[np.ndarray, ...] | None = None

  @functools.cached_property
  def block(self) -> UserBlock:
    """Returns the user as a block of one."""
    offsets = np.array([0, len(self.time)], np.int64)
    return UserBlock(
      (self.user,), offsets, self.time, self.source, self.codes, self.numeric, np.array([self.n_train], np.int64)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class UserBlock:
  """The histories of U users, one after another; arrays mean the same as in `UserHistory`.

  Attributes:
    users: the users' ids.
    offsets: int64 `[U + 1]`; the events of user u are `offsets[u]` … `offsets[u + 1] - 1`.
    time: int64 `[N]`.
    source: int32 `[N]`.
    codes: int32 `[N, F]`.
    numeric: float32 `[N, G]`.
    n_train: int64 `[U]`.
  """

  users: Sequence[str]
  offsets: np.ndarray
  time: np.ndarray
  source: np.ndarray
  codes: np.ndarray
  numeric: np.ndarray
  n_train: np.ndarray

  @property
  def lengths(self) -> np.ndarray:
    """Returns the number of events of each user: int64 `[U]`."""
    return np.diff(self.offsets)

  @functools.cached_property
  def owner(self) -> np.ndarray:
    """Returns the index of each event's user: int64 `[N]`."""
    return np.repeat(np.arange(len(self.users)), self.lengths)

  @functools.cached_property
  def _times(self) -> tuple[int, int]:
    """Returns the earliest time, and the number of different keys that a user needs."""
    low, high = (int(self.time.min()), int(self.time.max())) if len(self.time) else (0, 0)
    return low, high - low + 2

  @functools.cached_property
  def _keys(self) -> np.ndarray:
    low, span = self._times
    return self.owner * span + (self.time - low)

  def before(self, user: np.ndarray, time: np.ndarray | int) -> np.ndarray:
    """Returns the number of a user's events before a time, int64; `user` and `time` (microseconds) are broadcast."""
    low, span = self._times
    key = user * span + (np.clip(time, low, low + span - 1) - low)
    return np.searchsorted(self._keys, key, side="left") - self.offsets[user]

  def history(self, user: int) -> UserHistory:
    """Returns the history of one user."""
    return UserHistory(self.users[user], *self._events(user, user + 1), int(self.n_train[user]))

  def _events(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns time, source, codes and numbers of the events of users `first` … `last - 1`."""
    start, stop = self.offsets[first], self.offsets[last]
    return self.time[start:stop], self.source[start:stop], self.codes[start:stop], self.numeric[start:stop]

  def halves(self, event: float = 1.0, user: float = 0.0) -> Iterator[UserBlock]:
    """Yields the block itself, or parts of it that are small enough not to overflow or to take too much memory.

    Args:
      event: the memory that an event takes with the results computed at it, in units of one plain event.
      user: the memory, in the same unit, that a user takes in addition for the snapshots that all users share.
    """
    n = len(self.users)
    if n == 1 or (n * self._times[1] < LARGEST_KEY and len(self.time) * event + n * user <= BLOCK_EVENTS):
      yield self
      return
    # The block is cut at half of its events, so that a user with very many events is soon alone.
    middle = int(np.clip(np.searchsorted(self.offsets, len(self.time) // 2), 1, n - 1))
    for first, last in ((0, middle), (middle, n)):
      offsets = self.offsets[first : last + 1] - self.offsets[first]
      parts = self._events(first, last)
      yield from UserBlock(self.users[first:last], offsets, *parts, self.n_train[first:last]).halves(event, user)


def end_to_end(users: Sequence[UserHistory]) -> UserBlock:
  """Returns the block of the histories of users, at least one, one after another."""
  return UserBlock(
    [user.user for user in users],
    np.append(0, np.cumsum([len(user.time) for user in users])),
    np.concatenate([user.time for user in users]),
    np.concatenate([user.source for user in users]),
    np.concatenate([user.codes for user in users]),
    np.concatenate([user.numeric for user in users]),
    np.array([user.n_train for user in users], np.int64),
  )


def read_block(rows: pa.Table, users: Sequence[str], n_codes: int, numbers: Sequence[NumberEncoder]) -> UserBlock:
  """Returns the histories in a table of sorted events: `uid`, `time`, `source`, `training`, the codes, the raw numbers.

  Args:
    rows: the table; each user's events stand together and in order, the users in the order of `users`.
    users: the ids of all users in `rows`.
    n_codes: F.
    numbers: the encoders of the numeric fields.
  """
  columns = [c.to_numpy() for c in rows.columns]
  uid, time, source, training, *rest = columns
  n = len(uid)
  starts = np.flatnonzero(np.diff(uid, prepend=uid[:1] - 1))
  codes = np.stack(rest[:n_codes], axis=1) if n_codes else np.zeros((n, 0))
  encoded = [e.encode_all(values.astype(np.float64)) for e, values in zip(numbers, rest[n_codes:], strict=True)]
  numeric = np.stack(encoded, axis=1) if encoded else np.zeros((n, 0))
  n_train = np.add.reduceat(training, starts, dtype=np.int64) if n else np.zeros(0, np.int64)
  return UserBlock(
    users,
    np.append(starts, n),
    time.astype(np.int64),
    source.astype(np.int32),
    codes.astype(np.int32),
    numeric.astype(np.float32),
    n_train,
  )


def counts_before(codes: np.ndarray, top: int, bounds: np.ndarray) -> np.ndarray:
  """Returns the counts of the codes 2 … top + 1 among the events before each bound: int64 `[…, top]` of bounds `[…]`.

  The counts include events of preceding users, so only differences between bounds of one user are meaningful.
  """
  distinct, place = np.unique(bounds, return_inverse=True)
  chosen = np.flatnonzero((codes >= FIRST_VALUE) & (codes < top + FIRST_VALUE))
  first = np.searchsorted(distinct, chosen, side="right")  # the first bound that each event lies before
  cells = np.bincount(first * top + codes[chosen] - FIRST_VALUE, minlength=(len(distinct) + 1) * top)
  counts = cells.reshape(len(distinct) + 1, top)[:-1]
  return np.cumsum(counts, axis=0, out=counts)[place.reshape(bounds.shape)]
