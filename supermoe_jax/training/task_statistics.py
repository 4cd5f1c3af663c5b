"""Measures the tasks on training rows before the first step: label rates, and the best constant answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE, Batch
from supermoe_jax.training.answer_forms import form_by_loss
from supermoe_jax.training.task_losses import TaskStatistics

# `measure_tasks` reads at most this many times `n_batches` while it waits for rare labels.
LONGEST = 16


class Measured(NamedTuple):
  """The measures of the tasks: `statistics` of each task, and `answers` of each task with labels.

  An answer is float32 `[outputs]`, the constant that fits the training labels best, such as the logit of their rate;
  the task's head starts there. `full_moments` is the share of a task's labels whose moment has as many values as count,
  or more, for tasks about moments.
  """

  statistics: dict[str, TaskStatistics]
  answers: dict[str, np.ndarray]
  full_moments: dict[str, float]


class _LabelSums:
  """Sums over a task's labels so far: their number, Σω and Σω² at events and at snapshots, and the labels' moments."""

  def __init__(self, outputs: int):
    self.labels = self.owners = 0  # owners: the users with a label, of each row
    self.at_events = self.at_snapshots = 0.0
    self.squares_at_events = self.squares_at_snapshots = 0.0  # Σω²
    self.first, self.second = np.zeros(outputs), np.zeros(outputs)
    self.sets: list[tuple[np.ndarray, np.ndarray]] = []  # the codes of moments of several values, and their weights

  @property
  def weight(self) -> float:
    """Returns Σω."""
    return self.at_events + self.at_snapshots


def measure_tasks(
  tasks: Mapping[str, config.Task],
  outputs: Mapping[str, int],
  batches: Iterable[Batch],
  n_batches: int,
  wanted: Mapping[str, int] | None = None,
) -> Measured:
  """Measures each task's label rate, constant loss and constant answer over `n_batches` training batches.

  Reads more batches, up to `LONGEST` times as many, while a task has met fewer labels than its number in `wanted`.
  """
  rows = 0
  sums = {n: _LabelSums(outputs.get(n, 1)) for n in tasks}
  size = 1
  for i, batch in enumerate(itertools.islice(batches, LONGEST * n_batches)):
    if i >= n_batches and all(sums[n].labels >= least for n, least in (wanted or {}).items()):
      break
    size = len(batch.features.length)
    rows += size
    for name, task in tasks.items():
      _add(sums[name], name, task, batch)
  answers = {
    n: form_by_loss(t).constant_answer(sums[n].first, sums[n].second, sums[n].weight).astype(np.float32)
    for n, t in tasks.items()
    if t.has_labels
  }
  full = {n: float(np.mean([(c > 0).all(axis=1).mean() for c, _ in s.sets])) for n, s in sums.items() if s.sets}
  return Measured({n: _statistics(tasks[n], sums[n], rows, size) for n in tasks}, answers, full)


def _add(sums: _LabelSums, name: str, task: config.Task, batch: Batch) -> None:
  if not task.has_labels:
    pairs = int(np.sum(batch.slices[name].known))
    sums.labels += pairs
    sums.owners += pairs
    sums.at_snapshots += 2.0 * pairs  # each slice must find the other
    sums.squares_at_snapshots += 2.0 * pairs
    return
  targets = batch.targets[name]
  known = np.asarray(targets.known)
  events = batch.features.codes.shape[1] if task.asks_at_events else 0
  sums.labels += int(known.sum())
  if task.user_column:
    segment = np.asarray(batch.features.query_segment)
    sums.owners += sum(len(np.unique(segment[i][known[i]])) for i in range(len(known)))
  weights = np.asarray(targets.weight, np.float64)
  sums.at_events += float(weights[:, :events].sum())
  sums.at_snapshots += float(weights[:, events:].sum())
  sums.squares_at_events += float(np.square(weights[:, :events]).sum())
  sums.squares_at_snapshots += float(np.square(weights[:, events:]).sum())
  value, weight = targets.value[known], targets.weight[known].astype(np.float64)
  if targets.also.shape[-1]:
    codes = np.concatenate([value[:, None], targets.also[known]], axis=1)
    sums.sets.append((codes, weight))
    there = codes > 0
    value, weight = codes[there], np.repeat(weight / there.sum(axis=1), there.sum(axis=1))
  first, second = form_by_loss(task).moments(value, weight, len(sums.first))
  sums.first += first
  sums.second += second


def _statistics(task: config.Task, sums: _LabelSums, rows: int, size: int) -> TaskStatistics:
  weight = sums.weight
  if not task.has_labels:
    slices = weight / max(rows, 1) * size
    constant_loss = math.log(slices - 1) if slices > 3 else 1.0
    return TaskStatistics(weight / max(rows, 1), constant_loss, 1.0, *_independent_labels(task, sums, rows, 1.0))
  constant_loss, rate, of_snapshot = _constant_loss(task, sums, weight), weight / max(rows, 1), 1.0
  if sums.at_events and sums.at_snapshots:
    rate, of_snapshot = 2 * sums.at_events / rows, sums.at_events / sums.at_snapshots
  return TaskStatistics(rate, constant_loss, of_snapshot, *_independent_labels(task, sums, rows, of_snapshot))


def _independent_labels(task: config.Task, sums: _LabelSums, rows: int, of_snapshot: float) -> tuple[float, float]:
  """Returns `independent` and `averaged` of `TaskStatistics`; 1 and 1 without a label.

  All snapshots of a user ask for one label of the user, which counts once; so does a pair of slices, whose two
  directions are nearly copies. Weights that differ make labels count for less: Σω labels of weight 1 count as (Σω)² /
  Σω². Each value of a multi-label answer is a label.
  """
  if not sums.weight:
    return 1.0, 1.0
  if sums.owners:
    return sums.owners / rows, sums.owners / rows
  total = sums.at_events + of_snapshot * sums.at_snapshots
  squares = sums.squares_at_events + of_snapshot**2 * sums.squares_at_snapshots
  values = len(sums.first) if task.answer == "multilabel" else 1
  return values * total**2 / squares / rows, total / rows


def _constant_loss(task: config.Task, sums: _LabelSums, weight: float) -> float:
  """Returns the mean loss of the best constant answer; 1 if that is 0 (there is no label, or all labels are alike)."""
  loss = form_by_loss(task).constant_loss(sums.first, sums.second, weight)
  if sums.sets:  # the loss of an answer by frequency, where any of a moment's values is right
    share = np.append(sums.first / max(weight, 1e-12), 0.0)
    codes, weights = (np.concatenate(part) for part in zip(*sums.sets))
    any_right = share[np.where(codes > 0, codes - FIRST_VALUE, -1)].sum(axis=1)
    loss = float(np.average(-np.log(any_right), weights=weights))
  return loss if loss > 1e-6 else 1.0
