"""The report compares a run with its baselines, and describes its amounts."""

import types

import numpy as np
import pytest

from supermoe_jax.evaluation.breakdown import ScoredAnswers
from supermoe_jax.report import results_section


@pytest.mark.parametrize(
  ("metric", "between", "verdict"),
  [
    ("rmse", [-1.5, -0.5], "surely_ahead"),
    ("rmse", [0.5, 1.5], "surely_behind"),
    ("auc", [0.05, 0.15], "surely_ahead"),
    ("auc", [-0.15, -0.05], "surely_behind"),
  ],
)
def test_a_run_is_surely_ahead_where_the_whole_interval_is_on_the_better_side(
  metric: str, between: list[float], verdict: str
) -> None:
  known = {"run": None, "users": 9, "baselines": {}}
  known["differences"] = {"constant": {"difference": 0, "interval": between}}
  own = 0.7 + sum(between) / 2
  task = {"labels": 900, "metrics": {metric: own}, "baselines": {"constant": {metric: 0.7}}, "intervals": known}
  cfg = types.SimpleNamespace(active_views={}, active_tasks={})
  run = types.SimpleNamespace(cfg=cfg, evaluation={"splits": {"test": {"age": task}}, "main_metric": {"age": metric}})
  found = results_section.headline_section(run)
  assert found[verdict] == ["age"] and found["ahead"] == (verdict == "surely_ahead")


def test_amounts_are_drawn_by_deciles_of_the_prediction() -> None:
  predicted = np.arange(100.0)
  observed = np.where(predicted < 90, predicted, 2 * predicted)  # the last decile is predicted at half
  user = np.arange(100)
  answers = ScoredAnswers("amount", observed[::-1], predicted[::-1], {}, user, user + 1, 10)
  about = answers.deciles()
  assert about is not None
  assert [(b["predicted"], b["observed"]) for b in about["bins"]] == [
    (4.5 + 10 * i, 4.5 + 10 * i if i < 9 else 189.0) for i in range(10)
  ]
  assert about["labels"] == 100 and about["error"] == pytest.approx(94.5 / 10 / observed.mean())
  (section,) = results_section.decile_section(types.SimpleNamespace(evaluation={"deciles": {"spend": about}}))
  assert section["task"] == "spend"
  assert "Amounts of spend by deciles: 4.5 predicted, 4.5 observed; " in section["figure"]
  assert "94.5 predicted, 189 observed" in section["figure"]
  assert results_section.decile_section(types.SimpleNamespace(evaluation={})) == []
  assert ScoredAnswers("binary", observed > 50, predicted / 100, {}, user, user + 1, 10).deciles() is None


def test_the_metrics_say_what_the_models_on_aggregates_were_fitted_on() -> None:
  trees = {"snapshots": 1234, "users": 300, "loss": "poisson"}
  task = {"labels": 900, "metrics": {}, "baselines": {}, "fitted": {"aggregates + boosted trees": trees}}
  (split,) = results_section.metric_tables(types.SimpleNamespace(evaluation={"splits": {"test": {"spend": task}}}))
  assert split["tasks"][0]["about"] == (
    "900 labels; aggregates + boosted trees fitted on 1,234 training snapshots of 300 users (Poisson deviance)"
  )


def test_the_metrics_say_how_much_a_head_takes_from_its_memory() -> None:
  memory = {"repeat": {"gain": -0.514, "spread": 0.02}, "follow": {"gain": 1.256, "spread": 0.3}}
  task = {"labels": 900, "metrics": {}, "baselines": {}, "memory": memory}
  (split,) = results_section.metric_tables(types.SimpleNamespace(evaluation={"splits": {"test": {"next": task}}}))
  assert split["tasks"][0]["about"] == (
    "900 labels; gains of what the head remembers, mean and spread over questions: repeat −0.51 ± 0.02, "
    "follow 1.26 ± 0.30"
  )


def test_the_labels_of_a_time_to_an_event_are_described_with_their_shares_by_day() -> None:
  by_day = [{"days": 7.0, "predicted": 0.25, "observed": 0.3}, {"days": 28.0, "predicted": 0.5, "observed": 0.61}]
  task = {"labels": 900, "observed": 0.4, "by_day": by_day, "metrics": {"concordance": 0.7}, "baselines": {}}
  run = types.SimpleNamespace(
    evaluation={"splits": {"test": {"refill": task}}},
    manifest={"labels": {"refill": {"train": {"known": 200, "events": 50}}}},
    cfg=types.SimpleNamespace(tasks={}),
  )
  (table,) = results_section.metric_tables(run)
  assert table["tasks"][0]["about"] == (
    "900 labels, 40% with an event; predicted share with an event by then (and its Kaplan-Meier estimate): "
    "7 days 25% (30%), 28 days 50% (61%)"
  )
  assert results_section.label_shares(run) == {"refill": {"train": "25% with an event"}}
