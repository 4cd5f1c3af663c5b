"""The wrapper of a host brings a run of two hosts through the death of a process."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset import Dataset
from tests.fixtures.pod_checks import config_file, free_port, with_devices
from tests.fixtures.pod_scripts import ROOT

RUN_HOST = str(ROOT / "tpu_setup" / "run_host.sh")


def starts(said: str) -> int:
  return len(re.findall(r"^run_host: .*: start \d+: ", said, flags=re.MULTILINE))


class Host:
  """The wrapper of one of two hosts that train a run, with two devices."""

  def __init__(self, folder: pathlib.Path, cfg: config.Config, port: int, index: int):
    self._log = folder / f"host_{index}.log"
    environment = {
      **os.environ,
      "PYTHONUNBUFFERED": "1",
      "XLA_FLAGS": with_devices(os.environ["XLA_FLAGS"], 2),
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    line = [RUN_HOST, "--wait", "22", "--log", str(self._log), "--", sys.executable, "-m", "supermoe_jax", "train"]
    line += ["--config", str(folder / "wanted.py"), "--workdir", str(folder / "run")]
    line += ["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(index)]
    self.process = subprocess.Popen(line, env=environment)

  @property
  def said(self) -> str:
    return self._log.read_text()

  def kill_training(self) -> None:
    child = subprocess.run(
      ["pgrep", "-P", str(self.process.pid), "-f", "supermoe_jax train"], capture_output=True, text=True, check=True
    )
    os.kill(int(child.stdout), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_of_two_hosts_goes_on_when_a_process_is_killed(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  lengths = {"steps": 90, "checkpoint_every": 30, "log_every": 10}
  mesh = ["--config.train.mesh.data=2", "--config.train.mesh.expert=2"]
  fewer = ["--config.exclude_tasks=('pages', 'paid', 'quiet')"]  # there is less to compile
  wanted = config.override(cfg, [*mesh, *fewer, *(f"--config.train.{k}={v}" for k, v in lengths.items())])
  config_file(wanted, tmp_path)
  port = free_port()
  hosts = [Host(tmp_path, wanted, port, i) for i in range(2)]
  try:
    while not (tmp_path / "run" / "checkpoints" / "30").is_dir():
      assert all(h.process.poll() is None for h in hosts), "\n".join(h.said for h in hosts)
      time.sleep(0.02)
    hosts[1].kill_training()
    codes = [h.process.wait(timeout=420) for h in hosts]
  finally:
    for h in hosts:
      h.process.terminate()
  told = "\n".join(h.said for h in hosts)
  assert codes == [0, 0], told
  assert "end 1: code 137" in hosts[1].said and "end 1: code 75" in hosts[0].said, told
  assert "process 1 (" in hosts[0].said and "no sign of life" in hosts[0].said
  assert [starts(h.said) for h in hosts] == [2, 2], told
  assert re.search(r"resuming \S+ at step (30|60) of 90", hosts[0].said), told
  assert f"trained to step 90: {tmp_path / 'run'}" in hosts[0].said
  rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert [int(re.search(r'"step": ?(\d+)', row)[1]) for row in rows] == list(range(10, 100, 10))
