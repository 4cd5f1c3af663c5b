"""The check of a pod as processes of this machine; `tests/tpu_setup/test_check_pod.py` has threads in their place."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from tests.fixtures.pod_checks import SETUP, config_file, ended, free_port, line, with_devices

HOST = socket.gethostname()


class Pod:
  """Processes that check a pod together, each with devices of its own."""

  def __init__(self, processes: int, devices: int = 2):
    self._processes, self._port = processes, free_port()
    self._environment = {**os.environ, "XLA_FLAGS": with_devices(os.environ["XLA_FLAGS"], devices)}

  def start(self, process: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    several = ["--coordinator", f"localhost:{self._port}", "--processes", str(self._processes)]
    return subprocess.Popen(
      [sys.executable, str(SETUP / "check_pod.py"), *several, "--process", str(process), *arguments],
      env={**self._environment, **environment},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )


@pytest.mark.slow
def test_two_processes_that_fit_are_right_and_everything_is_measured(tmp_path: pathlib.Path) -> None:
  pod, file = Pod(2), tmp_path / "pod.json"
  arguments = ["--sizes", "0.0625", "0.5", "--json", str(file)]
  outputs = ended([pod.start(i, *arguments) for i in range(2)], 0)
  assert all(line(outputs[0], f"process {i}").startswith(f"process {i}, {HOST}: OK") for i in range(2))
  assert line(outputs[1], "process 1").startswith(f"process 1, {HOST}: OK")
  assert "the pod is right" in outputs[0] and "training: mesh 2×2×1" in outputs[0]
  told = json.loads(file.read_text())
  assert told["right"] and [each["wrong"] for each in told["verdict"]] == [None, None]
  assert all((d["local"], d["all"], d["processes"], d["wrong"]) == (2, 4, 2, []) for d in told["devices"])
  assert told["facts"][0]["versions"]["jax"] == jax.__version__
  measured = {(row["operation"], row["scope"], row["bytes"]): row for row in told["collectives"]}
  assert len(measured) == 2 * 2 * 2  # operations, scopes, sizes
  for (operation, scope, size), row in measured.items():
    n = 4 if scope == "all devices" else 2
    assert row["devices"] == n and size in (1 << 16, 1 << 19) and len(row["seconds"]) == 2
    assert row["algorithm_gbs"] == pytest.approx(size / max(row["seconds"]) / 1e9)
    factor = (2 if operation == "all-reduce" else 1) * (n - 1) / n
    assert row["bus_gbs"] == pytest.approx(row["algorithm_gbs"] * factor)
  first, second = told["training"]["processes"]
  assert first["losses"] == second["losses"] and len(first["losses"]) == 2
  assert 0 < first["seconds"][1] < first["seconds"][0]  # the first one compiles


@pytest.mark.slow
def test_another_version_and_another_config_are_named_before_a_backend_is_touched(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  wanted = config_file(cfg, tmp_path)
  (tmp_path / "jax-0.0.1.dist-info").mkdir()
  (tmp_path / "jax-0.0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.0.1\n")
  # A platform that is not there: to ask for a device would be an error.
  pod, given = Pod(3), ["--config", str(wanted), "--json", str(tmp_path / "pod.json")]
  processes = [
    pod.start(0, *given, JAX_PLATFORMS="none"),
    pod.start(1, *given, JAX_PLATFORMS="none", PYTHONPATH=str(tmp_path)),
    pod.start(2, *given, "--config.train.seed=5", JAX_PLATFORMS="none"),
  ]
  outputs = ended(processes, 1)
  assert line(outputs[0], "process 0") == f"process 0, {HOST}: OK"
  assert f"process 1, {HOST}: WRONG: jax 0.0.1, the others have {jax.__version__}; install the same" in outputs[0]
  assert f"process 2, {HOST}: WRONG: config " in outputs[0] and "(config.train.seed: 0 → 5)" in outputs[0]
  assert "process 1" in outputs[1] and "0.0.1" in outputs[1] and "config.train.seed" in outputs[2]
  written = json.loads((tmp_path / "pod.json").read_text())
  assert {each["dataset"] for each in written["facts"]} == {dataset.manifest["encoding_hash"]}


def test_a_process_that_does_not_come_is_named_in_time() -> None:
  (output,) = ended([Pod(2).start(0, "--timeout", "1", JAX_PLATFORMS="none")], 1)
  assert f"process 0, {HOST}: not known" in output
  assert "process 1: WRONG: did not come within 1 s; give the same command there" in output


@pytest.mark.slow
def test_a_process_with_one_device_checks_its_host() -> None:
  (output,) = ended([Pod(1, devices=1).start(0, "--sizes", "0.5")], 0)
  assert "one process" in output and "training: mesh 1×1×1" in output and "the pod is right" in output
