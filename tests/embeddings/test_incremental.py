"""After an append only users with news are computed, and the outcome is that of embedding all."""

import json
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.append import append
from supermoe_jax.embeddings import embed, embedding_files
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.training.run import Run
from tests.fixtures.messages import messages

FORMER, LATER = "2024-05-20", "2024-08-01"
NEW = {5: "2024-06-25", 11: "2024-06-26", 1000: "2024-06-27"}  # the last one is a new user


class Case:
  """A run and its dataset, to which a file was appended after embeddings were written."""

  def __init__(self, run: Run, folder: pathlib.Path):
    self.folder = folder
    raw = config.to_dict(run.cfg)
    raw["data"]["path"] = str(folder / "dataset")
    shutil.copytree(run.dataset.path, folder / "dataset")
    shutil.copytree(run.workdir, folder / "run")
    config.save(config.resolve(raw), folder / "run" / "config.json")
    before = Run(folder / "run")
    for name, times in {"fixed": [LATER], "both": [FORMER, LATER], "last": ["last"]}.items():
      embed.embed(before, times, folder / name, rows_per_part=24)
    self.before = before.dataset
    rows = [(u, np.datetime64(t) + np.timedelta64(i, "h")) for u, t in NEW.items() for i in range(3)]
    users, times = zip(*rows)
    new = {
      "user": users,
      "time": np.array(times, "datetime64[us]"),
      "page": ["page1"] * 9,
      "device": ["web"] * 9,
      "seconds": [2.0] * 9,
    }
    pq.write_table(pa.table(new), folder / "new.parquet")
    append.append(folder / "dataset", {"visits": [str(folder / "new.parquet")]})
    self.run = Run(folder / "run")

  def refresh(self, since: str, times: list[str]) -> tuple[dict, pa.Table, pa.Table]:
    """The manifest of a refreshed set, it, and one of all users."""
    for name in ("refreshed", "whole"):
      shutil.rmtree(self.folder / name, ignore_errors=True)
    manifest = embed.embed(self.run, times, self.folder / "refreshed", since=self.folder / since, rows_per_part=24)
    embed.embed(self.run, times, self.folder / "whole", rows_per_part=24)
    return (
      manifest,
      embedding_files.read_embeddings(self.folder / "refreshed"),
      embedding_files.read_embeddings(self.folder / "whole"),
    )


@pytest.fixture(scope="module")
def case(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Case:
  return Case(run, tmp_path_factory.mktemp("refresh"))


def same(one: pa.Table, other: pa.Table) -> None:
  assert one.drop_columns(["embedding"]).equals(other.drop_columns(["embedding"]))
  np.testing.assert_allclose(
    embedding_files.embedding_vectors(one), embedding_files.embedding_vectors(other), atol=1e-5
  )


@pytest.mark.parametrize(("since", "times"), [("fixed", [LATER]), ("last", ["last"])])
def test_only_users_with_new_events_are_computed(case: Case, since: str, times: list[str]) -> None:
  manifest, refreshed, whole = case.refresh(since, times)
  same(refreshed, whole)
  assert manifest["users"]["computed"] == len(NEW)
  assert manifest["users"]["kept"] == len(case.run.dataset) - len(NEW)
  earlier = embedding_files.read_embeddings(case.folder / since)
  changed = dict(zip(earlier["user_id"].to_pylist(), embedding_files.embedding_vectors(earlier)))
  for user, vector in zip(refreshed["user_id"].to_pylist(), embedding_files.embedding_vectors(refreshed)):
    assert np.array_equal(changed.get(user), vector) == (user not in NEW)


def test_events_after_a_time_touch_nobody(case: Case) -> None:
  """Their records were written anew, but before the time they say the same; the new user had no event yet."""
  embed.embed(case.run, [FORMER], case.folder / "former", rows_per_part=24)
  path = case.folder / "former" / "manifest.json"
  manifest = json.loads(path.read_text())
  manifest["dataset"] = {"digest": case.before.manifest["digest"], "records": case.before.records}
  shutil.copytree(case.folder / "former", case.folder / "as_before")
  for kind in ("part", "absent"):  # as they were: without the user that is new
    for file in (case.folder / "as_before").glob(f"{kind}-*.parquet"):
      table = pq.read_table(file)
      pq.write_table(table.filter(~np.isin(table["user_id"].to_numpy(), [1000])), file)
  (case.folder / "as_before" / "manifest.json").write_text(json.dumps(manifest))
  found, refreshed, whole = case.refresh("as_before", [FORMER])
  same(refreshed, whole)
  assert found["users"]["computed"] == 1 and found["as_of"][f"{FORMER}T00:00:00"]["rows"] == len(whole)
  lists = [
    pa.concat_tables(map(pq.read_table, embedding_files.absent_files(case.folder / n))) for n in ("refreshed", "whole")
  ]
  assert lists[0].equals(lists[1]) and 1000 in lists[0]["user_id"].to_pylist()


def test_several_times_are_refreshed_together(case: Case) -> None:
  manifest, refreshed, whole = case.refresh("both", [FORMER, LATER])
  same(refreshed, whole)
  assert manifest["users"]["computed"] == len(NEW)


def test_another_time_computes_everyone_and_says_so(case: Case) -> None:
  with messages() as said:
    manifest, refreshed, whole = case.refresh("fixed", ["2024-08-02"])
  same(refreshed, whole)
  assert manifest["users"]["kept"] == 0 and manifest["since"] is None
  assert any("so all users are computed" in text for text in said)


def test_a_set_is_refreshed_in_its_own_place(case: Case) -> None:
  shutil.copytree(case.folder / "fixed", case.folder / "run" / "embeddings")
  out = case.folder / "run" / "embeddings"
  manifest = embed.embed(case.run, [LATER], out, since=case.folder / "run", overwrite=True, rows_per_part=24)
  assert manifest["users"]["computed"] == len(NEW)
  same(embedding_files.read_embeddings(out), case.refresh("fixed", [LATER])[2])


def test_vectors_of_another_kind_are_not_mixed(case: Case, run: Run, tmp_path: pathlib.Path) -> None:
  with pytest.raises(ConfigError, match="--dtype was 'float32' there and is 'float16' now"):
    embed.embed(case.run, [LATER], tmp_path / "out", since=case.folder / "fixed", dtype="float16")
  copy = tmp_path / "other"
  shutil.copytree(case.folder / "fixed", copy)
  manifest = json.loads((copy / "manifest.json").read_text())
  (copy / "manifest.json").write_text(json.dumps({**manifest, "step": 4}))
  with pytest.raises(ConfigError, match="the step was 4 there and is 12 now"):
    embed.embed(case.run, [LATER], tmp_path / "out", since=copy)
  (copy / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "dataset"}))
  with pytest.raises(DataError, match="written by an earlier version"):
    embed.embed(case.run, [LATER], tmp_path / "out", since=copy)
  (copy / "manifest.json").write_text(json.dumps({**manifest, "dataset": {"digest": "another", "records": 3}}))
  with pytest.raises(DataError, match="made neither from"):
    embed.embed(case.run, [LATER], tmp_path / "out", since=copy)
