"""Appending files gives what preparing all of them at once gives, under the stated policy for vocabularies."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from raw_case import TEMPORAL, USERS, WAYS, Case, Row, moment, random_case, random_rows, raw_config, write_case
from small_log import raw_config as small_config
from small_log import write_log

from supermoe_jax import cli, config
from supermoe_jax.data import append, batches, check, prepare, replace, shards, splits
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.events import DataError
from supermoe_jax.data.vocabulary import UNKNOWN, Encoders

KNOWN = ("a", "b", "c", None)  # items that are in every vocabulary, for they are anchors'
QUIET: dict[str, Any] = {"say": lambda text: None}


def new_rows(seed: int, views: int, buys: int, keep: Callable[[Row], bool]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
  """Rows of users old and new."""
  rng = random.Random(seed)
  rows = [*random_rows(rng, "views", views, USERS), *random_rows(rng, "buys", buys, USERS)]
  kept = [row for row in rows if keep(row)]
  return tuple(r for r in kept if r.source == "views"), tuple(r for r in kept if r.source == "buys")


def write_rows(folder: pathlib.Path, case: Case, number: int, views: tuple[Row, ...], buys: tuple[Row, ...]) -> None:
  """Writes more files of a case: `views-N-1`, `views-N-2` and `buys-N`."""
  with tempfile.TemporaryDirectory() as name:
    other = pathlib.Path(name)
    write_case(other, dataclasses.replace(case, views=views, buys=buys))
    for half in (1, 2):  # as `write_case` divides the views
      shutil.move(other / f"views-{half}.{case.formats[0]}", folder / f"views-{number}-{half}.{case.formats[0]}")
    shutil.move(other / f"buys-1.{case.formats[1]}", folder / f"buys-{number}.{case.formats[1]}")


def whole_config(folder: pathlib.Path, case: Case, way: str, buys: tuple[int, ...]) -> config.Config:
  raw = raw_config(folder, case, way)
  raw["data"]["sources"]["buys"]["files"] = [str(folder / f"buys-{n}.{case.formats[1]}") for n in buys]
  return config.resolve(raw)


def compare(one: Dataset, two: Dataset) -> None:
  assert len(one) == len(two)
  for i in range(len(one)):
    a, b = one[i], two[i]
    assert a.keys() == b.keys() and a["user"] == b["user"]
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=f"{key} of user {a['user']}")


NOT_COMPARED = ("shards", "contents", "digest", "seconds", "appends", "files", "data_hash", "config")


def facts(dataset: Dataset, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
  """What the manifest says, the folder that the files lie in left out."""
  manifest = json.loads(json.dumps(dataset.manifest).replace(str(dataset.path.parent), ""))
  return {k: v for k, v in manifest.items() if k not in (*NOT_COMPARED, *leave_out)}


def appended(folder: pathlib.Path, case: Case, way: str, parts: list[Any], **settings: Any) -> Dataset:
  """Prepares a case and appends the parts, one after the other."""
  folder.mkdir()
  write_case(folder, case)
  cfg = whole_config(folder, case, way, (1,))
  prepare.prepare(cfg, **QUIET)
  for number, (views, buys) in enumerate(parts, 3):
    write_rows(folder, case, number, views, buys)
    files = {"views": [str(folder / f"views-{number}-*.{case.formats[0]}")]}
    files |= {"buys": [str(folder / f"buys-{number}.{case.formats[1]}")]}
    append.append(pathlib.Path(cfg.data.path), files, **settings, **QUIET)
  return Dataset(cfg.data.path)


def at_once(folder: pathlib.Path, case: Case, way: str, parts: list[Any]) -> config.Config:
  """Writes all files of a case and its parts, and returns the config that reads them."""
  folder.mkdir()
  write_case(folder, case)
  for number, (views, buys) in enumerate(parts, 3):
    write_rows(folder, case, number, views, buys)
  return whole_config(folder, case, way, (1, *range(3, 3 + len(parts))))


@settings(max_examples=3, deadline=None)
@example(449, "drop", "")
@given(st.integers(0, 99_999), st.sampled_from(["keep", "drop"]), st.sampled_from(["", "2024-05-01"]))
@pytest.mark.parametrize("way", sorted(WAYS))
def test_appending_twice_is_preparing_once_with_the_first_encoders(
  way: str, seed: int, duplicates: str, end: str
) -> None:
  """Rows of any time: every record and every count is that of all files at once, encoded by the first encoders."""
  case = dataclasses.replace(random_case(seed, 30, 12), duplicates=duplicates, log_end=end, min_count=1)

  def keep(row: Row) -> bool:  # a value out of vocabulary is never a duplicate, by policy
    return duplicates == "keep" or (row.item in KNOWN and row.click != "maybe")

  parts = [new_rows(seed + i, 14, 6, keep) for i in (1, 2)]
  if not all(len(views) > 1 and buys for views, buys in parts):
    return
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    got = appended(folder / "one", case, way, parts, keep_vocabularies=True)
    cfg = at_once(folder / "two", case, way, parts)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(prepare, "_encoders", lambda log, cfg, labels, path: saved(got.encoders, path))
      prepare.prepare(cfg, **QUIET)
    wanted = Dataset(cfg.data.path)
    compare(got, wanted)
    # The statistics of aggregates stay those of the first files; which values are hashed is known of these only.
    one, two = (facts(d, ("aggregates", "encoding_hash")) for d in (got, wanted))
    for fields in (one["fields"], two["fields"]):
      for field in fields.values():
        field.pop("values", None), field.pop("colliding", None)
    if duplicates == "keep":  # then some rows hold values out of vocabulary, which are never taken to be equal
      assert one["reading"].pop("duplicate_rows") <= two["reading"].pop("duplicate_rows")
    assert one == two
    check.check(got.path, sample=20)


def saved(encoders: Encoders, path: pathlib.Path) -> Encoders:
  encoders.save(path)
  return encoders


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 99_999), st.sampled_from(["", "2024-05-01"]), st.integers(1, 3))
@pytest.mark.parametrize("way", ["calendar", "gap", "every_events", "end"])
def test_days_after_the_training_period_leave_nothing_different(way: str, seed: int, end: str, n: int) -> None:
  """Then no policy is needed: encoders, statistics and the whole manifest are those of all files at once."""
  case = dataclasses.replace(random_case(seed, 40, 15), log_end=end)
  until = moment(TEMPORAL["train_end"])  # type: ignore[arg-type]
  parts = [new_rows(seed + i, 20, 9, lambda row: row.time >= until) for i in range(n)]
  if not all(len(views) > 1 and buys for views, buys in parts):
    return
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    got = appended(folder / "one", case, way, parts)
    cfg = at_once(folder / "two", case, way, parts)
    prepare.prepare(cfg, **QUIET)
    wanted = Dataset(cfg.data.path)
    compare(got, wanted)
    one, two = facts(got), facts(wanted)
    # Values out of vocabulary are never taken to be equal.
    assert one["reading"].pop("duplicate_rows") <= two["reading"].pop("duplicate_rows")
    assert one == two
    for a in sorted((wanted.path / "encoders").iterdir()):
      assert a.read_bytes() == (got.path / "encoders" / a.name).read_bytes()


@pytest.mark.parametrize("way", ["calendar", "gap", "every_events", "user", "user, every_events"])
@pytest.mark.parametrize("days", [-20, 30])
def test_events_before_the_first_or_after_the_last_move_the_calendar_of_all_users(way: str, days: int) -> None:
  case = dataclasses.replace(random_case(1, 30, 12), min_count=1)
  views, buys = new_rows(1, 9, 4, lambda row: row.item in KNOWN and row.click != "maybe")
  shift = days * 86_400_000_000
  parts = [tuple(tuple(dataclasses.replace(row, time=row.time + shift) for row in rows) for rows in (views, buys))]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    got = appended(folder / "one", case, way, parts, keep_vocabularies=True)
    cfg = at_once(folder / "two", case, way, parts)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(prepare, "_encoders", lambda log, cfg, labels, path: saved(got.encoders, path))
      prepare.prepare(cfg, **QUIET)
    wanted = Dataset(cfg.data.path)
    compare(got, wanted)
    for key in ("tally", "snapshots_with_too_few_events", "repeated_snapshots", "events_by_period", "labels", "log"):
      assert got.manifest[key] == wanted.manifest[key]


# ----------------------------------------------------------------------------------------------- what is written anew


@pytest.fixture
def small(tmp_path: pathlib.Path) -> config.Config:
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["split"]["log_end"] = "2024-09-01"
  cfg = config.resolve(raw)
  prepare.prepare(cfg, **QUIET)
  return cfg


def write_visits(folder: pathlib.Path, name: str, user: int, pages: list[str], day: str = "2024-06-20") -> str:
  n = len(pages)
  time = np.datetime64(day, "us") + np.arange(n)
  pq.write_table(
    pa.table({"user": [user] * n, "time": time, "page": pages, "device": ["web"] * n, "seconds": [1.0] * n}),
    folder / name,
  )
  return str(folder / name)


def test_only_users_with_new_events_are_written_anew(small: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(small.data.path)
  before = Dataset(path)
  old = {before[i]["user"]: before[i] for i in range(len(before))}
  files = {f.name: (f.stat().st_ino, f.read_bytes()) for f in (path / shards.DIRECTORY).glob("*.array_record-*")}
  append.append(path, {"visits": [write_visits(tmp_path, "day.parquet", 3, ["page0"])]}, **QUIET)
  now = {f.name: (f.stat().st_ino, f.read_bytes()) for f in (path / shards.DIRECTORY).glob("*.array_record-*")}
  assert files.items() <= now.items() and len(now) == len(files) + 1
  after = Dataset(path)
  assert after.records == len(old) + 1 and len(after) == len(old)
  for i in range(len(after)):
    record = after[i]
    same = len(record["time"]) == len(old[record["user"]]["time"])
    assert same == (record["user"] != "3")
  assert after.manifest["appends"][0] | {"files": []} == {
    "number": 1,
    "beyond_patterns": {"visits": [str(tmp_path / "day.parquet")], "buys": []},
    "files": [],
    "events": 1,
    "repeats_of_earlier_events": 0,
    "new_users": 0,
    "users_with_new_events": 1,
    "users_with_other_labels": 0,
    "vocabularies": {"page": {"added": 0, "first": [], "left_out": 0}},
  }
  assert next(iter(batches.training(after, small))).features.time is not None


def test_labels_that_are_observed_now_are_written_of_users_without_new_events(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["split"]["test"] = ["2024-06-15"]  # so late that no window of a label ends before the log does
  cfg = config.resolve(raw)
  assert prepare.prepare(cfg, **QUIET)["labels"]["quiet"]["test"]["known"] == 0
  path = pathlib.Path(cfg.data.path)
  manifest = append.append(path, {"visits": [write_visits(tmp_path, "x.parquet", 3, ["page0"], "2024-07-10")]}, **QUIET)
  after = Dataset(path)
  asked = [after[i]["user"] for i in range(12) if (after[i]["snapshot_split"] == 2).any()]
  assert manifest["labels"]["quiet"]["test"]["known"] == len(asked) > 9
  assert manifest["appends"][0]["users_with_other_labels"] == len({*asked} - {"3"})
  check.check(path, sample=12)


@pytest.mark.parametrize(
  ("fields", "pages", "repeats"),
  [
    ({"page": {"kind": "hash", "size": 2}}, [f"page{i}" for i in range(7)], 0),
    ({"page": {"size": 2, "buckets": 2}}, [f"other{i}" for i in range(7)], 0),
    ({"page": {"many": 2, "separator": "|"}}, ["page0|page1|page2", "page0|page1|page3", "page0"], 1),
    ({"page": {}, "hashed": {"kind": "hash", "size": 2, "column": "page"}}, ["page0", "page1"], 2),
  ],
)
def test_events_are_repeats_only_if_their_values_are_known_to_be_equal(
  tmp_path: pathlib.Path, fields: dict[str, Any], pages: list[str], repeats: int
) -> None:
  """Not those whose values are hashed alike, or whose lists are alike as far as they are kept."""
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"] |= {"fields": {**fields, "seconds": {"kind": "numeric"}}, "duplicates": "drop", "aggregates": {}}
  raw["data"]["sources"].pop("buys")
  raw["data"]["sources"]["visits"]["files"].append(write_visits(tmp_path, "day.parquet", 3, pages))
  raw["tasks"] = {"quiet": raw["tasks"]["quiet"]}
  cfg = config.resolve(raw)
  events = prepare.prepare(cfg, **QUIET)["events"]
  again = append.append(
    pathlib.Path(cfg.data.path), {"visits": [write_visits(tmp_path, "new.parquet", 3, pages)]}, **QUIET
  )
  assert again["appends"][0]["repeats_of_earlier_events"] == repeats
  assert again["events"] == events + len(pages) - repeats


def test_a_dataset_that_was_opened_before_stays_what_it_was(tmp_path: pathlib.Path) -> None:
  """A training process goes on with the users that it knows, and with those of them that it may look at."""
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["split"] = {"mode": "user", "log_end": "2024-09-01", "user_validation": 0.3, "user_test": 0.3}
  raw["tasks"] = {"paid": raw["tasks"]["paid"]}
  cfg = config.resolve(raw)
  prepare.prepare(cfg, **QUIET)
  path = pathlib.Path(cfg.data.path)
  opened, training = Dataset(path), Dataset(path).training_users
  files = [write_visits(tmp_path, f"{user}.parquet", user, ["page0"]) for user in range(50, 58)]
  append.append(path, {"visits": files}, **QUIET)
  assert len(Dataset(path)) == 20 and len(opened) == 12
  np.testing.assert_array_equal(opened.training_users, training)
  assert all(opened[i]["user_split"] == splits.TRAIN for i in opened.training_users)


# ------------------------------------------------------------------------------------------------------- vocabularies


def test_new_values_of_training_follow_the_old_ones_and_others_stay_unknown(
  small: config.Config, tmp_path: pathlib.Path
) -> None:
  path = pathlib.Path(small.data.path)
  before = Dataset(path).encoders.categorical["page"]
  pages = ["new b", "new a", "new a", "page0", "new b", "new c"]
  file = write_visits(tmp_path, "late.parquet", 3, pages, "2024-02-02")
  later = write_visits(tmp_path, "later.parquet", 4, ["later"], "2024-06-20")
  manifest = append.append(path, {"visits": [file, later]}, **QUIET)
  after = Dataset(path)
  page = after.encoders.categorical["page"]
  assert page.values == [*before.values, "new a", "new b", "new c"]
  assert page.counts.tolist()[-3:] == [2, 2, 1]
  assert page.counts[page.code("page0") - 2] == before.counts[before.code("page0") - 2] + 1
  assert manifest["appends"][0]["vocabularies"]["page"] == {
    "added": 3,
    "first": ["new a", "new b", "new c"],
    "left_out": 0,
  }
  records = {after[i]["user"]: after[i] for i in range(len(after))}
  column = after.schema.field("page")
  here = np.isin(records["3"]["time"], np.datetime64("2024-02-02", "us").astype(np.int64) + np.arange(6))
  assert records["3"]["codes"][here, column].tolist() == [page.code(p) for p in pages]
  assert records["4"]["codes"][-1, column] == UNKNOWN
  assert after.schema.outputs["next_page"] == len(page.values)
  assert after.manifest["encoding_hash"] != Dataset(path).manifest["files"]
  check.check(path, sample=50)


def test_what_others_had_before_a_value_had_a_code_stays_unknown_and_is_right(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["fields"]["page"]["min_count"] = 2
  late = ((5, "rare", "2024-06-20"), (6, "page0", "2024-06-25"))
  files = [write_visits(tmp_path, f"visits-{user}.parquet", user, [page], day) for user, page, day in late]
  raw["data"]["sources"]["visits"]["files"] += files
  raw["data"]["split"]["test"] = ["2024-06-20"]
  cfg = config.resolve(raw)
  prepare.prepare(cfg, **QUIET)
  path = pathlib.Path(cfg.data.path)
  append.append(path, {"visits": [write_visits(tmp_path, "day.parquet", 3, ["rare"] * 2, "2024-02-02")]}, **QUIET)
  after = Dataset(path)
  records = {after[i]["user"]: after[i] for i in range(len(after))}
  assert after.encoders.categorical["page"].code("rare") > UNKNOWN
  assert records["5"]["codes"][-1, after.schema.field("page")] == UNKNOWN
  asked = records["5"]["snapshot_split"] == 2
  assert records["5"]["label_next_page"][asked].tolist() == [UNKNOWN]
  check.check(path, sample=12)


@pytest.mark.parametrize(("setting", "left_out"), [({"min_count": 2}, 1), ({"size": None}, 3)])
def test_the_rule_of_fitting_decides_which_new_values_get_a_code(
  tmp_path: pathlib.Path, setting: dict[str, Any], left_out: int
) -> None:
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  if "size" in setting:  # as many as there are
    cfg = config.resolve(raw)
    prepare.prepare(cfg, **QUIET)
    setting = {"size": len(Dataset(cfg.data.path).encoders.categorical["page"].values)}
    shutil.rmtree(cfg.data.path)
  raw["data"]["fields"]["page"] = {**raw["data"]["fields"]["page"], **setting}
  cfg = config.resolve(raw)
  prepare.prepare(cfg, **QUIET)
  pages = ["new b", "new a", "new a", "new b", "new c"]
  file = write_visits(tmp_path, "late.parquet", 3, pages, "2024-02-02")
  manifest = append.append(pathlib.Path(cfg.data.path), {"visits": [file]}, **QUIET)
  values = manifest["appends"][0]["vocabularies"]["page"]
  assert (values["added"], values["left_out"]) == (3 - left_out, left_out)


def test_with_kept_vocabularies_models_stay_of_use(small: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(small.data.path)
  before = Dataset(path).manifest["encoding_hash"]
  file = write_visits(tmp_path, "late.parquet", 3, ["new"], "2024-02-02")
  manifest = append.append(path, {"visits": [file]}, keep_vocabularies=True, **QUIET)
  assert manifest["appends"][0]["vocabularies"]["page"] == {"added": 0, "first": [], "left_out": 1}
  assert manifest["encoding_hash"] == before


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_file_is_not_appended_twice(small: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(small.data.path)
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  append.append(path, {"visits": [file]}, **QUIET)
  with pytest.raises(DataError, match=r"day.parquet is part of .* already; its rows would count twice"):
    append.append(path, {"visits": [file]}, **QUIET)
  with pytest.raises(DataError, match="no file is new"):
    append.append(path, **QUIET)
  with pytest.raises(config.ConfigError, match="has no source 'visit'; did you mean 'visits'"):
    append.append(path, {"visit": [file]}, **QUIET)


def test_a_file_is_the_same_by_whatever_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["sources"]["visits"]["files"] = ["visits*.parquet"]
  raw["data"]["split"]["log_end"] = "2024-09-01"
  cfg = config.resolve(raw)
  prepare.prepare(cfg, **QUIET)
  path = pathlib.Path(cfg.data.path)
  (tmp_path / "link.parquet").symlink_to(tmp_path / "visits.parquet")
  for name in (str(tmp_path / "visits.parquet"), "./visits.parquet", "link.parquet"):
    with pytest.raises(DataError, match="already; its rows would count twice"):
      append.append(path, {"visits": [name]}, **QUIET)
  append.append(path, {"visits": [write_visits(tmp_path, "visits-2.parquet", 3, ["page0"])]}, **QUIET)
  assert Dataset(path).config.data.sources["visits"].files == ("visits*.parquet",)
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  with pytest.raises(DataError, match=r"day.parquet is named twice"):
    append.append(path, {"visits": [file, "day.parquet"]}, **QUIET)


def test_every_name_has_to_be_that_of_a_file(small: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(small.data.path)
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  for files in ({"visits": [file, str(tmp_path / "dya.parquet")]}, {"visits": [file], "buys": [str(tmp_path / "x*")]}):
    with pytest.raises(DataError, match=r"dya.parquet: no such file; did you mean 'day.parquet'|matches no file"):
      append.append(path, files, **QUIET)
  assert "appends" not in Dataset(path).manifest


def test_globs_over_folders_in_folders_are_followed(small: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(small.data.path)
  for folder in ("new", "new/x", "new/x/y"):
    (tmp_path / folder).mkdir()
    write_visits(tmp_path, f"{folder}/day.parquet", 3, ["page0"])
  pattern = str(tmp_path / "new/**/*.parquet")
  assert append.append(path, {"visits": [pattern]}, **QUIET)["appends"][0]["events"] == 3
  with pytest.raises(DataError, match="already; its rows would count twice"):
    append.append(path, {"visits": [str(tmp_path / "new/day.parquet")]}, **QUIET)


def test_a_bad_file_leaves_the_dataset_as_it_was(small: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(small.data.path)
  before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
  bad = tmp_path / "bad.csv"
  bad.write_text("user,time,page,device,seconds\n3,yesterday,page0,web,1\n")
  with pytest.raises(DataError, match=r"bad.csv: row 1: column 'time' holds 'yesterday'"):
    append.append(path, {"visits": [str(bad)]}, **QUIET)
  assert before == {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
  assert not list(path.parent.glob("dataset.*"))


def test_a_dataset_that_a_kill_left_beside_its_place_is_put_back(small: config.Config, tmp_path: pathlib.Path) -> None:
  """Between the two renames, or while what stood there before is removed."""
  path = pathlib.Path(small.data.path)
  before, whole = path.with_name("dataset.before"), Dataset(path).manifest
  path.rename(before)
  assert prepare.prepare(small, **QUIET) == whole and not before.exists()
  path.rename(before)
  append.append(path, {"visits": [write_visits(tmp_path, "day.parquet", 3, ["page0"])]}, **QUIET)
  assert Dataset(path).manifest["appends"] and not before.exists()
  before.mkdir()
  (before / "users.parquet").touch()
  shutil.rmtree(path)
  with pytest.raises(DataError, match="holds no prepared dataset"):
    append.append(path, {"visits": [str(tmp_path / "day.parquet")]}, **QUIET)


def test_only_one_process_at_a_time_writes_a_dataset(small: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(small.data.path)
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  with replace.replacing(path.with_name("other")), replace.replacing(path) as work:
    (work / "half").touch()
    with pytest.raises(DataError, match=r"dataset.incomplete is being written by another process"):
      append.append(path, {"visits": [file]}, **QUIET)
    with pytest.raises(DataError, match=r"dataset.incomplete is being written by another process"):
      prepare.prepare(small, overwrite=True, **QUIET)
    assert (work / "half").exists()
    shutil.copytree(path, work, dirs_exist_ok=True)
    (work / "half").unlink()
  append.append(path, {"visits": [file]}, **QUIET)
  assert not list(path.parent.glob("dataset.*"))


def test_what_stops_duckdb_is_told_in_one_line(small: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(small.data.path)
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"] * 200_000)
  with pytest.raises(DataError, match=r"appending to .*dataset failed: Out of Memory.*; the dataset is as it was"):
    append.append(path, {"visits": [file]}, memory="1MB", **QUIET)
  with pytest.raises(DataError, match="no file is named to be appended"):
    append.append(path, {"visits": []}, **QUIET)
  assert "appends" not in Dataset(path).manifest


def test_another_table_of_users_is_an_error(small: config.Config, tmp_path: pathlib.Path) -> None:
  assert small.data.users is not None
  table = pathlib.Path(small.data.users.files[0])
  content = table.read_bytes()
  table.write_bytes(content + b" ")
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  with pytest.raises(DataError, match="the table of users has changed"):
    append.append(pathlib.Path(small.data.path), {"visits": [file]}, **QUIET)


def test_files_that_a_pattern_matches_by_now_are_found_and_training_goes_on(tmp_path: pathlib.Path) -> None:
  """With globs the config stays the same: the one file serves prepare, append and train."""
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  first = pathlib.Path(raw["data"]["sources"]["visits"]["files"][0])
  raw["data"]["sources"]["visits"]["files"] = [str(first.with_name("visits*.parquet"))]
  cfg = config.resolve(raw)
  prepare.prepare(cfg, **QUIET)
  write_visits(tmp_path, "visits-2024-06-20.parquet", 77, ["page0", "page1"])
  with pytest.raises(DataError, match="supermoe append"):
    prepare.prepare(cfg, **QUIET)
  assert cli.main(["append", "--data", cfg.data.path]) == 0
  after = Dataset(cfg.data.path)
  after.check_matches(cfg)
  after.check_files()
  assert len(after) == 13 and after.manifest["appends"][0]["new_users"] == 1
  users = [after[i]["user"] for i in range(13)]
  assert "77" in users and users == sorted(users, key=lambda u: splits.user_hash(u))


def test_the_command_names_sources_and_tells_what_came(
  small: config.Config, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  file = write_visits(tmp_path, "day.parquet", 3, ["page0"])
  assert cli.main(["append", "--data", small.data.path, file]) == 1
  assert "names no source; write SOURCE=FILE, SOURCE one of visits, buys" in capsys.readouterr().err
  assert cli.main(["append", "--data", small.data.path, f"visits={file}"]) == 0
  said = capsys.readouterr().out
  assert f"config.data.sources.visits.files must match {file} too" in said
  assert "1 events appended: 1 users written anew, 0 of them new; 11 left as they were" in said


def test_only_whom_a_later_end_concerns_is_looked_at(tmp_path: pathlib.Path) -> None:
  """A log that goes on after every label window concerns the user of its last event, which no period held before."""
  write_log(tmp_path, users=12)
  cfg = config.resolve(small_config(tmp_path))
  prepare.prepare(cfg, **QUIET)
  path = pathlib.Path(cfg.data.path)
  before = Dataset(path)
  last = before.manifest["last_event_microseconds"]
  users = dataset_users(path)
  at_end = {user for user, time in users.items() if time == last}
  read: list[int] = []
  other = "3" if "3" not in at_end else "4"
  with pytest.MonkeyPatch.context() as patch:
    contents = Dataset.contents
    patch.setattr(Dataset, "contents", lambda self, places: [*map(read.append, places)] and contents(self, places))
    append.append(path, {"visits": [write_visits(tmp_path, "x.parquet", int(other), ["page0"], "2024-07-10")]}, **QUIET)
  assert {before[i]["user"] for i in set(read)} == at_end | {other}
  assert dataset_users(path)[other] == np.datetime64("2024-07-10", "us").astype(np.int64)
  check.check(path, sample=12)


def dataset_users(path: pathlib.Path) -> dict[str, int]:
  users = pq.read_table(path / "users.parquet")
  return dict(zip(users["user"].to_pylist(), users["last_event"].to_pylist(), strict=True))
