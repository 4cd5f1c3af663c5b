"""Tables that are joined to events: a join that finds nobody is an error with the ids of both sides."""

from __future__ import annotations

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.append import append
from supermoe_jax.data.preparation import prepare
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import good_rows
from tests.fixtures.new_visits import write_visits
from tests.fixtures.small_log import raw_config, write_log


def test_a_table_of_items_without_any_item_is_an_error(write, make_data, read):
  items = write("items.csv", {"sku": ["X", "Y"], "brand": ["p", "q"]})
  source = {"items": {"file": str(items), "key": "item", "table_key": "sku"}}
  data = make_data(write("e.csv", good_rows()), source=source, fields={"item": {}, "brand": {}})
  with pytest.raises(DataError, match=r"items\.key: .*items\.csv holds none of .*'item' .*holds 'x', 'y'; .*'X', 'Y'"):
    read(data)


def test_the_ids_of_a_file_with_bad_lines_are_shown_too(write, make_data, read):
  items = write("items.csv", {"item": ["X", "Y"], "brand": ["p", "q"]})
  events = write("e.csv", good_rows())
  events.write_text(events.read_text() + "a,1\n")
  source = {"items": {"file": str(items), "key": "item"}}
  data = make_data(events, source=source, fields={"item": {}, "brand": {}}, on_bad_rows="drop")
  with pytest.raises(DataError, match=r"items\.key: .*holds 'x', 'y'; .*'X', 'Y'"):
    read(data)


def test_a_table_of_items_with_one_of_them_is_joined(write, make_data, read):
  items = write("items.csv", {"item": ["x", "Y"], "brand": ["p", "q"]})
  data = make_data(
    write("e.csv", good_rows()), source={"items": {"file": str(items), "key": "item"}}, fields={"item": {}, "brand": {}}
  )
  assert read(data)[1]["sources"]["log"]["items_missing"] == 1


def test_fields_of_users_without_any_user_are_an_error(write, make_data, read):
  users = {"files": [str(write("users.csv", {"user": ["A", "B"], "plan": ["p", "q"]}))], "user": "user"}
  data = make_data(write("e.csv", good_rows()), users=users, fields={"item": {}, "plan": {"table": "users"}})
  with pytest.raises(DataError, match=r"config\.data\.users\.user: .*holds 'a', 'b'; the table holds 'A', 'B'"):
    read(data)


def test_labels_of_users_without_any_user_are_an_error(unprepared: config.Config) -> None:
  assert unprepared.data.users is not None
  file = unprepared.data.users.files[0]
  table = pq.read_table(file)
  strangers = pa.array([f"u{user}" for user in table["user"].to_pylist()])
  pq.write_table(table.set_column(0, "user", strangers), file)
  with pytest.raises(DataError, match=r"users\.user='user': none of the \d+ users with a label has an event.*'u0'"):
    prepare.prepare(unprepared)


def test_an_append_may_bring_items_that_the_table_lacks(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path, users=12)
  raw = raw_config(tmp_path)
  pq.write_table(pa.table({"page": ["page0"], "topic": ["t"]}), tmp_path / "items.parquet")
  raw["data"]["sources"]["visits"]["items"] = {"file": str(tmp_path / "items.parquet"), "key": "page"}
  raw["data"]["fields"]["topic"] = {"sources": ["visits"]}
  cfg = config.resolve(raw)
  missing = prepare.prepare(cfg)["reading"]["sources"]["visits"]["items_missing"]
  file = write_visits(tmp_path, "day.parquet", 3, ["page77"])
  manifest = append.append(pathlib.Path(cfg.data.path), {"visits": [file]})
  assert manifest["reading"]["sources"]["visits"]["items_missing"] == missing + 1
