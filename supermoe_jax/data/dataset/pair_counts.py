"""Counts which values of a field follow each other in training histories, and ranks values by these counts.

A pair of values counts once for each time that one follows the other within a window, less the further apart they are.

Source of its form: item-to-item collaborative filtering, https://doi.org/10.1109/MIC.2003.1167344; decay by distance,
direction, and damping by popularity are common variants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from supermoe_jax.batch import FIRST_VALUE
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.snapshot_batches import Query
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory

DECAY = 0.9  # of a pair's weight, per moment between its values
WINDOWS = (10, 50)  # events that a value looks ahead
LONGEST = 50  # a user's last values that are kept for scoring

# Training users whose pairs are counted, at most, and pairs of events in all. Records are shuffled, so any prefix of
# them is a sample.
COUNTED_USERS, COUNTED_PAIRS = 50_000, 50_000_000
AT_ONCE = 1024  # users whose histories are read at a time
COLLECTED = 20_000_000  # pairs that are collected before equal ones are added up
SCORES_AT_ONCE = 1 << 24  # scores of questions × values that are in memory at a time
TUNED_QUESTIONS = 1000


@dataclasses.dataclass(frozen=True)
class PairSetting:
  """A way to turn counts into scores.

  Attributes:
    window: events that a value looks ahead, one of `WINDOWS`.
    backward: the weight of a pair in the opposite order.
    out_power, in_power: a count of i → j is divided by `n_i^out_power · n_j^in_power`, with n the values' counts.
    fade: the weight of the k-th last value of the user is `fade^k`.
    last: the number of last values that count.
  """

  window: int = 50
  backward: float = 0.25
  out_power: float = 0.5
  in_power: float = 0.0
  fade: float = 0.7
  last: int = 20


# What each attribute is chosen from, one after the other.
CHOICES: dict[str, tuple[Any, ...]] = {
  "window": WINDOWS,
  "backward": (0.0, 0.25, 1.0),
  "fade": (0.5, 0.7, 0.9, 1.0),
  "in_power": (0.0, 0.15, 0.3, 0.5),
  "out_power": (0.25, 0.5, 0.75, 1.0),
  "last": (5, 20, LONGEST),
}


def gain_of_ranks(ranks: np.ndarray, cutoff: int) -> float:
  """Returns NDCG@`cutoff` of questions of which one value is ranked, from its ranks `[n]`; 0 without a question."""
  return float(np.mean(np.where(ranks <= cutoff, 1 / np.log2(1 + ranks), 0.0))) if len(ranks) else 0.0


class FollowCounts:
  """Counts of values of a field that follow each other, and the ranks that they give.

  Attributes:
    setting: the setting in use; `tune` chooses it.
    users, pairs: the numbers of users and of pairs of events that were counted.
    count: float `[items]`, the training events of each value.
  """

  def __init__(
    self,
    dataset: Dataset,
    field: str,
    *,
    simultaneous: bool,
    asked: Callable[[UserHistory], np.ndarray] | None = None,
  ):
    """Counts the pairs of the training period.

    Args:
      dataset: the dataset.
      field: the field of the values.
      simultaneous: whether the values of one moment form a set. They then do not follow each other, and distances
        count moments, not events.
      asked: the condition of events that count, bool `[N]` of a history; None: all count.
    """
    self.setting = PairSetting()
    self.users = self.pairs = 0
    self._column, self._asked, self._simultaneous = dataset.schema.field(field), asked, simultaneous
    self._items = int(dataset.schema.categorical[field]) - FIRST_VALUE
    self._dataset = dataset
    self.count = np.zeros(self._items)
    self._follow = self._counted()

  def described(self) -> dict[str, float]:
    """Returns the setting, and the numbers of users and pairs that are counted, as `evaluation.json` holds them."""
    return {**dataclasses.asdict(self.setting), "users": self.users, "pairs": self.pairs}

  def _values(self, block: UserBlock) -> np.ndarray:
    """Returns the items of a block's events, int64 `[N]`; −1 for an event that does not count."""
    codes = block.codes[:, self._column].astype(np.int64) - FIRST_VALUE
    if self._asked is not None:
      counts = [self._asked(block.history(u)) for u in range(len(block.users))]
      codes = np.where(np.concatenate([np.zeros(0, bool), *counts]), codes, -1)
    return np.maximum(codes, -1)

  def _counted(self) -> dict[int, sparse.csr_array]:
    """Returns the weights `[items, items]` of i before j, for each window."""
    shape = (self._items, self._items)
    total = {w: sparse.csr_array(shape) for w in WINDOWS}
    waiting: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {w: [] for w in WINDOWS}
    collected = 0

    def add_up() -> None:
      for w in WINDOWS:
        if waiting[w]:
          key, weight = (np.concatenate(part) for part in zip(*waiting[w]))
          total[w] = total[w] + sparse.coo_array((weight, np.divmod(key, self._items)), shape=shape).tocsr()
          waiting[w].clear()

    most = min(len(self._dataset), COUNTED_USERS)
    for start in range(0, most, AT_ONCE):
      block = self._dataset.histories(np.arange(start, min(start + AT_ONCE, most)))
      first = 0
      for w in WINDOWS:
        for key, weight in self._pairs(block, first, w):
          waiting[w].append((key, weight))
          collected += len(key)
          self.pairs += len(key)
        first = w
      self.users += len(block.users)
      if collected > COLLECTED:
        add_up()
        collected = 0
      if self.pairs > COUNTED_PAIRS:
        break
    add_up()
    nearer = sparse.csr_array(shape)
    for w in WINDOWS:  # a wider window holds the pairs of a narrower one
      nearer = total[w] = nearer + total[w]
    return total

  def _pairs(self, block: UserBlock, first: int, last: int) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """Returns keys `i · items + j` and weights of the training pairs whose events are first + 1 … last events apart."""
    training = np.arange(len(block.time)) - block.offsets[block.owner] < block.n_train[block.owner]
    there = np.flatnonzero((self._values(block) >= 0) & training)
    item, owner, time = self._values(block)[there], block.owner[there], block.time[there]
    if not first:
      self.count += np.bincount(item, minlength=self._items)
    new = np.append(True, (time[1:] != time[:-1]) | (owner[1:] != owner[:-1]))[: len(time)]
    moment = np.cumsum(new) if self._simultaneous else np.arange(len(time))
    out = []
    for gap in range(first + 1, min(last, len(item) - 1) + 1):
      pair = np.flatnonzero((owner[gap:] == owner[:-gap]) & (moment[gap:] > moment[:-gap]))
      apart = moment[pair + gap] - moment[pair]
      out.append((item[pair] * self._items + item[pair + gap], DECAY**apart))
    return out

  def tune(
    self,
    questions: Sequence[Query],
    target: np.ndarray,
    seen: Sequence[np.ndarray] | None,
    cutoff: int,
  ) -> PairSetting:
    """Chooses the setting that ranks validation questions best by NDCG@`cutoff`, one attribute after the other.

    Other arguments as in `ranks`; at most `TUNED_QUESTIONS` of them are used, drawn by a seed.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(len(questions))[:TUNED_QUESTIONS])
    asked, right = [questions[i] for i in chosen], target[chosen]
    hidden = None if seen is None else [seen[i] for i in chosen]
    past = self._past(asked)

    def reached(setting: PairSetting) -> float:
      return gain_of_ranks(self._ranks(setting, past, right, hidden), cutoff)

    best = reached(self.setting)
    for name, values in CHOICES.items():
      for value in values:
        setting = dataclasses.replace(self.setting, **{name: value})
        if setting != self.setting and (found := reached(setting)) > best:
          self.setting, best = setting, found
    return self.setting

  def ranks(
    self, questions: Sequence[Query], target: np.ndarray, seen: Sequence[np.ndarray] | None = None
  ) -> np.ndarray:
    """Returns the rank of each question's best target, float `[n]`; 1 is best, infinite without a target.

    Values of equal scores follow each other by their frequency in the training period.

    Args:
      questions: n questions.
      target: int `[n, t]`, the codes of each question's targets; a code below 2 is no target. A target neither counts
        against another one nor, if it is among `seen`, as a target.
      seen: for each question, the codes that cannot be recommended; None: every code can.
    """
    return self._ranks(self.setting, self._past(questions), target, seen)

  def _past(self, questions: Sequence[Query]) -> list[np.ndarray]:
    """Returns the items of each question's last events before it, the last one first, at most `LONGEST`."""
    out: list[np.ndarray] = [np.zeros(0, np.int64)] * len(questions)
    users, place = np.unique([q.user for q in questions], return_inverse=True)
    order = np.argsort(place, kind="stable")
    bounds = np.searchsorted(place[order], np.arange(len(users) + 1))
    for start in range(0, len(users), AT_ONCE):
      block = self._dataset.histories(users[start : start + AT_ONCE])
      item = self._values(block)
      for u in range(len(block.users)):
        for i in order[bounds[start + u] : bounds[start + u + 1]]:
          before = item[block.offsets[u] : block.offsets[u] + questions[i].n_events]
          out[i] = before[before >= 0][::-1][:LONGEST]
    return out

  def damping(self, power: float) -> np.ndarray:
    """Returns `n_i^−power` for the training count n of each item, at least 1: float `[items]`."""
    return np.maximum(self.count, 1.0) ** -power

  def damped(self, setting: PairSetting) -> sparse.csr_array:
    """Returns the scores `[items, items]` of j after i by a setting."""
    follow = self._follow[setting.window]
    both = follow + setting.backward * follow.T if setting.backward else follow
    pairs = both.tocoo()
    data = pairs.data * self.damping(setting.out_power)[pairs.row] * self.damping(setting.in_power)[pairs.col]
    return sparse.csr_array((data, (pairs.row, pairs.col)), shape=both.shape)

  def _ranks(
    self,
    setting: PairSetting,
    past: Sequence[np.ndarray],
    target: np.ndarray,
    seen: Sequence[np.ndarray] | None,
  ) -> np.ndarray:
    scores_of = self.damped(setting)
    right = target.reshape(len(target), -1) - FIRST_VALUE
    rank = np.full(len(target), np.inf)
    step = max(SCORES_AT_ONCE // max(self._items, 1), 1)
    for start in range(0, len(past), step):
      part = past[start : start + step]
      rows = np.repeat(np.arange(len(part)), [min(len(p), setting.last) for p in part])
      items = np.concatenate([np.zeros(0, np.int64), *[p[: setting.last] for p in part]])
      k = np.concatenate([np.zeros(0, np.int64), *[np.arange(min(len(p), setting.last)) for p in part]])
      weights = sparse.csr_array((setting.fade**k, (rows, items)), shape=(len(part), self._items))
      score = (weights @ scores_of).toarray()
      for i, own in enumerate(score):
        asked = right[start + i][right[start + i] >= 0]
        if seen is not None:
          hidden = seen[start + i][seen[start + i] >= FIRST_VALUE] - FIRST_VALUE
          own[hidden] = -1.0  # behind every value that can be recommended
          asked = asked[~np.isin(asked, hidden)]
        if len(asked):
          item = min(asked, key=lambda a: (-own[a], a))
          rank[start + i] = 1 + np.sum(own > own[item]) + np.sum(own[:item] == own[item])
    return rank
