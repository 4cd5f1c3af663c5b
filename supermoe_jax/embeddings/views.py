"""Lays out embeddings as views: named parts of a vector, each normalised; 'supermoe embed --views' writes them.

    state       z, scaled to length 1
    answers     what the heads answer to the tasks that ask about users, before any link: logits of a yes or no
    aggregates  the standardised aggregates of the user's events before the time, without the following
    counts      of the aggregates that count single values, those of the whole history
    factors     the aggregates that are factors of fields, named "factor FIELD i"

Each number of z mixes many facts. A model that is fitted on frozen vectors, above all one of trees, does better with
numbers that stand for one fact each, as answers and aggregates do. Counts of values in recent windows are left out,
since they are hundreds of numbers that are nearly always 0: a linear model of few labels is worse with them than
without. A view without numbers is left out. This module alone knows the views; the manifest of a directory lists them
for its readers.

Answers look better than they are on labels that the encoder was trained on. A model that reads them is to be fitted on
times after the training period, as the quickstart's are. Labels of users are the same at all times: to predict them, or
what follows from them, leave them out of training (`exclude_tasks`), or fit on users who were held out.

Shapes: R rows, D the width of z, A aggregates.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from supermoe_jax.batch import ValueCounts
from supermoe_jax.distributed import processes
from supermoe_jax.embeddings.exact_neighbors import unit_vectors
from supermoe_jax.errors import ConfigError
from supermoe_jax.training.run import Run

logger = processes.first_process_only(logging.getLogger(__name__))

STATE, ANSWERS, AGGREGATES, COUNTS, FACTORS = "state", "answers", "aggregates", "counts", "factors"

# Answers are clipped to this, and aggregates to this many deviations.
# The deviation of an aggregate that hardly varies in training is tiny.
# A later value may lie thousands of them away; alone it would decide every distance, and it could overflow float16.
LARGEST = 10.0


class View(NamedTuple):
  """One view of an embedding.

  Attributes:
    name: its name.
    start: the place of its first number in the vector.
    width: the number of its numbers.
    columns: the names of its numbers; None for z.
    places: which of the A aggregates it holds; None for z and answers.
  """

  name: str
  start: int
  width: int
  columns: tuple[str, ...] | None
  places: tuple[int, ...] | None


class Views:
  """The layout of vectors with views.

  Attributes:
    views: the views, in the order of their numbers.
    width: the number of all numbers of a vector.
  """

  def __init__(
    self,
    width: int,
    answers: Sequence[str] = (),
    aggregates: Sequence[str] = (),
    counts: Collection[ValueCounts] = (),
    factors: slice = slice(0),
  ):
    """Lays out z, `width` numbers, then answers and aggregates; `counts` and `factors` are places among the latter."""
    self.views = [View(STATE, 0, width, None, None)]
    if answers:
      self.views.append(View(ANSWERS, width, len(answers), tuple(answers), None))
    self.width = width + len(answers)
    for name, places in split_aggregates(len(aggregates), counts, factors).items():
      self.views.append(View(name, self.width, len(places), tuple(aggregates[i] for i in places), places))
      self.width += len(places)

  def about(self) -> list[dict[str, Any]]:
    """Returns the views for the manifest: `name`, `start`, `width`, and as `columns` the names of numbers or None."""
    return [
      {"name": v.name, "start": v.start, "width": v.width, "columns": None if v.columns is None else list(v.columns)}
      for v in self.views
    ]

  def __call__(self, encoded: np.ndarray, aggregates: np.ndarray) -> np.ndarray:
    """Returns the vectors of users: float32 `[R, width]`.

    A view of n answers or aggregates is divided by √n: its length is then about 1, as that of the state is, or less
    where its numbers vary less than standardised ones do, as factors. A z of zeros stays so.

    Args:
      encoded: `[R, D + K]`, z and the K answers; see `Run.encode`.
      aggregates: `[R, A]`, standardised.
    """
    parts = []
    for view in self.views:
      own = (
        encoded[:, view.start : view.start + view.width] if view.places is None else aggregates[:, list(view.places)]
      )
      if view.columns is None:
        parts.append(unit_vectors(own)[0])
      else:
        parts.append(np.clip(own, -LARGEST, LARGEST) / np.float32(np.sqrt(view.width)))
    return np.concatenate(parts, axis=1).astype(np.float32, copy=False)


def split_aggregates(size: int, counts: Collection[ValueCounts], factors: slice) -> dict[str, tuple[int, ...]]:
  """Returns which of `size` aggregates each view holds; a view without any is left out."""
  every = np.arange(size)
  counted = [every[of.columns] for of in counts]
  whole = [columns[-of.values :] for of, columns in zip(counts, counted, strict=True)]  # of the last window
  found = {
    AGGREGATES: np.setdiff1d(every, np.concatenate([*counted, every[factors]])),
    COUNTS: np.concatenate([every[:0], *whole]),
    FACTORS: every[factors],
  }
  return {view: tuple(places.tolist()) for view, places in found.items() if len(places)}


def views_of(run: Run) -> Views:
  """Returns the layout of a run's vectors with views."""
  aggregator = run.dataset.aggregator
  if aggregator is None:
    logger.info(f"{run.dataset.path} has no aggregates (config.data.aggregates): no view holds any.")
    return Views(run.cfg.model.d_model, run.answer_columns)
  counts = run.dataset.schema.value_counts.values()
  return Views(run.cfg.model.d_model, run.answer_columns, aggregator.names, counts, aggregator.factor_columns)


def views_text(manifest: Mapping[str, Any]) -> str:
  """Returns the views of an embedding directory as text, such as "state 64, aggregates 120"; "none" without views."""
  return ", ".join(f"{view['name']} {view['width']}" for view in manifest.get("views", ())) or "none"


def view_places(path: pathlib.Path, manifest: Mapping[str, Any], wanted: Sequence[str]) -> np.ndarray:
  """Returns the places of the numbers of the views `wanted` in a vector of the directory `path`: int64, ascending.

  Raises:
    ConfigError: the directory has no views, or none of a wanted name.
  """
  known = {view["name"]: view for view in manifest.get("views", ())}
  if not known:
    raise ConfigError(f"--views {' '.join(wanted)}: {path} has no views; leave it out, or embed with --views.")
  for name in wanted:
    if name not in known:
      raise ConfigError(f"--views: {path} has no view {name!r}; name some of {', '.join(known)}.")
  chosen = [np.arange(v["start"], v["start"] + v["width"]) for name, v in known.items() if name in wanted]
  return np.concatenate(chosen)
