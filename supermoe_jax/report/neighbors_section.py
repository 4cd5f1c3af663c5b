"""Shows a few users, the users with the nearest embeddings, and the last events of all of them, for the report."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import numpy as np

from supermoe_jax.data.dataset.dataset import Dataset, read_users
from supermoe_jax.embeddings import selection
from supermoe_jax.embeddings.exact_neighbors import unit_vectors
from supermoe_jax.embeddings.selection import RowSelection
from supermoe_jax.report.readable_events import EventReader
from supermoe_jax.report.run_files import RunFiles

# Users are shown whose history lengths are at these quantiles, each with this many neighbours and last events.
QUANTILES = (0.1, 0.5, 0.9)
NEIGHBOURS = 5
EVENTS = 4


class NearUser(NamedTuple):
  """A neighbour of a user: its row among the embeddings, and the cosine between the two embeddings."""

  row: int
  cosine: float


def neighbors_section(run: RunFiles) -> dict[str, Any] | None:
  """Returns sample users with their nearest neighbours and last events; None without embeddings."""
  if run.embeddings is None:
    return None
  everyone = selection.select_rows(run.workdir / "embeddings")
  if len(everyone) < 2:
    return {"reason": f"The embeddings are of {len(everyone)} user{'' if len(everyone) else 's'}."}
  if not run.same_data or not (pathlib.Path(run.cfg.data.path) / "event_log").is_dir():
    return {"reason": "The dataset of this run is not at hand, so there are no events to show."}
  counts = everyone.column("n_events").to_numpy()
  chosen = _sample(counts)
  chosen = chosen[everyone.rows_of(chosen).any(axis=1)]
  near = nearest_rows(everyone, chosen, NEIGHBOURS)
  names = [str(u) for u in everyone.users.take(np.unique([*chosen, *(n.row for of in near for n in of)])).to_pylist()]
  shown = _Shown(Dataset(run.cfg.data.path), set(names))

  def described(row: int) -> dict[str, Any]:
    user = str(everyone.users[row])
    return {"user": user, "events": int(counts[row]), "last": shown.last(user, int(everyone.as_of[row]))}

  return {
    "reason": "",
    "time": everyone.time().replace("T00:00:00", ""),
    "rows": len(everyone),
    "unnamed": shown.reader.unnamed,
    "events": EVENTS,
    "people": [
      {**described(int(row)), "near": [{**described(n.row), "cosine": n.cosine} for n in of]}
      for row, of in zip(chosen, near)
    ],
  }


def _sample(events: np.ndarray) -> np.ndarray:
  """Returns the rows at the quantiles of history length: int64."""
  order = np.argsort(events, kind="stable")
  return order[list(dict.fromkeys(round(q * (len(order) - 1)) for q in QUANTILES))]


def nearest_rows(everyone: RowSelection, asked: np.ndarray, count: int) -> list[list[NearUser]]:
  """Returns the `count` nearest other rows, by cosine of the embeddings, for each row in `asked`.

  It searches one part of the embeddings at a time, so that a large directory is never in memory as a whole. A few rows
  need no index.
  """
  best: list[list[NearUser]] = [[] for _ in asked]
  if not len(asked):
    return best
  of_asked, first = unit_vectors(everyone.rows_of(asked))[0], 0
  for part, rows in enumerate(everyone.rows):
    cosine = of_asked @ unit_vectors(everyone.vectors(part))[0].T
    for i, row in enumerate(asked.tolist()):
      top = np.argsort(-cosine[i], kind="stable")[: count + 1]
      found = [NearUser(first + int(at), float(cosine[i, at])) for at in top]
      best[i] = sorted([*best[i], *(n for n in found if n.row != row)], key=lambda n: -n.cosine)[:count]
    first += len(rows)
  return best


class _Shown:
  """A lookup of the last events of some users."""

  def __init__(self, dataset: Dataset, users: set[str]):
    self.reader, self._dataset = EventReader(dataset), dataset
    names = read_users(dataset.path, ["user"])["user"].to_pylist()
    self._place = {str(u): i for i, u in enumerate(names) if str(u) in users}

  def last(self, user: str, time: int) -> list[Any] | None:
    """Returns a user's last events before a time, newest first; None if the dataset no longer holds the user."""
    if user not in self._place:
      return None
    history = self._dataset.history(self._dataset[self._place[user]])
    stop = int(np.searchsorted(history.time, time, side="left"))
    return self.reader.events(history, max(0, stop - EVENTS), stop)
