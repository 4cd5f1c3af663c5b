"""Finds the nearest of millions of vectors approximately, with a graph of near vectors (HNSW, arXiv 1603.09320; FAISS).

A search walks the graph towards the query and keeps the `ef` best vectors that it meets. The right `ef` depends on the
data, so a new index measures its recall. At first some vectors are left out of the graph.
`exact_neighbors.ExactSearch` finds their true neighbours, and `ef` is raised until the wanted recall is reached with
95 % confidence. Then these vectors are added. If exact search is faster, no index is written, and a message reports it.

The graph holds 16 bits a number. Among a million vectors this finds the same neighbours a third faster, because a
search waits for memory. The vectors that a search meets are scored again from the original numbers.

The file holds a JSON header and the graph. It does not hold the vectors, which are read from the embeddings. A header
of other embeddings, or of other rows of them, is refused.

Shapes: n vectors, m queries, D their width, k neighbours.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time as clock
from typing import Any

import numpy as np

from supermoe_jax import atomic_files
from supermoe_jax.embeddings.exact_neighbors import SPARE, ExactSearch, Neighbours, VectorSpace
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.progress import ProgressBar

KIND = b"supermoe neighbours "
MAGIC = KIND + b"2\n"

# Links of a vector on each level, and candidates examined for its links when it is added. Chosen by measurement: see
# experiments/benchmarks/neighbors.py.
LINKS = 16
CONSTRUCTION = 100
# Neighbours that recall counts, queries that measure it, and the first and the largest `ef` that are tried.
NEAREST = 10
SAMPLE = 1000
EF_FIRST, EF_LAST = 16, 8192
# `ef` is not raised further once the index takes this many times as long as exact search.
SLOWER = 2.0
# Vectors added between two steps of the progress bar.
ADDED = 20_000


@dataclasses.dataclass(frozen=True)
class IndexHeader:
  """The embeddings that an index belongs to, and its measured recall and speed.

  Attributes:
    fingerprint: hash of the embeddings; see `selection.selection_fingerprint`.
    metric: one of `exact_neighbors.METRICS`.
    rows: number of vectors.
    width: width of a vector.
    target: recall@10 that was asked for.
    recall: recall@10 measured with `ef`, on `sample` vectors that the graph did not hold.
    recall_low: the lower end of its 95 % interval.
    ef: number of best vectors that a search keeps while it walks.
    sample: number of vectors used as queries.
    per_second: queries a second with `ef`.
    exact_per_second: queries a second of exact search, measured with the same queries.
    build_seconds: seconds to build the graph alone.
    seed: seed of the order in which vectors were added.
  """

  fingerprint: str
  metric: str
  rows: int
  width: int
  target: float
  recall: float
  recall_low: float
  ef: int
  sample: int
  per_second: float
  exact_per_second: float
  build_seconds: float
  seed: int

  def faster(self) -> bool:
    """Returns whether the index reached its recall and is faster than exact search."""
    return self.recall_low >= self.target and self.per_second > self.exact_per_second


class HnswIndex:
  """An approximate search for the nearest of all vectors of a space."""

  def __init__(self, header: IndexHeader, space: VectorSpace, graph: Any):
    self.header, self.space, self._graph = header, space, graph
    self._order, self._scale = insertion_order(header.rows, header.seed), graph_scale(space)

  def search(self, queries: np.ndarray, k: int, but: np.ndarray | None = None) -> Neighbours:
    """Returns neighbours as `exact_neighbors.ExactSearch.search` does, but may miss some."""
    m = len(queries)
    but = np.full(m, -1, np.int64) if but is None else np.asarray(but, np.int64)
    found = search_graph(self._graph, self.space.shape(queries) * self._scale, k + SPARE, self.header.ef)
    found = np.where(found < 0, -1, self._order[found])
    found = np.where(found == but[:, None], -1, found)
    best = self.space.best(queries, found, k)
    row, score = np.full((m, k), -1, np.int64), np.full((m, k), np.nan)
    row[:, : best.row.shape[1]], score[:, : best.row.shape[1]] = best
    return Neighbours(row, score)

  def write(self, file: pathlib.Path) -> None:
    """Writes the index, whole or not at all.

    Raises:
      DataError: the file cannot be written.
    """
    faiss = _faiss()
    try:
      with atomic_files.replacing_file(file) as part, part.open("wb") as stream:
        stream.write(MAGIC + json.dumps(dataclasses.asdict(self.header)).encode() + b"\n")
        faiss.write_index(self._graph, faiss.PyCallbackIOWriter(stream.write), faiss.IO_FLAG_SKIP_STORAGE)
    except OSError as error:
      raise DataError(f"writing {file} failed: {error}; nothing was kept.") from error


def insertion_order(rows: int, seed: int) -> np.ndarray:
  """Returns the order in which the rows of a space are added to its graph; the last ones measure its recall."""
  return np.random.default_rng(seed).permutation(rows)


def graph_scale(space: VectorSpace) -> np.float32:
  """Returns the factor that brings the numbers of a space's vectors within [-1, 1], which 16 bits can hold."""
  largest = max(space.shaped.max(), -space.shaped.min())
  return np.float32(1 / largest if largest > 0 else 1)


def search_graph(graph: Any, queries: np.ndarray, k: int, ef: int) -> np.ndarray:
  """Returns the k best vectors that a search meets, as places in the graph: int64 `[m, k]`, -1 for none."""
  parameters = _faiss().SearchParametersHNSW()
  parameters.efSearch = max(ef, k)
  return np.asarray(graph.search(queries, k, params=parameters)[1])


def build_index(
  space: VectorSpace,
  fingerprint: str,
  *,
  recall: float = 0.98,
  links: int = LINKS,
  construction: int = CONSTRUCTION,
  sample: int = SAMPLE,
  seed: int = 0,
  exact: ExactSearch | None = None,
) -> HnswIndex:
  """Builds the graph of a space and finds the `ef` for a recall; see `IndexHeader.faster` for whether to use it.

  Args:
    space: the vectors.
    fingerprint: hash of the embeddings that the vectors come from.
    recall: the recall@10 to reach.
    links: links of a vector on each level of the graph, doubled on the lowest.
    construction: candidates examined for the links of a vector.
    sample: vectors that are left out at first and serve as queries.
    seed: seed of the order in which vectors are added.
    exact: exact search in the same space, if one exists.

  Raises:
    ConfigError: FAISS is not installed, or the recall is out of range.
    DataError: there are too few vectors.
  """
  faiss = _faiss()
  if not 0 < recall < 1:
    raise ConfigError(f"--recall={recall:g} must lie in (0, 1); --exact finds all neighbours.")
  rows, width = space.shaped.shape
  sample = min(sample, rows // 10)
  if sample < NEAREST:
    raise DataError(f"{rows} vectors are too few for an index; leave --index out to search exactly.")
  places = insertion_order(rows, seed)
  by = graph_scale(space)
  graph = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_fp16, links, _metric(space))
  graph.hnsw.efConstruction = construction
  begun = clock.monotonic()
  with ProgressBar(total=rows, desc="building the index", unit=" users", mininterval=1) as bar:
    for first in range(0, rows - sample, ADDED):
      some = places[first : min(first + ADDED, rows - sample)]
      graph.add(space.shaped[some] * by)
      bar.update(len(some))
    asked = places[rows - sample :]
    building = clock.monotonic() - begun
    left_out = space.shaped[asked] * by
    found = _tune(graph, space, places, asked, left_out, recall, exact or ExactSearch(space))
    begun = clock.monotonic()
    graph.add(left_out)
    bar.update(len(asked))
  header = IndexHeader(
    fingerprint=fingerprint,
    metric=space.metric,
    rows=rows,
    width=width,
    target=recall,
    sample=len(asked),
    build_seconds=round(building + clock.monotonic() - begun, 1),
    seed=seed,
    **found,
  )
  return HnswIndex(header, space, graph)


def _tune(
  graph: Any,
  space: VectorSpace,
  places: np.ndarray,
  asked: np.ndarray,
  left_out: np.ndarray,
  target: float,
  exact: ExactSearch,
) -> dict[str, Any]:
  """Searches the smallest `ef` at which the rows `asked` reach the recall `target`; returns it and its measurements.

  It raises `ef` until the recall is reached, the index is too slow (`SLOWER`), or `ef` is `EF_LAST`. `left_out` holds
  the rows `asked`, scaled for the graph, which does not contain them yet.
  """
  queries = space.vectors[asked]
  # The graph does not hold the rows `asked` yet: more neighbours are found than needed, and these rows dropped.
  true = exact.search(queries, 4 * NEAREST + len(asked) * 4 * NEAREST // len(places), asked).row
  exact.search(queries, NEAREST, asked)  # compiles
  begun = clock.perf_counter()
  exact.search(queries, NEAREST, asked)
  exact_seconds = clock.perf_counter() - begun
  absent = np.zeros(len(places) + 1, bool)
  absent[asked] = absent[-1] = True
  wanted = [row[~absent[row]][:NEAREST] for row in true]

  def ask(ef: int) -> dict[str, Any]:
    begun = clock.perf_counter()
    found = places[search_graph(graph, left_out, NEAREST + SPARE, ef)]
    best = space.best(queries, found, NEAREST).row
    seconds = clock.perf_counter() - begun
    shares = np.array([np.isin(w, b).mean() for w, b in zip(wanted, best)])
    low = float(shares.mean() - 1.96 * shares.std(ddof=1) / len(shares) ** 0.5)
    return {"recall": float(shares.mean()), "recall_low": low, "ef": ef, "per_second": len(asked) / seconds}

  least = len(asked) / exact_seconds / SLOWER  # queries a second
  too_few, answer = EF_FIRST, ask(EF_FIRST)
  while answer["recall_low"] < target and answer["ef"] < EF_LAST and answer["per_second"] >= least:
    too_few = answer["ef"]
    answer = ask(min(int(too_few * 2**0.5) + 1, EF_LAST))
  while answer["recall_low"] >= target and answer["ef"] - too_few > max(1, too_few // 16):
    between = ask((too_few + answer["ef"]) // 2)
    if between["recall_low"] >= target:
      answer = between
    else:
      too_few = between["ef"]
  return {**answer, "exact_per_second": len(asked) / exact_seconds}


def check_index_file(file: pathlib.Path) -> None:
  """Raises DataError if a file is not an index: it must then be neither read as one nor replaced by one."""
  with file.open("rb") as stream:
    if not KIND.startswith(stream.read(len(KIND))):  # a file cut off within these bytes holds nothing to lose
      raise DataError(f"{file} is no index of neighbours; name another --index.")


def read_index(file: pathlib.Path, space: VectorSpace, fingerprint: str) -> HnswIndex:
  """Reads the index of a space's vectors.

  Raises:
    ConfigError: FAISS is not installed, or the index has another metric.
    DataError: the file is not an index, is damaged, or belongs to other embeddings.
  """
  faiss = _faiss()
  if file.is_dir():
    raise DataError(f"{file} is a directory; name a file for the --index.")
  try:
    with file.open("rb") as stream:
      check_index_file(file)
      if stream.readline() != MAGIC:
        raise DataError(f"{file} is an index of another version, or damaged; build it again with --rebuild.")
      header = IndexHeader(**json.loads(stream.readline()))
      if header.metric != space.metric:
        raise ConfigError(
          f"{file} was built for --metric {header.metric}, not {space.metric}; name another --index for that."
        )
      if header.fingerprint != fingerprint or (header.rows, header.width) != space.shaped.shape:
        raise DataError(
          f"{file} is stale: it was built from other embeddings, or for another time, than this search "
          f"({header.rows:,} vectors of width {header.width}; now {len(space.shaped):,} of {space.shaped.shape[1]}). "
          "Build it again with --rebuild, or name another --index."
        )
      graph = faiss.read_index(faiss.PyCallbackIOReader(stream.read), faiss.IO_FLAG_SKIP_STORAGE)
  except (OSError, ValueError, TypeError, RuntimeError) as error:
    if isinstance(error, DataError | ConfigError):
      raise
    raise DataError(f"{file} is damaged ({str(error).splitlines()[0]}); build it again with --rebuild.") from error
  vectors = faiss.IndexScalarQuantizer(header.width, faiss.ScalarQuantizer.QT_fp16, _metric(space))
  places, by = insertion_order(header.rows, header.seed), graph_scale(space)
  for first in range(0, header.rows, ADDED):
    vectors.add(space.shaped[places[first : first + ADDED]] * by)
  graph.storage, graph.own_fields = vectors, True
  vectors.this.disown()
  return HnswIndex(header, space, graph)


def index_summary(header: IndexHeader) -> str:
  """Returns a line about the measured recall and speed of an index."""
  text = (
    f"recall@{NEAREST} {header.recall:.4f} (95 %: at least {header.recall_low:.4f}; {header.target:g} required) with "
    f"ef {header.ef} on {header.sample:,} vectors that were not yet in the index; {header.per_second:,.0f} queries a "
    f"second, exact search {header.exact_per_second:,.0f}"
  )
  if header.recall_low < header.target:
    return f"{text}. Exact search became faster before the index reached this recall, so exact search is used."
  if not header.faster():
    return f"{text}. Exact search is faster, so it is used."
  return text


def _metric(space: VectorSpace) -> Any:
  return _faiss().METRIC_L2 if space.metric == "euclidean" else _faiss().METRIC_INNER_PRODUCT


def _faiss() -> Any:
  try:
    import faiss
  except ImportError:
    raise ConfigError(
      "an index of neighbours needs FAISS: pip install 'supermoe_jax[search]'; or leave --index out."
    ) from None
  return faiss
