"""Tables of dated labels: what their rows say, and what is wrong with them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from supermoe_jax.config import DatedLabel
from supermoe_jax.data.reading import readers
from supermoe_jax.data.reading.dated_table import DatedTable, create_dated_rows, load_dated_rows
from supermoe_jax.errors import DataError

Load = Callable[..., tuple[list[tuple[Any, ...]], DatedTable]]


def answers(**changes: Any) -> dict[str, Any]:
  when = ["2024-01-01T10:00:00", "2024-01-02T00:00:00", "2024-01-02T00:00:00"]
  return {"client": ["a", "a", "b"], "asked_at": when, "churned": ["1", "0", None], **changes}


@pytest.fixture
def load(write: Callable[..., pathlib.Path]) -> Load:
  """Reads a file of columns: user, time, value and number of its rows, and the counts."""

  def run(columns: Any, name: str = "answers.csv", on_bad_rows: str = "error", **task: Any) -> Any:
    con = readers.connect()
    create_dated_rows(con)
    settings = {"files": (str(write(name, columns)),), "user": "client", "time": "asked_at", "column": "churned"}
    counts = load_dated_rows(con, 0, "left", DatedLabel(**{**settings, **task}), on_bad_rows)
    rows = con.execute('SELECT "user", time, value, number FROM dated_rows ORDER BY file, row').fetchall()
    con.close()
    return rows, counts

  return run


DAY = 86_400_000_000
JANUARY = 19_723 * DAY  # 2024-01-01


def test_a_row_is_a_user_a_time_and_a_label(name: str, load: Load) -> None:
  rows, counts = load(answers(), name)
  assert rows == [
    ("a", JANUARY + 10 * 3_600_000_000, "1", 1.0),
    ("a", JANUARY + DAY, "0", 0.0),
    ("b", JANUARY + DAY, None, None),
  ]
  assert list(counts.files.values()) == [3] and not counts.empty_files and not counts.dropped


def test_a_label_is_whether_the_value_is_positive(name: str, load: Load) -> None:
  rows, _ = load(answers(churned=["left", "stayed", None]), name, positive=("left",))
  assert [row[3] for row in rows] == [1.0, 0.0, None]


@pytest.mark.parametrize("values", [[True, False, None], [1, 0, None], [1.0, 0.0, float("nan")]])
def test_yes_and_no_of_any_type_need_no_positive_value(values: list[Any], load: Load) -> None:
  rows, _ = load(answers(churned=pa.array(values)), "answers.parquet")
  assert [row[3] for row in rows] == [1.0, 0.0, None]
  rows, _ = load(answers(churned=["True", "FALSE", "NaN"]))
  assert [row[3] for row in rows] == [1.0, 0.0, None]


def test_a_class_is_text_and_a_number_a_number(load: Load) -> None:
  rows, _ = load(answers(churned=["3", "low", None]), type="multiclass")
  assert [row[2:] for row in rows] == [("3", None), ("low", None), (None, None)]
  rows, _ = load(answers(churned=["3.5", "-1", None]), type="regression")
  assert [row[3] for row in rows] == [3.5, -1.0, None]


def test_numeric_times_have_a_unit_and_textual_ones_a_format(load: Load) -> None:
  seconds = [1_704_103_200, 1_704_153_600, 1_704_153_600]
  assert load(answers(asked_at=seconds))[0] == load(answers())[0]
  milliseconds = answers(asked_at=[1000 * s for s in seconds])
  assert load(milliseconds, time_unit="ms")[0] == load(answers())[0]
  with pytest.raises(DataError, match=r"answers.csv: column 'asked_at' .*Set config.tasks.left.time_unit='ms'"):
    load(milliseconds)
  days = answers(asked_at=["01/01/2024", "02/01/2024", "02/01/2024"])
  assert [row[1] for row in load(days, time_format="%d/%m/%Y")[0]] == [JANUARY, JANUARY + DAY, JANUARY + DAY]


@pytest.mark.parametrize(
  ("changes", "task", "said"),
  [
    ({"client": ["a", None, "b"]}, {}, r"answers.csv: row 2: column 'client' is empty \(1 such row\)"),
    ({"asked_at": ["2024-01-01", "soon", "soon"]}, {}, r"row 2: column 'asked_at' holds 'soon', which is not a time"),
    ({"churned": ["1", "2", None]}, {}, r"row 2: column 'churned' holds '2', which is not 0 or 1 .*left.positive"),
    ({"churned": ["1", "x", "y"]}, {"type": "regression"}, r"row 2: .* 'x', which is not a number \(2 such rows\)"),
    ({"churned": ["1", "inf", None]}, {"type": "regression"}, r"row 2: .* 'inf', which is not a number"),
  ],
)
def test_a_bad_row_is_named_or_dropped_and_counted(
  load: Load, changes: dict[str, Any], task: dict[str, Any], said: str
) -> None:
  with pytest.raises(DataError, match=said) as caught:
    load(answers(**changes), **task)
  assert "config.data.on_bad_rows='drop'" in str(caught.value)
  rows, counts = load(answers(**changes), on_bad_rows="drop", **task)
  assert len(rows) == 3 - sum(counts.dropped.values()) < 3
  assert list(counts.files.values()) == [3]


def test_a_positive_value_that_never_occurs_is_an_error(load: Load) -> None:
  with pytest.raises(DataError, match=r"left.positive: 'Left' never occurs .*did you mean 'left'.*holds 'left', 'ok'"):
    load(answers(churned=["left", "ok", None]), positive=("Left",))


def test_a_column_that_is_missing_is_named_with_its_key(load: Load) -> None:
  with pytest.raises(DataError, match=r"has no column 'churn' \(config.tasks.left.column\); did you mean 'churned'"):
    load(answers(), column="churn")
