"""What an append writes anew, and what it makes of new values."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.batch import UNKNOWN
from supermoe_jax.config.tasks.kinds import TIES_ARE_COMMON
from supermoe_jax.data.append import append
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.format import shard_files
from supermoe_jax.data.preparation import prepare, summary
from tests.fixtures.new_visits import write_visits
from tests.fixtures.small_log import raw_config as small_config
from tests.fixtures.small_log import write_log


def test_only_users_with_new_events_are_written_anew(appendable: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(appendable.data.path)
  before = Dataset(path)
  old = {before[i]["user"]: before[i] for i in range(len(before))}
  encoding = before.manifest["encoding_hash"]
  files = {f.name: (f.stat().st_ino, f.read_bytes()) for f in (path / shard_files.DIRECTORY).glob("*.array_record-*")}
  append.append(path, {"visits": [write_visits(tmp_path, "day.parquet", 3, ["page0"])]})
  now = {f.name: (f.stat().st_ino, f.read_bytes()) for f in (path / shard_files.DIRECTORY).glob("*.array_record-*")}
  assert files.items() <= now.items() and len(now) == len(files) + 1
  after = Dataset(path)
  assert after.records == len(old) + 1 and len(after) == len(old)
  for i in range(len(after)):
    record = after[i]
    same = len(record["time"]) == len(old[record["user"]]["time"])
    assert same == (record["user"] != "3")
  appended = dict(after.manifest["appends"][0])
  assert appended.pop("reading")["rows_read"] == 1
  assert appended.pop("tie_rate_before") == before.manifest["reading"]["tie_rate"]
  assert appended | {"files": []} == {
    "number": 1,
    "encoding_before": encoding,
    "dataset_before": before.manifest["digest"],
    "records_before": len(old),
    "beyond_patterns": {"visits": [str(tmp_path / "day.parquet")], "buys": []},
    "files": [],
    "empty_files": [],
    "changed_item_tables": [],
    "events": 1,
    "repeats_of_earlier_events": 0,
    "new_users": 0,
    "users_with_new_events": 1,
    "users_with_other_labels": 0,
    "vocabularies": {"page": {"added": 0, "first": [], "left_out": 0}},
  }
  assert next(iter(training_batches.training_batches(after, appendable))).features.time is not None


def test_labels_that_are_observed_now_are_written_of_users_without_new_events(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["split"]["test"] = ["2024-06-15"]  # so late that no window of a label ends before the log does
  cfg = config.resolve(raw)
  assert prepare.prepare(cfg)["labels"]["quiet"]["test"]["known"] == 0
  path = pathlib.Path(cfg.data.path)
  manifest = append.append(path, {"visits": [write_visits(tmp_path, "x.parquet", 3, ["page0"], "2024-07-10")]})
  after = Dataset(path)
  asked = [after[i]["user"] for i in range(12) if (after[i]["snapshot_split"] == 2).any()]
  assert manifest["labels"]["quiet"]["test"]["known"] == len(asked) > 9
  assert manifest["appends"][0]["users_with_other_labels"] == len({*asked} - {"3"})
  check.check_dataset(path, sample=12)


def test_a_censored_time_is_followed_further_as_the_log_grows(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["split"]["test"] = ["2024-06-12"]  # the log ends a week later
  days = {"kind": "time_to_event", "source": "buys", "horizon_days": 60.0, "edges_days": [2.0, 20.0, 60.0]}
  raw["tasks"] = {"days_to_buy": days}
  prepare.prepare(cfg := config.resolve(raw))
  path = pathlib.Path(cfg.data.path)

  def ends(dataset: Dataset) -> set[float]:
    records = [dataset[i] for i in range(len(dataset))]
    found = np.concatenate([r["label_days_to_buy"][r["snapshot_split"] == 2] for r in records])
    return set(found[found[:, 1] == 0, 0].tolist())

  assert ends(Dataset(path)) == {2.0}
  manifest = append.append(path, {"visits": [write_visits(tmp_path, "x.parquet", 3, ["page0"], "2024-07-10")]})
  assert ends(Dataset(path)) == {20.0}
  assert manifest["appends"][0]["users_with_other_labels"] > 5
  check.check_dataset(path, sample=12)


def test_only_whom_a_later_end_concerns_is_looked_at(tmp_path: pathlib.Path) -> None:
  """A log that goes on after every label window concerns the user of its last event, which no period held before."""
  write_log(tmp_path, users=12)
  cfg = config.resolve(small_config(tmp_path))
  prepare.prepare(cfg)
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
    append.append(path, {"visits": [write_visits(tmp_path, "x.parquet", int(other), ["page0"], "2024-07-10")]})
  assert {before[i]["user"] for i in set(read)} == at_end | {other}
  assert dataset_users(path)[other] == np.datetime64("2024-07-10", "us").astype(np.int64)
  check.check_dataset(path, sample=12)


def dataset_users(path: pathlib.Path) -> dict[str, int]:
  users = pq.read_table(path / "users.parquet")
  return dict(zip(users["user"].to_pylist(), users["last_event"].to_pylist(), strict=True))


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
  events = prepare.prepare(cfg)["events"]
  again = append.append(pathlib.Path(cfg.data.path), {"visits": [write_visits(tmp_path, "new.parquet", 3, pages)]})
  assert again["appends"][0]["repeats_of_earlier_events"] == repeats
  assert again["events"] == events + len(pages) - repeats


def test_new_values_of_training_follow_the_old_ones_and_others_stay_unknown(
  appendable: config.Config, tmp_path: pathlib.Path
) -> None:
  path = pathlib.Path(appendable.data.path)
  whole = Dataset(path)
  before = whole.encoders.categorical["page"]
  pages = ["new b", "new a", "new a", "page0", "new b", "new c"]
  file = write_visits(tmp_path, "late.parquet", 3, pages, "2024-02-02")
  later = write_visits(tmp_path, "later.parquet", 4, ["later"], "2024-06-20")
  manifest = append.append(path, {"visits": [file, later]})
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
  assert after.manifest["encoding_hash"] != whole.manifest["encoding_hash"]
  check.check_dataset(path, sample=50)


def test_what_others_had_before_a_value_had_a_code_stays_unknown_and_is_right(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  raw["data"]["fields"]["page"]["min_count"] = 2
  late = ((5, "rare", "2024-06-20"), (6, "page0", "2024-06-25"))
  files = [write_visits(tmp_path, f"visits-{user}.parquet", user, [page], day) for user, page, day in late]
  raw["data"]["sources"]["visits"]["files"] += files
  raw["data"]["split"]["test"] = ["2024-06-20"]
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  path = pathlib.Path(cfg.data.path)
  append.append(path, {"visits": [write_visits(tmp_path, "day.parquet", 3, ["rare"] * 2, "2024-02-02")]})
  after = Dataset(path)
  records = {after[i]["user"]: after[i] for i in range(len(after))}
  assert after.encoders.categorical["page"].code("rare") > UNKNOWN
  assert records["5"]["codes"][-1, after.schema.field("page")] == UNKNOWN
  asked = records["5"]["snapshot_split"] == 2
  assert records["5"]["label_next_page"][asked].tolist() == [UNKNOWN]
  check.check_dataset(path, sample=12)


@pytest.mark.parametrize(("setting", "left_out"), [("min_count", 1), ("size", 3)])
def test_the_rule_of_fitting_decides_which_new_values_get_a_code(
  few_users: pathlib.Path, tmp_path: pathlib.Path, setting: str, left_out: int
) -> None:
  write_log(tmp_path, users=12)
  raw = small_config(tmp_path)
  as_many_as_there_are = len(Dataset(few_users / "dataset").encoders.categorical["page"].values)
  raw["data"]["fields"]["page"][setting] = {"min_count": 2, "size": as_many_as_there_are}[setting]
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  pages = ["new b", "new a", "new a", "new b", "new c"]
  file = write_visits(tmp_path, "late.parquet", 3, pages, "2024-02-02")
  manifest = append.append(pathlib.Path(cfg.data.path), {"visits": [file]})
  values = manifest["appends"][0]["vocabularies"]["page"]
  assert (values["added"], values["left_out"]) == (3 - left_out, left_out)


def test_with_kept_vocabularies_models_stay_of_use(appendable: config.Config, tmp_path: pathlib.Path) -> None:
  path = pathlib.Path(appendable.data.path)
  before = Dataset(path).manifest["encoding_hash"]
  file = write_visits(tmp_path, "late.parquet", 3, ["new"], "2024-02-02")
  manifest = append.append(path, {"visits": [file]}, keep_vocabularies=True)
  assert manifest["appends"][0]["vocabularies"]["page"] == {"added": 0, "first": [], "left_out": 1}
  assert manifest["encoding_hash"] == before


def test_an_append_does_not_change_what_a_task_about_the_next_event_asks(
  appendable: config.Config, tmp_path: pathlib.Path
) -> None:
  path = pathlib.Path(appendable.data.path)
  before = Dataset(path)
  assert before.tie_rate < TIES_ARE_COMMON
  rows = pq.read_table(write_visits(tmp_path, "day.parquet", 3, ["page0"]))
  pq.write_table(pa.concat_tables([rows] * before.manifest["events"]), tmp_path / "basket.parquet")
  for number, file in enumerate(("basket.parquet", "day.parquet"), 1):
    append.append(path, {"visits": [str(tmp_path / file)]})
    after = Dataset(path)
    assert len(after.manifest["appends"]) == number and after.manifest["reading"]["tie_rate"] > TIES_ARE_COMMON
    assert after.tie_rate == before.tie_rate
    assert "any value of the next moment is right" not in summary.dataset_summary(after.manifest)
