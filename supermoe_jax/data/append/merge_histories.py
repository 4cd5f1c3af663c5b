"""Merges users' earlier and new events into one history, and adds new values to vocabularies and tables of vectors.

During the merge every new value of a vocabulary has a provisional code behind the known codes, since only the merged
histories show which values are frequent enough in training. `ExtendedEncoders` maps provisional to final codes.

Shapes: U users, N events, F columns of codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import ABSENT, FIRST_VALUE, UNKNOWN
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.splits import TRAIN, user_split
from supermoe_jax.data.encoding.vectors import Vectors
from supermoe_jax.data.encoding.vocabulary import Categorical, Encoders, Vocabulary
from supermoe_jax.data.preparation.event_log import EventLog
from supermoe_jax.data.preparation.fitting import extend_vectors


class Repeats(NamedTuple):
  """New events that repeat an earlier event of the user in time, source and every field.

  Attributes:
    time: int64 `[R]`, microseconds since 1970 UTC.
    source: int32 `[R]`.
    codes: int32 `[R, F]`.
    numeric: float32 `[R, G]`.
  """

  time: np.ndarray
  source: np.ndarray
  codes: np.ndarray
  numeric: np.ndarray


def merge_histories(old: UserBlock, new: UserBlock, encoders: Encoders, data: config.Data) -> tuple[UserBlock, Repeats]:
  """Returns the histories of the users of `new` with their earlier events, and the new events that are repeats.

  Events at equal times are ordered by source, as when all files are read at once; within a source earlier events come
  first. Repeats are left out if the config asks for it. Values that a code does not determine never count as equal:
  values out of vocabulary, hashed values, and lists that may have been cut.

  Args:
    old: the earlier histories of some of the users, in the order that the users have in `new`.
    new: the new events.
    encoders: the encoders that gave the codes of both.
    data: decides which events lie in training, and whether repeats are left out.
  """
  place = {user: i for i, user in enumerate(new.users)}
  user = np.concatenate([np.array([place[u] for u in old.users], np.int64)[old.owner], new.owner])
  time, source, codes, numeric = (
    np.concatenate([getattr(old, part), getattr(new, part)]) for part in ("time", "source", "codes", "numeric")
  )
  is_new = np.repeat([False, True], [len(old.time), len(new.time)])
  order = np.lexsort((is_new, source, time, user))  # stable: equal events keep their order
  user, time, source, codes, numeric, is_new = (a[order] for a in (user, time, source, codes, numeric, is_new))
  # Fields of the user table are ignored: they are equal in all events of a user, but a value may have got a code since.
  own = [data.fields[name].table == "events" for name in (*encoders.categorical, *data.extra_value_fields)]
  repeats = _repeats(user, time, source, codes[:, own], numeric, is_new, _comparable(codes, encoders, data))
  found = Repeats(time[repeats], source[repeats], codes[repeats], numeric[repeats])
  if data.duplicates == "drop":
    user, time, source, codes, numeric = (a[~repeats] for a in (user, time, source, codes, numeric))
  offsets = np.append(0, np.cumsum(np.bincount(user, minlength=len(new.users))))
  block = UserBlock(new.users, offsets, time, source, codes, numeric, np.zeros(len(new.users), np.int64))
  return dataclasses.replace(block, n_train=training_events(block, data.split)), found


def _comparable(codes: np.ndarray, encoders: Encoders, data: config.Data) -> np.ndarray:
  """Returns whether each event's codes determine all its values, user table fields aside: bool `[N]`."""
  fields, out = [*encoders.categorical, *data.extra_value_fields], np.ones(len(codes), bool)
  for name, encoder in encoders.categorical.items():
    if data.fields[name].table == "users":
      continue
    columns = [i for i, other in enumerate(fields) if other == name]
    out &= (codes[:, columns] != UNKNOWN).all(axis=1)
    if encoder.buckets and not any(
      _same_values(data, name, n) and not e.buckets for n, e in encoders.categorical.items()
    ):
      out &= (codes[:, columns] < encoder.n_codes - encoder.buckets).all(axis=1)
    if data.fields[name].many:
      out &= codes[:, columns[-1]] == ABSENT  # else the list may have been cut
  return out


def _same_values(data: config.Data, one: str, other: str) -> bool:
  """Returns whether two fields have the values of the same column."""
  a, b = (
    (f.column or n, f.table, f.sources, f.many, f.separator) for n, f in ((n, data.fields[n]) for n in (one, other))
  )
  return a == b


def _repeats(
  user: np.ndarray,
  time: np.ndarray,
  source: np.ndarray,
  codes: np.ndarray,
  numeric: np.ndarray,
  is_new: np.ndarray,
  comparable: np.ndarray,
) -> np.ndarray:
  """Returns a mask of new events that equal an earlier event: bool `[N]`; events are sorted by user and time.

  Of several equal new events only the first is marked: reading the new files counts, and drops, the others.
  """
  tied = np.zeros(len(user) + 1, bool)
  tied[1:-1] = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
  at = np.flatnonzero((tied[1:] | tied[:-1]) & comparable)
  bits = np.ascontiguousarray(numeric[at]).view(np.int32).reshape(len(at), numeric.shape[1])
  rows = np.concatenate([np.stack([user[at], time[at], source[at]], axis=1), codes[at], bits], axis=1)
  _, same = np.unique(rows, axis=0, return_inverse=True)
  earlier = np.zeros(same.max(initial=-1) + 1, bool)
  earlier[same[~is_new[at]]] = True
  out = np.zeros(len(user), bool)
  again = np.flatnonzero(is_new[at] & earlier[same])
  out[at[again[np.unique(same[again], return_index=True)[1]]]] = True
  return out


def training_events(block: UserBlock, split: config.Split) -> np.ndarray:
  """Returns the number of each user's events in training: int64 `[U]`."""
  lengths, everyone = block.lengths, np.arange(len(block.users))
  if split.mode == "leave_one_out":
    return np.where(lengths < 3, lengths, lengths - 2)
  if split.mode == "temporal":
    return block.before(everyone, config.parse_time(split.train_end, "config.data.split.train_end"))
  training = np.array([user_split(user, split) == TRAIN for user in block.users])
  if split.log_end:
    lengths = block.before(everyone, config.parse_time(split.log_end, "config.data.split.log_end"))
  return np.where(training, lengths, 0)


def provisional(encoders: Encoders, log: EventLog) -> Encoders:
  """Returns the encoders with a provisional code for every value of a new log.

  A vocabulary with buckets stays as it is: it has a code for any value. The codes of new vectors are final.
  """
  grown: dict[str, Categorical] = {}
  for name, encoder in encoders.categorical.items():
    if isinstance(encoder, Vocabulary) and not encoder.buckets:
      sql = f"SELECT DISTINCT value FROM ({log.values_sql(name)}) ANTI JOIN known USING (value) ORDER BY value"
      new = [value for (value,) in log.query(sql, known=encoder.table())]
      counts = np.concatenate([encoder.counts, np.zeros(len(new), np.int64)])
      encoder = dataclasses.replace(encoder, values=[*encoder.values, *new], counts=counts)
    elif isinstance(encoder, Vectors):
      encoder = extend_vectors(log, name, encoder)
    grown[name] = encoder
  return dataclasses.replace(encoders, categorical=grown)


class CodeCounts:
  """Counts of the codes of each categorical field, among all events and among training events.

  Attributes:
    all: field → int64 `[codes]`, counts among all events.
    training: field → int64 `[codes]`, counts among training events.
  """

  def __init__(self, encoders: Encoders, extra_columns: Sequence[str]):
    """Starts at 0; `extra_columns` names the fields of the code columns behind one column of each field."""
    self._fields = [*encoders.categorical, *extra_columns]
    self.all = {n: np.zeros(e.n_codes, np.int64) for n, e in encoders.categorical.items()}
    self.training = {n: np.zeros(e.n_codes, np.int64) for n, e in encoders.categorical.items()}

  def add(self, block: UserBlock, sign: int = 1) -> None:
    """Adds the events of users to the counts, or subtracts them with `sign` -1."""
    training = np.arange(len(block.time)) - block.offsets[block.owner] < block.n_train[block.owner]
    for column, name in enumerate(self._fields):
      codes = block.codes[:, column]
      self.all[name] += sign * np.bincount(codes, minlength=len(self.all[name]))
      self.training[name] += sign * np.bincount(codes[training], minlength=len(self.all[name]))


@dataclasses.dataclass(frozen=True)
class ExtendedEncoders:
  """Encoders extended by new events, and the map from provisional to final codes.

  Attributes:
    encoders: the encoders with the new values that were frequent enough, behind the known values.
    final: for each field with a vocabulary, the final code of each provisional code: int32 `[codes]`.
    added: for each such field, the new values that received a code, most frequent first.
    left_out: for each such field, the number of new training values without a code, because they occur less than
      `min_count` times or the vocabulary has no room.
    new_vectors: for each field of vectors, the number of new ones.
  """

  encoders: Encoders
  final: Mapping[str, np.ndarray]
  added: Mapping[str, list[str]]
  left_out: Mapping[str, int]
  new_vectors: Mapping[str, int]

  def apply(self, block: UserBlock, extra_columns: Sequence[str]) -> UserBlock:
    """Returns the block with final codes in place of the provisional ones."""
    codes = block.codes.copy()
    for column, name in enumerate([*self.encoders.categorical, *extra_columns]):
      if name in self.final:
        codes[:, column] = self.final[name][codes[:, column]]
    return dataclasses.replace(block, codes=codes)


def extend_encoders(
  before: Encoders, grown: Encoders, counts: CodeCounts, data: config.Data, *, keep: bool
) -> ExtendedEncoders:
  """Adds new values that are frequent enough to the vocabularies, and returns the extended encoders.

  The rule is that of fitting: at least `min_count` times in training, most frequent first, ties by value, `size` values
  in all. Existing codes never change. Two kinds of vocabularies receive no new values: one with fewer values than
  `aggregates.top_values`, since aggregates count each of its values and must not change; and one that fields share,
  since each of these fields has seen other values. Tables of vectors keep every new vector: the model needs no training
  to read it.

  Args:
    before: the dataset's encoders.
    grown: the provisional encoders.
    counts: the counts, by provisional code, that the new events add.
    data: the data section of the config.
    keep: adds no value to a vocabulary.
  """
  categorical: dict[str, Categorical] = {}
  final, added, left_out, new_vectors = {}, {}, {}, {}
  for name, encoder in before.categorical.items():
    wide = grown.categorical[name]
    if isinstance(encoder, Vocabulary) and encoder.buckets:
      seen_again = counts.training[name][FIRST_VALUE : FIRST_VALUE + len(encoder.values)]
      encoder = dataclasses.replace(encoder, counts=encoder.counts + seen_again)
    elif isinstance(encoder, Vectors):
      new_vectors[name], encoder = wide.n_codes - encoder.n_codes, wide
    elif isinstance(encoder, Vocabulary) and isinstance(wide, Vocabulary):
      known, training = len(encoder.values), counts.training[name][FIRST_VALUE:]
      seen = [i for i in range(known, len(wide.values)) if training[i]]
      frequent = sorted((-training[i], wide.values[i], i) for i in seen if training[i] >= data.fields[name].min_count)
      counted = name in data.aggregates.fields and known < data.aggregates.top_values
      shared = any(name in (n, f.shares) for n, f in data.fields.items() if f.shares)
      room = 0 if keep or counted or shared else max(data.fields[name].size - known, 0)
      chosen = [i for *_, i in frequent[:room]]
      final[name] = np.concatenate([np.arange(known + FIRST_VALUE), np.full(len(wide.values) - known, UNKNOWN)])
      final[name][np.array(chosen, np.int64) + FIRST_VALUE] = np.arange(len(chosen)) + known + FIRST_VALUE
      final[name] = final[name].astype(np.int32)
      added[name], left_out[name] = [wide.values[i] for i in chosen], len(seen) - len(chosen)
      encoder = dataclasses.replace(
        encoder,
        values=[*encoder.values, *added[name]],
        counts=np.concatenate([encoder.counts + training[:known], training[chosen]]),
      )
    categorical[name] = encoder
  return ExtendedEncoders(dataclasses.replace(before, categorical=categorical), final, added, left_out, new_vectors)
