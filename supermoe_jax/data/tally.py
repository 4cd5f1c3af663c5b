"""What the manifest says of the records, counted as they pass by."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from supermoe_jax import config
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data.dataset import Schema
from supermoe_jax.data.events import UserHistory
from supermoe_jax.data.labels import Labels, Snapshots

# Aggregates are divided by their standard deviation, but never by less: a count that is nearly always 0 would otherwise
# become huge when it is 1.
SMALLEST_SCALE = 0.25


class Tally:
  """What the manifest says of the records, counted as they pass by."""

  def __init__(self, schema: Schema, tasks: Mapping[str, config.Task]):
    self._tasks, self._outputs = tasks, schema.outputs
    self.lengths: list[int] = []
    self.integer_users = True
    self._positive = {n: np.zeros(schema.outputs[n]) for n, t in tasks.items() if not isinstance(t, config.NextEvent)}
    self.snapshots = dict.fromkeys(labels_lib.SPLITS, 0)
    self.too_early = 0
    self.without_training = 0
    self.without_snapshot = 0
    self.periods = dict.fromkeys(("training", "later", "beyond_every_label"), 0)
    kinds = {n: "unseen_value" if isinstance(t, config.NextEvent) else "positive" for n, t in tasks.items()}
    self.labels = {n: {s: {"known": 0, kind: 0} for s in labels_lib.SPLITS} for n, kind in kinds.items()}
    self._sums = np.zeros((2, schema.aggregates))
    self._rows = 0

  def add(self, history: UserHistory, snapshots: Snapshots, labels: Mapping[str, Labels], last_use: int | None) -> None:
    """Counts a user; events at or after `last_use` (microseconds) lie in no label window and before no snapshot."""
    beyond = 0 if last_use is None else len(history.time) - int(np.searchsorted(history.time, last_use))
    self.periods["training"] += history.n_train
    self.periods["later"] += len(history.time) - history.n_train - beyond
    self.periods["beyond_every_label"] += beyond
    self.lengths.append(len(history.time))
    self.integer_users &= re.fullmatch(r"0|-?[1-9]\d{0,17}", history.user) is not None
    self.without_training += history.n_train == 0
    self.without_snapshot += len(snapshots.time) == 0
    for split, index in labels_lib.SPLITS.items():
      here = snapshots.split == index
      self.snapshots[split] += int(here.sum())
      for task, label in labels.items():
        count, value = self.labels[task][split], label.value[label.known & here]
        count["known"] += len(value)
        if isinstance(self._tasks[task], config.NextEvent):
          count["unseen_value"] += int(np.sum(value == 1))
        else:
          count["positive"] += int(value.sum())
          if index == labels_lib.TRAIN:
            self._positive[task] += value.reshape(len(value), self._outputs[task]).sum(axis=0)

  def add_aggregates(self, aggregates: np.ndarray) -> None:
    """Takes training snapshots' aggregates `[S, A]` into the statistics."""
    self._sums += np.stack([aggregates.sum(0, dtype=np.float64), np.square(aggregates, dtype=np.float64).sum(0)])
    self._rows += len(aggregates)

  def label_rates(self) -> dict[str, list[float]]:
    """Of each task of yes-or-no answers, the share of positives of each among the training labels."""
    return {n: (p / max(self.labels[n]["train"]["known"], 1)).tolist() for n, p in self._positive.items()}

  def aggregate_statistics(self) -> dict[str, list[float]]:
    """Mean and scale of each aggregate over the training snapshots."""
    mean, square = self._sums / max(self._rows, 1)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    # An aggregate that training never varies teaches nothing; divided by this it stays 0 whatever it is later.
    scale = np.where(deviation > 1e-6, np.maximum(deviation, SMALLEST_SCALE), 1e30)
    return {"mean": mean.tolist(), "scale": scale.tolist()}

  def warnings(self) -> list[str]:
    """What a user should know before training on these labels."""
    out = []
    for task, splits in self.labels.items():
      for split, count in splits.items():
        values = count["known"] * self._outputs[task]
        if not count["known"]:
          out.append(f"task {task} has no label in {split}")
        elif count.get("positive") in (0, values):
          out.append(f"task {task} has labels of one class only in {split}")
        elif count.get("unseen_value") == count["known"]:
          out.append(f"every label of task {task} in {split} is a value unseen in training")
    return out
