"""Vectors of items, events and users from the files to the embeddings, through training, an append and an export."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

from supermoe_jax import config
from supermoe_jax.batch import ABSENT
from supermoe_jax.data.append import append
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset import snapshot_batches, training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.vectors import Vectors
from supermoe_jax.data.preparation import prepare
from supermoe_jax.data.preparation.summary import append_summary, dataset_summary
from supermoe_jax.embeddings import embed, embedding_files
from supermoe_jax.errors import DataError
from supermoe_jax.serving import export, loader, requests
from supermoe_jax.training import loop
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import model_constructor
from tests.fixtures.new_visits import write_visits
from tests.fixtures.small_log import raw_config, write_log

DAY = "2024-05-20"
WITHOUT = "page3"  # the page whose row of the table has no vector


def page_vector(page: str) -> list[float]:
  return np.random.default_rng(int(page[4:])).normal(size=5).round(3).tolist()


def write_pages(folder: pathlib.Path, pages: list[str]) -> None:
  pictures = [None if p == WITHOUT else page_vector(p) for p in pages]
  pq.write_table(pa.table({"slug": pages, "picture": pa.array(pictures, pa.list_(pa.float64()))}), folder / "p.parquet")


def write_files(folder: pathlib.Path) -> config.Config:
  """Writes the small log with a picture of each page, a mood of most visits and a bio of most users."""
  write_log(folder, users=24)
  write_pages(folder, [f"page{i}" for i in range(12)])
  visits = pq.read_table(folder / "visits.parquet")
  rng = np.random.default_rng(5)
  moods = [None if rng.random() < 0.2 else rng.normal(size=3).round(2).tolist() for _ in range(visits.num_rows)]
  pq.write_table(visits.append_column("mood", pa.array(moods, pa.list_(pa.float32()))), folder / "visits.parquet")
  users = pq.read_table(folder / "users.parquet")
  bios = [json.dumps([0.1 * i, 1.0]) for i in range(users.num_rows)]
  pq.write_table(users.append_column("bio", pa.array(bios)), folder / "users.parquet")
  raw = raw_config(folder)
  raw["data"]["sources"]["visits"]["items"] = {"file": str(folder / "p.parquet"), "key": "page", "table_key": "slug"}
  raw["data"]["fields"] |= {
    "picture": {"kind": "vector", "size": 5, "sources": ["visits"]},
    "mood": {"kind": "vector", "size": 3, "sources": ["visits"], "missing": "null"},
    "bio": {"kind": "vector", "size": 2, "table": "users"},
  }
  raw["tasks"] = {n: raw["tasks"][n] for n in ("next_page", "quiet")} | {
    "alike": {"kind": "contrast", "least_events": 2, "slice_events": 8}
  }
  raw["model"] |= {"layers": 1, "moe_every": 1, "value_dropout": 0.2}
  return config.resolve(raw)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
  """A prepared dataset; do not change it."""
  cfg = write_files(tmp_path_factory.mktemp("vectors"))
  prepare.prepare(cfg)
  return cfg


@pytest.fixture(scope="module")
def run(cfg: config.Config) -> Run:
  workdir = pathlib.Path(cfg.data.path).parent / "run"
  loop.train(cfg, workdir)
  return Run(workdir)


def raw_vectors(folder: pathlib.Path) -> dict[str, dict[tuple[str, int], dict[str, Any]]]:
  """Each visit's vectors by the user's id, and by the page and time."""
  bios = dict(zip(*(pq.read_table(folder / "users.parquet").to_pydict()[n] for n in ("user", "bio"))))
  found: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
  for row in pq.read_table(folder / "visits.parquet").to_pylist():
    time = int(np.datetime64(row["time"], "us").astype(np.int64))
    picture = None if row["page"] == WITHOUT else page_vector(row["page"])
    bio = json.loads(bios[row["user"]]) if row["user"] in bios else None
    found.setdefault(str(row["user"]), {})[row["page"], time] = {"picture": picture, "mood": row["mood"], "bio": bio}
  return found


def assert_vectors(dataset: Dataset, wanted: dict[str, dict[tuple[str, int], dict[str, Any]]]) -> int:
  """Compares the vectors of all visits with those of the files; returns the number of visits."""
  pages, compared = dataset.encoders.categorical["page"].values, 0
  scales = {n: e.scale for n, e in dataset.encoders.categorical.items() if isinstance(e, Vectors)}
  assert [*dataset.schema.vectors.items()] == [("picture", 5), ("mood", 3), ("bio", 2)]
  for index in range(len(dataset)):
    history = dataset.history(dataset[index])
    found = dataset.vectors(history.codes[:, list(dataset.vector_columns)])
    parts = dict(zip(dataset.schema.vectors, np.split(found.astype(np.float64), [5, 8], axis=1)))
    for i in np.flatnonzero(history.source == 0):
      code = history.codes[i, 0]
      if code < 2:
        continue
      compared += 1
      for name, vector in wanted[history.user][pages[code - 2], int(history.time[i])].items():
        np.testing.assert_allclose(
          parts[name][i] * scales[name], np.nan if vector is None else vector, rtol=1e-3, atol=1e-3
        )
  return compared


def test_every_event_has_the_vectors_of_the_files(cfg: config.Config) -> None:
  dataset, folder = Dataset(cfg.data.path), pathlib.Path(cfg.data.path).parent
  assert assert_vectors(dataset, raw_vectors(folder)) == pq.read_table(folder / "visits.parquet").num_rows
  picture = dataset.encoders.categorical["picture"]
  assert isinstance(picture, Vectors) and len(picture.rows) == 11  # stored once each
  assert check.check_dataset(dataset.path, sample=8)


def test_check_finds_a_vector_that_is_another_one_in_the_files(
  cfg: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  rows = Vectors.rows.func
  monkeypatch.setattr(Vectors, "rows", property(lambda self: rows(self)[::-1]))
  with pytest.raises(check.CheckError, match=r"field picture: .* holds .*, the raw files give"):
    check.check_dataset(pathlib.Path(cfg.data.path))


def test_a_damaged_table_of_vectors_is_named(cfg: config.Config, tmp_path: pathlib.Path) -> None:
  shutil.copytree(cfg.data.path, tmp_path / "copy")
  file = tmp_path / "copy" / "encoders" / "vectors" / "picture.npy"
  content = bytearray(file.read_bytes())
  content[-3] ^= 1
  file.write_bytes(content)
  with pytest.raises(DataError, match=r"picture\.npy is damaged"):
    Dataset(tmp_path / "copy")


def test_the_summary_counts_vectors_and_events_without_one(cfg: config.Config) -> None:
  manifest = Dataset(cfg.data.path).manifest
  text = dataset_summary(manifest)
  assert "field picture: 11 different vectors of 5 numbers" in text
  visits = pq.read_table(pathlib.Path(cfg.data.path).parent / "visits.parquet")
  absent = visits["mood"].null_count
  assert f"field mood: {absent:,} of {visits.num_rows:,} events" in text


def test_a_batch_holds_scaled_vectors_and_nothing_where_there_is_none(cfg: config.Config) -> None:
  dataset = Dataset(cfg.data.path)
  for batch in (
    next(iter(training_batches.training_batches(dataset, cfg))),
    next(iter(snapshot_batches.query_batches(dataset, cfg, times=[config.parse_time(DAY, "")]))),
  ):
    features = batch.features
    assert features.vectors.dtype == np.float16 and features.vectors.shape[-1] == 10
    visits, padding = features.source == 1, features.source == 0
    picture = features.vectors[..., :5]
    assert np.isnan(features.vectors[padding]).all() and np.isnan(picture[features.source == 2]).all()
    assert 0.5 < np.nanmean(np.square(picture[visits], dtype=np.float64)) < 2
    assert not features.codes[..., list(dataset.vector_columns)].any()  # the model sees no code of a vector


def test_a_step_moves_the_projections_and_there_is_no_table_to_move(cfg: config.Config) -> None:
  dataset = Dataset(cfg.data.path)
  batch = next(iter(training_batches.training_batches(dataset, cfg)))
  model = model_constructor(cfg, dataset.schema)(jax.random.key(0))

  def loss(model: nnx.Module) -> jax.Array:
    return model.encode(batch.features, dropless=True).z.sum()

  gradients = nnx.grad(loss)(model)
  projections = gradients["encoder"]["event_embedding"]["vectors"]
  assert {n: p["kernel"].get_value().shape for n, p in projections.items()} == {
    "picture": (6, 16), "mood": (4, 16), "bio": (3, 16)
  }  # fmt: skip
  for name, projection in projections.items():
    assert np.abs(projection["kernel"].get_value()).min(axis=1).max() > 0, name
  tables = {path for path, v in nnx.to_flat_state(nnx.state(model)) if "tables" in path}
  assert tables and not any(set(dataset.schema.vectors) & set(path) for path in tables)


def test_the_exported_encoder_gives_the_embeddings_of_the_run(run: Run, tmp_path: pathlib.Path) -> None:
  folder = pathlib.Path(run.cfg.data.path).parent
  embed.embed(run, [DAY], tmp_path / "embeddings")
  table = embedding_files.read_embeddings(tmp_path / "embeddings")
  wanted = dict(zip(map(str, table["user_id"].to_pylist()), embedding_files.embedding_vectors(table)))
  export.export_encoder(run, tmp_path / "encoder", batch_sizes=(1, 8), events=(24,))
  encoder = loader.load_encoder(tmp_path / "encoder")
  users: dict[str, Any] = {}
  for source in ("visits", "buys"):
    for row in pq.read_table(folder / f"{source}.parquet").to_pylist():
      row["time"] = row["time"].isoformat()
      users.setdefault(str(row.pop("user")), {"events": {"visits": [], "buys": []}})["events"][source].append(row)
  for user in pq.read_table(folder / "users.parquet").to_pylist():
    users[str(user["user"])]["user"] = {"bio": user["bio"]}
  requests.request_model(encoder, requests.Limits()).model_validate({"users": list(users.values()), "as_of": DAY})
  found = dict(zip(users, encoder.embed(list(users.values()), DAY).vectors))
  assert len(wanted) > 10
  for user, vector in wanted.items():
    np.testing.assert_allclose(found[user], vector, atol=1e-5)
  # A vector in an event takes the place of the one in the table of items, and counts.
  user = next(u for u in wanted if any(v["time"] < DAY for v in users[u]["events"]["visits"]))
  told = json.loads(json.dumps(users[user]))
  for visit in told["events"]["visits"]:
    visit["picture"] = None if visit["page"] == WITHOUT else page_vector(visit["page"])
  np.testing.assert_allclose(encoder.embed([told], DAY).vectors[0], wanted[user], atol=1e-5)
  last = [v for v in told["events"]["visits"] if v["time"] < DAY][-1]
  last["picture"] = [5.0, 5.0, 5.0, 5.0, 5.0]
  assert np.abs(encoder.embed([told], DAY).vectors[0] - wanted[user]).max() > 1e-4
  for bad, problem in (([1.0], "a list of 1, not of 5"), ([1.0, 2.0, 3.0, 4.0, "x"], "not a finite number")):
    last["picture"] = bad
    with pytest.raises(loader.InputError, match=problem):
      encoder.embed([told], DAY)


def test_an_append_extends_the_table_and_keeps_every_code(tmp_path: pathlib.Path) -> None:
  cfg = write_files(tmp_path)
  before = prepare.prepare(cfg)
  old = Dataset(cfg.data.path)
  then = {r["user"]: r["codes"] for r in (old[i] for i in range(len(old)))}
  rows = np.array(old.encoders.categorical["picture"].rows)
  write_pages(tmp_path, [f"page{i}" for i in range(12)] + ["page40"])
  file = write_visits(tmp_path, "day.parquet", 3, ["page40", "page1", "page40"])
  manifest = append.append(pathlib.Path(cfg.data.path), {"visits": [file]})
  assert manifest["encoding_hash"] == before["encoding_hash"]
  assert "field picture: 1 new vectors" in append_summary(manifest)
  new = Dataset(cfg.data.path)
  table = new.encoders.categorical["picture"]
  assert isinstance(table, Vectors)
  np.testing.assert_array_equal(table.rows[:11], rows)
  np.testing.assert_array_equal(table.rows[11:], np.array([page_vector("page40")], np.float32))
  assert manifest["fields"]["picture"]["codes"] == 14
  column = new.schema.field("picture")
  for record in (new[i] for i in range(len(new))):
    codes, n = record["codes"], len(then[record["user"]])
    np.testing.assert_array_equal(codes[:n], then[record["user"]])
    if record["user"] == "3":
      page1 = int(np.flatnonzero((rows == np.float32(page_vector("page1"))).all(axis=1))[0]) + 2
      assert codes[n:, column].tolist() == [13, page1, 13]
      assert codes[n:, new.schema.field("mood")].tolist() == [ABSENT] * 3  # the new file lacks the column
  assert check.check_dataset(new.path, sample=8)
