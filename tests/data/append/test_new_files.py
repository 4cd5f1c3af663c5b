"""Which files an append takes for new."""

from __future__ import annotations

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli, config
from supermoe_jax.data.append import append
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding import splits
from supermoe_jax.data.preparation import prepare
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.messages import messages
from tests.fixtures.new_visits import write_visits
from tests.fixtures.small_log import raw_config as small_config
from tests.fixtures.small_log import write_log


def test_a_file_is_not_appended_twice(appendable: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(appendable.data.path)
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  append.append(path, {"visits": [file]})
  with pytest.raises(DataError, match=r"day.parquet is part of .* already; its rows would count twice"):
    append.append(path, {"visits": [file]})
  with pytest.raises(DataError, match="already holds all files"):
    append.append(path)
  with pytest.raises(ConfigError, match="has no source 'visit'; did you mean 'visits'"):
    append.append(path, {"visit": [file]})


def test_an_appended_id_of_64_bits_keeps_all_ids_integers(appendable: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(appendable.data.path)
  manifest = append.append(path, {"visits": [write_visits(tmp_path, "day.parquet", 10**18 + 3, ["page0"])]})
  assert manifest["user_type"] == "integer" and manifest["appends"][0]["new_users"] == 1


def test_empty_files_of_a_glob_are_counted_and_passed_over(
  appendable: config.Config, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  path = pathlib.Path(appendable.data.path)
  rows = pq.read_table(write_visits(tmp_path, "new-1.parquet", 3, ["page0"]))
  pq.write_table(rows.slice(0, 0), tmp_path / "new-2.parquet")
  (tmp_path / "new-3.parquet").touch()
  empty = [str(tmp_path / name) for name in ("new-2.parquet", "new-3.parquet")]
  with pytest.raises(DataError, match=r"none of the 2 new files holds a row; the first is .*new-2\.parquet"):
    append.append(path, {"visits": [str(tmp_path / "new-[23].parquet")]})
  with pytest.raises(DataError, match=r"new-2\.parquet holds no row\. Leave it out"):
    append.append(path, {"visits": [str(tmp_path / "new-1.parquet"), empty[0]]})
  assert cli.main(["append", "--data", str(path), f"visits={tmp_path}/new-*.parquet"]) == 0
  assert f"2 files without a row passed over, such as {empty[0]}" in capsys.readouterr().out
  manifest = Dataset(path).manifest
  assert manifest["appends"][0]["events"] == 1 and manifest["appends"][0]["empty_files"] == empty
  assert manifest["reading"]["sources"]["visits"]["empty_files"] == empty


def test_empty_files_that_a_pattern_matches_by_now_are_known_afterwards(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["sources"]["visits"]["files"] = [f"{tmp_path}/visits*.parquet"]
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  path = pathlib.Path(cfg.data.path)
  write_visits(tmp_path, "visits-2.parquet", 3, ["page0"])
  (tmp_path / "visits-3.parquet").touch()
  assert append.append(path)["appends"][0]["events"] == 1
  Dataset(path).check_files()
  with pytest.raises(DataError, match="already holds all files"):
    append.append(path)


def test_a_file_is_the_same_by_whatever_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["sources"]["visits"]["files"] = ["visits*.parquet"]
  raw["data"]["split"]["log_end"] = "2024-09-01"
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  path = pathlib.Path(cfg.data.path)
  (tmp_path / "link.parquet").symlink_to(tmp_path / "visits.parquet")
  for name in (str(tmp_path / "visits.parquet"), "./visits.parquet", "link.parquet"):
    with pytest.raises(DataError, match="already; its rows would count twice"):
      append.append(path, {"visits": [name]})
  append.append(path, {"visits": [write_visits(tmp_path, "visits-2.parquet", 3, ["page0"])]})
  assert Dataset(path).config.data.sources["visits"].files == ("visits*.parquet",)
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  with pytest.raises(DataError, match=r"day.parquet is named twice"):
    append.append(path, {"visits": [file, "day.parquet"]})


def test_every_name_has_to_be_that_of_a_file(appendable: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(appendable.data.path)
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  for files in ({"visits": [file, str(tmp_path / "dya.parquet")]}, {"visits": [file], "buys": [str(tmp_path / "x*")]}):
    with pytest.raises(DataError, match=r"dya.parquet: no such file; did you mean 'day.parquet'|matches no data file"):
      append.append(path, files)
  assert "appends" not in Dataset(path).manifest


def test_globs_over_folders_in_folders_are_followed(appendable: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(appendable.data.path)
  for folder in ("new", "new/x", "new/x/y"):
    (tmp_path / folder).mkdir()
    write_visits(tmp_path, f"{folder}/day.parquet", 3, ["page0"])
  pattern = str(tmp_path / "new/**/*.parquet")
  assert append.append(path, {"visits": [pattern]})["appends"][0]["events"] == 3
  with pytest.raises(DataError, match="already; its rows would count twice"):
    append.append(path, {"visits": [str(tmp_path / "new/day.parquet")]})


def test_another_table_of_users_is_an_error(appendable: config.Config, tmp_path: pathlib.Path) -> None:
  assert appendable.data.users is not None
  table = pathlib.Path(appendable.data.users.files[0])
  content = table.read_bytes()
  table.write_bytes(content + b" ")
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  with pytest.raises(DataError, match="the table of users has changed"):
    append.append(pathlib.Path(appendable.data.path), {"visits": [file]})


def test_files_that_a_pattern_matches_by_now_are_found_and_training_goes_on(tmp_path: pathlib.Path) -> None:
  """With globs the config stays the same: the one file serves prepare, append and train."""
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  first = pathlib.Path(raw["data"]["sources"]["visits"]["files"][0])
  raw["data"]["sources"]["visits"]["files"] = [str(first.with_name("visits*.parquet"))]
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  write_visits(tmp_path, "visits-2024-06-20.parquet", 77, ["page0", "page1"])
  with pytest.raises(DataError, match="supermoe append"):
    prepare.prepare(cfg)
  assert cli.main(["append", "--data", cfg.data.path]) == 0
  after = Dataset(cfg.data.path)
  after.check_matches(cfg)
  after.check_files()
  assert len(after) == 13 and after.manifest["appends"][0]["new_users"] == 1
  users = [after[i]["user"] for i in range(13)]
  assert "77" in users and users == sorted(users, key=lambda u: splits.user_hash(u))


def test_the_command_names_sources_and_tells_what_came(
  appendable: config.Config, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  assert cli.main(["append", "--data", appendable.data.path, file]) == 1
  assert "names no source; write SOURCE=FILE, where SOURCE is one of visits, buys" in capsys.readouterr().err
  assert cli.main(["append", "--data", appendable.data.path, f"visits={file}"]) == 0
  said = capsys.readouterr().out
  assert f"config.data.sources.visits.files must also match {file}; otherwise" in said
  assert "1 events appended: 1 users rewritten, 0 of them new; 11 left unchanged" in said


def test_a_table_of_items_is_read_as_it_is_now_and_that_is_said(tmp_path: pathlib.Path) -> None:
  """Earlier events keep what they had; of a source without new files a changed table goes on being an error."""
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  for source, key in (("visits", "page"), ("buys", "amount")):
    table = tmp_path / f"{source}_items.parquet"
    pq.write_table(pa.table({key: ["page0"], "topic": ["old"]}), table)
    raw["data"]["sources"][source]["items"] = {"file": str(table), "key": key}
  raw["data"]["fields"]["topic"] = {"sources": ["visits"]}
  raw["data"]["split"]["log_end"] = "2024-09-01"
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  path = pathlib.Path(cfg.data.path)
  old = Dataset(path).encoders.categorical["topic"].code("old")
  pq.write_table(pa.table({"page": ["page0"], "topic": ["new"]}), tmp_path / "visits_items.parquet")
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"], "2024-02-02")
  with messages() as said:
    manifest = append.append(path, {"visits": [file]})
  assert manifest["appends"][0]["changed_item_tables"] == [str(tmp_path / "visits_items.parquet")]
  assert any("visits_items.parquet has changed" in text for text in said)
  after = Dataset(path)
  new = after.encoders.categorical["topic"].code("new")
  (record,) = [after[i] for i in range(len(after)) if after[i]["user"] == "3"]
  topics = record["codes"][:, after.schema.field("topic")]
  at = record["time"] == np.datetime64("2024-02-02", "us").astype(np.int64)
  assert topics[at].tolist() == [new] and set(topics[~at].tolist()) == {0, old}
  pq.write_table(pa.table({"amount": ["1"], "topic": ["else"]}), tmp_path / "buys_items.parquet")
  append.append(path, {"visits": [write_visits(tmp_path, "day2.parquet", 3, ["page0"])]})
  with pytest.raises(DataError, match=r"buys_items.parquet, which has changed"):
    Dataset(path).check_files()
