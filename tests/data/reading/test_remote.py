"""Files behind DuckDB's own file systems.

No test reaches a network: one file system in memory, registered with DuckDB, stands in for the object stores.
"""

from __future__ import annotations

import json
import pathlib

import fsspec
import pytest

from supermoe_jax.data.inspect import inspect
from supermoe_jax.data.preparation import fitting
from supermoe_jax.data.reading import paths, readers, remote
from supermoe_jax.data.reading.remote import RemoteFile
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import PRICE, good_rows

NAMES = ["e.parquet", "e.csv", "e.csv.gz", "e.jsonl", "e.inter"]


@pytest.fixture
def bare(tmp_path):
  """A connection to a DuckDB that has no extension installed."""
  con = readers.connect()
  con.execute("SET autoinstall_known_extensions = false")
  con.execute(f"SET extension_directory = {readers.literal(str(tmp_path / 'extensions'))}")
  yield con
  con.close()


@pytest.fixture
def store(monkeypatch, tmp_path):
  """Copies files of tmp_path to a store in memory that every connection can read; returns their address there."""
  system = fsspec.filesystem("memory")
  connect = readers.connect

  def connect_with_store(*arguments, **settings):
    con = connect(*arguments, **settings)
    con.register_filesystem(system)
    return con

  monkeypatch.setattr(readers, "connect", connect_with_store)
  monkeypatch.setitem(remote.EXTENSIONS, "memory", "")
  folder = f"memory://{tmp_path.name}"

  def run(*paths):
    for path in paths:
      system.pipe(f"{folder}/{path.relative_to(tmp_path)}", path.read_bytes())
    return folder

  yield run
  system.rm(folder, recursive=True)


@pytest.mark.parametrize(
  ("pattern", "scheme"),
  [
    ("s3://bucket/part-*.parquet", "s3"),
    ("GS://bucket/e.csv", "gs"),
    ("https://host/e.csv", "https"),
    ("events/*.csv", ""),
    ("/data/e.csv", ""),
    ("~/e.csv", ""),
    ("C://e.csv", "c"),
    ("a b://e.csv", ""),
    ("folder/s3://e.csv", ""),
  ],
)
def test_remote_paths_are_told_from_local_ones(pattern, scheme):
  assert remote.scheme(pattern) == scheme


def test_a_remote_file_has_the_name_that_tells_its_format():
  assert RemoteFile("https://host/a/e.csv.gz?token=x.parquet").name == "e.csv.gz"
  assert RemoteFile("s3://bucket/what?.parquet").name == "what?.parquet"
  assert RemoteFile("gs://bucket/a/e.csv.gz").suffix == ".gz"
  assert str(RemoteFile("gs://bucket/a/e.csv").parent) == "gs://bucket/a"
  assert readers.format_of(RemoteFile("s3://bucket/a/e.JSONL")) == "jsonl"


def test_duckdb_is_given_a_pattern_that_matches_the_file_only():
  assert remote.pattern(RemoteFile("s3://bucket/part[1].csv")) == "s3://bucket/part[[]1].csv"
  assert remote.pattern(RemoteFile("https://host/e.csv?a=[1]")) == "https://host/e.csv?a=[1]"  # an address, no glob
  assert remote.pattern(pathlib.Path("part[1].csv")) == "part[[]1].csv"


@pytest.mark.parametrize("pattern", ["s3://bucket/*.parquet", "gs://bucket/e.csv", "https://host/e.csv"])
def test_a_missing_extension_is_named_with_the_path_and_the_remedy(pattern, bare):
  with pytest.raises(DataError) as error:
    paths.find_files(bare, [pattern], "config.data.sources.log.files")
  said = str(error.value)
  assert f"config.data.sources.log.files: {pattern} needs DuckDB's extension httpfs" in said
  assert "access to the internet" in said and "INSTALL httpfs" in said


def test_stars_of_a_web_address_are_an_error(monkeypatch, bare):
  monkeypatch.setitem(remote.EXTENSIONS, "https", "")
  with pytest.raises(DataError, match=r"https://host/\*\.csv: a web server does not list its files"):
    paths.find_files(bare, ["https://host/*.csv"], "key")


def test_a_web_address_is_passed_on_as_it_is(monkeypatch, bare):
  monkeypatch.setitem(remote.EXTENSIONS, "https", "")
  address = "https://host/e.csv?signed=yes"
  assert paths.find_files(bare, [address], "key") == [paths.FoundFile(RemoteFile(address), may_be_empty=False)]


@pytest.mark.parametrize(
  ("pattern", "secret"), [("s3://b/e.csv", "TYPE s3, PROVIDER credential_chain"), ("gs://b/*.csv", "TYPE gcs")]
)
def test_a_refusal_names_the_path_and_how_credentials_are_stored(pattern, secret, monkeypatch, bare):
  monkeypatch.setitem(remote.EXTENSIONS, remote.scheme(pattern), "")  # loaded, as it were; DuckDB still cannot list it
  with pytest.raises(DataError) as error:
    paths.find_files(bare, [pattern], "key")
  assert f"key: {pattern} " in str(error.value) and f"CREATE PERSISTENT SECRET ({secret}" in str(error.value)


def test_local_and_remote_files_keep_the_order_listed(store, write, tmp_path):
  local, far = write("b.csv", good_rows()), write("far/a.csv", good_rows())
  folder = store(far)
  found = paths.find_files(readers.connect(), [f"{folder}/far/*.csv", str(local)], "key")
  assert [f.path.name for f in found] == ["a.csv", "b.csv"]
  assert [isinstance(f.path, RemoteFile) for f in found] == [f.may_be_empty for f in found] == [True, False]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_a_store_gives_the_same_histories_as_a_local_one(name, store, write, make_data, read):
  file = write(name, good_rows(price=[1.5, 2.0, 4.0]))
  near, _ = read(make_data(file, fields=PRICE))
  far, counts = read(make_data(f"{store(file)}/{name}", fields=PRICE))
  assert [(h.user, h.codes.tolist(), h.numeric.tolist()) for h in far] == [
    (h.user, h.codes.tolist(), h.numeric.tolist()) for h in near
  ]
  assert next(iter(counts["sources"]["log"]["files"])).startswith("memory://")


def test_sequences_and_items_in_a_store_are_read(store, tmp_path, make_data, open_log):
  (tmp_path / "e.txt").write_text("a x y\n")
  (tmp_path / "items.json").write_text(json.dumps({"x": {"brand": 5}}))
  folder = store(tmp_path / "e.txt", tmp_path / "items.json")
  source = {"time": "position", "time_unit": "s"}
  source["items"] = {"file": f"{folder}/items.json", "key": "item", "format": "json_object"}
  data = make_data(f"{folder}/e.txt", source=source, fields={"item": {}, "brand": {}})
  with open_log(data) as log:
    assert fitting.fit_encoders(log, data).categorical["brand"].values == ["5"]


def test_a_damaged_file_in_a_store_is_named(store, tmp_path, make_data, read):
  (tmp_path / "e.parquet").write_bytes(b"this is no Parquet file")
  with pytest.raises(DataError, match=r"memory://.*/e\.parquet cannot be read as parquet"):
    read(make_data(f"{store(tmp_path / 'e.parquet')}/e.parquet"))


@pytest.mark.parametrize("name", ["none.csv", "none-*.csv"])
def test_what_a_store_does_not_hold_is_named(name, store, write, make_data, read):
  folder = store(write("e.csv", good_rows()))
  with pytest.raises(DataError, match="matches no file"):
    read(make_data(f"{folder}/{name}"))


def test_stamps_tell_local_and_remote_files_that_changed(store, write):
  near, far = write("near.csv", good_rows()), write("far.csv", good_rows())
  folder = store(far)
  patterns = [str(near), f"{folder}/*.csv"]
  before = paths.file_stamps(patterns)
  assert [size for size, _ in before.values()] == [near.stat().st_size, far.stat().st_size]
  assert paths.file_stamps(patterns) == before
  far.write_text(far.read_text() + "a,1590969600,x,1\n")
  store(far)
  changed = [path for path, stamp in paths.file_stamps(patterns).items() if stamp != before[path]]
  assert len(changed) == 1 and changed[0].endswith("/far.csv")


def test_inspect_proposes_the_files_of_a_store_by_their_address(store, write):
  rows = {"user_id": ["a", "b"] * 30, "timestamp": [1590969600 + 8640 * i for i in range(60)], "item": [*"xyz"] * 20}
  parts = [write(f"part-{i}.csv", rows) for i in range(2)]
  found = inspect.inspect([f"{store(*parts)}/part-*.csv"])
  assert "memory://" in found.config and "part-0.csv" in found.config and "part-1.csv" in found.config
