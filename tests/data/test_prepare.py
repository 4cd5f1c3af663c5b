import dataclasses
import errno
import json
import os
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data import prepare
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.events import DataError
from tests.fixtures.small_log import raw_config, write_log


@pytest.fixture
def small(tmp_path: pathlib.Path) -> config.Config:
  write_log(tmp_path, users=12)
  return config.resolve(raw_config(tmp_path))


def test_the_manifest_counts_what_the_records_hold(dataset: Dataset) -> None:
  records = [dataset[i] for i in range(len(dataset))]
  manifest = dataset.manifest
  assert manifest["users"] == len(records)
  assert manifest["events"] == sum(len(r["time"]) for r in records)
  for split, index in (("train", 0), ("validation", 1), ("test", 2)):
    assert manifest["snapshots"][split] == sum(int(np.sum(r["snapshot_split"] == index)) for r in records)
    for task in ("quiet", "pages", "paid"):
      here = [(r[f"label_{task}"], r[f"known_{task}"].astype(bool) & (r["snapshot_split"] == index)) for r in records]
      count = manifest["labels"][task][split]
      assert count["known"] == sum(int(known.sum()) for _, known in here)
      assert count["positive"] == sum(int(value[known].sum()) for value, known in here)


def test_vocabularies_are_fitted_on_the_training_period_only(small: config.Config) -> None:
  file = pathlib.Path(small.data.sources["visits"].files[0])
  table = pq.read_table(file).to_pydict()
  later = np.array(table["time"], "datetime64[s]") >= np.datetime64("2024-05-01")
  assert later.any()
  table["page"] = [f"new_{p}" if late else p for p, late in zip(table["page"], later)]
  pq.write_table(pa.table(table), file)
  manifest = prepare.prepare(small)
  assert manifest["fields"]["page"]["oov_after"] == 1.0
  values = Dataset(small.data.path).encoders.categorical["page"].values
  assert not any(v.startswith("new_") for v in values)
  assert manifest["labels"]["next_page"]["test"]["unseen_value"] == manifest["labels"]["next_page"]["test"]["known"]
  assert any("unseen in training" in w for w in manifest["warnings"])


def test_preparing_twice_gives_the_same_records(small: config.Config, tmp_path: pathlib.Path) -> None:
  prepare.prepare(small)
  other = dataclasses.replace(small, data=dataclasses.replace(small.data, path=str(tmp_path / "again")))
  prepare.prepare(other)
  one, two = Dataset(small.data.path), Dataset(other.data.path)
  for i in range(len(one)):
    a, b = one[i], two[i]
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_a_prepared_dataset_is_kept_and_another_config_is_an_error(small: config.Config) -> None:
  prepare.prepare(small)
  said: list[str] = []
  prepare.prepare(small, say=said.append)
  assert "already prepared" in said[0]
  other = config.override(small, ["--config.tasks.quiet.horizon_days=7"])
  with pytest.raises(DataError, match=r"tasks\.quiet\.horizon_days: 14\.0 → 7\.0.*--overwrite"):
    prepare.prepare(other)
  assert prepare.prepare(other, overwrite=True)["config"]["tasks"]["quiet"]["horizon_days"] == 7.0


def test_a_directory_that_is_no_dataset_is_never_overwritten(small: config.Config) -> None:
  path = pathlib.Path(small.data.path)
  path.mkdir()
  (path / "thesis.txt").write_text("years of work")
  with pytest.raises(DataError, match="holds no dataset and is not overwritten"):
    prepare.prepare(small, overwrite=True)
  assert (path / "thesis.txt").read_text() == "years of work"


def test_a_preparation_that_fails_keeps_the_dataset_before_it(
  small: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  prepare.prepare(small)
  before = (pathlib.Path(small.data.path) / "manifest.json").read_text()

  def full(*unused: object, **also: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(prepare.vocabulary.Encoders, "save", full)
  with pytest.raises(DataError, match=r"the disk is full .*the same command goes on"):
    prepare.prepare(small, overwrite=True)
  path = pathlib.Path(small.data.path)
  assert (path / "manifest.json").read_text() == before
  assert Dataset(path).manifest["users"] == 12


def test_after_an_error_of_the_data_nothing_is_left(small: config.Config) -> None:
  file = pathlib.Path(small.data.sources["buys"].files[0])
  table = pq.read_table(file).to_pydict()
  pq.write_table(pa.table({**table, "user": [None] * len(table["user"])}), file)
  with pytest.raises(DataError, match="column 'user' is empty"):
    prepare.prepare(small)
  assert not list(pathlib.Path(small.data.path).parent.glob("dataset*"))


def test_a_half_written_dataset_is_not_a_dataset(small: config.Config) -> None:
  prepare.prepare(small)
  path = pathlib.Path(small.data.path)
  (path / "manifest.json").unlink()
  with pytest.raises(DataError, match="holds no prepared dataset"):
    Dataset(path)


def test_what_another_cut_preparation_left_is_removed_and_said(small: config.Config) -> None:
  left = pathlib.Path(small.data.path).with_name("dataset.incomplete")
  left.mkdir()
  said: list[str] = []
  prepare.prepare(small, say=said.append)
  assert "did not finish" in said[0] and not left.exists()


def test_a_damaged_manifest_is_an_error(small: config.Config) -> None:
  prepare.prepare(small)
  file = pathlib.Path(small.data.path) / "manifest.json"
  file.write_text(file.read_text()[:-40])
  with pytest.raises(DataError, match="damaged"):
    Dataset(small.data.path)
  file.write_text(json.dumps({"format": 99}))
  with pytest.raises(DataError, match="format 99"):
    Dataset(small.data.path)


def test_a_missing_shard_is_an_error(small: config.Config) -> None:
  prepare.prepare(small)
  for shard in pathlib.Path(small.data.path).rglob("*.array_record*"):
    shutil.move(shard, shard.with_suffix(".gone"))
  with pytest.raises(DataError, match="prepare again"):
    Dataset(small.data.path)


def test_users_of_the_user_table_without_events_are_counted(small: config.Config) -> None:
  file = pathlib.Path(small.data.users.files[0])  # type: ignore[union-attr]
  pq.write_table(pa.table({"user": [0, 2, 999], "plan": ["free", "paid", "paid"]}), file)
  assert prepare.prepare(small)["user_table"]["labelled_users_without_events"] == 1


def test_more_values_than_there_are_is_an_error(small: config.Config) -> None:
  with pytest.raises(config.ConfigError, match=r"tasks\.pages\.top=500, but page has only \d+ values"):
    prepare.prepare(config.override(small, ["--config.tasks.pages.top=500"]))


def test_the_log_may_be_declared_complete_beyond_its_last_event(small: config.Config) -> None:
  without = prepare.prepare(small)["labels"]["quiet"]["test"]["known"]
  longer = config.override(small, ["--config.data.split.log_end=2024-09-01", "--config.tasks.quiet.horizon_days=60"])
  with_end = prepare.prepare(longer, overwrite=True)["labels"]["quiet"]["test"]["known"]
  assert with_end == without > 0


def test_files_that_changed_since_are_not_taken_for_prepared(small: config.Config) -> None:
  prepare.prepare(small)
  file = pathlib.Path(small.data.sources["buys"].files[0])
  pq.write_table(pq.read_table(file).slice(1), file)
  with pytest.raises(DataError, match="have changed; prepare again with --overwrite"):
    prepare.prepare(small)
  prepare.prepare(small, overwrite=True)


def test_an_empty_directory_is_prepared_into(small: config.Config) -> None:
  pathlib.Path(small.data.path).mkdir()
  assert prepare.prepare(small)["users"] == 12


def test_a_dataset_with_something_else_in_it_is_not_overwritten(small: config.Config) -> None:
  prepare.prepare(small)
  kept = pathlib.Path(small.data.path) / "checkpoints"
  kept.mkdir()
  with pytest.raises(DataError, match="holds 'checkpoints' besides the dataset"):
    prepare.prepare(small, overwrite=True)
  assert kept.is_dir()


def test_user_ids_are_integers_again_only_if_all_are(small: config.Config) -> None:
  assert prepare.prepare(small)["user_type"] == "integer"
  file = pathlib.Path(small.data.sources["buys"].files[0])
  table = pq.read_table(file).to_pydict()
  table["user"] = ["guest-7", *map(str, table["user"][1:])]
  pq.write_table(pa.table(table), file)
  assert prepare.prepare(small, overwrite=True)["user_type"] == "text"
