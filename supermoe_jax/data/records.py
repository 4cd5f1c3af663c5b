"""A user's record: its parts, and how it is made from a history.

Shapes: N events of the user, S snapshots, m events that a snapshot of an event label asks about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from supermoe_jax import config
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data.dataset import Schema, make_event_answer
from supermoe_jax.data.events import UserHistory
from supermoe_jax.data.labels import Calendar, Labels, Snapshots
from supermoe_jax.data.vocabulary import Encoders

Record = dict[str, Any]


class TaskLabels(NamedTuple):
  """A task's labels at a user's snapshots.

  Attributes:
    labels: `[S]`, `[S, values]`, or `[S, m]` of an event label.
    event: int32 `[S, m]`, the events that an event label asks about; -1 none. None for other kinds.
  """

  labels: Labels
  event: np.ndarray | None = None


def label_type(task: config.LabelledTask) -> type:
  """How a record holds the task's labels."""
  answer = config.answer(task)
  if answer in ("catalogue", "multiclass"):
    return np.int32
  return np.float32 if answer == "regression" or isinstance(task, config.EventLabel) else np.uint8


def features(schema: Schema, tasks: Mapping[str, config.LabelledTask]) -> dict[str, Any]:
  """The parts of a user's record, as TFDS features."""

  def tensor(*shape: int | None, dtype: Any = np.int32) -> tfds.features.FeatureConnector:
    return tfds.features.Tensor(shape=shape, dtype=dtype)

  out: dict[str, Any] = {
    "user": tfds.features.Text(),
    "time": tensor(None, dtype=np.int64),
    "source": tensor(None),
    "n_train": np.int32,
    "user_split": np.int32,
    "snapshot_time": tensor(None, dtype=np.int64),
    "snapshot_events": tensor(None),
    "snapshot_split": tensor(None),
  }
  if schema.categorical:
    out["codes"] = tensor(None, len(schema.categorical) + len(schema.further))
  if schema.numeric:
    out["numeric"] = tensor(None, len(schema.numeric), dtype=np.float32)
  for name, task in tasks.items():
    if isinstance(task, config.EventLabel):
      out[f"label_{name}"] = tensor(None, task.per_snapshot, dtype=label_type(task))
      out[f"known_{name}"] = tensor(None, task.per_snapshot, dtype=np.uint8)
      out[f"event_{name}"] = tensor(None, task.per_snapshot)
      continue
    many = (schema.outputs[name],) if isinstance(task, config.FutureValues) else ()
    out[f"label_{name}"] = tensor(None, *many, dtype=label_type(task))
    out[f"known_{name}"] = tensor(None, dtype=np.uint8)
  return out


def make_record(
  history: UserHistory,
  snapshots: Snapshots,
  labels: Mapping[str, TaskLabels],
  tasks: Mapping[str, config.LabelledTask],
  owner: int,
) -> Record:
  """The record of a user who belongs to the split `owner` for user labels."""
  record: Record = {
    "user": history.user,
    "time": history.time,
    "source": history.source.astype(np.int32),
    "n_train": np.int32(history.n_train),
    "user_split": np.int32(owner),
    "snapshot_time": snapshots.time,
    "snapshot_events": snapshots.n_events,
    "snapshot_split": snapshots.split,
  }
  if history.codes.shape[1]:
    record["codes"] = history.codes.astype(np.int32)
  if history.numeric.shape[1]:
    record["numeric"] = history.numeric.astype(np.float32)
  for name, (label, event) in labels.items():
    record[f"label_{name}"] = label.value.astype(label_type(tasks[name]))
    record[f"known_{name}"] = label.known.astype(np.uint8)
    if event is not None:
      record[f"event_{name}"] = event
  return record


class Labeller:
  """Makes every task's labels at a user's snapshots."""

  def __init__(
    self,
    cfg: config.Config,
    encoders: Encoders,
    times: Calendar | None,
    user_labels: Mapping[str, Mapping[str, float]],
  ):
    """`times` is None for leave one out; `user_labels` are those of `user_table`.

    Raises:
      DataError: a positive value of an event label is not in the field's vocabulary.
    """
    self._tasks, self._times, self._user_labels = cfg.labelled_tasks, times, user_labels
    self._columns = {n: i for i, n in enumerate(encoders.categorical)}
    self._sources = list(cfg.data.sources)
    self._answers = {
      n: make_event_answer(n, t, cfg.data, encoders) for n, t in self._tasks.items() if isinstance(t, config.EventLabel)
    }

  def __call__(self, history: UserHistory, snapshots: Snapshots, owner: int) -> dict[str, TaskLabels]:
    """The labels of a user who belongs to the split `owner` for user labels."""
    return {n: self._label(n, t, history, snapshots, owner) for n, t in self._tasks.items()}

  def _label(
    self, name: str, task: config.LabelledTask, history: UserHistory, snapshots: Snapshots, owner: int
  ) -> TaskLabels:
    times = self._times
    if isinstance(task, config.NextEvent):
      return TaskLabels(labels_lib.next_event(history, snapshots, self._columns[task.field], times))
    if isinstance(task, config.EventLabel):
      answer = self._answers[name]
      event = labels_lib.following_events(answer.carried(history), history, snapshots, task.per_snapshot, times)
      return TaskLabels(labels_lib.at_events(answer(history), event), event)
    if isinstance(task, config.UserLabel):
      return TaskLabels(labels_lib.user_label(self._user_labels[name].get(history.user), snapshots, owner))
    assert times is not None  # config.resolve rejects tasks about the future without a calendar
    if isinstance(task, config.FutureEvent):
      source = self._sources.index(task.source)
      return TaskLabels(labels_lib.future_event(history, snapshots, times, source, task.horizon_days, task.negate))
    column = self._columns[task.field]
    return TaskLabels(labels_lib.future_values(history, snapshots, times, column, task.top, task.horizon_days))
