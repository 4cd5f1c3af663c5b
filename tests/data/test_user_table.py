"""Labels from the table of users."""

from __future__ import annotations

import pyarrow as pa
import pytest

from supermoe_jax.config import UserLabel, UserTable
from supermoe_jax.data.events import DataError
from supermoe_jax.data.user_table import read_user_table

WOMAN = UserLabel(column="gender", positive=("F",))
YOUNG = UserLabel(column="age", positive=("10", "20"))


def people(**changes):
  return {"user": ["1", "2", "3"], "gender": ["F", "M", None], "age": [10, 40, 20], **changes}


@pytest.fixture
def labels(write):
  """Reads the labels of tasks (`woman` by default) from a file of columns."""

  def run(columns, name="users.parquet", tasks=None):
    table = UserTable(files=(str(write(name, columns)),), user="user")
    return read_user_table(table, tasks or {"woman": WOMAN})

  return run


def test_a_label_is_whether_the_value_is_positive(name, labels):
  found, counts = labels(people(), name, {"woman": WOMAN, "young": YOUNG})
  assert found["woman"] == {"1": 1.0, "2": 0.0}
  assert found["young"] == {"1": 1.0, "2": 0.0, "3": 1.0}
  assert counts["user_rows"] == 3
  assert counts["user_labels"]["young"] == {"labelled": 3, "positive": 2, "without_value": 0}


def test_a_user_without_a_value_has_no_label(name, labels):
  found, counts = labels(people(), name)
  assert "3" not in found["woman"]
  assert counts["user_labels"]["woman"] == {"labelled": 2, "positive": 1, "without_value": 1}


def test_users_are_text_as_in_the_event_log(labels):
  found, _ = labels(people(user=pa.array([1.0, 2.0, 3.0])))
  assert set(found["woman"]) == {"1", "2"}


def test_booleans_are_true_and_false(labels):
  found, _ = labels(people(gender=[True, False, None]), tasks={"yes": UserLabel("gender", ("true",))})
  assert found["yes"] == {"1": 1.0, "2": 0.0}


def test_two_tasks_may_read_one_column(labels):
  found, _ = labels(people(), tasks={"woman": WOMAN, "man": UserLabel("gender", ("M",))})
  assert found["man"] == {"1": 0.0, "2": 1.0}


def test_several_files_are_one_table(write, tmp_path):
  write("part-1.csv", people())
  write("part-2.csv", people(user=["4", "5", "6"]))
  found, counts = read_user_table(UserTable((str(tmp_path / "*.csv"),), user="user"), {"woman": WOMAN})
  assert counts["user_rows"] == 6 and set(found["woman"]) == {"1", "2", "4", "5"}


def test_a_missing_column_is_named_with_the_nearest(name, labels):
  with pytest.raises(DataError, match=rf"{name} has no column 'sex' \(config\.tasks\.man\.column\)"):
    labels(people(), name, {"woman": WOMAN, "man": UserLabel("sex", ("M",))})
  columns = people()
  columns["users"] = columns.pop("user")
  with pytest.raises(DataError, match=r"no column 'user' \(config\.data\.users\.user\); did you mean 'users'"):
    labels(columns, name)


def test_a_user_with_two_rows_is_named(name, labels):
  with pytest.raises(DataError, match=rf"{name} row 1 and .*{name} row 3: user='1' stands in 2 rows"):
    labels(people(user=["1", "2", "1"]), name)


def test_a_row_without_a_user_is_named(name, labels):
  with pytest.raises(DataError, match=rf"{name}: row 2: column 'user' is empty \(2 such rows\)"):
    labels(people(user=["1", None, None]), name)


def test_a_positive_value_that_never_occurs_is_named_with_those_that_do(name, labels):
  message = r"config\.tasks\.woman\.positive: 'Female' never occurs in column 'gender'.*it holds 'F', 'M'"
  with pytest.raises(DataError, match=message):
    labels(people(), name, {"woman": UserLabel("gender", ("F", "Female"))})


def test_a_misspelt_positive_value_gets_the_nearest_as_hint(labels):
  with pytest.raises(DataError, match=r"'femal' never occurs in column 'gender'; did you mean 'female'\?"):
    labels(people(gender=["female", "male", None]), tasks={"woman": UserLabel("gender", ("femal",))})


def test_a_table_without_rows_is_named(name, labels):
  with pytest.raises(DataError, match=rf"{name} (is empty|holds no row)"):
    labels({c: pa.array([], pa.string()) for c in people()}, name)


def test_a_missing_file_is_named():
  with pytest.raises(DataError, match=r"config\.data\.users\.files: .*nowhere"):
    read_user_table(UserTable(("/nowhere/users.csv",)), {"woman": WOMAN})
