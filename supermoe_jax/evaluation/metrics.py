"""Metrics of yes-or-no answers and of rankings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn import metrics as sk

Metrics = dict[str, float | None]


def binary(label: np.ndarray, probability: np.ndarray) -> Metrics:
  """AUC, average precision, log loss and calibration error of `probability [n]` for `label [n]` of 0 and 1.

  AUC and average precision are None when only one class is present.
  """
  both = 0 < label.sum() < len(label)
  return {
    "auc": float(sk.roc_auc_score(label, probability)) if both else None,
    "average_precision": float(sk.average_precision_score(label, probability)) if both else None,
    "log_loss": float(sk.log_loss(label, probability, labels=[0, 1])),
    "ece": expected_calibration_error(label, probability),
  }


def expected_calibration_error(label: np.ndarray, probability: np.ndarray, bins: int = 10) -> float:
  """Mean distance of predicted and observed rate over equally filled bins (arXiv 1909.10155)."""
  order = np.argsort(probability, kind="stable")
  parts = [p for p in np.array_split(order, bins) if len(p)]
  return float(sum(len(p) * abs(probability[p].mean() - label[p].mean()) for p in parts) / len(label))


def multi_label(label: np.ndarray, probability: np.ndarray, k: int = 10) -> Metrics:
  """Mean AUC over the values that occur (`label, probability [n, values]`), recall in the k likeliest, log loss.

  `values_without_auc` counts the values left out of the mean because all or none have them.
  """
  usable = [v for v in range(label.shape[1]) if 0 < label[:, v].sum() < len(label)]
  areas = [sk.roc_auc_score(label[:, v], probability[:, v]) for v in usable]
  top = np.argsort(-probability, axis=1, kind="stable")[:, :k]
  hits, wanted = np.take_along_axis(label, top, axis=1).sum(axis=1), label.sum(axis=1)
  some = wanted > 0
  clipped = np.clip(probability, 1e-7, 1 - 1e-7)
  return {
    "mean_auc": float(np.mean(areas)) if areas else None,
    f"recall@{k}": float(np.mean(hits[some] / np.minimum(wanted[some], k))) if some.any() else None,
    "log_loss": float(-np.mean(label * np.log(clipped) + (1 - label) * np.log(1 - clipped))),
    "values_without_auc": float(label.shape[1] - len(usable)),
  }


def ranking(rank: np.ndarray, cutoffs: Sequence[int]) -> Metrics:
  """HR@k, NDCG@k and MRR@k of one relevant item a question, at `rank [n]` (1 is best; infinite: not ranked)."""
  out: Metrics = {}
  for k in cutoffs:
    hit = rank <= k
    out[f"hr@{k}"] = float(np.mean(hit))
    out[f"ndcg@{k}"] = float(np.mean(np.where(hit, 1 / np.log2(1 + rank), 0.0)))
    out[f"mrr@{k}"] = float(np.mean(np.where(hit, 1 / rank, 0.0)))
  return out
