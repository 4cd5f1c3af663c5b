"""Makes the targets of the active tasks in a row: labels, masks and weights, within the tasks' sample spaces.

A task asks at *sites*: at S snapshots. Next-event and event-label tasks also ask at the L events of a training row,
which come before the snapshots.

Shapes: B rows, L events, S snapshots, m events that a snapshot of an event label asks about, G given fields of these
events, N events of a user.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import Targets
from supermoe_jax.data.dataset import user_folds
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.windows import pad
from supermoe_jax.data.encoding.histories import UserHistory
from supermoe_jax.data.encoding.splits import TRAIN
from supermoe_jax.data.format.schema import make_comparison
from supermoe_jax.data.tasks import TaskKindAtEvents, bind
from supermoe_jax.data.tasks.labels import Labels, at_events, next_carrier, values_of_moments
from supermoe_jax.data.tasks.sample_space import supervision

# Users whose labels are counted to estimate the size of a sample space; a few milliseconds each.
SPACE_USERS = 1000


class Supervision:
  """A maker of the active tasks' targets from users' records."""

  def __init__(self, dataset: Dataset, cfg: config.Config, *, training: bool):
    """Binds the active tasks to a dataset.

    With `training`, `cfg.train.missing` decides how unknown labels are treated, samples outside a sample space get the
    task's `out_space_weight`, and a label that training cannot use is unknown. Without, samples outside the sample
    space are left out, because metrics are about the sample space itself.
    """
    labelled, self._cfg = cfg.labelled_tasks, cfg
    self.tasks = {n: labelled[n] for n in cfg.active_tasks if n in labelled}
    self._training = training
    self._fill = training and cfg.train.missing == "negative"
    named = (config.parse_sample_space(t.sample_space) for t in self.tasks.values())
    compared = {space.task: labelled[space.task] for space in named if space is not None}
    self._kinds = bind({**compared, **self.tasks}, cfg.data, dataset.encoders)
    self._kinds_at_events = {
      n: cast(TaskKindAtEvents[Any], kind) for n, kind in self._kinds.items() if kind.task.asks_at_events
    }
    self._spaces = {n: make_comparison(labelled, self._kinds, n) for n in self.tasks}
    split_mode = cfg.data.split.mode
    asked = {n: t.values_of_a_moment(dataset.tie_rate, split_mode) for n, t in self.tasks.items()}
    self._moments = {n: most for n, most in asked.items() if most}
    self._one_event = split_mode == "leave_one_out"

  def at_snapshots(self, record: Mapping[str, Any], history: UserHistory, chosen: np.ndarray) -> dict[str, Targets]:
    """Returns each task's targets at the snapshots with the indices `chosen [S]`, without a batch dimension.

    The arrays of an event label are `[S, m]`, its `given` is `[S, m, G]`.
    """
    labels = _EventLabels(self._kinds_at_events, history)
    record = user_folds.dealt_record(record, self._cfg)
    out = {}
    for name, task in self.tasks.items():
      if task.about_events:
        kind = self._kinds[name]
        event = kind.asked_events(record, chosen)
        found = kind.of_record(record, chosen)
        out[name] = self._event_targets(name, found, event=event, history=history, labels=labels)
        continue
      values = None
      if name in self._moments:
        seen = record["snapshot_events"][chosen].astype(np.int64)
        event = next_carrier(self._kinds_at_events[name].carried(history))[seen]
        event = np.where(event < len(history.time), event, -1)
        # No period ends within a moment. A leave-one-out snapshot asks about one event, within a moment or not.
        values = self._values(name, history, event, seen + 1 if self._one_event else len(history.time))
      made = functools.partial(self._targets, name, inside=self._inside(name, record, chosen))
      out[name] = _with_moments(self._of_record(name, record, chosen), values, made)
    return out

  def at_events(self, history: UserHistory, start: int, stop: int) -> dict[str, Targets]:
    """Returns the targets of tasks that ask at events, at the training events [start, stop), without a batch dimension.

    Event l asks about the next training event after it that carries the field.
    """
    labels = _EventLabels(self._kinds_at_events, history)
    out = {}
    for name in self.tasks:
      if name in self._kinds_at_events:
        event = _following(self._kinds_at_events[name].carried(history), start, stop, history.n_train)
        values = None
        if name in self._moments:  # a moment that is not over asks nothing: only the files order what it still holds
          event = np.where(history.time[np.maximum(event, 0)] > history.time[start:stop], event, -1)
          values = self._values(name, history, event, history.n_train)
        found = at_events(labels[name], event)
        made = functools.partial(self._event_targets, name, event=event, history=history, labels=labels)
        out[name] = _with_moments(found, values, made)
    return out

  def _values(self, name: str, history: UserHistory, event: np.ndarray, limit: np.ndarray | int) -> np.ndarray:
    codes = self._kinds_at_events[name].event_labels(history).value
    return values_of_moments(codes, history.time, event, limit, self._moments[name])

  def _of_record(self, name: str, record: Mapping[str, Any], chosen: np.ndarray) -> Labels:
    """Returns a task's labels at snapshots; with `cfg.train.missing="negative"` unknown labels count as 0."""
    kind = self._kinds[name]
    value, known = kind.of_record(record, chosen)
    return Labels(value, np.ones_like(known) if self._fill and not kind.task.asks_at_events else known)

  def _inside(self, name: str, record: Mapping[str, Any], chosen: np.ndarray) -> Labels | None:
    space = self._spaces[name]
    return None if space is None else space(self._of_record(space.task, record, chosen))

  def _event_targets(
    self, name: str, found: Labels, *, event: np.ndarray, history: UserHistory, labels: _EventLabels
  ) -> Targets:
    space = self._spaces[name]
    inside = None if space is None else space(at_events(labels[space.task], event))
    return self._targets(name, found, inside)._replace(given=self._kinds[name].given(history, event))

  def _targets(self, name: str, found: Labels, inside: Labels | None) -> Targets:
    task, value = self.tasks[name], found.value
    known = self._kinds[name].teachable(found) if self._training else found.known
    outside = task.out_space_weight if self._training else 0.0
    known, weight = supervision(known, inside, (task.in_space_weight, outside))
    codes = task.answer in ("catalogue", "multiclass")
    none = np.zeros((*known.shape, 0), np.int32)
    return Targets(value.astype(np.int32 if codes else np.float32), known, weight, none, none)

  def part(
    self, record: Mapping[str, Any], history: UserHistory, start: int, stop: int, chosen: np.ndarray
  ) -> dict[str, UserTargets]:
    """Returns a user's targets in a training row: at the events [start, stop) and at the snapshots `chosen`."""
    events = self.at_events(history, start, stop)
    snapshots = self.at_snapshots(record, history, chosen)
    return {name: UserTargets(events.get(name), targets) for name, targets in snapshots.items()}


class UserTargets(NamedTuple):
  """A task's targets of one user, without padding: at n events (None where the task asks at none) and at s snapshots.

  At snapshots the arrays of an event label are `[s, m]`, its `given` is `[s, m, G]`.
  """

  events: Targets | None
  snapshots: Targets


def join_targets(parts: Sequence[UserTargets], max_events: int, n_snapshots: int) -> Targets:
  """Returns the targets of one or more users as one row, with the users in the order of `windows.join_features`."""
  snapshots = [pad(column, n_snapshots) for column in zip(*(p.snapshots for p in parts))]
  if snapshots[1].ndim > 1:  # of an event label
    snapshots = [x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in snapshots]
  events = [p.events for p in parts if p.events is not None]
  if not events:
    return Targets(*snapshots)
  before = (pad(column, max_events) for column in zip(*events))
  return Targets(*(np.concatenate(both) for both in zip(before, snapshots, strict=True)))


class SpaceCount(NamedTuple):
  """The numbers of training snapshots' labels of `users` users inside and outside a task's sample space.

  `labels = inside + outside + unknown`. For `unknown` labels, the compared task's label is not known.
  """

  users: int
  labels: int
  inside: int
  outside: int
  unknown: int


def count_spaces(dataset: Dataset, cfg: config.Config, users: int = SPACE_USERS) -> dict[str, SpaceCount]:
  """Returns, for each active task with a sample space, how many labels of the first users lie inside and outside it.

  The first `users` users are a sample, because records are shuffled.
  """
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
  """The labels of each event of one user, by task; computed at their first use."""

  def __init__(self, kinds: Mapping[str, TaskKindAtEvents[Any]], history: UserHistory):
    self._of = functools.cache(lambda name: kinds[name].event_labels(history))

  def __getitem__(self, name: str) -> Labels:
    return self._of(name)


def _with_moments(found: Labels, values: np.ndarray | None, make: Callable[[Labels], Targets]) -> Targets:
  """Returns the targets that `make` makes of labels; if the `values [..., m]` of moments are given, any is right."""
  if values is None:
    return make(found)
  targets = make(found._replace(value=np.where(values[..., 0] > 0, values[..., 0], found.value)))
  return targets._replace(also=np.where(targets.known[..., None], values[..., 1:], 0))


def _following(carried: np.ndarray, start: int, stop: int, limit: int) -> np.ndarray:
  """Returns, for each event in [start, stop), the next event before `limit` that carries the field; -1 for none."""
  event = next_carrier(carried)[start + 1 : stop + 1]
  return np.where(event < limit, event, -1)
