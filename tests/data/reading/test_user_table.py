"""Labels from the table of users."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from supermoe_jax.config import Split, UserLabel, UserTable
from supermoe_jax.data.encoding.splits import TRAIN, user_split
from supermoe_jax.data.reading.user_table import read_user_table
from supermoe_jax.errors import DataError

WOMAN = UserLabel(column="gender", positive=("F",))
YOUNG = UserLabel(column="age", positive=("10", "20"))


def people(**changes):
  return {"user": ["1", "2", "3"], "gender": ["F", "M", None], "age": [10, 40, 20], **changes}


@pytest.fixture
def labels(write):
  """Reads the labels of tasks (`woman` by default) from a file of columns."""

  def run(columns, name="users.parquet", tasks=None):
    table = UserTable(files=(str(write(name, columns)),), user="user")
    read = read_user_table(table, tasks or {"woman": WOMAN}, Split())
    return read.values, read.counts

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
  found, _ = labels(people(gender=[True, False, None]), tasks={"yes": UserLabel(column="gender", positive=("true",))})
  assert found["yes"] == {"1": 1.0, "2": 0.0}


def test_two_tasks_may_read_one_column(labels):
  found, _ = labels(people(), tasks={"woman": WOMAN, "man": UserLabel(column="gender", positive=("M",))})
  assert found["man"] == {"1": 0.0, "2": 1.0}


def test_several_files_are_one_table(write, tmp_path):
  write("part-1.csv", people())
  write("part-2.csv", people(user=["4", "5", "6"]))
  read = read_user_table(UserTable((str(tmp_path / "*.csv"),), user="user"), {"woman": WOMAN}, Split())
  assert read.counts["user_rows"] == 6 and set(read.values["woman"]) == {"1", "2", "4", "5"}


def test_a_missing_column_is_named_with_the_nearest(name, labels):
  with pytest.raises(DataError, match=rf"{name} has no column 'sex' \(config\.tasks\.man\.column\)"):
    labels(people(), name, {"woman": WOMAN, "man": UserLabel(column="sex", positive=("M",))})
  columns = people()
  columns["users"] = columns.pop("user")
  with pytest.raises(DataError, match=r"no column 'user' \(config\.data\.users\.user\); did you mean 'users'"):
    labels(columns, name)


def test_a_user_with_two_rows_is_named(name, labels):
  with pytest.raises(DataError, match=rf"{name} row 1 and .*{name} row 3: user='1' has 2 rows"):
    labels(people(user=["1", "2", "1"]), name)


def test_a_row_without_a_user_is_named(name, labels):
  with pytest.raises(DataError, match=rf"{name}: row 2: column 'user' is empty \(2 such rows\)"):
    labels(people(user=["1", None, None]), name)


def test_a_positive_value_that_never_occurs_is_named_with_those_that_do(name, labels):
  message = r"config\.tasks\.woman\.positive: 'Female' never occurs in column 'gender'.*it holds 'F', 'M'"
  with pytest.raises(DataError, match=message):
    labels(people(), name, {"woman": UserLabel(column="gender", positive=("F", "Female"))})


def test_a_misspelt_positive_value_gets_the_nearest_as_hint(labels):
  with pytest.raises(DataError, match=r"'femal' never occurs in column 'gender'; did you mean 'female'\?"):
    labels(people(gender=["female", "male", None]), tasks={"woman": UserLabel(column="gender", positive=("femal",))})


def test_a_table_without_rows_is_named(name, labels):
  with pytest.raises(DataError, match=rf"{name} (is empty|holds no row)"):
    labels({c: pa.array([], pa.string()) for c in people()}, name)


def test_a_missing_file_is_named():
  with pytest.raises(DataError, match=r"config\.data\.users\.files: .*nowhere"):
    read_user_table(UserTable(("/nowhere/users.csv",)), {"woman": WOMAN}, Split())


# -------------------------------------------------------------------------------------------------- classes and numbers

SPLIT = Split(user_validation=0.2, user_test=0.2)
USERS = [str(i) for i in range(60)]
TRAINING = [u for u in USERS if user_split(u, SPLIT) == TRAIN]
OTHERS = [u for u in USERS if u not in TRAINING]
SEGMENT = UserLabel(column="segment", type="multiclass")
INCOME = UserLabel(column="income", type="regression")


@pytest.fixture
def read_one(write):
  """Reads the label `it` of a task from a table of all users, whose column is given user by user."""

  def run(task, values, name="users.parquet", on_bad_rows="error"):
    file = write(name, {"user": USERS, task.column: [values[u] for u in USERS]})
    read = read_user_table(UserTable((str(file),), user="user"), {"it": task}, SPLIT, on_bad_rows)
    return read.values["it"], read.encoders["it"], read.counts["user_labels"]["it"]

  return run


def segments():
  """Of the training users five are b, the others half a, half c; the first of the other users is alone with d."""
  kinds = dict(zip(TRAINING, ["b"] * 5 + ["c", "a"] * len(TRAINING)))
  return kinds | dict.fromkeys(OTHERS, "a") | {OTHERS[0]: "d", OTHERS[1]: None}


def test_classes_are_those_of_training_users_most_frequent_first_and_ties_by_value(name, read_one):
  values = segments()
  counted = {v: sum(values[u] == v for u in TRAINING) for v in "abc"}
  label, classes, _ = read_one(SEGMENT, values, name)
  assert list(classes.values) == sorted("abc", key=lambda v: (-counted[v], v))
  assert list(classes.counts) == [counted[v] for v in classes.values]
  assert all(classes.values[int(label[u])] == values[u] for u in label)
  ties = dict.fromkeys(USERS, None) | dict(zip(TRAINING, ["z", "y", "x"]))
  assert read_one(SEGMENT, ties)[1].values == ("x", "y", "z")


def test_a_class_that_no_training_user_has_is_masked_and_counted(read_one):
  label, classes, counts = read_one(SEGMENT, segments())
  assert "d" not in classes.values and OTHERS[0] not in label
  assert (counts["unseen_class"], counts["without_value"], counts["labelled"]) == (1, 1, len(USERS) - 2)
  assert sum(counts["classes"].values()) == counts["labelled"]


def test_numbers_are_standardised_by_the_training_users_alone(name, read_one):
  rng = np.random.default_rng(0)
  values = {u: round(float(rng.normal(50, 10)), 3) for u in USERS}
  wild = values | dict.fromkeys(OTHERS, 9e6)
  training = np.array([values[u] for u in TRAINING])
  label, numbers, counts = read_one(INCOME, wild, name)
  assert (numbers.mean, numbers.std) == pytest.approx((training.mean(), training.std()))
  assert (counts["mean"], counts["std"]) == (numbers.mean, numbers.std)
  got = np.array([label[u] for u in TRAINING])
  np.testing.assert_allclose(got, (training - training.mean()) / training.std(), rtol=1e-5, atol=1e-6)


def test_text_that_is_no_number_is_named_or_dropped_and_counted(read_one):
  values = dict.fromkeys(USERS, "5") | {USERS[7]: "much", USERS[9]: "more", USERS[3]: None}
  message = r"users\.csv: row 8: column 'income' holds 'much', which is not a number \(2 such rows\)"
  with pytest.raises(DataError, match=message):
    read_one(INCOME, values, "users.csv")
  label, _, counts = read_one(INCOME, values, "users.csv", "drop")
  assert not {USERS[3], USERS[7], USERS[9]} & set(label)
  assert (counts["dropped"], counts["without_value"], counts["labelled"]) == (2, 1, len(USERS) - 3)


@pytest.mark.parametrize("task", [SEGMENT, INCOME])
def test_no_training_user_with_a_value_is_an_error(read_one, task):
  values = dict.fromkeys(USERS, None) | dict.fromkeys(OTHERS, "1")
  with pytest.raises(DataError, match=rf"tasks\.it: no training user has a value .* \({len(OTHERS)} other users"):
    read_one(task, values)
