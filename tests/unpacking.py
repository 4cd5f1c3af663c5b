"""Takes packed rows apart again, by what the arrays say and without the code that packs them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from supermoe_jax import config
from supermoe_jax.data.batches import Batch, Features, Targets

AT_EVENTS = (config.NextEvent, config.EventLabel)


def users(features: Features) -> list[tuple[int, int]]:
  """Each user of each row, as `(row, segment)`."""
  return [(row, int(user)) for row, own in enumerate(features.segment) for user in np.unique(own[own > 0])]


def alone(batch: Batch, tasks: Mapping[str, config.Task]) -> Batch:
  """The same windows and snapshots, a user a row; rows are as large as before. Slices are left out."""
  places = users(batch.features)
  rows = np.array([row for row, _ in places])
  events = [batch.features.segment[row] == user for row, user in places]
  snapshots = [batch.features.query_segment[row] == user for row, user in places]

  def moved(x: np.ndarray, own: list[np.ndarray], fill: float = 0) -> np.ndarray:
    """Of each user's row `x [B, n, …]` the entries that are theirs, in front."""
    out = np.full_like(x[rows], fill)
    for i, (row, mine) in enumerate(zip(rows, own)):
      out[i, : mine.sum()] = x[row][mine]
    return out

  features = {}
  for name, x in batch.features._asdict().items():
    own = snapshots if name.startswith("query_") else events
    features[name] = moved(x, own, np.nan if name == "numeric" else 0)
  features["segment"] = (features["segment"] > 0).astype(np.int32)
  features["query_segment"] = (features["query_segment"] > 0).astype(np.int32)

  length, n_snapshots = batch.features.segment.shape[1], batch.features.query_segment.shape[1]

  def sites(x: np.ndarray, task: config.Task) -> np.ndarray:
    if not isinstance(task, AT_EVENTS):
      return moved(x, snapshots)
    per_snapshot = (x.shape[1] - length) // n_snapshots  # m
    at_snapshots = x[:, length:].reshape(len(x), n_snapshots, per_snapshot, *x.shape[2:])
    behind = moved(at_snapshots, snapshots).reshape(len(rows), n_snapshots * per_snapshot, *x.shape[2:])
    return np.concatenate([moved(x[:, :length], events), behind], axis=1)

  targets = {n: Targets(*(sites(part, tasks[n]) for part in t)) for n, t in batch.targets.items()}
  return Batch(Features(**features), targets, {})
