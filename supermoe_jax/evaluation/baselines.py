"""Computes a run's baselines, rankings aside: constant answers, last windows, own gaps, and models on aggregates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.dataset import user_folds
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.snapshot_batches import Query
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.splits import TRAIN, VALIDATION
from supermoe_jax.data.format.schema import make_comparison
from supermoe_jax.data.tasks import bind
from supermoe_jax.data.tasks.future_amount import FutureAmountKind
from supermoe_jax.data.tasks.labels import Labels
from supermoe_jax.data.tasks.sample_space import LabelComparison, supervision
from supermoe_jax.data.tasks.time_to_event import TimeToEventKind
from supermoe_jax.evaluation import probes
from supermoe_jax.evaluation.answer_forms import form_of

# Users that the models on aggregates are fitted on. More users would not change a linear model of a few hundred inputs,
# and a record takes about a millisecond.
FITTED_USERS = 20_000

# Training snapshots that a model on aggregates is fitted on, at most. A few snapshots a user make it clearly better
# than one, many hardly more so: of 2,430 users of Complete Journey 8 each lift the AUC of a costly purchase from .798
# to .825, and 24 each to .829.
FITTED_SNAPSHOTS = 20_000

# Names of baselines in tables, beside each form's usual model on aggregates.
TREES, OWN_COUNTS = "aggregates + boosted trees", "own counts + logistic"

AT_ONCE = 1024  # questions whose aggregates are computed at a time


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


class FittedModel(NamedTuple):
  """A model on aggregates.

  Attributes:
    predict: the model.
    snapshots: the number of training snapshots that it is fitted on.
    users: the number of their users.
    loss: the loss of boosted trees; empty for linear models.
  """

  predict: probes.Predictor
  snapshots: int
  users: int
  loss: str = ""

  def described(self) -> dict[str, Any]:
    """Returns the counts and the loss, as `evaluation.json` holds them."""
    counts: dict[str, Any] = {"snapshots": self.snapshots, "users": self.users}
    return {**counts, "loss": self.loss} if self.loss else counts


class AggregateModels:
  """Models on the hand-made aggregates alone, for each task whose labels belong to snapshots.

  They are linear, and of yes or no boosted trees too; of amounts they are boosted trees, with the loss that is better
  on validation snapshots, and of times boosted trees of the hazards. Of several values whose counts are all among the
  aggregates they are linear models of the user's own counts of the value and of all that counts no value.

  Each model is fitted on training snapshots that have a label of the task, in the task's sample space if it has one:
  every user's last one, and others drawn by a seed, at most `FITTED_SNAPSHOTS` in all. A label of the table of users is
  the same at all of them, and a linear model of all aggregates for each of several values takes long; these are fitted
  on the users' last ones alone. The last ones are followed for a short time only, so a model of times is fitted on
  drawn ones alone, a quarter as many, because each is a row for every interval.

  Attributes:
    fitted: the models of each task, by the baselines' names.
  """

  def __init__(self, dataset: Dataset, cfg: config.Config):
    """Fits the models of the config's active tasks."""
    self._dataset = dataset
    self.fitted: dict[str, dict[str, FittedModel]] = {}
    tasks = {n: t for n, t in cfg.active_views.items() if not t.asks_at_events}
    if not dataset.schema.aggregates or not tasks:
      return
    named = (config.parse_sample_space(cfg.labelled_tasks[n].sample_space) for n in tasks)
    compared = {space.task: cfg.labelled_tasks[space.task] for space in named if space is not None}
    kinds = bind(compared, cfg.data, dataset.encoders)
    spaces = {n: make_comparison(cfg.labelled_tasks, kinds, n) for n in tasks}
    rows = {n: _Rows() for n in tasks}
    held = {n: _Rows() for n, t in tasks.items() if t.answer == "amount"}
    users = min(len(dataset), FITTED_USERS)
    most = max(FITTED_SNAPSHOTS // max(users, 1), 1)
    counts = {n: self._own_counts(n, t) for n, t in tasks.items() if t.answer == "multilabel"}
    last_only = {n for n, t in tasks.items() if t.user_column} | {n for n, columns in counts.items() if columns is None}
    each = {n: 1 if n in last_only else most for n in tasks}
    each |= {n: max(most // 4, 1) for n, t in tasks.items() if t.answer == "survival"}
    rng = np.random.default_rng(0)
    for index in range(users):  # records are shuffled: any prefix is a sample
      record = user_folds.dealt_record(dataset[index], cfg)
      known = {n: _known(record, t, n, spaces[n]) for n, t in tasks.items()}
      split = record["snapshot_split"]
      fit = {n: _fitted(np.flatnonzero((split == TRAIN) & known[n]), each[n], t, rng) for n, t in tasks.items()}
      validate = {n: np.flatnonzero((split == VALIDATION) & known[n])[-1:] for n in held}
      at = np.unique(np.concatenate([*fit.values(), *validate.values()]))
      history = dataset.history(record)
      seen = record["snapshot_time"][at], record["snapshot_events"][at]
      inputs = dataset.aggregates(history.block, np.zeros(len(at), np.int64), *seen)
      for kept, chosen in ((rows, fit), (held, validate)):
        for name, snapshots in chosen.items():
          kept[name].add(inputs[np.searchsorted(at, snapshots)], record[f"label_{name}"][snapshots])
    for name, task in tasks.items():
      if not rows[name].users:
        continue
      x, y = rows[name].arrays()
      made: dict[str, probes.Predictor] = {}
      usual, loss = form_of(task).aggregate_model, ""
      if task.answer == "amount":
        held_rows = held[name].arrays() if held[name].users else (x[:0], y[:0])
        probe = probes.fit_amount_probe(x, y, *held_rows)
        made[usual], loss = probe, probe.loss
      elif isinstance(task, config.TimeToEvent):
        made[usual] = probes.HazardProbe(x, y, task.edges)
      elif (columns := counts.get(name)) is not None:
        made[OWN_COUNTS] = probes.OwnCountsProbe(x, y, columns)
      else:
        made[usual] = probes.fit_probe(task.answer, x, y, dataset.schema.outputs[name])
      if task.answer == "binary":
        made[TREES] = probes.TreesProbe(x, y)
      self.fitted[name] = {n: FittedModel(p, len(y), rows[name].users, loss) for n, p in made.items()}

  def _own_counts(self, name: str, task: config.LabelledTask) -> list[np.ndarray] | None:
    """Returns the aggregates that a model of each value reads: its counts, and what counts no value.

    None if not all values are counted.
    """
    schema = self._dataset.schema
    counts = schema.value_counts.get(cast(config.FutureValues, task).field)
    if counts is None or counts.values < schema.outputs[name]:
      return None
    every = np.arange(schema.aggregates)
    assert self._dataset.aggregator is not None  # it has counts
    # Factors are left out: with them the regressions of rare values are worse.
    others = [every[c.columns] for c in schema.value_counts.values()] + [every[self._dataset.aggregator.factor_columns]]
    plain = np.setdiff1d(every, np.concatenate(others))
    own = every[counts.columns].reshape(counts.windows, counts.values).T
    return [np.concatenate([plain, columns]) for columns in own[: schema.outputs[name]]]

  def predictions(self, questions: Sequence[Query]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the answers for each task, by the baselines' names, to each question; empty without aggregates.

    Answers are probabilities `[n]`, `[n, values]`, `[n, C]` or by each edge `[n, K]`, or numbers `[n]`.
    """
    if not self.fitted:
      return {}
    parts: dict[str, dict[str, list[np.ndarray]]] = {t: {n: [] for n in m} for t, m in self.fitted.items()}
    for start in range(0, len(questions), AT_ONCE):
      rows = at_questions(self._dataset, questions[start : start + AT_ONCE])
      for task, models in self.fitted.items():
        for name, model in models.items():
          parts[task][name].append(model.predict(rows))
    return {t: {n: np.concatenate(p) for n, p in of_task.items()} for t, of_task in parts.items()}


class _Rows:
  """Aggregates and labels of snapshots, user by user."""

  def __init__(self) -> None:
    self.users = 0
    self._parts: list[tuple[np.ndarray, np.ndarray]] = []

  def add(self, x: np.ndarray, y: np.ndarray) -> None:
    """Adds the snapshots of a user, which may be none."""
    if len(y):
      self.users += 1
      self._parts.append((x, y))

  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the aggregates `[n, A]` and the labels `[n, …]` of at least one user."""
    xs, ys = zip(*self._parts, strict=True)
    return np.concatenate(xs), np.concatenate(ys)


def _fitted(snapshots: np.ndarray, most: int, task: config.LabelledTask, rng: np.random.Generator) -> np.ndarray:
  """Returns at most `most` of a user's snapshots, drawn at random, in ascending order; the last is always there.

  For times to an event the last one is drawn as all others.
  """
  if len(snapshots) <= most:
    return snapshots
  if task.answer == "survival":
    return np.sort(rng.choice(snapshots, most, replace=False))
  others = rng.choice(snapshots[:-1], most - 1, replace=False)
  return np.append(np.sort(others), snapshots[-1])


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
