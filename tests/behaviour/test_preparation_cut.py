"""A preparation that is cut goes on where it stopped, and ends as if nothing had happened.

In the quick tier it is cut by an exception, which leaves what a kill leaves: the shards that were finished. The kills
themselves are nightly.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.append import append
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.format import shard_files
from supermoe_jax.data.preparation import event_log, prepare, write_shards
from supermoe_jax.data.preparation.write_shards import write_shard
from supermoe_jax.errors import DataError
from tests.fixtures.dataset_copies import contents, copied, facts, moved
from tests.fixtures.messages import messages
from tests.fixtures.new_visits import write_visits
from tests.fixtures.shared import made_once
from tests.fixtures.small_log import raw_config, write_log

SHARD_EVENTS = 100

# Prepares, and dies by a signal as soon as `left` shards have been written.
DYING = """
import json, os, signal, sys
from supermoe_jax import config
from supermoe_jax.data.format import shard_files
from supermoe_jax.data.preparation import prepare, write_shards

raw, left = json.loads(sys.argv[1]), int(sys.argv[2])
shard_files.SHARD_EVENTS = {events}
write_shards.count_writers = lambda count: 1
write = write_shards.write_shard

def dying(*arguments):
  global left
  if not left:
    os.kill(os.getpid(), signal.SIGKILL)
  left -= 1
  return write(*arguments)

write_shards.write_shard = dying
prepare.prepare(config.resolve(raw))
"""

# Starts processes that write shards, and dies by a signal.
ORPHANING = """
import os, signal
from supermoe_jax.data.preparation import write_shards

if __name__ == "__main__":
  write_shards.count_writers = lambda count: count
  with write_shards.ShardWriters(2) as writers:
    assert list(writers.run(abs, [-1, -2, -3])) != []
    print("begun", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The files of a small log, and their dataset of several shards; do not change them."""

  def make(folder: pathlib.Path) -> None:
    write_log(folder, users=12)
    with pytest.MonkeyPatch.context() as patch:
      few_processes(patch)
      prepare.prepare(config.resolve(raw_config(folder)))

  return made_once(tmp_path_factory, "several_shards", make)


def few_processes(patch: pytest.MonkeyPatch) -> None:
  patch.setattr(shard_files, "SHARD_EVENTS", SHARD_EVENTS)
  patch.setattr(write_shards, "count_writers", lambda count: 1)


@pytest.fixture
def cfg(whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> config.Config:
  """The config of a dataset that is not prepared; the one of the name `whole` is."""
  few_processes(monkeypatch)
  copied(whole, tmp_path)
  cfg = config.resolve(raw_config(tmp_path))
  pathlib.Path(cfg.data.path).rename(tmp_path / "whole")
  assert len(Dataset(tmp_path / "whole").manifest["shards"]) >= 4
  return cfg


Cut = Callable[[config.Config, int], pathlib.Path]


@pytest.fixture(params=["exception", pytest.param("kill", marks=pytest.mark.nightly)])
def cut(request: pytest.FixtureRequest) -> Cut:
  """A function of a config and a number of shards: ends a preparation after them and returns the folder it leaves."""

  def by_exception(cfg: config.Config, after: int) -> pathlib.Path:
    write, left = write_shard, [after]

    def ending(*arguments: Any) -> shard_files.Shard:
      left[0] -= 1
      if left[0] < 0:
        raise KeyboardInterrupt
      return write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(write_shards, "write_shard", ending)
      with pytest.raises(KeyboardInterrupt):
        prepare.prepare(cfg)
    return pathlib.Path(cfg.data.path + ".incomplete")

  def by_kill(cfg: config.Config, after: int) -> pathlib.Path:
    command = [sys.executable, "-c", DYING.format(events=SHARD_EVENTS), json.dumps(config.to_dict(cfg)), str(after)]
    died = subprocess.run(command, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    return pathlib.Path(cfg.data.path + ".incomplete")

  return by_kill if request.param == "kill" else by_exception


def assert_as_if_nothing_had_happened(cfg: config.Config) -> None:
  whole = moved(cfg, "whole").data.path
  assert contents(cfg.data.path) == contents(whole)
  assert facts(cfg.data.path) == facts(whole)


def test_neither_reading_nor_finished_shards_are_done_again(
  cfg: config.Config, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
  left = cut(cfg, 2)
  finished = {f.name: f.stat().st_ino for f in left.rglob("*.array_record-*") if not f.name.endswith(("note", "part"))}
  assert len(finished) == 2 and not pathlib.Path(cfg.data.path).exists()
  monkeypatch.setattr(event_log.EventLog, "_read", lambda self: pytest.fail("the files were read again"))
  monkeypatch.setattr(prepare.fitting, "fit_encoders", lambda *unused: pytest.fail("the encoders were fitted again"))
  with messages() as said:
    prepare.prepare(cfg)
  assert "resuming in" in said[0] and any("2 of" in s for s in said)
  assert_as_if_nothing_had_happened(cfg)
  now = {f.name: f.stat().st_ino for f in pathlib.Path(cfg.data.path).rglob("*.array_record-*")}
  assert finished.items() <= now.items() and not left.exists()


@pytest.mark.nightly
def test_processes_that_write_end_with_the_one_that_started_them(tmp_path: pathlib.Path) -> None:
  script = tmp_path / "script.py"
  script.write_text(ORPHANING)
  # Its output ends when the last process that has inherited it does.
  died = subprocess.run([sys.executable, str(script)], capture_output=True, timeout=60)
  assert died.returncode == -signal.SIGKILL and died.stdout == b"begun\n", died.stderr.decode()


@pytest.mark.parametrize("gone", ["log.duckdb", "log.json"])
def test_a_preparation_that_was_cut_while_it_tidied_up_ends_all_the_same(
  cfg: config.Config, cut: Cut, gone: str
) -> None:
  left = cut(cfg, 2)
  (left / "scratch" / gone).unlink()
  prepare.prepare(cfg)
  assert_as_if_nothing_had_happened(cfg)


@pytest.mark.parametrize("what", ["files", "config"])
def test_a_preparation_of_something_else_begins_anew(cfg: config.Config, cut: Cut, what: str) -> None:
  cut(cfg, 2)
  if what == "files":
    file = pathlib.Path(cfg.data.sources["buys"].files[0])
    pq.write_table(pq.read_table(file).slice(5), file)
  else:
    cfg = config.override(cfg, ["--config.tasks.quiet.horizon_days=7"])
  with messages() as said:
    prepare.prepare(cfg)
  assert "left by another preparation" in said[0]
  prepare.prepare(moved(cfg, "whole"), overwrite=True)
  assert_as_if_nothing_had_happened(cfg)


def test_a_shard_that_was_cut_is_written_again(cfg: config.Config, cut: Cut) -> None:
  """A file without its note, or half of one under another name, counts for nothing."""
  left = cut(cfg, 3)
  for note in sorted(left.rglob("*.note"))[:2]:
    shard = note.with_name(note.name.removesuffix(".note"))
    shard.write_bytes(shard.read_bytes()[:100])
    note.unlink()
  prepare.prepare(cfg)
  assert_as_if_nothing_had_happened(cfg)


def test_a_dataset_that_a_kill_left_beside_its_place_is_put_back(cfg: config.Config, tmp_path: pathlib.Path) -> None:
  """Between the two renames, or while what stood there before is removed."""
  cfg = moved(cfg, "whole")
  path = pathlib.Path(cfg.data.path)
  before, manifest = path.with_name("whole.before"), Dataset(path).manifest
  path.rename(before)
  assert prepare.prepare(cfg) == manifest and not before.exists()
  path.rename(before)
  append.append(path, {"visits": [write_visits(tmp_path, "day.parquet", 3, ["page0"])]})
  assert Dataset(path).manifest["appends"] and not before.exists()
  before.mkdir()
  (before / "users.parquet").touch()
  shutil.rmtree(path)
  with pytest.raises(DataError, match="holds no prepared dataset"):
    append.append(path, {"visits": [str(tmp_path / "day.parquet")]})
