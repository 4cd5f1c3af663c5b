"""The wrapper of a host: what it starts again, what it does not, and how it ends."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.fixtures.pod_scripts import ROOT

RUN_HOST = str(ROOT / "tpu_setup" / "run_host.sh")


def run_host(*arguments: str, command: str) -> tuple[int, str]:
  """Runs a piece of bash under the wrapper, without waits; returns the code and what was said."""
  line = [RUN_HOST, "--wait", "0", *arguments, "--", "bash", "-c", command]
  out = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60)
  return out.returncode, out.stdout


def starts(said: str) -> int:
  return len(re.findall(r"^run_host: .*: start \d+: ", said, flags=re.MULTILINE))


def until(what: Callable[[], bool], seconds: float = 30) -> None:
  end = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < end
    time.sleep(0.02)


def first_then(file: pathlib.Path, first: str) -> str:
  """A command that does one thing the first time, and ends well the second."""
  return f"[ -e {file} ] && exit 0; touch {file}; {first}"


def test_code_0_ends_it() -> None:
  code, said = run_host(command="echo done; exit 0")
  assert (code, starts(said)) == (0, 1)
  assert "done\n" in said
  assert re.search(rf"run_host: \d{{4}}-\d\d-\d\dT\S+ {socket.gethostname()}: end 1: code 0", said)


@pytest.mark.parametrize("first", ["exit 75", "kill -KILL $$", "kill -ABRT $$", "kill -SEGV $$"])
def test_code_75_and_a_signal_start_it_again(first: str, tmp_path: pathlib.Path) -> None:
  code, said = run_host(command=first_then(tmp_path / "was here", first).replace("was here", "was\\ here"))
  assert (code, starts(said)) == (0, 2)
  assert "starts again in 0 s" in said


@pytest.mark.parametrize("code", [1, 2, 70, 127, 130, 143])
def test_any_other_code_ends_it_at_once(code: int) -> None:
  ended, said = run_host(command=f"exit {code}")
  assert (ended, starts(said)) == (code, 1)


def test_a_command_that_is_not_there_is_no_reason_to_try_again() -> None:
  out = subprocess.run([RUN_HOST, "--", "no-such-command"], capture_output=True, text=True, check=False)
  assert out.returncode == 127
  assert "no-such-command: command not found" in out.stderr


def test_restarts_without_progress_are_counted_and_end_it() -> None:
  code, said = run_host("--restarts", "2", command="exit 75")
  assert (code, starts(said)) == (75, 3)
  assert "no newer checkpoint after 2 restarts in a row: giving up" in said
  assert starts(run_host("--restarts", "0", command="exit 75")[1]) == 1


@pytest.mark.parametrize("name", ["--workdir {}", "--workdir={}"])
def test_a_newer_checkpoint_is_progress(name: str, tmp_path: pathlib.Path) -> None:
  command = (
    'n=$(ls "$0" | wc -l); mkdir "$0/$((n * 10))" "$0/9999.orbax-checkpoint-tmp" 2>/dev/null; [ $n -ge 6 ] && exit 1; '
    "exit 75"
  )
  steps = tmp_path / "checkpoints"
  steps.mkdir()
  line = [RUN_HOST, "--wait", "0", "--restarts", "1", "--", "bash", "-c", command, str(steps)]
  line += name.format(tmp_path).split()
  out = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
  assert out.returncode == 1 and starts(out.stderr) > 4
  assert "restart 2" not in out.stderr


def test_the_wait_grows_and_is_bounded(tmp_path: pathlib.Path) -> None:
  (tmp_path / "sleep").write_text("#!/bin/sh\nexit 0\n")
  (tmp_path / "sleep").chmod(0o755)
  environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
  line = [RUN_HOST, "--restarts", "5", "--", "bash", "-c", "exit 75"]
  out = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
  assert re.findall(r"starts again in (\d+) s", out.stderr) == ["30", "60", "120", "120", "120"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_waited_for_and_not_answered_by_a_restart(
  number: signal.Signals, tmp_path: pathlib.Path
) -> None:
  ready, saved = tmp_path / "ready", tmp_path / "saved"
  command = f"trap 'sleep 0.2; touch {saved}; exit 75' {number.name[3:]}; touch {ready}; while :; do sleep 0.05; done"
  # A shell cannot trap what it was told to ignore, as SIGINT is where these tests run in the background.
  line = ["env", "--default-signal=INT", RUN_HOST, "--wait", "0", "--", "bash", "-c", command]
  process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
  until(ready.exists)
  process.send_signal(number)
  said = process.communicate(timeout=30)[1]
  assert process.returncode == 75 and saved.exists()
  assert starts(said) == 1 and f"{number.name}: no restart" in said


def test_a_signal_kills_what_does_not_listen_and_the_code_says_so(tmp_path: pathlib.Path) -> None:
  log = tmp_path / "log"
  process = subprocess.Popen([RUN_HOST, "--log", str(log), "--", "sleep", "60"])
  until(lambda: log.exists() and "start 1" in log.read_text())
  time.sleep(0.2)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 143
  assert "SIGTERM: no restart" in log.read_text()


def test_a_signal_during_the_wait_ends_it_with_the_last_code(tmp_path: pathlib.Path) -> None:
  log = tmp_path / "log"
  process = subprocess.Popen([RUN_HOST, "--log", str(log), "--", "bash", "-c", "exit 75"])
  until(lambda: log.exists() and "starts again in 30 s" in log.read_text())
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=10) == 75
  assert starts(log.read_text()) == 1


def test_it_waits_without_using_the_processor() -> None:
  process = subprocess.Popen([RUN_HOST, "--", "sleep", "60"], stderr=subprocess.PIPE)
  assert process.stderr and process.stderr.readline()
  time.sleep(0.2)

  def ticks() -> int:
    user, system = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)

  before = ticks()
  time.sleep(0.6)
  assert ticks() == before
  process.terminate()
  assert process.wait(timeout=10) == 143


def test_the_log_holds_both_and_is_appended_to(tmp_path: pathlib.Path) -> None:
  log = tmp_path / "logs" / "host.log"
  for _ in range(2):
    code, said = run_host("--log", str(log), command="echo out; echo err >&2")
    assert (code, said) == (0, "")
  assert log.read_text().count("out\nerr\n") == 2 and starts(log.read_text()) == 2


def test_there_is_one_for_a_pid_file(tmp_path: pathlib.Path) -> None:
  pid = tmp_path / "hosts" / "pid"
  process = subprocess.Popen([RUN_HOST, "--pid", str(pid), "--", "sleep", "60"], stderr=subprocess.DEVNULL)
  until(lambda: pid.exists() and pid.read_text().strip() == str(process.pid))
  code, said = run_host("--pid", str(pid), command="exit 0")
  assert code == 1 and f"process {process.pid} does this already" in said
  process.terminate()
  process.wait(timeout=10)
  assert not pid.exists()
  pid.write_text(f"{os.getpid()}\n")  # left behind; the number has gone to another process
  assert run_host("--pid", str(pid), command="exit 0")[0] == 0


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    ((), "there is no command"),
    (("--restarts", "many", "--", "true"), "--restarts many"),
    (("--wait", "-1", "--", "true"), "--wait -1"),
    (("--wait",), "--wait needs a value"),
    (("--retries", "3", "--", "true"), "unknown option --retries"),
    (("true",), "unexpected true"),
    (("--log", "/proc/no/log", "--", "true"), "--log /proc/no/log cannot be written"),
  ],
)
def test_wrong_usage_is_told_with_code_2(arguments: tuple[str, ...], told: str) -> None:
  out = subprocess.run([RUN_HOST, *arguments], capture_output=True, text=True, check=False, timeout=30)
  assert out.returncode == 2 and told in out.stderr


def test_of_two_hosts_of_which_one_is_killed_both_start_again_and_end(tmp_path: pathlib.Path) -> None:
  """Commands in place of training: the first one notices that the second is gone, and ends with 75."""
  first = (
    "[ -e noticed ] && exit 0; until [ -e second ]; do sleep 0.05; done; touch first; "
    "while kill -0 $(cat second); do sleep 0.05; done; touch noticed; exit 75"
  )
  second = (
    "until [ ! -e second ] || [ -e noticed ]; do sleep 0.05; done; [ -e noticed ] && exit 0; "
    "echo $$ >second.part; mv second.part second; exec sleep 60"
  )
  logs = [tmp_path / f"{i}.log" for i in range(2)]
  hosts = [
    subprocess.Popen([RUN_HOST, "--wait", "0", "--log", str(log), "--", "bash", "-c", command], cwd=tmp_path)
    for log, command in zip(logs, (first, second))
  ]
  until((tmp_path / "first").exists)
  os.kill(int((tmp_path / "second").read_text()), signal.SIGKILL)
  assert [host.wait(timeout=30) for host in hosts] == [0, 0]
  said = [log.read_text() for log in logs]
  assert [starts(each) for each in said] == [2, 2]
  assert "end 1: code 75" in said[0] and "end 1: code 137" in said[1]
