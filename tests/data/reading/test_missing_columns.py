"""Columns that some files lack: an error, or with `missing="null"` absent in these files, which are counted."""

from __future__ import annotations

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import cli, config
from supermoe_jax.data.append import append
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare, summary
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import good_rows
from tests.fixtures.new_visits import write_visits
from tests.fixtures.small_log import raw_config, write_log

FIELDS = {"item": {}, "coupon": {"missing": "null"}, "tags": {"missing": "null", "many": 2}}
FIELDS |= {"cost": {"missing": "null", "kind": "numeric"}}


def new_rows(write, name):
  return write(name, good_rows(coupon=["k", None, "l"], tags=["p|q", None, "q"], cost=["1", "2", "4"]))


def test_a_field_is_absent_in_files_without_its_column(name, write, make_data, open_log):
  old, new = write(f"old.{name}", good_rows()), new_rows(write, f"new.{name}")
  with open_log(make_data(old, new, fields=FIELDS)) as log:
    rows = log.query(f"SELECT {', '.join(log.columns[f] for f in ('coupon', 'tags', 'cost'))} FROM events ORDER BY ord")
    nothing = (None, None, None)
    assert rows == [nothing] * 3 + [("k", ["p", "q"], 1.0), (None, None, 2.0), ("l", ["q"], 4.0)]
    assert log.counts["nulls"] == {"item": 0, "coupon": 4, "tags": 4, "cost": 3}
    lacking = log.counts["sources"]["log"]["columns_missing"]
    assert lacking == {field: [str(old)] for field in ("coupon", "tags", "cost")}


def test_a_column_that_no_file_has_is_an_error(name, write, make_data, read):
  data = make_data(write(name, good_rows()), fields={"item": {}, "prize": {"missing": "null"}})
  with pytest.raises(DataError, match=r"no column 'prize' \(config\.data\.fields\.prize, and no other .*mean 'price'"):
    read(data)


def test_a_column_of_the_table_of_items_is_not_missing(write, make_data, read):
  items = write("items.csv", {"item": ["x", "y"], "brand": ["p", "q"]})
  fields = {"item": {}, "brand": {"missing": "null"}}
  data = make_data(write("e.csv", good_rows()), source={"items": {"file": str(items), "key": "item"}}, fields=fields)
  _, counts = read(data)
  assert counts["nulls"]["brand"] == 0 and counts["sources"]["log"]["columns_missing"] == {}


def test_a_column_that_files_of_the_user_table_lack_is_absent(write, make_data, open_log, tmp_path):
  write("users-1.csv", {"user": ["a"]})
  write("users-2.csv", {"user": ["b"], "plan": ["p"]})
  users = {"files": [f"{tmp_path}/users-*.csv"], "user": "user"}
  fields = {"item": {}, "plan": {"table": "users", "missing": "null"}}
  with open_log(make_data(write("e.csv", good_rows()), users=users, fields=fields)) as log:
    found = log.query(f'SELECT DISTINCT "user", {log.columns["plan"]} FROM events ORDER BY 1')
  assert found == [("a", None), ("b", "p")]


def test_what_is_missing_is_said_appended_and_checked(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  write_log(tmp_path, users=12)
  raw = raw_config(tmp_path)
  first = tmp_path / "visits-0.parquet"
  pq.write_table(pq.read_table(tmp_path / "visits.parquet").drop_columns("device"), first)
  raw["data"]["sources"]["visits"]["files"] = [f"{tmp_path}/visits*.parquet"]
  raw["data"]["fields"]["device"]["missing"] = "null"
  raw["data"]["duplicates"] = "drop"
  cfg = config.resolve(raw)
  manifest = prepare.prepare(cfg)
  rows = pq.read_metadata(first).num_rows
  said = (
    f"field device: absent in {rows:,} of {2 * rows:,} rows of visits, whose file lacks its column, such as {first}"
  )
  assert said in summary.dataset_summary(manifest)
  path = pathlib.Path(cfg.data.path)
  assert all(c.labels for c in check.check_dataset(path).values())
  table = pq.read_table(write_visits(tmp_path, "visits-1.parquet", 3, ["page0"])).drop_columns("device")
  pq.write_table(table, tmp_path / "visits-1.parquet")
  assert cli.main(["append", "--data", str(path)]) == 0
  assert "whose 2 files lack its column" in capsys.readouterr().out
  lacking = Dataset(path).manifest["reading"]["sources"]["visits"]["columns_missing"]
  assert lacking == {"device": [str(first), str(tmp_path / "visits-1.parquet")]}
  pq.write_table(pa.table({"user": [3], "time": table["time"], "page": ["page0"]}), tmp_path / "visits-2.parquet")
  with pytest.raises(DataError, match=r"visits-2\.parquet has no column 'seconds'"):
    append.append(path)
