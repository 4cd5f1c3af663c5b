"""Draws the report's map: users' latest embeddings in the plane, coloured by event counts and labels."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from supermoe_jax import config
from supermoe_jax.config import format_time
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.splits import TEST
from supermoe_jax.embeddings import selection
from supermoe_jax.report.figures import user_maps
from supermoe_jax.report.run_files import RunFiles
from supermoe_jax.report.task_sentences import task_question

# The most points of the map; t-SNE takes about 10 s for this many.
MOST_POINTS = 3000
# Records read for each wanted point, as some users have none: they have no event before the time of the map.
RECORDS_A_POINT = 4


def embedding_map(run: RunFiles) -> dict[str, Any] | None:
  """Returns the 2-D map of users' latest embeddings; None without embeddings."""
  if run.embeddings is None:
    return None
  everyone = selection.select_rows(run.workdir / "embeddings")
  users = [str(u) for u in everyone.users.to_pylist()]
  chosen, records = _sample(run, users)
  vectors = everyone.rows_of(chosen) if len(chosen) else np.zeros((0, 1), np.float32)
  place = project(vectors)
  if place is None:
    return {"reason": f"The embeddings of {len(users):,} users are too few, or too much alike, for a map."}
  counts = everyone.column("n_events").to_numpy()[chosen]
  latest = int(everyone.as_of.max())
  sampled = [users[i] for i in chosen]
  panels = [user_maps.map_by_count("map-events", "events before this time", place, counts)]
  described = []
  for i, (task, (value, text)) in enumerate(pick_labels(run.cfg, records, latest).items()):
    values = np.array([value.get(u, np.nan) for u in sampled])
    panels.append(user_maps.map_by_label(f"map-{i}", task, place, values))
    described.append((task, text))
  return {
    "reason": "",
    "panels": panels,
    "labels": described,
    "time": everyone.time().replace("T00:00:00", ""),
    "points": len(place),
    "rows": len(users),
    "width": vectors.shape[1],
  }


def _sample(run: RunFiles, users: Sequence[str]) -> tuple[np.ndarray, list[Mapping[str, Any]]]:
  """Samples at most MOST_POINTS rows, and returns them with their users' records if the dataset is available.

  The dataset finds records by number, not by user. Sampling records avoids reading a large dataset as a whole.
  """
  random = np.random.default_rng(0)
  row = {user: i for i, user in enumerate(users)}
  if run.same_data and (pathlib.Path(run.cfg.data.path) / "event_log").is_dir():
    dataset = Dataset(run.cfg.data.path)
    found: dict[int, Mapping[str, Any]] = {}
    for index in random.permutation(len(dataset))[: MOST_POINTS * RECORDS_A_POINT]:
      record = dataset[int(index)]
      if record["user"] in row:
        found[row[record["user"]]] = record
      if len(found) == MOST_POINTS:
        break
    if found:
      order = sorted(found)
      return np.array(order), [found[i] for i in order]
  return np.sort(random.permutation(len(users))[:MOST_POINTS]), []


def project(vectors: np.ndarray) -> np.ndarray | None:
  """Returns positions `[n, 2]` of `vectors [n, D]` by t-SNE; None if fewer than 10 differ or one is not finite."""
  if not np.isfinite(vectors).all() or len(np.unique(vectors, axis=0)) < 10:
    return None
  # PCA initialises, so that far-apart groups keep their places. One thread: the steps are short, and on two busy cores
  # threads that waited for each other took three times as long for 2,500 points.
  perplexity = min(30.0, (len(vectors) - 1) / 3)
  with threadpool_limits(1):
    method = TSNE(init="pca", perplexity=perplexity, max_iter=500, angle=0.7, random_state=0)
    return np.asarray(method.fit_transform(vectors))


def pick_labels(
  cfg: config.Config, records: Iterable[Mapping[str, Any]], time: int
) -> dict[str, tuple[dict[str, int], str]]:
  """Picks up to two binary tasks to colour users by; returns for each task a label a user, and its words.

  Picks one task about the future and one about the user if possible. Among several tasks of a kind it prefers the one
  with the most users of its rarer class.
  """
  tests = [config.parse_time(t, "config.data.split.test") for t in cfg.data.split.test]
  snapshot = min(tests, key=lambda t: abs(t - time), default=0)
  yes_or_no = {n: t for n, t in cfg.active_views.items() if t.answer == "binary"}
  tasks = {n: t for n, t in yes_or_no.items() if t.horizon is not None or t.user_column}
  values: dict[str, dict[str, int]] = {n: {} for n in tasks}
  for record in records:
    at_test = (record["snapshot_split"] == TEST) & (record["snapshot_time"] == snapshot)
    for name, task in tasks.items():
      known = record[f"known_{name}"].astype(bool)
      where = np.flatnonzero(known & at_test if task.horizon is not None else known)
      if len(where):
        values[name][record["user"]] = int(record[f"label_{name}"][where[-1]] > 0)
  rarer = {n: min(sum(v.values()), len(v) - sum(v.values())) for n, v in values.items()}
  order = sorted((n for n in tasks if rarer[n]), key=lambda n: -rarer[n])
  firsts = [next((n for n in order if bool(tasks[n].user_column) == about_user), None) for about_user in (False, True)]
  chosen = [n for n in firsts if n is not None]
  chosen += [n for n in order if n not in chosen]
  out = {}
  for name in chosen[:2]:
    text = task_question(tasks[name])
    if tasks[name].horizon is not None:
      text += f", counted from the test snapshot at {format_time(snapshot).replace('T00:00:00', '')}"
    else:
      text += " (the model has been trained on the labels of the training split's users, so this is no test)"
    out[name] = (values[name], text)
  return out
