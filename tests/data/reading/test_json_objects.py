"""Tables of items as one JSON object keyed by item."""

from __future__ import annotations

import gzip
import json

import pytest

from supermoe_jax.data.reading import json_files, readers
from supermoe_jax.errors import DataError

OBJECTS = {"x": {"brand": 5, "a/b~c": "p"}, "y": {"tags": ["t", "u"], "brand": None}, "n": None}
LISTS = {"y": [1, 2], "x": [3], "n": None}


@pytest.fixture
def objects(tmp_path):
  """Writes a value as JSON, or a text as it is; returns the path."""

  def run(value, name="items.json"):
    content = (value if isinstance(value, str) else json.dumps(value, indent=1)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return tmp_path / name

  return run


@pytest.fixture
def joined(make_data, open_log, write):
  """Joins a table of items to events of x, y and z; returns a field's values and the rows without an item."""

  def run(items, field, **fields):
    log = write("e.csv", {"user": ["a"] * 3, "time": [1590969600] * 3, "item": ["x", "y", "z"]})
    with open_log(make_data(log, source={"items": items}, fields={"item": {}, **fields})) as log:
      values = [v for (v,) in log.query(f"SELECT {log.columns[field]} FROM events ORDER BY ord")]
      return values, log.counts["sources"]["log"]["items_missing"]

  return run


@pytest.fixture
def rows():
  """Opens a file; returns its format and all of its rows, absent values as None."""

  def run(path, format="auto"):
    con = readers.connect()
    file = readers.open_table(con, path, format)
    found = con.execute(f"SELECT * EXCLUDE (row) FROM ({file.select({n: n for n in file.columns})})").fetchall()
    return file.format, [dict(zip(file.columns, row)) for row in found]

  return run


@pytest.mark.parametrize("name", ["items.json", "items.json.gz"])
@pytest.mark.parametrize("format", ["auto", "json_object"])
def test_attributes_are_joined_by_the_objects_keys(name, format, objects, joined):
  items = {"file": str(objects(OBJECTS, name)), "key": "item", "format": format}
  assert joined(items, "brand", brand={}) == (["5", None, None], 1)


def test_lists_are_the_column_values(objects, joined):
  items = {"file": str(objects(LISTS)), "key": "item"}
  assert joined(items, "values", values={"many": 3}) == ([["3"], ["1", "2"], None], 1)


def test_rows_keep_the_objects_order_and_any_name_of_an_attribute(objects, rows):
  format, found = rows(objects(OBJECTS))
  assert format == "json_object"
  assert found == [
    {"key": "x", "brand": "5", "a/b~c": "p", "tags": None},
    {"key": "y", "brand": None, "a/b~c": None, "tags": '["t","u"]'},
    {"key": "n", "brand": None, "a/b~c": None, "tags": None},
  ]


def test_an_attribute_may_be_called_values(objects, rows):
  assert rows(objects({"x": {"values": "v"}}))[1] == [{"key": "x", "values": "v"}]


def test_an_object_larger_than_duckdb_expects_is_read(objects, rows):
  large = {f"item {i}": {"text": "t" * 1000} for i in range(json_files.JSON_TEXT // 1000)}
  for name in ("items.json", "items.json.gz"):
    assert len(rows(objects(large, name))[1]) == len(large)


@pytest.mark.parametrize(
  ("text", "format"),
  [
    ('{"tags": [1], "item": "x"}\n{"tags": [2], "item": "y"}\n', "jsonl"),  # lines, though a list comes first
    ('{"tags": [1], "item": "x"}', "jsonl"),  # a line: its values are of several kinds
    ('[{"tags": [1]}]', "jsonl"),
    ('{"item": "x"}', "jsonl"),
    ('{"x": [1], "y": [2]}', "json_object"),
    (' {"x\\"": {"tags": [1]}}\n', "json_object"),
  ],
)
def test_an_object_keyed_by_id_is_told_from_json_lines(text, format, objects, rows):
  assert rows(objects(text))[0] == format


def test_an_ending_of_json_lines_is_believed(objects, rows):
  assert rows(objects('{"x": [1], "y": [2]}', "items.jsonl"))[0] == "jsonl"


def test_a_key_of_another_name_is_joined_too(joined, write):
  items = write("items.csv", {"id": ["x", "y"], "item": ["other", "names"], "brand": ["p", "q"]})
  assert joined({"file": str(items), "key": "item", "table_key": "id"}, "brand", brand={}) == (["p", "q", None], 1)


def test_a_key_that_the_table_lacks_is_named(joined, write):
  items = write("items.csv", {"ids": ["x"], "brand": ["p"]})
  with pytest.raises(DataError, match=r"has no column 'id' \(config\.data\.sources\.log\.items\.table_key\); did you"):
    joined({"file": str(items), "key": "item", "table_key": "id"}, "brand", brand={})


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ('{"x": {"brand": 1}, "y": [1]}', r"the value of 'y' is of the JSON type ARRAY; write every value as an object"),
    ('{"x": 1}', r"the value of 'x' is of the JSON type UBIGINT"),
    ('{"x": {"key": 1}}', r"holds an attribute 'key'"),
    ('{"x": [1], "x": [2]}', r"cannot be read as json_object: .*Map keys must be unique"),
    ('{"x": [1], ', r"cannot be read as json_object: .*Malformed JSON"),
    ("[1, 2]", r"cannot be read as json_object"),
    ("{}", r"items\.json holds no row"),
  ],
)
def test_an_object_that_cannot_be_used_is_named(text, says, objects, rows):
  with pytest.raises(DataError, match=rf"items\.json.*{says}" if "holds no row" not in says else says):
    rows(objects(text), "json_object")
