"""Tasks about the future that `inspect` proposes: which, over which window, and that they can be prepared."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from supermoe_jax import config
from supermoe_jax.data.preparation import prepare
from tests.fixtures.proposed_configs import JUNE_1, proposed, visits

Write = Callable[..., pathlib.Path]


def test_churn_types_of_events_and_amounts_are_proposed_and_can_be_prepared(
  write: Write, tmp_path: pathlib.Path
) -> None:
  cfg = proposed(tmp_path, write("visits.csv", visits()))
  assert dict(cfg.tasks) == {
    "next_page": config.NextEvent(field="page"),
    "churn": config.FutureEvent(source="visits", negate=True, horizon_days=7.0),
    "days_to_visits": config.TimeToEvent(source="visits", horizon_days=7.0),
    "action_soon": config.FutureValues(field="action", top=3, horizon_days=7.0),
    "revenue_sum": config.FutureAmount(field="revenue", horizon_days=7.0),
  }
  assert cfg.data.aggregates.fields == ("page", "action")  # the counts that answers about their values read
  labels = prepare.prepare(cfg)["labels"]
  assert all(count["known"] for of_task in labels.values() for count in of_task.values())


def test_each_smaller_table_of_events_gets_a_task(write: Write, tmp_path: pathlib.Path) -> None:
  orders = {"visitor": [f"v{i % 20}" for i in range(60)], "time": [JUNE_1 + i * 80_000 for i in range(60)]}
  cfg = proposed(tmp_path, write("visits.csv", visits()), write("orders.csv", {**orders, "sku": ["a", "b"] * 30}))
  assert cfg.tasks["orders_soon"] == config.FutureEvent(source="orders", horizon_days=7.0)
  assert cfg.tasks["churn"] == config.FutureEvent(source="visits", negate=True, horizon_days=7.0)


def test_amounts_below_zero_get_a_loss_that_takes_them(write: Write, tmp_path: pathlib.Path) -> None:
  cfg = proposed(tmp_path, write("visits.csv", visits(revenue=[i % 30 - 4.5 for i in range(600)])))
  assert cfg.tasks["revenue_sum"] == config.FutureAmount(field="revenue", horizon_days=7.0, loss="log1p")


@pytest.mark.parametrize(("days", "horizon"), [(250, 28.0), (100, 14.0), (26, 3.0), (20, 1.0)])
def test_the_window_is_the_longest_that_all_periods_have_room_for(
  write: Write, tmp_path: pathlib.Path, days: int, horizon: float
) -> None:
  assert proposed(tmp_path, write("visits.csv", visits(days))).tasks["churn"].horizon == horizon


def test_a_log_without_room_for_a_window_gets_no_task_about_the_future(write: Write, tmp_path: pathlib.Path) -> None:
  places = [JUNE_1 + i * 100 for i in range(600)]
  assert list(proposed(tmp_path, write("visits.csv", visits(time=places))).tasks) == ["next_page"]


def test_amounts_are_numbers_however_few_they_are(write: Write, tmp_path: pathlib.Path) -> None:
  cfg = proposed(tmp_path, write("visits.csv", visits(revenue=[10 * (1 + i % 3) for i in range(600)])))
  assert cfg.data.fields["revenue"].kind == "numeric"
