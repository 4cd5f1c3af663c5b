"""Exact neighbours are those of a full sort, on any number of devices; ids and files are answered as promised."""

import itertools
import pathlib

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli
from supermoe_jax.embeddings import exact_neighbors
from supermoe_jax.embeddings import neighbors as neighbors_lib
from supermoe_jax.embeddings import selection as selection_lib
from supermoe_jax.embeddings.exact_neighbors import METRICS, ExactSearch, VectorSpace
from tests.fixtures import embedding_folder
from tests.fixtures.grids import quick_few


def rows_with_ties(n: int = 701, width: int = 12) -> np.ndarray:
  """Clustered vectors away from the origin, some of them equal, one of them 0."""
  rng = np.random.default_rng(0)
  out = (rng.normal(size=(20, width))[rng.integers(0, 20, n)] + 0.3 * rng.normal(size=(n, width)) + 0.5).astype("f4")
  out[100:160] = out[7]
  out[n - 20] = out[3]
  out[min(300, n - 1)] = 0
  return out


def brute_force(x: np.ndarray, asked: np.ndarray, metric: str, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows and scores by sorting everyone's, written again from the definition of each metric."""
  x = x.astype(np.float64)
  if metric == "euclidean":
    score = np.sqrt(((x[asked][:, None] - x) ** 2).sum(axis=2))
  else:
    score = (x[asked][:, None] * x).sum(axis=2)
    if metric == "cosine":
      norms = np.sqrt((x[asked] ** 2).sum(axis=1)[:, None] * (x**2).sum(axis=1))
      score = np.where(norms > 0, score / np.where(norms > 0, norms, 1), 0)
  far = score if metric == "euclidean" else -score
  far = far.copy()
  far[np.arange(len(asked)), asked] = np.inf
  place = np.argsort(far, axis=1, kind="stable")[:, :k]
  return place, np.take_along_axis(score, place, 1)


@pytest.mark.parametrize(
  ("metric", "devices"),
  quick_few([*itertools.product(METRICS, [8]), ("euclidean", 1)], itertools.product(METRICS, [1, 8])),
)
def test_exact_search_equals_sorting_everyone(metric: str, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
  all_devices = jax.devices()
  assert len(all_devices) == 8
  monkeypatch.setattr(jax, "devices", lambda *unused: all_devices[:devices])
  x, asked = rows_with_ties(), np.array([*range(140), 300, 681, 700])
  exact = ExactSearch(VectorSpace.of(x, metric), chunk=64, batch=64)
  assert len(exact._rows.sharding.device_set) == devices
  found = exact.search(x[asked], 10, asked)
  row, score = brute_force(x, asked, metric, 10)
  np.testing.assert_array_equal(found.row, row)
  np.testing.assert_allclose(found.score, score, atol=1e-12)


def test_nobody_is_its_own_neighbour_and_too_few_are_none() -> None:
  x = rows_with_ties(40)[:5]
  found = ExactSearch(VectorSpace.of(x)).search(x, 8, np.arange(5))
  assert (np.sort(found.row[:, :4], axis=1) == [[j for j in range(5) if j != i] for i in range(5)]).all()
  assert (found.row[:, 4:] == -1).all() and np.isnan(found.score[:, 4:]).all()


def test_equal_vectors_come_in_the_order_of_their_rows_however_many_there_are() -> None:
  x = np.tile(np.random.default_rng(0).normal(size=(1, 24)).astype("f4"), (3000, 1))
  asked = np.array([0, 5, 2999])
  found = ExactSearch(VectorSpace.of(x), chunk=128).search(x[asked], 6, asked)
  assert found.row.tolist() == [[1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, 5]]


def test_distances_far_from_the_origin_keep_their_order() -> None:
  x = (np.random.default_rng(0).normal(size=(400, 8)) + 1000).astype("f4")
  found = ExactSearch(VectorSpace.of(x, "euclidean")).search(x, 5, np.arange(400))
  np.testing.assert_array_equal(found.row, brute_force(x, np.arange(400), "euclidean", 5)[0])


def test_no_block_of_scores_is_larger_than_a_chunk() -> None:
  """What the compiled search needs besides its arguments does not grow with the number of vectors."""

  def extra(n: int) -> int:
    exact = ExactSearch(VectorSpace.of(np.ones((n, 8), np.float32)), chunk=64, batch=8)
    with jax.set_mesh(exact._mesh):
      queries, but = np.zeros((8, 8), np.float32), np.zeros(8, np.int32)
      compiled = exact_neighbors._search.lower(queries, but, exact._rows, exact._bias, 10, exact._chunk).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert extra(64 * 8 * 20) <= extra(64 * 8 * 2) * 1.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """120 users at two times; users from 100 on at the first alone."""
  x = rows_with_ties(220)
  users = [*range(120), *range(100)]
  times = ["2024-04-01"] * 120 + ["2024-05-01"] * 100
  return embedding_folder.write(tmp_path_factory.mktemp("search") / "embeddings", x, users, times, rows_per_part=50)


def test_of_several_times_each_users_latest_counts(folder: pathlib.Path) -> None:
  selection = selection_lib.select_rows(folder)
  x = rows_with_ties(220)
  wanted = {u: x[u] for u in range(100, 120)} | {u: x[120 + u] for u in range(100)}
  found = dict(zip(selection.users.to_pylist(), selection.all_vectors()))
  assert found.keys() == wanted.keys()
  assert all((found[u] == wanted[u]).all() for u in wanted)
  assert "2024-04-01T00:00:00 to 2024-05-01" in selection.time()


def test_a_user_is_answered_with_ids_of_the_time_that_was_asked_for(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
  out = tmp_path / "out.parquet"
  arguments = ["neighbors", "--embeddings", str(folder), "--user", "7", "--user", "110", "--k", "3"]
  assert cli.main([*arguments, "--as-of", "2024-04-01", "--out", str(out)]) == 0
  said = capsys.readouterr().out
  row, score = brute_force(rows_with_ties(220)[:120], np.array([7, 110]), "cosine", 3)
  table = pq.read_table(out).to_pydict()
  assert table["user_id"] == [7] * 3 + [110] * 3 and table["rank"] == [1, 2, 3] * 2
  assert table["neighbor_id"] == row.reshape(-1).tolist()
  np.testing.assert_allclose(table["score"], score.reshape(-1), atol=1e-12)
  assert "120 users, as of 2024-04-01T00:00:00" in said and f"{score[0, 0]:.6f}" in said


def test_the_neighbours_of_everyone_are_those_of_each(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  out = tmp_path / "all.parquet"
  arguments = ["neighbors", "--embeddings", str(folder), "--all", "--k", "4", "--metric", "dot", "--out", str(out)]
  assert cli.main(arguments) == 0
  everyone = pq.read_table(out)
  assert len(everyone) == 120 * 4
  search = neighbors_lib.open_search(folder, metric="dot")
  some = search.of(["3", "119"], 4)
  mine = [r for r in everyone.to_pylist() if r["user_id"] in (3, 119)]
  assert sorted(mine, key=str) == sorted(some.to_pylist(), key=str)


def test_ids_of_text_are_found_and_mistakes_name_what_comes_near(tmp_path: pathlib.Path) -> None:
  names = [f"user-{i:03d}" for i in range(30)]
  folder = embedding_folder.write(tmp_path / "e", rows_with_ties(30), names)
  finder = selection_lib.UserFinder(selection_lib.select_rows(folder).users)
  assert finder.one("user-017") == 17
  assert finder.nearest("user-0175") == ["user-017", "user-018", "user-019"]


def test_numbers_of_64_bits_are_found_as_text(tmp_path: pathlib.Path) -> None:
  ids = [10**18 + 7, 2**63 - 1, -(2**63), 5]
  finder = selection_lib.UserFinder(pa.array(ids, pa.int64()))
  asked = [*map(str, ids), str(2**63), str(10**19), "+5", "5.0", "x", None]
  assert finder.rows(pa.array(asked)).tolist() == [0, 1, 2, 3, -1, -1, 3, -1, -1, -1]
  assert finder.nearest(str(10**30), 1) == [2**63 - 1]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--user", "400"], "user '400' has no embedding among 120; similar ids: 117, 118, 119"),
    (["--user", "bob"], "user 'bob' has no embedding"),
    (["--user", "3", "--as-of", "2024-06-01"], "2 time(s), such as 2024-04-01T00:00:00, 2024-05-01T00:00:00"),
    (["--user", "3", "--metric", "cosin"], "did you mean 'cosine'"),
    (["--user", "3", "--k", "0"], "--k=0 must be at least 1"),
    (["--user", "3", "--recall", "0.9"], "no effect without --index"),
    (["--all"], "name a Parquet file with --out"),
    (["--user", "3", "--index", "{folder}/inside"], "lies inside"),
  ],
)
def test_a_mistake_is_one_clear_line(
  folder: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
  filled = [a.format(folder=folder) for a in arguments]
  assert cli.main(["neighbors", "--embeddings", str(folder), *filled]) == 1
  assert message in capsys.readouterr().err


def test_vectors_that_cannot_be_used_are_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  x = rows_with_ties(120)
  x[103, 2] = np.nan
  broken = embedding_folder.write(tmp_path / "nan", x)
  assert cli.main(["neighbors", "--embeddings", str(broken), "--user", "1"]) == 1
  assert "part-00001.parquet, row 3, column embedding: not a finite number" in capsys.readouterr().err
  twice = embedding_folder.write(tmp_path / "twice", rows_with_ties(40)[:9], [1, 2, 3, 4, 4, 5, 6, 7, 8])
  assert cli.main(["neighbors", "--embeddings", str(twice), "--user", "1"]) == 1
  assert "has user 4 twice as of 2024-05-01" in capsys.readouterr().err
  short = embedding_folder.write(tmp_path / "short", rows_with_ties(40)[:9])
  file = short / "part-00000.parquet"
  pq.write_table(pq.read_table(file).rename_columns(["user", *pq.read_schema(file).names[1:]]), file)
  assert cli.main(["neighbors", "--embeddings", str(short), "--user", "1"]) == 1
  assert "has no column 'user_id'" in capsys.readouterr().err


def test_vectors_of_length_zero_are_counted(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  x = rows_with_ties(30)  # its last row is 0
  x[4] = 0
  search = neighbors_lib.open_search(embedding_folder.write(tmp_path / "e", x))
  assert any("2 vectors hold only zeros" in line for line in search.said)
  assert set(search.of(["4"], 5)["score"].to_pylist()) == {0.0}
