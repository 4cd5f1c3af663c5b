"""Breaks a task's main metric down: its interval, its values by length of the history, and the calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from supermoe_jax import config
from supermoe_jax.evaluation import influence, intervals, metrics
from supermoe_jax.evaluation.influence import Influence, Scored
from supermoe_jax.evaluation.intervals import Bounds

# The shortest history of each group of histories; each is four times the one before.
LENGTHS = tuple(4**i for i in range(13))


@dataclasses.dataclass(frozen=True)
class ScoredAnswers:
  """The known labels of one task, n of them, with the answers of the run and of its baselines.

  Attributes:
    form: the form of the answers.
    value: `[n]` or `[n, C]`, see `influence.Scored`.
    run: the run's answers.
    baselines: the answers of each baseline.
    user: `[n]`, the users.
    events: int `[n]`, the number of events that the user had before the moment of the question.
    cutoff: k of NDCG@k.
  """

  form: config.Answer
  value: np.ndarray
  run: np.ndarray
  baselines: Mapping[str, np.ndarray]
  user: np.ndarray
  events: np.ndarray
  cutoff: int

  def _influence(self, answer: np.ndarray, where: np.ndarray | slice = slice(None)) -> Influence | None:
    return influence.influence(Scored(self.form, self.value[where], answer[where], self.cutoff))

  def with_intervals(self) -> dict[str, Any]:
    """Returns the intervals of the main metric of the run and of each baseline, and of the run's lead over each."""
    run = self._influence(self.run)
    others = {b: self._influence(a) for b, a in self.baselines.items()}
    return {
      "users": len(np.unique(self.user)),
      "run": _listed(influence.user_interval(self.form, run, self.user)),
      "baselines": {b: _listed(influence.user_interval(self.form, o, self.user)) for b, o in others.items()},
      "differences": {b: influence.difference(run, o, self.user) for b, o in others.items()},
    }

  def by_history(self) -> list[dict[str, Any]]:
    """Returns the main metric by the length of the users' histories, in groups; groups without labels are left out."""
    group = np.searchsorted(LENGTHS, self.events, side="right") - 1
    return [self._group(g, group == g) for g in np.unique(group)]

  def _group(self, group: int, where: np.ndarray) -> dict[str, Any]:
    last = group + 1 >= len(LENGTHS)
    out: dict[str, Any] = {
      "from": LENGTHS[group],
      "to": None if last else LENGTHS[group + 1] - 1,
      "labels": int(where.sum()),
      "users": len(np.unique(self.user[where])),
    }
    if self.form in ("binary", "multilabel"):
      out["positive"] = float(self.value[where].mean())
    for name, answer in (("run", self.run), *self.baselines.items()):
      found = self._influence(answer, where)
      scored = {
        "value": None if found is None else found.value,
        "interval": _listed(influence.user_interval(self.form, found, self.user[where])),
      }
      if name == "run":
        out["run"] = scored
      else:
        out.setdefault("baselines", {})[name] = scored
    return out

  def calibration(self) -> dict[str, Any] | None:
    """Returns predicted and observed rates by bins of the run's probability; None for answers other than yes or no.

    The questions of a task with many values are taken together. `ece` is the mean distance over the bins.
    """
    if self.form not in ("binary", "multilabel"):
      return None
    label, probability = self.value.reshape(-1).astype(np.float64), self.run.reshape(-1)
    bins = [
      {**b._asdict(), "interval": _listed(intervals.wilson(b.observed * b.labels, b.labels))}
      for b in metrics.calibration_bins(label, probability)
    ]
    error = metrics.expected_calibration_error(label, probability)
    return {"pooled": self.value.ndim > 1, "labels": len(label), "ece": error, "bins": bins}

  def deciles(self) -> dict[str, Any] | None:
    """Returns predicted and observed means by deciles of the run's prediction; None for answers other than amounts.

    `error` is the mean distance of the two over the deciles, over the mean of |label|; None where all labels are 0.
    """
    if self.form != "amount":
      return None
    bins = [b._asdict() for b in metrics.calibration_bins(self.value.astype(np.float64), self.run.astype(np.float64))]
    error = metrics.amount_metrics(self.value, self.run)["decile_error"]
    return {"labels": len(self.value), "error": error, "bins": bins}


def _listed(found: Bounds | None) -> list[float] | None:
  return None if found is None else list(found)
