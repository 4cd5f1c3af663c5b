"""The protocol of probes: splits the rows into fitted and predicted ones, and scores predictions with 95 % intervals.

Shapes: n rows, m predicted rows of a split, C classes, J splits.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold

from supermoe_jax.evaluation import intervals, metrics
from supermoe_jax.evaluation.answer_forms import FORMS
from supermoe_jax.evaluation.intervals import Interval
from supermoe_jax.evaluation.metrics import Metrics
from supermoe_jax.evaluation.probes import Inputs
from supermoe_jax.probing import resampling
from supermoe_jax.probing.label_table import Label
from supermoe_jax.probing.models import ProbeModel

# Each metric's value with its interval.
Scores = dict[str, Interval]

# Strata that numeric labels are divided into.
STRATA = 10

COUNTS = ("classes_without_auc",)  # counts that come with the metrics and are not scored


@dataclasses.dataclass(frozen=True)
class Protocol:
  """Splits, repeats and resamples of a probe.

  Attributes:
    folds: parts that users are divided into; each part is predicted once a repeat.
    repeats: how often users are divided anew.
    temporal: fit on all labels before the last time and predict the labels of the last time, instead of folds.
    seed: the seed of the folds, the models and the resamples.
    resamples: bootstrap resamples of users, for the intervals of a temporal split.
  """

  folds: int = 5
  repeats: int = 3
  temporal: bool = False
  seed: int = 0
  resamples: int = 1000

  @property
  def splits(self) -> int:
    """Returns how often each model is fitted."""
    return 1 if self.temporal else self.folds * self.repeats


class Fold(NamedTuple):
  """A split: ascending rows to fit on and rows to predict. Only in a temporal split may the two share users."""

  fit: np.ndarray
  asked: np.ndarray


class ProbeRows(NamedTuple):
  """Users and times of the rows.

  Attributes:
    user: int64 `[n]`, the number of each row's user.
    time: int64 `[n]`, microseconds since 1970 UTC; None without times.
  """

  user: np.ndarray
  time: np.ndarray | None = None


class ProbeResult(NamedTuple):
  """Scores of the probes of one label. Features are the judged vectors and each comparison.

  Attributes:
    scores: the scores, by name of the features and model.
    differences: by comparison and model, the judged vectors' score minus the comparison's, in the metric's own unit,
      over the same splits and users. The key `best` compares the best model of both.
    best: for each name of features, the model with the best main metric.
    main: the name of the main metric.
  """

  scores: dict[str, dict[str, Scores]]
  differences: dict[str, dict[str, Scores]]
  best: dict[str, str]
  main: str


class ProbePredictions(NamedTuple):
  """Predictions for one label: `predictions[features, model]` holds an array `[m, …]` for every split."""

  label: Label
  rows: ProbeRows
  splits: list[Fold]
  predictions: dict[tuple[str, str], list[np.ndarray]]


class UnmeasurableLabel(ValueError):
  """A label that this protocol cannot measure; the message gives the reason."""


def make_folds(label: Label, rows: ProbeRows, protocol: Protocol) -> list[Fold]:
  """Returns the folds of all repeats, or the one temporal split. All `rows` must have a label.

  Folds divide users, so a user's rows stay together. Users are stratified by their most frequent class, or by the
  tenth of the users' mean labels that they fall in.

  Raises:
    UnmeasurableLabel: there are too few users with a label, users of a class, or times.
  """
  if protocol.temporal:
    return [_temporal(label, rows)]
  users, owner = np.unique(rows.user, return_inverse=True)
  if len(users) < protocol.folds:
    raise UnmeasurableLabel(f"{len(users)} users have a label, fewer than {protocol.folds} folds")
  stratum = _strata(label, owner, len(users))
  counts = np.bincount(stratum)
  rarest = counts[counts > 0].min()
  if label.kind == "binary" and (rarest < protocol.folds or np.sum(counts > 0) < 2):
    few = int(np.argmin(counts)) if np.sum(counts > 0) > 1 else 1 - int(stratum[0])
    users_of_it = counts[few] if few < len(counts) else 0
    raise UnmeasurableLabel(f"{users_of_it} users have class {label.classes[few]!r}, fewer than {protocol.folds} folds")
  out = []
  for repeat in range(protocol.repeats):
    seed = protocol.seed + repeat
    # Strata with fewer users than folds are merged; scikit-learn would only warn.
    together = np.where(counts[stratum] < protocol.folds, -1, stratum)
    if np.sum(together == -1) in range(1, protocol.folds):
      together[together == -1] = np.argmax(counts)
    if len(np.unique(together)) > 1:
      folds = StratifiedKFold(protocol.folds, shuffle=True, random_state=seed).split(users, together)
    else:
      folds = KFold(protocol.folds, shuffle=True, random_state=seed).split(users)
    for _, asked in folds:
      chosen = np.zeros(len(users), bool)
      chosen[asked] = True
      out.append(Fold(np.flatnonzero(~chosen[owner]), np.flatnonzero(chosen[owner])))
  return out


def _strata(label: Label, owner: np.ndarray, users: int) -> np.ndarray:
  """Returns the stratum of each user, counted from 0: int64 `[users]`."""
  if label.kind == "regression":
    mean = np.bincount(owner, label.value, users) / np.bincount(owner, minlength=users)
    return np.searchsorted(np.quantile(mean, np.arange(1, STRATA) / STRATA), mean, side="right")
  classes = max(len(label.classes), 2)
  votes = np.bincount(owner * classes + label.value.astype(np.int64), minlength=users * classes)
  return np.argmax(votes.reshape(users, classes), axis=1)


def _temporal(label: Label, rows: ProbeRows) -> Fold:
  times = np.zeros(0) if rows.time is None else np.unique(rows.time)
  if rows.time is None or len(times) < 2:
    raise UnmeasurableLabel("its labels have only one time; a temporal split needs two or more")
  last = rows.time == times[-1]
  if label.kind != "regression":
    for part, what in ((~last, "earlier times"), (last, "the last time")):
      found = np.unique(label.value[part])
      if len(found) < 2:
        raise UnmeasurableLabel(f"all its labels at {what} are {label.classes[int(found[0])]!r}")
  return Fold(np.flatnonzero(~last), np.flatnonzero(last))


def predict_all(
  features: Mapping[str, Inputs],
  label: Label,
  rows: ProbeRows,
  models: Mapping[str, ProbeModel],
  protocol: Protocol,
  threads: int = 1,
  done: Callable[[], Any] = lambda: None,
) -> ProbePredictions:
  """Fits every model on each set of features in every split, `threads` at a time, and returns the predictions.

  `features[name]` is `[n, …]`, and every row has a label. `done` is called after each fit.

  Raises:
    UnmeasurableLabel: see `make_folds`.
  """
  laid = make_folds(label, rows, protocol)
  label = label._replace(owner=np.unique(rows.user, return_inverse=True)[1].reshape(-1))

  def answer(name: str, kind: str, number: int) -> np.ndarray:
    split = laid[number]
    seed = protocol.seed + number
    return np.asarray(models[kind](features[name], label, split.fit, split.asked, seed), np.float64)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting = {(f, m): [pool.submit(answer, f, m, i) for i in range(len(laid))] for f in features for m in models}
    for fits in waiting.values():
      for fit in fits:
        fit.add_done_callback(lambda _: done())
    try:
      found = {key: [fit.result() for fit in fits] for key, fits in waiting.items()}
    except BaseException:
      pool.shutdown(cancel_futures=True)  # the first error, or Ctrl-C, cancels the remaining fits
      raise
  return ProbePredictions(label, rows, laid, found)


def prediction_metrics(label: Label, value: np.ndarray, predicted: np.ndarray) -> Metrics:
  """Returns the metrics of `predicted` for the labels `value`, by the kind of `label`."""
  if label.kind == "regression":
    return metrics.regression_metrics(value, predicted)
  if label.kind == "binary":
    return metrics.binary_metrics(value, predicted)
  return metrics.multi_class_metrics(value.astype(np.int64), predicted)


# Returns the interval of a metric: of the first (features, model), or of its difference to the second one.
_Compared = Callable[[str, tuple[str, str], tuple[str, str] | None], Interval]


def measure_predictions(
  asked: Mapping[str, ProbePredictions],
  judged: str,
  protocol: Protocol,
  groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, ProbeResult]:
  """Scores the predictions of labels, with intervals; all other features are compared with the features `judged`.

  `groups` names sets of labels of one kind; their mean scores are measured too. In a temporal split the mean is taken
  in each resample. Folds of different labels divide users differently, so the half-width of their mean is the mean of
  the labels' half-widths. That is an upper bound: exact if the labels' errors go together, too wide if they do not.
  """
  compared = _resampled(asked, protocol) if protocol.temporal else _folded(asked)
  out = {}
  for name, names in {**{n: [n] for n in asked}, **(groups or {})}.items():
    first = asked[names[0]]
    metric_names = [n for n in prediction_metrics(first.label, *_two(first.label)) if n not in COUNTS]
    out[name] = _measured(first, judged, metric_names, compared(names))
  return out


def _two(label: Label) -> tuple[np.ndarray, np.ndarray]:
  """Returns two labels and right predictions for them, to find the names of the metrics."""
  value = np.arange(2.0)
  return value, np.eye(2, max(label.outputs, 2)) if label.kind == "multiclass" else value


def _folded(asked: Mapping[str, ProbePredictions]) -> Callable[[Sequence[str]], _Compared]:
  values = {
    (name, key): [prediction_metrics(a.label, a.label.value[s.asked], p) for s, p in zip(a.splits, answers)]
    for name, a in asked.items()
    for key, answers in a.predictions.items()
  }
  share = {n: float(np.mean([len(s.asked) / len(s.fit) for s in a.splits])) for n, a in asked.items()}

  def of(names: Sequence[str]) -> _Compared:
    def interval(metric: str, key: tuple[str, str], other: tuple[str, str] | None) -> Interval:
      found = []
      for name in names:
        own = [v[metric] for v in values[name, key]]
        if other is not None:
          paired = [v[metric] for v in values[name, other]]
          own = [None if x is None or y is None else x - y for x, y in zip(own, paired)]
        found.append(intervals.interval_from_folds(own, share[name]))
      return intervals.mean_interval(found)

    return interval

  return of


def _resampled(asked: Mapping[str, ProbePredictions], protocol: Protocol) -> Callable[[Sequence[str]], _Compared]:
  """Returns a function that gives bootstrap intervals. Each resample takes the same users for all labels."""
  at = {n: a.splits[0].asked for n, a in asked.items()}
  everyone = np.unique(np.concatenate([a.rows.user[at[n]] for n, a in asked.items()]))
  parts: dict[tuple[str, tuple[str, str], str], list[np.ndarray]] = {}
  for weight in resampling.resamples(len(everyone), protocol.resamples, protocol.seed):
    for name, a in asked.items():
      own, value = weight[:, np.searchsorted(everyone, a.rows.user[at[name]])], a.label.value[at[name]]
      for key, (answer,) in a.predictions.items():
        for metric, drawn in resampling.weighted_metrics(a.label.kind, value, answer, own).items():
          parts.setdefault((name, key, metric), []).append(drawn)
  draws = {k: np.concatenate(v) for k, v in parts.items()}
  points = {
    (name, key): prediction_metrics(a.label, a.label.value[at[name]], answer)
    for name, a in asked.items()
    for key, (answer,) in a.predictions.items()
  }

  def of(names: Sequence[str]) -> _Compared:
    def interval(metric: str, key: tuple[str, str], other: tuple[str, str] | None) -> Interval:
      values, drawn = [], []
      for name in names:
        value, own = points[name, key][metric], draws.get((name, key, metric))
        if other is not None:
          paired = points[name, other][metric]
          value = None if value is None or paired is None else value - paired
          own = None if own is None else own - draws[name, other, metric]
        if value is not None:
          values.append(value)
          drawn.append(own)
      if not values or any(d is None for d in drawn):
        return Interval(float(np.mean(values)) if values else None)
      return intervals.interval_from_resamples(float(np.mean(values)), resampling.nan_mean(np.array(drawn)))

    return interval

  return of


def _measured(a: ProbePredictions, judged: str, names: Sequence[str], interval: _Compared) -> ProbeResult:
  features = list(dict.fromkeys(f for f, _ in a.predictions))
  models = list(dict.fromkeys(m for _, m in a.predictions))
  main = FORMS[a.label.kind].main
  scores = {
    f: {m: {n: interval(n, (f, m), None) for n in names} for m in models if (f, m) in a.predictions} for f in features
  }
  best = {f: best_model(s, main) for f, s in scores.items()}
  differences: dict[str, dict[str, Scores]] = {}
  for f in features:
    if f == judged:
      continue
    pairs = {m: ((judged, m), (f, m)) for m in models if m in scores[f] and m in scores[judged]}
    pairs["best"] = (judged, best[judged]), (f, best[f])
    differences[f] = {m: {n: interval(n, *pair) for n in names} for m, pair in pairs.items()}
  return ProbeResult(scores, differences, best, main)


def best_model(scores: Mapping[str, Scores], metric: str) -> str:
  """Returns the model with the best value of a metric."""

  def rank(model: str) -> float:
    value = scores[model][metric].value
    return -np.inf if value is None else metrics.improvement(metric, value, 0.0)

  return max(scores, key=rank)


def out_of_fold(a: ProbePredictions, protocol: Protocol) -> dict[tuple[str, str], Metrics]:
  """Returns the metrics over all rows at once, each row predicted by a model fitted without it; mean over repeats.

  This ranks predictions of several models against each other, so the AUC is a little below the mean over folds.
  """
  out: dict[tuple[str, str], Metrics] = {}
  for key, answers in a.predictions.items():
    found = []
    for start in range(0, len(answers), protocol.folds):
      whole = np.zeros((len(a.label.value), *answers[0].shape[1:]))
      for split, answer in zip(a.splits[start : start + protocol.folds], answers[start : start + protocol.folds]):
        whole[split.asked] = answer
      found.append(prediction_metrics(a.label, a.label.value, whole))
    means = {n: [f[n] for f in found] for n in found[0] if n not in COUNTS}
    out[key] = {n: None if None in v else float(np.mean(np.array(v, np.float64))) for n, v in means.items()}
  return out
