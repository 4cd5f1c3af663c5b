"""What a dry run says is what the run is."""

import pathlib
import re

import jax
import pytest

from supermoe_jax import cli, config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.training.run import Run


def test_a_dry_run_says_sizes_and_plan_and_does_nothing(
  cfg: config.Config,
  dataset: Dataset,
  run: Run,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setattr(config, "load", lambda *_: cfg)
  assert cli.main(["train", "--config", "any", "--workdir", str(tmp_path / "run"), "--dry-run"]) == 0
  assert not (tmp_path / "run").exists()
  said = capsys.readouterr().out
  assert "mesh: data 1 × expert 1 × tensor 1; 1 of 8 devices (cpu), 1 process(es)" in said
  held = sum(x.size for x in jax.tree.leaves(run.variables))
  total = int(re.search(r"parameters: ([\d,]+)", said)[1].replace(",", ""))  # type: ignore[index]
  assert 0.5 * held < total <= held  # what fills up stripes does not count
  size = dataset.schema.categorical["page"]
  assert f"table page: {size} rows of 16 float32" in said
  assert f"a step: {cfg.train.batch_rows} rows of {cfg.model.max_events} events" in said
  assert f"data: {len(dataset.training_users)} rows an epoch" in said
  assert re.search(r"memory of the compiled program a device: [\d.]+ [KM]iB", said)
  assert re.search(r"products of a step a device: [\d.]+ GFLOP", said)
