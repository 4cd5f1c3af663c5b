"""Processes that train are killed: those that are left say so, and the runs go on as if nothing had been."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ExitCode
from supermoe_jax.evaluation.validation import validation_of
from supermoe_jax.training import loop
from tests.fixtures import short_runs
from tests.fixtures.messages import messages
from tests.fixtures.pod_checks import config_file, free_port, with_devices
from tests.fixtures.scripts import ROOT
from tests.fixtures.short_runs import assert_same_end, rows, steps_saved

pytestmark = [pytest.mark.nightly, pytest.mark.slow, pytest.mark.usefixtures("compiled_afresh")]


# ---------------------------------------------------------------------------------------------------------- one process


SLOWLY = """
import pathlib, sys, time
from supermoe_jax import config
from supermoe_jax.training import loop
place = loop.place_on_mesh
def slow(*a, **n):
  time.sleep(0.4)
  return place(*a, **n)
loop.place_on_mesh = slow
loop.train(config.load_json(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))
"""


def test_a_killed_run_resumes_and_ends_bitwise_as_if_it_had_not_been(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  short = short_runs.short(cfg)
  config.save(short, tmp_path / "wanted.json")
  workdir, whole = tmp_path / "run", tmp_path / "whole"
  command = [sys.executable, "-c", SLOWLY, str(tmp_path / "wanted.json"), str(workdir)]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 300
  while not (workdir / "checkpoints" / "3").is_dir():
    assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert 8 not in steps_saved(workdir)
  with messages() as said:
    assert loop.train(short, workdir) == 8
  assert any(f"resuming {workdir} at step" in line for line in said)
  assert loop.train(short, whole) == 8
  assert_same_end(workdir, whole)


# ------------------------------------------------------------------------------------------------------------ two hosts


class Host:
  """The wrapper `tpu_setup/run_host.sh` of one of two hosts that train a run, with two devices each."""

  def __init__(self, folder: pathlib.Path, port: int, index: int):
    self._log = folder / f"host_{index}.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "XLA_FLAGS": with_devices(os.environ["XLA_FLAGS"], 2)}
    line = [str(ROOT / "tpu_setup" / "run_host.sh"), "--wait", "22", "--log", str(self._log)]
    line += ["--", sys.executable, "-m", "supermoe_jax", "train"]
    line += ["--config", str(folder / "wanted.py"), "--workdir", str(folder / "run")]
    line += ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(index)]
    self.process = subprocess.Popen(line, env=environment)

  def said(self, start: int = 0) -> str:
    """Returns what it said, or what it said in one start."""
    parts = re.split(r"^(?=run_host: .*: start \d+: )", self._log.read_text(), flags=re.MULTILINE)
    return "".join(parts) if not start else parts[start] if start < len(parts) else ""

  def signal_training(self, number: signal.Signals) -> None:
    command = ["pgrep", "-P", str(self.process.pid), "-f", "supermoe_jax train"]
    os.kill(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout), number)


def trained(cfg: config.Config, folder: pathlib.Path, disturb: Callable[[list[Host]], None]) -> list[Host]:
  """Trains a run in `folder / "run"` on two hosts, which end well whatever disturbs them."""
  config_file(cfg, folder)
  port = free_port()
  hosts = [Host(folder, port, i) for i in range(2)]
  try:
    disturb(hosts)
    codes = [h.process.wait(timeout=480) for h in hosts]
  finally:
    for h in hosts:
      h.process.terminate()
  assert codes == [0, 0], "\n".join(h.said() for h in hosts)
  return hosts


def until(happens: Callable[[], bool], hosts: list[Host]) -> None:
  while not happens():
    assert all(h.process.poll() is None for h in hosts), "\n".join(h.said() for h in hosts)
    time.sleep(0.02)


@pytest.fixture(scope="module")
def four(cfg: config.Config, dataset: Dataset) -> config.Config:
  """A run on four devices, long enough to be disturbed."""
  mesh = ["--config.train.mesh.data=2", "--config.train.mesh.expert=2"]
  lengths = {"steps": 90, "checkpoint_every": 30, "log_every": 10}
  lengths |= {"validate.every": 60, "validate.snapshots": 40}
  return config.override(short_runs.short(cfg), [*mesh, *(f"--config.train.{k}={v}" for k, v in lengths.items())])


@pytest.fixture(scope="module")
def whole(four: config.Config, compiled_afresh: None, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Such a run of two hosts, which nothing disturbed."""
  folder = tmp_path_factory.mktemp("whole")
  first, second = trained(four, folder, lambda hosts: None)
  assert f"trained to step 90: {folder / 'run'}" in first.said()
  assert "step 90/90" in first.said() and "step 90/90" not in second.said()  # one tells, for all
  return folder / "run"


def test_hosts_come_back_when_a_process_is_killed_or_asked_to_stop_and_end_as_if_neither_had_been(
  four: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  run = tmp_path / "run"

  def disturb(hosts: list[Host]) -> None:
    until((run / "checkpoints" / "30").is_dir, hosts)
    hosts[1].signal_training(signal.SIGKILL)
    until(lambda: re.search(r"step [4-9]0/90", hosts[0].said(2)) is not None, hosts)
    hosts[1].signal_training(signal.SIGTERM)  # to one of them: it saves the run of all

  hosts = trained(four, tmp_path, disturb)
  told = "\n".join(h.said() for h in hosts)
  assert ["end 1: code 75" in hosts[0].said(1), "end 1: code 137" in hosts[1].said(1)] == [True] * 2, told
  assert "supermoe train: process 1 (" in hosts[0].said(1) and "no sign of life" in hosts[0].said(1), told
  assert re.search(rf"resuming {run} at step [36]0 of 90", hosts[0].said(2)), told
  for host in hosts:
    assert f"end 2: code {ExitCode.RESUME}" in host.said(2) and not host.said(4), told
  (step,) = {re.search(r"is saved at step (\d+) of 90", h.said(2))[1] for h in hosts}
  assert f"resuming {run} at step {step} of 90" in hosts[0].said(3), told
  assert f"trained to step 90: {run}" in hosts[0].said(3), told
  assert_same_end(run, whole)


def test_a_run_goes_on_with_half_the_processes(
  four: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  alone = pathlib.Path(shutil.copytree(whole, tmp_path / "alone"))
  shutil.rmtree(alone / "checkpoints" / "90")
  with messages() as said:
    assert loop.train(four, alone, validation=validation_of(four)) == 90
  assert any(f"resuming {alone} at step 60 of 90" in line for line in said)
  for mine, wanted in zip(rows(alone), rows(whole), strict=True):
    assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert mine["events"] == wanted["events"]
  validated, wanted = (rows(run, "validation.jsonl") for run in (alone, whole))
  assert [r["step"] for r in validated] == [r["step"] for r in wanted] == [60, 90]
  for name, found in wanted[1]["tasks"].items():
    known = {metric: value for metric, value in found.items() if value is not None}
    assert {m: validated[1]["tasks"][name][m] for m in known} == pytest.approx(known, rel=1e-4)
