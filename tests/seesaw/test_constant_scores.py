"""The scores of answers to ranking tasks that ignore the user."""

from __future__ import annotations

import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.encoding.splits import SPLITS
from supermoe_jax.evaluation import evaluate
from supermoe_jax.seesaw import constant_scores
from supermoe_jax.training.run import Run


@pytest.fixture(scope="module")
def baselines_of_test(run: Run) -> dict[str, dict[str, dict[str, float]]]:
  """The baselines of each task on test."""
  found = evaluate.evaluate(run, progress=False, write=False, splits=("test",))
  return {task: measures["baselines"] for task, measures in found["splits"]["test"].items()}


def test_the_popularity_ranking_is_the_baseline_of_evaluation(
  run: Run, cfg: config.Config, baselines_of_test: dict[str, dict[str, dict[str, float]]]
) -> None:
  batches = list(snapshot_batches.query_batches(run.dataset, cfg, split=SPLITS["test"]))
  found = constant_scores.popularity_scores(cfg, batches)
  assert set(found) == {n for n, t in cfg.active_views.items() if t.answer == "catalogue"} != set()
  assert found == {task: baselines_of_test[task]["most popular"] for task in found}
  main = {task: evaluate.main_metric(cfg, cfg.labelled_tasks[task]) for task in cfg.active_views}
  scores = constant_scores.main_scores({"test": found}, main)
  assert scores == {task: {"test": measured[main[task]]} for task, measured in found.items()}


def test_without_questions_there_is_no_score(cfg: config.Config) -> None:
  assert constant_scores.popularity_scores(cfg, []) == {}
