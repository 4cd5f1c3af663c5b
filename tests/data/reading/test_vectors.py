"""Fields of vectors: lists of numbers of events, items and users, stored once each and read as they were written."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supermoe_jax import config
from supermoe_jax.data.encoding.vectors import Vectors
from supermoe_jax.data.encoding.vocabulary import Encoders
from supermoe_jax.data.preparation import fitting
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.event_rows import good_rows, histories

LOOK = {"item": {}, "look": {"kind": "vector", "size": 3}}
X, Y = [0.5, -1.0, 2.0], [3.0, 0.0, 0.25]


@pytest.fixture
def fitted(make_data, open_log):
  """Reads the events of a config; returns the encoder of `look`, its vectors of each user's events, and the counts."""

  def run(*files, fields=None, **changes):
    data = make_data(*files, fields=fields or LOOK, **changes)
    with open_log(data) as log:
      encoders = fitting.fit_encoders(log, data)
      encoder = encoders.categorical["look"]
      place = list(encoders.categorical).index("look")
      found = [encoder.looked_up(h.codes[:, place], encoder.rows) for h in histories(log, encoders)]
      return encoder, [vectors * encoder.scale for vectors in found], log.counts

  return run


@pytest.mark.parametrize("kind", ["list", "array", "double", "jsonl", "text", "separated"])
def test_a_vector_of_an_event_is_read_as_it_was_written(kind, fitted, tmp_path, write):
  looks, fields = [X, Y, None], LOOK
  if kind in ("list", "array", "double"):
    type = {"list": pa.list_(pa.float32()), "array": pa.list_(pa.float32(), 3), "double": pa.list_(pa.float64())}[kind]
    file = tmp_path / "e.parquet"
    pq.write_table(pa.table({**good_rows(), "look": pa.array(looks, type)}), file)
  elif kind == "jsonl":
    file = write("e.jsonl", good_rows(look=looks))
  elif kind == "text":
    file = write("e.csv", good_rows(look=[json.dumps(x) if x else None for x in looks]))
  else:
    file = write("e.csv", good_rows(look=[";".join(map(str, x)) if x else None for x in looks]))
    fields = {"item": {}, "look": {**LOOK["look"], "separator": ";"}}
  encoder, (a, b), counts = fitted(file, fields=fields)
  assert encoder.scale == pytest.approx(np.sqrt(np.mean(np.square([X, Y]))))
  np.testing.assert_allclose(a, [[np.nan] * 3, X], rtol=2e-3)  # of user a the third row is earlier than the first
  np.testing.assert_allclose(b, [Y], rtol=2e-3)
  assert counts["nulls"]["look"] == 1


def test_numbers_with_a_decimal_comma_make_a_vector(fitted, tmp_path):
  looks = ["0,5|-1|2,0", "1.003,0|0|0,25", None]
  source = {"delimiter": ";", "decimal": ",", "thousands": "."}
  rows = good_rows(look=looks)
  lines = [";".join(rows)] + [";".join("" if v is None else str(v) for v in row) for row in zip(*rows.values())]
  file = tmp_path / "e.csv"
  file.write_text("\n".join(lines) + "\n")
  _, (a, b), _ = fitted(file, source=source)
  np.testing.assert_allclose(a[1], X, rtol=2e-3)
  np.testing.assert_allclose(b, [[1003.0, 0.0, 0.25]], rtol=2e-3)


def test_the_vector_of_an_item_is_stored_once(fitted, write):
  items = write("items.jsonl", {"sku": ["x", "y", "z"], "look": [X, Y, [9.0, 9.0, 9.0]]})
  source = {"items": {"file": str(items), "key": "item", "table_key": "sku"}}
  encoder, (a, b), counts = fitted(write("e.csv", good_rows()), source=source)
  np.testing.assert_array_equal(encoder.rows, [X, Y])  # most frequent first; no event has the item z
  np.testing.assert_allclose(a, [X, X], rtol=2e-3)
  np.testing.assert_allclose(b, [Y], rtol=2e-3)
  assert counts["nulls"]["look"] == 0


def test_an_item_without_a_vector_has_none(fitted, write):
  items = write("items.jsonl", {"item": ["x", "y"], "look": [X, []]})
  _, (_, b), counts = fitted(write("e.csv", good_rows()), source={"items": {"file": str(items), "key": "item"}})
  assert np.isnan(b).all() and counts["nulls"]["look"] == 1


def test_a_vector_of_the_table_of_users_is_carried_by_their_events(fitted, write):
  users = write("users.jsonl", {"user": ["a", "b"], "look": [Y, X]})
  fields = {"item": {}, "look": {**LOOK["look"], "table": "users"}}
  _, (a, b), _ = fitted(write("e.csv", good_rows()), fields=fields, users={"files": [str(users)], "user": "user"})
  np.testing.assert_allclose(a, [Y, Y], rtol=2e-3)
  np.testing.assert_allclose(b, [X], rtol=2e-3)


BAD = [
  ([0.5, -1.0], r"'\[0\.5, -1\.0\] \(2 numbers\)', which is not a list of 3 finite numbers"),
  ([0.5, None, 1.0], "NULL"),
  (["a", "1", "2"], "a, 1, 2"),
  ([float("nan"), 1.0, 2.0], "nan"),
  ([1.0, float("inf"), 2.0], "inf"),
]


@pytest.mark.parametrize(("bad", "shown"), BAD)
def test_a_value_that_is_no_vector_is_an_error_with_its_place_or_a_dropped_row(bad, shown, fitted, tmp_path):
  file = tmp_path / "e.parquet"
  texts = isinstance(bad[0], str)
  looks = pa.array([list(map(str, x)) if texts else x for x in (X, bad, Y)])
  pq.write_table(pa.table({**good_rows(), "look": looks}), file)
  with pytest.raises(DataError, match=rf"e\.parquet: row 2: column 'look' holds .*{shown}") as error:
    fitted(file)
  assert "look.size" in str(error.value) and "on_bad_rows='drop'" in str(error.value)
  _, found, counts = fitted(file, on_bad_rows="drop")
  assert counts["dropped"] == {"unparsable_field_look": 1} and len(found) == 1


def test_a_bad_vector_of_an_item_names_the_row_of_the_table(fitted, write):
  items = write("items.jsonl", {"item": ["x", "y"], "look": [X, Y[:2]]})
  with pytest.raises(DataError, match=r"items\.jsonl: row 2: column 'look' holds .*2 numbers"):
    fitted(write("e.csv", good_rows()), source={"items": {"file": str(items), "key": "item"}})


def test_a_column_that_holds_no_lists_is_an_error(fitted, tmp_path):
  file = tmp_path / "e.parquet"
  pq.write_table(pa.table({**good_rows(), "look": [1.5, 2.0, 3.0]}), file)
  with pytest.raises(DataError, match=r"'look' \(config\.data\.fields\.look\) is of type DOUBLE, which holds no lists"):
    fitted(file)


@pytest.mark.parametrize(
  ("changes", "problem"),
  [
    ({"size": 100_000}, "look.size=100000: name the number of numbers"),
    ({"many": 2}, "look.many=2 has no meaning"),
    ({"buckets": 2}, "look.buckets=2 has no meaning"),
    ({"input": False}, "look.input=False: vectors are inputs only"),
  ],
)
def test_settings_without_meaning_are_errors(changes, problem, make_data, tmp_path):
  with pytest.raises(ConfigError, match=problem):
    make_data(tmp_path / "e.csv", fields={"item": {}, "look": {**LOOK["look"], **changes}})


def test_saved_vectors_are_read_again(fitted, write, tmp_path):
  encoder, _, _ = fitted(write("e.jsonl", good_rows(look=[X, Y, X])))
  Encoders({"look": encoder}, {}).save(tmp_path / "saved")
  again = Encoders.load(tmp_path / "saved").categorical["look"]
  assert isinstance(again, Vectors) and again.scale == encoder.scale and again.n_codes == 4
  np.testing.assert_array_equal(again.rows, encoder.rows)
  assert again.table().equals(encoder.table())


def test_tasks_about_vectors_are_errors(make_data, tmp_path):
  fields = {**LOOK, "price": {"kind": "numeric"}}
  tasks = [
    ({"kind": "next_event", "field": "look"}, "'look' holds lists, which are inputs only"),
    ({"kind": "event_label", "field": "look", "positive": ["x"]}, "'look' holds lists, which are inputs only"),
    ({"kind": "event_label", "field": "price", "given": ["look"]}, "'look' holds lists"),
    ({"kind": "next_event", "field": "item", "where": "look == 1"}, "'look' holds lists"),
  ]
  data = config.to_dict(make_data(tmp_path / "e.csv", fields=fields))
  for task, problem in tasks:
    with pytest.raises(ConfigError, match=problem):
      config.resolve({"data": data, "tasks": {"asked": task}})


def test_clipped_vectors_are_counted(fitted, write):
  near = [[1.0, 0.0, 0.0]] * 2
  rows = {"user": ["a", "b", "a"], "time": [1590969600, 1590969601, 1900000000], "item": ["x", "y", "z"]}
  encoder, (a, _), _ = fitted(write("e.jsonl", {**rows, "look": [*near, [1e9, 0.0, 0.0]]}))
  assert encoder.clipped == 1 and fitting.vector_facts(encoder)["clipped"] == 1  # only training gives the scale
  np.testing.assert_allclose(a[1] / encoder.scale, [1000, 0, 0], rtol=1e-3)
