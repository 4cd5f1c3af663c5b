"""The real step compiles for pods by `supermoe plan`, and what it says adds up; `make test-all` installs XLA:TPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from supermoe_jax import config
from tests.fixtures.small_log import raw_config, write_log
from tests.fixtures.tpu_compiler import assert_installed

PODS = [("v5e:4x4", 1), ("v6e:4x4", 1), ("v5p:4x4x4", 1), ("v5e:4x4", 2)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A config of few, small parts, whose dataset is not there yet: compiling takes the time of each sort and product."""
  folder = tmp_path_factory.mktemp("pods")
  write_log(folder)
  raw = raw_config(folder)
  raw["data"]["fields"] = {"page": {"sources": ["visits"], "size": 5000}}
  raw["tasks"] = {
    "next_page": {"kind": "next_event", "field": "page", "softmax": "sampled", "negatives": 256},
    "quiet": raw["tasks"]["quiet"],
  }
  raw["model"] |= {"d_model": 128, "heads": 2, "d_hidden": 256, "d_expert": 128, "experts": 4, "max_events": 28}
  raw["model"] |= {"layers": 1, "moe_every": 1}
  raw["train"] |= {"batch_rows": 128, "mesh": {"expert": 4}}
  raw["evaluate"] = {"batch_rows": 128}
  (folder / "wanted.json").write_text(json.dumps(raw))
  wanted = folder / "wanted.py"
  wanted.write_text(
    "import json, ml_collections\n"
    f"def get_config():\n  return ml_collections.ConfigDict(json.load(open({str(folder / 'wanted.json')!r})))\n"
  )
  return wanted


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "slices"), PODS)
def test_a_step_compiles_for_a_pod_and_fits(
  topology: str, slices: int, file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  assert_installed()
  saved = tmp_path / "plan.json"
  line = [sys.executable, "-m", "supermoe_jax", "plan", "--config", str(file), "--topology", topology]
  line += ["--slices", str(slices), "--json", str(saved)]
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  out = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stderr
  plan = json.loads(saved.read_text())
  devices = plan["topology"]["devices"]
  assert plan["mesh"] == {"data": devices // 4, "expert": 4, "tensor": 1}
  assert plan["fits"] and "fits: " in out.stdout
  memory = plan["memory"]
  assert sum(memory["parts"].values()) + memory["padding"] - memory["not_read"] == memory["arguments"]
  assert memory["total"] == sum(memory[k] for k in ("arguments", "temporary", "outputs", "program"))
  cfg = config.load(str(file))
  assert plan["parameters"]["tables"] == 5002 * cfg.model.d_model
  kinds = {row["kind"] for row in plan["collectives"]}
  assert "all-to-all" in kinds or "ragged-all-to-all" in kinds
  gathers = [row["largest"] for row in plan["collectives"] if row["kind"] == "all-gather"]
  assert max(gathers, default=0) < 2**20  # no table, no expert
  crossing = {row["kind"]: row for row in plan["collectives"] if row["network_seconds"] > 0}
  assert set(crossing) >= ({"all-reduce", "all-to-all"} if slices > 1 else set())  # gradients; rows of tables
  assert all(row["axes"] == ["slices"] for row in crossing.values()) and bool(crossing) == (slices > 1)
  assert plan["seconds"]["bound"] and 0 < plan["mfu"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 96])
def test_narrow_rows_are_neither_padded_nor_copied(width: int, file: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """XLA:TPU would do either to rows that fill no whole tile of 128 numbers, with the whole table in every step."""
  saved = tmp_path / "plan.json"
  line = [sys.executable, "-m", "supermoe_jax", "plan", "--config", str(file), "--topology", "v5e:4x4"]
  line += [f"--config.model.d_model={width}", "--config.data.fields.page.size=100000000", "--json", str(saved)]
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  out = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stderr
  memory = json.loads(saved.read_text())["memory"]
  rows = memory["parts"]["tables"]
  assert rows >= 100_000_000 * width * 4 / 16
  assert memory["padding"] < rows / 1000 and memory["temporary"] < rows / 10


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_would_spare_most(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
  saved = tmp_path / "plan.json"
  line = [sys.executable, "-m", "supermoe_jax", "plan", "--config", str(file), "--topology", "v5e:4x4"]
  line += ["--config.data.fields.page.size=1000000000", "--json", str(saved)]
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  out = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stderr
  plan = json.loads(saved.read_text())
  rows = 10**9 * 128 * 4 / 16
  assert plan["fits"] is False and plan["memory"]["parts"]["tables"] == pytest.approx(rows, rel=0.01)
  assert plan["memory"]["total"] > rows
  assert "does not fit" in out.stdout
  assert plan["remedies"][0].startswith("--config.train.tables.dtype=bfloat16: may save about 14.9 GiB")
  assert "try --topology=v5e:4x8: about 15.3 GiB" in out.stdout and "try --topology=v5p:2x2x2" in out.stdout
