"""Linear probes: how much a frozen vector says about a label, and the hand-made aggregates it must beat."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


def linear(regularisation: float = 0.05) -> Pipeline:
  """Standardisation and a logistic regression; `regularisation` is scikit-learn's C."""
  return make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, solver="newton-cholesky"))


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


def out_of_fold(x: np.ndarray, label: np.ndarray, folds: int = 5, seed: int = 0) -> np.ndarray:
  """Returns each row's probability from a linear probe fitted on the other folds."""
  splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
  return cross_val_predict(linear(), x, label, cv=splits, method="predict_proba")[:, 1]
