"""The models of frozen probes: each is fitted on some rows and predicts others.

Shapes: n rows, m of them predicted, D inputs, C classes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import scipy.sparse

from supermoe_jax.errors import ConfigError
from supermoe_jax.evaluation import probes
from supermoe_jax.probing.label_table import Label

MODELS = ("logistic", "lightgbm", "mlp")

# Boosted trees in many small steps, each tree on a share of the rows and inputs. Among the settings tried, these made
# both the hand-made aggregates of the Complete Journey and the SVD factors of MovieLens 1M strong. Embeddings must beat
# such features.
LIGHTGBM = {
  "n_estimators": 200,
  "learning_rate": 0.03,
  "num_leaves": 15,
  "min_child_samples": 20,
  "subsample": 0.8,
  "subsample_freq": 1,
  "colsample_bytree": 0.3,
  "max_bin": 63,
}

# The most fits that run in parallel by default. Each takes one thread: several threads of one fit wait for each other
# at every split of a tree. On a busy machine with 2 cores one fit then took 103 s instead of 7 s.
MOST_THREADS = 8


class ProbeModel(Protocol):
  """A function that fits one kind of probe and predicts with it."""

  def __call__(self, x: probes.Inputs, label: Label, fit: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
    """Fits on the rows `fit` of `x [n, D]` and predicts the rows `asked [m]`.

    Returns: probabilities `[m]` (binary) or `[m, C]` (multiclass), or numbers `[m]`.
    """


def logistic(x: probes.Inputs, label: Label, fit: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
  """Fits and applies the linear probe of `evaluation.probes`: logistic regression, or ridge for numbers.

  For a yes or no and dense inputs the rows to fit on choose the regularisation: the best of one side is not that of a
  wider or narrower one.
  """
  y = label.value[fit]
  if label.kind == "binary" and not scipy.sparse.issparse(x) and 0 < np.mean(y) < 1:
    owner = np.arange(len(y)) if label.owner is None else label.owner[fit]
    strength = probes.choose_regularisation(x[fit], y, owner)
    return np.asarray(probes.logistic_pipeline(x, strength).fit(x[fit], y).predict_proba(x[asked])[:, 1])
  return probes.fit_probe(label.kind, x[fit], label.value[fit], label.outputs)(x[asked])


def boosted(x: probes.Inputs, label: Label, fit: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
  """Fits and applies LightGBM's gradient-boosted trees; classes without a fitted row get the probability 0."""
  import lightgbm

  options: dict[str, Any] = {
    **LIGHTGBM,
    "n_jobs": 1,
    "random_state": seed,
    "deterministic": True,
    "force_col_wise": True,  # otherwise LightGBM chooses by timing, and the order of sums varies
    "verbose": -1,
  }
  if scipy.sparse.issparse(x):
    x = scipy.sparse.csr_matrix(x)  # LightGBM takes sparse matrices, but no sparse arrays
  y = label.value[fit]
  if label.kind == "regression":
    booster = lightgbm.LGBMRegressor(**options).fit(x[fit], y).booster_
    return np.asarray(booster.predict(x[asked], num_threads=1))
  present = np.unique(y).astype(np.int64)
  if len(present) == 1:
    out = np.zeros((len(asked), max(label.outputs, 2)))
    out[:, present[0]] = 1.0
    return out if label.kind == "multiclass" else out[:, 1]
  booster = lightgbm.LGBMClassifier(**options).fit(x[fit], y.astype(np.int64)).booster_
  found = np.asarray(booster.predict(x[asked], num_threads=1))
  if label.kind == "binary":
    return found
  out = np.zeros((len(asked), label.outputs))
  out[:, present] = found if found.ndim == 2 else np.stack([1 - found, found], axis=1)
  return out


def make_models(names: Sequence[str], mlp_size: tuple[int, int] | None = None) -> dict[str, ProbeModel]:
  """Returns the probe models of these names.

  Raises:
    ConfigError: a name is unknown, or LightGBM is not installed.
  """
  out: dict[str, ProbeModel] = {}
  for name in names:
    if name == "logistic":
      out[name] = logistic
    elif name == "lightgbm":
      if importlib.util.find_spec("lightgbm") is None:
        raise ConfigError(
          "--models lightgbm needs LightGBM, which is not installed; install it with pip install "
          '"supermoe_jax[probe]", or ask for other models, such as --models logistic.'
        )
      out[name] = boosted
    elif name == "mlp":
      from supermoe_jax.probing import mlp

      out[name] = mlp.MlpSettings() if mlp_size is None else mlp.MlpSettings(*mlp_size)
    else:
      raise ConfigError(f"there is no model {name!r}; valid: {', '.join(MODELS)}.")
  return out


def describe_model(model: ProbeModel) -> dict[str, Any]:
  """Returns a model's settings, for the report."""
  if model is boosted:
    return dict(LIGHTGBM)
  if dataclasses.is_dataclass(model) and not isinstance(model, type):
    return dataclasses.asdict(model)
  chosen = {"C": probes.REGULARISATION, "C of yes or no": "best of " + ", ".join(map(str, probes.REGULARISATIONS))}
  return {**chosen, "standardised": True, "sparse C": probes.SPARSE_REGULARISATION}


def default_threads() -> int:
  """Returns the number of cores that this process may use, at most `MOST_THREADS`."""
  available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(available, MOST_THREADS)
