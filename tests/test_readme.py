"""The code in the README and the guides runs as it is printed, and their links lead somewhere."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys

import pytest

from supermoe_jax import config
from tests.fixtures import scripts

PAGES = (scripts.ROOT / "README.md", *sorted((scripts.ROOT / "docs").glob("*.md")))
TEXT = "".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
every_block = pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.strip().splitlines()[-1][:40])

# What is left out of blocks, or made smaller, where they run among other tests: JAX has begun, with eight devices.
CHANGES = {
  'jax.config.update("jax_num_cpu_devices", 8)  # leave this out where there are eight accelerators\n': "",
  "EmbeddingTable(1_000_000, 64": "EmbeddingTable(10_000, 64",
}


def printed(block: str) -> list[str]:
  """Returns the lines that a block says it prints."""
  return re.findall(r"# prints (.*)", block)


def test_there_is_a_block_for_every_way_of_reuse() -> None:
  ways = ("MoE(", "sharding.create(", "nnx.bridge.to_linen(", "MoE.from_dense(", "EmbeddingTable(", "def get_config")
  for words in ways:
    assert any(words in block for block in BLOCKS), words


def test_what_is_changed_in_blocks_is_there_once() -> None:
  assert {words: "".join(BLOCKS).count(words) for words in CHANGES} == dict.fromkeys(CHANGES, 1)


@every_block
def test_a_code_block_prints_what_it_says(block: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  assert printed(block) or "def get_config" in block
  code, out = block, io.StringIO()
  for words, others in CHANGES.items():
    code = code.replace(words, others)
  with contextlib.redirect_stdout(out):
    exec(compile(code, "README", "exec"), {"__name__": "__main__"})
  assert out.getvalue().splitlines() == printed(block)


@pytest.mark.slow
@pytest.mark.nightly
@every_block
def test_a_code_block_runs_as_printed(block: str, tmp_path: pathlib.Path) -> None:
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  out = subprocess.run(
    [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
  )
  assert out.returncode == 0, out.stderr
  assert printed(block) == out.stdout.splitlines()


def test_the_config_of_the_readme_is_a_whole_one() -> None:
  (block,) = (b for b in BLOCKS if "def get_config" in b)
  names: dict = {}
  exec(block, names)
  cfg = config.resolve(names["get_config"]().to_dict())
  assert set(cfg.active_tasks) == {"next_category", "churn", "basket", "premium"}


def test_nothing_is_left_to_be_filled_in() -> None:
  assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b(?<!GLIBC_TUNABLES)(?<!XLA_FLAGS)", TEXT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: pathlib.Path) -> None:
  links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
  assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_short_and_names_every_guide() -> None:
  text = PAGES[0].read_text()
  assert len(text.splitlines()) <= 250
  assert [guide.name for guide in PAGES[1:] if f"](docs/{guide.name})" not in text] == []
