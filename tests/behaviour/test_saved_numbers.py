"""The small run gives the numbers that were saved once, and what version 0.1.0 wrote is still read."""

import json
import pathlib
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.embeddings import embed, embedding_files
from supermoe_jax.serving.loader import load_encoder
from supermoe_jax.training import loop
from supermoe_jax.training.run import Run
from tests.fixtures import saved_numbers

SAVED = json.loads(saved_numbers.FILE.read_text())


def test_a_prepared_dataset_has_the_bits_that_were_saved(cfg: config.Config, dataset: Dataset) -> None:
  assert saved_numbers.dataset(pathlib.Path(cfg.data.path)) == SAVED["dataset"]


@pytest.fixture(scope="module")
def embedded(run: Run, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("embedded") / "embeddings"
  embed.embed(run, ["2024-05-20", "2024-06-01"], folder)
  return folder


def test_twelve_steps_and_their_embeddings_are_the_saved_numbers(workdir: pathlib.Path, embedded: pathlib.Path) -> None:
  found, wanted = saved_numbers.close(workdir, embedded), SAVED["close"]
  for mine, saved in zip(found["losses"], wanted["losses"], strict=True):
    assert mine == pytest.approx(saved, rel=1e-3)
  np.testing.assert_allclose(found["embeddings"], wanted["embeddings"], atol=5e-3)
  if bits := SAVED["bits"].get(saved_numbers.machine()):  # of another machine the last bits may differ
    assert {**saved_numbers.run(workdir, 12), "embeddings": saved_numbers.embeddings(embedded)} == bits


@pytest.fixture
def earlier(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  """What version 0.1.0 wrote: `log/dataset`, `run`, `embeddings` and `encoder`; the paths in them are relative."""
  with tarfile.open(pathlib.Path(saved_numbers.__file__).with_name("version_0_1_0.tar.xz")) as archive:
    archive.extractall(tmp_path, filter="data")
  monkeypatch.chdir(tmp_path / "version_0_1_0")
  return tmp_path / "version_0_1_0"


def test_datasets_runs_embeddings_and_exports_of_version_0_1_0_are_read(earlier: pathlib.Path) -> None:
  run = Run("run")
  assert run.step == 2 and len(run.dataset) == 12
  assert loop.train(run.cfg, pathlib.Path("run")) == 2  # whose state it reads, to say that it is done
  written = embedding_files.read_embeddings(pathlib.Path("embeddings"))
  manifest = embed.embed(run, ["2024-05-20"], earlier / "again")
  again = embedding_files.read_embeddings(earlier / "again")
  assert manifest["rows"] == len(written) == 12 and again["user_id"].equals(written["user_id"])
  vectors = embedding_files.embedding_vectors(written)
  np.testing.assert_allclose(embedding_files.embedding_vectors(again), vectors, atol=1e-4)

  encoder = load_encoder(pathlib.Path("encoder"))
  visits = pq.read_table("log/visits.parquet").to_pylist()
  user = written["user_id"][0].as_py()
  events: dict[str, list[dict[str, object]]] = {"visits": [], "buys": []}
  for row in visits:
    if row.pop("user") == user:
      events["visits"].append({**row, "time": row["time"].isoformat()})
  for row in pq.read_table("log/buys.parquet").to_pylist():
    if row.pop("user") == user:
      events["buys"].append({**row, "time": row["time"].isoformat()})
  found = encoder.embed([{"events": events}], "2024-05-20")
  np.testing.assert_allclose(found.vectors[0], vectors[0], atol=1e-4)
