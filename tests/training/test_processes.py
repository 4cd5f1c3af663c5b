"""Two processes train one run: one is killed, the other says so, and both go on as if nothing had been."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from supermoe_jax import config, exits
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.training import loop
from supermoe_jax.training.run import Run


class Pair:
  """The command that a user gives on two machines, with two devices each."""

  def __init__(self, cfg: config.Config, folder: pathlib.Path):
    self._folder = folder
    config.save(cfg, folder / "wanted.json")
    (folder / "wanted.py").write_text(
      "import json, ml_collections\n"
      "def get_config():\n"
      f"  return ml_collections.ConfigDict(json.load(open({str(folder / 'wanted.json')!r})))\n"
    )

  def start(self, workdir: pathlib.Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    environment = {
      **os.environ,
      "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "supermoe_jax", "train", "--config", str(self._folder / "wanted.py")]
    command += ["--workdir", str(workdir), "--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
    return [
      subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
      for i in range(2)
    ]


def finished(processes: list[subprocess.Popen[str]]) -> list[str]:
  outputs = [p.communicate(timeout=240)[0] for p in processes]
  assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
  return outputs


def rows(workdir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
  if not (workdir / name).is_file():
    return []
  found = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
  return [{k: v for k, v in row.items() if k != "speed"} for row in found]


@pytest.fixture(scope="module")
def four(cfg: config.Config, dataset: Dataset) -> config.Config:
  """A run on four devices, long enough to be disturbed."""
  mesh = ["--config.train.mesh.data=2", "--config.train.mesh.expert=2"]
  lengths = {"steps": 90, "checkpoint_every": 30, "log_every": 10}
  lengths |= {"validate.every": 60, "validate.snapshots": 40}
  return config.override(cfg, [*mesh, *(f"--config.train.{k}={v}" for k, v in lengths.items())])


@pytest.fixture(scope="module")
def whole(four: config.Config, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Such a run of two processes, which nothing disturbed."""
  folder = tmp_path_factory.mktemp("whole")
  outputs = finished(Pair(four, folder).start(folder / "run"))
  assert f"trained to step 90: {folder / 'run'}" in outputs[0]
  assert "step 90/90" in outputs[0] and "step 90/90" not in outputs[1]  # one tells, for all
  return folder / "run"


def assert_equal(mine: pathlib.Path, wanted: pathlib.Path) -> None:
  assert rows(mine) == rows(wanted)
  assert rows(mine, "validation.jsonl") == rows(wanted, "validation.jsonl")
  for a, b in zip(jax.tree.leaves(Run(mine).variables), jax.tree.leaves(Run(wanted).variables), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_names_it_and_both_go_on_as_if_it_had_not_been(
  four: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  pair, cut = Pair(four, tmp_path), tmp_path / "cut"
  processes = pair.start(cut)
  while not (cut / "checkpoints" / "30").is_dir():
    assert processes[0].poll() is None, processes[0].communicate()[0]
    time.sleep(0.02)
  processes[1].send_signal(signal.SIGKILL)
  told = processes[0].communicate(timeout=90)[0]
  assert processes[0].returncode == exits.RESUME, told
  assert "supermoe train: process 1 (" in told and "no sign of life" in told
  # A signal to one of them saves the run of all.
  processes = pair.start(cut)
  while not rows(cut) or rows(cut)[-1]["step"] <= 30:
    assert processes[0].poll() is None, processes[0].communicate()[0]
    time.sleep(0.02)
  processes[1].send_signal(signal.SIGTERM)
  outputs = [p.communicate(timeout=90)[0] for p in processes]
  assert [p.returncode for p in processes] == [exits.RESUME] * 2, "\n".join(outputs)
  steps = [int(p.name) for p in (cut / "checkpoints").iterdir()]
  assert all(f"is saved at step {max(steps)} of 90" in output for output in outputs)
  outputs = finished(pair.start(cut))
  assert f"resuming {cut} at step {max(steps)}" in outputs[0]
  assert_equal(cut, whole)


@pytest.mark.slow
def test_a_run_goes_on_with_half_the_processes(
  four: config.Config, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  alone = pathlib.Path(shutil.copytree(whole, tmp_path / "alone"))
  shutil.rmtree(alone / "checkpoints" / "90")
  said: list[str] = []
  assert loop.train(four, alone, say=said.append) == 90
  assert any(f"resuming {alone} at step 60 of 90" in line for line in said)
  for mine, wanted in zip(rows(alone), rows(whole), strict=True):
    assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert mine["events"] == wanted["events"]
  validated, wanted = (rows(run, "validation.jsonl") for run in (alone, whole))
  assert [r["step"] for r in validated] == [r["step"] for r in wanted] == [60, 90]
  for name, found in wanted[1]["tasks"].items():
    known = {metric: value for metric, value in found.items() if value is not None}
    assert {m: validated[1]["tasks"][name][m] for m in known} == pytest.approx(known, rel=1e-4)
