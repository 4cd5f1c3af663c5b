import errno
import json
import os
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.dataset_copies import contents, facts, moved
from tests.fixtures.messages import messages


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


def test_vocabularies_are_fitted_on_the_training_period_only(unprepared: config.Config) -> None:
  file = pathlib.Path(unprepared.data.sources["visits"].files[0])
  table = pq.read_table(file).to_pydict()
  later = np.array(table["time"], "datetime64[s]") >= np.datetime64("2024-05-01")
  assert later.any()
  table["page"] = [f"new_{p}" if late else p for p, late in zip(table["page"], later)]
  pq.write_table(pa.table(table), file)
  manifest = prepare.prepare(unprepared)
  assert manifest["fields"]["page"]["oov_after"] == 1.0
  values = Dataset(unprepared.data.path).encoders.categorical["page"].values
  assert not any(v.startswith("new_") for v in values)
  assert manifest["labels"]["next_page"]["test"]["unseen_value"] == manifest["labels"]["next_page"]["test"]["known"]
  assert any("unseen in training" in w for w in manifest["warnings"])


def test_preparing_again_gives_the_same_bytes_in_an_empty_directory_too(appendable: config.Config) -> None:
  other = moved(appendable, "again")
  pathlib.Path(other.data.path).mkdir()
  prepare.prepare(other)
  assert contents(appendable.data.path) == contents(other.data.path)
  assert facts(appendable.data.path) == facts(other.data.path)


def test_a_prepared_dataset_is_kept_and_another_config_is_an_error(appendable: config.Config) -> None:
  with messages() as said:
    prepare.prepare(appendable)
  assert "already prepared" in said[0]
  other = config.override(appendable, ["--config.tasks.quiet.horizon_days=7"])
  with pytest.raises(DataError, match=r"tasks\.quiet\.horizon_days: 14\.0 → 7\.0.*--overwrite"):
    prepare.prepare(other)
  assert prepare.prepare(other, overwrite=True)["config"]["tasks"]["quiet"]["horizon_days"] == 7.0


def test_a_directory_that_is_no_dataset_is_never_overwritten(unprepared: config.Config) -> None:
  path = pathlib.Path(unprepared.data.path)
  path.mkdir()
  (path / "thesis.txt").write_text("years of work")
  with pytest.raises(DataError, match="holds no dataset and is not overwritten"):
    prepare.prepare(unprepared, overwrite=True)
  assert (path / "thesis.txt").read_text() == "years of work"


def test_a_preparation_that_fails_keeps_the_dataset_before_it(
  appendable: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  before = (pathlib.Path(appendable.data.path) / "manifest.json").read_text()

  def full(*unused: object, **also: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(prepare.vocabulary.Encoders, "save", full)
  with pytest.raises(DataError, match=r"the disk is full .*the same command resumes"):
    prepare.prepare(appendable, overwrite=True)
  path = pathlib.Path(appendable.data.path)
  assert (path / "manifest.json").read_text() == before
  assert Dataset(path).manifest["users"] == 12


def test_after_an_error_of_the_data_nothing_is_left(unprepared: config.Config) -> None:
  file = pathlib.Path(unprepared.data.sources["buys"].files[0])
  table = pq.read_table(file).to_pydict()
  pq.write_table(pa.table({**table, "user": [None] * len(table["user"])}), file)
  with pytest.raises(DataError, match="column 'user' is empty"):
    prepare.prepare(unprepared)
  assert not list(pathlib.Path(unprepared.data.path).parent.glob("dataset*"))


def test_a_half_written_dataset_is_not_a_dataset(appendable: config.Config) -> None:
  path = pathlib.Path(appendable.data.path)
  (path / "manifest.json").unlink()
  with pytest.raises(DataError, match="holds no prepared dataset"):
    Dataset(path)


def test_what_another_cut_preparation_left_is_removed_and_said(unprepared: config.Config) -> None:
  left = pathlib.Path(unprepared.data.path).with_name("dataset.incomplete")
  left.mkdir()
  with messages() as said:
    prepare.prepare(unprepared)
  assert "did not finish" in said[0] and not left.exists()


def test_a_damaged_manifest_is_an_error(appendable: config.Config) -> None:
  file = pathlib.Path(appendable.data.path) / "manifest.json"
  file.write_text(file.read_text()[:-40])
  with pytest.raises(DataError, match="damaged"):
    Dataset(appendable.data.path)
  file.write_text(json.dumps({"format": 99}))
  with pytest.raises(DataError, match="format 99"):
    Dataset(appendable.data.path)


def test_a_missing_shard_is_an_error(appendable: config.Config) -> None:
  for shard in pathlib.Path(appendable.data.path).rglob("*.array_record*"):
    shutil.move(shard, shard.with_suffix(".gone"))
  with pytest.raises(DataError, match="prepare again"):
    Dataset(appendable.data.path)


def test_users_of_the_user_table_without_events_are_counted(unprepared: config.Config) -> None:
  file = pathlib.Path(unprepared.data.users.files[0])  # type: ignore[union-attr]
  pq.write_table(pa.table({"user": [0, 2, 999], "plan": ["free", "paid", "paid"]}), file)
  assert prepare.prepare(unprepared)["user_table"]["labelled_users_without_events"] == 1


def test_more_values_than_there_are_is_an_error(unprepared: config.Config) -> None:
  with pytest.raises(ConfigError, match=r"tasks\.pages\.top=500, but page has only \d+ values"):
    prepare.prepare(config.override(unprepared, ["--config.tasks.pages.top=500"]))


def test_the_log_may_be_declared_complete_beyond_its_last_event(appendable: config.Config) -> None:
  """Two months after the only test snapshot there are no events any more."""
  known = {}
  for end in ("2024-09-01", ""):
    other = config.override(
      moved(appendable, f"until {end}"), [f"--config.data.split.log_end={end}", "--config.tasks.quiet.horizon_days=60"]
    )
    known[end] = prepare.prepare(other)["labels"]["quiet"]["test"]["known"]
  assert known == {"2024-09-01": Dataset(appendable.data.path).manifest["snapshots"]["test"], "": 0}


def test_files_that_changed_since_are_not_taken_for_prepared(appendable: config.Config) -> None:
  file = pathlib.Path(appendable.data.sources["buys"].files[0])
  pq.write_table(pq.read_table(file).slice(1), file)
  with pytest.raises(DataError, match="have changed; prepare again with --overwrite"):
    prepare.prepare(appendable)
  prepare.prepare(appendable, overwrite=True)


def test_a_dataset_with_something_else_in_it_is_not_overwritten(appendable: config.Config) -> None:
  kept = pathlib.Path(appendable.data.path) / "checkpoints"
  kept.mkdir()
  with pytest.raises(DataError, match="holds 'checkpoints' besides the dataset"):
    prepare.prepare(appendable, overwrite=True)
  assert kept.is_dir()


def test_user_ids_are_integers_again_only_if_all_are(appendable: config.Config) -> None:
  assert Dataset(appendable.data.path).manifest["user_type"] == "integer"
  file = pathlib.Path(appendable.data.sources["buys"].files[0])
  table = pq.read_table(file).to_pydict()
  table["user"] = ["guest-7", *map(str, table["user"][1:])]
  pq.write_table(pa.table(table), file)
  assert prepare.prepare(appendable, overwrite=True)["user_type"] == "text"


@pytest.mark.parametrize("user", [10**18, 2**63 - 1, -(2**63)])
def test_ids_of_64_bits_are_integers_whatever_their_length(appendable: config.Config, user: int) -> None:
  file = pathlib.Path(appendable.data.sources["buys"].files[0])
  table = pq.read_table(file).to_pydict()
  table["user"] = [user, *table["user"][1:]]
  pq.write_table(pa.table(table), file)
  assert prepare.prepare(appendable, overwrite=True)["user_type"] == "integer"


def test_whole_decimals_are_integer_ids(appendable: config.Config) -> None:
  for source in appendable.data.sources.values():
    table = pq.read_table(source.files[0])
    ids = pc.cast(table["user"], pa.decimal128(38, 10))
    pq.write_table(table.set_column(table.schema.get_field_index("user"), "user", ids), source.files[0])
  manifest = prepare.prepare(appendable, overwrite=True)
  assert manifest["user_type"] == "integer"
  assert manifest["user_table"]["labelled_users_without_events"] == 0
