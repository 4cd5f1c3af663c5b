"""Programs that tests keep between runs can be trusted: from the disk they give the bits of those just compiled."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from tests.fixtures import scripts


def trained(wanted: pathlib.Path, programs: pathlib.Path | None) -> dict:
  """What `digest_of_steps.py` prints, with its programs kept in a folder or nowhere."""
  keep = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
  if programs:
    keep = {"JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  out = subprocess.run(
    [sys.executable, scripts.PROGRAMS / "digest_of_steps.py", wanted],
    env={**os.environ, "PYTHONPATH": str(scripts.ROOT), **keep},
    capture_output=True,
    text=True,
    check=False,
  )
  assert out.returncode == 0, out.stderr[-3000:]
  return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
def test_steps_by_programs_from_the_disk_are_bitwise_those_by_programs_just_compiled(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  mesh = [f"--config.train.mesh.{axis}=2" for axis in ("data", "expert", "tensor")]
  wanted = tmp_path / "wanted.json"
  config.save(config.override(cfg, mesh), wanted)
  without = trained(wanted, None)
  first, second = trained(wanted, tmp_path / "programs"), trained(wanted, tmp_path / "programs")
  assert without["loaded"] == first["loaded"] == 0 < second["loaded"]
  assert without["digest"] == first["digest"] == second["digest"]
