"""Defines labels at snapshots, and the functions that all kinds of tasks share.

Every function here is a pure function of the users' histories, for a block of users at once, and strictly point in
time. A snapshot sees only the events before it. Its label looks at [τ, τ + horizon) or at the events that follow. A
label that is not wholly observed within the period of its snapshot's split is masked, not guessed.

Shapes: U users, their N events and S snapshots in total, m events that a snapshot asks about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import ABSENT, UNKNOWN
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.splits import TRAIN
from supermoe_jax.data.tasks.calendar import Calendar


class Snapshots(NamedTuple):
  """The snapshots of a block's users, in the order of the users.

  Attributes:
    user: int64 `[S]`, the index of the user in the block, ascending.
    time: int64 `[S]`, τ in microseconds since 1970 UTC.
    n_events: int32 `[S]`, the number of the user's visible events.
    split: int32 `[S]`, TRAIN, VALIDATION or TEST.
  """

  user: np.ndarray
  time: np.ndarray
  n_events: np.ndarray
  split: np.ndarray


class Labels(NamedTuple):
  """A task's labels at S snapshots.

  Attributes:
    value: float32 `[S]` of 0 and 1 or of numbers; `[S, values]` of 0 and 1; `[S, 2]`, days and whether they end with
      an event; or int32 `[S]`, codes of the next event or indices of classes.
    known: bool `[S]`: there is a label, and the snapshot's split may use it.
  """

  value: np.ndarray
  known: np.ndarray


class TaskLabels(NamedTuple):
  """A task's labels at the snapshots of a block of users.

  Attributes:
    labels: `[S]` or `[S, values]`; for an event label `[S, m]`.
    event: int32 `[S, m]`, the user's events that an event label asks about, -1 for none; None for other kinds.
  """

  labels: Labels
  event: np.ndarray | None = None


class LabelInputs(NamedTuple):
  """What the labels of a block of users are made from.

  Attributes:
    block: the users' histories.
    snapshots: the users' snapshots.
    times: the calendar; None for leave one out.
    split_of_user: int32 `[U]`, the split of each user.
    user_labels: for each task about the table of users, float64 `[U]`; NaN where unknown.
    dated_labels: for each task of the kind `dated_label`, float64 `[S]`; NaN where unknown.
  """

  block: UserBlock
  snapshots: Snapshots
  times: Calendar | None
  split_of_user: np.ndarray
  user_labels: Mapping[str, np.ndarray]
  dated_labels: Mapping[str, np.ndarray]


class DatedRows(NamedTuple):
  """The rows of all tables of dated labels that belong to a block's users, in the order of users and then of time.

  Rows of several tables at one time of a user are one row here.

  Attributes:
    user: int64 `[R]`, the index of the user in the block, ascending.
    time: int64 `[R]`, τ in microseconds since 1970 UTC.
    split: int32 `[R]`, TRAIN, VALIDATION or TEST.
    values: for each task of the kind `dated_label`, float64 `[R]`; NaN where it has no row or no label.
  """

  user: np.ndarray
  time: np.ndarray
  split: np.ndarray
  values: Mapping[str, np.ndarray]

  def between(self, first: int, last: int) -> DatedRows:
    """Returns the rows of the users `first` … `last - 1`, numbered from 0."""
    part = slice(*np.searchsorted(self.user, (first, last)))
    values = {name: value[part] for name, value in self.values.items()}
    return DatedRows(self.user[part] - first, self.time[part], self.split[part], values)


@dataclasses.dataclass(frozen=True)
class RecordArray:
  """An array of a user's record: its dtype, the shape of a row, and whether it has a row per event or per snapshot."""

  dtype: type
  row: tuple[int, ...] = ()
  of_events: bool = False


def label_shape(answer: config.Answer, outputs: int) -> tuple[int, ...]:
  """Returns the shape of one label of a form of answers whose head has `outputs` outputs."""
  return {"multilabel": (outputs,), "survival": (2,)}.get(answer, ())


def next_carrier(carried: np.ndarray) -> np.ndarray:
  """Returns, for each position n in 0…N, the first event at or after n that carries a field; N if there is none.

  Shapes: `carried [N]` bool → int64 `[N + 1]`.
  """
  n = len(carried)
  index = np.where(carried, np.arange(n), n)
  return np.append(np.minimum.accumulate(index[::-1])[::-1], n)


def values_of_moments(
  codes: np.ndarray, time: np.ndarray, event: np.ndarray, limit: np.ndarray | int, most: int
) -> np.ndarray:
  """Returns the distinct known values of the moments of events: int32 `[..., most]`, first of the files first, 0: none.

  Args:
    codes: int32 `[N]`, a field's codes of a user's events.
    time: int64 `[N]`, ascending.
    event: int `[...]`, the first event that counts of each moment; -1 for none.
    limit: int `[...]`, the events before it count.
    most: the most values of a moment that are returned.
  """
  out = np.zeros((*event.shape, most), np.int32)
  limits = np.broadcast_to(limit, event.shape)
  for first, last in {(e, stop) for e, stop in zip(event.ravel().tolist(), limits.ravel().tolist()) if e >= 0}:
    stop = min(int(np.searchsorted(time, time[first], side="right")), last)
    values = codes[first:stop]
    values = values[values > UNKNOWN]
    _, places = np.unique(values, return_index=True)
    distinct = values[np.sort(places)][:most]
    out[(event == first) & (limits == last), : len(distinct)] = distinct
  return out


def last_answer(block: UserBlock, snapshots: Snapshots, times: Calendar | None) -> np.ndarray:
  """Returns the position in the block before which each snapshot's answers must lie: int64 `[S]`.

  An answer must itself lie in the period of the snapshot's split: for training in the training period, for validation
  before the first test snapshot.
  """
  user = snapshots.user
  if times is None:
    within = np.where(snapshots.split == TRAIN, block.n_train[user], block.lengths[user])
  else:
    within = block.before(user, np.array(times.observed_until)[snapshots.split])
  return block.offsets[user] + within


def first_unseen(block: UserBlock, snapshots: Snapshots) -> np.ndarray:
  """Returns the position in the block of the first event that each snapshot does not see: int64 `[S]`."""
  return block.offsets[snapshots.user] + snapshots.n_events


def future_window(
  block: UserBlock, snapshots: Snapshots, times: Calendar, days: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the start and stop of [τ, τ + days) in the block, and whether it is wholly observed: `[S]` each."""
  end = snapshots.time + int(days * MICROSECONDS_PER_DAY)
  known = end <= np.array(times.observed_until)[snapshots.split]
  stop = block.offsets[snapshots.user] + block.before(snapshots.user, end)
  return first_unseen(block, snapshots), stop, known


def without_labels(labels: TaskLabels, where: np.ndarray) -> TaskLabels:
  """Returns labels that are unknown at the snapshots `where [S]`, and ask about no event there."""

  def cleared(values: np.ndarray, empty: int) -> np.ndarray:
    values = values.copy()
    values[where] = empty
    return values

  of_task, event = labels
  known = Labels(cleared(of_task.value, 0), cleared(of_task.known, False))
  return TaskLabels(known, None if event is None else cleared(event, -1))


def at_events(labels: Labels, event: np.ndarray) -> Labels:
  """Returns the labels of the events at the indices `event [...]`, given all events' labels `[N]`; -1 is unknown."""
  known = (event >= 0) & labels.known[np.maximum(event, 0)]
  return Labels(np.where(known, labels.value[np.maximum(event, 0)], 0), known)


def right_values(label: Labels, also: np.ndarray) -> np.ndarray:
  """Returns the codes of n questions' right values, int32 `[n, 1 + A]`; 0 for none, and where nothing is known.

  `label` holds the codes `[n]` of next events, and `also [n, A]` those that are as right, see `batch.Targets`.
  """
  right = np.concatenate([label.value[:, None], also], axis=1)
  return np.where(label.known[:, None], right, ABSENT).astype(np.int32)
