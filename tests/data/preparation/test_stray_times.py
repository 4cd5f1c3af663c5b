"""A few rows of another time stretch no log: they are found and said, and their stretch does not count as observed."""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.data.append import append
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare, summary
from supermoe_jax.data.preparation.stray_times import usual_days

START = datetime.datetime(2024, 1, 1)
Write = Callable[..., pathlib.Path]


def rows(extra: Sequence[str] = (), first: int = 0, last: int = 60) -> dict[str, list[Any]]:
  """Twenty users with an event every second day of the days `first` … `last`, and more events of `who0`."""
  events = [
    (f"who{user}", START + datetime.timedelta(days=day + user % 2, hours=user), f"page{(user + day) % 5}")
    for user in range(20)
    for day in range(first, last, 2)
  ]
  events += [("who0", datetime.datetime.fromisoformat(time), "page0") for time in extra]
  return {"visitor": [e[0] for e in events], "at": [e[1] for e in events], "page": [e[2] for e in events]}


def raw(*files: pathlib.Path, **split: Any) -> dict[str, Any]:
  source = {"files": [str(file) for file in files], "user": "visitor", "time": "at"}
  periods = {"train_end": "2024-01-20", "validation": ["2024-01-20"], "test": ["2024-02-08"]}
  if split.get("mode") == "user":
    periods = {"user_validation": 0.3, "user_test": 0.3}
  return {
    "data": {
      "path": str(files[0].parent / "dataset"),
      "sources": {"visits": source},
      "fields": {"page": {}},
      "split": periods | split,
    },
    "tasks": {"gone": {"kind": "future_event", "source": "visits", "horizon_days": 28.0, "negate": True}},
  }


def prepared(*files: pathlib.Path, **split: Any) -> Dataset:
  cfg = config.resolve(raw(*files, **split))
  prepare.prepare(cfg)
  return Dataset(cfg.data.path)


def warnings(dataset: Dataset) -> list[str]:
  return [warning for warning in dataset.manifest["warnings"] if "far " in warning]


def test_one_row_of_a_later_year_leaves_labels_unknown(write: Write) -> None:
  plain, stretched = (
    prepared(write(f"{name}/visits.csv", rows(extra))) for name, extra in (("a", ()), ("b", ["2027-06-01"]))
  )
  for key in ("labels", "snapshots", "observed_until_microseconds"):
    assert stretched.manifest[key] == plain.manifest[key]
  assert stretched.manifest["labels"]["gone"]["test"]["known"] == 0  # 22 days of 28 are observed
  assert not warnings(plain)
  (said,) = warnings(stretched)
  assert f"1 of 601 events lies far after all others, which end at {plain.manifest['log']['last']}" in said
  assert f"{stretched.path.parent / 'visits.csv'} row 601 (2027-06-01T00:00:00)" in said
  assert "config.data.split.log_end" in said
  assert f"warning: {said}" in summary.dataset_summary(stretched.manifest)
  assert stretched.last_usual_event == plain.last_usual_event
  check.check_dataset(stretched.path, sample=20)


@pytest.mark.parametrize("snapshots", ["calendar", "every_events"])
def test_one_row_of_1970_makes_no_training_snapshot(write: Write, snapshots: str) -> None:
  settings = {"snapshots": snapshots, "every_events": 1}
  plain, stretched = (
    prepared(write(f"{name}/visits.parquet", rows(extra)), **settings)
    for name, extra in (("a", ()), ("b", ["1970-01-01"]))
  )
  assert stretched.manifest["snapshots"] == plain.manifest["snapshots"]
  (said,) = warnings(stretched)
  assert "1 of 601 events lies far before all others, which begin at 2024-01-01T00:00:00" in said
  assert "visits.parquet row 601 (1970-01-01T00:00:00)" in said and "config.data.split.train_start" in said
  check.check_dataset(stretched.path, sample=20)


def test_ends_that_the_config_sets_win(write: Write) -> None:
  file = write("visits.csv", rows(["1970-01-01", "2027-06-01"]))
  found = prepared(file, train_start="2023-12-01", log_end="2027-06-02")
  assert found.manifest["log"]["observed_until"] == "2027-06-02T00:00:00"
  assert found.manifest["labels"]["gone"]["test"]["known"] == 20
  # Three snapshots of each user, every five days, and seven earlier ones of the user who has the event of 1970.
  assert found.manifest["snapshots"]["train"] == 20 * 3 + 7
  assert not warnings(found)
  assert "config.data.split.log_end=2027-06-02 says what counts as observed" in summary.dataset_summary(found.manifest)


def test_a_split_of_users_and_leave_one_out_say_stray_rows_too(write: Write) -> None:
  file = write("visits.csv", rows(["2099-01-01"]))
  by_user = prepared(file, mode="user")
  assert by_user.manifest["log"]["observed_until"].startswith("2024-02-29") and len(warnings(by_user)) == 1
  leave = raw(file)
  leave["data"]["split"], leave["data"]["path"] = {"mode": "leave_one_out"}, str(file.parent / "other")
  leave["tasks"] = {"next": {"kind": "next_event", "field": "page"}}
  prepare.prepare(config.resolve(leave))
  (said,) = warnings(Dataset(file.parent / "other"))
  assert "visits.csv row 601 (2099-01-01T00:00:00)" in said


@pytest.mark.parametrize("extra", [["1970-01-01"], ["2027-06-01"], ["1970-01-01", "1970-01-02", "2027-06-01"]])
def test_an_append_with_stray_rows_is_as_preparing_all_at_once(write: Write, extra: list[str]) -> None:
  old = [write(f"{name}/visits.csv", rows(last=40)) for name in "ab"]
  new = [write(f"{name}/more.csv", rows(extra, first=40)) for name in "ab"]
  once = prepared(old[0], new[0])
  path = prepared(old[1]).path
  manifest = append.append(path, {"visits": [str(new[1])]})
  for key in ("labels", "snapshots", "events_by_day", "observed_until_microseconds"):
    assert manifest[key] == once.manifest[key], key
  assert json.dumps(manifest["stray_times"]).replace(str(path.parent), "") == json.dumps(
    once.manifest["stray_times"]
  ).replace(str(once.path.parent), "")
  assert len(warnings(once)) == len(warnings(Dataset(path))) == len({time[:4] for time in extra})
  assert f"warning: {warnings(Dataset(path))[0]}" in summary.append_summary(manifest)
  check.check_dataset(path, sample=20)


def test_rows_that_an_append_joins_to_the_others_are_no_longer_stray(write: Write) -> None:
  file = write("a/visits.csv", rows(["2024-06-01"], last=40))
  found = prepared(file)
  assert found.manifest["log"]["observed_until"] < "2024-02-11" and len(warnings(found)) == 1
  append.append(found.path, {"visits": [str(write("a/more.csv", rows(first=40, last=160)))]})
  after = Dataset(found.path)
  assert after.manifest["stray_times"] is None and not warnings(after)
  assert after.manifest["log"]["observed_until"] == after.manifest["log"]["last"]
  check.check_dataset(found.path, sample=20)


@given(
  st.lists(st.integers(1, 50), min_size=1, max_size=200),
  st.lists(st.integers(1, 40), min_size=1, max_size=20),
  st.integers(-20_000, 20_000),
)
def test_days_without_stray_rows_stay_as_they_are(counts: list[int], gaps: list[int], first: int) -> None:
  """Pauses that recur make no row stray, however few rows lie after the last of them."""
  days, day = {}, first
  for i, count in enumerate(counts):
    days[day] = count
    day += gaps[i % len(gaps)] if len(counts) > 3 * len(gaps) else 1
  assert usual_days(days) == (min(days), max(days))


@given(st.integers(100, 400), st.integers(1, 365), st.integers(1, 60), st.booleans())
def test_a_row_beyond_a_long_gap_is_stray(per_day: int, span: int, gap: int, before: bool) -> None:
  days = dict.fromkeys(range(span), per_day)
  far = max(gap, 11, span + 1)
  days[-far if before else span - 1 + far] = 1
  assert usual_days(days) == (0, span - 1)


def test_a_hundredth_of_the_rows_is_a_part_of_the_log() -> None:
  assert usual_days({0: 99, 1000: 1}) == (0, 0)
  assert usual_days({0: 98, 1000: 2}) == (0, 1000)
  assert usual_days({0: 98, 1000: 1}) == (0, 1000)  # 99 rows: one is more than a hundredth
