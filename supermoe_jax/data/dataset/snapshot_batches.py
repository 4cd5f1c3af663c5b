"""Makes batches for evaluation and embedding: rows of one user at one moment, read from a dataset in blocks of users.

Where a caller names several row lengths, rows of histories of similar length share a batch. All batches hold equally
many events, whatever their length, and few of them are padding. The same users always give the same batches: nothing
depends on how fast they are read.

Shapes: B rows, R rows of a block of U users, L events, m events that a snapshot of an event label asks about, G given
fields of these events.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import grain
import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import Features, Targets
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.supervision import Supervision
from supermoe_jax.data.dataset.windows import BlockWindows, blank, pad
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.tasks.labels import Labels

# Users read at a time. A few array operations make their features, and a block of long histories stays small.
BLOCK_USERS = 256
# Blocks that are made ahead, and the threads that make them: one more than the block that is waited for.
BLOCKS_AHEAD = 4
READERS = 2

# Least padding, in events, that one more row length must save: about what the time of compiling its program would do.
PROGRAM_EVENTS = 500_000
SAMPLED_USERS = 1024  # users whose histories show which lengths are worth a program

SHORTEST = 16  # shorter rows save little: the snapshot is one more token, and each length is a program


class Query(NamedTuple):
  """One user at one moment: a row of evaluation or embedding.

  Attributes:
    user: index of the user in the dataset.
    user_id: the user's id.
    snapshot: index of the snapshot in the user's record; -1 for a time that is no snapshot of the dataset.
    time: τ in microseconds.
    n_events: number of events before τ.
    last_event: time of the last event before τ, microseconds.
  """

  user: int
  user_id: str
  snapshot: int
  time: int
  n_events: int
  last_event: int


class UserWithoutEvents(NamedTuple):
  """A user without an event before a time; nothing is known about the user yet.

  Attributes:
    user: index of the user in the dataset.
    user_id: the user's id.
    time: τ in microseconds.
    first_event: time of the user's first event, at τ or after, microseconds.
  """

  user: int
  user_id: str
  time: int
  first_event: int


class QueryBatch(NamedTuple):
  """Rows of one snapshot each, ready for the encoder.

  Attributes:
    features: B rows, the n real ones first, followed by rows of padding.
    questions: the user and moment of each real row.
    labels: for each active task with labels, `Labels(value, known)` of the n real rows: `[n]`, `[n, values]` or, for an
      event label, `[n, m]`; known within the task's sample space. Empty for embedding.
    seen: for each task that excludes seen values, the codes in each real row's whole history.
    given: for each active event label, int32 `[B, m, G]`, the given fields' codes of the events asked about; 0 in rows
      of padding. Empty for embedding.
    also: for each active next-event task, int32 `[n, A]`, codes that are as right as the label; see `batch.Targets`.
  """

  features: Features
  questions: list[Query]
  labels: dict[str, Labels]
  seen: dict[str, list[np.ndarray]]
  given: dict[str, np.ndarray]
  also: dict[str, np.ndarray]


class _QueryRows(NamedTuple):
  """R questions with their features, their targets and, for tasks that exclude seen values, the values seen."""

  questions: list[Query]
  features: Features
  targets: dict[str, Targets]
  seen: dict[str, list[np.ndarray]]

  def cut(self, start: int, stop: int | None) -> _QueryRows:
    return _QueryRows(
      self.questions[start:stop],
      Features(*(x[start:stop] for x in self.features)),
      {n: Targets(*(x[start:stop] for x in t)) for n, t in self.targets.items()},
      {n: values[start:stop] for n, values in self.seen.items()},
    )


def row_lengths(max_events: int) -> tuple[int, ...]:
  """Returns the possible row lengths, ascending to `max_events`: its repeated halves, and three quarters of each."""
  found, length = {max_events}, max_events
  while length // 2 >= SHORTEST:
    found |= {length * 3 // 4, length // 2}
    length //= 2
  return tuple(sorted(found))


def worthwhile_lengths(dataset: Dataset, max_events: int, times: Sequence[int | None]) -> tuple[int, ...]:
  """Returns the `row_lengths` that save more than their compilation costs when all users are asked about at `times`.

  The histories of the first users decide; they are a sample, because records are shuffled.
  """
  users = np.arange(min(len(dataset), SAMPLED_USERS))
  if not len(users):
    return (max_events,)
  block = dataset.histories(users)
  seen = [block.lengths if t is None else block.before(users, t) for t in times]
  shown = np.minimum(np.concatenate(seen), max_events)
  return chosen_lengths(shown[shown > 0], row_lengths(max_events), len(dataset) / len(users))


def chosen_lengths(shown: np.ndarray, among: Sequence[int], times: float) -> tuple[int, ...]:
  """Returns lengths picked one by one, each the one that saves most, until none saves `PROGRAM_EVENTS`.

  Args:
    shown: int `[n]`, the numbers of events of a sample of rows.
    among: the lengths to choose from, ascending; the last one is always picked.
    times: the number of rows that each row of the sample stands for.
  """
  picked = [among[-1]]

  def padded(of: Sequence[int]) -> float:
    return times * float(np.sum(np.array(sorted(of))[np.searchsorted(sorted(of), shown)]))

  while len(picked) < len(among):
    rest = [length for length in among if length not in picked]
    costs = [padded([*picked, length]) for length in rest]
    best = int(np.argmin(costs))
    if padded(picked) - costs[best] < PROGRAM_EVENTS:
      break
    picked.append(rest[best])
  return tuple(sorted(picked))


@dataclasses.dataclass(frozen=True)
class _BlockRows(grain.transforms.Map):
  """A transform that lays out users' snapshots, of a split or at given times, as rows with their last L events."""

  dataset: Dataset
  cfg: config.Config
  split: int | None
  times: tuple[int | None, ...]
  lengths: tuple[int, ...]

  @functools.cached_property
  def _supervision(self) -> Supervision:
    return Supervision(self.dataset, self.cfg, training=False)

  def map(self, users: np.ndarray) -> tuple[dict[int, list[_QueryRows]], list[UserWithoutEvents]]:
    """Returns the rows of each length for the users with these indices, and the users without an event yet."""
    rows, absent = self._at_times(users) if self.split is None else (list(self._of_split(users)), [])
    out: dict[int, list[_QueryRows]] = {}
    for length, part in rows:
      out.setdefault(length, []).append(part)
    return out, absent

  def _of_split(self, users: np.ndarray) -> Iterator[tuple[int, _QueryRows]]:
    """Yields the rows of a split user by user, because labels are made per user; this does not slow evaluation down."""
    for user in users.tolist():
      record = self.dataset[user]
      history = self.dataset.history(record)
      index = np.flatnonzero(record["snapshot_split"] == self.split)
      index = index[record["snapshot_events"][index] > 0]
      if not len(index):
        continue
      time, n_events = record["snapshot_time"][index], record["snapshot_events"][index].astype(np.int64)
      targets, seen = self._supervision.at_snapshots(record, history, index), {}
      for name in targets:
        task = self.cfg.tasks[name]
        if task.excludes_seen:
          field = cast(config.NextEvent, task).field
          codes = history.codes[:, self.dataset.schema.field(field)]
          seen[name] = [np.unique(codes[:n]) for n in n_events.tolist()]
      for length, which, rows in self._rows(np.array([user]), history.block, np.zeros_like(index), time, n_events):
        asked = [q._replace(snapshot=int(index[i])) for q, i in zip(rows.questions, which.tolist())]
        of_rows = {n: Targets(*(x[which] for x in t)) for n, t in targets.items()}
        yield (
          length,
          rows._replace(questions=asked, targets=of_rows, seen={n: [v[i] for i in which] for n, v in seen.items()}),
        )

  def _at_times(self, users: np.ndarray) -> tuple[list[tuple[int, _QueryRows]], list[UserWithoutEvents]]:
    """Returns the rows at the given times, for all users in one go."""
    rows: list[tuple[int, _QueryRows]] = []
    absent: list[UserWithoutEvents] = []
    done = 0
    for block in self.dataset.histories(users).halves():
      here = users[done : done + len(block.users)]
      done += len(here)
      everyone = np.arange(len(here))
      first, last = block.time[block.offsets[:-1]], block.time[block.offsets[1:] - 1]
      asked = np.stack([last + 1 if t is None else np.full(len(here), t) for t in self.times], axis=1)
      seen = np.stack([block.before(everyone, asked[:, i]) for i in range(len(self.times))], axis=1)
      user, place = np.nonzero(seen)
      found = self._rows(here, block, user, asked[user, place], seen[user, place])
      rows += [(length, part) for length, _, part in found]
      absent += [
        UserWithoutEvents(int(here[u]), block.users[u], int(asked[u, p]), int(first[u]))
        for u, p in np.argwhere(seen == 0)
      ]
    return rows, absent

  def _rows(
    self, users: np.ndarray, block: UserBlock, user: np.ndarray, time: np.ndarray, n_events: np.ndarray
  ) -> Iterator[tuple[int, np.ndarray, _QueryRows]]:
    """Yields, for each length, the length, the indices of its rows among all R, and the rows.

    Row r is about the user `user[r]` of a block at `time[r]`, with `n_events[r]` events before it; `users [U]` are the
    indices of the block's users in the dataset.
    """
    windows = BlockWindows(self.dataset, block)
    last = block.time[block.offsets[user] + n_events - 1]
    of_length = np.searchsorted(self.lengths, np.minimum(n_events, self.lengths[-1]))
    for i in np.unique(of_length).tolist():
      which = np.flatnonzero(of_length == i)
      features = windows(user[which], time[which], n_events[which], self.lengths[i])
      columns = (users[user], time, n_events, last)
      questions = [
        Query(index, block.users[at], -1, at_time, count, seen_last)
        for at, index, at_time, count, seen_last in zip(user[which].tolist(), *(c[which].tolist() for c in columns))
      ]
      yield self.lengths[i], which, _QueryRows(questions, features, {}, {})


class QueryReader:
  """A reader that collects rows of users until they make up batches.

  Attributes:
    lengths: the row lengths of batches, ascending.
    absent: the users found so far without an event before a time.
    read: the number of users read so far.
    ended: whether all users are read.
  """

  def __init__(
    self,
    dataset: Dataset,
    cfg: config.Config,
    users: grain.MapDataset,
    *,
    split: int | None = None,
    times: Sequence[int | None] = (),
    row_lengths: Sequence[int] = (),
    most: int = 0,
  ):
    """Asks about the users with the indices `users`, at every snapshot of `split` or at `times`.

    Args:
      dataset: the dataset of the users.
      cfg: the config of the run.
      users: indices of users, each once.
      split: the split whose snapshots are asked about; None for `times`.
      times: microseconds; None stands for just after the last event of each user.
      row_lengths: the lengths of rows, such as `worthwhile_lengths` returns; empty: `cfg.model.max_events` alone.
      most: the largest number of rows; 0 for all.

    Raises:
      ValueError: neither or both of `split` and `times` are given.
    """
    if (split is None) == (not times):
      raise ValueError("name either a split or times")
    self.lengths = tuple(row_lengths or (cfg.model.max_events,))
    self.absent: list[UserWithoutEvents] = []
    self.read, self.ended = 0, False
    self._dataset, self._users, self._room = dataset, len(users), most or sys.maxsize
    self._waiting: dict[int, list[_QueryRows]] = {length: [] for length in self.lengths}
    self._rows = {length: cfg.evaluate.batch_rows * (self.lengths[-1] // length) for length in self.lengths}
    if not len(users):
      self.ended, self._blocks = True, iter(())
      return
    made = users.batch(BLOCK_USERS).map(_BlockRows(dataset, cfg, split, tuple(times), self.lengths))
    ahead = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=BLOCKS_AHEAD)
    self._blocks = iter(made.to_iter_dataset(ahead))

  def waiting(self) -> np.ndarray:
    """Returns the number of batches of each length that the waiting rows would fill: float64 `[lengths]`."""
    return np.array([sum(len(r.questions) for r in self._waiting[n]) / self._rows[n] for n in self.lengths])

  def fill(self) -> None:
    """Reads until a batch is full, or all users are read."""
    while not self.ended and self.waiting().max() < 1:
      block = next(self._blocks, None) if self._room else None
      if block is None:
        self.ended = True
        return
      rows, absent = block
      self.absent += absent
      self.read = min(self.read + BLOCK_USERS, self._users)
      for length, parts in rows.items():
        for part in parts:
          part = part.cut(0, self._room)
          self._room -= len(part.questions)
          self._waiting[length].append(part)

  def take(self, length: int) -> QueryBatch:
    """Returns the next batch of rows of a length, padded; once all users are read, shorter rows fill it up."""
    size, parts, n = self._rows[length], [], 0
    for each in [x for x in reversed(self.lengths) if x <= length] if self.ended else [length]:
      waiting = self._waiting[each]
      while waiting and n < size:
        part = waiting.pop(0)
        if n + len(part.questions) > size:
          waiting.insert(0, part.cut(size - n, None))
          part = part.cut(0, size - n)
        parts.append(part)
        n += len(part.questions)
    return _batch(blank(self._dataset, size, length), [p for p in parts if p.questions])


def _batch(features: Features, parts: Sequence[_QueryRows]) -> QueryBatch:
  """Fills rows of padding with the rows of `parts`, which may be shorter, and returns the batch."""
  place = 0
  for part in parts:
    rows = slice(place, place + len(part.questions))
    features.numeric[rows] = np.nan
    features.vectors[rows] = np.nan
    for into, values in zip(features, part.features):
      into[rows, : values.shape[1]] = values
    place = rows.stop
  labels, given, also = {}, {}, {}
  for name in parts[0].targets if parts else ():
    of_parts = [p.targets[name] for p in parts]
    labels[name] = Labels(*(np.concatenate([getattr(t, k) for t in of_parts]) for k in Labels._fields))
    if of_parts[0].given.ndim > 2:  # of an event label
      given[name] = pad([t.given for t in of_parts], len(features.segment))
    elif of_parts[0].value.ndim == 1:
      also[name] = np.concatenate([t.also for t in of_parts])
  seen = {n: [v for p in parts for v in p.seen[n]] for n in (parts[0].seen if parts else ())}
  return QueryBatch(features, [q for p in parts for q in p.questions], labels, seen, given, also)


def next_length(lengths: Sequence[int], waiting: np.ndarray) -> int | None:
  """Returns the length of the next batch of H readers; None when no rows are left.

  Among the lengths with a full batch in some reader, it is the one with the most rows waiting over all readers. With no
  full batch, all readers have ended, and it is the longest length left. `waiting [H, lengths]` holds each reader's
  `QueryReader.waiting` after `QueryReader.fill`, in batches.
  """
  full = waiting.max(axis=0) >= 1
  if full.any():
    return lengths[int(np.argmax(np.where(full, waiting.sum(axis=0), -1)))]
  left = np.flatnonzero(waiting.max(axis=0) > 0)
  return lengths[left[-1]] if len(left) else None


def query_batches(
  dataset: Dataset,
  cfg: config.Config,
  *,
  split: int | None = None,
  times: Sequence[int | None] = (),
  most: int = 0,
) -> Iterator[QueryBatch]:
  """Yields every snapshot of `split` with the labels of the active tasks, or every user at `times` without labels.

  A user with no event before a time has no row for it. With `most`, at most this many rows come, from users drawn by
  `cfg.train.seed`. With 0 all users come, in order.
  """
  users = grain.MapDataset.range(len(dataset))
  reader = QueryReader(
    dataset, cfg, users.shuffle(seed=cfg.train.seed) if most else users, split=split, times=times, most=most
  )
  while True:
    reader.fill()
    length = next_length(reader.lengths, reader.waiting()[None])
    if length is None:
      return
    yield reader.take(length)
