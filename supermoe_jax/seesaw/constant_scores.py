"""Measures the answers to ranking tasks that ignore the user: every question gets the most popular values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.dataset.snapshot_batches import QueryBatch
from supermoe_jax.evaluation import metrics, ranking_baselines


def popularity_scores(cfg: config.Config, batches: Sequence[QueryBatch]) -> dict[str, metrics.Metrics]:
  """Returns the metrics of ranking all values by their frequency in training, for each active ranking task.

  These are the numbers of the baseline "most popular" of `evaluate`.

  Args:
    cfg: the config of the tasks.
    batches: the questions of one split.

  Returns: for each task with a known label, the metrics at `cfg.evaluate.cutoffs`; other tasks are left out.
  """
  out = {}
  for name, task in cfg.active_views.items():
    parts = [b for b in batches if name in b.labels] if task.answer == "catalogue" else []
    if not parts:
      continue
    known = np.concatenate([b.labels[name].known for b in parts])
    value = np.concatenate([b.labels[name].value for b in parts])
    also = np.concatenate([b.also[name] for b in parts])
    if not known.any():
      continue
    right = np.concatenate([value[:, None], also], axis=1)[known]
    seen = None
    if task.excludes_seen:
      every = [codes for b in parts for codes in b.seen[name]]
      seen = [every[i] for i in np.flatnonzero(known)]
    out[name] = metrics.ranking_metrics(ranking_baselines.popularity_ranks(right, seen), cfg.evaluate.cutoffs)
  return out


def main_scores(
  scores: Mapping[str, Mapping[str, metrics.Metrics]], main_metric: Mapping[str, str]
) -> dict[str, dict[str, float | None]]:
  """Returns the main metric by task and split, of the metrics by split and task, for the tasks in `main_metric`."""
  out: dict[str, dict[str, float | None]] = {}
  for split, tasks in scores.items():
    for name, found in tasks.items():
      if name in main_metric:
        out.setdefault(name, {})[split] = found[main_metric[name]]
  return out
