"""An exported program compiles for a TPU: by XLA:TPU on this machine, in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from supermoe_jax import config
from tests.fixtures import exported_encoder, scripts


@pytest.mark.slow
def test_a_program_compiles_for_a_tpu(
  workdir: pathlib.Path, cfg: config.Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
  """See `test_tpu_layers`."""
  library = pathlib.Path(sys.prefix) / "tpu" / "libtpu" / "libtpu.so"
  assert library.is_file(), f"{library} is missing; run 'make test-all', which installs it"
  environment = {
    **os.environ,
    "TPU_LIBRARY_PATH": str(library),
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "",
  }
  script, encoder = scripts.PROGRAMS / "tpu_encoder.py", exported_encoder.made(tmp_path_factory, workdir)
  out = subprocess.run(
    [sys.executable, script, str(encoder), "1", "8"], env=environment, capture_output=True, text=True, check=False
  )
  assert out.returncode == 0, out.stderr[-3000:]
  assert json.loads(out.stdout.splitlines()[-1]) == {"shape": [1, cfg.model.d_model], "platform": "tpu"}
