"""Reading event logs: formats, times, bad values, order, joins and counts."""

from __future__ import annotations

import datetime
import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from supermoe_jax import config
from supermoe_jax.data import events, readers, vocabulary
from supermoe_jax.data.events import DataError

SECOND = 1_000_000
JUNE_1 = config.parse_time("2020-06-01", "") // SECOND  # in seconds, as the files have it
ABSENT, UNKNOWN = vocabulary.ABSENT, vocabulary.UNKNOWN

PRICE = {"item": {}, "price": {"kind": "numeric"}}
LEAVE_ONE_OUT = {"mode": "leave_one_out"}


def good_rows(**changes):
  """Three events of two users; a change replaces a column or adds one."""
  columns = {"user": ["a", "b", "a"], "time": [JUNE_1 + 2, JUNE_1 + 1, JUNE_1], "item": ["x", "y", "x"]}
  return {**columns, "price": ["1.5", "2", "4"], **changes}


def times(history):
  return (history.time // SECOND).tolist()


# -------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
  "name", ["e.parquet", "e.csv", "e.tsv", "e.csv.gz", "e.jsonl", "e.json", "e.jsonl.gz", "e.inter"]
)
def test_every_format_gives_the_same_histories(name, write, make_data, read):
  histories, counts = read(make_data(write(name, good_rows(price=[1.5, 2.0, 4.0])), fields=PRICE))
  a, b = histories
  assert (a.user, b.user) == ("a", "b")
  assert times(a) == [JUNE_1, JUNE_1 + 2]
  assert a.codes.tolist() == [[2], [2]] and b.codes.tolist() == [[3]]
  np.testing.assert_allclose(
    a.numeric[:, 0] - b.numeric[:, 0], np.array([4 - 2, 1.5 - 2]) / np.std([1.5, 2, 4]), rtol=1e-6
  )
  assert counts["rows_read"] == counts["events"] == 3


@pytest.mark.parametrize(
  ("ending", "format"),
  [
    ("pq", "parquet"),
    ("tsv.gz", "csv"),
    ("ndjson", "jsonl"),
    ("json.gz", "jsonl"),
    ("user", "atomic"),
    ("item", "atomic"),
    ("CSV", "csv"),
  ],
)
def test_the_format_is_told_by_the_ending(ending, format):
  assert readers.format_of(pathlib.Path(f"events.{ending}")) == format


def test_types_of_a_history_are_as_documented(write, make_data, read):
  (a, _), _ = read(make_data(write("e.parquet", good_rows(price=[1.5, 2.0, 4.0])), fields=PRICE))
  assert [x.dtype for x in (a.time, a.source, a.codes, a.numeric)] == [np.int64, np.int32, np.int32, np.float32]
  assert a.codes.shape == a.numeric.shape == (2, 1)
  assert type(a.n_train) is int and a.n_train == 2


def test_a_history_without_numeric_fields_has_an_empty_array(write, make_data, read):
  (a, _), _ = read(make_data(write("e.csv", good_rows())))
  assert a.numeric.shape == (2, 0) and a.numeric.dtype == np.float32


def test_an_unknown_ending_is_an_error(write, make_data, read, tmp_path):
  write("e.csv", good_rows()).rename(tmp_path / "e.log")
  with pytest.raises(DataError, match=r"e\.log: the format of this ending is unknown"):
    read(make_data(tmp_path / "e.log"))


def test_a_format_that_is_set_overrides_the_ending(write, make_data, read, tmp_path):
  write("e.csv", good_rows()).rename(tmp_path / "e.log")
  histories, _ = read(make_data(tmp_path / "e.log", source={"format": "csv"}))
  assert len(histories) == 2


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_the_delimiter_of_csv_is_taken_from_its_header(delimiter, write, make_data, read):
  file = write("e.csv", good_rows())
  file.write_text(file.read_text().replace(",", delimiter))
  assert len(read(make_data(file))[0]) == 2


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(write, make_data, read):
  file = write("e.csv", good_rows())
  file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
  assert [h.user for h in read(make_data(file))[0]] == ["a", "b"]


def test_quoted_csv_values_may_hold_delimiters_and_line_ends(write, make_data, open_log):
  data = make_data(write("e.csv", good_rows(item=['x,"1"', "y\nz", 'x,"1"'])))
  with open_log(data) as log:
    assert vocabulary.fit(log, data).categorical["item"].values == ['x,"1"', "y\nz"]


def test_atomic_files_are_not_quoted(write, make_data, open_log):
  data = make_data(write("e.inter", good_rows(item=['"x', "y", '"x'])))
  with open_log(data) as log:
    assert vocabulary.fit(log, data).categorical["item"].values == ['"x', "y"]


def test_names_of_columns_may_hold_any_character(name, write, make_data, read):
  columns = {'the "user"': ["a", "b"], "time (s)": [JUNE_1, JUNE_1], "it'em": ["x", "y"]}
  source = {"user": 'the "user"', "time": "time (s)"}
  histories, _ = read(make_data(write(name, columns), source=source, fields={"item": {"column": "it'em"}}))
  assert len(histories) == 2


def test_names_of_files_may_hold_wildcards(write, make_data, read):
  write("part1.csv", good_rows())
  assert read(make_data(write("part[1].csv", good_rows(user=["c", "c", "c"]))))[0][0].user == "c"


def test_keys_that_show_late_in_json_lines_are_found(write, make_data, read):
  file = write("e.jsonl", {"user": ["a"] * 30_000, "time": [JUNE_1] * 30_000})
  with file.open("a") as lines:
    lines.write(json.dumps({"user": "a", "time": JUNE_1, "item": "x"}) + "\n")
  (history,), counts = read(make_data(file))
  assert history.codes[:, 0].tolist() == [ABSENT] * 30_000 + [2]
  assert counts["nulls"] == {"item": 30_000}


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_missing_file_is_named_with_the_nearest(write, make_data, read, tmp_path):
  write("events.csv", good_rows())
  with pytest.raises(DataError, match=r"sources\.log\.files.*event\.csv: no such file; did you mean 'events\.csv'"):
    read(make_data(tmp_path / "event.csv"))


def test_a_missing_folder_is_named(make_data, read, tmp_path):
  with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
    read(make_data(tmp_path / "nowhere" / "e.csv"))


def test_a_glob_without_a_match_is_an_error(make_data, read, tmp_path):
  with pytest.raises(DataError, match=r"\*\.csv matches no file"):
    read(make_data(tmp_path / "*.csv"))


def test_a_directory_is_an_error_that_shows_a_glob(write, make_data, read, tmp_path):
  write("log/1.csv", good_rows())
  with pytest.raises(DataError, match=r"log is a directory; name its files, such as .*log/\*\.csv"):
    read(make_data(tmp_path / "log"))


def test_a_file_named_twice_is_an_error(write, make_data, read, tmp_path):
  file = write("e.csv", good_rows())
  with pytest.raises(DataError, match=r"e\.csv is named twice"):
    read(make_data(file, tmp_path / "*.csv"))


def test_a_remote_file_is_an_error(make_data, read):
  with pytest.raises(DataError, match=r"gs://bucket/e\.csv is not a local file"):
    read(make_data("gs://bucket/e.csv"))


def test_the_home_directory_is_expanded(write, make_data, read, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  write("e.csv", good_rows())
  assert len(read(make_data("~/e.csv"))[0]) == 2


@pytest.mark.parametrize("content", [b"", b"user,time,item\n"])
def test_an_empty_file_is_named(content, make_data, read, tmp_path):
  (tmp_path / "e.csv").write_bytes(content)
  with pytest.raises(DataError, match=r"e\.csv (is empty|holds no row)"):
    read(make_data(tmp_path / "e.csv"))


def test_a_file_of_no_bytes_is_named_in_every_format(name, make_data, read, tmp_path):
  (tmp_path / name).touch()
  with pytest.raises(DataError, match=rf"{name} is empty"):
    read(make_data(tmp_path / name))


def test_a_file_of_no_rows_is_named_in_every_format(name, write, make_data, read):
  columns = {n: pa.array([], pa.string()) for n in ("user", "time", "item")}
  with pytest.raises(DataError, match=rf"{name} (is empty|holds no row)"):
    read(make_data(write(name, columns)))


def test_an_empty_file_among_those_of_a_glob_is_counted(write, make_data, read, tmp_path):
  write("1.csv", good_rows())
  write("2.csv", {"user": [], "time": [], "item": []})
  _, counts = read(make_data(tmp_path / "*.csv"))
  assert counts["sources"]["log"]["empty_files"] == [str(tmp_path / "2.csv")]


def test_a_glob_of_empty_files_is_an_error(write, make_data, read, tmp_path):
  for file in ("1.csv", "2.csv"):
    write(file, {"user": [], "time": [], "item": []})
  with pytest.raises(DataError, match="none of the 2 files holds a row"):
    read(make_data(tmp_path / "*.csv"))


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("e.parquet", b"this is no Parquet file"),
    ("e.csv", b"user,time,item\na,1,x\nb,2\n"),
    ("e.csv", b"user,time,item\na,1,x\nb,2,\xff\xfe\n"),
    ("e.csv", b'user,time,item\na,1,x\nb,2,"y\n'),
    ("e.csv.gz", b"user,time,item\na,1,x\n"),
    ("e.jsonl", b'{"user": "a", "time": 1, "item": "x"}\n{"user": "b",\n'),
    ("e.jsonl", b"[1, 2]\n"),
    ("e.json", b'[{"user": "a", "time": 1, "item": "x"}'),
    ("e.inter", b"user:token\ttime:float\titem:token\na\t1\n"),
  ],
)
def test_a_damaged_file_is_named(name, content, make_data, read, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=rf"/{name}"):
    read(make_data(tmp_path / name))


def test_the_line_of_a_damaged_csv_is_named(write, make_data, read):
  file = write("e.csv", good_rows())
  file.write_text(file.read_text() + "a,1\n")
  with pytest.raises(DataError, match=r"Line: 5.*Expected Number of Columns: 4 Found: 2"):
    read(make_data(file))


def test_a_column_named_twice_is_an_error(make_data, read, tmp_path):
  (tmp_path / "e.csv").write_text("user,time,item,item\na,1,x,y\n")
  with pytest.raises(DataError, match="names the column 'item' twice"):
    read(make_data(tmp_path / "e.csv"))


@pytest.mark.parametrize("column", ["user", "time", "item"])
def test_a_missing_column_is_named_with_the_nearest(column, name, write, make_data, read):
  columns = {f"{n}s" if n == column else n: v for n, v in good_rows().items()}
  with pytest.raises(DataError, match=rf"{name} has no column '{column}' \(config\..*did you mean '{column}s'"):
    read(make_data(write(name, columns)))


def test_a_column_missing_from_the_second_file_names_that_file(write, make_data, read, tmp_path):
  write("1.csv", good_rows())
  write("2.csv", {k: v for k, v in good_rows().items() if k != "item"})
  with pytest.raises(DataError, match=r"2\.csv has no column 'item'"):
    read(make_data(tmp_path / "*.csv"))


def test_columns_are_matched_by_name_not_by_position(write, make_data, read, tmp_path):
  write("1.csv", good_rows())
  write("2.csv", dict(reversed(good_rows().items())))
  histories, _ = read(make_data(tmp_path / "*.csv"))
  assert [len(h.time) for h in histories] == [4, 2]


# ---------------------------------------------------------------------------------------------------------------- times


def read_times(columns, write, make_data, read, name="e.parquet", **source):
  """The times that one event each of the users a, b, … is read with."""
  values = list(columns) if not isinstance(columns, pa.Array) else columns
  file = write(name, {"user": [chr(97 + i) for i in range(len(values))], "time": values, "item": ["x"] * len(values)})
  histories, _ = read(make_data(file, source=source, split=LEAVE_ONE_OUT))
  return [h.time.item() for h in histories]


def test_iso_times_are_utc_unless_they_carry_an_offset(name, write, make_data, read):
  same = {
    "2020-06-01": "2020-06-01",
    "2020-06-01 12:30:00": "2020-06-01T12:30:00",
    "2020-06-01T12:30:00.25": "2020-06-01T12:30:00.250",
    "2020-06-01T12:30:00Z": "2020-06-01T12:30:00",
    "2020-06-01T12:30:00+02:00": "2020-06-01T10:30:00",
    "2020-06-01T12:30:00-0530": "2020-06-01T18:00:00",
  }
  assert read_times(same, write, make_data, read, name) == [config.parse_time(t, "") for t in same.values()]


@pytest.mark.parametrize("zone", [None, "America/New_York"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_are_utc_whatever_zone_they_show(zone, unit, write, make_data, read):
  column = pa.array([JUNE_1]).cast(pa.timestamp("s", zone)).cast(pa.timestamp(unit, zone))
  assert read_times(column, write, make_data, read) == [JUNE_1 * SECOND]


def test_the_machines_time_zone_does_not_matter(write, make_data, read, monkeypatch):
  monkeypatch.setenv("TZ", "Asia/Tokyo")
  assert read_times(["2020-06-01"], write, make_data, read) == [JUNE_1 * SECOND]


def test_dates_are_midnight(write, make_data, read):
  assert read_times(pa.array([datetime.date(2020, 6, 1)]), write, make_data, read) == [JUNE_1 * SECOND]


@pytest.mark.parametrize("name", ["e.parquet", "e.csv"])
@pytest.mark.parametrize(("unit", "scale"), [("auto", 1), ("s", 1), ("ms", 1000), ("us", SECOND)])
def test_epochs_are_read_in_their_unit(unit, scale, name, write, make_data, read):
  assert read_times([JUNE_1 * scale], write, make_data, read, name, time_unit=unit) == [JUNE_1 * SECOND]


def test_fractions_of_a_second_are_kept(name, write, make_data, read):
  assert read_times([JUNE_1 + 0.25], write, make_data, read, name) == [JUNE_1 * SECOND + 250_000]


@pytest.mark.parametrize(("unit", "zeros"), [("ms", "000"), ("us", "000000")])
def test_an_epoch_that_cannot_be_seconds_is_an_error_that_names_the_unit(unit, zeros, name, write, make_data, read):
  message = rf"{name}: column 'time' holds {JUNE_1}{zeros}; .*time_unit='{unit}', which makes it 2020-06-01"
  with pytest.raises(DataError, match=message):
    read_times([int(f"{JUNE_1}{zeros}")], write, make_data, read, name)


def test_a_compact_date_taken_for_seconds_is_an_error_that_names_the_format(name, write, make_data, read):
  with pytest.raises(DataError, match=r"holds 20200601; .*1970-08-.*time_format='%Y%m%d'"):
    read_times([20200601], write, make_data, read, name)


def test_a_unit_that_is_set_is_not_checked(write, make_data, read):
  assert read_times([0, 7], write, make_data, read, time_unit="s") == [0, 7 * SECOND]


@pytest.mark.parametrize("value", ["01.06.2020", 1062020])
def test_a_time_format_is_applied(value, name, write, make_data, read):
  format = "%d.%m.%Y" if isinstance(value, str) else "%d%m%Y"
  value = value if isinstance(value, str) else "0" + str(value)
  assert read_times([value], write, make_data, read, name, time_format=format) == [JUNE_1 * SECOND]


def test_a_time_format_with_an_offset_is_converted_to_utc(write, make_data, read):
  format = "%d.%m.%Y %H:%M %z"
  assert read_times(["01.06.2020 02:00 +0200"], write, make_data, read, time_format=format) == [JUNE_1 * SECOND]


def test_a_time_format_applies_to_integer_dates(write, make_data, read):
  assert read_times([20200601], write, make_data, read, time_format="%Y%m%d") == [JUNE_1 * SECOND]


def test_a_time_format_that_is_none_is_an_error(write, make_data, read):
  with pytest.raises(DataError, match=r"sources\.log\.time_format='%Q' is not a strptime format"):
    read_times(["01.06.2020"], write, make_data, read, time_format="%Q")


def test_a_column_that_cannot_be_a_time_is_an_error(write, make_data, read):
  with pytest.raises(DataError, match="column 'time' is of type BOOLEAN, which is not a time"):
    read_times([True], write, make_data, read)


# ------------------------------------------------------------------------------------------------------------- bad rows

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


@pytest.mark.parametrize(("value", "kind"), [(datetime.date(2020, 6, 1), "DATE"), ([1, 2], r"BIGINT\[\]")])
def test_a_numeric_field_of_a_type_without_numbers_is_an_error(value, kind, write, make_data, read):
  with pytest.raises(DataError, match=f"column 'price' is of type {kind}, which is not a number"):
    read(make_data(write("e.parquet", good_rows(price=pa.array([value] * 3))), fields=PRICE))


def test_log1p_is_taken_before_standardising(write, make_data, read):
  fields = {"item": {}, "price": {"kind": "numeric", "encoding": "log1p"}}
  (a, b), _ = read(make_data(write("e.csv", good_rows(price=[-3, 0, 7])), fields=fields))
  raw = np.array([np.log(8), -np.log(4), 0])  # a's two events in order of time, then b's
  expected = (raw - raw.mean()) / raw.std()
  np.testing.assert_allclose(np.concatenate([a.numeric, b.numeric])[:, 0], expected, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- order


def test_ties_keep_the_order_of_the_rows(name, write, make_data, read):
  n = 500
  items = [f"item{(i * 7919) % n}" for i in range(n)]
  columns = {"user": ["a"] * n, "time": [JUNE_1] * n, "item": items, "place": list(range(n))}
  fields = {"item": {}, "place": {"kind": "numeric"}}
  (history,), counts = read(make_data(write(name, columns), fields=fields))
  assert np.all(np.diff(history.numeric[:, 0]) > 0)
  assert counts["tie_rate"] == 1.0


def test_ties_keep_the_order_of_the_files(write, make_data, read):
  second = write("a.csv", good_rows(user=["u"] * 3, time=[JUNE_1] * 3, price=[4, 5, 6]))
  first = write("b.csv", good_rows(user=["u"] * 3, time=[JUNE_1] * 3, price=[1, 2, 3]))
  (history,), _ = read(make_data(first, second, fields=PRICE))
  assert np.all(np.diff(history.numeric[:, 0]) > 0)


def test_files_of_a_glob_are_ordered_by_name(write, make_data, read, tmp_path):
  for place in (2, 0, 1):
    write(f"part-{place}.parquet", good_rows(user=["u"] * 3, time=[JUNE_1] * 3, price=[place * 1.0] * 3))
  (history,), _ = read(make_data(tmp_path / "part-*.parquet", fields=PRICE))
  assert np.all(np.diff(history.numeric[:, 0]) >= 0)


def test_ties_across_sources_keep_the_order_of_the_sources(write, make_data, read):
  buys = {"files": [str(write("buys.csv", good_rows()))], "user": "user", "time": "time"}
  views = {"files": [str(write("views.csv", good_rows()))], "user": "user", "time": "time"}
  histories, _ = read(make_data(sources={"view": views, "buy": buys}))
  assert [h.source.tolist() for h in histories] == [[0, 1, 0, 1], [0, 1]]


def test_histories_are_the_same_however_the_stream_is_cut(write, make_data, read, monkeypatch):
  n = 5_000
  columns = {"user": [str(i * i % 37) for i in range(n)], "time": [JUNE_1 + i % 91 for i in range(n)], "item": range(n)}
  data = make_data(write("e.parquet", {**columns, "item": [f"i{i % 13}" for i in range(n)]}))
  whole, _ = read(data)
  monkeypatch.setattr(events, "BATCH_ROWS", 7)
  cut, _ = read(data)
  assert [h.user for h in cut] == [h.user for h in whole] == sorted({h.user for h in whole})
  for a, b in zip(whole, cut, strict=True):
    np.testing.assert_array_equal(a.time, b.time)
    np.testing.assert_array_equal(a.codes, b.codes)
    assert a.n_train == b.n_train


# -------------------------------------------------------------------------------------------------------- users, values


@pytest.mark.parametrize(
  "kind", [pa.int32(), pa.int64(), pa.float64(), pa.string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_ids_are_text_without_a_decimal_point(kind, write, make_data, read):
  user = pa.array(["12", "7", "12"]) if not pa.types.is_floating(kind) else pa.array([12.0, 7.0, 12.0])
  histories, _ = read(make_data(write("e.parquet", good_rows(user=user.cast(kind)))))
  assert [h.user for h in histories] == ["12", "7"]


def test_a_user_of_two_files_with_different_types_is_one_user(write, make_data, read):
  first = write("a.parquet", good_rows(user=[7, 7, 7]))
  second = write("b.parquet", good_rows(user=[7.0, 7.0, None]))
  third = write("c.csv", good_rows(user=["7", "7", "7"]))
  (history,), _ = read(make_data(first, second, third, on_bad_rows="drop"))
  assert history.user == "7" and len(history.time) == 8


@pytest.mark.parametrize(
  ("user", "expected"), [(pa.array([1, 2, 1]), "BIGINT"), (pa.array(["1", "2", "1"]), "VARCHAR")]
)
def test_the_type_of_the_user_column_is_known(user, expected, write, make_data, open_log):
  with open_log(make_data(write("e.parquet", good_rows(user=user)))) as log:
    assert log.user_type == expected


@pytest.mark.parametrize(
  ("column", "expected"),
  [
    (pa.array([3, 2, 3]), ["3", "2"]),
    (pa.array([3.0, 2.5, 3.0]), ["3", "2.5"]),
    (pa.array([True, False, True]), ["true", "false"]),
  ],
)
def test_categories_are_text(column, expected, write, make_data, open_log):
  data = make_data(write("e.parquet", good_rows(item=column)))
  with open_log(data) as log:
    assert vocabulary.fit(log, data).categorical["item"].values == expected


def test_a_field_of_another_source_is_absent_and_not_counted_as_null(write, make_data, read):
  def source(name, columns):
    return {"files": [str(write(name, columns))], "user": "user", "time": "time"}

  sources = {
    "view": source("view.csv", good_rows()),
    "note": source("note.csv", {"user": ["a"], "time": [JUNE_1 + 9], "text": ["hello"]}),
  }
  fields = {"item": {"sources": ["view"]}, "text": {"sources": ["note"]}}
  histories, counts = read(make_data(sources=sources, fields=fields))
  assert histories[0].codes.tolist() == [[2, ABSENT], [2, ABSENT], [ABSENT, 2]]
  assert counts["nulls"] == {"item": 0, "text": 0}
  assert [s["rows_read"] for s in counts["sources"].values()] == [3, 1]


def test_two_fields_may_read_one_column(write, make_data, read):
  fields = {"item": {}, "rating": {"column": "price"}, "price": {"kind": "numeric"}}
  (a, _), _ = read(make_data(write("e.csv", good_rows()), fields=fields))
  assert a.codes.shape == (2, 2) and a.numeric.shape == (2, 1)


# ---------------------------------------------------------------------------------------------------------------- items

BRAND = {"item": {}, "brand": {}}


def with_items(file, key="item"):
  return {"items": {"file": str(file), "key": key}}


@pytest.mark.parametrize("items", ["items.parquet", "items.csv", "items.jsonl", "items.item"])
def test_attributes_are_joined_by_key(items, write, make_data, read):
  source = with_items(write(items, {"item": ["x", "y"], "brand": ["B", "C"]}))
  histories, counts = read(make_data(write("e.csv", good_rows()), source=source, fields=BRAND))
  assert [h.codes[:, 1].tolist() for h in histories] == [[2, 2], [3]]
  assert counts["sources"]["log"]["items_missing"] == 0


def test_keys_of_different_types_are_joined_as_text(write, make_data, read):
  items = write("items.parquet", {"item": [1.0, 2.0, None], "brand": ["B", "C", "D"]})
  log = write("e.csv", good_rows(item=["1", "2", "1"]))
  histories, _ = read(make_data(log, source=with_items(items), fields=BRAND, on_bad_rows="drop"))
  assert [h.codes[:, 1].tolist() for h in histories] == [[2, 2], [3]]


def test_events_whose_item_is_unknown_are_counted_and_have_no_attributes(write, make_data, read):
  items = write("items.csv", {"item": ["x"], "brand": ["B"]})
  log = write("e.csv", good_rows(item=["x", "y", None]))
  histories, counts = read(make_data(log, source=with_items(items), fields=BRAND))
  assert counts["sources"]["log"]["items_missing"] == 2
  assert counts["nulls"] == {"item": 1, "brand": 2}
  assert histories[1].codes[0, 1] == ABSENT


def test_an_item_with_two_rows_is_an_error(write, make_data, read):
  items = write("items.csv", {"item": ["x", "y", "x"], "brand": ["B", "C", "D"]})
  with pytest.raises(DataError, match=r"items\.csv: 2 rows have item='x', the first is row 1"):
    read(make_data(write("e.csv", good_rows()), source=with_items(items), fields=BRAND))


def test_a_missing_key_is_named(write, make_data, read):
  items = write("items.csv", {"items": ["x"], "brand": ["B"]})
  with pytest.raises(DataError, match=r"items\.csv has no column 'item' .*items\.key\); did you mean 'items'"):
    read(make_data(write("e.csv", good_rows()), source=with_items(items), fields=BRAND))


def test_a_field_that_neither_events_nor_items_have_is_named(write, make_data, read):
  items = write("items.csv", {"item": ["x"], "brands": ["B"]})
  with pytest.raises(DataError, match=r"e\.csv has no column 'brand' .*; did you mean 'brands'"):
    read(make_data(write("e.csv", good_rows()), source=with_items(items), fields=BRAND))


def test_a_bad_number_of_an_item_is_an_error_or_drops_the_item(write, make_data, read):
  items = write("items.csv", {"item": ["x", "y"], "size": ["1", "big"]})
  fields = {"item": {}, "size": {"kind": "numeric"}}
  log = write("e.csv", good_rows())
  with pytest.raises(DataError, match=r"items\.csv: row 2: column 'size' holds 'big'"):
    read(make_data(log, source=with_items(items), fields=fields))
  _, counts = read(make_data(log, source=with_items(items), fields=fields, on_bad_rows="drop"))
  assert counts["sources"]["log"]["item_rows_dropped"] == counts["sources"]["log"]["items_missing"] == 1
  assert counts["events"] == 3


# -------------------------------------------------------------------------------------------- duplicates, split, counts


def duplicated_rows():
  """Rows 1, 3 and 4 are equal; row 2 differs in its item, row 5 is absent in it."""
  return {
    "user": ["a"] * 6,
    "time": [JUNE_1] * 6,
    "item": ["x", "y", "x", "x", None, None],
    "price": [1, 1, 1, 1, 2, 2],
  }


def test_duplicates_are_counted_and_kept(write, make_data, read):
  (history,), counts = read(make_data(write("e.csv", duplicated_rows()), fields=PRICE))
  assert counts["duplicate_rows"] == 3 and counts["dropped"] == {}
  assert len(history.time) == 6


def test_duplicates_can_be_dropped_but_for_the_first(write, make_data, read):
  (history,), counts = read(make_data(write("e.csv", duplicated_rows()), fields=PRICE, duplicates="drop"))
  assert counts["duplicate_rows"] == 3 and counts["dropped"] == {"duplicate": 3}
  assert (history.codes[:, 0] == ABSENT).tolist() == [False, False, True]
  assert counts["rows_kept"] == counts["sources"]["log"]["rows_kept"] == 3


def test_the_tie_rate_counts_events_that_share_user_and_time(write, make_data, read):
  columns = good_rows(user=["a", "a", "b"], time=[JUNE_1, JUNE_1, JUNE_1])
  assert read(make_data(write("e.csv", columns)))[1]["tie_rate"] == pytest.approx(2 / 3)


def test_the_training_period_ends_before_train_end(write, make_data, read):
  end = config.parse_time("2021-01-01", "") // SECOND
  columns = {"user": ["a"] * 4, "time": [end + 1, end, end - 1, end - 2], "item": ["x"] * 4}
  (history,), counts = read(make_data(write("e.csv", columns)))
  assert history.n_train == counts["training_events"] == 2


def test_leave_one_out_trains_on_all_but_the_last_two_events_in_stable_order(write, make_data, read):
  columns = {
    "user": ["a", "a", "a", "a", "b", "b"],
    "time": [JUNE_1, JUNE_1, JUNE_1, JUNE_1, JUNE_1, JUNE_1],
    "item": ["p", "q", "r", "s", "t", "u"],
  }
  (a, b), counts = read(make_data(write("e.csv", columns), split=LEAVE_ONE_OUT))
  assert (a.n_train, b.n_train) == (2, 2)
  assert counts["training_events"] == 4
  # r and s came last in the file, so they are the ones that training has not seen.
  assert (a.codes[:, 0] == UNKNOWN).tolist() == [False, False, True, True]


def test_a_log_without_training_events_is_an_error(write, make_data, read):
  split = {"train_end": "2019-01-01", "validation": ["2019-01-01"], "test": ["2019-02-01"]}
  message = (
    r"before config\.data\.split\.train_end=2019-01-01: the log runs from 2020-06-01T00:00:00 to 2020-06-01T00:00:02"
  )
  with pytest.raises(DataError, match=message):
    read(make_data(write("e.csv", good_rows()), split=split))


def test_counts_are_json_and_complete(write, make_data, open_log, tmp_path):
  write("1.csv", good_rows())
  write("2.csv", good_rows(user=["c", "c", "c"]))
  with open_log(make_data(tmp_path / "*.csv")) as log:
    counts = json.loads(json.dumps(log.counts))
    assert (log.start, log.end) == (JUNE_1 * SECOND, (JUNE_1 + 2) * SECOND)
  assert counts["sources"]["log"]["files"] == {str(tmp_path / "1.csv"): 3, str(tmp_path / "2.csv"): 3}
  assert (counts["users"], counts["events"], counts["training_events"]) == (3, 6, 6)
  assert (counts["first"], counts["last"]) == ("2020-06-01T00:00:00", "2020-06-01T00:00:02")


def test_the_database_is_removed_when_the_log_is_closed_or_fails(write, make_data, open_log, tmp_path):
  with open_log(make_data(write("e.csv", good_rows()))):
    assert list((tmp_path / "scratch").iterdir())
  assert not list((tmp_path / "scratch").iterdir())
  with pytest.raises(DataError):
    open_log(make_data(write("e.csv", good_rows(user=[None] * 3))))
  assert not list((tmp_path / "scratch").iterdir())


def test_a_memory_limit_that_is_no_amount_is_an_error(write, make_data, read):
  with pytest.raises(DataError, match=r"config\.data\.memory='much' is not an amount such as '2GB'"):
    read(make_data(write("e.csv", good_rows()), memory="much"))


def test_queries_do_not_end_a_stream_of_histories(write, make_data, open_log, monkeypatch):
  monkeypatch.setattr(events, "BATCH_ROWS", 2)
  n = 5_000
  data = make_data(write("e.parquet", {"user": list(range(n)), "time": [JUNE_1] * n, "item": ["x"] * n}))
  with open_log(data) as log:
    encoders = vocabulary.fit(log, data)
    users = 0
    for _ in log.histories(encoders):
      users += 1
      if users == 3:
        log.query("SELECT count(*) FROM events")
    assert users == n
