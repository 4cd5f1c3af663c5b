"""A few users, the users whose embeddings are nearest to theirs, and what all of them did last."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from supermoe_jax.data.dataset import Dataset, read_users
from supermoe_jax.data.labels import iso
from supermoe_jax.report.parts import Parts
from supermoe_jax.report.readable_events import Reader
from supermoe_jax.serving import embeddings

# Users are shown whose history is as long as at these quantiles, each with so many neighbours and so many events.
QUANTILES = (0.1, 0.5, 0.9)
NEIGHBOURS = 5
EVENTS = 4
# Embeddings compared at a time.
ROWS_AT_ONCE = 65_536


class Person(NamedTuple):
  """A row of the embeddings: its user, its vector, and how many events the user had by then."""

  user: str
  vector: np.ndarray
  events: int


class Near(NamedTuple):
  """A neighbour, and the cosine of the angle between the embeddings."""

  user: str
  events: int
  cosine: float


def of_some_users(run: Parts) -> dict[str, Any] | None:
  """Sample users with their nearest neighbours and last events; None without embeddings."""
  if run.embeddings is None:
    return None
  folder = run.workdir / "embeddings"
  lengths = embeddings.read(folder, ["user_id", "as_of", "n_events"])
  times = lengths["as_of"].cast("int64").to_numpy()
  if not len(times):
    return {"reason": "The embeddings hold no row."}
  latest = int(times.max())
  lengths = lengths.filter(times == latest)
  if len(lengths) < 2:
    return {"reason": f"Only one user has an embedding as of {iso(latest)}."}
  if not run.same_data or not (pathlib.Path(run.cfg.data.path) / "event_log").is_dir():
    return {"reason": "The dataset of this run is not at hand, so there are no events to show."}
  chosen = _sample(lengths["user_id"].to_pylist(), lengths["n_events"].to_numpy())
  people = [p for p in _people(folder, latest, chosen) if np.linalg.norm(p.vector) > 0]
  near = nearest(folder, latest, people, NEIGHBOURS)
  dataset = Dataset(run.cfg.data.path)
  shown = _Shown(dataset, latest, {p.user for p in people} | {n.user for row in near for n in row})
  return {
    "reason": "",
    "time": iso(latest).replace("T00:00:00", ""),
    "rows": len(lengths),
    "unnamed": shown.reader.unnamed,
    "events": EVENTS,
    "people": [
      {
        "user": person.user,
        "events": person.events,
        "last": shown.last(person.user),
        "near": [{**n._asdict(), "last": shown.last(n.user)} for n in row],
      }
      for person, row in zip(people, near)
    ],
  }


def _sample(users: Sequence[Any], events: np.ndarray) -> list[Any]:
  """The users at the quantiles of the lengths of histories."""
  order = np.argsort(events, kind="stable")
  places = dict.fromkeys(round(q * (len(order) - 1)) for q in QUANTILES)
  return [users[order[i]] for i in places]


def _people(folder: pathlib.Path, time: int, users: Sequence[Any]) -> list[Person]:
  """The rows of these users at a time, in the order of the users."""
  found: dict[Any, Person] = {}
  for table in _batches(folder, time):
    for row in np.flatnonzero(pc.is_in(table["user_id"], value_set=_like(table["user_id"], users)).to_numpy()):
      part = table.slice(int(row), 1)
      user = part["user_id"][0].as_py()
      found[user] = Person(str(user), embeddings.vectors(part)[0], part["n_events"][0].as_py())
  return [found[u] for u in users]


def _like(column: pa.ChunkedArray, users: Sequence[Any]) -> pa.Array:

  return pa.array(users, column.type)


def _batches(folder: pathlib.Path, time: int) -> Iterator[pa.Table]:
  """The rows at a time, `ROWS_AT_ONCE` or fewer at once: a large directory is never whole in memory."""

  for file in embeddings.parts(folder):
    with pq.ParquetFile(file) as opened:
      for batch in opened.iter_batches(ROWS_AT_ONCE, columns=["user_id", "as_of", "embedding", "n_events"]):
        table = pa.Table.from_batches([batch])
        rows = table.filter(table["as_of"].cast("int64").to_numpy() == time)
        if len(rows):
          yield rows


def nearest(folder: pathlib.Path, time: int, people: Sequence[Person], count: int) -> list[list[Near]]:
  """The `count` other users nearest to each of some people by the cosine of their embeddings, among all at that time.

  Exact, as of a few people it is quick: one product a chunk of rows.
  """
  asked = _unit(np.stack([p.vector for p in people])) if people else np.zeros((0, 1), np.float32)
  best: list[list[Near]] = [[] for _ in people]
  for table in _batches(folder, time) if people else ():
    users, events = table["user_id"], table["n_events"]
    cosine = asked @ _unit(embeddings.vectors(table)).T
    for i, person in enumerate(people):
      top = np.argsort(-cosine[i], kind="stable")[: count + 1]
      rows = [Near(str(users[int(r)].as_py()), events[int(r)].as_py(), float(cosine[i, r])) for r in top]
      best[i] = sorted([*best[i], *(n for n in rows if n.user != person.user)], key=lambda n: -n.cosine)[:count]
  return best


def _unit(vectors: np.ndarray) -> np.ndarray:
  """Vectors `[n, D]` of length 1; one of zeros stays, and is near to nobody."""
  length = np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors / np.where(length > 0, length, 1)


class _Shown:
  """The last events of some users before a time."""

  def __init__(self, dataset: Dataset, time: int, users: set[str]):
    self.reader = Reader(dataset)
    self._dataset, self._time = dataset, time
    names = read_users(dataset.path, ["user"])["user"].to_pylist()
    self._place = {str(u): i for i, u in enumerate(names) if str(u) in users}

  def last(self, user: str) -> list[Any] | None:
    """The newest events of a user, the last first; None of a user whom the dataset does not hold (any longer)."""
    if user not in self._place:
      return None
    history = self._dataset.history(self._dataset[self._place[user]])
    stop = int(np.searchsorted(history.time, self._time, side="left"))
    return self.reader.events(history, max(0, stop - EVENTS), stop)
