"""How fast are neighbours found, exactly and by an index, and how many of them does the index find?

    python experiments/benchmarks/neighbors.py --rows 1000000 --data clusters spectrum gaussian [--json FILE]
    python experiments/benchmarks/neighbors.py --embeddings runs/quickstart/embeddings
    python experiments/benchmarks/neighbors.py --rows 200000 --libraries        # FAISS, hnswlib, usearch, one by one

Vectors of width 128, on the unit sphere:

  clusters   around 1,000 random points, with noise of half the length of the distance to the origin
  spectrum   normal with standard deviations 1, 1/2, 1/3 …: a few directions hold most of it, as in learned embeddings
  gaussian   plain noise, which has no neighbourhoods and is the worst case for any index

Queries are drawn in the same way and are not among the rows. Exact search and the index answer all of them in turn,
round after round; figures are medians over rounds, ratios are taken within a round. Exact search has the batch that is
fastest here. FAISS' own exact search (a blocked product by BLAS) stands beside it, so that nobody need believe ours to
be fast. "dimension" is the local intrinsic dimension (Levina and Bickel 2004) of a sample of 2,400 rows.

--keep DIR keeps indices there, so that building (long) and measuring can be two commands; then the building time is
that of the first.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from supermoe_jax.embeddings import hnsw_index, selection
from supermoe_jax.embeddings.exact_neighbors import ExactSearch, VectorSpace, unit_vectors

WIDTH = 128
KINDS = ("clusters", "spectrum", "gaussian")
NEAREST = 10


def draw(kind: str, rows: int, seed: int) -> np.ndarray:
  """Vectors `[rows, WIDTH]` of length 1; the points of `clusters` are the same for every seed."""
  out = np.empty((rows, WIDTH), np.float32)
  rng = np.random.default_rng(seed)
  centres = unit_vectors(np.random.default_rng(0).normal(size=(1000, WIDTH)).astype(np.float32))[0]
  for first in range(0, rows, 100_000):
    some = rng.normal(size=(min(100_000, rows - first), WIDTH)).astype(np.float32)
    if kind == "clusters":
      some = centres[rng.integers(0, len(centres), len(some))] + some * (0.5 / WIDTH**0.5)
    elif kind == "spectrum":
      some = some / (1 + np.arange(WIDTH, dtype=np.float32))
    out[first : first + len(some)] = unit_vectors(some)[0]
  return out


def dimension(vectors: np.ndarray, sample: int = 2400, nearest: int = 20) -> float:
  """The local intrinsic dimension, the median over a sample."""
  some = unit_vectors(vectors[:sample])[0].astype(np.float64)
  distance = np.sqrt(np.maximum(2 - 2 * some @ some.T, 0))
  distance.sort(axis=1)
  near = np.maximum(distance[:, 1 : nearest + 1], 1e-9)
  return float(np.median(1 / np.maximum(np.log(near[:, -1:] / near[:, :-1]).mean(axis=1), 1e-9)))


def seconds(work: Callable[[], Any]) -> float:
  begun = time.perf_counter()
  work()
  return time.perf_counter() - begun


def fastest(space: VectorSpace, queries: np.ndarray) -> ExactSearch:
  """Exact search with the batch that is fastest for these queries."""
  best, least = ExactSearch(space), float("inf")
  for batch in (256, 1024, 4096):
    if batch > max(len(queries), 256):
      continue
    best._batch = batch
    some = queries[: max(batch, 512)]
    best.search(some, NEAREST)  # compiles
    taken = seconds(lambda some=some: best.search(some, NEAREST)) / len(some)
    if taken < least:
      least, chosen = taken, batch
  best._batch = chosen
  return best


def recall(found: np.ndarray, true: np.ndarray) -> float:
  return float(np.mean([np.isin(a, b).mean() for a, b in zip(true, found)]))


def measure(name: str, rows: np.ndarray, queries: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
  """All figures of one kind of data."""
  import faiss

  space = VectorSpace.of(rows)
  exact = fastest(space, queries)
  kept = args.keep / f"{name}-{len(rows)}.index" if args.keep else None
  mark = f"{name} {len(rows)} {float(rows[-1] @ rows[0]):.6f}"
  if kept is not None and kept.exists():
    built = hnsw_index.read_index(kept, space, mark)
  else:
    built = hnsw_index.build_index(space, mark, recall=args.recall, exact=exact)
    if kept is not None:
      built.write(kept)
  size = args.scratch / f"{name}.index"
  built.write(size)
  file_bytes = size.stat().st_size
  size.unlink()
  flat = faiss.IndexFlatIP(space.shaped.shape[1])
  flat.add(space.shaped)
  few = space.shape(queries[: min(len(queries), 512)])
  true = exact.search(queries, NEAREST).row
  found = built.search(queries, NEAREST).row
  taken: dict[str, list[float]] = {"exact": [], "index": [], "flat": []}
  for _ in range(args.rounds):
    taken["exact"].append(seconds(lambda: exact.search(queries, NEAREST)) / len(queries))
    taken["index"].append(seconds(lambda: built.search(queries, NEAREST)) / len(queries))
    taken["flat"].append(seconds(lambda: flat.search(few, NEAREST)) / len(few))
  header = built.header
  return {
    "data": name,
    "rows": len(rows),
    "width": rows.shape[1],
    "queries": len(queries),
    "dimension": round(dimension(rows), 1),
    "exact_batch": exact._batch,
    "exact_per_second": 1 / statistics.median(taken["exact"]),
    "faiss_flat_per_second": 1 / statistics.median(taken["flat"]),
    "index_per_second": 1 / statistics.median(taken["index"]),
    "ratio": statistics.median(e / i for e, i in zip(taken["exact"], taken["index"])),
    "ratio_to_faiss_flat": statistics.median(f / i for f, i in zip(taken["flat"], taken["index"])),
    "rounds": args.rounds,
    "recall": recall(found, true),
    "own_recall": header.recall,
    "own_recall_low": header.recall_low,
    "ef": header.ef,
    "links": hnsw_index.LINKS,
    "construction": hnsw_index.CONSTRUCTION,
    "build_seconds": header.build_seconds,
    "file_mib": file_bytes / 2**20,
    "index_is_used": header.faster(),
  }


def libraries(rows: np.ndarray, queries: np.ndarray, name: str) -> Iterator[dict[str, Any]]:
  """The same graph parameters in three libraries: what they take to build, and at several `ef`."""
  import faiss
  import hnswlib
  from usearch.index import Index

  true = ExactSearch(VectorSpace.of(rows)).search(queries, NEAREST).row
  width, links, construction = rows.shape[1], 16, 100

  def of_hnswlib() -> Callable[[int], np.ndarray]:
    graph = hnswlib.Index("ip", width)
    graph.init_index(len(rows), ef_construction=construction, M=links, random_seed=1)
    graph.add_items(rows)
    return lambda ef: (graph.set_ef(ef), graph.knn_query(queries, NEAREST)[0])[1]

  def of_usearch() -> Callable[[int], np.ndarray]:
    graph = Index(ndim=width, metric="ip", dtype="f32", connectivity=links, expansion_add=construction)
    graph.add(np.arange(len(rows)), rows)

    def search(ef: int) -> np.ndarray:
      graph.expansion_search = ef
      return graph.search(queries, NEAREST).keys

    return search

  def of_faiss() -> Callable[[int], np.ndarray]:
    graph = faiss.IndexHNSWFlat(width, links, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = construction
    graph.add(rows)
    return lambda ef: hnsw_index.search_graph(graph, queries, NEAREST, ef)

  packages = {"faiss-cpu": of_faiss, "hnswlib": of_hnswlib, "usearch": of_usearch}
  for package, make in packages.items():
    begun = time.perf_counter()
    search = make()
    building = time.perf_counter() - begun
    for ef in (50, 100, 200, 400):
      found = search(ef)
      taken = statistics.median(seconds(lambda search=search, ef=ef: search(ef)) for _ in range(3))
      yield {
        "library": f"{package} {importlib.metadata.version(package)}",
        "data": name,
        "rows": len(rows),
        "build_seconds": building,
        "ef": ef,
        "recall": recall(found, true),
        "per_second": len(queries) / taken,
      }


def line(row: dict[str, Any]) -> str:
  if "library" in row:
    return (
      f"{row['library']:<18} {row['data']:<9} {row['rows']:>9,} rows  built in {row['build_seconds']:6.1f} s  "
      f"ef {row['ef']:>4}  recall {row['recall']:.4f}  {row['per_second']:>8,.0f} queries/s"
    )
  return (
    f"{row['data']:<10} {row['rows']:>9,} × {row['width']} (dimension {row['dimension']:.1f}): exact "
    f"{row['exact_per_second']:,.0f} queries/s (batch {row['exact_batch']}; FAISS flat "
    f"{row['faiss_flat_per_second']:,.0f}), index {row['index_per_second']:,.0f} = {row['ratio']:.1f} × exact "
    f"({row['ratio_to_faiss_flat']:.1f} × flat), recall@10 {row['recall']:.4f} (own {row['own_recall']:.4f}) with ef "
    f"{row['ef']}, built in {row['build_seconds']:,.0f} s, {row['file_mib']:,.0f} MiB"
    + ("" if row["index_is_used"] else "; exact search is used here")
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=1_000_000)
  parser.add_argument("--data", nargs="+", choices=KINDS, default=list(KINDS))
  parser.add_argument("--embeddings", type=pathlib.Path, help="measure these instead; a tenth of them asks")
  parser.add_argument("--queries", type=int, default=2000)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--recall", type=float, default=0.98)
  parser.add_argument("--libraries", action="store_true")
  parser.add_argument("--keep", type=pathlib.Path)
  parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path(os.environ.get("TMPDIR", "/tmp")))
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  if args.json:
    try:
      args.json.touch()
    except OSError as error:
      parser.error(f"{args.json} cannot be written: {error.strerror}")
  sets: Iterator[tuple[str, np.ndarray, np.ndarray]]
  if args.embeddings:
    vectors = selection.select_rows(args.embeddings).all_vectors()
    asked = np.random.default_rng(0).permutation(len(vectors)) < len(vectors) // 10
    sets = iter([(args.embeddings.name, vectors[~asked], vectors[asked])])
  else:
    sets = ((kind, draw(kind, args.rows, 1), draw(kind, args.queries, 2)) for kind in args.data)
  out: list[dict[str, Any]] = []
  for name, rows, queries in sets:
    results = libraries(rows, queries, name) if args.libraries else iter([measure(name, rows, queries, args)])
    for row in results:
      out.append(row)
      print(line(row), flush=True)
  if args.json:
    args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
  main()
