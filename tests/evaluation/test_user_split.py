"""A split by users, the whole way: trained on some users, evaluated on others."""

import pathlib

import pytest

from supermoe_jax import config
from supermoe_jax.data import batches, check, prepare
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.evaluation import evaluate
from supermoe_jax.training import loop
from supermoe_jax.training.run import Run
from tests.fixtures.small_log import every_task_config, write_log


@pytest.mark.slow
def test_every_kind_of_task_is_trained_and_evaluated_on_divided_users(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path)
  raw = every_task_config(tmp_path)
  shares = {"user_validation": 0.25, "user_test": 0.25}
  raw["data"]["split"] = {"mode": "user", "snapshots": "every_events", "every_events": 6, **shares}
  raw["train"] |= {"steps": 3, "warmup_steps": 1, "checkpoint_every": 3}
  cfg = config.resolve(raw)
  prepare.prepare(cfg, say=lambda text: None)
  dataset = Dataset(cfg.data.path)
  assert all(n.labels for n in check.check(dataset.path).values())

  shown = next(iter(batches.training(dataset, cfg)))
  training = {int(r["n_train"]) for r in map(dataset.__getitem__, range(len(dataset))) if r["user_split"] == 0}
  assert 0 not in training  # which is what a held-out user has to show
  assert set(shown.features.length.tolist()) <= {min(n, cfg.model.max_events) for n in training}

  loop.train(cfg, tmp_path / "run")
  result = evaluate.evaluate(Run(tmp_path / "run"), progress=False)
  for split in ("validation", "test"):
    assert result["splits"][split].keys() == cfg.active_views.keys()
    for name, measured in result["splits"][split].items():
      assert measured["labels"] <= sum(c["known"] for s, c in dataset.manifest["labels"][name].items() if s == split)
