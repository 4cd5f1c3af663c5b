"""Preparation on Apache Beam gives the dataset that this machine gives."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli, config
from supermoe_jax.data.beam import event_parts, merged_log, pipeline
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.format import shard_files
from supermoe_jax.data.preparation import prepare, write_shards
from supermoe_jax.data.preparation.write_shards import RecordMaker, ShardRows, write_shard
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.messages import messages
from tests.fixtures.random_logs import WAYS, Case, random_case, raw_config, write_case

# Of where the dataset lies, when it was made, and how its records are divided among files.
DIFFER = ("config", "contents", "digest", "seconds", "shards")
TAGS = {"column": "item", "many": 2, "separator": "b", "buckets": 3, "size": 2}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(merged_log, "PART_BYTES", 300)


def on_beam(cfg: config.Config, runner: str = "DirectRunner") -> dict[str, Any]:
  return prepare.prepare(cfg, engine=pipeline.Beam(runner))


def moved(cfg: config.Config, name: str) -> config.Config:
  path = pathlib.Path(cfg.data.path).with_name(name)
  return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=str(path)))


def written(folder: pathlib.Path, case: Case, way: str = "calendar", **data: Any) -> config.Config:
  write_case(folder, case)
  raw = raw_config(folder, case, way)
  raw["data"]["fields"]["tags"] = TAGS
  raw["data"] |= data
  return config.resolve(raw)


def config_file(folder: pathlib.Path, cfg: config.Config) -> str:
  file = folder / "config.py"
  returned = f"ml_collections.ConfigDict(json.loads({json.dumps(config.to_dict(cfg))!r}))"
  file.write_text(f"import json\nimport ml_collections\n\n\ndef get_config():\n  return {returned}\n")
  return str(file)


def message(run: Callable[[config.Config], Any], cfg: config.Config) -> str:
  with pytest.raises((DataError, ConfigError)) as caught:
    run(cfg)
  assert not pathlib.Path(cfg.data.path).exists()
  return f"{type(caught.value).__name__}: {caught.value}"


def locally(cfg: config.Config) -> dict[str, Any]:
  return prepare.prepare(cfg)


def assert_same(cfg: config.Config) -> tuple[Dataset, Dataset]:
  """Prepares in both ways; compares records, encoders, users and manifests."""
  there = moved(cfg, "there")
  locally(cfg)
  on_beam(there)
  one, two = Dataset(cfg.data.path), Dataset(there.data.path)
  assert one.manifest.keys() == two.manifest.keys()
  for key in one.manifest.keys() - set(DIFFER):
    assert one.manifest[key] == two.manifest[key], key
  assert len(one) == len(two)
  for i in range(len(one)):
    (a,), (b,) = one._source.__getitems__([i]), two._source.__getitems__([i])
    assert a == b
  files = [{f.name: f.read_bytes() for f in (d.path / "encoders").rglob("*.*")} for d in (one, two)]
  assert files[0] == files[1]
  assert pq.read_table(one.path / "users.parquet").equals(pq.read_table(two.path / "users.parquet"))
  assert sorted(f.name for f in two.path.iterdir()) == sorted(f.name for f in one.path.iterdir())
  return one, two


@pytest.mark.parametrize(("way", "seed"), [(way, seed) for seed, way in enumerate(WAYS)])
def test_records_statistics_and_manifest_are_the_same(way: str, seed: int, tmp_path: pathlib.Path) -> None:
  formats = [("csv", "jsonl", "parquet"), ("parquet", "csv", "jsonl"), ("jsonl", "parquet", "csv")]
  case = random_case(seed, 20 + 10 * seed, 5 + 4 * seed, formats[seed % 3])
  case = dataclasses.replace(
    case,
    duplicates=("keep", "drop")[seed % 2],
    encoding=("log1p", "quantile", "standardise")[seed % 3],
    zone="Europe/Berlin",
    log_end=("", "2024-05-01")[seed // 2 % 2],
  )
  _, there = assert_same(written(tmp_path, case, way))
  assert len(there.manifest["shards"]) >= 4


def test_tensorflow_datasets_reads_the_shards(tmp_path: pathlib.Path) -> None:
  import tensorflow_datasets as tfds

  cfg = written(tmp_path, random_case(3, 40, 12))
  manifest = on_beam(cfg)
  source = tfds.builder_from_directory(f"{cfg.data.path}/{shard_files.DIRECTORY}").as_data_source(split="users")
  data = Dataset(cfg.data.path)
  assert len(source) == len(data) and len(manifest["shards"]) >= 4
  for i in range(len(data)):
    np.testing.assert_array_equal(source[i]["time"], data[i]["time"])


def test_one_part_is_enough_for_a_small_log(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(merged_log, "PART_BYTES", 1 << 25)
  _, there = assert_same(written(tmp_path, random_case(4, 30, 12)))
  assert len(there.manifest["shards"]) == 1


def test_sequences_and_items_of_a_table_are_the_same(tmp_path: pathlib.Path) -> None:
  (tmp_path / "1.txt").write_text("".join(f"u{u} {' '.join(str(u * i % 7) for i in range(3 + u))}\n" for u in range(9)))
  (tmp_path / "2.txt").write_text("u20 1 2 3 4\nu21 6 5 4 3 2\n")
  items = "".join(f"{i},{'rgb'[i % 3]},{i * 0.1}\n" for i in range(6))
  (tmp_path / "items.csv").write_text(f"item,colour,size\n{items}")
  table = {"file": str(tmp_path / "items.csv"), "key": "item"}
  source = {"files": [str(tmp_path / "*.txt")], "user": "user", "time": "position", "time_unit": "s", "items": table}
  fields = {"item": {}, "colour": {}, "size": {"kind": "numeric"}}
  data = {"sources": {"log": source}, "fields": fields, "split": {"mode": "leave_one_out"}}
  raw = {"data": {"path": str(tmp_path / "here"), **data}, "tasks": {"next": {"kind": "next_event", "field": "item"}}}
  one, _ = assert_same(config.resolve(raw))
  assert one.manifest["reading"]["sources"]["log"]["items_missing"] > 0
  (tmp_path / "3.txt").write_text("u3 1 2 3\n")
  cfgs = [moved(config.resolve(raw), name) for name in ("a", "b")]
  assert "has 2 lines" in message(locally, cfgs[0])
  assert message(locally, cfgs[0]) == message(on_beam, cfgs[1])


# --------------------------------------------------------------------------------------------------------------- errors


def break_rows(folder: pathlib.Path, name: str, row: int) -> None:
  lines = (folder / name).read_text().splitlines()
  lines[row] = lines[row].replace(lines[row].split(",")[1], "yesterday")
  (folder / name).write_text("\n".join(lines) + "\n")


def test_of_bad_rows_the_first_is_named_as_on_this_machine(tmp_path: pathlib.Path) -> None:
  cfg = written(tmp_path, random_case(5, 40, 12, ("csv", "csv", "parquet")))
  break_rows(tmp_path, "buys-1.csv", 2)
  break_rows(tmp_path, "views-2.csv", 5)
  break_rows(tmp_path, "views-2.csv", 7)
  here = message(locally, cfg)
  assert "views-2.csv: row 5" in here and "'yesterday'" in here and "2 such rows" in here
  assert message(on_beam, cfg) == here
  assert not pathlib.Path(f"{cfg.data.path}.incomplete").exists()


def test_bad_rows_that_may_be_dropped_are_counted_the_same(tmp_path: pathlib.Path) -> None:
  cfg = written(tmp_path, random_case(5, 40, 12, ("csv", "csv", "parquet")), on_bad_rows="drop")
  break_rows(tmp_path, "buys-1.csv", 2)
  break_rows(tmp_path, "views-2.csv", 5)
  one, _ = assert_same(cfg)
  assert one.manifest["reading"]["dropped"] == {"unparsable_time": 2}


@pytest.mark.parametrize("what", ["no training event", "no value", "no event", "no frequent value", "top", "no file"])
def test_errors_of_the_whole_log_are_the_same(what: str, tmp_path: pathlib.Path) -> None:
  case = random_case(6, 30, 8, ("csv", "csv", "csv"))
  if what == "no value":
    case = dataclasses.replace(case, users=tuple({**user, "town": None} for user in case.users))
  changes = {
    "no training event": ["--config.data.split.train_end=2023-01-01"],
    "no frequent value": ["--config.data.fields.item.min_count=1000"],
  }
  cfg = config.override(written(tmp_path, case), changes.get(what, []))
  if what == "top":
    items = dataclasses.replace(cfg.tasks["items"], top=100)  # type: ignore[call-arg]
    cfg = dataclasses.replace(cfg, tasks={**cfg.tasks, "items": items})
  if what == "no event":
    cfg = config.override(cfg, ["--config.data.on_bad_rows=drop"])
    for file in tmp_path.glob("*-?.csv"):
      for row in range(1, len(file.read_text().splitlines())):
        break_rows(tmp_path, file.name, row)
  if what == "no file":
    (tmp_path / "buys-1.csv").unlink()
  assert message(locally, cfg) == message(on_beam, cfg)


def test_processes_of_beam_give_the_same_error_and_the_same_dataset(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  cfg = written(tmp_path, random_case(7, 40, 12, ("csv", "csv", "parquet")))
  good = (tmp_path / "views-2.csv").read_text()
  break_rows(tmp_path, "views-2.csv", 3)
  file = config_file(tmp_path, cfg)
  cfg = config.load(file, [])  # where sources are in order of their names
  command = ["prepare", "--config", file, "--runner", "DirectRunner"]
  command += ["--beam", "direct_num_workers=2", "--beam", "direct_running_mode=multi_processing"]
  assert cli.main(command) == 1
  assert capsys.readouterr().err.splitlines()[-1] == f"supermoe prepare: {message(locally, cfg).partition(': ')[2]}"
  (tmp_path / "views-2.csv").write_text(good)
  assert cli.main(command) == 0
  ours, theirs = locally(moved(cfg, "here")), Dataset(cfg.data.path).manifest
  for key in ours.keys() - set(DIFFER):
    assert ours[key] == theirs[key], key


def test_without_beam_the_error_says_how_to_install_it(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  monkeypatch.delitem(sys.modules, "supermoe_jax.data.beam.pipeline")
  monkeypatch.delattr("supermoe_jax.data.beam.pipeline")
  file = config_file(tmp_path, written(tmp_path, random_case(8, 9, 4)))
  assert cli.main(["prepare", "--config", file, "--runner", "DirectRunner"]) == 1
  assert "pip install 'supermoe_jax[beam]'" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("runner", "options", "said"),
  [
    ("Nobody", [], "--runner=Nobody"),
    ("DirectRunner", ["direct_num_workers"], "KEY=VALUE"),
    ("DirectRunner", ["runner=FlinkRunner"], "--runner NAME"),
    ("DirectRunner", ["direct_num_workers=two"], "does not understand"),
  ],
)
def test_a_runner_or_an_option_that_is_none_is_an_error(runner: str, options: list[str], said: str) -> None:
  with pytest.raises(ConfigError, match=said):
    pipeline.Beam(runner, options)


def test_machines_that_cannot_reach_the_folder_are_noticed(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  cfg = written(tmp_path, random_case(9, 30, 8))
  monkeypatch.setattr(event_parts, "settle_part", lambda *unused: None)
  with pytest.raises(DataError, match="all machines must reach this directory"):
    on_beam(cfg)


# ------------------------------------------------------------------------------------------------------------ going on


def fail_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
  write, left = write_shard, [count]

  def failing(*arguments: Any) -> shard_files.Shard:
    left[0] -= 1
    if left[0] < 0:
      raise OSError("the disk is on fire")
    return write(*arguments)

  monkeypatch.setattr(write_shards, "write_shard", failing)


def failed(cfg: config.Config, prepare: Callable[[config.Config], Any], after: int) -> None:
  """Lets a preparation fail after so many shards."""
  with pytest.MonkeyPatch.context() as patch:
    fail_after(after, patch)
    with pytest.raises(DataError, match=r"the disk is on fire .*the same command resumes"):
      prepare(cfg)


def files_of(folder: pathlib.Path) -> dict[str, int]:
  return {f.name: f.stat().st_ino for f in folder.rglob("*.array_record-*") if not f.name.endswith((".note", ".part"))}


def test_after_a_failure_neither_reading_nor_finished_shards_are_done_again(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  cfg = written(tmp_path, random_case(10, 60, 20))
  failed(cfg, on_beam, after=2)
  before = files_of(pathlib.Path(f"{cfg.data.path}.incomplete"))
  assert len(before) == 2
  with monkeypatch.context() as patch:
    patch.setattr(event_parts, "settle_part", lambda *unused: pytest.fail("the files were read again"))
    with messages() as said:
      on_beam(cfg)
  after = files_of(pathlib.Path(cfg.data.path))
  assert before.items() <= after.items() and len(after) >= 4
  assert any("2 of" in text for text in said)
  assert_same(moved(cfg, "here"))


def test_what_is_done_twice_is_done_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  settle, move = event_parts.settle_part, shard_files.move_shard

  def twice(data: config.Data, folder: event_parts.PartFolder, part: int, packed: Iterable[bytes]) -> None:
    rows = list(packed)
    settle(data, folder, part, rows)
    settle(data, folder, part, rows[::-1])

  def again(file: pathlib.Path, directory: pathlib.Path) -> None:
    move(file, directory)
    for name in (file.name, f"{file.name}.note"):
      shutil.copy(directory / name, file.with_name(name))
    move(file, directory)

  monkeypatch.setattr(event_parts, "settle_part", twice)
  monkeypatch.setattr(shard_files, "move_shard", again)
  assert_same(written(tmp_path, random_case(12, 40, 12)))


def test_an_error_that_passes_when_the_runner_tries_again_is_none(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  cfg = written(tmp_path, random_case(13, 30, 8))
  write, failed = write_shard, []

  def failing(maker: RecordMaker, file: pathlib.Path, rows: ShardRows) -> shard_files.Shard:
    if not failed:
      failed.append(file.name)
      raise OSError("a moment, please")
    return write(maker, file, rows)

  with monkeypatch.context() as patch:
    patch.setattr(write_shards, "write_shard", failing)
    there = on_beam(moved(cfg, "there"), runner="BundleBasedDirectRunner")
  here = locally(cfg)
  assert len(failed) == 1
  assert {k: here[k] for k in here.keys() - set(DIFFER)} == {k: there[k] for k in here.keys() - set(DIFFER)}


def test_beam_does_not_go_on_with_what_this_machine_began(tmp_path: pathlib.Path) -> None:
  cfg = written(tmp_path, random_case(11, 30, 8))
  failed(cfg, locally, after=0)
  with messages() as said:
    on_beam(cfg)
  assert "left by another preparation" in said[0]


def test_stray_rows_are_found_in_the_parts(tmp_path: pathlib.Path) -> None:
  case = random_case(3, 150, 12)
  far = [dataclasses.replace(case.views[0], time=year * 31_556_952_000_000) for year in (0, 100)]
  one, _ = assert_same(written(tmp_path, dataclasses.replace(case, views=(*case.views, *far)), duplicates="drop"))
  assert [row["time"] for row in one.manifest["stray_times"]["rows"]] == [far[0].time, far[1].time]


def test_vectors_are_refused_by_name(tmp_path: pathlib.Path) -> None:
  data = config.Data(fields={"look": config.Field(kind="vector", size=3)})
  with pytest.raises(ConfigError, match=r"fields\.look\.kind='vector': Beam prepares no vectors"):
    pipeline.Beam("DirectRunner").open(config.Config(data=data), tmp_path)
