"""`check` agrees with what was prepared rightly, and finds what was not."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli, config
from supermoe_jax.data import check, prepare, snapshots
from supermoe_jax.data.check import CheckError
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.events import DataError
from supermoe_jax.data.labels import Labels, Snapshots
from supermoe_jax.data.records import Labeller, TaskLabels
from tests.fixtures.random_logs import FOLLOWING, FUTURE, OF_USER, WAYS, Case, prepared, random_case

CASE = random_case(7, 150, 60)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
  "case",
  [CASE, dataclasses.replace(CASE, formats=("parquet", "csv", "jsonl"), zone="America/New_York", duplicates="drop")],
  ids=["text", "parquet"],
)
def test_a_good_dataset_passes_and_every_label_is_compared(tmp_path: pathlib.Path, way: str, case: Case) -> None:
  dataset = prepared(tmp_path, case, way)
  assert max(len(dataset[i]["snapshot_time"]) for i in range(len(dataset))) <= check.SNAPSHOTS_A_USER or (
    way == "leave_one_out"
  )
  compared = check.check(dataset.path)
  known = {n: sum(c["known"] for c in of.values()) for n, of in dataset.manifest["labels"].items()}
  if way != "leave_one_out":
    assert {n: c.labels for n, c in compared.items()} == known
  assert compared.keys() == known.keys() and all(c.labels for c in compared.values())


def wrong(monkeypatch: pytest.MonkeyPatch, task: str, change: Callable[[Labels], Labels]) -> None:
  """Lets the labeller give wrong labels of one task."""
  right = Labeller._label

  def label(self: Labeller, name: str, *rest: Any) -> TaskLabels:
    found = right(self, name, *rest)
    return found._replace(labels=change(found.labels)) if name == task else found

  monkeypatch.setattr(Labeller, "_label", label)


@pytest.mark.parametrize("task", [*FUTURE, *FOLLOWING, *OF_USER])
def test_one_wrong_label_of_any_kind_is_found(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
  left = [1]

  def change(labels: Labels) -> Labels:
    """Changes the last known label of the first user who has one: another code or class, the opposite, a number
    more."""
    value, at = labels.value.copy(), np.argwhere(labels.known)
    if left and len(at):
      left.pop()
      here = tuple(at[-1])
      if task in ("price", "age"):
        value[here] += 0.01
      elif task == "next_item":
        value[here] = 3 if value[here] == 2 else 2
      else:
        here = (*here, 0) if task == "items" else here
        value[here] = 0 if value[here] else 1
    return labels._replace(value=value)

  wrong(monkeypatch, task, change)
  dataset = prepared(tmp_path, CASE, "user" if task in OF_USER else "gap")
  assert not left
  with pytest.raises(
    CheckError, match=rf"^user '\d+', snapshot 2024-.*, task {task}: .* holds .*, the raw files give "
  ):
    check.check(dataset.path)


@pytest.mark.parametrize(
  ("task", "known"),
  [*((n, True) for n in (*FUTURE, *FOLLOWING, *OF_USER)), ("items", False), ("click", False), ("tier", False)],
)
def test_a_wrong_indicator_is_found(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, task: str, known: bool
) -> None:
  wrong(monkeypatch, task, lambda labels: labels._replace(known=np.full_like(labels.known, known)))
  dataset = prepared(tmp_path, CASE, "every_events")
  with pytest.raises(CheckError, match=f"task {task}: .*{'the raw files give' if known else 'holds'} .*"):
    check.check(dataset.path)


@pytest.mark.parametrize(
  ("way", "what", "change"),
  [
    ("calendar", "visible events", lambda s: s._replace(n_events=np.maximum(s.n_events - 1, 1))),
    ("user", "its split", lambda s: s._replace(split=np.zeros_like(s.split))),
    ("gap", "its split", lambda s: s._replace(split=np.ones_like(s.split))),
    ("leave_one_out", "its split", lambda s: s._replace(split=np.zeros_like(s.split))),
    ("leave_one_out", "its time", lambda s: s._replace(time=s.time + 1)),
  ],
)
def test_a_wrong_snapshot_is_found(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  way: str,
  what: str,
  change: Callable[[Snapshots], Snapshots],
) -> None:
  right = snapshots.user_snapshots

  def changed(*arguments: Any) -> tuple[Snapshots, snapshots.LeftOut]:
    found, left_out = right(*arguments)
    return change(found), left_out

  monkeypatch.setattr(snapshots, "user_snapshots", changed)
  dataset = prepared(tmp_path, CASE, way)
  with pytest.raises(CheckError, match=rf"^user '\d+', snapshot .*, {what}: "):
    check.check(dataset.path)


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
  manifest = prepare.prepare(config.resolve(raw), say=lambda text: None)
  assert set(manifest["reading"]["dropped"]) == {"null_user", "unparsable_field_n"}
  compared = check.check(pathlib.Path(raw["data"]["path"]))
  assert {n: c.labels for n, c in compared.items()} == {
    n: sum(c["known"] for c in of.values()) for n, of in manifest["labels"].items()
  }


def test_a_changed_file_is_an_error_before_anything_is_compared(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  dataset = prepared(tmp_path, CASE, "calendar")
  with (tmp_path / "one" / "views-1.csv").open("a") as out:
    out.write("1,2024-04-01,a,yes,1.0\n")
  monkeypatch.setattr(check.raw, "load_events", lambda *unused: pytest.fail("the files were read"))
  with pytest.raises(DataError, match=r"have changed; prepare again.*views-1\.csv, which has changed"):
    check.check(dataset.path)
  (tmp_path / "one" / "views-1.csv").unlink()
  with pytest.raises(DataError, match=r"views-1\.csv, which is not there"):
    check.check(dataset.path)


def test_the_sample_is_drawn_by_its_seed(tmp_path: pathlib.Path) -> None:
  dataset = prepared(tmp_path, CASE, "calendar")
  few = [check.check(dataset.path, sample=2, seed=seed)["price"].labels for seed in (1, 1, 2, 3, 4)]
  assert few[0] == few[1] and len(set(few)) > 1
  assert max(few) < check.check(dataset.path)["price"].labels


def test_the_verb_says_what_was_compared_and_fails_with_one_line(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  good = prepared(tmp_path, CASE, "calendar")
  assert cli.main(["check", "--data", str(good.path), "--sample", "5", "--seed", "3"]) == 0
  assert "  quiet: " in capsys.readouterr().out
  wrong(monkeypatch, "quiet", lambda labels: labels._replace(value=1 - labels.value))
  bad: Dataset = prepared(tmp_path, CASE, "calendar", "two")
  assert cli.main(["check", "--data", str(bad.path)]) == 1
  error = capsys.readouterr().err
  assert "task quiet" in error and "Traceback" not in error
  assert cli.main(["check", "--data", str(good.path), "--sample", "0"]) == 1
  assert "--sample=0 must be at least 1" in capsys.readouterr().err
