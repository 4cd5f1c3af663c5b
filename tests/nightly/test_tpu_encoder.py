"""An exported program compiles for a TPU: by XLA:TPU on this machine, in a process of its own."""

import pathlib

import pytest

from supermoe_jax import config
from tests.fixtures import exported_encoder, tpu_compiler


@pytest.mark.slow
def test_a_program_compiles_for_a_tpu(
  workdir: pathlib.Path, cfg: config.Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
  """See `test_tpu_layers`."""
  encoder = exported_encoder.made(tmp_path_factory, workdir)
  found = tpu_compiler.output("tpu_encoder", str(encoder), "1", "8")
  assert found == {"shape": [1, cfg.model.d_model], "platform": "tpu"}
