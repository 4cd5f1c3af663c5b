"""Makes training batches from a dataset: windows of histories with several snapshots each.

The pipeline is Grain's. It is deterministic by seed and randomly accessible, and its position can be saved and
restored. In training, several users may share a row; see `packing`.

Shapes: B rows, L events, S snapshots, m events that a snapshot of an event label asks about, G given fields of these
events.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import grain
import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import Batch, Features, Slices
from supermoe_jax.data.dataset import packing, supervision, windows
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.resumable_stream import MOST_ROWS, BatchStream
from supermoe_jax.data.dataset.supervision import Supervision
from supermoe_jax.data.dataset.windows import join_features, stack, window
from supermoe_jax.data.encoding.histories import UserHistory
from supermoe_jax.data.encoding.splits import TRAIN
from supermoe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class _UserWindow:
  """One user's part of a row: the record, the window [start, stop), and the snapshots that see enough of the window."""

  user: int
  record: Mapping[str, Any]
  history: UserHistory
  start: int
  stop: int
  snapshots: np.ndarray


@dataclasses.dataclass(frozen=True)
class _TrainingRow(grain.transforms.RandomMap):
  """A transform that cuts a random window out of each user's training period and picks up to S of the user's snapshots.

  Several users share a row's S snapshots (`packing.share_snapshots`). For each contrast task a row has one pair of
  slices, from one user drawn among those with a long enough history. So neither the cost of a contrast nor the number
  of pairs in a batch depends on packing.
  """

  dataset: Dataset
  cfg: config.Config

  def __getstate__(self) -> dict[str, Any]:
    return {"dataset": self.dataset, "cfg": self.cfg}  # each process makes the cached properties below again

  @functools.cached_property
  def _supervision(self) -> Supervision:
    return Supervision(self.dataset, self.cfg, training=True)

  @functools.cached_property
  def _contrasts(self) -> dict[str, config.Contrast]:
    return {n: cast(config.Contrast, t) for n, t in self.cfg.active_tasks.items() if not t.has_labels}

  def random_map(self, users: int | np.ndarray, rng: np.random.Generator) -> Batch:
    """Returns the row of one user, or of several, without a batch dimension."""
    size = self.cfg.model.max_events, self.cfg.train.snapshots_per_row
    parts = [self._part(int(user), rng) for user in np.atleast_1d(users)]
    features, targets = [], []
    for part, n in zip(parts, packing.share_snapshots(np.array([len(p.snapshots) for p in parts]), size[1], rng)):
      features.append(self._features(part, chosen := self._pick(part.snapshots, n, rng)))
      targets.append(self._supervision.part(part.record, part.history, part.start, part.stop, chosen))
    slices = {n: self._slices(task, parts, rng) for n, task in self._contrasts.items()}
    of_row = {n: supervision.join_targets([t[n] for t in targets], *size) for n in targets[0]}
    return Batch(join_features(features, *size), of_row, slices)

  def _part(self, user: int, rng: np.random.Generator) -> _UserWindow:
    record = self.dataset[user]
    history = self.dataset.history(record)
    train = np.flatnonzero(record["snapshot_split"] == TRAIN)
    seen = record["snapshot_events"][train]
    start, stop = self._cut(history.n_train, seen, rng)
    visible = seen - start
    # A snapshot near the window's start would see less than in evaluation. It must see its whole history, or a
    # quarter of L events.
    least = np.minimum(seen, self.cfg.model.max_events // 4)
    enough = (seen <= stop) & (visible >= least) & (visible > 0)
    return _UserWindow(user, record, history, start, stop, train[enough])

  def _cut(self, n_train: int, seen: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Returns the window [start, stop): the whole history if it fits, otherwise L events up to a random snapshot."""
    max_events = self.cfg.model.max_events
    if n_train <= max_events or not len(seen):
      return max(0, n_train - max_events), n_train
    stop = min(max(int(rng.choice(seen)), max_events), n_train)
    return stop - max_events, stop

  def _pick(self, snapshots: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return snapshots if len(snapshots) <= n else np.sort(rng.choice(snapshots, n, replace=False))

  def _features(self, part: _UserWindow, chosen: np.ndarray) -> Features:
    record, history = part.record, part.history
    time, n_events = record["snapshot_time"][chosen], record["snapshot_events"][chosen]
    aggregates = self.dataset.snapshot_aggregates(part.user, record, history, chosen)
    return windows.window_features(self.dataset, history, part.start, part.stop, time, n_events, aggregates)

  def _slices(self, task: config.Contrast, parts: Sequence[_UserWindow], rng: np.random.Generator) -> Slices:
    able = [p.history for p in parts if p.history.n_train >= 2 * task.least_events]
    history = able[int(rng.integers(len(able)))] if len(able) > 1 else (able or [parts[0].history])[0]
    return _slices(self.dataset, history, task, rng)


def _slices(dataset: Dataset, history: UserHistory, task: config.Contrast, rng: np.random.Generator) -> Slices:
  """Draws two slices of the training events, of random lengths at random positions; they may overlap.

  A slice is a history of its own: its features hold nothing about the events before or after it.
  Source: random slices of CoLES, arXiv 2002.08232.
  """
  n, pair = history.n_train, []
  known = n >= 2 * task.least_events
  for _ in range(2):
    length = int(rng.integers(task.least_events, min(task.slice_events, n) + 1)) if known else 0
    start = int(rng.integers(0, n - length + 1)) if known else 0
    stop = start + length
    part = UserHistory(
      history.user,
      history.time[start:stop],
      history.source[start:stop],
      history.codes[start:stop],
      history.numeric[start:stop],
      length,
    )
    time = part.time[-1:] + 1  # the first moment that sees the whole slice
    aggregates = np.zeros((len(time), dataset.schema.aggregates), np.float32)  # the means of standardised aggregates
    seen = np.full(len(time), length, np.int32)
    pair.append(window(dataset, part, 0, length, time, seen, task.slice_events, 1, aggregates))
  return Slices(stack(pair), np.bool_(known))


@dataclasses.dataclass(frozen=True)
class _TrainingUser(grain.transforms.Map):
  """A transform from a place among the training users to the user's index in the dataset."""

  users: np.ndarray

  def map(self, place: int) -> int:
    return int(self.users[place])


@dataclasses.dataclass(frozen=True)
class _PackedUsers(grain.transforms.MapWithIndex):
  """A transform from a row of an epoch to the row's users; `index` numbers the rows through all epochs."""

  plan: packing.PackingPlan

  def map_with_index(self, index: int, row: int) -> np.ndarray:
    return self.plan.users(index // len(self.plan), row)


def training_batches(
  dataset: Dataset,
  cfg: config.Config,
  *,
  seed: int | None = None,
  shard: tuple[int, int] = (0, 1),
  workers: int = 0,
) -> BatchStream[Batch]:
  """Returns an endless stream of training `Batch`es, shuffled anew each epoch.

  With `cfg.train.packing` rows hold several users. Without it, a user without training events gives a row of padding;
  the manifest counts these users. The users that the split `user` holds out have no rows.

  Args:
    dataset: the dataset of the users.
    cfg: the config of the run.
    seed: the seed of the order and all draws; None for `cfg.train.seed`.
    shard: `(index, count)` of this host, which makes `batch_rows / count` rows of every batch. See `resumable_stream`.
    workers: the number of processes that make the batches, which does not change them; 0 for threads of this process.

  Raises:
    ConfigError: a batch does not divide over the hosts.
    ValueError: `shard` names no host.
  """
  (index, count), rows = shard, cfg.train.batch_rows
  if not 0 <= index < count:
    raise ValueError(f"shard={shard} must be (index, count) with 0 ≤ index < count")
  if rows % count:
    raise ConfigError(f"config.train.batch_rows={rows} must be a multiple of the {count} hosts.")
  seed = cfg.train.seed if seed is None else seed
  plan = packing.PackingPlan(packing.row_sizes(dataset, cfg), cfg, seed) if cfg.train.packing else None
  users = dataset.training_users
  epoch = len(users) if plan is None else len(plan)
  order = grain.MapDataset.range(epoch).seed(seed).shuffle().repeat(MOST_ROWS // max(epoch, 1))
  if plan is not None:
    order = order.map_with_index(_PackedUsers(plan))
  elif len(users) < len(dataset):
    order = order.map(_TrainingUser(users))
  runs = order.random_map(_TrainingRow(dataset, cfg)).batch(rows // count, batch_fn=stack)
  identity = {"seed": seed, "rows_of_an_epoch": epoch, "packing": plan is not None}
  return BatchStream(runs, identity, rows, shard, workers, plan.describe() if plan is not None else "")
