"""Event logs: order, users, values, joined items, duplicates, split and counts."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from supermoe_jax import config
from supermoe_jax.data.preparation import event_log, fitting
from supermoe_jax.data.preparation.event_log import EventLog
from supermoe_jax.errors import DataError
from tests.fixtures.event_rows import ABSENT, JUNE_1, LEAVE_ONE_OUT, PRICE, SECOND, UNKNOWN, good_rows

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
  monkeypatch.setattr(event_log, "BATCH_ROWS", 7)
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
    assert fitting.fit_encoders(log, data).categorical["item"].values == expected


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


def test_a_log_that_was_read_to_its_end_is_not_read_again(write, make_data, tmp_path):
  data = make_data(write("e.csv", good_rows()))
  with EventLog(data, tmp_path) as log:
    first = log.counts, log.start, log.end, log.user_type, log.query("SELECT * FROM events ORDER BY ord")
    assert not log.resumed
  write("e.csv", good_rows(user=["z"] * 3))
  with EventLog(data, tmp_path) as log:
    assert log.resumed
    assert first == (log.counts, log.start, log.end, log.user_type, log.query("SELECT * FROM events ORDER BY ord"))


def test_a_log_that_was_not_read_to_its_end_is_read_again(write, make_data, tmp_path):
  with pytest.raises(DataError):
    EventLog(make_data(write("e.csv", good_rows(user=[None] * 3))), tmp_path)
  with EventLog(make_data(write("f.csv", good_rows())), tmp_path) as log:
    assert not log.resumed and log.counts["events"] == 3


def test_a_memory_limit_that_is_no_amount_is_an_error(write, make_data, read):
  with pytest.raises(DataError, match=r"config\.data\.memory='much' is not an amount such as '2GB'"):
    read(make_data(write("e.csv", good_rows()), memory="much"))


def test_queries_do_not_end_a_stream_of_shards(write, make_data, open_log, monkeypatch):
  monkeypatch.setattr(event_log, "BATCH_ROWS", 2)
  n = 5_000
  data = make_data(write("e.parquet", {"user": list(range(n)), "time": [JUNE_1] * n, "item": ["x"] * n}))
  with open_log(data) as log:
    found = []
    for shard, users, rows in log.shards(fitting.fit_encoders(log, data), 7):
      assert rows.num_rows == len(users)
      found.append((shard, len(users)))
      log.query("SELECT count(*) FROM events")
    assert [shard for shard, _ in found] == list(range(7)) and sum(u for _, u in found) == n
