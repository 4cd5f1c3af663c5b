"""Tasks of every kind, the whole way, where users are divided: trained on some of them, evaluated on others."""

import pathlib

import jax
import numpy as np
import pytest

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset import snapshot_batches, training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.splits import TEST, VALIDATION
from supermoe_jax.data.preparation import prepare
from supermoe_jax.evaluation import evaluate
from supermoe_jax.training import loop
from supermoe_jax.training.checkpoints.checkpoint import RestoredModel
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import abstract_model
from tests.fixtures.small_log import every_task_config, write_log


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
  """Every kind of task over a dataset of divided users; do not change what lies in its folder."""
  folder = tmp_path_factory.mktemp("divided")
  write_log(folder)
  raw = every_task_config(folder)
  shares = {"user_validation": 0.25, "user_test": 0.25}
  raw["data"]["split"] = {"mode": "user", "snapshots": "every_events", "every_events": 6, **shares}
  raw["train"] |= {"steps": 3, "warmup_steps": 1, "checkpoint_every": 3}
  raw["model"] |= {"layers": 1, "moe_every": 1}
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  return cfg


@pytest.fixture(scope="module")
def dataset(cfg: config.Config) -> Dataset:
  return Dataset(cfg.data.path)


def untrained(cfg: config.Config, dataset: Dataset, workdir: pathlib.Path) -> Run:
  """A run whose parameters are drawn."""
  mesh, rng = device_mesh.make_mesh(cfg.train.mesh), np.random.default_rng(0)
  graph, abstract = abstract_model(cfg, dataset.schema, "cpu")
  drawn = jax.tree.map(lambda p: rng.normal(0, 0.1, p.shape).astype(p.dtype), abstract)
  variables = jax.device_put(drawn, sharding.shardings(mesh, abstract))
  return Run.of(workdir, cfg, dataset, mesh, graph, RestoredModel(0, variables, {}))


def assert_every_task_is_evaluated(result: dict, run: Run) -> None:
  """Each known label of the users of a split is asked about once, and each task has its main metric somewhere."""
  for split in evaluate.EVALUATED_SPLITS:
    measured = result["splits"][split]
    assert measured.keys() == run.cfg.active_views.keys()
    for name, task in measured.items():
      assert 0 < task["labels"] <= run.dataset.manifest["labels"][name][split]["known"]
      assert result["main_metric"][name] in task["metrics"] and task["baselines"]
  for name, metric in result["main_metric"].items():
    assert any(result["splits"][s][name]["metrics"][metric] is not None for s in evaluate.EVALUATED_SPLITS), name


def test_every_kind_of_task_has_labels_of_divided_users(cfg: config.Config, dataset: Dataset) -> None:
  assert check.check_dataset(dataset.path).keys() >= cfg.active_views.keys()
  assert all(n.labels for n in check.check_dataset(dataset.path).values())


def test_training_shows_no_user_who_is_held_out(cfg: config.Config, dataset: Dataset) -> None:
  shown = next(iter(training_batches.training_batches(dataset, cfg)))
  training = {int(r["n_train"]) for r in map(dataset.__getitem__, range(len(dataset))) if r["user_split"] == 0}
  assert 0 not in training  # which is what a held-out user has to show
  assert set(shown.features.length.tolist()) <= {min(n, cfg.model.max_events) for n in training}


def test_a_split_asks_about_its_own_users_alone(cfg: config.Config, dataset: Dataset) -> None:
  every = range(len(dataset))
  for split in (VALIDATION, TEST):
    asked = {q.user for b in snapshot_batches.query_batches(dataset, cfg, split=split) for q in b.questions}
    own = {i for i in every if dataset[i]["user_split"] == split}
    assert asked and asked <= own
    assert {i for i in own if np.any(dataset[i]["snapshot_split"] == split)} == asked


def test_every_kind_of_task_is_evaluated_on_divided_users(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  run = untrained(cfg, dataset, tmp_path)
  assert_every_task_is_evaluated(evaluate.evaluate(run, progress=False, write=False), run)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.nightly
def test_every_kind_of_task_is_trained_and_evaluated_on_divided_users(
  cfg: config.Config, tmp_path: pathlib.Path
) -> None:
  loop.train(cfg, tmp_path / "run")
  run = Run(tmp_path / "run")
  assert_every_task_is_evaluated(evaluate.evaluate(run, progress=False), run)
  assert (tmp_path / "run" / "evaluation.json").is_file()
