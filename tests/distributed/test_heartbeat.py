"""Processes meet in a run directory, keep others out of it, and end where they hang."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from supermoe_jax import atomic_files
from supermoe_jax.distributed import heartbeat, processes, supervisor
from supermoe_jax.distributed.heartbeat import Heartbeat
from supermoe_jax.distributed.processes import Place
from supermoe_jax.errors import DELIBERATE_EXITS, ConfigError, ExitCode, RunError, Stopped

FACTS = {"config": {"train": {"steps": 5}}, "dataset": "d", "version": {"jax": "1"}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(heartbeat, "BEAT", 0.05)
  monkeypatch.setattr(heartbeat, "DEAD", 0.5)


def enter(folder: pathlib.Path, i: int, of: int = 2, facts: Any = None, wait: float = 10.0) -> Heartbeat:
  return Heartbeat(folder, Place("localhost:1", of, i), facts or FACTS, wait=wait)


def together(*entering: Heartbeat) -> list[BaseException | None]:
  """Lets processes enter at the same time, and leave; returns what each raised."""
  out: list[BaseException | None] = [None] * len(entering)
  barrier = threading.Barrier(len(entering))

  def go(i: int) -> None:
    try:
      with entering[i]:
        barrier.wait(5)
    except BaseException as error:
      out[i] = error

  threads = [threading.Thread(target=go, args=(i,)) for i in range(len(entering))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return out


def left_behind(folder: pathlib.Path, i: int, host: str, pid: int, machine: str = "another") -> pathlib.Path:
  """What a process that was killed leaves."""
  sign = {"process": i, "of": 2, "host": host, "pid": pid, "machine": machine, "token": "t", "beat": 7, "step": 3}
  file = folder / "hosts" / f"{i}.json"
  file.parent.mkdir(exist_ok=True)
  file.write_text(json.dumps({**sign, "facts": FACTS}))
  return file


def dead_pid() -> int:
  process = subprocess.Popen([sys.executable, "-c", ""])
  process.wait()
  return process.pid


def test_processes_meet_and_leave_nothing(tmp_path: pathlib.Path) -> None:
  left_behind(tmp_path, 1, "elsewhere", 1)
  assert together(*(enter(tmp_path, i, 3) for i in range(3))) == [None] * 3
  assert not list((tmp_path / "hosts").iterdir())


def test_a_missing_process_is_named_with_the_machine_it_was_last_seen_on(tmp_path: pathlib.Path) -> None:
  left_behind(tmp_path, 1, "machine-b", 1)
  with pytest.raises(RunError, match=r"of 3 processes process 1 \(last seen on machine-b\), process 2 did not start"):
    enter(tmp_path, 0, 3, wait=0.3).__enter__()
  assert not (tmp_path / "hosts" / "0.json").exists()


@pytest.mark.parametrize(
  ("facts", "message"),
  [
    (
      {"config": {"train": {"steps": 6}}},
      r"runs with another config than this process \(config\.train\.steps: 6 → 5\)",
    ),
    ({"dataset": "e"}, "another dataset"),
    ({"version": {"jax": "2"}}, r"another version.*version\.jax: '2' → '1'"),
  ],
)
def test_processes_that_differ_say_in_what(tmp_path: pathlib.Path, facts: dict[str, Any], message: str) -> None:
  mine, theirs = together(enter(tmp_path, 0), enter(tmp_path, 1, facts={**FACTS, **facts}))
  assert isinstance(mine, RunError) and isinstance(theirs, RunError)
  with pytest.raises(RunError, match=rf"process 1 \({socket.gethostname()}, pid {os.getpid()}\) .*{message}"):
    raise mine


def test_another_number_of_processes_is_an_error(tmp_path: pathlib.Path) -> None:
  mine, _ = together(enter(tmp_path, 0), enter(tmp_path, 1, of=3, wait=0.5))
  with pytest.raises(RunError, match="is one of 3 processes, this process one of 2"):
    raise mine or AssertionError


def test_a_run_directory_in_use_is_an_error(tmp_path: pathlib.Path) -> None:
  with Heartbeat(tmp_path, None, FACTS):
    before = json.loads((tmp_path / "hosts" / "0.json").read_text())
    with pytest.raises(RunError, match=rf"is in use: process 0 \(.*, pid {os.getpid()}\) trains there"):
      Heartbeat(tmp_path, None, FACTS).__enter__()
    after = json.loads((tmp_path / "hosts" / "0.json").read_text())
    assert after["token"] == before["token"]
  with Heartbeat(tmp_path, None, FACTS):
    pass


def test_of_two_that_came_at_once_the_later_one_stays(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(heartbeat, "BEAT", 1.0)
  with Heartbeat(tmp_path, None, FACTS) as mine:
    file = left_behind(tmp_path, 0, "elsewhere", 1)
    with pytest.raises(RunError, match=r"is in use: process 0 \(elsewhere, pid 1\)"):
      mine._check_own()
    mine._over.set()  # before its next beat would end this process
  assert file.is_file()  # the other's


def test_what_a_dead_process_left_is_no_one_in_use(tmp_path: pathlib.Path) -> None:
  here = heartbeat._machine()
  left_behind(tmp_path, 0, socket.gethostname(), dead_pid(), here)  # known to be dead
  with Heartbeat(tmp_path, None, FACTS):
    pass
  left_behind(tmp_path, 0, socket.gethostname(), os.getppid(), here)  # its number is another's now
  with Heartbeat(tmp_path, None, FACTS):
    pass


def test_a_signal_ends_a_wait_for_others(tmp_path: pathlib.Path) -> None:
  waiting = Heartbeat(tmp_path, Place("localhost:1", 2, 0), FACTS, stop=lambda: "SIGTERM")
  with pytest.raises(Stopped, match=r"SIGTERM before .* began in"):
    waiting.__enter__()


def test_a_process_on_another_machine_keeps_its_place_as_long_as_it_shows_life(tmp_path: pathlib.Path) -> None:
  file = left_behind(tmp_path, 0, "elsewhere", 1)
  with Heartbeat(tmp_path, None, FACTS):  # it shows none
    pass
  over = threading.Event()

  def beat() -> None:
    n = 0
    while not over.wait(0.02):
      n += 1
      sign = {"process": 0, "of": 1, "host": "elsewhere", "pid": 1, "beat": n, "step": 3, "facts": FACTS}
      atomic_files.write_file(file, json.dumps(sign))

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    while not file.is_file():
      time.sleep(0.01)
    with pytest.raises(RunError, match="is in use: process 0 \\(elsewhere, pid 1\\)"):
      Heartbeat(tmp_path, None, FACTS).__enter__()
  finally:
    over.set()
    thread.join()


def test_a_process_that_hangs_writes_where_and_ends_with_the_code_that_says_resume(tmp_path: pathlib.Path) -> None:
  script = f"""
import pathlib, time
from supermoe_jax.distributed import heartbeat
heartbeat.BEAT = 0.05
def stuck_in_a_collective():
  time.sleep(60)
with heartbeat.Heartbeat(pathlib.Path({str(tmp_path)!r}), None, {{}}, hang_seconds=0.3) as r:
  time.sleep(0.6)  # before the first step it may take as long as it does
  r.progress(4)
  stuck_in_a_collective()
"""
  process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
  assert process.returncode == ExitCode.RESUME
  assert "after step 4, longer than config.train.hang_seconds=0.3" in process.stderr
  assert "stuck_in_a_collective" in (tmp_path / "hang_0.txt").read_text()


# ----------------------------------------------------------------------------------------------------------- supervisor


def watched(folder: pathlib.Path, body: str, monkeypatch: pytest.MonkeyPatch, beats: float) -> int:
  """What process 0's supervisor returns over a child that does `body`; process 1 shows life for `beats` seconds."""
  monkeypatch.setattr(heartbeat, "DEAD", 1.0)
  child = f"""
import json, os, pathlib, signal, sys, time
from supermoe_jax import atomic_files
file = pathlib.Path({str(folder)!r}) / "hosts" / "0.json"
file.parent.mkdir(exist_ok=True)
sign = {{"process": 0, "of": 2, "host": "here", "pid": os.getpid(), "beat": 1, "step": 1}}
atomic_files.write_file(file, json.dumps(sign))
{body}
"""
  popen = subprocess.Popen
  monkeypatch.setattr(subprocess, "Popen", lambda command, **named: popen([sys.executable, "-c", child], **named))
  monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
  over, end = threading.Event(), time.monotonic() + beats

  def show() -> None:
    n = 0
    (folder / "hosts").mkdir(exist_ok=True)
    while time.monotonic() < end and not over.wait(0.05):
      n += 1
      sign = {"process": 1, "of": 2, "host": "there", "pid": 9, "beat": n, "step": n}
      atomic_files.write_file(folder / "hosts" / "1.json", json.dumps(sign))

  thread = threading.Thread(target=show)
  thread.start()
  try:
    return supervisor.watch(["train"], Place("localhost:1", 2, 0), folder)
  finally:
    over.set()
    thread.join()


@pytest.mark.parametrize("code", DELIBERATE_EXITS)
def test_a_child_that_ends_by_itself_is_believed(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
  assert watched(tmp_path, f"sys.exit({code})", monkeypatch, 0) == code


def test_of_a_process_that_shows_no_life_a_supervisor_tells_the_name_and_ends_the_child(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  code = watched(tmp_path, "time.sleep(60)", monkeypatch, 1.0)
  assert code == ExitCode.RESUME
  assert "process 1 (there, pid 9), last seen at step" in capsys.readouterr().err


def test_what_others_left_behind_before_is_no_sign_of_theirs(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  left_behind(tmp_path, 1, "there", 8)
  assert watched(tmp_path, "time.sleep(2.5); sys.exit(0)", monkeypatch, 0) == 0


def test_a_child_that_dies_with_another_process_names_it(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  code = watched(tmp_path, "time.sleep(1); os.abort()", monkeypatch, 0.8)
  assert code == ExitCode.RESUME
  assert "process 1 (there, pid 9)" in capsys.readouterr().err


def test_a_child_that_dies_alone_is_told_so(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  body = "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
  assert watched(tmp_path, body, monkeypatch, 60) == ExitCode.CRASHED
  assert "was ended by signal SIGKILL; the system may have been out of memory; all other processes run" in (
    capsys.readouterr().err
  )


# ---------------------------------------------------------------------------------------------------------------- place


def test_a_cluster_that_cannot_tell_the_place_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
  from jax._src import clusters

  def detect(*arguments: Any) -> Any:
    assert isinstance(arguments[-1], int)  # JAX adds it to the time of day
    raise RuntimeError("no rights")

  monkeypatch.setattr(clusters.ClusterEnv, "auto_detect_unset_distributed_params", detect)
  with pytest.raises(ConfigError, match=r"no rights.*--coordinator HOST:PORT"):
    processes.find_place()


def test_a_place_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
  assert processes.find_place("a:1", 2, 1) == Place("a:1", 2, 1)
  assert processes.find_place("a:1", 1, 0) is None
  assert processes.find_place() is None
  monkeypatch.setenv("SLURM_JOB_ID", "1234")
  for name, value in {"STEP_NODELIST": "node[3-4]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}.items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  found = processes.find_place()
  assert found is not None and found.coordinator.startswith("node3:") and found[1:] == (2, 1)


@pytest.mark.parametrize(
  ("told", "message"),
  [
    (("a:1", None, 0), "belong together"),
    (("a:1", 2, 2), "--process=2 must be at least 0 and less than --processes=2"),
    (("a", 2, 0), "--coordinator=a must be HOST:PORT"),
  ],
)
def test_half_a_place_is_an_error(told: tuple[Any, ...], message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    processes.find_place(*told)
