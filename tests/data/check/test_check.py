"""`check` agrees with what was prepared rightly, and finds what was not."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli, config
from supermoe_jax.data.check import check
from supermoe_jax.data.check.check import CheckError
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare
from supermoe_jax.data.tasks.future_event import FutureEventKind
from supermoe_jax.data.tasks.labels import LabelInputs, TaskLabels
from supermoe_jax.errors import DataError
from tests.fixtures.basket_log import random_lines, write_lines
from tests.fixtures.basket_log import raw_config as baskets_config
from tests.fixtures.dataset_copies import copied
from tests.fixtures.random_logs import (
  CASES,
  FOLLOWING,
  FUTURE,
  OF_USER,
  WAYS,
  folder_once,
  prepared,
  prepared_once,
)

Record = dict[str, Any]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_good_dataset_passes_and_every_label_is_compared(
  tmp_path_factory: pytest.TempPathFactory, way: str, name: str
) -> None:
  dataset = prepared_once(tmp_path_factory, name, way)
  assert max(len(dataset[i]["snapshot_time"]) for i in range(len(dataset))) <= check.SNAPSHOTS_A_USER or (
    way == "leave_one_out"
  )
  compared = check.check_dataset(dataset.path)
  known = {n: sum(c["known"] for c in of.values()) for n, of in dataset.manifest["labels"].items()}
  if way != "leave_one_out":
    assert {n: c.labels for n, c in compared.items()} == known
  assert compared.keys() == known.keys() and all(c.labels for c in compared.values())


def wrong(monkeypatch: pytest.MonkeyPatch, change: Callable[[Record], Record]) -> None:
  """Lets every dataset hold other records."""
  right = Dataset.__getitem__
  monkeypatch.setattr(Dataset, "__getitem__", lambda self, index: change(right(self, index)))


def wrong_labels(monkeypatch: pytest.MonkeyPatch, task: str, change: Callable[[Record], None]) -> None:
  """Lets every dataset hold other records, whose labels of one task `change` may write to."""

  def changed(record: Record) -> Record:
    record |= {key: record[key].copy() for key in (f"label_{task}", f"known_{task}")}
    change(record)
    return record

  wrong(monkeypatch, changed)


@pytest.mark.parametrize("task", [*FUTURE, *FOLLOWING, *OF_USER])
def test_one_wrong_label_of_any_kind_is_found(
  tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
  left = [1]

  def change(record: Record) -> None:
    """Changes the last known label of the first user who has one: another code or class, the opposite, a number
    more."""
    value, at = record[f"label_{task}"], np.argwhere(record[f"known_{task}"])
    if left and len(at):
      left.pop()
      here = tuple(at[-1])
      if task in ("price", "age"):
        value[here] += 0.01
      elif task == "next_item":
        value[here] = 3 if value[here] == 2 else 2
      else:
        here = (*here, 0) if task in ("items", "wait") else here
        value[here] = 0 if value[here] else 1

  dataset = prepared_once(tmp_path_factory, "text", "user" if task in OF_USER else "gap")
  wrong_labels(monkeypatch, task, change)
  with pytest.raises(
    CheckError, match=rf"^user '\d+', snapshot 2024-.*, task {task}: .* holds .*, the raw files give "
  ):
    check.check_dataset(dataset.path)
  assert not left


@pytest.mark.parametrize(
  ("task", "known"),
  [*((n, True) for n in (*FUTURE, *FOLLOWING, *OF_USER)), ("items", False), ("click", False), ("tier", False)],
)
def test_a_wrong_indicator_is_found(
  tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, task: str, known: bool
) -> None:
  dataset = prepared_once(tmp_path_factory, "text", "every_events")
  wrong_labels(monkeypatch, task, lambda record: record[f"known_{task}"].fill(known))
  with pytest.raises(CheckError, match=f"task {task}: .*{'the raw files give' if known else 'holds'} .*"):
    check.check_dataset(dataset.path)


@pytest.mark.parametrize(
  ("way", "what", "change"),
  [
    ("calendar", "visible events", lambda r: {"snapshot_events": np.maximum(r["snapshot_events"] - 1, 1)}),
    ("user", "its split", lambda r: {"snapshot_split": np.zeros_like(r["snapshot_split"])}),
    ("gap", "its split", lambda r: {"snapshot_split": np.ones_like(r["snapshot_split"])}),
    ("leave_one_out", "its split", lambda r: {"snapshot_split": np.zeros_like(r["snapshot_split"])}),
    ("leave_one_out", "its time", lambda r: {"snapshot_time": r["snapshot_time"] + 1}),
  ],
)
def test_a_wrong_snapshot_is_found(
  tmp_path_factory: pytest.TempPathFactory,
  monkeypatch: pytest.MonkeyPatch,
  way: str,
  what: str,
  change: Callable[[Record], Record],
) -> None:
  dataset = prepared_once(tmp_path_factory, "text", way)
  wrong(monkeypatch, lambda record: record | change(record))
  with pytest.raises(CheckError, match=rf"^user '\d+', snapshot .*, {what}: "):
    check.check_dataset(dataset.path)


def test_a_label_that_the_labeller_gives_wrongly_is_found_in_what_it_wrote(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  right = FutureEventKind.label

  def label(self: FutureEventKind, inputs: LabelInputs) -> TaskLabels:
    found = right(self, inputs)
    changed = found.labels._replace(value=1 - found.labels.value)
    return found._replace(labels=changed) if self.name == "quiet" else found

  monkeypatch.setattr(FutureEventKind, "label", label)
  dataset = prepared(tmp_path, CASES["text"], "calendar")
  with pytest.raises(CheckError, match="task quiet"):
    check.check_dataset(dataset.path)


def test_items_joined_and_bad_rows_dropped_are_derived_too(tmp_path: pathlib.Path) -> None:
  rows = ["who;when;item;n"]
  for i in range(120):
    user, number = ("", "x")[i % 40 == 7] if i % 40 < 8 and i % 40 > 5 else f"u{i % 9}", "n/a" if i % 31 == 3 else i % 5
    rows.append(f"{user};{1_700_000_000 + 40_000 * (i * 7 % 120)};i{i % 6};{number}")
  (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
  pq.write_table(
    pa.table({"id": [f"i{i}" for i in range(5)], "brand": ["a", "b", None, "a", "c"]}), tmp_path / "i.parquet"
  )
  log = {"files": [str(tmp_path / "log.csv")], "user": "who", "time": "when"}
  log["items"] = {"file": str(tmp_path / "i.parquet"), "key": "id"}
  # the key of the items has to stand in the events under the same name
  (tmp_path / "log.csv").write_text((tmp_path / "log.csv").read_text().replace("item", "id", 1))
  split = {"train_end": "2023-12-20", "validation": ["2023-12-21"], "test": ["2023-12-30"], "snapshots": "every_events"}
  raw = {
    "data": {
      "path": str(tmp_path / "dataset"),
      "sources": {"log": log},
      "fields": {"brand": {}, "n": {"kind": "numeric"}},
      "split": {**split, "every_events": 3},
      "on_bad_rows": "drop",
    },
    "tasks": {
      "next": {"kind": "next_event", "field": "brand"},
      "much": {"kind": "event_label", "field": "n", "at_least": 3.0},
      "brands": {"kind": "future_values", "field": "brand", "top": 3, "horizon_days": 5.0},
    },
  }
  manifest = prepare.prepare(config.resolve(raw))
  assert set(manifest["reading"]["dropped"]) == {"null_user", "unparsable_field_n"}
  compared = check.check_dataset(pathlib.Path(raw["data"]["path"]))
  assert {n: c.labels for n, c in compared.items()} == {
    n: sum(c["known"] for c in of.values()) for n, of in manifest["labels"].items()
  }


def test_a_changed_file_is_an_error_before_anything_is_compared(
  tmp_path_factory: pytest.TempPathFactory, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path = copied(folder_once(tmp_path_factory, "text", "calendar"), tmp_path)
  assert check.check_dataset(path, sample=1)
  with (tmp_path / "views-1.csv").open("a") as out:
    out.write("1,2024-04-01,a,yes,1.0\n")
  monkeypatch.setattr(check.raw_events, "load_raw_events", lambda *unused: pytest.fail("the files were read"))
  with pytest.raises(DataError, match=r"have changed; prepare again.*views-1\.csv, which has changed"):
    check.check_dataset(path)
  (tmp_path / "views-1.csv").unlink()
  with pytest.raises(DataError, match=r"views-1\.csv, which is not there"):
    check.check_dataset(path)


def test_the_sample_is_drawn_by_its_seed(tmp_path_factory: pytest.TempPathFactory) -> None:
  path = prepared_once(tmp_path_factory, "text", "calendar").path
  few = [check.check_dataset(path, sample=2, seed=seed)["price"].labels for seed in (1, 1, 2, 3, 4)]
  assert few[0] == few[1] and len(set(few)) > 1
  assert max(few) < check.check_dataset(path)["price"].labels


def test_the_verb_says_what_was_compared_and_fails_with_one_line(
  tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  path = str(prepared_once(tmp_path_factory, "text", "calendar").path)
  assert cli.main(["check", "--data", path, "--sample", "5", "--seed", "3"]) == 0
  assert "  quiet: " in capsys.readouterr().out
  assert cli.main(["check", "--data", path, "--sample", "0"]) == 1
  assert "--sample=0 must be at least 1" in capsys.readouterr().err
  wrong(monkeypatch, lambda record: record | {"label_quiet": 1 - record["label_quiet"]})
  assert cli.main(["check", "--data", path]) == 1
  error = capsys.readouterr().err
  assert "task quiet" in error and "Traceback" not in error


@pytest.mark.parametrize("encoding", ["standardise", "log1p"])
def test_amounts_of_clipped_numbers_agree(tmp_path: pathlib.Path, encoding: str) -> None:
  """A number far beyond those of training counts in an amount as the records hold it."""
  day, start = 86_400, config.parse_time("2024-01-01", "") // 1_000_000
  events = [(f"u{u}", start + (u * 7 + k * 5) % 60 * day + u, 1.5 + k % 4) for u in range(12) for k in range(10)]
  events.append(("u3", start + 58 * day, 1e9))
  events.append(("u4", start + 58 * day, None))
  columns = dict(zip(("who", "at", "paid"), map(list, zip(*events))))
  pq.write_table(pa.table(columns), tmp_path / "log.parquet")
  task = {"kind": "future_amount", "field": "paid", "horizon_days": 5.0}
  raw = {
    "data": {
      "path": str(tmp_path / "dataset"),
      "sources": {"log": {"files": [str(tmp_path / "log.parquet")], "user": "who", "time": "at"}},
      "fields": {"paid": {"kind": "numeric", "encoding": encoding}},
      "split": {"train_end": "2024-02-05", "validation": ["2024-02-06"], "test": ["2024-02-24"]},
    },
    "tasks": {of: {**task, "of": of} for of in ("sum", "max", "mean")},
  }
  manifest = prepare.prepare(config.resolve(raw))
  assert ("clipped" in str(manifest["warnings"])) == (encoding == "standardise")
  found = check.check_dataset(tmp_path / "dataset")
  assert all(compared.labels > 50 for compared in found.values())


def test_conditions_on_fields_of_the_table_of_users_are_derived_too(tmp_path: pathlib.Path) -> None:
  write_lines(tmp_path, random_lines(4))
  rows = [f"c{i};{('north', 'south', '')[i % 3]};{i},5" for i in range(11)]  # one customer has no row
  (tmp_path / "people.csv").write_text("\n".join(["customer;region;age", *rows]) + "\n")
  where = "region == 'north' and age >= 3.5 and paid > 0"
  tasks: dict[str, Any] = {
    "rich": {"kind": "future_event", "where": where, "horizon_days": 20.0},
    "then": {"kind": "next_event", "field": "article", "where": f"not ({where})"},
  }
  raw = baskets_config(tmp_path, tasks)
  raw["data"]["users"] = {"files": [str(tmp_path / "people.csv")], "user": "customer", "decimal": ","}
  raw["data"]["fields"] |= {
    "region": {"table": "users"},
    "age": {"table": "users", "kind": "numeric", "sources": ["web"]},
  }
  manifest = prepare.prepare(config.resolve(raw))
  counts = manifest["labels"]["rich"]["train"]
  assert 0 < counts["positive"] < counts["known"]
  compared = check.check_dataset(tmp_path / "dataset")
  assert all(n.labels for n in compared.values())
