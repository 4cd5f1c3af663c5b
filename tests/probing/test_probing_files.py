"""Label tables, and embeddings of other systems, in every shape; what cannot be used is named."""

import decimal
import json
import pathlib
import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.errors import DataError
from supermoe_jax.probing import label_table, vectors


def write(folder: pathlib.Path, columns: dict[str, Any], name: str = "table.parquet") -> pathlib.Path:
  table = pa.table(columns)
  file = folder / name
  if name.endswith(".csv"):
    pa_csv.write_csv(table, file)
  else:
    pq.write_table(table, file)
  return file


COLUMNS = {
  "user_id": [1, 2, 3, 4, 5, 6],
  "flag": [True, False, None, True, False, False],
  "gender": ["F", "M", "F", None, "M", "M"],
  "stars": [1, 2, 3, 4, 5, 1],
  "spent": [1.5, float("nan"), 2.25, 3.0, 0.5, 9.0],
  "one": [7] * 6,
}


@pytest.mark.parametrize("name", ["table.parquet", "table.csv"])
def test_kinds_follow_from_the_values_and_missing_ones_stay_missing(tmp_path: pathlib.Path, name: str) -> None:
  found = label_table.read_label_table(write(tmp_path, COLUMNS, name))
  by_name = {x.name: x for x in found.labels}
  assert {n: x.kind for n, x in by_name.items()} == {
    "flag": "binary",
    "gender": "binary",
    "stars": "multiclass",
    "spent": "regression",
  }
  assert found.users.tolist() == ["1", "2", "3", "4", "5", "6"]
  assert np.isnan(by_name["flag"].value).tolist() == [False, False, True, False, False, False]
  assert by_name["gender"].classes == ("F", "M")
  assert by_name["stars"].classes == ("1", "2", "3", "4", "5")
  assert np.isnan(by_name["spent"].value).tolist() == [False, True, False, False, False, False]
  assert found.not_measured == {"one": "all its values are 7"}


def test_kinds_can_be_set(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path, COLUMNS)
  (found,) = label_table.read_label_table(file, wanted=["stars"], kinds={"stars": "regression"}).labels
  assert found.kind == "regression" and found.value.tolist() == [1, 2, 3, 4, 5, 1]
  with pytest.raises(DataError, match="'stars' has 5 different values; --kind takes it for binary"):
    label_table.read_label_table(file, kinds={"stars": "binary"})
  with pytest.raises(DataError, match="'gender' holds the text 'F'"):
    label_table.read_label_table(file, kinds={"gender": "regression"})
  with pytest.raises(DataError, match="none of the labels; did you mean 'stars'"):
    label_table.read_label_table(file, kinds={"star": "binary"})


def test_a_glob_names_columns_and_a_group(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path, {"user_id": [1, 2], "cat_a": [0, 1], "cat_b": [1, 0], "dog": [1, 0]})
  found = label_table.read_label_table(file, wanted=["cat_*", "cat_a"])
  assert [x.name for x in found.labels] == ["cat_a", "cat_b"]
  assert found.groups == {"cat_*": ["cat_a", "cat_b"]}
  with pytest.raises(DataError, match=r"no column 'cat_c' \(--label\); did you mean 'cat_"):
    label_table.read_label_table(file, wanted=["cat_c"])


def test_a_repeated_row_is_counted_and_a_contradiction_is_an_error(tmp_path: pathlib.Path) -> None:
  times = pa.array(["2024-01-01", "2024-02-01", "2024-01-01"])
  file = write(tmp_path, {"user_id": [7, 7, 7], "day": times, "y": [0, 1, 0], "z": [None, 2.0, 3.0]}, "t.csv")
  found = label_table.read_label_table(file, time="day")
  assert found.repeated_rows == 1 and len(found.users) == 2
  assert found.time.tolist() == [config.parse_time(t, "") for t in ("2024-01-01", "2024-02-01")]
  assert {x.name: x.value.tolist() for x in found.labels} == {"y": [0, 1], "z": [1, 0]}  # 3 and 2, two values
  with pytest.raises(DataError, match=r'user 7 has two labels in "y", 0\.0 and 1\.0; keep .*--time'):
    label_table.read_label_table(file, wanted=["y"])
  file = write(tmp_path, {"user_id": [7, 7], "day": times[:1].to_pylist() * 2, "y": ["a", "b"]}, "u.csv")
  with pytest.raises(DataError, match='user 7 at 2024-01-01T00:00:00 has two labels in "y", a and b'):
    label_table.read_label_table(file, time="day")


@pytest.mark.parametrize(
  ("columns", "options", "message"),
  [
    ({"id": [1], "y": [1]}, {}, r"no column 'user_id' \(--user\)"),
    ({"user_id": [1, None], "y": [1, 0]}, {}, "row 2 holds None in 'user_id', which is no user"),
    ({"user_id": [1], "t": ["soon"], "y": [1]}, {"time": "t"}, "row 1 holds 'soon' in 't', which is no time"),
    ({"user_id": [1], "t": [17], "y": [1]}, {"time": "t"}, "write times as timestamps, dates or ISO 8601"),
    ({"user_id": [1, 2], "y": [1.0, float("inf")]}, {}, "'y' holds a value that is infinite"),
    ({"user_id": [1]}, {}, "has no column of labels"),
  ],
)
def test_a_label_table_that_cannot_be_used_is_an_error(
  tmp_path: pathlib.Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
  with pytest.raises(DataError, match=message):
    label_table.read_label_table(write(tmp_path, columns), **options)


VECTORS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


@pytest.mark.parametrize(
  "columns",
  [
    {"v": pa.array(VECTORS, pa.list_(pa.float64(), 2))},
    {"v": pa.array(VECTORS, pa.list_(pa.float32()))},
    {"v": pa.array(VECTORS, pa.large_list(pa.float64()))},
    {"v": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64()))},
    {"a": [1.0, 3.0, 5.0], "b": [2, 4, 6]},
    {"v": VECTORS, "n_events": [3, 4, 5], "city": ["x", "y", "z"]},
  ],
)
@pytest.mark.parametrize("ids", [[1, 2, 3], ["1", "2", "3"], [1.0, 2.0, 3.0]])
def test_other_systems_files_are_read_in_all_shapes(
  tmp_path: pathlib.Path, columns: dict[str, Any], ids: list[Any]
) -> None:
  found = vectors.read_vectors("other", write(tmp_path, {"user_id": ids, **columns}))
  assert found.user.tolist() == ["1", "2", "3"] and found.time is None
  assert found.x.dtype == np.float32 and found.x.tolist() == VECTORS
  assert found.about["columns_left_out"] == [c for c in columns if c in ("n_events", "city")]
  assert found.find(np.array(["3", "9"], object), None).tolist() == [2, -1]


def test_vectors_of_a_european_csv_are_read_as_inspect_finds_them_and_the_settings_are_said(
  tmp_path: pathlib.Path,
) -> None:
  file = tmp_path / "export.csv"
  file.write_text("kunde;stand;x;y;aktiv;ort\n007;2024-01-05;1.028,50;-0,25;true;Bonn\n8;2024-01-05;2,5;7;false;NULL\n")
  found = vectors.read_vectors("export", file, user="kunde", time="stand")
  assert found.user.tolist() == ["007", "8"] and found.times == [config.parse_time("2024-01-05", "")]
  assert found.x.tolist() == [[1028.5, -0.25, 1.0], [2.5, 7.0, 0.0]]
  assert found.about["columns_left_out"] == ["ort"]
  said = {"delimiter": ";", "decimal": ",", "thousands": ".", "null_values": ["NULL"]}
  assert found.about["text"] == said


def test_a_csv_of_vectors_with_a_fault_names_its_line(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "export.csv"
  file.write_text("user_id,x,y\n" + "".join(f"{i},{i / 8},1\n" for i in range(50)) + "50,1\n51,2,3\n")
  with pytest.raises(DataError, match=r"export\.csv: line 52 .*Correct the file"):
    vectors.read_vectors("export", file)
  file.write_text("7,0.5,1\n8,0.25,2\n")
  with pytest.raises(DataError, match=r"has no column 'user_id' of users \(--user\)"):
    vectors.read_vectors("export", file)


def test_a_csv_file_and_a_folder_of_parts_are_read_too(tmp_path: pathlib.Path) -> None:
  file = write(tmp_path, {"member": ["007", "8"], "a": [1, 2], "b": [0.5, 0.25]}, "x.csv")
  found = vectors.read_vectors("other", file, user="member")
  assert found.user.tolist() == ["007", "8"] and found.x.tolist() == [[1, 0.5], [2, 0.25]]
  parts = tmp_path / "parts"
  parts.mkdir()
  for i in range(2):
    write(
      parts, {"user_id": [i], "as_of": np.array(["2024-01-01"], "datetime64[us]"), "v": [[float(i)]]}, f"{i}.parquet"
    )
  found = vectors.read_vectors("other", parts)
  time = config.parse_time("2024-01-01", "")
  assert found.times == [time]
  assert found.find(np.array(["1", "1"], object), np.array([time, time + 1])).tolist() == [1, -1]


@pytest.mark.parametrize(
  ("columns", "message"),
  [
    ({"id": [1], "v": [[1.0]]}, r"no column 'user_id' of users \(--user\)"),
    ({"user_id": [1, None], "v": [[1.0], [2.0]]}, "row 2 has no user"),
    ({"user_id": [1, 2], "v": [[1.0], [2.0, 3.0]]}, "row 2, user 2, has 2 numbers in 'v', the first row 1"),
    ({"user_id": [1, 2], "v": [[1.0], None]}, "row 2, user 2, has no numbers"),
    ({"user_id": [1, 2], "v": [[1.0], [float("nan")]]}, "user 2 holds no finite 32-bit number in place 1"),
    ({"user_id": [1, 2], "a": [1.0, 2.0], "b": [1.0, None]}, "user 2 holds no finite 32-bit number in column 'b'"),
    ({"user_id": [1, 2], "a": [1.0, 1e39]}, "user 2 holds no finite 32-bit number"),
    ({"user_id": [4, 4], "v": [[1.0], [2.0]]}, "user 4 has two rows"),
    ({"user_id": [1], "v": [[1.0]], "w": [[1.0]]}, "several columns of lists, v, w"),
    ({"user_id": [1], "name": ["x"]}, "neither a column of lists nor columns of numbers"),
    ({"user_id": [1], "as_of": ["soon"], "v": [[1.0]]}, "'soon' is not a time"),
    ({"user_id": pa.array([], pa.int64()), "v": pa.array([], pa.list_(pa.float32()))}, "holds no row"),
  ],
)
def test_another_systems_file_that_cannot_be_used_is_an_error(
  tmp_path: pathlib.Path, columns: dict[str, Any], message: str
) -> None:
  with pytest.raises(DataError, match=message):
    vectors.read_vectors("other", write(tmp_path, columns))


def test_a_file_that_is_not_there_or_is_no_parquet_is_an_error(tmp_path: pathlib.Path) -> None:
  with pytest.raises(DataError, match="there are no embeddings"):
    vectors.read_vectors("other", tmp_path / "gone.parquet")
  (tmp_path / "x.parquet").write_text("no")
  with pytest.raises(DataError, match="cannot be read as Parquet"):
    vectors.read_vectors("other", tmp_path / "x.parquet")
  (tmp_path / "empty").mkdir()
  with pytest.raises(DataError, match=r"no manifest\.json of 'supermoe embed', and no Parquet file"):
    vectors.read_vectors("other", tmp_path / "empty")


def test_ids_of_users_are_read_alike_in_labels_and_vectors(tmp_path: pathlib.Path) -> None:
  ids = [uuid.UUID(int=n) for n in (3, 2, 1)]
  columns = {
    "decimals": (pa.array([decimal.Decimal(n) for n in (7, 10, 100)], pa.decimal128(38, 10)), ["7", "10", "100"]),
    "floats": (pa.array([7.0, 10.0, 2.0**53 - 1]), ["7", "10", str(2**53 - 1)]),
    "uuids": (pa.array([i.bytes for i in ids], pa.binary(16)), [str(i) for i in ids]),
    "bytes": (pa.array([b"a", "é".encode(), b"c"], pa.binary()), ["a", "é", "c"]),
  }
  for name, (users, expected) in columns.items():
    file = write(tmp_path, {"user_id": users, "x": [0.5, 1.0, 2.0], "flag": [0, 1, 1]}, f"{name}.parquet")
    assert label_table.read_label_table(file, wanted=["flag"]).users.tolist() == expected
    assert vectors.read_vectors("other", file).user.tolist() == expected


@pytest.mark.parametrize("value", [2.0**53, 1e18])
def test_ids_that_a_float_cannot_tell_apart_are_an_error(tmp_path: pathlib.Path, value: float) -> None:
  file = write(tmp_path, {"user_id": [1.0, 2.0, value], "x": [0.5, 1.0, 2.0], "flag": [0, 1, 1]})
  for read in (label_table.read_label_table, lambda file: vectors.read_vectors("other", file)):
    with pytest.raises(DataError, match=r"column 'user_id' .*different ids may have become one"):
      read(file)


def test_lists_and_objects_are_no_labels(tmp_path: pathlib.Path) -> None:
  columns = {"user_id": [1, 2], "tags": [["p"], ["q"]], "props": [{"a": 1}, {"a": 2}], "flag": [0, 1]}
  (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pa.table(columns).to_pylist()))
  for file in (write(tmp_path, columns), tmp_path / "table.jsonl"):
    found = label_table.read_label_table(file)
    assert [x.name for x in found.labels] == ["flag"] and {*found.not_measured} == {"tags", "props"}


def test_a_label_table_is_read_as_it_is_written(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "labels.csv"
  file.write_text("7^05.01.2024^1.028,5^gold\n8^06.01.2024^2,5^NULL\r\n9^07.01.2024^NULL^tin\n")
  text = config.TextFormat(
    delimiter="^",
    header=False,
    columns=("client", "day", "spent", "tier"),
    decimal=",",
    thousands=".",
    null_values=("NULL",),
  )
  kinds: dict[str, label_table.LabelKind] = {"spent": "regression"}
  found = label_table.read_label_table(file, "client", "day", kinds=kinds, text=text, time_format="%d.%m.%Y")
  spent, tier = found.labels
  assert found.users.tolist() == ["7", "8", "9"] and found.time is not None
  assert [config.format_time(t)[:10] for t in found.time] == ["2024-01-05", "2024-01-06", "2024-01-07"]
  assert (spent.kind, tier.classes) == ("regression", ("gold", "tin"))
  np.testing.assert_array_equal(spent.value, [1028.5, 2.5, np.nan])


def test_a_label_table_without_header_is_an_error_that_names_the_options(tmp_path: pathlib.Path) -> None:
  (tmp_path / "labels.csv").write_text("7,1,0.5\n8,0,0.7\n")
  with pytest.raises(DataError, match=r"the first line holds data.*Set --no-header and --columns …"):
    label_table.read_label_table(tmp_path / "labels.csv")


def test_label_times_of_another_format_name_the_option(tmp_path: pathlib.Path) -> None:
  (tmp_path / "labels.csv").write_text("user_id,day,y\na,13.01.2024,1\nb,14.01.2024,0\n")
  with pytest.raises(
    DataError, match=r"which is no time; set --time-format %d\.%m\.%Y, which reads '.*' as 2024-01-13"
  ):
    label_table.read_label_table(tmp_path / "labels.csv", time="day")


def test_a_word_for_no_value_among_the_classes_is_a_warning(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  (tmp_path / "labels.csv").write_text("user_id,tier\na,gold\nb,\\N\nc,\\N\nd,tin\n")
  label_table.read_label_table(tmp_path / "labels.csv")
  (warning,) = caplog.messages
  assert "column 'tier' holds '\\\\N' in 2 rows, as a value" in warning and "--null-values '\\N'" in warning
  label_table.read_label_table(tmp_path / "labels.csv", text=config.TextFormat(null_values=("\\N",)))
  assert len(caplog.messages) == 1
