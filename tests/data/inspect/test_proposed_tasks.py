"""Tasks about the future that `inspect` proposes: which, over which window, and that they can be prepared."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from supermoe_jax import config
from supermoe_jax.data.preparation import prepare
from tests.fixtures.proposed_configs import JUNE_1, proposed, visits

PAGES = 50  # different ones in `visits`
Write = Callable[..., pathlib.Path]


def test_churn_types_of_events_and_amounts_are_proposed_and_can_be_prepared(
  write: Write, tmp_path: pathlib.Path
) -> None:
  cfg = proposed(tmp_path, write("visits.csv", visits()))
  assert dict(cfg.tasks) == {
    "next_page": config.NextEvent(field="page"),
    "churn": config.FutureEvent(source="visits", negate=True, horizon_days=7.0),
    "days_to_visits": config.TimeToEvent(source="visits", horizon_days=7.0),
    "visits_times": config.FutureAmount(of="moments", source="visits", horizon_days=7.0, loss="poisson"),
    "action_soon": config.FutureValues(field="action", top=3, horizon_days=7.0),
    "page_soon": config.FutureValues(field="page", top=PAGES // 2, horizon_days=7.0),
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


@pytest.mark.parametrize(
  ("days", "windows"),
  [(700, [28.0, 90.0, 7.0]), (250, [28.0, 7.0]), (100, [14.0, 7.0]), (50, [7.0]), (26, [3.0]), (20, [1.0])],
)
def test_windows_are_those_that_all_periods_have_room_for(
  write: Write, tmp_path: pathlib.Path, days: int, windows: list[float]
) -> None:
  """The first is the main window, whose tasks have plain names."""
  tasks = proposed(tmp_path, write("visits.csv", visits(days))).tasks
  names = [f"_{days:g}d" if i else "" for i, days in enumerate(windows)]
  for task in ("churn", "visits_times", "revenue_sum"):
    assert {n: t.horizon for n, t in tasks.items() if n.startswith(task)} == {
      f"{task}{name}": days for name, days in zip(names, windows)
    }
  assert tasks["days_to_visits"].horizon == tasks["action_soon"].horizon == windows[0]


@pytest.mark.parametrize(("pages", "asked"), [(20, None), (21, 10), (60, 30), (121, 60), (1001, None)])
def test_values_to_come_are_asked_about_of_a_field_with_neither_few_nor_very_many(
  write: Write, tmp_path: pathlib.Path, pages: int, asked: int | None
) -> None:
  rows = visits(250, page=[f"page{(i + i // pages) % pages}" for i in range(2500)])
  task = proposed(tmp_path, write("visits.csv", rows)).tasks.get("page_soon")
  assert task == (asked and config.FutureValues(field="page", top=asked, horizon_days=28.0))


@pytest.mark.parametrize(("users", "events"), [(40, 32), (8, 96), (2, None)])
def test_the_model_sees_the_whole_history_of_nine_users_in_ten(
  write: Write, tmp_path: pathlib.Path, users: int, events: int | None
) -> None:
  rows = visits(visitor=[f"v{i % users}" for i in range(600)])
  found = proposed(tmp_path, write("visits.csv", rows)).model.max_events
  assert found == (events or config.Model.max_events)


def test_a_next_event_of_very_many_values_scores_a_sample(write: Write, tmp_path: pathlib.Path) -> None:
  rows = visits(2200, visitor=[f"v{i % 23}" for i in range(22_000)])
  for values, softmax in ((10_000, "full"), (10_001, "sampled")):
    rows["page"] = [f"page{(i + i // values) % values}" for i in range(22_000)]
    assert proposed(tmp_path, write(f"visits{values}.csv", rows)).tasks["next_page"].softmax == softmax


def test_a_log_without_room_for_a_window_gets_no_task_about_the_future(write: Write, tmp_path: pathlib.Path) -> None:
  places = [JUNE_1 + i * 100 for i in range(600)]
  assert list(proposed(tmp_path, write("visits.csv", visits(time=places))).tasks) == ["next_page"]


def test_amounts_are_numbers_however_few_they_are(write: Write, tmp_path: pathlib.Path) -> None:
  cfg = proposed(tmp_path, write("visits.csv", visits(revenue=[10 * (1 + i % 3) for i in range(600)])))
  assert cfg.data.fields["revenue"].kind == "numeric"
