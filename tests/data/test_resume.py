"""A preparation that is cut goes on where it stopped, and ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data import events, prepare, shards
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.events import DataError
from tests.fixtures.small_log import raw_config, write_log

SHARD_EVENTS = 150

# Prepares, and dies by a signal as soon as `left` shards have been written.
DYING = """
import json, os, signal, sys
from supermoe_jax import config
from supermoe_jax.data import prepare, shards

raw, left = json.loads(sys.argv[1]), int(sys.argv[2])
shards.SHARD_EVENTS = {events}
shards.processes = lambda count: 1
write = shards.write

def dying(*arguments):
  global left
  if not left:
    os.kill(os.getpid(), signal.SIGKILL)
  left -= 1
  return write(*arguments)

shards.write = dying
prepare.prepare(config.resolve(raw))
"""

# Starts processes that write shards, and dies by a signal.
ORPHANING = """
import os, signal
from supermoe_jax.data import shards

if __name__ == "__main__":
  shards.processes = lambda count: count
  with shards.Writers(2) as writers:
    assert list(writers.run(abs, [-1, -2, -3])) != []
    print("begun", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def cfg(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> config.Config:
  monkeypatch.setattr(shards, "SHARD_EVENTS", SHARD_EVENTS)
  monkeypatch.setattr(shards, "processes", lambda count: 1)
  write_log(tmp_path, users=24)
  return config.resolve(raw_config(tmp_path))


def moved(cfg: config.Config, name: str) -> config.Config:
  path = pathlib.Path(cfg.data.path).with_name(name)
  return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=str(path)))


def contents(path: str) -> dict[str, bytes]:
  """Every file of a dataset but the manifest, whose differences in time and place do not matter."""
  root = pathlib.Path(path)
  files = [f for f in root.rglob("*") if f.is_file() and f.name != "manifest.json"]
  return {str(f.relative_to(root)): f.read_bytes() for f in files}


def facts(path: str) -> dict[str, object]:
  manifest = json.loads((pathlib.Path(path) / "manifest.json").read_text())
  manifest["config"]["data"].pop("path")
  return {k: v for k, v in manifest.items() if k not in ("seconds", "digest")}


def die(cfg: config.Config, after: int) -> pathlib.Path:
  raw = json.dumps(config.to_dict(cfg))
  died = subprocess.run([sys.executable, "-c", DYING.format(events=SHARD_EVENTS), raw, str(after)], capture_output=True)
  assert died.returncode == -signal.SIGKILL, died.stderr.decode()
  return pathlib.Path(cfg.data.path + ".incomplete")


def test_after_a_sudden_death_neither_reading_nor_finished_shards_are_done_again(
  cfg: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  whole = moved(cfg, "whole")
  prepare.prepare(whole)
  assert len(Dataset(whole.data.path).manifest["shards"]) >= 4
  left = die(cfg, after=2)
  finished = {f.name: f.stat().st_ino for f in left.rglob("*.array_record-*") if not f.name.endswith(("note", "part"))}
  assert len(finished) == 2 and not pathlib.Path(cfg.data.path).exists()
  monkeypatch.setattr(events.EventLog, "_read", lambda self: pytest.fail("the files were read again"))
  monkeypatch.setattr(prepare.fitting, "fit", lambda *unused: pytest.fail("the encoders were fitted again"))
  said: list[str] = []
  prepare.prepare(cfg, say=said.append)
  assert any("going on in" in s for s in said) and any("2 of" in s for s in said)
  assert contents(cfg.data.path) == contents(whole.data.path)
  assert facts(cfg.data.path) == facts(whole.data.path)
  now = {f.name: f.stat().st_ino for f in pathlib.Path(cfg.data.path).rglob("*.array_record-*")}
  assert finished.items() <= now.items() and not left.exists()


def test_processes_that_write_end_with_the_one_that_started_them(tmp_path: pathlib.Path) -> None:
  script = tmp_path / "script.py"
  script.write_text(ORPHANING)
  # Its output ends when the last process that has inherited it does.
  died = subprocess.run([sys.executable, str(script)], capture_output=True, timeout=60)
  assert died.returncode == -signal.SIGKILL and died.stdout == b"begun\n", died.stderr.decode()


def test_an_interrupt_leaves_what_was_done(cfg: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
  def interrupted(*unused: object) -> shards.Shard:
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(shards, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare(cfg)
  said: list[str] = []
  prepare.prepare(cfg, say=said.append)
  assert "going on in" in said[0] and Dataset(cfg.data.path).manifest["users"] == 24


@pytest.mark.parametrize("gone", ["log.duckdb", "log.json"])
def test_a_preparation_that_was_cut_while_it_tidied_up_ends_all_the_same(cfg: config.Config, gone: str) -> None:
  left = die(cfg, after=2)
  (left / "scratch" / gone).unlink()
  prepare.prepare(cfg)
  whole = moved(cfg, "whole")
  prepare.prepare(whole)
  assert contents(cfg.data.path) == contents(whole.data.path)


@pytest.mark.parametrize("what", ["files", "config"])
def test_a_preparation_of_something_else_begins_anew(cfg: config.Config, what: str) -> None:
  die(cfg, after=2)
  if what == "files":
    file = pathlib.Path(cfg.data.sources["buys"].files[0])
    pq.write_table(pq.read_table(file).slice(5), file)
  else:
    cfg = config.override(cfg, ["--config.tasks.quiet.horizon_days=7"])
  said: list[str] = []
  prepare.prepare(cfg, say=said.append)
  assert "left by another preparation" in said[0]
  whole = moved(cfg, "whole")
  prepare.prepare(whole)
  assert contents(cfg.data.path) == contents(whole.data.path)


def test_a_shard_that_was_cut_is_written_again(cfg: config.Config) -> None:
  """A file without its note, or half of one under another name, counts for nothing."""
  left = die(cfg, after=3)
  for note in sorted(left.rglob("*.note"))[:2]:
    shard = note.with_name(note.name.removesuffix(".note"))
    shard.write_bytes(shard.read_bytes()[:100])
    note.unlink()
  prepare.prepare(cfg)
  whole = moved(cfg, "whole")
  prepare.prepare(whole)
  assert contents(cfg.data.path) == contents(whole.data.path)


def test_neither_processes_nor_shards_change_a_record_or_a_statistic(
  cfg: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  one, two, three = (moved(cfg, name) for name in ("one", "two", "three"))
  prepare.prepare(one)
  monkeypatch.setattr(shards, "processes", lambda count: 2)
  prepare.prepare(two)
  assert contents(one.data.path) == contents(two.data.path) and facts(one.data.path) == facts(two.data.path)
  monkeypatch.setattr(shards, "SHARD_EVENTS", 10**6)
  prepare.prepare(three)
  a, b = Dataset(one.data.path), Dataset(three.data.path)
  assert len(a) == len(b) and len(b.manifest["shards"]) == 1
  for i in range(len(a)):
    assert a[i].keys() == b[i].keys()
    for key, value in a[i].items():
      np.testing.assert_array_equal(value, b[i][key])
  differ = ("shards", "contents")
  assert {k: v for k, v in facts(one.data.path).items() if k not in differ} == {
    k: v for k, v in facts(three.data.path).items() if k not in differ
  }


def leave_free(files: int) -> None:
  """Lets this process open so many files more; the limit is one of their numbers, which need not be in a row."""
  gc.collect()  # what was left open before must not be closed in between
  opened = {int(name) for name in os.listdir("/dev/fd")}  # noqa: PTH208
  free = (n for n in itertools.count() if n not in opened)
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, files, None)), most))


def test_a_dataset_of_more_shards_than_files_may_be_open_is_read(
  cfg: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(shards, "SHARD_EVENTS", 5)
  prepare.prepare(cfg)
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    leave_free(12)
    data = Dataset(cfg.data.path)
    assert len(data.manifest["shards"]) == 24 == len([data[i] for i in range(len(data))])
    again = Dataset(cfg.data.path)
    leave_free(6)
    with pytest.raises(DataError, match="24 shards, and this process may not open so many files"):
      [again[i] for i in range(len(again))]
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_records_are_what_tensorflow_datasets_reads(cfg: config.Config) -> None:
  import tensorflow_datasets as tfds

  prepare.prepare(cfg)
  data = Dataset(cfg.data.path)
  source = tfds.builder_from_directory(str(data.path / shards.DIRECTORY)).as_data_source(split="users")
  assert len(source) == len(data)
  for i in range(len(data)):
    theirs, ours = source[i], data[i]
    assert theirs["user"].decode() == ours["user"] and theirs.keys() == ours.keys()
    for key in ours.keys() - {"user"}:
      np.testing.assert_array_equal(theirs[key], ours[key])
  users = pq.read_table(data.path / "users.parquet")
  assert users["user"].to_pylist() == [data[i]["user"] for i in range(len(data))]
  assert users["last_event"].to_pylist() == [int(data[i]["time"][-1]) for i in range(len(data))]
  assert users["record"].to_pylist() == list(range(len(data))) and users.schema.field("record").type == pa.int64()
