"""An audience holds who is like the seeds; its lift is above 1 where there is something to find, and 1 where not."""

import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli
from supermoe_jax.embeddings import audience, selection
from supermoe_jax.embeddings.audience import METHODS
from supermoe_jax.errors import DataError
from tests.fixtures import embedding_folder

USERS, GROUP = 1000, 100


def grouped(groups: int = 1) -> np.ndarray:
  """The first `GROUP` of `USERS` vectors lie around `groups` points, all others anywhere."""
  rng = np.random.default_rng(0)
  out = rng.normal(size=(USERS, 12))
  out[:GROUP] = 1.5 * rng.normal(size=(groups, 12))[np.arange(GROUP) % groups] + 0.7 * rng.normal(size=(GROUP, 12))
  return out.astype("f4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return embedding_folder.write(tmp_path_factory.mktemp("audience") / "embeddings", grouped(), rows_per_part=300)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 3])
def test_lift_on_a_planted_group_is_above_one(method: str, groups: int) -> None:
  found = audience.seed_lift(method, grouped(groups), np.arange(0, GROUP, 2), 80)
  assert found["lift_low"] > 2 and found["held_out"] == 50


@pytest.mark.parametrize("method", METHODS)
def test_lift_on_noise_is_about_one(method: str) -> None:
  x = np.random.default_rng(1).normal(size=(USERS, 12)).astype("f4")
  seeds = np.random.default_rng(2).choice(USERS, 300, replace=False)
  found = audience.seed_lift(method, x, np.sort(seeds), 200)
  assert found["lift_low"] < 1 < found["lift_high"]
  assert 0.7 < found["lift"] < 1.3


def test_lift_is_the_share_found_over_that_of_a_random_audience(monkeypatch: pytest.MonkeyPatch) -> None:
  """Scores that know: every held-out seed is found; those that know nothing but the row: as many as chance has."""
  x, seeds = grouped(), np.arange(0, GROUP, 2)
  monkeypatch.setattr(
    audience, "seed_scores", lambda method, x, told, seed: np.isin(np.arange(USERS), seeds).astype(float)
  )
  found = audience.seed_lift("logistic", x, seeds, 96)
  assert found["found"] == 50 and found["random_share"] == pytest.approx(96 / 960)
  assert found["lift"] == pytest.approx(10) and found["lift_low"] < 10
  monkeypatch.setattr(audience, "seed_scores", lambda method, x, told, seed: -np.arange(USERS, dtype=float))
  assert audience.seed_lift("logistic", x, np.arange(900, 1000), 92)["found"] == 0


@pytest.mark.parametrize("ending", ["txt", "csv", "parquet"])
def test_an_audience_leaves_the_seeds_out_and_is_sorted(
  folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
  named = [*range(0, GROUP, 2), 0, 5555, 7777]  # one twice, two without an embedding
  file = tmp_path / f"seeds.{ending}"
  if ending == "txt":
    file.write_text("\n".join(map(str, named)) + "\n\n")
  elif ending == "csv":
    file.write_text("note,user_id\n" + "".join(f"x,{u}\n" for u in named))
  else:
    pq.write_table(pa.table({"user_id": pa.array(named, pa.int32()), "note": ["x"] * len(named)}), file)
  out = tmp_path / "out.parquet"
  arguments = ["audience", "--embeddings", str(folder), "--seeds", str(file), "--size", "60", "--out", str(out)]
  assert cli.main(arguments) == 0
  table = pq.read_table(out)
  users = table["user_id"].to_pylist()
  assert len(users) == len(set(users)) == 60 and not set(users) & set(named)
  assert table["rank"].to_pylist() == [*range(1, 61)]
  assert table["score"].to_pylist() == sorted(table["score"].to_pylist(), reverse=True)
  assert np.mean([u < GROUP for u in users[:40]]) > 0.7
  said = capsys.readouterr().out
  report = json.loads(table.schema.metadata[b"supermoe"])
  assert (report["seeds"], report["seeds_unknown"], report["seeds_repeated"]) == (50, 2, 1)
  assert report["seeds_empty"] == (1 if ending == "txt" else 0)
  assert "50 seeds among 1,000 users" in said and "5555, 7777" in said and f"lift {report['lift']:.2f} at 60" in said


@pytest.mark.parametrize(
  ("name", "content", "more", "message"),
  [
    (
      "a.txt",
      "1\n2\n9999\n",
      [],
      "2 users that have an embedding, of 3 ids (unknown: 9999 …); the search and its measurement need at least 10",
    ),
    ("a.txt", "", [], "names 0 users"),
    ("a.csv", "user,score\n1,2\n", [], "has no column 'user_id' (the seeds' column); did you mean 'user'?"),
    (
      "a.csv",
      "7,0.5\n8,0.6\n",
      [],
      "holds data, it seems, and not the names of columns: 7,0.5. Set --no-header",
    ),
    ("a.csv", "7,gold\n8,silver\n", [], "names the user '7', so it is data, not the names of columns; set --no-header"),
    ("a.csv", "user_id,tier\n7\n8,silver\n", [], "a.csv: line 2 holds 1 value, but the file has 2 columns: 7"),
    ("a.parquet", "", [], "is empty"),
    ("a.xlsx", "1", [], "seeds are read from .parquet, .csv, .jsonl or .txt"),
    ("a.parquet", "no parquet", [], "a.parquet cannot be read"),
    ("a.txt", "{many}", ["--size", "980"], "--size=980 must lie between 1 and 979"),
    ("a.txt", "{many}", ["--method", "logistik"], "did you mean 'logistic'"),
    ("a.txt", "{many}", ["--out", "{tmp}/out.csv"], "must end in .parquet"),
  ],
)
def test_a_mistake_is_one_clear_line(
  folder: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  name: str,
  content: str,
  more: list[str],
  message: str,
) -> None:
  (tmp_path / name).write_text(content.format(many="\n".join(map(str, range(20)))))
  arguments = ["audience", "--embeddings", str(folder), "--seeds", str(tmp_path / name), "--size", "50"]
  more = [m.format(tmp=tmp_path) for m in more]
  assert cli.main([*arguments, "--out", str(tmp_path / "out.parquet"), *more]) == 1
  assert message in capsys.readouterr().err
  assert not list(tmp_path.glob("out*"))


def test_ids_of_text_are_matched_as_text(tmp_path: pathlib.Path) -> None:
  folder = embedding_folder.write(tmp_path / "e", grouped()[:200], [f"{i:04d}" for i in range(200)])
  users = selection.select_rows(folder).users
  (tmp_path / "s.csv").write_text("user_id\n" + "".join(f"{i:04d}\n" for i in range(12)))
  assert audience.read_seeds(tmp_path / "s.csv", users).rows.tolist() == [*range(12)]
  (tmp_path / "s.txt").write_text("".join(f"{i}\n" for i in range(12)))
  with pytest.raises(DataError, match="names 0 users"):
    audience.read_seeds(tmp_path / "s.txt", users)


LISTS = {
  "a.csv": ("".join(f"{i}\n" for i in range(12)), []),
  "b.csv": ("client\n" + "".join(f"{i}\n" for i in range(12)), []),
  "c.csv": ("".join(f"{i};gold\n" for i in range(12)), ["--no-header", "--columns", "user_id", "tier"]),
  "d.csv": (
    "".join(f"{i}^gold\n" for i in range(12)),
    ["--delimiter", "^", "--no-header", "--columns", "user_id", "t"],
  ),
  "e.tsv": ("user_id\ttier\n" + "".join(f"{i}\tgold\n" for i in range(12)) + "NULL\tgold\n", ["--null-values", "NULL"]),
  "f.csv": ("user_id\r\n" + "".join(f"{i}\n" for i in range(12)), []),
  "g.jsonl": ("".join(f'{{"user_id": {i}}}\n' for i in range(12)), []),
  "h.csv": ("".join(f"{i}\n" for i in range(12)), ["--no-header"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_seeds_keeps_every_id_however_it_is_written(
  folder: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
  content, more = LISTS[name]
  (tmp_path / name).write_bytes(content.encode())
  out = tmp_path / "out.parquet"
  arguments = ["audience", "--embeddings", str(folder), "--seeds", str(tmp_path / name), "--size", "50", *more]
  assert cli.main([*arguments, "--out", str(out)]) == 0
  report = json.loads(pq.read_schema(out).metadata[b"supermoe"])
  assert (report["seeds"], report["seeds_unknown"], report["seeds_empty"]) == (12, 0, int("NULL" in content))


def test_a_list_of_text_ids_without_header_keeps_its_first_id(tmp_path: pathlib.Path) -> None:
  folder = embedding_folder.write(tmp_path / "e", grouped()[:200], [f"u{i:04d}" for i in range(200)])
  users = selection.select_rows(folder).users
  (tmp_path / "s.csv").write_text("".join(f"u{i:04d}\n" for i in range(12)))
  assert audience.read_seeds(tmp_path / "s.csv", users).rows.tolist() == [*range(12)]
