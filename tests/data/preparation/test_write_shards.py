"""Shards of a dataset: how many there are and who writes them changes no record; many are read, and by others too."""

from __future__ import annotations

import gc
import itertools
import os
import pathlib
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.format import shard_files
from supermoe_jax.data.preparation import prepare, write_shards
from supermoe_jax.errors import DataError
from tests.fixtures.dataset_copies import contents, facts, moved


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(write_shards, "count_writers", lambda count: 1)


@pytest.mark.usefixtures("in_this_process")
def test_the_number_of_shards_changes_no_record_and_no_statistic(
  appendable: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(shard_files, "SHARD_EVENTS", 100)
  other = moved(appendable, "other")
  prepare.prepare(other)
  a, b = Dataset(appendable.data.path), Dataset(other.data.path)
  assert len(a) == len(b) and len(a.manifest["shards"]) == 1 and len(b.manifest["shards"]) >= 4
  for i in range(len(a)):
    assert a[i].keys() == b[i].keys()
    for key, value in a[i].items():
      np.testing.assert_array_equal(value, b[i][key])
  differ = ("shards", "contents")
  assert {k: v for k, v in facts(a.path).items() if k not in differ} == {
    k: v for k, v in facts(b.path).items() if k not in differ
  }


@pytest.mark.nightly
def test_the_number_of_processes_changes_no_byte(unprepared: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(shard_files, "SHARD_EVENTS", 100)
  found = []
  for number in (1, 2):
    monkeypatch.setattr(write_shards, "count_writers", lambda count, number=number: number)
    cfg = moved(unprepared, str(number))
    prepare.prepare(cfg)
    found.append((contents(cfg.data.path), facts(cfg.data.path)))
  assert found[0] == found[1]


def leave_free(files: int) -> None:
  """Limits how many further files this process may open. The limit is on file numbers, which may have gaps."""
  gc.collect()  # what was left open before must not be closed in between
  opened = {int(name) for name in os.listdir("/dev/fd")}  # noqa: PTH208
  free = (n for n in itertools.count() if n not in opened)
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, files, None)), most))


@pytest.mark.usefixtures("in_this_process")
def test_a_dataset_of_more_shards_than_files_may_be_open_is_read(
  unprepared: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  cfg = unprepared
  monkeypatch.setattr(shard_files, "SHARD_EVENTS", 5)
  prepare.prepare(cfg)
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    leave_free(8)
    data = Dataset(cfg.data.path)
    assert len(data.manifest["shards"]) == 12 == len([data[i] for i in range(len(data))])
    again = Dataset(cfg.data.path)
    leave_free(4)
    with pytest.raises(DataError, match="12 shards, and this process may not open so many files"):
      [again[i] for i in range(len(again))]
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_table_of_users_says_where_their_records_are(few_users: pathlib.Path) -> None:
  data = Dataset(few_users / "dataset")
  users = pq.read_table(data.path / "users.parquet")
  assert users["user"].to_pylist() == [data[i]["user"] for i in range(len(data))]
  assert users["last_event"].to_pylist() == [int(data[i]["time"][-1]) for i in range(len(data))]
  assert users["record"].to_pylist() == list(range(len(data))) and users.schema.field("record").type == pa.int64()


@pytest.mark.nightly
def test_records_are_what_tensorflow_datasets_reads(few_users: pathlib.Path) -> None:
  import tensorflow_datasets as tfds

  data = Dataset(few_users / "dataset")
  source = tfds.builder_from_directory(str(data.path / shard_files.DIRECTORY)).as_data_source(split="users")
  assert len(source) == len(data)
  for i in range(len(data)):
    theirs, ours = source[i], data[i]
    assert theirs["user"].decode() == ours["user"] and theirs.keys() == ours.keys()
    for key in ours.keys() - {"user"}:
      np.testing.assert_array_equal(theirs[key], ours[key])
