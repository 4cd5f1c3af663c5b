"""The nearest of millions of vectors, nearly: a graph of near vectors (HNSW, arXiv 1603.09320; by FAISS).

A search walks the graph towards the query and keeps the `ef` best that it met. How many it takes depends on the data,
so a new index measures itself. Some vectors are left out of the graph at first. `exact_neighbors.ExactSearch` finds
their true neighbours, and `ef` is raised until the wanted recall is reached with 95 % confidence; then they are added.
Where that would be slower than exact search there is no index, and a message says so.

The graph holds vectors with 16 bits a number, which finds the same neighbours a third faster among a million (what a
search waits for is memory); those that it met are scored again from the vectors as they are.

The file is one header of JSON and the graph. Vectors are not in it: they are those of the embeddings, and a header of
other embeddings, or of other rows of them, is refused.

Shapes: n vectors, m queries, D their width, k neighbours.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time as clock
from typing import Any

import numpy as np
from tqdm import tqdm

from supermoe_jax import atomic_files
from supermoe_jax.embeddings.exact_neighbors import SPARE, ExactSearch, Neighbours, VectorSpace
from supermoe_jax.errors import ConfigError, DataError

KIND = b"supermoe neighbours "
MAGIC = KIND + b"2\n"

# Links of a vector on each level, and how many are looked at for its own when it is added: chosen by measurement, see
# experiments/benchmarks/neighbors.py.
LINKS = 16
CONSTRUCTION = 100
# Neighbours for which the recall is measured, queries of that, and the `ef` that are tried first and last.
NEAREST = 10
SAMPLE = 1000
EF_FIRST, EF_LAST = 16, 8192
# An index that takes so many times as long as exact search is not worth a larger `ef`.
SLOWER = 2.0
# Vectors that are added between two steps of the progress bar.
ADDED = 20_000


@dataclasses.dataclass(frozen=True)
class IndexHeader:
  """What an index is of, and what it was measured to do.

  Attributes:
    fingerprint: of the embeddings; see `selection.selection_fingerprint`.
    metric: one of `exact_neighbors.METRICS`.
    rows: vectors.
    width: of a vector.
    target: recall@10 that was asked for.
    recall: recall@10 that was measured with `ef`, on `sample` vectors that the graph did not hold.
    recall_low: the lower end of its 95 % interval.
    ef: how many of the best that it met a search keeps.
    sample: how many vectors were asked about.
    per_second: queries a second with `ef`.
    exact_per_second: queries a second of exact search, asked the same in the same way.
    build_seconds: of the graph alone.
    seed: of the order in which vectors were added.
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
    """Whether the index reached its recall, and faster than exact search."""
    return self.recall_low >= self.target and self.per_second > self.exact_per_second


class HnswIndex:
  """Finds the nearest of all vectors of a space, nearly."""

  def __init__(self, header: IndexHeader, space: VectorSpace, graph: Any):
    self.header, self.space, self._graph = header, space, graph
    self._order, self._scale = insertion_order(header.rows, header.seed), graph_scale(space)

  def search(self, queries: np.ndarray, k: int, but: np.ndarray | None = None) -> Neighbours:
    """As `exact_neighbors.ExactSearch.search`, but some neighbours may be missed."""
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
      DataError: it cannot be written.
    """
    faiss = _faiss()
    try:
      with atomic_files.replacing_file(file) as part, part.open("wb") as stream:
        stream.write(MAGIC + json.dumps(dataclasses.asdict(self.header)).encode() + b"\n")
        faiss.write_index(self._graph, faiss.PyCallbackIOWriter(stream.write), faiss.IO_FLAG_SKIP_STORAGE)
    except OSError as error:
      raise DataError(f"writing {file} failed: {error}; nothing was kept.") from error


def insertion_order(rows: int, seed: int) -> np.ndarray:
  """The order in which the rows of a space are added to its graph; the last `SAMPLE` of them measure it."""
  return np.random.default_rng(seed).permutation(rows)


def graph_scale(space: VectorSpace) -> np.float32:
  """What the vectors of a space are multiplied with for its graph: no number is beyond 1, as 16 bits take them."""
  largest = max(space.shaped.max(), -space.shaped.min())
  return np.float32(1 / largest if largest > 0 else 1)


def search_graph(graph: Any, queries: np.ndarray, k: int, ef: int) -> np.ndarray:
  """The k best of those that a search meets, as places in the graph: int64 `[m, k]`, -1 for none."""
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
  """Builds the graph of a space and finds the `ef` that it takes; see `Header.faster` for whether it is worth having.

  Args:
    space: the vectors.
    fingerprint: of the embeddings that they are of.
    recall: the recall@10 that is asked for.
    links: of a vector on each level of the graph, doubled on the lowest.
    construction: how many are looked at for the links of a vector.
    sample: vectors that are left out at first, and asked about.
    seed: of the order in which vectors are added.
    exact: exact search in the same space, if it is at hand.

  Raises:
    ConfigError: FAISS is not installed, or a recall that cannot be.
    DataError: too few vectors.
  """
  faiss = _faiss()
  if not 0 < recall < 1:
    raise ConfigError(f"--recall={recall:g} must lie in (0, 1); --exact finds all.")
  rows, width = space.shaped.shape
  sample = min(sample, rows // 10)
  if sample < NEAREST:
    raise DataError(f"{rows} vectors are too few for an index, which exact search does not need; leave --index out.")
  places = insertion_order(rows, seed)
  by = graph_scale(space)
  graph = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_fp16, links, _metric(space))
  graph.hnsw.efConstruction = construction
  begun = clock.monotonic()
  with tqdm(total=rows, desc="building the index", unit=" users", mininterval=1) as bar:
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
  """Raises `ef` until the recall of the rows `asked` is reached, or would not come before exact search does.

  `left_out` are those rows as the graph takes them; it does not hold them yet.
  """
  queries = space.vectors[asked]
  # Neighbours that are asked about themselves are not in the graph yet: more are found, and those left out.
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
  """Raises DataError if a file is no index, and so must neither be read as one nor replaced by one."""
  with file.open("rb") as stream:
    if not KIND.startswith(stream.read(len(KIND))):  # what was cut off within these bytes is none that anybody needs
      raise DataError(f"{file} is no index of neighbours; name another --index.")


def read_index(file: pathlib.Path, space: VectorSpace, fingerprint: str) -> HnswIndex:
  """Reads an index of these vectors.

  Raises:
    ConfigError: FAISS is not installed, or the index is of another metric.
    DataError: the file is no index, is damaged, or is of other embeddings.
  """
  faiss = _faiss()
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
          f"{file} is stale: it was built of other embeddings, or as of another time, than those that were asked for "
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
  """What an index was measured to do, in a line."""
  text = (
    f"recall@{NEAREST} {header.recall:.4f} (95 %: at least {header.recall_low:.4f}; {header.target:g} asked for) with "
    f"ef {header.ef} on {header.sample:,} vectors that it did not hold; {header.per_second:,.0f} queries a second, "
    f"exact search {header.exact_per_second:,.0f}"
  )
  if header.recall_low < header.target:
    return f"{text}. The recall was not reached before exact search was faster: exact search is used."
  if not header.faster():
    return f"{text}. Exact search is faster, and is used."
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
