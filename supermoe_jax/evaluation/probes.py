"""Linear probes: how much a frozen vector says about a label, and the hand-made aggregates it must beat.

Shapes: n rows fitted on, m rows asked about, D inputs, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from supermoe_jax import config

# From `x [m, D]` to probabilities `[m]`, `[m, values]`, `[m, C]`, or numbers `[m]`.
Predictor = Callable[[np.ndarray], np.ndarray]


def linear(regularisation: float = 0.05) -> Pipeline:
  """Standardisation and a logistic regression, multinomial if need be; `regularisation` is scikit-learn's C."""
  return make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, solver="newton-cholesky"))


def ridge(regularisation: float = 0.05) -> Pipeline:
  """Standardisation and a linear regression whose weights are held as small as those of `linear`."""
  return make_pipeline(StandardScaler(), Ridge(alpha=1 / regularisation))


class Probe:
  """Linear probes of one label, or one for each of several binary labels; a label of one class gives its rate."""

  def __init__(self, x: np.ndarray, label: np.ndarray):
    """Fits on `x [n, D]` and `label [n]` or `[n, values]` of 0 and 1."""
    self._flat = label.ndim == 1
    columns = label[:, None] if self._flat else label
    self._rate = columns.mean(axis=0)
    usable = (self._rate > 0) & (self._rate < 1)
    self._models = [linear().fit(x, y) if ok else None for ok, y in zip(usable, columns.T)]

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Returns probabilities `[m]` or `[m, values]` for `x [m, D]`."""
    columns = [
      np.full(len(x), rate) if model is None else model.predict_proba(x)[:, 1]
      for model, rate in zip(self._models, self._rate)
    ]
    return columns[0] if self._flat else np.stack(columns, axis=1)


class MultiClassProbe:
  """A multinomial probe of one label of C classes; classes that it was not fitted on get the probability 0."""

  def __init__(self, x: np.ndarray, label: np.ndarray, classes: int):
    """Fits on `x [n, D]` and class indices `label [n]`, below `classes`."""
    self._classes = classes
    self._present = np.unique(label)
    self._model = linear().fit(x, label) if len(self._present) > 1 else None

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Returns probabilities `[m, C]` for `x [m, D]`."""
    out = np.zeros((len(x), self._classes))
    out[:, self._present] = 1.0 if self._model is None else self._model.predict_proba(x)
    return out


class RegressionProbe:
  """A linear probe of a number."""

  def __init__(self, x: np.ndarray, label: np.ndarray):
    """Fits on `x [n, D]` and `label [n]`."""
    self._model = ridge().fit(x, label)

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """Returns numbers `[m]` for `x [m, D]`."""
    return np.asarray(self._model.predict(x))


def fit(answer: config.Answer, x: np.ndarray, label: np.ndarray, outputs: int) -> Predictor:
  """Fits the probe for a form of answer on `x [n, D]` and `label [n]` or `[n, values]`.

  `outputs` is the number of classes or values, 1 for one yes or no and for a number.
  Raises: ValueError for answers that no probe gives: rankings of a catalogue, and contrast.
  """
  if answer in ("binary", "multilabel"):
    return Probe(x, label.astype(np.float32))
  if answer == "multiclass":
    return MultiClassProbe(x, label.astype(np.int64), outputs)
  if answer == "regression":
    return RegressionProbe(x, label.astype(np.float64))
  raise ValueError(f"there is no linear probe of a {answer} answer")


def out_of_fold(x: np.ndarray, label: np.ndarray, folds: int = 5, seed: int = 0) -> np.ndarray:
  """Returns each row's probability from a linear probe fitted on the other folds."""
  splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
  return cross_val_predict(linear(), x, label, cv=splits, method="predict_proba")[:, 1]
