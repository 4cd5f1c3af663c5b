"""Whatever preparation and an append drop, cut, do not join or do not know is said, and alarms where it is much."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from supermoe_jax import cli, config
from supermoe_jax.data.append import append
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import losses, prepare, summary
from supermoe_jax.errors import ConfigError

Write = Callable[..., pathlib.Path]

EVENTS = 200  # of twenty shoppers


def columns(bad: int = 0) -> dict[str, list[Any]]:
  """Events of twenty shoppers over 100 days, the last `bad` of them without a usable time."""
  days = [f"2024-{1 + i // 56:02}-{1 + i // 2 % 28:02}T{i % 24:02}:00:00" for i in range(EVENTS)]
  return {
    "shopper": [f"s{i % 20}" for i in range(EVENTS)],
    "bought_at": days[: EVENTS - bad] + ["never"] * bad,
    "sku": [f"sku{i % 10}" for i in range(EVENTS)],
    "price": [float(i % 7) if i % 4 else None for i in range(EVENTS)],
  }


def raw(file: pathlib.Path, **data: Any) -> dict[str, Any]:
  source = {"files": [str(file)], "user": "shopper", "time": "bought_at", **data.pop("source", {})}
  return {
    "data": {
      "path": str(file.parent / "dataset"),
      "sources": {"orders": source},
      "fields": {"sku": {}, "price": {"kind": "numeric"}, **data.pop("fields", {})},
      "split": {"train_end": "2024-03-01", "validation": ["2024-03-01"], "test": ["2024-03-20"]},
      "on_bad_rows": "drop",
      **data,
    },
    "tasks": {"next": {"kind": "next_event", "field": "sku"}, **data.pop("tasks", {})},
    "model": {"max_events": 4},
  }


def said(raw: dict[str, Any]) -> tuple[list[str], list[str]]:
  """The lines that prepare prints on a dataset, and the warnings in its manifest."""
  tasks = raw["data"].pop("tasks", {})
  raw["tasks"] |= tasks
  manifest = prepare.prepare(config.resolve(raw))
  return summary.dataset_summary(manifest).splitlines(), manifest["warnings"]


@pytest.mark.parametrize(("bad", "alarming"), [(10, False), (11, True), (40, True)])
def test_dropped_rows_are_said_and_alarm_above_a_twentieth(write: Write, bad: int, alarming: bool) -> None:
  lines, warned = said(raw(write("orders.csv", columns(bad))))
  text = f"source orders: {bad} of 200 rows ({bad / 200:.1%}) cannot be used and were dropped ({bad} unparsable time)"
  assert (f"warning: {text}" if alarming else text) in lines and (text in warned) == alarming


@pytest.mark.parametrize(("known", "alarming"), [(8, False), (3, True)])
def test_events_without_a_row_in_the_item_table_are_said(write: Write, known: int, alarming: bool) -> None:
  items = write(
    "items.csv",
    {"id": [f"sku{i}" for i in range(known)], "brand": ["x", "y", "z", "w"] * 2 if known == 8 else ["x"] * 3},
  )
  joined = {"source": {"items": {"file": str(items), "key": "sku", "table_key": "id"}}, "fields": {"brand": {}}}
  lines, warned = said(raw(write("orders.csv", columns()), **joined))
  without = 200 - 20 * known
  text = (
    f"source orders: {without} of 200 events ({without / 200:.1%}) have no row in the item table {items}; its "
    "fields are absent there"
  )
  assert (f"warning: {text}" if alarming else text) in lines and (text in warned) == alarming
  assert f"field brand: {without} of 200 events ({without / 200:.1%}) have no value" in lines
  assert "field price: 50 of 200 events (25.0%) have no value" in lines


def test_duplicates_are_said_whether_kept_or_dropped(write: Write) -> None:
  twice = {name: [*values, *values[:100]] for name, values in columns().items()}
  file = write("orders.csv", twice)
  text = "100 of 300 usable rows (33.3%) repeat an earlier row in user, time, source and every field, and "
  lines, warned = said(raw(file))
  assert text + "were kept (config.data.duplicates='drop' drops them)" in warned
  lines, warned = said(raw(file, duplicates="drop", path=str(file.parent / "other")))
  assert f"warning: {text}were dropped" in lines and text + "were dropped" in warned


def test_labelled_users_without_events_are_said(write: Write) -> None:
  people = {"id": [f"S{i}" for i in range(30)] + ["s0", "s1", "s2", "s3"], "kind": (["old", "new"] * 17)}
  users = {"files": [str(write("people.csv", people))], "user": "id"}
  task = {"grown": {"kind": "user_label", "column": "kind", "positive": ["old"]}}
  lines, warned = said(raw(write("orders.csv", columns()), users=users, tasks=task))
  text = "30 of 34 labelled users (88.2%) of config.data.users have no event; their labels are not used"
  assert text in warned and f"warning: {text}" in lines


def test_cut_histories_left_out_snapshots_and_unknown_values_are_said(write: Write) -> None:
  changed = columns()
  changed["sku"] = [
    sku if time < "2024-03-01" else f"new-{sku}" for sku, time in zip(changed["sku"], changed["bought_at"])
  ]
  settings = raw(write("orders.csv", changed))
  settings["data"]["split"]["min_events"] = 3
  lines, warned = said(settings)
  manifest = Dataset(settings["data"]["path"]).manifest
  early = manifest["snapshots_with_too_few_events"]
  whole = early + sum(manifest["snapshots"].values())
  assert early > 0
  assert (
    f"{early} of {whole} snapshots ({early / whole:.1%}) have fewer than 3 events before them and were left out"
    in lines
  )
  assert (
    "20 of 20 users (100.0%) have more events than config.model.max_events=4; the model sees the last ones before a "
    "snapshot"
  ) in lines
  assert "field sku: 100.00% of the values after the training period were unseen in it" in warned


def test_an_append_says_what_the_new_files_lose(write: Write) -> None:
  settings = raw(write("orders.csv", columns()))
  prepare.prepare(config.resolve(settings))
  new = {name: values[-10:] for name, values in columns(9).items()}
  manifest = append.append(pathlib.Path(settings["data"]["path"]), {"orders": [str(write("more.csv", new))]})
  lines = summary.append_summary(manifest).splitlines()
  dropped = "source orders: 9 of {} rows ({}) cannot be used and were dropped (9 unparsable time)"
  assert f"warning: of the new files, {dropped.format(10, '90.0%')}" in lines
  assert dropped.format(210, "4.3%") in [loss.text for loss in losses.find_losses(manifest)]
  assert manifest["reading"]["dropped"] == {"unparsable_time": 9}


def test_a_sound_log_loses_nothing(write: Write) -> None:
  whole = columns()
  whole["price"] = [1.0 + i % 3 for i in range(EVENTS)]
  settings = raw(write("orders.csv", whole))
  settings["model"]["max_events"], settings["data"]["split"]["train_start"] = 256, "2024-01-20"
  prepare.prepare(config.resolve(settings))
  assert [loss.text for loss in losses.find_losses(Dataset(settings["data"]["path"]).manifest)] == []


def test_the_command_and_a_notebook_say_warnings(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
  file = write("orders.csv", columns(40))
  settings = raw(file)
  script = file.parent / "config.py"
  script.write_text(f"import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({settings!r})\n")
  assert cli.main(["prepare", "--config", str(script)]) == 0
  warning = "warning: source orders: 40 of 200 rows (20.0%) cannot be used and were dropped (40 unparsable time)"
  assert warning in capsys.readouterr().out.splitlines()
  assert f"  {warning}" in repr(Dataset(settings["data"]["path"])).splitlines()


def test_a_split_without_validation_is_prepared_and_said(write: Write) -> None:
  settings = raw(write("orders.csv", columns()))
  settings["data"]["split"] |= {"validation": [], "train_end": "2024-03-20"}
  lines, warned = said(settings)
  dataset = Dataset(settings["data"]["path"])
  assert dataset.manifest["snapshots"]["validation"] == 0 and dataset.manifest["snapshots"]["train"] > 0
  assert (
    "config.data.split.validation is empty: no checkpoint is chosen by validation, and evaluate measures test only"
  ) in lines
  assert not [warning for warning in warned if "validation" in warning]
  check.check_dataset(dataset.path, sample=20)
  with pytest.raises(ConfigError, match=r"validate\.every=1000 needs validation snapshots"):
    config.resolve({**settings, "train": {"validate": {"every": 1000}, "checkpoint_every": 1000}})


@pytest.mark.parametrize("validation", [["2024-03-20"], []])
def test_a_split_without_test_is_prepared_checked_and_said(write: Write, validation: list[str]) -> None:
  settings = raw(write("orders.csv", columns()))
  settings["data"]["split"] |= {"validation": validation, "test": [], "train_end": "2024-03-20"}
  lines, warned = said(settings)
  dataset = Dataset(settings["data"]["path"])
  assert dataset.manifest["snapshots"]["test"] == 0 and dataset.manifest["snapshots"]["train"] > 0
  assert (dataset.manifest["snapshots"]["validation"] > 0) == bool(validation)
  only = "validation only" if validation else "nothing"
  assert f"config.data.split.test is empty: evaluate measures {only}" in lines
  assert not [warning for warning in warned if "in test" in warning]
  check.check_dataset(dataset.path, sample=20)


def test_a_field_of_one_value_is_said(write: Write) -> None:
  same = columns()
  same["sku"] = ["sku0"] * EVENTS
  _, warned = said(raw(write("orders.csv", same)))
  assert "task next asks about a field with one value in training: every answer is right" in warned
