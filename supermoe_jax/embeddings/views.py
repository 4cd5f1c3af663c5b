"""Lays out embeddings as views: named parts of a vector, each normalised; 'supermoe embed --views' writes them.

    state       z, scaled to length 1
    aggregates  the standardised aggregates of the user's events before the time, without the following
    counts      of the aggregates that count single values, those of the whole history
    factors     the aggregates that are factors of fields, named "factor FIELD i"

Each number of z mixes many facts. A model that is fitted on frozen vectors, above all one of trees, does better with
numbers that stand for one fact each, as aggregates do. Counts of values in recent windows are left out, since they are
hundreds of numbers that are nearly always 0: a linear model of few labels is worse with them than without. A view
without numbers is left out. This module alone knows the views; the manifest of a directory lists them for its readers.

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

STATE, AGGREGATES, COUNTS, FACTORS = "state", "aggregates", "counts", "factors"

# Aggregates are clipped to this many deviations. The deviation of an aggregate that hardly varies in training is tiny.
# A later value may lie thousands of them away; alone it would decide every distance, and it could overflow float16.
LARGEST = 10.0


class View(NamedTuple):
  """One view of an embedding.

  Attributes:
    name: its name.
    start: the place of its first number in the vector.
    width: the number of its numbers.
    places: which of the A aggregates it holds; None for z.
  """

  name: str
  start: int
  width: int
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
    aggregates: Sequence[str] = (),
    counts: Collection[ValueCounts] = (),
    factors: slice = slice(0),
  ):
    """Lays out z, `width` numbers, and then the aggregates; `counts` and `factors` are places among `aggregates`."""
    self._names = tuple(aggregates)
    self.views = [View(STATE, 0, width, None)]
    self.width = width
    for name, places in split_aggregates(len(aggregates), counts, factors).items():
      self.views.append(View(name, self.width, len(places), places))
      self.width += len(places)

  def about(self) -> list[dict[str, Any]]:
    """Returns the views for the manifest: `name`, `start`, `width`, and as `columns` the aggregates' names or None."""
    return [
      {
        "name": view.name,
        "start": view.start,
        "width": view.width,
        "columns": None if view.places is None else [self._names[i] for i in view.places],
      }
      for view in self.views
    ]

  def __call__(self, z: np.ndarray, aggregates: np.ndarray) -> np.ndarray:
    """Returns the vectors of users with these `z [R, D]` and standardised `aggregates [R, A]`: float32 `[R, width]`.

    A view of n aggregates is divided by √n: its length is then about 1, as that of the state is, or less where the
    aggregates vary less than standardised numbers do, as factors. A z of zeros stays so.
    """
    parts = []
    for view in self.views:
      if view.places is None:
        parts.append(unit_vectors(z)[0])
      else:
        parts.append(np.clip(aggregates[:, list(view.places)], -LARGEST, LARGEST) / np.float32(np.sqrt(view.width)))
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
    logger.info(f"{run.dataset.path} has no aggregates (config.data.aggregates): the embeddings hold only the state.")
    return Views(run.cfg.model.d_model)
  counts = run.dataset.schema.value_counts.values()
  return Views(run.cfg.model.d_model, aggregator.names, counts, aggregator.factor_columns)


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
