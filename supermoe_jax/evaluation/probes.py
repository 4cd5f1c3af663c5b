"""Fits probes: they measure how well a frozen vector, or the aggregates that it must beat, predict a label.

Most are linear; boosted trees stand beside them where trees are what people would use.

Shapes: n rows to fit on, m rows to predict, D inputs, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import threadpoolctl
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from supermoe_jax import config
from supermoe_jax.data.encoding.censored_times import chances_by_day, survived_intervals
from supermoe_jax.evaluation import metrics

# Inputs `[n, D]`, a NumPy array or a SciPy sparse matrix in rows. Sparse inputs, such as TF-IDF, have a meaningful
# scale and are not standardised.
Inputs = Any

# A function of `x [m, D]` that returns probabilities `[m]`, `[m, values]`, `[m, C]`, or numbers `[m]`.
Predictor = Callable[[Inputs], np.ndarray]

# Inverse strength of the regularisation (scikit-learn's C) for standardised and for sparse inputs.
REGULARISATION = 0.05
SPARSE_REGULARISATION = 5.0

# The strengths among which `choose_regularisation` chooses: wide inputs and few labels need the strong ones.
REGULARISATIONS = (0.0003, 0.003, 0.02, 0.1)
CHOOSING_FOLDS = 4

# One thread for trees on a few thousand rows: several wait for each other, beside other processes for minutes.
_on_one_thread = threadpoolctl.threadpool_limits.wrap(limits=1)

# Settings of all boosted trees. A split looks at a quarter of the inputs: three times as fast, and no worse.
_TREES: dict[str, Any] = {
  "learning_rate": 0.05,
  "max_leaf_nodes": 15,
  "l2_regularization": 1.0,
  "max_features": 0.25,
  "random_state": 0,
}

# The losses of `AmountProbe`, in words.
LOSSES = {"poisson": "Poisson deviance", "log1p": "squared error of log1p"}


def logistic_pipeline(x: Inputs, strength: float = REGULARISATION) -> Pipeline:
  """Returns standardisation (of dense inputs) and logistic regression for inputs like `x`, not yet fitted.

  The regression is multinomial if need be. `strength` is C for dense inputs.
  """
  if scipy.sparse.issparse(x):
    return make_pipeline(LogisticRegression(C=SPARSE_REGULARISATION, solver="lbfgs", max_iter=1000))
  return make_pipeline(StandardScaler(), LogisticRegression(C=strength, solver="newton-cholesky"))


def choose_regularisation(x: Inputs, label: np.ndarray, owner: np.ndarray) -> float:
  """Returns the C with the least log loss in folds over users, for dense `x [n, D]` and `label [n]` of 0 and 1.

  `owner [n]` are the users of the rows; a user's rows share a fold. Labels of too few users get `REGULARISATION`.
  """
  if min(len(np.unique(owner[label == y])) for y in (0, 1)) < CHOOSING_FOLDS:
    return REGULARISATION
  folds = StratifiedGroupKFold(CHOOSING_FOLDS, shuffle=True, random_state=0)
  losses = np.zeros(len(REGULARISATIONS))
  for fit, held in folds.split(x, label, owner):
    scaler = StandardScaler().fit(x[fit])
    known, asked = scaler.transform(x[fit]), scaler.transform(x[held])
    model = LogisticRegression(solver="lbfgs", warm_start=True, max_iter=200)
    for i, strength in enumerate(REGULARISATIONS):  # from strong to weak, each from the one before
      chance = model.set_params(C=strength).fit(known, label[fit]).predict_proba(asked)
      losses[i] += log_loss(label[held], chance, labels=[0, 1])
  return REGULARISATIONS[int(np.argmin(losses))]


def ridge_pipeline(x: Inputs) -> Pipeline:
  """Returns standardisation (of dense inputs) and linear regression for inputs like `x`, not yet fitted.

  The regularisation is as strong as in `logistic_pipeline`.
  """
  if scipy.sparse.issparse(x):
    return make_pipeline(Ridge(alpha=1 / SPARSE_REGULARISATION, solver="sparse_cg"))
  return make_pipeline(StandardScaler(), Ridge(alpha=1 / REGULARISATION))


class Probe:
  """A linear probe of a binary label, or one for each of several; for a label of one class it predicts the rate."""

  def __init__(self, x: Inputs, label: np.ndarray):
    """Fits on `x [n, D]` and `label [n]` or `[n, values]` of 0 and 1."""
    self._flat = label.ndim == 1
    columns = label[:, None] if self._flat else label
    self._rate = columns.mean(axis=0)
    usable = (self._rate > 0) & (self._rate < 1)
    self._models = [logistic_pipeline(x).fit(x, y) if ok else None for ok, y in zip(usable, columns.T)]

  def __call__(self, x: Inputs) -> np.ndarray:
    """Returns probabilities `[m]` or `[m, values]` for `x [m, D]`."""
    columns = [
      np.full(x.shape[0], rate) if model is None else model.predict_proba(x)[:, 1]
      for model, rate in zip(self._models, self._rate)
    ]
    return columns[0] if self._flat else np.stack(columns, axis=1)


class OwnCountsProbe:
  """A linear probe of each of several values, of the inputs that count this value and those that count none.

  Counts of other values are left out: they are many, and say little of this one.
  """

  def __init__(self, x: np.ndarray, label: np.ndarray, columns: Sequence[np.ndarray]):
    """Fits on `x [n, D]` and `label [n, values]` of 0 and 1; `columns` holds the inputs of each value."""
    self._columns = columns
    self._probes = [Probe(x[:, of], y) for of, y in zip(columns, label.T, strict=True)]

  def __call__(self, x: Inputs) -> np.ndarray:
    """Returns probabilities `[m, values]` for `x [m, D]`."""
    return np.stack([probe(x[:, of]) for of, probe in zip(self._columns, self._probes)], axis=1)


class TreesProbe:
  """Boosted trees that predict a binary label; for a label of one class they predict the rate."""

  @_on_one_thread
  def __init__(self, x: Inputs, label: np.ndarray):
    """Fits on `x [n, D]` and `label [n]` of 0 and 1."""
    self._rate = float(label.mean())
    self._model: HistGradientBoostingClassifier | None = None
    if 0 < self._rate < 1:
      self._model = HistGradientBoostingClassifier(**_TREES, max_iter=100, early_stopping=False).fit(x, label)

  @_on_one_thread
  def __call__(self, x: Inputs) -> np.ndarray:
    """Returns probabilities `[m]` for `x [m, D]`."""
    if self._model is None:
      return np.full(x.shape[0], self._rate)
    return np.asarray(self._model.predict_proba(x)[:, 1])


class MultiClassProbe:
  """A multinomial probe of one label of C classes; a class that it was not fitted on gets the probability 0."""

  def __init__(self, x: Inputs, label: np.ndarray, classes: int):
    """Fits on `x [n, D]` and class indices `label [n]`, below `classes`."""
    self._classes = classes
    self._present = np.unique(label)
    self._model = logistic_pipeline(x).fit(x, label) if len(self._present) > 1 else None

  def __call__(self, x: Inputs) -> np.ndarray:
    """Returns probabilities `[m, C]` for `x [m, D]`."""
    out = np.zeros((x.shape[0], self._classes))
    out[:, self._present] = 1.0 if self._model is None else self._model.predict_proba(x)
    return out


class RegressionProbe:
  """A linear probe of a number."""

  def __init__(self, x: Inputs, label: np.ndarray):
    """Fits on `x [n, D]` and `label [n]`."""
    self._model = ridge_pipeline(x).fit(x, label)

  def __call__(self, x: Inputs) -> np.ndarray:
    """Returns numbers `[m]` for `x [m, D]`."""
    return np.asarray(self._model.predict(x))


class AmountProbe:
  """Boosted trees that predict an amount: its tail and its zeros suit no linear model.

  `loss` is "log1p", the squared error of sign(y)·log(1 + |y|), whose answers are typical amounts; or "poisson", the
  deviance of a Poisson distribution, whose answers are means, for amounts that are not negative.
  """

  @_on_one_thread
  def __init__(self, x: Inputs, label: np.ndarray, loss: str = "log1p"):
    """Fits on `x [n, D]` and `label [n]`."""
    self.loss = loss
    self._model = HistGradientBoostingRegressor(
      **_TREES, loss="poisson" if loss == "poisson" else "squared_error", max_iter=200
    ).fit(x, label if loss == "poisson" else np.sign(label) * np.log1p(np.abs(label)))

  @_on_one_thread
  def __call__(self, x: Inputs) -> np.ndarray:
    """Returns amounts `[m]` for `x [m, D]`."""
    found = self._model.predict(x)
    return np.asarray(found if self.loss == "poisson" else np.sign(found) * np.expm1(np.abs(found)))


def fit_amount_probe(x: Inputs, label: np.ndarray, held_x: Inputs, held_label: np.ndarray) -> AmountProbe:
  """Returns the probe of an amount whose loss gives the better rank correlation on held-out amounts.

  Fits on `x [n, D]` and `label [n]`; `held_x [m, D]` and `held_label [m]` decide. Where they cannot, or where amounts
  are negative, the loss is "log1p".
  """
  label, first = label.astype(np.float64), AmountProbe(x, label.astype(np.float64))
  if label.min() < 0 or not label.any() or not len(held_label):
    return first
  second = AmountProbe(x, label, "poisson")
  scores = [metrics.amount_metrics(held_label, probe(held_x))["spearman"] for probe in (first, second)]
  return second if scores[1] is not None and (scores[0] is None or scores[1] > scores[0]) else first


class HazardProbe:
  """Boosted trees that predict the hazard of each interval of a time that may be censored.

  Each label is a row for every interval that counts: whether the event lies in it, given the inputs and the interval.
  """

  @_on_one_thread
  def __init__(self, x: Inputs, label: np.ndarray, edges: Sequence[float]):
    """Fits on `x [n, D]` and times `label [n, 2]`; `edges [K]` are the ends of the intervals, in days."""
    self._intervals = len(edges)
    observed, survived = label[:, 1] > 0, survived_intervals(label, edges)
    count = survived + observed
    row = np.repeat(np.arange(len(label)), count)
    interval = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    happens = observed[row] & (interval == survived[row])
    self._rate = float(happens.mean()) if len(happens) else 0.0
    self._model: HistGradientBoostingClassifier | None = None
    if 2 <= happens.sum() <= len(happens) - 2:  # the trees hold out a part that has both
      self._model = HistGradientBoostingClassifier(**_TREES, max_iter=100)
      self._model.fit(self._rows(x[row], interval), happens)

  def _rows(self, x: np.ndarray, interval: np.ndarray) -> np.ndarray:
    return np.concatenate([x, interval[:, None].astype(x.dtype)], axis=1)

  @_on_one_thread
  def __call__(self, x: Inputs) -> np.ndarray:
    """Returns the chance of an event by the end of each interval, `[m, K]`, for `x [m, D]`."""
    shape = (x.shape[0], self._intervals)
    if self._model is None:
      return chances_by_day(np.full(shape, self._rate))
    rows = self._rows(np.repeat(x, self._intervals, axis=0), np.tile(np.arange(self._intervals), x.shape[0]))
    return chances_by_day(self._model.predict_proba(rows)[:, 1].reshape(shape))


def fit_probe(answer: config.Answer, x: Inputs, label: np.ndarray, outputs: int) -> Predictor:
  """Fits the probe for a form of answer on `x [n, D]` and `label [n]` or `[n, values]`.

  `outputs` is the number of classes or values, 1 for one yes or no and for a number.
  Raises: ValueError for forms without such a probe: rankings of a catalogue, contrast, amounts (`fit_amount_probe`),
    and times, which need the intervals (`HazardProbe`).
  """
  if answer in ("binary", "multilabel"):
    return Probe(x, label.astype(np.float32))
  if answer == "multiclass":
    return MultiClassProbe(x, label.astype(np.int64), outputs)
  if answer == "regression":
    return RegressionProbe(x, label.astype(np.float64))
  raise ValueError(f"there is no linear probe of a {answer} answer")
