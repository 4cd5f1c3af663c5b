"""What the active tasks ask of a row, and know: labels within the tasks' sample spaces.

A task asks at *sites*: at S snapshots; next-event and event-label tasks at the L events of a training row before them.

Shapes: B rows, L events, S snapshots, m events that a snapshot of an event label asks about, G fields given of them,
N events of a user.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import Targets
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.windows import pad
from supermoe_jax.data.encoding.histories import UserHistory
from supermoe_jax.data.encoding.splits import TRAIN
from supermoe_jax.data.encoding.vocabulary import UNKNOWN
from supermoe_jax.data.format.schema import make_comparison, make_event_answer
from supermoe_jax.data.tasks import labels
from supermoe_jax.data.tasks.labels import Labels

# Users whose labels are counted to tell how large a sample space is; a few milliseconds each.
SPACE_USERS = 1000


class Supervision:
  """Reads what the active tasks know out of records."""

  def __init__(self, dataset: Dataset, cfg: config.Config, *, training: bool):
    """With `training`, unknown labels are treated as `cfg.train.missing` says, samples outside of a sample space count
    as the task says, and a next event that is out of vocabulary is unknown: no row of the catalogue is right."""
    labelled = cfg.labelled_tasks
    self.tasks = {n: labelled[n] for n in cfg.active_tasks if n in labelled}
    self._training = training
    self._fill = training and cfg.train.missing == "negative"
    self._all = labelled
    self._spaces = {n: make_comparison(cfg, n, dataset.encoders) for n in self.tasks}
    compared = [space.task for space in self._spaces.values() if space is not None]
    self._answers = {
      n: make_event_answer(n, t, cfg.data, dataset.encoders)
      for n, t in labelled.items()
      if isinstance(t, config.EventLabel) and (n in self.tasks or n in compared)
    }
    field = dataset.schema.field
    self._columns = {n: field(t.field) for n, t in self.tasks.items() if isinstance(t, config.NextEvent)}
    self._given = {
      n: [field(f) for f in t.given] if isinstance(t, config.EventLabel) else [] for n, t in self.tasks.items()
    }

  def at_snapshots(self, record: Mapping[str, Any], history: UserHistory, chosen: np.ndarray) -> dict[str, Targets]:
    """What each task knows at the snapshots with the indices `chosen [S]`, without a batch dimension.

    The parts of an event label are `[S, m]`, `given` `[S, m, G]`.
    """
    answers = _EventLabels(self._answers, history)
    out = {}
    for name, task in self.tasks.items():
      if isinstance(task, config.EventLabel):
        event = record[f"event_{name}"][chosen]
        found = Labels(record[f"label_{name}"][chosen], record[f"known_{name}"][chosen].astype(bool))
        out[name] = self._event_targets(name, found, event, history, answers)
      else:
        out[name] = self._targets(name, self._of_record(name, record, chosen), self._inside(name, record, chosen))
    return out

  def at_events(self, history: UserHistory, start: int, stop: int) -> dict[str, Targets]:
    """What the tasks that ask at events know at the training events [start, stop), without a batch dimension.

    Event l asks about the next training event after it that carries the field.
    """
    answers = _EventLabels(self._answers, history)
    out = {}
    for name, task in self.tasks.items():
      if isinstance(task, config.NextEvent):
        codes = history.codes[:, self._columns[name]]
        event = _following(codes > 0, start, stop, history.n_train)
        out[name] = self._targets(name, labels.at_events(Labels(codes, codes > 0), event), None)
      elif isinstance(task, config.EventLabel):
        event = _following(self._answers[name].carried(history), start, stop, history.n_train)
        out[name] = self._event_targets(name, labels.at_events(answers[name], event), event, history, answers)
    return out

  def _of_record(self, name: str, record: Mapping[str, Any], chosen: np.ndarray) -> Labels:
    """The labels of a task at snapshots; unknown ones are 0, and are taken for known where that is asked for."""
    value, known = record[f"label_{name}"][chosen], record[f"known_{name}"][chosen].astype(bool)
    value[~known] = 0
    if self._fill and not isinstance(self._all[name], config.AT_EVENTS):
      known = np.ones_like(known)
    return Labels(value, known)

  def _inside(self, name: str, record: Mapping[str, Any], chosen: np.ndarray) -> Labels | None:
    space = self._spaces[name]
    return None if space is None else space(self._of_record(space.task, record, chosen))

  def _event_targets(
    self, name: str, found: Labels, event: np.ndarray, history: UserHistory, answers: _EventLabels
  ) -> Targets:
    space = self._spaces[name]
    inside = None if space is None else space(labels.at_events(answers[space.task], event))
    targets = self._targets(name, found, inside)
    if not self._given[name]:
      return targets
    given = history.codes[np.maximum(event, 0)][..., self._given[name]]
    return targets._replace(given=np.where(event[..., None] >= 0, given, 0).astype(np.int32))

  def _targets(self, name: str, found: Labels, inside: Labels | None) -> Targets:
    task, (value, known) = self.tasks[name], found
    if self._training and isinstance(task, config.NextEvent):
      known = known & (value > UNKNOWN)
    outside = task.out_space_weight if self._training else 0.0  # metrics are about the space itself
    known, weight = labels.supervision(known, inside, (task.in_space_weight, outside))
    codes = config.answer(task) in ("catalogue", "multiclass")
    return Targets(
      value.astype(np.int32 if codes else np.float32), known, weight, np.zeros((*known.shape, 0), np.int32)
    )

  def part(
    self, record: Mapping[str, Any], history: UserHistory, start: int, stop: int, chosen: np.ndarray
  ) -> dict[str, UserTargets]:
    """The targets of a user's part of a training row: at the events [start, stop) and at the snapshots `chosen`."""
    events = self.at_events(history, start, stop)
    snapshots = self.at_snapshots(record, history, chosen)
    return {name: UserTargets(events.get(name), targets) for name, targets in snapshots.items()}


class UserTargets(NamedTuple):
  """A task's targets of one user, without padding: at n events, None where the task asks at none, and at s snapshots.

  Those of an event label at snapshots are `[s, m]`, `given` `[s, m, G]`.
  """

  events: Targets | None
  snapshots: Targets


def join_targets(parts: Sequence[UserTargets], max_events: int, n_snapshots: int) -> Targets:
  """Lays the targets of one or more users out as one row; the users stand as in `windows.join_features`."""
  snapshots = [pad(column, n_snapshots) for column in zip(*(p.snapshots for p in parts))]
  if snapshots[1].ndim > 1:  # of an event label
    snapshots = [x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in snapshots]
  events = [p.events for p in parts if p.events is not None]
  if not events:
    return Targets(*snapshots)
  before = (pad(column, max_events) for column in zip(*events))
  return Targets(*(np.concatenate(both) for both in zip(before, snapshots, strict=True)))


class SpaceCount(NamedTuple):
  """How the labels of the training snapshots of `users` users lie to a task's sample space.

  `labels = inside + outside + unknown`; unknown are those where the label that is compared is not known.
  """

  users: int
  labels: int
  inside: int
  outside: int
  unknown: int


def count_spaces(dataset: Dataset, cfg: config.Config, users: int = SPACE_USERS) -> dict[str, SpaceCount]:
  """Counts, for each active task with a sample space, where the labels of the first `users` users lie (in any order:
  records are shuffled)."""
  names = [n for n, t in cfg.active_views.items() if t.sample_space]
  if not names:
    return {}
  masked = dataclasses.replace(cfg.train, missing="masked")

  def counted(**settings: Any) -> Supervision:
    tasks = {n: dataclasses.replace(t, **settings) if n in names else t for n, t in cfg.tasks.items()}
    return Supervision(dataset, dataclasses.replace(cfg, tasks=tasks, train=masked), training=True)

  ways = (counted(sample_space=""), counted(out_space_weight=1.0), counted(out_space_weight=0.0))
  total = np.zeros((len(names), len(ways)), np.int64)
  users = min(users, len(dataset))
  for index in range(users):
    record = dataset[index]
    chosen = np.flatnonzero(record["snapshot_split"] == TRAIN)
    found = [way.at_snapshots(record, dataset.history(record), chosen) for way in ways]
    total += [[int(np.sum(f[n].known)) for f in found] for n in names]
  return {
    n: SpaceCount(users, int(labels), int(inside), int(placed - inside), int(labels - placed))
    for n, (labels, placed, inside) in zip(names, total)
  }


class _EventLabels:
  """What each event label says of each event of one user; evaluated when it is asked for."""

  def __init__(self, answers: Mapping[str, labels.EventAnswer], history: UserHistory):
    self._of = functools.cache(lambda name: answers[name](history))

  def __getitem__(self, name: str) -> Labels:
    return self._of(name)


def _following(carried: np.ndarray, start: int, stop: int, limit: int) -> np.ndarray:
  """For each event in [start, stop) the next one before `limit` that carries the field; -1 none."""
  event = labels.next_carrier(carried)[start + 1 : stop + 1]
  return np.where(event < limit, event, -1)
