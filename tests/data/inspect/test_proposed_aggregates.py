"""Aggregates that `inspect` proposes: counts, sums and trends of amounts, factors of fields of many shared values."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare
from tests.fixtures.proposed_configs import proposed, visits

Write = Callable[..., pathlib.Path]
EVENTS = 600


def orders(**changes: Any) -> dict[str, list[Any]]:
  """The visits, each with a number of an order that hardly any two share."""
  return visits(receipt=[f"r{i * 7919 % 401}" for i in range(EVENTS)], **changes)


def test_factors_are_of_fields_of_many_values_that_users_share(write: Write, tmp_path: pathlib.Path) -> None:
  cfg = proposed(tmp_path, write("orders.csv", orders()))
  assert cfg.train.steps == "auto"
  assert {"page", "action", "receipt"} <= set(cfg.data.fields)
  assert cfg.data.aggregates.factors == ("page",)
  assert cfg.data.aggregates.habits
  assert cfg.data.aggregates.sums == cfg.data.aggregates.trends == ("revenue",)
  prepare.prepare(cfg)
  dataset = Dataset(tmp_path / "dataset")
  assert dataset.aggregator is not None
  assert {"factor page 1", "sum revenue all", "trend revenue 7d"} <= set(dataset.aggregator.names)


def of_sizes(sizes: dict[str, int]) -> dict[str, list[str]]:
  """Columns of a number of values each."""
  return {name: [f"{name}{(i * 7 + i // 20) % size}" for i in range(EVENTS)] for name, size in sizes.items()}


def test_the_four_fields_of_the_most_values_get_factors(write: Write, tmp_path: pathlib.Path) -> None:
  sizes = {"page": 50, "brand": 31, "shelf": 60, "town": 40, "shop": 33}
  cfg = proposed(tmp_path, write("orders.csv", orders(**of_sizes(sizes))))
  assert sorted(cfg.data.aggregates.factors) == ["page", "shelf", "shop", "town"]


def test_fields_of_few_values_are_counted_though_no_task_asks_about_them(write: Write, tmp_path: pathlib.Path) -> None:
  sizes = {"brand": 2, "aisle": 32, "floor": 31, "shelf": 33}
  cfg = proposed(tmp_path, write("orders.csv", orders(**of_sizes(sizes))))
  asked = {t.field for t in cfg.tasks.values() if t.kind in ("next_event", "future_values")}
  assert not asked & {"brand", "floor", "aisle", "shelf"}
  assert set(cfg.data.aggregates.fields) == {*asked, "brand", "floor"}  # there is no room for 32 more
  assert {"aisle", "floor", "shelf"} <= set(cfg.data.aggregates.distinct)
  assert "brand" not in cfg.data.aggregates.distinct
  prepare.prepare(cfg)
  names = Dataset(tmp_path / "dataset").aggregator.names
  assert {"brand brand0 all", "brand brand1 all"} <= set(names)


def test_other_amounts_are_added_up_after_those_that_tasks_ask_about(write: Write, tmp_path: pathlib.Path) -> None:
  saved = {"saved": [0.5 + i % 11 / 7 for i in range(EVENTS)]}
  cfg = proposed(tmp_path, write("orders.csv", orders(**saved)))
  assert cfg.data.aggregates.sums == cfg.data.aggregates.trends == ("revenue", "saved")


def test_values_of_a_table_of_items_get_factors(write: Write, tmp_path: pathlib.Path) -> None:
  items = {"page": [f"p{i}" for i in range(50)], "topic": [f"t{i % 35}" for i in range(50)]}
  cfg = proposed(tmp_path, write("orders.csv", orders()), write("pages.csv", items))
  assert cfg.data.aggregates.factors == ("page", "topic")


def test_a_log_without_such_fields_gets_none(write: Write, tmp_path: pathlib.Path) -> None:
  few = visits(page=[f"p{i % 7}" for i in range(EVENTS)])
  assert proposed(tmp_path, write("orders.csv", few)).data.aggregates.factors == ()


def test_a_column_of_one_name_in_two_sources_is_each_source_s_own_field(write: Write, tmp_path: pathlib.Path) -> None:
  lists = [[f"p{i % 9}", f"p{(i // 9) % 9}", f"p{i % 7}"] for i in range(EVENTS)]
  clicks = {"visitor": orders()["visitor"], "time": orders()["time"], "page": ["|".join(v) for v in lists]}
  cfg = proposed(tmp_path, write("orders.csv", orders()), write("clicks.csv", clicks))
  assert cfg.data.fields["page"].many == 0 and cfg.data.fields["clicks_page"].many > 0
  assert cfg.data.aggregates.factors == ("page",)
