"""Tables of labels with times, which `inspect` proposes as tasks and not as events."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from supermoe_jax import config
from supermoe_jax.data.inspect.inspect import inspect
from supermoe_jax.data.preparation import prepare

DAY = 86_400
JUNE_1 = config.parse_time("2020-06-01", "") // 1_000_000
Write = Callable[..., pathlib.Path]


def events() -> dict[str, list[Any]]:
  """Two months of ten events a day, of 20 customers."""
  places = range(600)
  return {
    "customer": [f"c{i % 20}" for i in places],
    "product": [f"p{i * 7 % 50}" for i in places],
    "moment": [JUNE_1 + i * 8_640 for i in places],
  }


def labels(name: str, values: list[Any]) -> dict[str, list[Any]]:
  return {"customer": [f"c{i % 20}" for i in range(100)], "checked_at": times(100), name: [*values * 100][:100]}


def times(n: int) -> list[int]:
  return [1000 * (JUNE_1 + DAY + i * 40_000) for i in range(n)]


def proposed(tmp_path: pathlib.Path, *files: pathlib.Path) -> config.Config:
  file = tmp_path / "proposed.py"
  file.write_text(inspect([str(f) for f in files]).config)
  return config.load(str(file), [f"--config.data.path={tmp_path / 'dataset'}"])


@pytest.mark.parametrize(
  ("name", "values", "type"),
  [
    ("is_fraud", [0, 1, 0], "binary"),
    ("churned", ["true", "false"], "binary"),
    ("outcome", ["won", "lost", "open"], "multiclass"),
    ("rating", [x / 7 for x in range(99)], "regression"),
  ],
)
def test_a_table_of_labels_becomes_a_task_that_prepares(
  write: Write, tmp_path: pathlib.Path, name: str, values: list[Any], type: str
) -> None:
  cfg = proposed(tmp_path, write("orders.csv", events()), write("checks.csv", labels(name, values)))
  assert list(cfg.data.sources) == ["orders"]
  assert cfg.tasks[name] == config.DatedLabel(
    files=(str(tmp_path / "checks.csv"),),
    user="customer",
    time="checked_at",
    time_unit="ms",
    column=name,
    type=type,  # type: ignore[arg-type]
  )
  counts = prepare.prepare(cfg)["dated_labels"][name]
  assert sum(counts["placed"].values()) > 70 and not counts["of_users_without_events"]


@pytest.mark.parametrize(
  "table",
  [
    labels("colour", ["red", "blue"]),  # not the name of a label
    labels("outcome", [f"text {i}" for i in range(60)]),  # no class
    {**labels("is_fraud", [0, 1]), "shop": ["s1", "s2"] * 50},  # events with a label
  ],
)
def test_other_tables_with_times_stay_events(write: Write, tmp_path: pathlib.Path, table: dict[str, Any]) -> None:
  cfg = proposed(tmp_path, write("orders.csv", {**events(), "price": [1.5, 2.0] * 300}), write("checks.csv", table))
  assert set(cfg.data.sources) == {"orders", "checks"}
  assert all(task.kind != "dated_label" for task in cfg.tasks.values())


def test_a_table_of_labels_alone_is_read_as_events(write: Write, tmp_path: pathlib.Path) -> None:
  cfg = proposed(tmp_path, write("checks.csv", labels("is_fraud", [0, 1, 0])))
  assert list(cfg.data.sources) == ["checks"]
