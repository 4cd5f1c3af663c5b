"""Makes the rows that a next-event head remembers: the values that followed each value most in training histories."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.pair_counts import TUNED_QUESTIONS, FollowCounts, PairSetting
from supermoe_jax.data.encoding.splits import VALIDATION
from supermoe_jax.data.tasks.labels import right_values

# Pairs that are sorted at a time.
SORTED_AT_ONCE = 4_000_000


class Followers(NamedTuple):
  """The values that follow each of a field's values most.

  Codes are those of a batch: item i is code i + 2. The codes 0 and 1 have no followers.

  Attributes:
    code: int32 `[size, C]`, the codes of the C followers with the largest numbers, the largest first, equal ones by
      their code; 0 for none.
    number: float32 `[size, C]`, `FollowCounts.damped` of the pair, scaled so that all counts after a user's last values
      sum to the number of items, on average over training events with a long past; 0 for none.
    out: float32 `[size]`, the factor by which counts are damped for the value that is followed, scaled too.
    into: float32 `[size]`, the factor for the value that follows.
    setting: how pairs are counted and read.
    users: users whose pairs were counted.
    pairs: pairs of events that were counted.
  """

  code: np.ndarray
  number: np.ndarray
  out: np.ndarray
  into: np.ndarray
  setting: PairSetting
  users: int
  pairs: int


def followers(dataset: Dataset, cfg: config.Config, name: str, task: config.NextEvent, width: int) -> Followers:
  """Counts the pairs of a next-event task's values in the training period; returns up to `width` followers of each.

  The setting is the one that ranks the validation questions best. Without such questions it is the usual one.
  """
  simultaneous = task.values_of_a_moment(dataset.tie_rate, cfg.data.split.mode) > 0
  counts = FollowCounts(dataset, task.field, simultaneous=simultaneous)
  if cfg.data.split.has_snapshots("validation") and dataset.manifest["snapshots"]["validation"]:
    _tune(counts, dataset, cfg, name)
  return followers_of(counts, width)


def _tune(counts: FollowCounts, dataset: Dataset, cfg: config.Config, name: str) -> None:
  questions, targets, seen = [], [], list[np.ndarray]()
  for batch in snapshot_batches.query_batches(dataset, cfg, split=VALIDATION, most=TUNED_QUESTIONS):
    known = np.flatnonzero(batch.labels[name].known)
    questions += [batch.questions[i] for i in known]
    targets.append(right_values(batch.labels[name], batch.also[name])[known])
    seen += [batch.seen[name][i] for i in known] if name in batch.seen else []
  if questions:
    counts.tune(questions, np.concatenate(targets), seen or None, max(cfg.evaluate.cutoffs))


def followers_of(counts: FollowCounts, width: int) -> Followers:
  """Returns up to `width` followers of each value by the setting in use."""
  setting, pairs = counts.setting, counts.damped(counts.setting)
  size = pairs.shape[0] + FIRST_VALUE
  code, weight = np.zeros((size, width), np.int32), np.zeros((size, width), np.float32)
  bounds = np.searchsorted(pairs.indptr, np.arange(0, pairs.nnz, SORTED_AT_ONCE), side="right") - 1
  for first, last in itertools.pairwise(np.unique([*bounds, pairs.shape[0]])):
    part = pairs[first:last].tocoo()
    order = np.lexsort((part.col, -part.data, part.row))
    row, column, number = part.row[order], part.col[order], part.data[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)  # among the followers of its value
    kept = (place < width) & (number > 0)
    at = row[kept] + first + FIRST_VALUE, place[kept]
    code[at], weight[at] = column[kept] + FIRST_VALUE, number[kept]
  powers = setting.out_power, setting.in_power
  out, into = (np.pad(counts.damping(power), (FIRST_VALUE, 0)).astype(np.float32) for power in powers)
  total = counts.count @ weight[FIRST_VALUE:].sum(axis=1) / max(counts.count.sum(), 1.0)
  total *= np.sum(setting.fade ** np.arange(setting.last))
  scale = np.float32(len(counts.count) / total if total else 1.0)
  return Followers(code, weight * scale, out * scale, into, setting, counts.users, counts.pairs)
