"""Histories of users: of one, and of many laid end to end, which is how everything about them is worked out.

What is asked of a block's users is answered for all of them by a few array operations, so that a user of thirty events
costs microseconds. Nothing of it depends on which users share a block: one user alone is a block too.

Shapes: U users of a block, N events of all of them, F columns of codes, G numeric fields.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from supermoe_jax.data.encoding.vocabulary import FIRST_VALUE

if TYPE_CHECKING:
  import pyarrow as pa

  from supermoe_jax.data.encoding.numeric import NumberEncoder

# A user and a time become one integer to be searched for; it must not overflow.
LARGEST_KEY = 2**62

BLOCK_EVENTS = 1 << 17  # what a block holds, but for a single user with more


@dataclasses.dataclass(frozen=True)
class UserHistory:
  """The events of one user, in stable time order.

  Shapes: N events, F columns of codes: one of each categorical field (kinds vocabulary and hash) in config order, then
  one of each extra value of fields of many, as `config.Data.extra_value_fields` lists them; G numeric fields in
  config order.

  Attributes:
    user: the user's id as text.
    time: int64 `[N]`, microseconds since 1970 UTC, ascending.
    source: int32 `[N]`, the index of the event's source in config order.
    codes: int32 `[N, F]`: 0 absent, 1 out of vocabulary, 2 and up the values.
    numeric: float32 `[N, G]`, standardised or as quantiles; NaN where absent.
    n_train: how many events, the first ones, lie in the training period; where users are divided, 0 of a user outside
      training.
  """

  user: str
  time: np.ndarray
  source: np.ndarray
  codes: np.ndarray
  numeric: np.ndarray
  n_train: int

  @functools.cached_property
  def block(self) -> UserBlock:
    """The user alone, as a block."""
    offsets = np.array([0, len(self.time)], np.int64)
    return UserBlock(
      (self.user,), offsets, self.time, self.source, self.codes, self.numeric, np.array([self.n_train], np.int64)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class UserBlock:
  """The histories of U users, one after another; the parts are those of `UserHistory`.

  Attributes:
    users: the users' ids.
    offsets: int64 `[U + 1]`; the events of user u are those from `offsets[u]` to `offsets[u + 1]`.
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
    """How many events each user has: int64 `[U]`."""
    return np.diff(self.offsets)

  @functools.cached_property
  def owner(self) -> np.ndarray:
    """The user of each event: int64 `[N]`."""
    return np.repeat(np.arange(len(self.users)), self.lengths)

  @functools.cached_property
  def _times(self) -> tuple[int, int]:
    """The earliest time, and how many different keys a user needs."""
    low, high = (int(self.time.min()), int(self.time.max())) if len(self.time) else (0, 0)
    return low, high - low + 2

  @functools.cached_property
  def _keys(self) -> np.ndarray:
    low, span = self._times
    return self.owner * span + (self.time - low)

  def before(self, user: np.ndarray, time: np.ndarray | int) -> np.ndarray:
    """How many events of each user lie before a time, int64; `user` and `time` (microseconds) are broadcast."""
    low, span = self._times
    key = user * span + (np.clip(time, low, low + span - 1) - low)
    return np.searchsorted(self._keys, key, side="left") - self.offsets[user]

  def history(self, user: int) -> UserHistory:
    """The events of one user."""
    return UserHistory(self.users[user], *self._events(user, user + 1), int(self.n_train[user]))

  def _events(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Time, source, codes and numbers of the users from `first` to before `last`."""
    start, stop = self.offsets[first], self.offsets[last]
    return self.time[start:stop], self.source[start:stop], self.codes[start:stop], self.numeric[start:stop]

  def halves(self, event: float = 1.0, user: float = 0.0) -> Iterator[UserBlock]:
    """The block itself, or parts of it with so few users and events that nothing overflows or grows too large.

    Args:
      event: how many events' worth of memory each event takes, with what is worked out at it.
      user: how many each user takes besides, at the snapshots that all have.
    """
    n = len(self.users)
    if n == 1 or (n * self._times[1] < LARGEST_KEY and len(self.time) * event + n * user <= BLOCK_EVENTS):
      yield self
      return
    # Where half of the events end, so that a user with very many of them is soon alone.
    middle = int(np.clip(np.searchsorted(self.offsets, len(self.time) // 2), 1, n - 1))
    for first, last in ((0, middle), (middle, n)):
      offsets = self.offsets[first : last + 1] - self.offsets[first]
      parts = self._events(first, last)
      yield from UserBlock(self.users[first:last], offsets, *parts, self.n_train[first:last]).halves(event, user)


def end_to_end(users: Sequence[UserHistory]) -> UserBlock:
  """Lays the histories of users, at least one, one after another."""
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
  """The histories in a table of sorted events: `uid`, `time`, `source`, `training`, the codes, the raw numbers.

  Args:
    rows: each user's events stand together and in order, the users in the order of `users`.
    users: the ids of all users in it.
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
  """How often the codes 2 … top + 1 occur among the events before each bound: int64 `[…, top]` of bounds `[…]`.

  Only differences between bounds of one user mean anything, as the events of the users before are counted too.
  """
  distinct, place = np.unique(bounds, return_inverse=True)
  chosen = np.flatnonzero((codes >= FIRST_VALUE) & (codes < top + FIRST_VALUE))
  first = np.searchsorted(distinct, chosen, side="right")  # the first bound that each event lies before
  cells = np.bincount(first * top + codes[chosen] - FIRST_VALUE, minlength=(len(distinct) + 1) * top)
  return np.cumsum(cells.reshape(len(distinct) + 1, top)[:-1], axis=0)[place.reshape(bounds.shape)]
