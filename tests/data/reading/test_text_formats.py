"""Dialects of text tables: delimiters, headers, decimals, words for no value, folders, damaged lines."""

from __future__ import annotations

import pathlib

import numpy as np
import pyarrow as pa
import pytest

from supermoe_jax import config
from supermoe_jax.data.preparation import fitting
from supermoe_jax.data.reading import readers
from supermoe_jax.data.reading.text_files import text_layout
from supermoe_jax.data.reading.user_table import read_user_table
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.event_rows import ABSENT, JUNE_1, PRICE, good_rows, times

COLUMNS = ("user", "time", "item", "price")


def without_header(file: pathlib.Path) -> pathlib.Path:
  file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
  return file


def values_of(data, open_log, field="item"):
  with open_log(data) as log:
    return sorted(fitting.fit_encoders(log, data).categorical[field].values)


def prices_of(data, open_log):
  with open_log(data) as log:
    return [v for (v,) in log.query(f"SELECT {log.columns['price']} FROM rows ORDER BY ord")]


# --------------------------------------------------------------------------------------------------- header and columns


@pytest.mark.parametrize("name", ["e.csv", "e.tsv", "e.inter"])
def test_a_file_without_header_keeps_its_first_row(name, write, make_data, read):
  rows = good_rows(user=["1", "2", "1"], item=["7", "8", "7"])
  file = without_header(write(name, rows))
  (one, two), counts = read(make_data(file, source={"header": False, "columns": COLUMNS}, fields=PRICE))
  assert counts["rows_read"] == 3 and times(one) == [JUNE_1, JUNE_1 + 2] and times(two) == [JUNE_1 + 1]


@pytest.mark.parametrize("name", ["e.csv", "e.tsv", "e.inter"])
def test_a_first_line_of_numbers_is_an_error_whose_remedy_works(name, write, make_data, read):
  file = without_header(write(name, good_rows(user=["1", "2", "1"], item=["7", "8", "7"])))
  message = (
    rf"{name}: the first line holds data.*: 1.*Set config\.data\.sources\.log\.header=False and "
    r"config\.data\.sources\.log\.columns=\(…\).*config\.data\.sources\.log\.header=True"
  )
  with pytest.raises(DataError, match=message):
    read(make_data(file))


def test_a_first_line_with_a_time_of_day_is_an_error(write, make_data, read):
  file = without_header(write("e.csv", good_rows(time=["2020-06-01T10:00:00"] * 3)))
  with pytest.raises(DataError, match=r"the first line holds data"):
    read(make_data(file))


def test_names_that_are_numbers_are_a_header_if_the_config_names_them(write, make_data, read):
  rows = {"1": ["4", "5"], "2": [JUNE_1, JUNE_1], "3": ["7", "8"]}
  data = make_data(write("e.csv", rows), source={"user": "1", "time": "2"}, fields={"item": {"column": "3"}})
  assert read(data)[1]["rows_read"] == 2


def test_a_header_may_be_insisted_on(write, make_data, read):
  file = write("e.csv", {"1": ["4", "5"], "2": [JUNE_1, JUNE_1], "3": ["7", "8"]})
  source = {"header": True, "columns": ("user", "time", "item")}
  assert read(make_data(file, source=source))[1]["rows_read"] == 2


@pytest.mark.parametrize(
  ("first", "rest", "data"),
  [
    (["196", "242", "881250949"], [["186", "302", "891717742"]], True),
    (["196", "", "881250949"], [["186", "", "891717742"]], True),
    (["2019", "2020"], [["red", "blue"]], False),  # numbers over text
    (["0", "1", "2"], [["196", "242", "3"]], False),  # the names that pandas gives
    (["user", "2019", "2020"], [["u1", "3", "4"]], False),
    (["user", "2019-01-01", "2019-01-02"], [["u1", "3", "4"]], False),
    (["u1", "01/02/2024 02:21 AM", "x"], [["u2", "01/03/2024 02:21 AM", "y"]], True),
    (["196", "242"], [], True),
    (["user", "item"], [["196", "242"]], False),
  ],
)
def test_a_line_of_data_is_told_from_names(first, rest, data):
  assert text_layout.holds_data(first, rest) is data


def test_columns_rename_a_header(write, make_data, read):
  file = write("e.csv", dict(zip(("Kunde", "Zeit", "Artikel", "Preis"), good_rows().values(), strict=True)))
  (a, _), _ = read(make_data(file, source={"columns": COLUMNS}, fields=PRICE))
  assert times(a) == [JUNE_1, JUNE_1 + 2]


def test_columns_of_another_number_are_an_error(write, make_data, read):
  with pytest.raises(DataError, match=r"the first line holds 4 values, but .*log\.columns=\('user', 'time'\) names 2"):
    read(make_data(write("e.csv", good_rows()), source={"columns": ("user", "time")}))


def test_a_column_that_is_missing_names_the_first_line_if_it_looks_like_data(write, make_data, read):
  file = without_header(write("e.csv", good_rows()))
  with pytest.raises(DataError, match=r"no column 'user'.*the first line holds '\d+': if it is data, set header=False"):
    read(make_data(file))


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("header", False, r"log\.header=False needs the names of all columns: set config\.data\.sources\.log\.columns"),
    ("columns", ("a", "a"), "names the column 'a' twice"),
    ("thousands", ".,", "must be one character"),
    ("thousands", ".", r"thousands='\.' equals config\.data\.sources\.log\.decimal='\.'"),
    ("delimiter", "\n", "must be at most four bytes"),
    ("header", "no", r"header='no' is not a choice"),
  ],
)
def test_settings_that_cannot_work_are_named(key, value, message, make_data):
  with pytest.raises(ConfigError, match=message):
    make_data("e.csv", source={key: value})


def test_a_setting_of_csv_is_refused_for_another_format(write, make_data, read):
  with pytest.raises(ConfigError, match=r"log\.delimiter=';' has no meaning for the format parquet"):
    read(make_data(write("e.parquet", good_rows()), source={"delimiter": ";"}))


# ------------------------------------------------------------------------------------------------- delimiters, packing


@pytest.mark.parametrize("delimiter", ["^", ";", "||", " "])
def test_a_delimiter_is_set(delimiter, write, make_data, read):
  file = write("e.csv", good_rows())
  file.write_text(file.read_text().replace(",", delimiter))
  assert len(read(make_data(file, source={"delimiter": delimiter}))[0]) == 2


@pytest.mark.parametrize("delimiter", [",", ";", "|"])
def test_a_recbole_file_may_have_another_delimiter(delimiter, write, make_data, read):
  file = write("e.inter", good_rows())
  file.write_text(file.read_text().replace("\t", delimiter))
  assert len(read(make_data(file))[0]) == 2


@pytest.mark.parametrize("name", ["e.csv", "e.tsv", "e.jsonl", "e.inter"])
def test_a_file_packed_by_zstd_is_read(name, write, make_data, read):
  file = write(name, good_rows())
  packed = file.with_name(name + ".zst")
  with pa.CompressedOutputStream(str(packed), "zstd") as out:
    out.write(file.read_bytes())
  assert [h.user for h in read(make_data(packed))[0]] == ["a", "b"]


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.inter"])
def test_a_folders_name_is_a_column_unless_it_means_no_value(name, write, make_data, open_log):
  write(f"day=2020-06-01/{name}", good_rows())
  write(f"day=__HIVE_DEFAULT_PARTITION__/{name}", good_rows())
  write(f"day=none/{name}", good_rows())
  file = write(f"day=a%20b/{name}", good_rows())
  fields = {"item": {}, "day": {}}
  data = make_data(file.parents[1] / f"*/{name}", source={"null_values": ["none"]}, fields=fields)
  with open_log(data) as log:
    encoders = fitting.fit_encoders(log, data)
    assert sorted(encoders.categorical["day"].values) == ["2020-06-01", "a b"]
    assert sorted(encoders.categorical["item"].values) == ["x", "y"]
    assert log.counts["nulls"] == {"item": 0, "day": 6}


# ------------------------------------------------------------------------------------------------ numbers and no values


@pytest.mark.parametrize(
  ("written", "source", "numbers"),
  [
    (["1.028,50", "-3", "4,5"], {"decimal": ",", "thousands": "."}, [1028.5, -3.0, 4.5]),
    (["1,028.50", "1,234,567", "4.5"], {"thousands": ","}, [1028.5, 1234567.0, 4.5]),
    (["1 028,50", "1\u00a0000", "4\u202f000,5"], {"decimal": ",", "thousands": " "}, [1028.5, 1000.0, 4000.5]),
    (["1'028.5", "2e3", ""], {"thousands": "'"}, [1028.5, 2000.0, None]),
  ],
)
@pytest.mark.parametrize("name", ["e.tsv", "e.jsonl"])
def test_numbers_are_read_as_they_are_written(name, written, source, numbers, write, make_data, open_log):
  data = make_data(write(name, good_rows(price=written)), source=source, fields=PRICE)
  assert prices_of(data, open_log) == numbers


@pytest.mark.parametrize(
  ("value", "source"),
  [("1.5", {"decimal": ","}), ("1,5", {"thousands": ","}), ("1.02,5", {"decimal": ",", "thousands": "."}), ("1,5", {})],
)
def test_a_number_that_is_written_otherwise_is_bad(value, source, write, make_data, read):
  file = write("e.tsv", good_rows(price=["1", value, "2"]))
  with pytest.raises(DataError, match=rf"row 2: column 'price' holds '{value}', which is not a number"):
    read(make_data(file, source=source, fields=PRICE))


def test_the_decimal_comma_is_named_where_it_would_help(write, make_data, read):
  file = write("e.tsv", good_rows(price=["1", "1.028,5", "2"]))
  with pytest.raises(DataError, match=r"holds '1\.028,5'.*set decimal=',' and thousands='\.' of its table"):
    read(make_data(file, fields=PRICE))


@pytest.mark.parametrize(("column", "kind"), [("price", "a number"), ("time", "a time")])
def test_the_null_values_are_named_where_they_would_help(column, kind, write, make_data, read):
  rows = good_rows()
  rows[column] = [rows[column][0], "N/A", rows[column][2]]
  file = write("e.csv", rows)
  message = rf"holds 'N/A', which is not {kind}.*set null_values=\('NULL', 'N/A'\) of its table"
  with pytest.raises(DataError, match=message):
    read(make_data(file, source={"null_values": ["NULL"]}, fields=PRICE))


def test_numbers_of_parquet_stay_what_they_are(write, make_data, open_log):
  file = write("e.parquet", good_rows(price=[1.5, 2.0, 4.0]))
  assert prices_of(make_data(file, source={"decimal": ","}, fields=PRICE), open_log) == [1.5, 2.0, 4.0]


def test_texts_for_no_value_are_absent_everywhere(name, write, make_data, read):
  rows = good_rows(user=["a", "NULL", "b"], item=["\\N", "x", "y"], price=["NULL", "1", "2"])
  data = make_data(write(name, rows), source={"null_values": ["NULL", "\\N"]}, fields=PRICE, on_bad_rows="drop")
  (a, b), counts = read(data)
  assert (a.user, b.user) == ("a", "b") and counts["dropped"] == {"null_user": 1}
  assert a.codes.tolist() == [[ABSENT]] and np.isnan(a.numeric).tolist() == [[True]]
  assert counts["nulls"] == {"item": 1, "price": 1}


# ---------------------------------------------------------------------------------------------------- the other tables


def test_the_user_table_and_the_item_table_have_settings_of_their_own(write, make_data, open_log, tmp_path):
  (tmp_path / "i.csv").write_text("x;1,5;red\ny;2,5;NULL\n")
  (tmp_path / "u.csv").write_text("1|north\n2|NULL\n")
  items = {"file": str(tmp_path / "i.csv"), "key": "item", "header": False, "columns": ("item", "size", "hue")}
  data = make_data(
    write("e.csv", good_rows(user=["1", "2", "1"])),
    source={"items": {**items, "decimal": ",", "null_values": ("NULL",)}},
    fields={"item": {}, "price": {"kind": "numeric", "column": "size"}, "hue": {}, "area": {"table": "users"}},
    users={
      "files": [str(tmp_path / "u.csv")],
      "user": "client",
      "header": False,
      "columns": ("client", "area"),
      "null_values": ("NULL",),
    },
  )
  assert prices_of(data, open_log) == [1.5, 2.5, 1.5]
  assert values_of(data, open_log, "hue") == ["red"] and values_of(data, open_log, "area") == ["north"]


def test_labels_of_the_user_table_are_read_as_they_are_written(tmp_path):
  (tmp_path / "u.csv").write_text("client;income;town\na;1.000,5;Rome\nb;3.000,5;NULL\nc;NULL;Rome\n")
  users = config.UserTable((str(tmp_path / "u.csv"),), user="client", decimal=",", thousands=".", null_values=("NULL",))
  tasks = {
    "income": config.UserLabel(column="income", type="regression"),
    "town": config.UserLabel(column="town", type="multiclass"),
  }
  split = config.Split(user_validation=0.0, user_test=0.0)
  counts = read_user_table(users, tasks, split).counts["user_labels"]
  assert counts["income"]["mean"] == 2000.5 and counts["income"]["without_value"] == 1
  assert counts["town"]["classes"] == {"Rome": 2} and counts["town"]["without_value"] == 1


# ------------------------------------------------------------------------------------------------------- damaged lines


def test_line_ends_of_two_kinds_are_read(write, make_data, open_log):
  file = write("e.csv", good_rows(item=["x", "y\nz", "x"]))
  lines = file.read_bytes().split(b"\n")
  file.write_bytes(b"\r\n".join(lines[:2]) + b"\n" + b"\n".join(lines[2:]))
  assert values_of(make_data(file), open_log) == ["x", "y\nz"]


BAD_LINES = {
  "a,1": r"line 3 holds 2 values, but the file has 4 columns: a,1\.",
  "a,1,2,3,4": "line 3 holds 5 values, but the file has 4 columns",
  'a,1,"x,2': "line 3 opens a quotation mark that is not closed",
  'a,1,"x"y,2': "line 3 holds a quotation mark within a quoted value; it must be written twice",
  "a,1,\udcff,2": "line 3 is not UTF-8 text",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_and_may_be_dropped(line, write, make_data, read):
  rows = good_rows(item=['x,"1"', "y\nz", "x"])
  file = write("e.csv", rows)
  first, *rest = file.read_bytes().split(b"\n")
  file.write_bytes(b"\n".join([first, rest[0], line.encode(errors="surrogateescape"), *rest[1:]]))
  with pytest.raises(DataError, match=rf"e\.csv: {BAD_LINES[line]}.*on_bad_rows='drop'"):
    read(make_data(file))
  (a, b), counts = read(make_data(file, on_bad_rows="drop"))
  assert counts["dropped"] == {"unreadable_line": 1} and counts["rows_read"] == 4 and counts["rows_kept"] == 3
  assert times(a) == [JUNE_1, JUNE_1 + 2] and times(b) == [JUNE_1 + 1]


@pytest.mark.parametrize("line", list(BAD_LINES)[:4])
def test_bad_lines_are_dropped_beside_columns_that_are_derived(line, write, make_data, open_log):
  rows = good_rows(item=['{"id": "x"}', "", '{"id": "y"}'])
  file = write("price=1/day=monday/e.csv", {**rows, "price": ["1", "1", "1"]})
  first, *rest = file.read_bytes().split(b"\n")
  file.write_bytes(b"\n".join([first, rest[0], line.encode(errors="surrogateescape"), *rest[1:]]))
  fields = {"item": {"column": "item.id"}, "day": {}, "price": {"kind": "numeric"}}
  data = make_data(file, fields=fields, on_bad_rows="drop")
  assert values_of(data, open_log) == ["x", "y"] and values_of(data, open_log, "day") == ["monday"]
  assert prices_of(data, open_log) == [1.0, 1.0, 1.0]


def test_all_bad_lines_are_counted_in_the_message(write, make_data, read):
  file = write("e.inter", good_rows())
  file.write_text(file.read_text() + 'a\t1\nb\t"x\t2\t3\t4\n')
  with pytest.raises(DataError, match=r"line 5 holds 2 values.*\(2 such lines; the next is line 6\)"):
    read(make_data(file))


def test_an_unclosed_quotation_mark_costs_one_line_only(write, make_data, read):
  rows = good_rows(user=["a"] * 3, time=[JUNE_1, JUNE_1 + 1, JUNE_1 + 2])
  file = write("e.csv", rows)
  lines = file.read_text().splitlines()
  file.write_text("\n".join([lines[0], f'a,{JUNE_1},"x,1', *lines[1:3], f'a,{JUNE_1 + 3},"y",2', lines[3], ""]))
  (a,), counts = read(make_data(file, on_bad_rows="drop"))
  assert counts["dropped"] == {"unreadable_line": 1}
  assert times(a) == [JUNE_1, JUNE_1 + 1, JUNE_1 + 2, JUNE_1 + 3]


def test_bad_lines_of_joined_tables_are_dropped_and_counted(write, make_data, read, tmp_path):
  (tmp_path / "i.csv").write_text("item,hue\nx,red\ny\ny,blue\n")
  items = {"file": str(tmp_path / "i.csv"), "key": "item"}
  data = make_data(write("e.csv", good_rows()), source={"items": items}, fields={"item": {}, "hue": {}})
  with pytest.raises(DataError, match=r"i\.csv: line 3 holds 1 value, but the file has 2 columns"):
    read(data)
  _, counts = read(
    make_data(data.sources["log"].files[0], source={"items": items}, fields={"hue": {}}, on_bad_rows="drop")
  )
  assert counts["sources"]["log"]["item_rows_dropped"] == 1


def test_bad_lines_of_the_user_table_are_named_or_counted(tmp_path):
  (tmp_path / "u.csv").write_text('client,town\na,Rome\nb,"Bonn\nc,Rome\n')
  users = config.UserTable((str(tmp_path / "u.csv"),), user="client")
  tasks = {"town": config.UserLabel(column="town", type="multiclass")}
  split = config.Split(user_validation=0.0, user_test=0.0)
  with pytest.raises(DataError, match=r"u\.csv: line 3 opens a quotation mark that is not closed: b,\"Bonn"):
    read_user_table(users, tasks, split)
  read = read_user_table(users, tasks, split, "drop")
  assert read.values["town"].keys() == {"a", "c"} and read.counts["unreadable_lines"] == 1


def test_a_copy_of_good_lines_holds_what_the_file_holds(write, make_data, open_log):
  """The values of a file with a bad line are those that DuckDB reads without that line."""
  lines = ['a,1,"x\r\ny",1', 'b,2," ""q"" ",2', 'c,3, "z",3', "d,4,w,4,", 'e,5,v"v,5', "", '"f",6,"x,y",""']
  file = write("e.csv", {n: [] for n in COLUMNS})
  head = ",".join(COLUMNS) + "\n"
  source = {"time_unit": "s"}
  file.write_bytes((head + "\n".join([*lines, ""])).encode())
  whole = values_of(make_data(file, source=source, split={"mode": "leave_one_out"}), open_log)
  file.write_bytes((head + "\n".join([*lines[:3], "g,7", *lines[3:], ""])).encode())
  data = make_data(file, source=source, split={"mode": "leave_one_out"}, on_bad_rows="drop")
  assert values_of(data, open_log) == whole == sorted(["x\r\ny", ' "q" ', "z", "w", 'v"v', "x,y"])


def test_opening_a_file_reads_its_beginning_only(tmp_path):
  file = tmp_path / "e.csv"
  file.write_text("user,time,item\n" + "a,1,x\n" * 50_000 + "a,1\n")
  con = readers.connect()
  assert list(readers.open_table(con, file, "auto").columns) == ["user", "time", "item"]
