"""What the manifest says of the records, counted as they pass by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from supermoe_jax import config
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data.dataset import Schema
from supermoe_jax.data.events import UserHistory
from supermoe_jax.data.labels import Labels, Snapshots
from supermoe_jax.data.vocabulary import Classes, Encoders

# Aggregates are divided by their standard deviation, but never by less: a count that is nearly always 0 would otherwise
# become huge when it is 1.
SMALLEST_SCALE = 0.25

# Standardised numbers that deviate by less are all the same but for rounding.
SMALLEST_DEVIATION = 1e-4


class Tally:
  """What the manifest says of the records, counted as they pass by."""

  def __init__(self, schema: Schema, tasks: Mapping[str, config.LabelledTask], encoders: Encoders):
    self._answers = {n: config.answer(t) for n, t in tasks.items()}
    self._outputs, self._encoders = schema.outputs, encoders
    self.lengths: list[int] = []
    self.integer_users = True
    self._known = {n: [0] * len(labels_lib.SPLITS) for n in tasks}
    # Of each split the sum of the values, or of a catalogue how many are unseen in training; and of their squares.
    shape = {n: 1 if a == "catalogue" else schema.outputs[n] for n, a in self._answers.items()}
    self._totals = {n: np.zeros((len(labels_lib.SPLITS), 2, k)) for n, k in shape.items()}
    self.snapshots = dict.fromkeys(labels_lib.SPLITS, 0)
    self.too_early = 0
    self.repeated = 0
    self.without_training = 0
    self.without_snapshot = 0
    self.periods = dict.fromkeys(("training", "later", "beyond_every_label"), 0)
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
        value = label.value[label.known & (here if label.known.ndim == 1 else here[:, None])]
        self._known[task][index] += len(value)
        self._totals[task][index] += self._total(task, value)

  def _total(self, task: str, value: np.ndarray) -> np.ndarray:
    answer, outputs = self._answers[task], self._outputs[task]
    if answer == "catalogue":
      per_output = np.array([np.sum(value == 1)])
    elif answer == "multiclass":
      per_output = np.bincount(value.astype(np.int64), minlength=outputs)
    else:
      per_output = value.reshape(len(value), outputs).sum(axis=0, dtype=np.float64)
    squares = np.square(value, dtype=np.float64).sum() if answer == "regression" else per_output
    return np.stack([per_output, np.broadcast_to(squares, per_output.shape)])

  @property
  def labels(self) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each task and split the labels known, and what they say.

    That is `positive`, how many are; `classes`, how many labels each has; `mean` and `std` of standardised numbers; of
    a catalogue `unseen_value`, how many values training could not teach. Sample spaces are not applied.
    """
    return {n: {s: self._count(n, i) for s, i in labels_lib.SPLITS.items()} for n in self._answers}

  def _count(self, task: str, split: int) -> dict[str, Any]:
    known, (total, squares) = self._known[task][split], self._totals[task][split]
    answer = self._answers[task]
    if answer == "multiclass":
      classes = self._encoders.labels[task]
      assert isinstance(classes, Classes)
      return {"known": known, "classes": {v: int(n) for v, n in zip(classes.values, total, strict=True)}}
    if answer == "regression":
      mean = float(total[0] / max(known, 1))
      return {"known": known, "mean": mean, "std": float(np.sqrt(max(squares[0] / max(known, 1) - mean**2, 0.0)))}
    return {"known": known, "unseen_value" if answer == "catalogue" else "positive": int(total.sum())}

  def add_aggregates(self, aggregates: np.ndarray) -> None:
    """Takes training snapshots' aggregates `[S, A]` into the statistics."""
    self._sums += np.stack([aggregates.sum(0, dtype=np.float64), np.square(aggregates, dtype=np.float64).sum(0)])
    self._rows += len(aggregates)

  def label_rates(self) -> dict[str, list[float]]:
    """The best constant answers to the training labels of each task but next event: of each output the share of
    positives or of the class, or the mean of the standardised numbers."""
    train = labels_lib.TRAIN
    return {
      n: (self._totals[n][train, 0] / max(self._known[n][train], 1)).tolist()
      for n, answer in self._answers.items()
      if answer != "catalogue"
    }

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
        elif count.get("positive") in (0, values) or max(count.get("classes", {"": 0}).values()) == count["known"]:
          out.append(f"task {task} has labels of one class only in {split}")
        elif count.get("std") is not None and count["std"] < SMALLEST_DEVIATION:
          out.append(f"every label of task {task} in {split} is the same number")
        elif count.get("unseen_value") == count["known"]:
          out.append(f"every label of task {task} in {split} is a value unseen in training")
    return out
