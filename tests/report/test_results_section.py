"""What the report says of a run beside its baselines."""

import types

import pytest

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
