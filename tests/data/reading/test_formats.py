"""Files of event logs: formats, endings, missing, empty and damaged ones."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from supermoe_jax.data.preparation import fitting
from supermoe_jax.data.reading import readers
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import ABSENT, JUNE_1, PRICE, good_rows, times
from tests.fixtures.messages import messages

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
    ("txt", "sequences"),
    ("txt.gz", "sequences"),
    ("csv.zst", "csv"),
    ("jsonl.zst", "jsonl"),
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
    assert fitting.fit_encoders(log, data).categorical["item"].values == ['x,"1"', "y\nz"]


def test_atomic_files_are_not_quoted(write, make_data, open_log):
  data = make_data(write("e.inter", good_rows(item=['"x', "y", '"x'])))
  with open_log(data) as log:
    assert fitting.fit_encoders(log, data).categorical["item"].values == ['"x', "y"]


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
  with pytest.raises(DataError, match=r"\*\.csv matches no data file"):
    read(make_data(tmp_path / "*.csv"))


def spark_folder(write, tmp_path, folder="log.parquet", ending="parquet"):
  """Writes two files of data, and what Spark leaves beside them."""
  write(f"{folder}/part-0.{ending}", good_rows())
  write(f"{folder}/deep/part-1.{ending}", good_rows(user=["c", "c", "c"]))
  write(f"{folder}/_temporary/0/part-2.{ending}", good_rows(user=["d", "d", "d"]))
  write(f"{folder}/_part-3.{ending}", good_rows(user=["e", "e", "e"]))
  for name in ("_SUCCESS", ".part-0.crc", "deep/.part-1.crc"):
    (tmp_path / folder / name).write_text("x")
  return tmp_path / folder


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("pattern", ["log.parquet", "log.parquet/", "log.parquet/**/*", "log*", "*/**/part-*"])
def test_a_folder_stands_for_its_data_files(pattern, ending, write, make_data, read, tmp_path):
  spark_folder(write, tmp_path, ending=ending)
  histories, counts = read(make_data(f"{tmp_path}/{pattern}"))
  assert [h.user for h in histories] == ["a", "b", "c"]
  assert counts["rows_read"] == 6


def test_files_that_are_passed_over_by_their_names_are_said(write, make_data, read, tmp_path):
  folder = spark_folder(write, tmp_path)
  with messages() as said:
    read(make_data(folder))
  (line,) = [text for text in said if "passed over" in text]
  assert line.startswith("config.data.sources.log.files: 2 files passed over") and "_part-3.parquet" in line


@pytest.mark.parametrize("pattern", ["_log/*.csv", "_log", "*/_log/_*.csv", "_*/*.csv"])
def test_a_name_that_the_pattern_gives_may_begin_with_an_underscore(pattern, write, make_data, read, tmp_path):
  write("in/_log/_1.csv" if pattern.startswith("*") else "in/_log/1.csv", good_rows())
  root = tmp_path if pattern.startswith("*") else tmp_path / "in"
  assert len(read(make_data(root / pattern))[0]) == 2


def test_a_folder_without_data_is_an_error(write, make_data, read, tmp_path):
  write("log/_temporary/1.csv", good_rows())
  with pytest.raises(DataError, match=r"the folder .*log holds no data file; names that begin with"):
    read(make_data(tmp_path / "log"))


def test_a_file_named_twice_is_an_error(write, make_data, read, tmp_path):
  file = write("e.csv", good_rows())
  with pytest.raises(DataError, match=r"e\.csv is named twice"):
    read(make_data(file, tmp_path / "*.csv"))


def test_a_file_behind_a_scheme_that_is_not_read_is_an_error(make_data, read):
  with pytest.raises(DataError, match=r"az://bucket/e\.csv is not a local file"):
    read(make_data("az://bucket/e.csv"))


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
  with pytest.raises(DataError, match=r"e\.csv: line 5 holds 2 values, but the file has 4 columns: a,1\."):
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
