"""Rows that cannot be used: an error that names the place, or dropped and counted."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest

from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import ABSENT, JUNE_1, PRICE, good_rows, times

BAD_ROWS = [
  ("user", None, "column 'user' is empty"),
  ("time", None, "column 'time' is empty"),
  ("time", "soon", "column 'time' holds 'soon', which is not a time"),
  ("price", "dear", "column 'price' holds 'dear', which is not a number"),
  ("price", "inf", "column 'price' holds 'inf', which is not a number"),
]


@pytest.mark.parametrize(("column", "value", "message"), BAD_ROWS)
def test_a_bad_row_is_an_error_that_names_file_row_column_and_value(
  column, value, message, name, write, make_data, read
):
  columns = good_rows(time=[str(JUNE_1)] * 3)
  columns[column] = [columns[column][0], value, columns[column][2]]
  with pytest.raises(DataError, match=rf"{name}: row 2: {message} \(1 such row\).*on_bad_rows='drop'"):
    read(make_data(write(name, columns), fields=PRICE))


def test_a_damaged_line_of_json_is_named_or_dropped_and_counted(tmp_path, make_data, read):
  good = [f'{{"user": "u{i}", "time": {JUNE_1}, "item": "x", "price": {i}}}' for i in range(6)]
  file = tmp_path / "shots.jsonl"
  file.write_text("\n".join([*good[:2], '{"user": "u9", "ti', "", '{"user": "u8"} {"user": "u7"}', *good[2:]]) + "\n")
  with pytest.raises(DataError, match=r"shots\.jsonl: line 3 is no JSON \(2 such lines; the next is line 5\).*'drop'"):
    read(make_data(file, fields=PRICE))
  histories, counts = read(make_data(file, fields=PRICE, on_bad_rows="drop"))
  assert sorted(h.user for h in histories) == [f"u{i}" for i in range(6)]
  assert counts["sources"]["log"]["dropped"] == {"unreadable_line": 2} and counts["rows_read"] == 8


@pytest.mark.parametrize("damaged", ['{"user": "u9", "ti', "user log"])
def test_a_damaged_first_line_of_json_is_named_or_dropped_too(damaged, tmp_path, make_data, read):
  good = [f'{{"user": "u{i}", "time": {JUNE_1}, "item": "x"}}\n' for i in range(3)]
  file = tmp_path / "shots.jsonl"
  file.write_text(damaged + "\n" + "".join(good))
  with pytest.raises(DataError, match=r"shots\.jsonl: line 1 is no JSON: "):
    read(make_data(file))
  histories, counts = read(make_data(file, on_bad_rows="drop"))
  assert len(histories) == 3 and counts["sources"]["log"]["dropped"] == {"unreadable_line": 1}


def test_a_file_that_is_not_json_lines_is_an_error_even_where_lines_may_be_dropped(tmp_path, make_data, read):
  file = tmp_path / "shots.jsonl"
  file.write_text(f'{{"user": "a", "time": {JUNE_1}, "item": "x"}}\nuser,time\nb,1\n')
  with pytest.raises(DataError, match=r"2 of 3 lines are no JSON, the first is line 2: user,time\. Write one JSON"):
    read(make_data(file, on_bad_rows="drop"))


def test_an_infinite_number_in_parquet_is_bad(write, make_data, read):
  with pytest.raises(DataError, match="holds 'inf', which is not a number"):
    read(make_data(write("e.parquet", good_rows(price=[1.0, np.inf, 2.0])), fields=PRICE))


def test_bad_rows_that_are_dropped_are_counted_by_reason(name, write, make_data, read):
  columns = {
    "user": ["a", None, "a", "a", None, "b", "b", "b", "b"],
    "time": [str(JUNE_1), "1", None, "soon", None, str(JUNE_1), str(JUNE_1), str(JUNE_1), str(JUNE_1)],
    "item": ["x", "y", "x", "x", "y", "z", "z", "z", "z"],
    "price": ["1", "2", "3", "4", "x", "6", "6", "dear", "-inf"],
  }
  data = make_data(write(name, columns), fields=PRICE, on_bad_rows="drop", duplicates="drop")
  histories, counts = read(data)
  # A row with several faults counts once.
  dropped = {"null_user": 2, "null_time": 1, "unparsable_time": 1, "unparsable_field_price": 2}
  assert counts["sources"]["log"]["dropped"] == dropped
  assert counts["dropped"] == {**dropped, "duplicate": 1}
  assert counts["rows_read"] == 9 == counts["rows_kept"] + sum(counts["dropped"].values())
  assert counts["sources"]["log"]["rows_kept"] == counts["events"] == 2
  assert [h.user for h in histories] == ["a", "b"]


def test_all_bad_rows_of_a_file_are_counted_in_the_message(write, make_data, read):
  columns = good_rows(user=["a", None, None], time=[JUNE_1, JUNE_1, None])
  with pytest.raises(DataError, match=r"row 2: .*\(2 such rows\)"):
    read(make_data(write("e.csv", columns)))


def test_dropping_every_row_is_an_error(write, make_data, read):
  with pytest.raises(DataError, match=r"No event is left of 3 rows \(null_user: 3\)"):
    read(make_data(write("e.csv", good_rows(user=[None] * 3)), on_bad_rows="drop"))


def test_a_time_that_is_text_among_epochs_is_bad_and_does_not_change_how_the_others_are_read(write, make_data, read):
  columns = good_rows(time=["soon", JUNE_1, JUNE_1])
  histories, counts = read(make_data(write("e.csv", columns), on_bad_rows="drop"))
  assert counts["dropped"] == {"unparsable_time": 1}
  assert [times(h) for h in histories] == [[JUNE_1], [JUNE_1]]


def test_nan_and_null_numbers_are_absent_and_counted(name, write, make_data, read):
  price = [float("nan"), None, 4.0] if name.endswith("parquet") else ["nan", None, "4"]
  histories, counts = read(make_data(write(name, good_rows(price=price)), fields=PRICE))
  assert np.isnan(histories[0].numeric).tolist() == [[False], [True]]
  assert counts["nulls"] == {"item": 0, "price": 2}


def test_empty_text_is_absent(name, write, make_data, read):
  histories, counts = read(make_data(write(name, good_rows(item=["x", "", "x"]))))
  assert histories[1].codes.tolist() == [[ABSENT]]
  assert counts["nulls"] == {"item": 1}


def test_booleans_are_numbers(write, make_data, read):
  (a, b), _ = read(make_data(write("e.parquet", good_rows(price=[True, False, True])), fields=PRICE))
  assert a.numeric[0, 0] == a.numeric[1, 0] > b.numeric[0, 0]


@pytest.mark.parametrize(("value", "kind"), [(datetime.date(2020, 6, 1), "DATE"), (datetime.time(1), "TIME")])
def test_a_numeric_field_of_a_type_without_numbers_is_an_error(value, kind, write, make_data, read):
  with pytest.raises(DataError, match=f"column 'price' is of type {kind}, which is not a number"):
    read(make_data(write("e.parquet", good_rows(price=pa.array([value] * 3))), fields=PRICE))


def test_log1p_is_taken_before_standardising(write, make_data, read):
  fields = {"item": {}, "price": {"kind": "numeric", "encoding": "log1p"}}
  (a, b), _ = read(make_data(write("e.csv", good_rows(price=[-3, 0, 7])), fields=fields))
  raw = np.array([np.log(8), -np.log(4), 0])  # a's two events in order of time, then b's
  expected = (raw - raw.mean()) / raw.std()
  np.testing.assert_allclose(np.concatenate([a.numeric, b.numeric])[:, 0], expected, rtol=1e-6)
