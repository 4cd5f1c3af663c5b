"""Ids and categories of number types: whole decimals, numbers that a float cannot hold, and the range of int64."""

from __future__ import annotations

import decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax.data.preparation import fitting
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import good_rows


def decimals(*values, scale=10):
  return pa.array([None if v is None else decimal.Decimal(v) for v in values], pa.decimal128(38, scale))


@pytest.mark.parametrize("scale", [0, 2, 10])
def test_whole_decimals_are_integers(scale, write, make_data, open_log):
  ids = decimals("100", "-7", "100", scale=scale)
  data = make_data(write("e.parquet", pa.table(good_rows(user=ids, item=ids))))
  with open_log(data) as log:
    assert {u for (u,) in log.query('SELECT "user" FROM events')} == {"100", "-7"}
    assert fitting.fit_encoders(log, data).categorical["item"].values == ["100", "-7"]


def test_decimals_as_categories_have_no_zeros_at_the_end(write, make_data, open_log):
  data = make_data(write("e.parquet", pa.table(good_rows(item=decimals("7.50", "0.05", None)))))
  with open_log(data) as log:
    assert fitting.fit_encoders(log, data).categorical["item"].values == ["0.05", "7.5"]


def test_decimal_keys_are_joined_to_text(write, make_data, open_log, tmp_path):
  pq.write_table(pa.table({"sku": decimals("7", "8"), "brand": ["p", "q"]}), tmp_path / "items.parquet")
  source = {"items": {"file": str(tmp_path / "items.parquet"), "key": "item", "table_key": "sku"}}
  file = write("e.csv", good_rows(item=["7", "8", "7"]))
  data = make_data(file, source=source, fields={"item": {}, "brand": {}})
  with open_log(data) as log:
    assert log.counts["sources"]["log"]["items_missing"] == 0
    assert fitting.fit_encoders(log, data).categorical["brand"].counts.tolist() == [2, 1]


@pytest.mark.parametrize(
  ("type", "value", "column"),
  [
    (pa.float64(), 2.0**53, "user"),
    (pa.float64(), -1e18, "user"),
    (pa.float32(), 2.0**24, "user"),
    (pa.float64(), 1e18, "item"),
  ],
)
def test_ids_that_a_float_cannot_tell_apart_are_an_error(type, value, column, write, make_data, read):
  rows = good_rows(**{column: pa.array([5.0, 7.0, value], type)})
  with pytest.raises(DataError, match=rf"row 3: column '{column}' \(config\..* different ids may have become one"):
    read(make_data(write("e.parquet", pa.table(rows)), on_bad_rows="drop"))


def test_ids_that_a_float_holds_exactly_are_integers(write, make_data, read):
  rows = good_rows(user=pa.array([2.0**53 - 1, 5.0, None], pa.float64()))
  histories, _ = read(make_data(write("e.parquet", pa.table(rows)), on_bad_rows="drop"))
  assert [h.user for h in histories] == ["5", "9007199254740991"]


@pytest.mark.parametrize("side", ["items", "users"])
def test_keys_of_tables_that_a_float_cannot_tell_apart_are_an_error(side, write, make_data, read, tmp_path):
  pq.write_table(pa.table({"id": [1e17, 2.0], "brand": ["p", "q"]}), tmp_path / "t.parquet")
  file, fields = write("e.csv", good_rows()), {"item": {}, "brand": {}}
  if side == "items":
    data = make_data(
      file, source={"items": {"file": str(tmp_path / "t.parquet"), "key": "item", "table_key": "id"}}, fields=fields
    )
  else:
    fields["brand"] = {"table": "users"}
    data = make_data(file, fields=fields, users={"files": [str(tmp_path / "t.parquet")], "user": "id"})
  with pytest.raises(DataError, match=r"t\.parquet: row 1: column 'id' .*1e\+17 as DOUBLE"):
    read(data)


def test_large_measures_may_be_categories(write, make_data, open_log):
  data = make_data(write("e.parquet", pa.table(good_rows(item=pa.array([1e300, 2.0, 2.0], pa.float64())))))
  with open_log(data) as log:
    assert fitting.fit_encoders(log, data).categorical["item"].values == ["2", "1e+300"]
