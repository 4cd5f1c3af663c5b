"""The code in the README runs as it is printed."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_there_is_a_block_for_every_way_of_reuse() -> None:
  for words in ("MoE(", "sharding.create(", "nnx.bridge.to_linen(", "MoE.from_dense(", "def get_config"):
    assert any(words in block for block in BLOCKS), words


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.strip().splitlines()[-1][:40])
def test_a_code_block_runs_as_printed(block: str, tmp_path: pathlib.Path) -> None:
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  out = subprocess.run(
    [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
  )
  assert out.returncode == 0, out.stderr
  for printed in re.findall(r"# prints (.*)", block):
    assert printed in out.stdout
