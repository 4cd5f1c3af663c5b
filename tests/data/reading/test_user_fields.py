"""Fields of the table of users: every event of a user carries them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from supermoe_jax import config
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import fitting
from supermoe_jax.errors import DataError
from tests.fixtures.dataset_copies import copied
from tests.fixtures.event_rows import ABSENT, JUNE_1, UNKNOWN, good_rows, histories
from tests.fixtures.random_logs import CASES, folder_once, prepared_once

FIELDS = {"item": {}, "country": {"table": "users"}}


def people(**changes):
  return {"user": ["a", "b"], "country": ["DE", "FR"], "age": ["30", "50"], **changes}


@pytest.fixture
def joined(write, make_data, open_log):
  """Reads events and files of users (name → columns); returns the encoders, the histories and the counts."""

  def run(tables, fields, log=None, **changes):
    files = [str(write(name, columns)) for name, columns in tables.items()]
    events = write("e.parquet", good_rows() if log is None else log)
    data = make_data(events, fields=fields, users={"files": files, "user": "user"}, **changes)
    with open_log(data) as log:
      encoders = fitting.fit_encoders(log, data)
      return encoders, histories(log, encoders), log.counts

  return run


@pytest.mark.parametrize("table", ["users.parquet", "users.csv", "users.jsonl", "users.user"])
def test_every_event_carries_what_is_known_of_its_user(table, joined):
  encoders, (a, b), counts = joined({table: people()}, FIELDS)
  country = encoders.categorical["country"]
  assert country.values == ["DE", "FR"] and country.counts.tolist() == [2, 1]  # events, not users, are counted
  assert a.codes[:, 1].tolist() == [2, 2] and b.codes[:, 1].tolist() == [3]
  assert counts["sources"]["log"]["users_missing"] == 0 == counts["user_rows_dropped"]


def test_fields_of_every_kind_are_joined(joined):
  fields = {
    "item": {},
    "country": {"table": "users"},
    "town": {"table": "users", "column": "country", "kind": "hash", "size": 50},
    "rare": {"table": "users", "column": "country", "min_count": 2, "buckets": 3},
    "tags": {"table": "users", "many": 2},
    "age": {"table": "users", "kind": "numeric", "encoding": "log1p"},
    "price": {"kind": "numeric"},
  }
  encoders, (a, b), _ = joined({"users.csv": people(tags=["x|y", "z"])}, fields)
  code = {n: e.code for n, e in encoders.categorical.items()}
  first = [code["item"]("x"), code["country"]("DE"), code["town"]("DE"), code["rare"]("DE"), code["tags"]("x")]
  assert a.codes.tolist() == [[*first, code["tags"]("y")]] * 2
  assert code["rare"]("FR") >= 3 and b.codes[0, 1:].tolist() == [
    *(code[n]("FR") for n in ("country", "town", "rare")),
    code["tags"]("z"),
    ABSENT,
  ]
  ages = np.log1p([30.0, 30, 50])
  expected = (ages - ages.mean()) / ages.std()
  np.testing.assert_allclose([*a.numeric[:, 0], *b.numeric[:, 0]], expected, rtol=1e-5)


def test_a_user_without_a_row_or_a_value_has_none_and_is_not_out_of_vocabulary(joined):
  log = good_rows(user=["a", "b", "c"])
  _, histories, counts = joined({"users.csv": people(country=["DE", ""])}, FIELDS, log)
  assert [h.codes[:, 1].tolist() for h in histories] == [[2], [ABSENT], [ABSENT]]
  assert counts["sources"]["log"]["users_missing"] == 1
  assert counts["nulls"] == {"item": 0, "country": 2}


def test_a_value_of_users_who_come_after_training_is_out_of_vocabulary(joined):
  late = config.parse_time("2021-01-01", "") // 1_000_000
  log = good_rows(user=["a", "a", "b"], time=[JUNE_1, JUNE_1 + 1, late])
  _, (a, b), _ = joined({"users.csv": people()}, FIELDS, log)
  assert a.codes[:, 1].tolist() == [2, 2] and b.codes[:, 1].tolist() == [UNKNOWN]


def test_ids_of_different_types_are_compared_as_text(joined):
  log = good_rows(user=[1, 2, 1])
  users = pa.table({"user": pa.array([1.0, 2.0]), "country": ["DE", "FR"]})
  _, histories, counts = joined({"users.parquet": users}, FIELDS, log)
  assert [h.codes[:, 1].tolist() for h in histories] == [[2, 2], [3]]
  assert counts["sources"]["log"]["users_missing"] == 0


def test_several_files_are_one_table_and_their_columns_may_differ_in_order_and_type(joined):
  one = {"user": ["a"], "age": [30], "country": ["DE"]}
  other = {"age": ["50"], "country": ["FR"], "user": ["b"]}
  fields = {**FIELDS, "age": {"table": "users", "kind": "numeric"}}
  _, (a, b), _ = joined({"1.parquet": one, "2.parquet": other}, fields)
  assert a.codes[:, 1].tolist() == [2, 2] and b.codes[:, 1].tolist() == [3]
  assert a.numeric[0, 0] < 0 < b.numeric[0, 0]


def test_only_the_sources_named_carry_the_field(write, make_data, read):
  users = {"files": [str(write("users.csv", people(user=["a", "z"])))], "user": "user"}
  source = {"user": "user", "time": "time"}
  sources = {n: {"files": [str(write(f"{n}.csv", good_rows()))], **source} for n in ("views", "buys")}
  fields = {"item": {}, "country": {"table": "users", "sources": ["buys"]}}
  (a, b), counts = read(make_data(sources=sources, fields=fields, users=users))
  assert [*zip(a.source.tolist(), a.codes[:, 1].tolist())] == [(0, ABSENT), (1, 2), (0, ABSENT), (1, 2)]
  assert b.codes[:, 1].tolist() == [ABSENT, ABSENT]
  assert "users_missing" not in counts["sources"]["views"] and counts["sources"]["buys"]["users_missing"] == 1
  assert counts["nulls"]["country"] == 1


def test_events_and_users_may_have_columns_of_one_name(joined):
  fields = {"item": {}, "theirs": {"table": "users", "column": "item"}, "brand": {"table": "users", "column": "item"}}
  _, (a, b), _ = joined({"users.csv": people(item=["p", "q"])}, fields)
  assert a.codes.tolist() == [[2, 2, 2]] * 2 and b.codes.tolist() == [[3, 3, 3]]


def test_the_tables_of_items_and_users_are_joined_together(write, joined):
  items = write("items.csv", {"item": ["x"], "brand": ["B"]})
  source = {"items": {"file": str(items), "key": "item"}}
  _, (a, b), counts = joined({"users.csv": people(user=["b", "c"])}, {**FIELDS, "brand": {}}, source=source)
  assert a.codes.tolist() == [[2, ABSENT, 2]] * 2 and b.codes.tolist() == [[3, 2, ABSENT]]
  log = counts["sources"]["log"]
  assert (log["items_missing"], log["users_missing"]) == (1, 2)


@pytest.mark.parametrize(
  ("tables", "says"),
  [
    (
      {"users.csv": people(user=["a", "a"])},
      r"users\.csv: 2 rows have user='a', the first is row 1, the next row 2; a user \(config\.data\.users\) needs "
      r"exactly one row",
    ),
    (
      {"1.csv": people(), "2.csv": people(user=["c", "b"])},
      r"1\.csv: 2 rows have user='b', the first is row 2, the next row 2 of .*2\.csv; a user",
    ),
    (
      {"users.csv": {"user": ["a"], "county": ["DE"], "age": ["1"]}},
      r"users\.csv has no column 'country' \(config\.data\.fields\.country\); did you mean 'county'",
    ),
    (
      {"users.csv": {"users": ["a"], "country": ["DE"], "age": ["1"]}},
      r"users\.csv has no column 'user' \(config\.data\.users\.user\); did you mean 'users'",
    ),
    ({"users.csv": people(user=["a", ""])}, r"users\.csv: row 2: column 'user' is empty .*on_bad_rows='drop'"),
    (
      {"1.csv": people(), "2.csv": people(user=["c", "d"], age=["1", "old"])},
      r"2\.csv: row 2: column 'age' holds 'old', which is not a number \(1 such row\)\. .*on_bad_rows='drop'",
    ),
  ],
)
def test_a_table_that_cannot_be_used_is_named_with_its_row(tables, says, joined):
  with pytest.raises(DataError, match=says):
    joined(tables, {**FIELDS, "age": {"table": "users", "kind": "numeric"}})


def test_bad_rows_of_users_may_be_dropped_and_are_counted(joined):
  fields = {**FIELDS, "age": {"table": "users", "kind": "numeric"}}
  table = people(user=["a", "b", None], country=["DE", "FR", "IT"], age=["30", "old", "1"])
  _, (a, b), counts = joined({"users.csv": table}, fields, on_bad_rows="drop")
  assert a.codes[:, 1].tolist() == [2, 2] and b.codes[:, 1].tolist() == [ABSENT]
  assert counts["user_rows_dropped"] == 2 and counts["sources"]["log"]["users_missing"] == 1
  assert counts["events"] == 3 and not counts["dropped"]


# ---------------------------------------------------------------------------------------------------------- a dataset


CASE = CASES["text"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return prepared_once(tmp_path_factory, "text", "calendar")


def test_a_users_numbers_are_not_averaged_in_the_aggregates(dataset):
  assert {"price", "height"} <= {*dataset.schema.numeric}
  assert {n.split()[1] for n in dataset.aggregator.names if n.startswith("mean ")} == {"price"}


def test_a_dataset_with_fields_of_users_is_found_right(dataset):
  assert sum(c.labels for c in check.check_dataset(dataset.path).values())
  known = {u["user"] for u in CASE.users}
  missing = {n: s["users_missing"] for n, s in dataset.manifest["reading"]["sources"].items()}
  assert missing == {n: sum(r.user not in known for r in getattr(CASE, n)) for n in ("views", "buys")}
  assert all(missing.values())


def test_a_change_of_the_table_of_users_is_noticed(tmp_path_factory, tmp_path):
  dataset = Dataset(copied(folder_once(tmp_path_factory, "text", "calendar"), tmp_path))
  dataset.check_files()
  with (tmp_path / "users.parquet").open("ab") as out:
    out.write(b"x")
  with pytest.raises(DataError, match=r"users\.parquet, which has changed"):
    dataset.check_files()
