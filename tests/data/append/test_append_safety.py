"""A dataset is whole and as it was until an append has ended, whatever ends it."""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pytest

from supermoe_jax import atomic_files, config
from supermoe_jax.data.append import append
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding import splits
from supermoe_jax.data.preparation import prepare
from supermoe_jax.errors import DataError
from tests.fixtures.new_visits import write_visits
from tests.fixtures.small_log import raw_config as small_config
from tests.fixtures.small_log import write_log


def test_a_dataset_that_was_opened_before_stays_what_it_was(tmp_path: pathlib.Path) -> None:
  """A training process goes on with the users that it knows, and with those of them that it may look at."""
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["split"] = {"mode": "user", "log_end": "2024-09-01", "user_validation": 0.3, "user_test": 0.3}
  raw["tasks"] = {"paid": raw["tasks"]["paid"]}
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  path = pathlib.Path(cfg.data.path)
  opened, training = Dataset(path), Dataset(path).training_users
  files = [write_visits(tmp_path, f"{user}.parquet", user, ["page0"]) for user in range(50, 58)]
  append.append(path, {"visits": files})
  assert len(Dataset(path)) == 20 and len(opened) == 12
  np.testing.assert_array_equal(opened.training_users, training)
  assert all(opened[i]["user_split"] == splits.TRAIN for i in opened.training_users)


def test_a_bad_file_leaves_the_dataset_as_it_was(appendable: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(appendable.data.path)
  before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
  bad = tmp_path / "bad.csv"
  bad.write_text("user,time,page,device,seconds\n3,yesterday,page0,web,1\n")
  with pytest.raises(DataError, match=r"bad.csv: row 1: column 'time' holds 'yesterday'"):
    append.append(path, {"visits": [str(bad)]})
  assert before == {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
  assert not list(path.parent.glob("dataset.*"))


def test_only_one_process_at_a_time_writes_a_dataset(appendable: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(appendable.data.path)
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  with atomic_files.replacing_directory(path.with_name("other")), atomic_files.replacing_directory(path) as work:
    (work / "half").touch()
    with pytest.raises(DataError, match=r"dataset.incomplete is being written by another process"):
      append.append(path, {"visits": [file]})
    with pytest.raises(DataError, match=r"dataset.incomplete is being written by another process"):
      prepare.prepare(appendable, overwrite=True)
    assert (work / "half").exists()
    shutil.copytree(path, work, dirs_exist_ok=True)
    (work / "half").unlink()
  append.append(path, {"visits": [file]})
  assert not list(path.parent.glob("dataset.*"))


def test_what_stops_duckdb_is_told_in_one_line(appendable: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(appendable.data.path)
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"] * 200_000)
  with pytest.raises(DataError, match=r"appending to .*dataset failed: Out of Memory.*; the dataset is as it was"):
    append.append(path, {"visits": [file]}, memory="1MB")
  with pytest.raises(DataError, match="no file to append to"):
    append.append(path, {"visits": []})
  assert "appends" not in Dataset(path).manifest
