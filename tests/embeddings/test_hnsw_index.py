"""An index reaches the recall that it states, is of the embeddings it was built of, and gives way to exact search."""

import itertools
import pathlib
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli
from supermoe_jax.embeddings import hnsw_index, neighbors
from supermoe_jax.embeddings import selection as selection_lib
from supermoe_jax.embeddings.exact_neighbors import METRICS, ExactSearch, VectorSpace
from tests.fixtures import embedding_folder
from tests.fixtures.grids import quick_few


def clustered(n: int = 4000, width: int = 24, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(40, width))[rng.integers(0, 40, n)] + 0.4 * rng.normal(size=(n, width))).astype("f4")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
  """Exact search among few is fast, and a busy machine slow: that must not end the search for an ef."""
  monkeypatch.setattr(hnsw_index, "SLOWER", float("inf"))


@pytest.mark.parametrize("metric", METRICS)
def test_the_recall_that_is_stated_is_reached(metric: str, tmp_path: pathlib.Path) -> None:
  x = clustered()
  space = VectorSpace.of(x, metric)
  exact = ExactSearch(space)
  built = hnsw_index.build_index(space, "these", recall=0.95, exact=exact)
  header = built.header
  assert header.recall >= header.recall_low >= 0.95
  # Other users than those that the ef was chosen on, some that the graph got early and some late.
  asked = np.arange(0, 4000, 9)
  true, found = exact.search(x[asked], 10, asked), built.search(x[asked], 10, asked)
  recall = np.mean([np.isin(a, b).mean() for a, b in zip(true.row, found.row)])
  assert recall >= 0.94
  assert not np.any(found.row == asked[:, None])
  # What is found has the scores that exact search gives it.
  np.testing.assert_array_equal(found.score, space.score(x[asked], found.row))
  built.write(tmp_path / "some.index")
  again = hnsw_index.read_index(tmp_path / "some.index", space, "these")
  assert again.header == header
  np.testing.assert_array_equal(again.search(x[asked], 10, asked).row, found.row)


@pytest.mark.parametrize(
  ("metric", "size"),
  quick_few([("cosine", 1e9), ("dot", 1e-9), ("euclidean", 1e9)], itertools.product(METRICS, [1e-9, 1e9])),
)
def test_vectors_beyond_the_range_of_16_bits_are_found(metric: str, size: float) -> None:
  space = VectorSpace.of(clustered(1500) * np.float32(size), metric)
  assert hnsw_index.build_index(space, "these", recall=0.95).header.recall_low >= 0.95


def test_more_recall_takes_a_larger_ef() -> None:
  space = VectorSpace.of(np.random.default_rng(0).normal(size=(2000, 32)).astype("f4"))
  few, many = (hnsw_index.build_index(space, "these", recall=r, links=8).header for r in (0.3, 0.97))
  assert few.ef < many.ef and few.recall < many.recall and many.recall_low >= 0.97


def test_a_recall_that_comes_too_late_gives_way_to_exact_search(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """With one link a vector the graph falls apart, and no ef helps."""
  monkeypatch.setattr(hnsw_index, "EF_LAST", 64)
  built = hnsw_index.build_index
  monkeypatch.setattr(hnsw_index, "build_index", lambda *a, **k: built(*a, links=2, construction=2, **k))
  folder = embedding_folder.write(tmp_path / "e", np.random.default_rng(0).normal(size=(3000, 32)), rows_per_part=3000)
  search = neighbors.open_search(folder, index=tmp_path / "some.index", recall=0.999)
  assert isinstance(search.engine, ExactSearch)
  assert any("exact search is used" in line for line in search.said)
  assert not (tmp_path / "some.index").exists()


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Embeddings and an index of them; do not change them."""
  root = tmp_path_factory.mktemp("indexed")
  selection = selection_lib.select_rows(embedding_folder.write(root / "embeddings", clustered(1500), rows_per_part=700))
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(hnsw_index, "SLOWER", float("inf"))
    built = hnsw_index.build_index(
      VectorSpace.of(selection.all_vectors()), selection_lib.selection_fingerprint(selection)
    )
  built.write(root / "users.index")
  return root


@pytest.fixture
def folder(indexed: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(indexed / "embeddings", tmp_path / "embeddings"))


@pytest.fixture
def file(indexed: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copy(indexed / "users.index", tmp_path / "users.index"))


def test_a_slow_index_is_not_made_slower(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(hnsw_index, "SLOWER", 1e-9)
  header = hnsw_index.build_index(
    VectorSpace.of(np.random.default_rng(0).normal(size=(2000, 32)).astype("f4")), "these"
  ).header
  assert header.ef == hnsw_index.EF_FIRST and not header.faster()
  assert "exact search is used" in hnsw_index.index_summary(header)


def test_the_command_answers_from_the_index(
  folder: pathlib.Path, file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  assert cli.main(["neighbors", "--embeddings", str(folder), "--user", "9", "--index", str(file), "--k", "3"]) == 0
  said = capsys.readouterr().out
  x = clustered(1500)
  row = ExactSearch(VectorSpace.of(x)).search(x[[9]], 3, np.array([9])).row[0]
  assert [int(line.split()[1]) for line in said.splitlines()[-3:]] == row.tolist()
  assert "recall@10" in said and "vectors that were not yet in the index" in said


def test_an_index_of_other_embeddings_is_refused(
  folder: pathlib.Path, file: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  arguments = ["neighbors", "--embeddings", str(folder), "--user", "9", "--index", str(file)]
  manifest = (folder / "manifest.json").read_text()
  (folder / "manifest.json").write_text(manifest.replace('"step": 1', '"step": 2'))
  assert cli.main(arguments) == 1
  assert "is stale" in (said := capsys.readouterr().err) and "--rebuild" in said
  (folder / "manifest.json").write_text(manifest)
  assert cli.main(arguments) == 0
  assert cli.main([*arguments, "--metric", "dot"]) == 1
  assert "was built for --metric cosine, not dot" in capsys.readouterr().err


def test_parts_that_were_exchanged_under_the_same_manifest_are_noticed(
  folder: pathlib.Path, file: pathlib.Path
) -> None:
  last = folder / "part-00002.parquet"
  pq.write_table(pq.read_table(last).slice(1), last)
  selection = selection_lib.select_rows(folder)
  with pytest.raises(ValueError, match="is stale"):
    hnsw_index.read_index(file, VectorSpace.of(selection.all_vectors()), selection_lib.selection_fingerprint(selection))


@pytest.mark.parametrize("keep", [0, 30, 900, 20_000])
def test_a_damaged_index_is_an_error(
  folder: pathlib.Path, file: pathlib.Path, capsys: pytest.CaptureFixture[str], keep: int
) -> None:
  file.write_bytes(file.read_bytes()[:keep])
  assert cli.main(["neighbors", "--embeddings", str(folder), "--user", "9", "--index", str(file)]) == 1
  assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--rebuild"]])
def test_a_file_that_is_no_index_stays_what_it_is(
  folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
  (mine := tmp_path / "labels.csv").write_text("user,label\n1,2\n")
  assert cli.main(["neighbors", "--embeddings", str(folder), "--user", "9", "--index", str(mine), *options]) == 1
  assert "is no index of neighbours; name another --index" in capsys.readouterr().err
  assert mine.read_text() == "user,label\n1,2\n"


def test_an_index_of_another_version_is_built_again(
  folder: pathlib.Path, file: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(hnsw_index.IndexHeader, "faster", lambda header: True)  # whatever else the machine does
  content = file.read_bytes()
  file.write_bytes(hnsw_index.KIND + b"1\n" + content.partition(b"\n")[2])
  command = ["neighbors", "--embeddings", str(folder), "--user", "9", "--index", str(file)]
  assert cli.main(command) == 1
  assert "of another version" in (said := capsys.readouterr().err) and "--rebuild" in said
  assert cli.main([*command, "--rebuild"]) == 0
  assert file.read_bytes().startswith(hnsw_index.MAGIC)


def test_too_few_vectors_need_no_index(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  few = embedding_folder.write(tmp_path / "e", clustered(60))
  assert cli.main(["neighbors", "--embeddings", str(few), "--user", "9", "--index", str(tmp_path / "i")]) == 1
  assert "too few for an index" in capsys.readouterr().err
