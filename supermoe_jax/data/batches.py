"""From a dataset to batches: windows of a history with several snapshots for training, one snapshot a row otherwise.

The pipeline is Grain's: deterministic by seed, randomly accessible, and its position can be saved and restored.

Shapes: B rows, L events, S snapshots, F categorical and G numeric fields, A aggregates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data import labels as labels_lib
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.events import UserHistory
from supermoe_jax.data.labels import Labels

MICROSECONDS_PER_HOUR = MICROSECONDS_PER_DAY // 24

# Numbers that describe a moment in the calendar; see `calendar_phases`.
CALENDAR = 6

# A training stream is endless for all purposes; Grain overflows where it has truly no end.
MOST_ROWS = 2**48


# A NumPy array on the host, a JAX array inside a step.
Array = Any


class Features(NamedTuple):
  """What the encoder sees.

  Attributes:
    codes: int32 `[B, L, F]`; 0 absent or padding.
    source: int32 `[B, L]`; 0 padding, otherwise 1 + the source's index.
    numeric: float32 `[B, L, G]`; NaN absent or padding.
    calendar: float32 `[B, L, 6]`, phases of day, week and year.
    time: float32 `[B, L]`, hours since the row's first event.
    gap: float32 `[B, L]`, hours since the user's previous event; 0 for the first.
    length: int32 `[B]`, events that are not padding.
    query_events: int32 `[B, S]`, how many of the row's events a snapshot sees.
    query_valid: bool `[B, S]`, whether there is a snapshot.
    query_time: float32 `[B, S]`, hours since the row's first event.
    query_gap: float32 `[B, S]`, hours since the last event that the snapshot sees.
    query_calendar: float32 `[B, S, 6]`.
    query_aggregates: float32 `[B, S, A]`, standardised.
  """

  codes: Array
  source: Array
  numeric: Array
  calendar: Array
  time: Array
  gap: Array
  length: Array
  query_events: Array
  query_valid: Array
  query_time: Array
  query_gap: Array
  query_calendar: Array
  query_aggregates: Array


class Targets(NamedTuple):
  """A task's answers for a batch; a next-event task asks at every event and every snapshot, the others at snapshots.

  Attributes:
    value: `[B, S]`, `[B, S, values]`, or int32 `[B, L + S]` codes for a next event.
    known: bool `[B, S]` or `[B, L + S]`: the supervision indicator δ.
  """

  value: Array
  known: Array


class Batch(NamedTuple):
  """`features`, and the `targets` of each task."""

  features: Features
  targets: dict[str, Targets]


def calendar_phases(time: np.ndarray) -> np.ndarray:
  """Sine and cosine of the phase of the day, the week and the year: float32 `[…, 6]` of microseconds `[…]`."""
  periods = np.array([1.0, 7.0, 365.2425]) * MICROSECONDS_PER_DAY
  angle = 2 * np.pi * ((time[..., None] % periods) / periods)
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


def window(
  dataset: Dataset,
  history: UserHistory,
  start: int,
  stop: int,
  snapshot_time: np.ndarray,
  snapshot_events: np.ndarray,
  max_events: int,
  n_snapshots: int,
) -> Features:
  """Lays out the events [start, stop) of a history and snapshots of it as one row (no batch dimension).

  Snapshots see the events [start, snapshot_events); their aggregates see the whole history before τ.
  """
  n, s = stop - start, len(snapshot_time)
  if n > max_events or s > n_snapshots:
    raise ValueError(f"{n} events and {s} snapshots do not fit a row of {max_events} and {n_snapshots}")
  time = history.time[start:stop]
  previous = history.time[max(start - 1, 0) : stop - 1] if start else np.append(time[:1], time[:-1])
  origin = time[0] if n else (snapshot_time[0] if s else 0)

  def pad(x: np.ndarray, size: int, dtype: Any, fill: float = 0) -> np.ndarray:
    out = np.full((size, *x.shape[1:]), fill, dtype)
    out[: len(x)] = x
    return out

  def hours(x: np.ndarray) -> np.ndarray:
    return x / MICROSECONDS_PER_HOUR

  aggregates = dataset.aggregates(history, snapshot_time, snapshot_events)
  last = history.time[np.maximum(snapshot_events - 1, 0)]
  return Features(
    codes=pad(history.codes[start:stop], max_events, np.int32),
    source=pad(history.source[start:stop] + 1, max_events, np.int32),
    numeric=pad(history.numeric[start:stop], max_events, np.float32, np.nan),
    calendar=pad(calendar_phases(time), max_events, np.float32),
    time=pad(hours(time - origin), max_events, np.float32),
    gap=pad(hours(time - previous), max_events, np.float32),
    length=np.int32(n),
    query_events=pad(snapshot_events - start, n_snapshots, np.int32),
    query_valid=pad(np.ones(s, bool), n_snapshots, bool),
    query_time=pad(hours(snapshot_time - origin), n_snapshots, np.float32),
    query_gap=pad(hours(snapshot_time - last), n_snapshots, np.float32),
    query_calendar=pad(calendar_phases(snapshot_time), n_snapshots, np.float32),
    query_aggregates=pad(aggregates, n_snapshots, np.float32),
  )


def stack(rows: Sequence[Any]) -> Any:
  """Stacks rows of equal structure into a batch."""
  first = rows[0]
  if isinstance(first, dict):
    return {k: stack([r[k] for r in rows]) for k in first}
  if isinstance(first, tuple):
    return type(first)(*(stack(column) for column in zip(*rows)))
  return np.stack(rows)


# ------------------------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class _TrainingRow(grain.transforms.RandomMap):
  """Cuts a random window out of a user's training period and picks up to S of its snapshots."""

  dataset: Dataset
  tasks: Mapping[str, config.Task]
  max_events: int
  n_snapshots: int

  def random_map(self, record: Mapping[str, Any], rng: np.random.Generator) -> Batch:
    history = self.dataset.history(record)
    train = np.flatnonzero(record["snapshot_split"] == labels_lib.TRAIN)
    seen = record["snapshot_events"][train]
    start, stop = self._cut(history.n_train, seen, rng)
    visible = seen - start
    # A snapshot near the window's start would see less than it does in evaluation; it must see all there is, or a
    # quarter.
    enough = (seen <= stop) & (visible >= np.minimum(seen, self.max_events // 4)) & (visible > 0)
    chosen = train[enough]
    if len(chosen) > self.n_snapshots:
      chosen = np.sort(rng.choice(chosen, self.n_snapshots, replace=False))
    features = window(
      self.dataset,
      history,
      start,
      stop,
      record["snapshot_time"][chosen],
      record["snapshot_events"][chosen],
      self.max_events,
      self.n_snapshots,
    )
    targets = {
      name: self._targets(name, task, record, history, start, stop, chosen) for name, task in self.tasks.items()
    }
    return Batch(features, targets)

  def _cut(self, n_train: int, seen: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Chooses the window [start, stop): it ends at a random snapshot, and holds all of a history that fits."""
    if n_train <= self.max_events or not len(seen):
      return max(0, n_train - self.max_events), n_train
    stop = min(max(int(rng.choice(seen)), self.max_events), n_train)
    return stop - self.max_events, stop

  def _targets(
    self,
    name: str,
    task: config.Task,
    record: Mapping[str, Any],
    history: UserHistory,
    start: int,
    stop: int,
    chosen: np.ndarray,
  ) -> Targets:
    value, known = record[f"label_{name}"][chosen], record[f"known_{name}"][chosen].astype(bool)
    at_snapshots = _pad_labels(Labels(value, known), self.n_snapshots)
    if not isinstance(task, config.NextEvent):
      return at_snapshots
    codes = history.codes[:, self.dataset.schema.field(task.field)]
    following = labels_lib.next_code(codes)[start + 1 : stop + 1]
    inside = following < history.n_train
    value = np.where(inside, codes[np.minimum(following, len(codes) - 1)], 0)
    at_events = _pad_labels(Labels(value.astype(np.int32), inside & (value > 0)), self.max_events)
    joined = Targets(*(np.concatenate(pair) for pair in zip(at_events, at_snapshots)))
    # An out-of-vocabulary value is no row of the catalogue: nothing to learn towards.
    return Targets(joined.value, joined.known & (joined.value > 1))


def _pad_labels(labels: Labels, size: int) -> Targets:
  value = np.zeros((size, *labels.value.shape[1:]), labels.value.dtype)
  known = np.zeros(size, bool)
  value[: len(labels.value)], known[: len(labels.known)] = labels
  return Targets(value if value.dtype == np.int32 else value.astype(np.float32), known)


def training(dataset: Dataset, cfg: config.Config, *, seed: int | None = None) -> grain.IterDataset:
  """Returns an endless stream of training `Batch`es, shuffled anew each epoch.

  A user without training events gives a row of padding; the manifest counts them.
  """
  rows = (
    grain.MapDataset.source(dataset)
    .seed(cfg.train.seed if seed is None else seed)
    .shuffle()
    .repeat(MOST_ROWS // max(len(dataset), 1))
    .random_map(_TrainingRow(dataset, cfg.active_tasks, cfg.model.max_events, cfg.train.snapshots_per_row))
    .batch(cfg.train.batch_rows, batch_fn=stack)
  )
  return rows.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))


# ----------------------------------------------------------------------------------------------- evaluation, embedding


class Question(NamedTuple):
  """One user at one moment: a row of evaluation or embedding.

  Attributes:
    user: index of the user in the dataset.
    user_id: the user's id.
    snapshot: index of the snapshot in the user's record; -1 when it is not one of the dataset's.
    time: τ in microseconds.
    n_events: events before τ.
    last_event: time of the last event before τ, microseconds.
  """

  user: int
  user_id: str
  snapshot: int
  time: int
  n_events: int
  last_event: int


class _Row(NamedTuple):
  """A question with its features, labels and, of fields whose seen values are excluded, the values seen."""

  question: Question
  features: Features
  labels: dict[str, Labels]
  seen: dict[str, np.ndarray]


class QuestionBatch(NamedTuple):
  """Rows of one snapshot each, ready for the encoder.

  Attributes:
    features: B rows; the last batch is filled up with rows of padding.
    questions: what the real rows are about.
    labels: for each task, `Labels` of the real rows; empty for embedding.
    seen: for each task that excludes seen values, the codes in each real row's whole history.
  """

  features: Features
  questions: list[Question]
  labels: dict[str, Labels]
  seen: dict[str, list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class _UserRows(grain.transforms.Map):
  """Lays out a user's snapshots of one split, or at given times, each as a row that sees its last L events."""

  dataset: Dataset
  tasks: Mapping[str, config.Task]
  max_events: int
  split: int | None
  times: np.ndarray | None

  def map(self, item: tuple[int, Mapping[str, Any]]) -> list[_Row]:
    user, record = item
    history = self.dataset.history(record)
    if self.times is None:
      index = np.flatnonzero(record["snapshot_split"] == self.split)
      time, n_events = record["snapshot_time"][index], record["snapshot_events"][index]
    else:
      time, n_events = self.times, np.searchsorted(history.time, self.times, side="left")
      index = np.full(len(time), -1)
    rows = []
    for i, t, n in zip(index, time, n_events):
      if not n:  # nothing is known of the user yet; the caller counts the questions that are missing
        continue
      question = Question(user, history.user, int(i), int(t), int(n), int(history.time[n - 1]))
      start = max(0, int(n) - self.max_events)
      features = window(
        self.dataset, history, start, int(n), np.array([t]), np.array([n], np.int32), self.max_events, 1
      )
      labels, seen = {}, {}
      for name, task in self.tasks.items():
        labels[name] = Labels(record[f"label_{name}"][i], record[f"known_{name}"][i].astype(bool))
        if isinstance(task, config.NextEvent) and task.exclude_seen:
          seen[name] = np.unique(history.codes[:n, self.dataset.schema.field(task.field)])
      rows.append(_Row(question, features, labels, seen))
    return rows


class _Numbered:
  """Users with their index, as a Grain source."""

  def __init__(self, dataset: Dataset):
    self._dataset = dataset

  def __len__(self) -> int:
    return len(self._dataset)

  def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
    return index, self._dataset[index]


def questions(
  dataset: Dataset, cfg: config.Config, *, split: int | None = None, times: Sequence[int] | None = None
) -> Iterator[QuestionBatch]:
  """Yields every snapshot of `split` with the labels of the active tasks, or every user at `times` without labels.

  Users with no event before a time have no row for it.
  """
  if (split is None) == (times is None):
    raise ValueError("name either a split or times")
  at = None if times is None else np.array(times, np.int64)
  tasks = cfg.active_tasks if times is None else {}
  users = grain.MapDataset.source(_Numbered(dataset)).map(_UserRows(dataset, tasks, cfg.model.max_events, split, at))
  size, waiting = cfg.evaluate.batch_rows, []
  for rows in users.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)):
    waiting += rows
    while len(waiting) >= size:
      yield _question_batch(waiting[:size], size)
      waiting = waiting[size:]
  if waiting:
    yield _question_batch(waiting, size)


def _question_batch(rows: list[_Row], size: int) -> QuestionBatch:
  padding = Features(*(np.zeros_like(part) for part in rows[0].features))
  features = stack([r.features for r in rows] + [padding] * (size - len(rows)))
  labels = {n: Labels(*(np.stack(part) for part in zip(*(r.labels[n] for r in rows)))) for n in rows[0].labels}
  return QuestionBatch(
    features, [r.question for r in rows], labels, {n: [r.seen[n] for r in rows] for n in rows[0].seen}
  )
