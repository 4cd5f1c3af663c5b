"""Reads, searches and probes directories of user embeddings."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from supermoe_jax import config
from supermoe_jax import progress as progress_lib
from supermoe_jax.api.tables import write_tables
from supermoe_jax.embeddings import embedding_files
from supermoe_jax.embeddings import neighbors as neighbors_lib
from supermoe_jax.evaluation.results_table import aligned_table
from supermoe_jax.probing import probe as probe_lib
from supermoe_jax.probing import probe_tables
from supermoe_jax.probing.protocol import Protocol


class Embeddings:
  """A directory of user embeddings.

  Attributes:
    path: the directory.
    manifest: the content of its `manifest.json`.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Opens a directory that `Run.embed` or 'supermoe embed' wrote.

    Raises:
      DataError: `path` holds no embeddings, or their manifest is damaged.
    """
    self.path = pathlib.Path(path)
    self.manifest = embedding_files.read_embedding_manifest(self.path)

  def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
    """Returns all rows, with `columns` or all of them: `user_id, as_of, embedding` and columns of the user table."""
    return embedding_files.read_embeddings(self.path, columns)

  def vectors(self) -> np.ndarray:
    """Returns all embeddings as float32 `[n, D]`, in the order of `to_table`."""
    return embedding_files.embedding_vectors(self.to_table(["embedding"]))

  def __arrow_c_stream__(self, requested_schema: object = None) -> object:
    """Gives the rows to any library that reads Arrow, as in `polars.DataFrame(embeddings)`."""
    return self.to_table().__arrow_c_stream__(requested_schema)

  def __fspath__(self) -> str:
    return str(self.path)

  def __len__(self) -> int:
    return int(self.manifest["rows"])

  def __repr__(self) -> str:
    times = ", ".join(self.manifest["as_of"])
    return f"Embeddings({str(self.path)!r}: {len(self):,} rows of width {self.manifest['width']}, as of {times})"


def neighbors(
  embeddings: str | os.PathLike[str],
  users: Sequence[Any] | None = None,
  k: int = 10,
  *,
  metric: str = "cosine",
  as_of: str | None = None,
  index: str | os.PathLike[str] | None = None,
  progress: bool = False,
) -> pa.Table:
  """Returns the k nearest users of each user: `user_id, rank, neighbor_id, score`; rank 1 is the nearest.

  Args:
    embeddings: the directory.
    users: ids of users; None: every user.
    k: the number of neighbours of each user.
    metric: cosine, dot or euclidean.
    as_of: the time of the embeddings; by default each user's latest.
    index: the file of an HNSW index, which is built if it is missing; by default the search is exact.
    progress: whether to show a bar.

  Raises:
    ConfigError: an option is out of range.
    DataError: a user has no embedding, or the embeddings are damaged.
  """
  with progress_lib.shown(progress):
    search = neighbors_lib.open_search(
      pathlib.Path(embeddings), metric=metric, as_of=as_of, index=None if index is None else pathlib.Path(index)
    )
    if users is None:
      return pa.concat_tables(search.of_all(k))
    return search.of([str(user) for user in users], k)


class ProbeReport:
  """A report of how well vectors predict labels, with comparisons on the same users.

  Attributes:
    result: the content of a `probe.json`.
  """

  def __init__(self, result: Mapping[str, Any]):
    """Wraps the content of a `probe.json`."""
    self.result = result

  def to_table(self) -> pa.Table:
    """Returns the results as a table of text, as the command shows them."""
    heading, *rows = probe_tables.probe_table(self.result)
    return pa.table({name: [row[i] for row in rows] for i, name in enumerate(heading)})

  def __repr__(self) -> str:
    return "\n".join([aligned_table(probe_tables.probe_table(self.result)), *probe_tables.probe_notes(self.result)])


def probe(
  embeddings: str | os.PathLike[str],
  labels: Any,
  *,
  others: Mapping[str, str | os.PathLike[str]] | None = None,
  user: str = "user_id",
  time: str | None = None,
  columns: Sequence[str] = (),
  kinds: Mapping[str, Literal["binary", "multiclass", "regression"]] | None = None,
  as_of: str | Sequence[str] = (),
  models: Sequence[str] = ("logistic", "lightgbm"),
  beside: Sequence[str] | None = None,
  protocol: Protocol | None = None,
  text: config.TextFormat | None = None,
  time_format: str = "",
  views: str | Sequence[str] = (),
  progress: bool = False,
) -> ProbeReport:
  """Fits probes on frozen embeddings and reports how well they predict labels, with intervals.

  Args:
    embeddings: the directory of embeddings to judge, or another system's Parquet or CSV file.
    labels: a file with a user column and columns of labels, or such a data frame.
    others: further embeddings to compare on the same users, by name.
    user: the user column of the labels.
    time: the time column of the labels, if there is one.
    columns: the labels to probe, as names or globs; by default all.
    kinds: the kinds of labels for which the guessed kind would be wrong, by name.
    as_of: the times of the embeddings to probe; by default all.
    models: the models to fit: "logistic", "lightgbm" and "mlp".
    beside: further comparisons, "aggregates" and "untrained"; by default "aggregates" if the run is found.
    protocol: folds, repeats, seed; see `probing.protocol.Protocol`.
    text: how a file of labels is written; by default as a plain CSV file.
    time_format: the strptime format of the labels' times; by default ISO 8601.
    views: the views of `embeddings` to probe, if these were written with views; by default all.
    progress: whether to show a bar.

  Raises:
    DataError: labels and embeddings share no user, or no label can be measured.
    ConfigError: a model is unknown or not installed, or the embeddings lack one of `views`.
  """
  named = {
    "embeddings": pathlib.Path(embeddings),
    **{name: pathlib.Path(other) for name, other in (others or {}).items()},
  }
  times = [as_of] if isinstance(as_of, str) else list(as_of)
  options = probe_lib.ProbeOptions(
    models=tuple(models),
    beside=None if beside is None else tuple(beside),
    as_of=tuple(config.parse_time(text, "as_of") for text in times),
    protocol=protocol or Protocol(),
  )
  with tempfile.TemporaryDirectory() as folder, progress_lib.shown(progress):
    path = _labels(labels, pathlib.Path(folder))
    table, (judged, *rest) = probe_lib.read_inputs(
      path,
      named,
      user=user,
      time=time,
      wanted=columns,
      kinds=kinds,
      text=text or config.TextFormat(),
      time_format=time_format,
      views=(views,) if isinstance(views, str) else views,
    )
    return ProbeReport(probe_lib.probe(table, judged, rest, options))


def _labels(labels: Any, folder: pathlib.Path) -> pathlib.Path:
  if isinstance(labels, str | os.PathLike):
    return pathlib.Path(labels)
  return write_tables({"labels": labels}, folder)["labels"]
