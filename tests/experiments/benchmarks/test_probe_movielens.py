"""The benchmark of MovieLens makes its features and labels, and drives the command, at a size that takes seconds."""

import json
import pathlib
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fixtures import scripts


@pytest.mark.nightly
def test_factors_and_films_tell_an_attribute_that_films_depend_on(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  rng = np.random.default_rng(0)
  users, seen = 120, 12
  woman = np.arange(users) % 2 == 0
  films = np.array([rng.choice(30, seen, replace=False) + 15 * w for w in woman])
  position = np.tile(np.arange(seen), users)
  late = position >= seen - 2
  films = np.where(late, 99, films.reshape(-1))  # what is left out would tell it all
  events = {"user_id": np.repeat(np.arange(users), seen), "movie_id": films, "pos": position}
  pq.write_table(pa.table(events), tmp_path / "sequences.parquet")
  attributes = {
    "user_id": np.arange(users),
    "gender": np.where(woman, "F", "M"),
    "age": rng.choice([18, 50], users),
    "occupation": rng.choice([4, 7], users),
  }
  pq.write_table(pa.table(attributes), tmp_path / "users.parquet")

  script = scripts.load(scripts.BENCHMARKS / "probe_movielens.py")
  monkeypatch.setattr(script, "FACTORS", 8)
  out = tmp_path / "out"
  monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), "--out", str(out), "--models", "logistic", "--repeats", "1"])
  assert script.main() == 0, capsys.readouterr().err
  assert json.loads((out / "tfidf.json").read_text())["gender"]["value"] > 0.8
  factors = json.loads((out / "svd.json").read_text())
  assert factors["labels"]["gender"]["scores"]["svd"]["logistic"]["auc"]["value"] > 0.8
  assert set(factors["labels"]) == {"gender", "age35", "student"}
  assert pq.read_table(out / "svd.parquet").schema.field("factors").type == pa.list_(pa.float32(), 8)
  columns = pq.read_table(out / "svd.parquet")["user_id"].to_pylist()
  assert columns == list(range(users))
