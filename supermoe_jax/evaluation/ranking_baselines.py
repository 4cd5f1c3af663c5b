"""Computes the baselines of next events, which rank all values: by popularity, by the user's own history, by pairs.

Co-occurrence ranks by how often values followed the user's last ones in training histories, see
`data.dataset.pair_counts`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import ABSENT, FIRST_VALUE
from supermoe_jax.config import MICROSECONDS_PER_DAY
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.pair_counts import AT_ONCE, COUNTED_USERS, FollowCounts, gain_of_ranks
from supermoe_jax.data.dataset.snapshot_batches import Query
from supermoe_jax.data.tasks.event_condition import EventCondition, event_condition

# Days before a question in which values may be popular, the usual one first.
LATELY_DAYS = (28, 7, 1)


class RankingBaselines:
  """The baselines of a config's next-event tasks. They are counted once, and tuned by validation questions."""

  def __init__(self, dataset: Dataset, cfg: config.Config):
    """Counts nothing yet."""
    self._dataset, self._cfg = dataset, cfg
    self._pairs: dict[str, FollowCounts] = {}
    self._conditions: dict[str, EventCondition | None] = {}
    self._days: dict[str, int] = {}

  def ranks(
    self,
    name: str,
    task: config.NextEvent,
    split: str,
    questions: Sequence[Query],
    target: np.ndarray,
    seen: Sequence[np.ndarray] | None,
  ) -> dict[str, np.ndarray]:
    """Returns the ranks of each question's best target by each baseline, float `[n]`.

    The questions of the split `validation` also choose the setting of the co-occurrence and the days of what is popular
    lately, so that ranks there are a little too good. Splits that are asked before it, or without it, have the usual
    settings.

    Args:
      name: the task's name.
      task: the task.
      split: the split of the questions.
      questions: n questions.
      target: int `[n, t]`, the codes of their targets, see `popularity_ranks`.
      seen: for each question, the codes that cannot be recommended; None: every code can.
    """
    out = {"most popular": popularity_ranks(target, seen)}
    if name not in self._pairs:
      path = f"config.tasks.{name}"
      where = event_condition(path, task.where, "", self._cfg.data, self._dataset.encoders)
      simultaneous = task.values_of_a_moment(self._dataset.tie_rate, self._cfg.data.split.mode) > 0
      self._conditions[name] = where
      self._pairs[name] = FollowCounts(self._dataset, task.field, simultaneous=simultaneous, asked=where)
    if seen is None:
      own = personal_ranks(self._dataset, task.field, questions, target, self._conditions[name])
      out["own most frequent"], out["own most recent"] = own
    cutoff = max(self._cfg.evaluate.cutoffs)
    if self._cfg.data.split.mode != "leave_one_out":  # whose times may only be places in a sequence
      lately = recently_popular(self._dataset, task.field, questions, target, seen, self._conditions[name])
      if split == "validation":  # of equal ones the first
        self._days[name] = max(LATELY_DAYS, key=lambda days: gain_of_ranks(lately[days], cutoff))
      out["popular lately"] = lately[self._days.setdefault(name, LATELY_DAYS[0])]
    if split == "validation":
      self._pairs[name].tune(questions, target, seen, cutoff)
    out["co-occurrence"] = self._pairs[name].ranks(questions, target, seen)
    return out

  def described(self, name: str) -> dict[str, dict[str, float]]:
    """Returns what a task's baselines were counted on, as `evaluation.json` holds it, by the baseline.

    Of the co-occurrence, the setting and the numbers of users and pairs; of what is popular lately, the days and the
    number of users.
    """
    out = {"co_occurrence": self._pairs[name].described()}
    if name in self._days:
      out["popular_lately"] = {"days": self._days[name], "users": min(len(self._dataset), COUNTED_USERS)}
    return out


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


def recently_popular(
  dataset: Dataset,
  field: str,
  questions: Sequence[Query],
  target: np.ndarray,
  seen: Sequence[np.ndarray] | None,
  asked: EventCondition | None = None,
) -> dict[int, np.ndarray]:
  """Returns the ranks of targets by how many events had them in the days before the question: float `[n]` by days.

  All users' events before the question count, those after the training period too. Values of equal counts follow each
  other by their frequency in the training period. Other arguments as in `personal_ranks` and `popularity_ranks`.
  """
  asked_at = np.array([q.time for q in questions], np.int64)
  order = np.argsort(asked_at, kind="stable")
  earliest = asked_at.min(initial=np.iinfo(np.int64).max) - max(LATELY_DAYS) * MICROSECONDS_PER_DAY
  time, code = _events(dataset, field, asked, earliest, asked_at.max(initial=0))
  n_codes, right = dataset.schema.categorical[field], target.reshape(len(target), -1)
  out = {days: np.full(len(target), np.inf) for days in LATELY_DAYS}
  for days, ranks in out.items():
    ends = np.searchsorted(time, asked_at[order])
    starts = np.searchsorted(time, asked_at[order] - days * MICROSECONDS_PER_DAY)
    count, first, last = np.zeros(n_codes, np.int64), 0, 0  # of the events first … last − 1
    for i, start, end in zip(order, starts, ends):  # moments ascend, so that each event enters and leaves once
      if end > last:
        count += np.bincount(code[last:end], minlength=n_codes)
      if start > first:
        count -= np.bincount(code[first:start], minlength=n_codes)
      first, last = start, end
      hidden = np.zeros(0, np.int64) if seen is None else seen[i][seen[i] >= FIRST_VALUE] - FIRST_VALUE
      wanted = right[i][right[i] >= FIRST_VALUE] - FIRST_VALUE
      wanted = wanted[~np.isin(wanted, hidden)]
      if len(wanted):
        own = count[FIRST_VALUE:].copy()
        own[hidden] = -1  # behind every value that can be recommended
        ranks[i] = _place(own, wanted)
  return out


def _events(
  dataset: Dataset, field: str, asked: EventCondition | None, earliest: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the times and codes of the events of up to `COUNTED_USERS` users in [earliest, end), by time."""
  column = dataset.schema.field(field)
  times, codes = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
  users = min(len(dataset), COUNTED_USERS)
  for start in range(0, users, AT_ONCE):
    block = dataset.histories(np.arange(start, min(start + AT_ONCE, users)))
    there = (block.time >= earliest) & (block.time < end)
    if asked is not None:
      there &= np.concatenate([np.zeros(0, bool), *(asked(block.history(u)) for u in range(len(block.users)))])
    times.append(block.time[there])
    codes.append(block.codes[there, column])
  time = np.concatenate(times)
  order = np.argsort(time, kind="stable")
  return time[order], np.concatenate(codes)[order]


def personal_ranks(
  dataset: Dataset, field: str, questions: Sequence[Query], target: np.ndarray, asked: EventCondition | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ranks of targets by frequency and by recency in the user's own history, float `[n]` each.

  Values that the user has not had follow, by their frequency in the training period. `target [n, t]` is as in
  `popularity_ranks`. In the user's history only events that fulfil the condition `asked` count; None: all of them. The
  frequency in the training period is that in all events.
  """
  column, n_codes = dataset.schema.field(field), dataset.schema.categorical[field]
  frequent, recent = np.full((2, len(target)), np.inf)
  target = target.reshape(len(target), -1)
  user, codes = -1, np.zeros(0, np.int32)
  for i, question in enumerate(questions):
    if question.user != user:
      user, record = question.user, dataset[question.user]
      codes = record["codes"][:, column]
      if asked is not None:
        codes = np.where(asked(dataset.history(record)), codes, ABSENT)
    right = target[i][target[i] >= 2] - 2
    if not len(right):
      continue
    own = codes[: question.n_events]
    count, last = np.bincount(own, minlength=n_codes), np.full(n_codes, -1)
    last[own] = np.arange(len(own))  # of equal codes the last assignment stays
    frequent[i], recent[i] = (_place(score[2:], right) for score in (count, last))
  return frequent, recent


def _place(score: np.ndarray, right: np.ndarray) -> float:
  """Returns the rank of the best of the items `right [t]` by `score [items]`; equal scores follow in their order."""
  item = min(right, key=lambda r: (-score[r], r))
  return float(1 + np.sum(score > score[item]) + np.sum(score[:item] == score[item]))
