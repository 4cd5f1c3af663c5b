"""JSON values become the text and the numbers that DuckDB makes of the same values in files."""

from typing import Any

import pytest

from supermoe_jax import config
from supermoe_jax.data.reading import readers, value_sql
from supermoe_jax.serving.json_columns import common_kind, kind_of
from supermoe_jax.serving.json_values import (
  ColumnKind,
  TimeKind,
  ValueProblem,
  number_reader,
  text_reader,
  texts_reader,
)

# A DuckDB type, a literal of it, and the JSON of the same value.
VALUES = [
  ("VARCHAR", "'a b'", "a b"),
  ("VARCHAR", "''", ""),
  ("VARCHAR", "'5'", 5),
  ("VARCHAR", "'true'", True),
  ("BIGINT", "9007199254740993", 9007199254740993),
  ("BIGINT", "-5", "-5"),
  ("BIGINT", "7", 7.0),
  ("HUGEINT", "170141183460469231731687303715884105727", 2**127 - 1),
  ("UTINYINT", "255", 255),
  ("DOUBLE", "5", 5),
  ("DOUBLE", "5", 5.0),
  ("DOUBLE", "'-0.0'::DOUBLE", -0.0),
  ("DOUBLE", "2.5", 2.5),
  ("DOUBLE", "0.1", 0.1),
  ("DOUBLE", "1e15", 1e15),
  ("DOUBLE", "1e16", 1e16),
  ("DOUBLE", "9007199254740992", 9007199254740992),
  ("DOUBLE", "1e-5", 1e-5),
  ("DOUBLE", "0.0001", 1e-4),
  ("DOUBLE", "1.5e300", 1.5e300),
  ("DOUBLE", "123456789.125", 123456789.125),
  ("FLOAT", "0.1", 0.1),
  ("FLOAT", "0.3", 0.30000001192092896),
  ("FLOAT", "16777217", 16777217),
  ("FLOAT", "1e10", 1e10),
  ("FLOAT", "1e20", 1e20),
  ("FLOAT", "1e-7", 1e-7),
  ("DECIMAL(10,2)", "5", 5),
  ("DECIMAL(10,2)", "-2.5", -2.5),
  ("DECIMAL(10,2)", "0", -0.0),
  ("DECIMAL(10,2)", "1.005", "1.005"),
  ("DECIMAL(30,0)", "12345678901234567890", 12345678901234567890),
  ("BOOLEAN", "true", True),
  ("BOOLEAN", "false", False),
  ("DATE", "'2024-01-05'", "2024-01-05"),
  ("TIMESTAMP", "'2024-01-05 10:00:00'", "2024-01-05T10:00:00"),
  ("TIMESTAMP", "'2024-01-05 10:00:00.5'", "2024-01-05T10:00:00.500000"),
  ("TIMESTAMP", "'2024-01-05'", "2024-01-05"),
  ("TIMESTAMP WITH TIME ZONE", "'2024-01-05 10:00:00.25+02'", "2024-01-05T10:00:00.25+02:00"),
  ("TIME", "'10:00:00'", "10:00:00"),
  ("UUID", "'6cb6a4b0-0f6d-4f8e-9e39-000000000001'", "6cb6a4b0-0f6d-4f8e-9e39-000000000001"),
]


@pytest.fixture(scope="module")
def con():
  found = readers.connect()
  yield found
  found.close()


@pytest.mark.parametrize(("type", "literal", "value"), VALUES)
def test_text_is_that_of_the_files(type: str, literal: str, value: Any, con: Any) -> None:
  ((wanted,),) = con.execute(f"SELECT {value_sql.text_sql('x', type)} FROM (SELECT {literal}::{type} AS x)").fetchall()
  assert text_reader(kind_of(type, "parquet"))(value) == wanted


@pytest.mark.parametrize("value", ["1.50", "1e3", "5.0", "true", '"x"', "7", "0.1", "1e-7", "12345678901234567890"])
def test_text_of_json_lines_is_theirs(value: str, con: Any, tmp_path: Any) -> None:
  import json

  (tmp_path / "x.jsonl").write_text(f'{{"x": {value}}}\n')
  ((wanted,),) = con.execute(
    f"SELECT {value_sql.text_sql('x', 'VARCHAR')} FROM read_json('{tmp_path}/x.jsonl', columns = {{x: 'VARCHAR'}})"
  ).fetchall()
  assert text_reader(kind_of("VARCHAR", "jsonl"))(json.loads(value)) == wanted


@pytest.mark.parametrize("text", ["1.5", " 2 ", "\t3\n", "+5", ".5", "5.", "1e3", "-1E-3", "nan", "", "1e-400"])
def test_numbers_in_text_are_those_of_the_files(text: str, con: Any) -> None:
  sql = value_sql.number_sql("x", "VARCHAR")
  ((wanted,),) = con.execute(f"SELECT CASE WHEN isfinite({sql}) THEN {sql} END FROM (SELECT ? AS x)", [text]).fetchall()
  found = number_reader(ColumnKind("text"), log1p=False)(text)
  assert found == wanted if wanted is not None else found != found


DIALECTS = [
  config.TextFormat(decimal=",", thousands="."),
  config.TextFormat(thousands=","),
  config.TextFormat(decimal=",", thousands=" "),
  config.TextFormat(decimal=","),
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
  "text",
  ["1.028,50", "1,028.50", "1 028,5", "1\u202f028,5", "1.5", "1,5", " -2 ", "1.02,5", "12,34,567", "1,000", "1.0"],
)
def test_numbers_of_another_dialect_are_those_of_the_files(text: str, dialect: config.TextFormat, con: Any) -> None:
  sql = value_sql.number_sql("x", "VARCHAR", dialect)
  ((wanted,),) = con.execute(f"SELECT {sql} FROM (SELECT ? AS x)", [text]).fetchall()
  read = number_reader(kind_of("VARCHAR", "csv", dialect), log1p=False)
  if wanted is None:
    with pytest.raises(ValueProblem, match="is not a number"):
      read(text)
  else:
    assert read(text) == wanted
  assert read(2.5) == 2.5  # a number of JSON needs no dialect


def test_texts_for_no_value_are_absent() -> None:
  kind = kind_of("VARCHAR", "csv", config.TextFormat(null_values=("NULL", "\\N")))
  assert text_reader(kind)("NULL") is None and text_reader(kind)("null") == "null"
  assert texts_reader(kind, "|")("\\N") is None and texts_reader(kind, "|")("a|NULL") == ["a", "NULL"]
  found = number_reader(kind, log1p=False)("NULL")
  assert found != found
  assert common_kind([ColumnKind("integer"), kind]) == kind


@pytest.mark.parametrize("text", ["x", "1e400", "inf", "0x10", "١", "--5", "5 5"])
def test_text_that_is_no_number_is_refused(text: str) -> None:
  with pytest.raises(ValueProblem, match="is not a number"):
    number_reader(ColumnKind("text"), log1p=False)(text)


@pytest.mark.parametrize("text", ["a|b", " a | |b ", "|", "", "\u00a0a\u2003|\tb"])
def test_lists_in_text_are_split_as_in_the_files(text: str, con: Any) -> None:
  sql = value_sql.list_sql("x", "VARCHAR", "|", json=False)
  ((wanted,),) = con.execute(f"SELECT {sql} FROM (SELECT ? AS x)", [text]).fetchall()
  assert texts_reader(ColumnKind("text"), "|")(text) == wanted


@pytest.mark.parametrize(
  "text",
  [
    "2024-01-05",
    "2024-01-05 10:00",
    "2024-01-05T10:00:00Z",
    "2024-01-05T10:00:00.1234567",
    "2024-01-05T10:00:00+02",
    "0001-01-01",
    "1969-12-31T23:59:59.999999",
    "9999-12-31 23:59:59.999999",
  ],
)
def test_times_are_those_of_the_files(text: str, con: Any) -> None:
  ((wanted,),) = con.execute(f"SELECT {value_sql.iso_sql('x')} FROM (SELECT ? AS x)", [text]).fetchall()
  assert wanted is not None and TimeKind("iso").read(text) == wanted


@pytest.mark.parametrize(("unit", "value"), [("s", 1.7e9), ("s", 1700000000.1234565), ("ms", -1.5), ("us", 17)])
def test_epochs_are_rounded_as_in_the_files(unit: str, value: float, con: Any) -> None:
  sql = value_sql.epoch_sql("x", "DOUBLE", unit)
  ((wanted,),) = con.execute(f"SELECT {sql} FROM (SELECT ?::DOUBLE AS x)", [float(value)]).fetchall()
  assert TimeKind("epoch", unit=unit).read(value) == wanted == TimeKind("epoch", unit=unit).read(repr(value))


@pytest.mark.parametrize("value", [1704067200123456499, 1704067200123456500, 1704067200123456700, 1_500, 2_500, -1_500])
def test_nanoseconds_are_rounded_as_in_the_files(value: int, con: Any) -> None:
  sql = value_sql.epoch_sql("x", "BIGINT", "ns")
  ((wanted,),) = con.execute(f"SELECT {sql} FROM (SELECT ?::BIGINT AS x)", [value]).fetchall()
  assert TimeKind("epoch", unit="ns").read(value) == wanted == TimeKind("epoch", unit="ns").read(str(value))


def test_times_in_a_format_of_their_own_are_read() -> None:
  kind = TimeKind("format", format="%d.%m.%Y %H:%M")
  assert kind.read("05.01.2024 10:00") == TimeKind("iso").read("2024-01-05T10:00") == kind.read("2024-01-05T10:00")


def test_columns_of_several_files_are_read_as_what_holds_them_all() -> None:
  integer, double, text = ColumnKind("integer"), ColumnKind("float64"), ColumnKind("text")
  assert common_kind([integer, integer]) == integer
  assert common_kind([integer, double]) == double
  assert common_kind([double, text]) == text
  assert common_kind([ColumnKind("date"), integer]) == text
