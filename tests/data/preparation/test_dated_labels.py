"""Dated labels in a whole preparation: periods, delays, joins, and what the added snapshots hold."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from supermoe_jax import cli, config
from supermoe_jax.data.append import append
from supermoe_jax.data.check import check
from supermoe_jax.data.check.check import CheckError
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.snapshot_batches import query_batches
from supermoe_jax.data.encoding.splits import TEST
from supermoe_jax.data.preparation import prepare, summary
from supermoe_jax.data.tasks import question
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.dated_labels import SPLIT, labels, stamp

Write = Callable[..., pathlib.Path]


def make(write: Write, rows: list[tuple[Any, ...]], split: dict[str, Any] | None = None, **task: Any) -> config.Config:
  """A log of ten accounts with an event each day at noon until 2024-03-20, and dated labels `(account, day, risk)`."""
  noon = datetime.datetime(2024, 1, 1, 12)
  times = [noon + datetime.timedelta(days=d) for d in range(80)]
  log = {"account": [f"acc{a}" for a in range(10) for _ in times], "at": times * 10}
  log["shop"] = [f"s{(a * 3 + d) % 7}" for a in range(10) for d in range(80)]
  events = write("log.parquet", log)
  labels = write("risk.csv", {k: [row[i] for row in rows] for i, k in enumerate(("account", "day", "risk"))})
  tasks: dict[str, Any] = {
    "risky": {
      "kind": "dated_label",
      "files": [str(labels)],
      "user": "account",
      "time": "day",
      "column": "risk",
      **task,
    },
    "shop": {"kind": "next_event", "field": "shop"},
    "gone": {"kind": "future_event", "source": "log", "horizon_days": 3.0, "negate": True},
  }
  source = {"files": [str(events)], "user": "account", "time": "at"}
  data = {"path": str(events.parent / "dataset"), "sources": {"log": source}, "fields": {"shop": {}}}
  sizes = {"d_model": 16, "heads": 2, "d_hidden": 16, "d_expert": 16, "experts": 4, "max_events": 32}
  train = {"steps": 2, "warmup_steps": 1, "batch_rows": 4}
  return config.resolve({"data": {**data, "split": split or SPLIT}, "tasks": tasks, "model": sizes, "train": train})


def test_the_time_of_a_row_decides_its_split_and_what_the_model_sees(write: Write) -> None:
  days = ("2024-01-20T12:00:00", "2024-01-20T12:00:01", "2024-02-01", "2024-02-29T23:59:59", "2024-03-01", "2024-03-20")
  found, counts = labels(make(write, [("acc3", day, i % 2) for i, day in enumerate(days)]))
  assert found["acc3"] == [
    ("train", "2024-01-20T12:00:00", 19, 0.0),  # the event at the row's own time is not seen
    ("train", "2024-01-20T12:00:01", 20, 1.0),
    ("validation", "2024-02-01T00:00:00", 31, 0.0),
    ("validation", "2024-02-29T23:59:59", 60, 1.0),
    ("test", "2024-03-01T00:00:00", 60, 0.0),
    ("test", "2024-03-20T00:00:00", 79, 1.0),
  ]
  assert counts["placed"] == {"train": 2, "validation": 2, "test": 2}
  assert not any(found[f"acc{i}"] for i in range(10) if i != 3)


def test_rows_outside_the_periods_are_counted(write: Write) -> None:
  split = {**SPLIT, "train_start": "2024-01-10", "gap_days": 5.0, "validation": ["2024-02-06"]}
  outside = ("2024-01-09", "2024-02-01", "2024-02-05", "2024-02-25", "2024-02-28", "2024-03-20T12:00:01", "2025-01-01")
  inside = ("2024-01-10", "2024-01-31", "2024-02-06", "2024-02-24", "2024-03-01", "2024-03-20T12:00:00")
  found, counts = labels(make(write, [("acc0", day, 1) for day in (*outside, *inside)], split))
  assert counts["outside_periods"] == len(outside)
  assert [f"{time[:10]}" for _, time, *_ in found["acc0"]] == [day[:10] for day in inside]


def test_a_label_that_becomes_known_after_its_period_is_none(write: Write) -> None:
  days = ("2024-01-25", "2024-01-25T00:00:01", "2024-02-23", "2024-02-23T00:00:01", "2024-03-20")
  cfg = make(write, [("acc1", day, 1) for day in days], delay_days=7.0)
  found, counts = labels(cfg)
  assert [time for _, time, *_ in found["acc1"]] == [
    "2024-01-25T00:00:00",
    "2024-02-23T00:00:00",
    "2024-03-20T00:00:00",  # the table holds it, so it is known
  ]
  assert counts["known_too_late"] == 2


def test_labels_follow_the_users_where_the_split_is_of_users(write: Write) -> None:
  days = ("2024-01-05", "2024-02-14", "2024-03-19")
  rows = [(f"acc{a}", day, a % 2) for a in range(10) for day in days]
  shares = {"user_validation": 0.3, "user_test": 0.4}
  cfg = make(write, rows, {"mode": "user", "every_days": 20.0, **shares})
  found, _ = labels(cfg)
  data = Dataset(cfg.data.path)
  for record in map(data.__getitem__, range(len(data))):
    split = ("train", "validation", "test")[record["user_split"]]
    assert [(s, t[:10]) for s, t, *_ in found[record["user"]]] == [(split, day) for day in days]
  assert {s for of in found.values() for s, *_ in of} == {"train", "validation", "test"}
  check.check_dataset(data.path)


def test_what_gives_no_label_is_counted_and_said(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
  rows: list[tuple[Any, ...]] = [
    ("acc1", "2024-01-15", "low"),
    ("acc1", "2024-01-15", "high"),  # another label at this moment: the first row counts
    ("acc1", "2024-01-15", "low"),
    ("acc2", "2024-01-16", "high"),
    ("acc2", "2024-02-16", "odd"),  # no row for training has this class
    ("acc2", "2024-02-17", None),
    ("acc3", "2024-01-01", "low"),  # before the first event
    ("nobody", "2024-01-20", "low"),
    ("acc4", "2023-06-01", "low"),  # before the log begins
    ("acc4", "2026-06-01", "low"),  # after it ends
    ("acc5", "2024-03-05", "high"),
  ]
  cfg = make(write, rows, type="multiclass")
  found, counts = labels(cfg)
  assert Dataset(cfg.data.path).encoders.labels["risky"].values == ("low", "high")
  assert {u: [(s, v) for s, _, _, v in of] for u, of in found.items() if of} == {
    "acc1": [("train", 0.0)],
    "acc2": [("train", 1.0)],
    "acc5": [("test", 1.0)],
  }
  kept = {k: v for k, v in counts.items() if k != "files"}
  assert kept == {
    "empty_files": [],
    "dropped": {},
    "without_value": 1,
    "of_users_without_events": 1,
    "outside_periods": 1,
    "known_too_late": 0,
    "repeated": 2,
    "contradicting": 1,
    "unseen_class": 1,
    "placed": {"train": 4, "validation": 0, "test": 1},
  }
  text = summary.dataset_summary(Dataset(cfg.data.path).manifest)
  assert (
    "  risky: 6 of 11 rows give no label: 1 without a value, 1 of users without events, 1 outside the periods of the "
    "split, 1 with a class that no training row has, 2 with too few events before them\n"
    "  risky: 2 rows repeat the user and time of an earlier row and were left out; at 1 of these moments the labels "
    "differ, and the first row's label counts\n"
  ) in text
  assert "task risky has no label in validation" in text


def test_a_number_is_standardised_by_the_rows_for_training(write: Write) -> None:
  rows = [("acc1", "2024-01-15", 2.0), ("acc2", "2024-01-15", 6.0), ("acc3", "2024-02-15", 10.0)]
  found, counts = labels(make(write, rows, type="regression"))
  assert (counts["mean"], counts["std"]) == (4.0, 2.0)
  assert [found[u][0][3] for u in ("acc1", "acc2", "acc3")] == [-1.0, 1.0, 3.0]


def test_a_table_of_other_users_is_an_error_with_ids_of_both_sides(write: Write) -> None:
  cfg = make(write, [("ACC-1", "2024-01-15", 1), ("ACC-2", "2024-01-16", 0)])
  with pytest.raises(
    DataError, match=r"none of the 2 rows is of a user with events: column 'account' holds 'ACC-1', "
  ) as e:
    prepare.prepare(cfg)
  assert "the log's users are 'acc" in str(e.value) and "config.tasks.risky.user" in str(e.value)


def test_classes_and_numbers_need_a_row_for_training(write: Write) -> None:
  for type in ("multiclass", "regression"):
    with pytest.raises(
      DataError, match=r"no row of a user with events has a value in column 'risk' that may be used in"
    ):
      prepare.prepare(make(write, [("acc1", "2024-02-15", 1)], type=type))


def test_other_tasks_keep_their_labels_and_the_added_snapshots_have_none_of_theirs(write: Write) -> None:
  # One row lies at the time of a calendar snapshot, which keeps its own labels.
  rows = [("acc1", "2024-01-22", 1), ("acc1", "2024-01-12T06:00:00", 0), ("acc1", "2024-03-01", 0)]
  cfg = make(write, rows)
  prepare.prepare(cfg)
  without = dataclasses.replace(cfg, tasks={n: t for n, t in cfg.tasks.items() if n != "risky"})
  without = dataclasses.replace(without, data=dataclasses.replace(cfg.data, path=cfg.data.path + "_without"))
  manifest = prepare.prepare(without)
  both, plain = Dataset(cfg.data.path), Dataset(without.data.path)
  for a, b in zip(map(both.__getitem__, range(10)), map(plain.__getitem__, range(10)), strict=True):
    own = np.flatnonzero(~a["known_risky"].astype(bool))
    assert (np.diff(a["snapshot_time"]) >= 0).all()
    for key in b:
      of_snapshots = key.startswith(("snapshot", "known", "label"))
      np.testing.assert_array_equal(a[key][own] if of_snapshots else a[key], b[key])
    added = np.setdiff1d(np.arange(len(a["snapshot_time"])), own)
    assert len(added) == (3 if a["user"] == "acc1" else 0)
    for task in ("shop", "gone"):
      assert not a[f"known_{task}"][added].any() and not a[f"label_{task}"][added].any()
  assert {n: of for n, of in both.manifest["labels"].items() if n != "risky"} == manifest["labels"]
  assert "dated_labels" not in manifest


def test_training_and_evaluation_meet_the_labels(write: Write, tmp_path: pathlib.Path) -> None:
  rows = [(f"acc{a}", f"2024-0{m}-1{a}", a % 2) for a in range(10) for m in (1, 3)]
  cfg = make(write, rows)
  prepare.prepare(cfg)
  data = Dataset(cfg.data.path)
  batch = next(iter(training_batches.training_batches(data, cfg)))
  taught = batch.targets["risky"]
  assert taught.known.any() and not (taught.known & batch.targets["gone"].known).any()
  asked = [
    (q.user_id, float(b.labels["risky"].value[i]))
    for b in query_batches(data, cfg, split=TEST)
    for i, q in enumerate(b.questions)
    if b.labels["risky"].known[i]
  ]
  assert sorted(asked) == [(f"acc{a}", float(a % 2)) for a in range(10)]


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"data.split": {"mode": "leave_one_out"}}, "risky: a dated label needs .*leave_one_out has no periods"),
    ({"tasks.risky.files": []}, "risky.files is empty"),
    ({"tasks.risky.delay_days": -1.0}, "risky.delay_days=-1.0 must not be negative"),
    ({"tasks.risky.column": "day"}, "must be three columns"),
    ({"tasks.risky.type": "regression", "tasks.risky.positive": ["1"]}, "risky.positive has no meaning"),
    ({"tasks.gone.sample_space": "risky == 1"}, "gone and risky never have a label at one snapshot"),
    ({"tasks.risky.sample_space": "gone == 1"}, "risky and gone never have a label at one snapshot"),
  ],
)
def test_settings_that_can_never_work_name_their_key(write: Write, changes: dict[str, Any], said: str) -> None:
  raw = config.to_dict(make(write, [("acc1", "2024-01-15", 1)]))
  raw["tasks"].pop("gone") if "data.split" in changes else None
  for key, value in changes.items():
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
      node = node[parent]
    node[last] = value
  with pytest.raises(ConfigError, match=said):
    config.resolve(raw)


def test_the_question_in_words(write: Write) -> None:
  task = make(write, [("acc1", "2024-01-15", 1)]).tasks["risky"]
  said = {
    "binary": "risk is 1 at the time of a row of its table",
    "multiclass": "which value risk has at the time of a row of its table",
    "regression": "the number risk at the time of a row of its table, in standard deviations from its mean",
  }
  assert {type: question(dataclasses.replace(task, type=type)) for type in said} == said  # type: ignore[call-arg]


# ---------------------------------------------------------------------------------------------------------------- check


def test_check_finds_a_wrong_label_and_a_snapshot_that_is_missing(
  write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
  cfg = make(write, [(f"acc{a}", "2024-01-15T01:00:00", a % 2) for a in range(10)])
  prepare.prepare(cfg)
  path = pathlib.Path(cfg.data.path)
  assert check.check_dataset(path)["risky"].labels == 10
  right = Dataset.__getitem__

  def with_records(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, i: change(right(self, i)))

  with_records(lambda r: {**r, "label_risky": 1 - r["label_risky"]})
  with pytest.raises(CheckError, match=r"2024-01-15T01:00:00.* \(train, 14 events before it\), task risky"):
    check.check_dataset(path)
  with_records(lambda r: {**r, "known_shop": np.ones_like(r["known_shop"])})
  with pytest.raises(CheckError, match="task shop"):
    check.check_dataset(path)
  moved = stamp("2024-01-15T01:00:00")
  with_records(lambda r: {**r, "snapshot_time": r["snapshot_time"] + (r["snapshot_time"] == moved)})
  with pytest.raises(
    CheckError,
    match=r"2024-01-15T01:00:00.*, task risky: .* holds 'no snapshot at this time', the raw files give [01]\.0",
  ):
    check.check_dataset(path)


# --------------------------------------------------------------------------------------------------------------- append


def test_an_append_reads_new_files_of_labels(write: Write, tmp_path: pathlib.Path) -> None:
  first = [("acc1", "2024-01-15", 1), ("acc2", "2024-03-18", 0), ("acc6", "2024-03-25", 1)]
  cfg = make(write, first)
  raw = config.to_dict(cfg)
  raw["tasks"]["risky"]["files"] = [str(tmp_path / "risk*.csv")]
  cfg = config.resolve(raw)
  found, _ = labels(cfg)
  assert not found["acc6"]  # after the end of the log
  path = pathlib.Path(cfg.data.path)
  write(
    "risk-2.csv",
    {"account": ["acc2", "acc4", "new"], "day": ["2024-02-02", "2024-02-03", "2024-03-29"], "risk": [1, 1, 0]},
  )
  with pytest.raises(DataError, match=r"risk-2.csv is a new file of dated labels, but no file of events is new"):
    append.append(path)
  late = [datetime.datetime(2024, 3, 28, 12), datetime.datetime(2024, 3, 30, 12)]
  day = write("day.parquet", {"account": ["new", "new"], "at": late, "shop": ["s1", "s2"]})
  manifest = append.append(path, {"log": [str(day)]})
  assert manifest["dated_labels"]["risky"]["placed"] == {"train": 1, "validation": 2, "test": 3}
  assert known_risks(path) == {"acc1": [1], "acc2": [1, 0], "acc4": [1], "acc6": [1], "new": [0]}
  text = summary.append_summary(manifest)
  assert f"dated labels were read from 1 new file: {tmp_path / 'risk-2.csv'}\n" in text
  assert "users without new events were rewritten" in text
  check.check_dataset(path)
  (tmp_path / "risk.csv").write_text((tmp_path / "risk.csv").read_text() + "acc1,2024-01-16,0\n")
  other = write("day-2.parquet", {"account": ["new"], "at": [datetime.datetime(2024, 3, 31, 12)], "shop": ["s1"]})
  with pytest.raises(
    DataError, match=r"risk.csv: this file of config.tasks.risky.files has changed or is missing; prepare"
  ):
    append.append(path, {"log": [str(other)]})


def known_risks(path: pathlib.Path) -> dict[str, list[int]]:
  data = Dataset(path)
  found = {
    r["user"]: r["label_risky"][r["known_risky"].astype(bool)].tolist() for r in map(data.__getitem__, range(len(data)))
  }
  return {user: values for user, values in found.items() if values}


def test_the_command_prepares_and_says_the_counts(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
  cfg = make(write, [("acc1", "2024-01-15", 1), ("nobody", "2024-01-15", 0)])
  file = pathlib.Path(cfg.data.path).with_name("config.py")
  file.write_text(
    f"import ml_collections\n\n\ndef get_config():\n  return ml_collections.ConfigDict({config.to_dict(cfg)!r})\n"
  )
  assert cli.main(["prepare", "--config", str(file)]) == 0
  assert "risky: 1 of 2 rows give no label: 1 of users without events" in capsys.readouterr().out
  assert cli.main(["prepare", "--config", str(file)]) == 0  # the same settings: the dataset stays


def test_without_test_snapshots_dated_labels_until_the_end_of_the_log_are_for_validation(write: Write) -> None:
  days = ("2024-01-20", "2024-02-10", "2024-03-19")
  rows = [("acc3", day, i % 2) for i, day in enumerate(days)]
  cfg = make(write, rows, {**SPLIT, "test": []})
  found, counts = labels(cfg)
  assert [split for split, *_ in found["acc3"]] == ["train", "validation", "validation"]
  assert counts["placed"] == {"train": 1, "validation": 2, "test": 0}
  check.check_dataset(pathlib.Path(cfg.data.path))
