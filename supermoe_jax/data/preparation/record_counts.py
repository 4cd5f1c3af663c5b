"""Counts the manifest's statistics of the records, shard by shard.

Every count is an integer, and so are sums of numbers (in units of 2⁻³⁶). So the counts do not depend on the order of
users or on the number of machines, and the counts of a user can be subtracted again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import Schema
from supermoe_jax.data.encoding.censored_times import chances_by_day, interval_counts
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.splits import SPLITS
from supermoe_jax.data.encoding.vocabulary import Classes, Encoders
from supermoe_jax.data.preparation.snapshots import LeftOut
from supermoe_jax.data.tasks.labels import Labels, Snapshots

# Aggregates are divided by their standard deviation, but at least by this: a count that is nearly always 0 would
# otherwise become huge when it is 1.
SMALLEST_SCALE = 0.25

# Standardised numbers with a smaller deviation are all equal, apart from rounding.
SMALLEST_DEVIATION = 1e-4

UNIT = 2.0**36  # units of a sum in the number 1

# Counted columns of the labels of a form, where they are not the outputs. Of an amount: itself, and whether it is
# negative, and 0.
_COLUMNS = {"catalogue": 1, "regression": 1, "amount": 3}

_INTEGER = re.compile(r"0|-?[1-9]\d{0,18}")  # a whole number in its usual form, of as many digits as 64 bits hold
_SURE = 18  # digits that always fit into 64 bits, with or without a sign


def exact_sums(values: np.ndarray, starts: np.ndarray) -> list[int]:
  """Returns the sums of `values [N, X]` in units of 2⁻³⁶, added up from each user's sum.

  `starts [U]`, ascending, are the first rows of the users. Each user's sum is rounded to an integer on its own, so the
  result does not depend on the order or grouping of users.
  """
  if not len(values):
    return [0] * values.shape[1]
  of_users = np.rint(np.add.reduceat(values.astype(np.float64), starts, axis=0) * UNIT)
  if np.abs(of_users).max(initial=0.0) * len(of_users) < 2.0**62:
    return [int(total) for total in of_users.astype(np.int64).sum(axis=0)]
  return [sum(int(of_user) for of_user in column) for column in of_users.T.tolist()]


class RecordCounts:
  """Counts of users, their snapshots and their labels; `state` holds all of them, ready for JSON.

  `state["totals"][task][split]` holds two lists. The first has the sums of the label's outputs: for a catalogue the
  number of values unseen in training, for classes the number of labels of each, for times the number of events in each
  interval. The second has the sums of the outputs' squares, for times the number of labels that count in each interval.
  For numbers both are in units of 2⁻³⁶.
  """

  def __init__(self, schema: Schema, tasks: Mapping[str, config.LabelledTask]):
    self._answers = {n: t.answer for n, t in tasks.items()}
    self._edges = {n: t.edges for n, t in tasks.items() if isinstance(t, config.TimeToEvent)}
    self._outputs = schema.outputs
    shape = {n: _COLUMNS.get(a, schema.outputs[n]) for n, a in self._answers.items()}
    self.state: dict[str, Any] = {
      "lengths": {},  # the number of users by their number of events
      "text_users": 0,  # users with ids that are no integers
      "without_training": 0,
      "without_snapshot": 0,
      "too_early": 0,
      "repeated": 0,
      "tied": 0,  # events that share user and time with another
      "snapshots": dict.fromkeys(SPLITS, 0),
      "periods": dict.fromkeys(("training", "later", "beyond_every_label"), 0),
      "known": {n: dict.fromkeys(SPLITS, 0) for n in tasks},
      "totals": {n: {s: [[0] * k, [0] * k] for s in SPLITS} for n, k in shape.items()},
      "aggregates": {"rows": 0, "sums": [0] * schema.aggregates, "squares": [0] * schema.aggregates},
    }

  def merge(self, state: Mapping[str, Any], sign: int = 1) -> Self:
    """Adds the counts of another tally of the same tasks; with `sign` -1 subtracts them."""
    lengths = _merged_lengths(self.state["lengths"], state["lengths"], sign)
    rest = _merged({**self.state, "lengths": 0}, {**state, "lengths": 0}, sign)
    self.state = {**rest, "lengths": lengths}
    return self

  def add(
    self,
    block: UserBlock,
    snapshots: Snapshots,
    labels: Mapping[str, Labels],
    left_out: LeftOut,
    last_use: int | None,
  ) -> None:
    """Counts a block's users; events at or after `last_use` (µs) lie in no label window and before no snapshot."""
    state, users, lengths = self.state, len(block.users), block.lengths
    counted = dict(zip(*(x.tolist() for x in np.unique(lengths, return_counts=True))))
    state["lengths"] = _merged_lengths(state["lengths"], {str(n): count for n, count in counted.items()})
    used = lengths if last_use is None else block.before(np.arange(users), last_use)
    state["periods"]["training"] += int(block.n_train.sum())
    state["periods"]["later"] += int((used - block.n_train).sum())
    state["periods"]["beyond_every_label"] += int((lengths - used).sum())
    same = np.zeros(len(block.time) + 1, bool)  # an event at the time of the one before it
    same[1:-1] = (np.diff(block.time) == 0) & (np.diff(block.owner) == 0)
    state["tied"] += int(np.sum(same[1:] | same[:-1]))
    state["text_users"] += sum(not _is_int64(u) for u in block.users)
    state["without_training"] += int(np.sum(block.n_train == 0))
    state["without_snapshot"] += users - len(np.unique(snapshots.user))
    state["too_early"] += left_out.too_early
    state["repeated"] += left_out.repeated
    for split, index in SPLITS.items():
      here = snapshots.split == index
      state["snapshots"][split] += int(here.sum())
      for task, label in labels.items():
        which = label.known & (here if label.known.ndim == 1 else here[:, None])
        user = snapshots.user[np.nonzero(which)[0]]
        self.state["known"][task][split] += len(user)
        totals = self.state["totals"][task][split]
        for total, more in zip(totals, self._total(task, label.value[which], user)):
          total[:] = [a + b for a, b in zip(total, more, strict=True)]

  def _total(self, task: str, value: np.ndarray, user: np.ndarray) -> tuple[Sequence[int], Sequence[int]]:
    answer, outputs = self._answers[task], self._outputs[task]
    if answer in ("regression", "amount"):
      starts = np.flatnonzero(np.diff(user, prepend=-1))
      column = value[:, None].astype(np.float64)
      if answer == "amount":
        column = np.concatenate([column, column < 0, column == 0], axis=1)
      return exact_sums(column, starts), exact_sums(np.square(column), starts)
    if answer == "survival":
      events, at_risk = interval_counts(value, self._edges[task])
      return events.tolist(), at_risk.tolist()
    if answer == "catalogue":
      counts = np.array([np.sum(value == 1)])
    elif answer == "multiclass":
      counts = np.bincount(value.astype(np.int64), minlength=outputs)
    else:
      counts = value.reshape(len(value), outputs).sum(axis=0, dtype=np.float64).astype(np.int64)
    return counts.tolist(), counts.tolist()

  def add_aggregates(self, aggregates: np.ndarray, user: np.ndarray) -> None:
    """Adds training snapshots' aggregates `[S, A]` to the statistics; `user [S]` are their users, ascending."""
    counted = self.state["aggregates"]
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    counted["rows"] += len(aggregates)
    wide = aggregates.astype(np.float64)
    for name, values in (("sums", wide), ("squares", np.square(wide))):
      counted[name] = [a + b for a, b in zip(counted[name], exact_sums(values, starts), strict=True)]

  @property
  def users(self) -> int:
    """Returns the number of users counted."""
    return sum(self.state["lengths"].values())

  @property
  def events(self) -> int:
    """Returns the number of events of all users counted."""
    return sum(int(n) * count for n, count in self.state["lengths"].items())

  def length_percentiles(self) -> dict[str, float]:
    """Returns percentiles of the number of events of a user."""
    lengths = sorted((int(n), count) for n, count in self.state["lengths"].items())
    number = np.repeat([n for n, _ in lengths], [c for _, c in lengths])
    return {f"p{q}": float(np.percentile(number, q)) for q in (0, 10, 25, 50, 75, 90, 99, 100)}

  def labels(self, encoders: Encoders) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns, for each task and split, the number of known labels and a summary of them.

    The summary is `positive`, the number of positive labels; `classes`, the number of labels of each class; `mean` and
    `std` of standardised numbers or of amounts, and of amounts the numbers of `negative` ones and of zeros (`zero`);
    `events`, the number of times that end with an event; or, for a catalogue, `unseen_value`, the number of labels with
    a value unseen in training. Sample spaces are not applied.
    """
    return {n: {s: self._count(n, s, encoders) for s in SPLITS} for n in self._answers}

  def _count(self, task: str, split: str, encoders: Encoders) -> dict[str, Any]:
    known, (total, squares) = self.state["known"][task][split], self.state["totals"][task][split]
    answer = self._answers[task]
    if answer == "multiclass":
      classes = encoders.labels[task]
      assert isinstance(classes, Classes)
      return {"known": known, "classes": dict(zip(classes.values, total, strict=True))}
    if answer in ("regression", "amount"):
      (mean, deviation), *shares = _moments(known, total, squares)
      counts = [round(share * known) for share, _ in shares]
      return {"known": known, "mean": mean, "std": deviation, **dict(zip(("negative", "zero"), counts))}
    name = {"catalogue": "unseen_value", "survival": "events"}.get(answer, "positive")
    return {"known": known, name: sum(total)}

  def label_rates(self) -> dict[str, list[float]]:
    """Returns the best constant answers to the training labels of each task other than next event, one for each output.

    It is the share of positives or of the class, the mean of the numbers, or the chance of an event by each edge.
    """
    rates = {}
    for name, answer in self._answers.items():
      known, (total, squares) = self.state["known"][name]["train"], self.state["totals"][name]["train"]
      if answer in ("regression", "amount"):
        rates[name] = [_moments(known, total, squares)[0][0]]
      elif answer == "survival":
        rates[name] = chances_by_day(np.array(total) / np.maximum(squares, 1)).tolist()
      elif answer != "catalogue":
        rates[name] = [n / max(known, 1) for n in total]
    return rates

  def aggregate_statistics(self) -> dict[str, list[float]]:
    """Returns the mean and scale of each aggregate over the training snapshots."""
    counted = self.state["aggregates"]
    moments = _moments(counted["rows"], counted["sums"], counted["squares"])
    # An aggregate that is constant in training teaches nothing. Divided by 1e30 it stays 0, whatever its later values.
    return {
      "mean": [mean for mean, _ in moments],
      "scale": [max(deviation, SMALLEST_SCALE) if deviation > 1e-4 else 1e30 for _, deviation in moments],
    }

  def warnings(self, encoders: Encoders, splits: Sequence[str] = tuple(SPLITS)) -> list[str]:
    """Returns warnings that a user should read before training on these labels, on those of `splits`."""
    out = []
    for task, of_split in self.labels(encoders).items():
      if self._answers[task] == "catalogue" and self._outputs[task] == 1:
        out.append(f"task {task} asks about a field with one value in training: every answer is right")
      for split in splits:
        count = of_split[split]
        values = count["known"] * self._outputs[task]
        if not count["known"]:
          out.append(f"task {task} has no label in {split}")
        elif count.get("positive") in (0, values) or max(count.get("classes", {"": 0}).values()) == count["known"]:
          out.append(f"task {task} has labels of one class only in {split}")
        elif count.get("events") == 0:
          out.append(f"no label of task {task} in {split} ends with an event")
        elif count.get("std") is not None and count["std"] < SMALLEST_DEVIATION:
          out.append(f"every label of task {task} in {split} is the same number")
        elif count.get("unseen_value") == count["known"]:
          out.append(f"every label of task {task} in {split} is a value unseen in training")
    return out


def _is_int64(user: str) -> bool:
  """Returns whether a user's id is an integer of 64 bits in its usual form."""
  return _INTEGER.fullmatch(user) is not None and (len(user) <= _SURE or -(2**63) <= int(user) < 2**63)


def _moments(n: int, sums: Sequence[int], squares: Sequence[int]) -> list[tuple[float, float]]:
  """Returns the mean and standard deviation of n numbers from their exact sums; computes the variance in integers."""
  n, unit = max(n, 1), int(UNIT)
  return [
    (total / unit / n, float(np.sqrt(max(n * square * unit - total * total, 0) / (n * unit) ** 2)))
    for total, square in zip(sums, squares, strict=True)
  ]


def _merged(mine: Any, other: Any, sign: int) -> Any:
  if isinstance(mine, dict):
    return {k: _merged(v, other[k], sign) for k, v in mine.items()}
  if isinstance(mine, list):
    return [_merged(a, b, sign) for a, b in zip(mine, other, strict=True)]
  return mine + sign * other


def _merged_lengths(mine: Mapping[str, int], other: Mapping[str, int], sign: int = 1) -> dict[str, int]:
  total = {int(n): mine.get(n, 0) + sign * other.get(n, 0) for n in mine.keys() | other.keys()}
  return {str(n): count for n, count in sorted(total.items()) if count}
