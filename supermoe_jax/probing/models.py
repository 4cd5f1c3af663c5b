"""The frozen probes: each is fitted on some rows and answers others.

Shapes: n rows, m of them asked about, D inputs, C classes.
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
from supermoe_jax.evaluation import linear_probes
from supermoe_jax.probing.label_table import Label

MODELS = ("logistic", "lightgbm", "mlp")

# Of boosted trees: many small steps, each tree on a share of the rows and inputs. Of the settings tried, one that made
# both hand-made aggregates of the Complete Journey and SVD factors of MovieLens 1M strong, since such features are what
# embeddings must beat.
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

# Fits that run side by side, where nobody says otherwise. Each takes one thread: several on one fit wait for each other
# at every split of a tree, and on a busy machine with 2 cores one fit took 103 s instead of 7 s.
MOST_THREADS = 8


class ProbeModel(Protocol):
  """A probe of one kind."""

  def __call__(
    self, x: linear_probes.Inputs, label: Label, fit: np.ndarray, asked: np.ndarray, seed: int
  ) -> np.ndarray:
    """Fits on the rows `fit` of `x [n, D]` and answers the rows `asked [m]`.

    Returns: probabilities `[m]`, of classes `[m, C]`, or numbers `[m]`.
    """


def logistic(x: linear_probes.Inputs, label: Label, fit: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
  """The linear probe of `evaluation.linear_probes`: a logistic regression, of a number a ridge regression."""
  return linear_probes.fit_probe(label.kind, x[fit], label.value[fit], label.outputs)(x[asked])


def boosted(x: linear_probes.Inputs, label: Label, fit: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
  """Gradient-boosted trees, LightGBM's; classes that they were not fitted on get the probability 0."""
  import lightgbm

  options: dict[str, Any] = {
    **LIGHTGBM,
    "n_jobs": 1,
    "random_state": seed,
    "deterministic": True,
    "force_col_wise": True,  # chosen by a stopwatch otherwise, and with another order of sums
    "verbose": -1,
  }
  if scipy.sparse.issparse(x):
    x = scipy.sparse.csr_matrix(x)  # LightGBM takes no sparse array
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
  """The probes of these names.

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
  """What a model is, for the record."""
  if model is boosted:
    return dict(LIGHTGBM)
  if dataclasses.is_dataclass(model) and not isinstance(model, type):
    return dataclasses.asdict(model)
  return {"C": linear_probes.REGULARISATION, "standardised": True, "sparse C": linear_probes.SPARSE_REGULARISATION}


def default_threads() -> int:
  """The cores that this process may use, but no more than help."""
  available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(available, MOST_THREADS)
