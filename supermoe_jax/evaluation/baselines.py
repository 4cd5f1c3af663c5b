"""Computes a run's baselines: constant answers, popularity, last windows, own gaps, and models on aggregates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.snapshot_batches import Query
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.splits import TRAIN
from supermoe_jax.data.format.schema import make_comparison
from supermoe_jax.data.tasks import bind
from supermoe_jax.data.tasks.future_amount import FutureAmountKind
from supermoe_jax.data.tasks.labels import Labels
from supermoe_jax.data.tasks.sample_space import LabelComparison, supervision
from supermoe_jax.data.tasks.time_to_event import TimeToEventKind
from supermoe_jax.evaluation import linear_probes

# Users that the linear models on aggregates are fitted on. More users would not change a linear model of a few hundred
# inputs, and a record takes about a millisecond.
FITTED_USERS = 20_000

AT_ONCE = 1024  # questions whose aggregates are computed at a time


def popularity_ranks(target: np.ndarray, seen: Sequence[np.ndarray] | None) -> np.ndarray:
  """Returns the ranks of targets by frequency in the training period; codes follow that order, from 2.

  A question can have several targets. The rank is that of the most frequent one that can be recommended, and the other
  targets do not count against it. A question without such a target has an infinite rank.

  Args:
    target: int `[n, t]` or `[n]`, the codes of each question's targets. A code below 2 is no target: the value was
      unseen in training, or the question has fewer targets than t.
    seen: for each question, the codes that cannot be recommended; None: every code can.

  Returns: float `[n]`; 1 is best.
  """
  rank = np.full(len(target), np.inf)
  for i, codes in enumerate(target.reshape(len(target), -1)):
    hidden = seen[i] if seen is not None else np.zeros(0, np.int32)
    right = codes[(codes >= 2) & ~np.isin(codes, hidden)]
    if len(right):
      rank[i] = right.min() - 1 - np.sum((hidden >= 2) & (hidden < right.min()))
  return rank


def personal_ranks(dataset: Dataset, field: str, questions: Sequence[Query], target: np.ndarray) -> np.ndarray:
  """Returns the ranks of targets by frequency in the user's own history, then by frequency in the training period.

  `target [n, t]` is as in `popularity_ranks`.
  """
  column, n_codes = dataset.schema.field(field), dataset.schema.categorical[field]
  rank, target = np.full(len(target), np.inf), target.reshape(len(target), -1)
  user, codes = -1, np.zeros(0, np.int32)
  for i, question in enumerate(questions):
    if question.user != user:
      user, codes = question.user, dataset[question.user]["codes"][:, column]
    right = target[i][target[i] >= 2] - 2
    if not len(right):
      continue
    count = np.bincount(codes[: question.n_events], minlength=n_codes)[2:]
    item = min(right, key=lambda r: (-count[r], r))
    rank[i] = 1 + np.sum(count > count[item]) + np.sum(count[:item] == count[item])
  return rank


def constant(task: config.LabelledTask, rates: Sequence[float] | None, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the constant answer that fits the training labels best, for each of n questions.

  Shapes: `shape` is the answers' shape: `[n]`, `[n, values]` or `[n, C]`. `rates` holds the manifest's `label_rates` of
  the task: the share of positives, of each value or class, or by each edge, or the mean. A number without a rate is
  standardised, so its mean is 0.
  """
  if rates is None and task.answer == "regression":
    return np.zeros(shape)
  assert rates is not None
  return np.broadcast_to(np.array(rates, np.float64) if len(shape) == 2 else rates[0], shape)


def last_window(
  dataset: Dataset, cfg: config.Config, name: str, questions: Sequence[Query], at_once: int = AT_ONCE
) -> np.ndarray:
  """Returns the amount of the window before each of n questions: float64 `[n]`; `name` is a task about an amount."""
  kind = bind({name: cfg.labelled_tasks[name]}, cfg.data, dataset.encoders)[name]
  assert isinstance(kind, FutureAmountKind)
  return _by_history(dataset, kind.before, questions, at_once)


def own_gaps(
  dataset: Dataset, cfg: config.Config, name: str, questions: Sequence[Query], at_once: int = AT_ONCE
) -> np.ndarray:
  """Returns the days to the next event by each of n questions' user's own gaps: float64 `[n]`.

  `name` is a task about the time to an event.
  """
  kind = bind({name: cfg.labelled_tasks[name]}, cfg.data, dataset.encoders)[name]
  assert isinstance(kind, TimeToEventKind)
  return _by_history(dataset, kind.by_own_gaps, questions, at_once)


def _by_history(
  dataset: Dataset,
  answer: Callable[[UserBlock, np.ndarray, np.ndarray, np.ndarray], np.ndarray],
  questions: Sequence[Query],
  at_once: int,
) -> np.ndarray:
  parts = [np.zeros(0)]
  for start in range(0, len(questions), at_once):
    part = questions[start : start + at_once]
    users, owner = np.unique([q.user for q in part], return_inverse=True)
    time, n_events = (np.array([getattr(q, k) for q in part], np.int64) for k in ("time", "n_events"))
    parts.append(answer(dataset.histories(users), owner, time, n_events))
  return np.concatenate(parts)


class AggregateModels:
  """Models on the hand-made aggregates alone, one for each task whose labels belong to snapshots.

  They are linear; of amounts and times they are boosted trees. Each model is fitted on every user's last training
  snapshot that has a label of the task, in the task's sample space if it has one. A model of times is fitted on one of
  these snapshots in turn, because the last ones are followed for a short time only.
  """

  def __init__(self, dataset: Dataset, cfg: config.Config):
    """Fits the models of the config's active tasks."""
    self._dataset = dataset
    self._probes: dict[str, linear_probes.Predictor] = {}
    answers = {n: t.answer for n, t in cfg.active_views.items() if not t.asks_at_events}
    if not dataset.schema.aggregates or not answers:
      return
    named = (config.parse_sample_space(cfg.labelled_tasks[n].sample_space) for n in answers)
    compared = {space.task: cfg.labelled_tasks[space.task] for space in named if space is not None}
    kinds = bind(compared, cfg.data, dataset.encoders)
    spaces = {n: make_comparison(cfg.labelled_tasks, kinds, n) for n in answers}
    xs: dict[str, list[np.ndarray]] = {t: [] for t in answers}
    ys: dict[str, list[np.ndarray]] = {t: [] for t in answers}
    for index in range(min(len(dataset), FITTED_USERS)):  # records are shuffled: any prefix is a sample
      record = dataset[index]
      train = record["snapshot_split"] == TRAIN
      fitted: dict[str, np.ndarray] = {}
      for task, answer in answers.items():
        known = np.flatnonzero(train & _known(record, cfg.active_views[task], task, spaces[task]))
        first = index % max(len(known), 1) if answer == "survival" else -1
        fitted[task] = known[first:][:1]
      at = np.unique(np.concatenate([*fitted.values(), np.zeros(0, np.int64)])).astype(np.int64)
      history = dataset.history(record)
      seen = record["snapshot_time"][at], record["snapshot_events"][at]
      rows = dataset.aggregates(history.block, np.zeros(len(at), np.int64), *seen)
      for task, snapshot in fitted.items():
        if len(snapshot):
          xs[task].append(rows[np.searchsorted(at, snapshot[0])])
          ys[task].append(record[f"label_{task}"][snapshot[0]])
    for task, answer in answers.items():
      if ys[task]:
        x, y = np.array(xs[task]), np.array(ys[task])
        asked = cfg.active_views[task]
        if isinstance(asked, config.TimeToEvent):
          self._probes[task] = linear_probes.HazardProbe(x, y, asked.edges)
        else:
          self._probes[task] = linear_probes.fit_probe(answer, x, y, dataset.schema.outputs[task])

  def predictions(self, questions: Sequence[Query]) -> dict[str, np.ndarray]:
    """Returns the answers for each task to each question; empty without aggregates.

    Answers are probabilities `[n]`, `[n, values]`, `[n, C]` or by each edge `[n, K]`, or numbers `[n]`.
    """
    if not self._probes:
      return {}
    parts: dict[str, list[np.ndarray]] = {t: [] for t in self._probes}
    for start in range(0, len(questions), AT_ONCE):
      rows = at_questions(self._dataset, questions[start : start + AT_ONCE])
      for task, probe in self._probes.items():
        parts[task].append(probe(rows))
    return {t: np.concatenate(p) for t, p in parts.items()}


def at_questions(dataset: Dataset, questions: Sequence[Query]) -> np.ndarray:
  """Returns the standardised aggregates at questions: float32 `[n, A]`."""
  users, owner = np.unique([q.user for q in questions], return_inverse=True)
  block = dataset.histories(users)
  return dataset.aggregates(
    block, owner, np.array([q.time for q in questions]), np.array([q.n_events for q in questions])
  )


def _known(
  record: Mapping[str, Any], task: config.LabelledTask, name: str, space: LabelComparison | None
) -> np.ndarray:
  """Returns whether the task has a label in its sample space at each snapshot: bool `[S]`."""
  inside = space and space(Labels(record[f"label_{space.task}"], record[f"known_{space.task}"] > 0))
  return supervision(record[f"known_{name}"] > 0, inside, (task.in_space_weight, 0.0))[0]
