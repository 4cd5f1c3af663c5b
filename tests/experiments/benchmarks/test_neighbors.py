"""The benchmark of neighbours measures what it says, at a size that takes seconds."""

import json
import math
import pathlib
import sys
import types

import numpy as np
import pytest

from tests.fixtures import scripts


@pytest.fixture(scope="module")
def benchmark() -> types.ModuleType:
  return scripts.load(scripts.BENCHMARKS / "neighbors.py")


@pytest.mark.nightly
def test_figures_are_of_the_data_that_was_asked_for(
  benchmark: types.ModuleType,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  file = tmp_path / "figures.json"
  arguments = [
    "--rows",
    "1000",
    "--queries",
    "200",
    "--rounds",
    "1",
    "--recall",
    "0.9",
    "--data",
    "clusters",
    "gaussian",
  ]
  kept = ["--keep", str(tmp_path), "--scratch", str(tmp_path), "--json", str(file)]
  monkeypatch.setattr(sys, "argv", ["neighbors.py", *arguments, *kept])
  benchmark.main()
  clusters, noise = json.loads(file.read_text())
  for row in (clusters, noise):
    assert (row["rows"], row["queries"], row["width"]) == (1000, 200, 128)
    figures = [
      row[k] for k in ("exact_per_second", "faiss_flat_per_second", "index_per_second", "ratio", "build_seconds")
    ]
    assert all(math.isfinite(f) and f > 0 for f in figures)
    assert 0 < row["recall"] <= 1 and row["file_mib"] > 0
  assert clusters["recall"] > 0.85
  assert clusters["dimension"] < noise["dimension"]
  assert (tmp_path / "clusters-1000.index").is_file()
  said = capsys.readouterr().out
  assert f"{clusters['ratio']:.1f} × exact" in said


def test_the_dimension_of_known_shapes_is_found(benchmark: types.ModuleType) -> None:
  rng = np.random.default_rng(0)
  for dimension in (2, 6):
    flat = np.zeros((2400, 40))
    flat[:, : dimension + 1] = rng.normal(size=(2400, dimension + 1))
    assert benchmark.dimension(flat.astype("f4")) == pytest.approx(dimension, rel=0.2)


def test_queries_are_of_the_same_kind_but_none_of_the_rows(benchmark: types.ModuleType) -> None:
  rows, queries = benchmark.draw("clusters", 2000, 1), benchmark.draw("clusters", 100, 2)
  nearest = (queries @ rows.T).max(axis=1)
  assert np.all(nearest < 0.999) and np.median(nearest) > 0.6
