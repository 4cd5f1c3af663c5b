"""What a run is compared with: constants, popularity, and hand-made aggregates with a linear model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from supermoe_jax import config
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data.batches import Question
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.evaluation import probes

# Users that the logistic regressions on aggregates are fitted on; more would not change a linear model of a few hundred
# inputs, and a record costs about a millisecond.
FITTED_USERS = 20_000


def popularity_ranks(target: np.ndarray, seen: Sequence[np.ndarray] | None) -> np.ndarray:
  """Ranks targets by frequency in the training period; codes are in that order, from 2.

  Shapes: `target [n]` codes (1: unseen in training, never ranked); `seen` codes that cannot be recommended.
  """
  rank = np.where(target >= 2, target - 1.0, np.inf)
  for i, codes in enumerate(seen or ()):
    rank[i] = np.inf if target[i] in codes else rank[i] - np.sum((codes >= 2) & (codes < target[i]))
  return rank


def personal_ranks(dataset: Dataset, field: str, questions: Sequence[Question], target: np.ndarray) -> np.ndarray:
  """Ranks targets by how often they occur in the user's own history, then by frequency in the training period."""
  column, n_codes = dataset.schema.field(field), dataset.schema.categorical[field]
  rank = np.full(len(target), np.inf)
  user, codes = -1, np.zeros(0, np.int32)
  for i, question in enumerate(questions):
    if question.user != user:
      user, codes = question.user, dataset[question.user]["codes"][:, column]
    if target[i] < 2:
      continue
    count = np.bincount(codes[: question.n_events], minlength=n_codes)[2:]
    mine, item = count[target[i] - 2], target[i] - 2
    rank[i] = 1 + np.sum(count > mine) + np.sum(count[:item] == mine)
  return rank


class AggregateModels:
  """Logistic regressions on the hand-made aggregates alone, one for each task but next event.

  Each is fitted on every user's last training snapshot that has a label of the task.
  """

  def __init__(self, dataset: Dataset, tasks: Sequence[str]):
    self._dataset = dataset
    self._probes: dict[str, probes.Probe] = {}
    tasks = [t for t in tasks if not isinstance(dataset.config.tasks[t], config.NextEvent)]
    if not dataset.schema.aggregates or not tasks:
      return
    xs: dict[str, list[np.ndarray]] = {t: [] for t in tasks}
    ys: dict[str, list[np.ndarray]] = {t: [] for t in tasks}
    for index in range(min(len(dataset), FITTED_USERS)):  # records are shuffled: any prefix is a sample
      record = dataset[index]
      train = record["snapshot_split"] == labels_lib.TRAIN
      last = {t: np.flatnonzero(train & (record[f"known_{t}"] > 0))[-1:] for t in tasks}
      at = np.unique(np.concatenate([*last.values(), np.zeros(0, np.int64)])).astype(np.int64)
      history = dataset.history(record)
      rows = dataset.aggregates(history, record["snapshot_time"][at], record["snapshot_events"][at])
      for task, snapshot in last.items():
        if len(snapshot):
          xs[task].append(rows[np.searchsorted(at, snapshot[0])])
          ys[task].append(record[f"label_{task}"][snapshot[0]])
    self._probes = {t: probes.Probe(np.array(xs[t]), np.array(ys[t], np.float32)) for t in tasks if ys[t]}

  def scores(self, questions: Sequence[Question]) -> dict[str, np.ndarray]:
    """Probabilities of each task for each question: `[n]` or `[n, values]`; empty without aggregates."""
    if not self._probes:
      return {}
    parts: dict[str, list[np.ndarray]] = {t: [] for t in self._probes}
    for start in range(0, len(questions), 4096):
      rows = []
      for question in questions[start : start + 4096]:
        history = self._dataset.history(self._dataset[question.user])
        rows.append(self._dataset.aggregates(history, np.array([question.time]), np.array([question.n_events]))[0])
      for task, probe in self._probes.items():
        parts[task].append(probe(np.array(rows)))
    return {t: np.concatenate(p) for t, p in parts.items()}
