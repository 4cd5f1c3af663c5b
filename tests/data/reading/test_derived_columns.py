"""Columns of folders, members of objects, bytes, and columns whose names differ in case alone."""

from __future__ import annotations

import datetime
import json
import uuid

import pyarrow as pa
import pytest

from supermoe_jax.data.preparation import fitting
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import JUNE_1, good_rows

DAY = datetime.datetime(2020, 6, 1)


@pytest.fixture
def values(make_data, open_log):
  """Reads events; returns a field's values in the order of the log."""

  def run(file, field, **changes):
    data = make_data(file, **changes)
    with open_log(data) as log:
      return [v for (v,) in log.query(f"SELECT {log.columns[field]} FROM events ORDER BY ord")]

  return run


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_gives_a_column_that_the_file_lacks(name, write, values):
  file = write(f"shop=007/day=2020-06-01/place=a%20b/none=__HIVE_DEFAULT_PARTITION__/{name}", good_rows())
  fields = {"item": {}, "shop": {}, "day": {}, "place": {}, "none": {}}
  found = {field: values(file, field, fields=fields) for field in fields}
  assert found["item"] == ["x", "y", "x"]
  assert [found[f] for f in ("shop", "day", "place", "none")] == [
    ["007"] * 3,
    ["2020-06-01"] * 3,
    ["a b"] * 3,
    [None] * 3,
  ]


def test_a_folder_gives_the_time_where_the_file_has_none(write, make_data, read):
  rows = {k: v for k, v in good_rows().items() if k != "time"}
  (a, b), _ = read(make_data(write("time=2020-06-01/e.parquet", rows)))
  assert a.time.tolist() == [JUNE_1 * 1_000_000] * 2 and b.time.tolist() == [JUNE_1 * 1_000_000]


@pytest.mark.parametrize(("column", "value"), [("item", "v2"), ("time", "2020-06-02"), ("price", "7")])
def test_a_folder_that_contradicts_the_files_column_is_an_error(column, value, name, write, make_data, read):
  file = write(f"{column}={value}/{name}", good_rows(item=["v22", "y", "x"], price=["7.5", "1", "2"]))
  fields = {"item": {}, "price": {"kind": "numeric"}}
  wanted = rf"row 1: column '{column}' holds '.*', but the folder's name says {column}={value}"
  with pytest.raises(DataError, match=wanted):
    read(make_data(file, fields=fields))


def test_the_files_column_is_read_where_the_folder_agrees(write, values, make_data, read):
  moments = [DAY + datetime.timedelta(hours=h) for h in (1, 2, 3)]
  file = write("time=2020-06-01/item=x/e.parquet", pa.table(good_rows(item=["x", None, "x"], time=moments)))
  assert values(file, "item") == ["x", None, "x"]
  (a, _), _ = read(make_data(file))
  assert a.time.tolist() == [(JUNE_1 + h * 3600) * 1_000_000 for h in (1, 3)]


def test_a_folder_named_like_a_column_that_is_not_read_changes_nothing(name, write, values):
  assert values(write(f"price=high/c0=q/{name}", good_rows()), "item") == ["x", "y", "x"]


# -------------------------------------------------------------------------------------------------------------- objects

OBJECTS = [{"sku": "x", "deep": {"n": 1, "a.b": "p"}}, {"sku": None, "deep": None}, None]


@pytest.mark.parametrize("file_name", ["e.parquet", "e.jsonl", "e.json", "e.csv"])
def test_members_of_objects_are_read_by_their_path(file_name, write, values):
  held = [None if v is None else json.dumps(v) for v in OBJECTS] if file_name.endswith("csv") else OBJECTS
  file = write(file_name, good_rows(props=held))
  fields = {"item": {}, "sku": {"column": "props.sku"}, "n": {"column": "props.deep.n", "kind": "numeric"}}
  assert values(file, "sku", fields=fields) == ["x", None, None]
  assert values(file, "n", fields=fields) == [1.0, None, None]


def test_a_member_whose_name_holds_a_point_is_read(write, values):
  file = write("e.parquet", good_rows(props=OBJECTS))
  assert values(file, "ab", fields={"item": {}, "ab": {"column": "props.deep.a.b"}}) == ["p", None, None]


@pytest.mark.parametrize("file_name", ["e.parquet", "e.jsonl"])
def test_a_column_of_that_name_wins_over_a_member(file_name, write, values):
  file = write(file_name, {**good_rows(props=OBJECTS), "props.sku": ["own", "own", "own"]})
  assert values(file, "sku", fields={"item": {}, "sku": {"column": "props.sku"}}) == ["own"] * 3


def test_the_value_of_a_key_of_a_map_is_read(write, values):
  maps = pa.array([[("k", 1)], [("l", 2)], None], pa.map_(pa.string(), pa.int64()))
  file = write("e.parquet", pa.table(good_rows(props=maps)))
  assert values(file, "k", fields={"item": {}, "k": {"column": "props.k"}}) == ["1", None, None]


@pytest.mark.parametrize("file_name", ["e.parquet", "e.jsonl"])
def test_lists_inside_of_objects_are_lists(file_name, write, values):
  file = write(file_name, good_rows(props=[{"tags": ["p", "q"]}, {"tags": []}, {"tags": ["r"]}]))
  fields = {"item": {}, "tags": {"column": "props.tags", "many": 2}}
  assert values(file, "tags", fields=fields) == [["p", "q"], None, ["r"]]


@pytest.mark.parametrize("file_name", ["e.parquet", "e.jsonl"])
def test_a_missing_member_is_named(file_name, write, make_data, read):
  file = write(file_name, good_rows(props=OBJECTS))
  with pytest.raises(DataError, match=r"no column 'props\.skus' .*its column 'props' .*has no member 'skus'"):
    read(make_data(file, fields={"item": {}, "sku": {"column": "props.skus"}}))


@pytest.mark.parametrize("file_name", ["e.parquet", "e.jsonl"])
def test_an_object_as_a_plain_field_is_an_error_that_names_a_member(file_name, write, make_data, read):
  file = write(file_name, good_rows(props=OBJECTS))
  with pytest.raises(DataError, match=r"column 'props' .*holds objects.*name one of their members, as in props\."):
    read(make_data(file, fields={"item": {}, "props": {}}))


@pytest.mark.parametrize("file_name", ["e.parquet", "e.jsonl"])
@pytest.mark.parametrize("kind", ["vocabulary", "hash", "numeric"])
def test_lists_as_a_plain_field_are_an_error_that_names_many(kind, file_name, write, make_data, read):
  file = write(file_name, good_rows(tags=[["p", "q"], None, ["p"]]))
  with pytest.raises(DataError, match=r"column 'tags' .*holds lists.*set config\.data\.fields\.tags\.many"):
    read(make_data(file, fields={"item": {}, "tags": {"kind": kind}}))


def test_text_in_brackets_is_no_list(write, values):
  file = write("e.jsonl", good_rows(item=["[1]", "[Deluxe] y", '["x"]']))
  assert values(file, "item") == ["[1]", "[Deluxe] y", '["x"]']


# ---------------------------------------------------------------------------------------------------- names and bytes


@pytest.mark.parametrize("file_name", ["e.parquet", "e.jsonl", "e.json", "e.csv"])
def test_names_that_differ_in_case_alone_are_two_columns(file_name, write, values):
  columns = {**good_rows(), "Item": ["p", "q", "r"], "ITEM_1": ["k", "l", "m"]}
  fields = {"item": {}, "Item": {}, "third": {"column": "ITEM_1"}}
  file = write(file_name, columns)
  assert values(file, "item", fields=fields) == ["x", "y", "x"]
  assert values(file, "Item", fields=fields) == ["p", "q", "r"]
  assert values(file, "third", fields=fields) == ["k", "l", "m"]
  assert values(file, "Item", fields={"Item": {}}) == ["p", "q", "r"]


def test_attributes_of_items_that_differ_in_case_alone_are_two_columns(write, values, tmp_path):
  (tmp_path / "items.json").write_text(json.dumps({"x": {"brand": "p", "Brand": "q"}, "y": {"Brand": "r"}}))
  source = {"items": {"file": str(tmp_path / "items.json"), "key": "item"}}
  fields = {"item": {}, "brand": {}, "Brand": {}}
  file = write("e.csv", good_rows())
  assert values(file, "brand", source=source, fields=fields) == ["p", None, "p"]
  assert values(file, "Brand", source=source, fields=fields) == ["q", "r", "q"]


def test_bytes_of_length_16_are_uuids(write, make_data, open_log):
  ids = [uuid.UUID(int=n) for n in (10, 7, 10)]
  data = make_data(write("e.parquet", pa.table(good_rows(user=pa.array([u.bytes for u in ids], pa.binary(16))))))
  with open_log(data) as log:
    assert sorted(u for (u,) in log.query('SELECT DISTINCT "user" FROM events')) == sorted({str(u) for u in ids})


def test_bytes_that_are_text_throughout_are_text(write, make_data, open_log):
  columns = good_rows(item=pa.array(["é".encode(), None, b"y"], pa.binary()))
  data = make_data(write("e.parquet", pa.table(columns)))
  with open_log(data) as log:
    assert fitting.fit_encoders(log, data).categorical["item"].values == ["y", "é"]


@pytest.mark.parametrize("column", ["user", "item"])
@pytest.mark.parametrize("bad", [b"\xff\xfe", b"\x00\x0a"])
def test_other_bytes_are_an_error_that_names_the_column(bad, column, write, make_data, read):
  columns = good_rows(**{column: pa.array([b"a", bad, b"b"], pa.binary())})
  with pytest.raises(DataError, match=rf"column '{column}' .*holds bytes that are not UTF-8 text"):
    read(make_data(write("e.parquet", pa.table(columns))))
