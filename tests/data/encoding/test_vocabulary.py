"""Encoders: fitted on the training period only, stable, and the same after saving."""

from __future__ import annotations

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.batch import ABSENT, FIRST_VALUE, UNKNOWN
from supermoe_jax.config import hashing
from supermoe_jax.data.encoding.numeric import Numeric
from supermoe_jax.data.encoding.vocabulary import Classes, Encoders, Hashing, Vocabulary, _bucket
from supermoe_jax.data.preparation import fitting
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.event_rows import histories

TRAIN_END = config.parse_time("2021-01-01", "") // 1_000_000


def rows(items, late=(), **columns):
  """Events of one user: `items` one a second up to the end of the training period, `late` from then on."""
  n = len(items)
  time = [TRAIN_END - n + i for i in range(n)] + [TRAIN_END + i for i in range(len(late))]
  return {"user": ["a"] * len(time), "time": time, "item": [*items, *late], **columns}


@pytest.fixture
def fitted(write, make_data, open_log):
  """Writes events, fits encoders and returns them with the codes of the only user and the report of unseen values."""

  def run(columns, **changes):
    data = make_data(write("e.parquet", columns), **changes)
    with open_log(data) as log:
      encoders = fitting.fit_encoders(log, data)
      (history,) = histories(log, encoders)
      return encoders, history, fitting.coverage_of(log, encoders)

  return run


def test_values_are_ordered_by_count_then_by_value(fitted):
  encoders, _, _ = fitted(rows(["b", "c", "c", "a"]))
  encoder = encoders.categorical["item"]
  assert encoder.values == ["c", "a", "b"]
  assert encoder.counts.tolist() == [2, 1, 1] and encoder.counts.dtype == np.int64
  assert encoder.n_codes == 5


def test_values_seen_only_after_training_are_out_of_vocabulary(fitted):
  _, history, report = fitted(rows(["a", "a", "b"], late=["a", "new", None]))
  assert history.codes[:, 0].tolist() == [2, 2, 3, 2, UNKNOWN, ABSENT]
  assert report["item"]["oov_training"] == 0.0
  assert report["item"]["oov_after"] == 0.5


def test_events_after_training_do_not_change_the_encoders(fitted):
  fields = {"item": {}, "price": {"kind": "numeric"}}
  columns = rows(["a", "b", "b"])
  alone, _, _ = fitted({**columns, "price": [1.0, 2.0, 3.0]}, fields=fields)
  more, _, _ = fitted(
    {**rows(["a", "b", "b"], late=["a", "a", "a"]), "price": [1.0, 2, 3, 100, 200, 300]}, fields=fields
  )
  assert alone.categorical["item"].values == more.categorical["item"].values
  assert alone.numeric == more.numeric


def test_a_vocabulary_keeps_the_most_frequent_values(fitted):
  encoders, history, report = fitted(rows(["a", "b", "b", "c", "c", "c"]), fields={"item": {"size": 2}})
  assert encoders.categorical["item"].values == ["c", "b"]
  assert history.codes[:, 0].tolist() == [UNKNOWN, 3, 3, 2, 2, 2]
  assert report["item"]["oov_training"] == pytest.approx(1 / 6)


def test_rare_values_are_out_of_vocabulary(fitted):
  encoders, _, _ = fitted(rows(["a", "b", "b"]), fields={"item": {"min_count": 2}})
  assert encoders.categorical["item"].values == ["b"]


def test_a_min_count_that_leaves_nothing_is_an_error(fitted):
  with pytest.raises(DataError, match=r"occurs 5 times in training; lower config\.data\.fields\.item\.min_count"):
    fitted(rows(["a", "b", "b"]), fields={"item": {"min_count": 5}})


@pytest.mark.parametrize("kind", ["vocabulary", "hash", "numeric"])
def test_a_field_without_a_value_in_training_is_an_error(kind, fitted):
  columns = rows(["a", "b"], late=["c"])
  with pytest.raises(
    DataError, match=r"Field 'other' \(column 'other'\) has no value at all in the training .* 1 after"
  ):
    fitted({**columns, "other": [None, None, 3.0]}, fields={"item": {}, "other": {"kind": kind}})


def test_hash_codes_are_the_same_in_python_and_in_the_database(fitted):
  values = [f"värde {i}" for i in range(200)] + ["", "日本"]
  encoders, history, _ = fitted(rows(values), fields={"item": {"kind": "hash", "size": 50}, "user": {}})
  encoder = encoders.categorical["item"]
  expected = [encoder.code(v or None) for v in values]
  assert history.codes[:, 0].tolist() == expected
  assert ABSENT in expected and UNKNOWN not in expected and max(expected) < encoder.n_codes == 52


def test_hash_codes_never_change():
  # Written down once: a dataset that was prepared has to fit a model that is served years later.
  assert [Hashing(1000).code(v) for v in ("abc", "1", "日本")] == [840, 703, 576]


def test_collisions_of_a_hash_are_reported(fitted):
  values = [str(i) for i in range(30)]
  encoders, _, report = fitted(rows([*values, "0"]), fields={"item": {"kind": "hash", "size": 20}, "user": {}})
  codes = [encoders.categorical["item"].code(v) for v in values]
  assert report["item"]["values"] == 30
  assert report["item"]["colliding"] == pytest.approx(np.mean([codes.count(c) > 1 for c in codes]))


def test_values_out_of_a_vocabulary_with_buckets_have_codes_that_follow_its_own(fitted):
  values = ["a", "a", "b", "b", *(f"rare {i}" for i in range(9)), None]
  new = ["new", "a", "日本", None]
  fields = {"user": {}, "item": {"min_count": 2, "buckets": 5}}
  encoders, history, report = fitted(rows(values, late=new), fields=fields)
  encoder = encoders.categorical["item"]
  assert encoder.values == ["a", "b"] and encoder.n_codes == 2 + 2 + 5
  hashed = Hashing(5)
  expected = [{"a": 2, "b": 3, None: ABSENT}.get(v) for v in (*values, *new)]
  expected = [hashed.code(v) + 2 if code is None else code for v, code in zip((*values, *new), expected, strict=True)]
  assert history.codes[:, 1].tolist() == [encoder.code(v) for v in (*values, *new)] == expected
  assert UNKNOWN not in expected
  codes = [hashed.code(v) for v in values[4:-1]]
  assert report["item"] == {
    "kind": "vocabulary",
    "codes": 9,
    "oov_training": pytest.approx(9 / 13),
    "oov_after": pytest.approx(2 / 3),
    "values_training": 13,
    "outside_training": 9,
    "values_after": 3,
    "outside_after": 2,
    "values": 9,
    "colliding": pytest.approx(np.mean([codes.count(c) > 1 for c in codes])),
  }


def test_buckets_that_hold_no_value_of_training_have_no_collisions(fitted):
  encoders, history, report = fitted(rows(["a", "b"], late=["c"]), fields={"user": {}, "item": {"buckets": 1}})
  assert history.codes[:, 1].tolist() == [2, 3, 4] and encoders.categorical["item"].n_codes == 5
  assert report["item"]["values"] == 0 and report["item"]["colliding"] is None


def test_a_log_that_ends_with_training_has_no_rate_after_it(fitted):
  _, _, report = fitted(rows(["a", "b"]))
  assert report["item"]["oov_after"] is None


def test_numbers_are_standardised_by_their_training_statistics(fitted):
  price = [1.0, 2.0, 6.0, None, 100.0]
  encoders, history, _ = fitted(
    {**rows(["a", "b", "c", "d"], late=["e"]), "price": price}, fields={"item": {}, "price": {"kind": "numeric"}}
  )
  assert encoders.numeric["price"].mean == 3.0
  assert encoders.numeric["price"].std == pytest.approx(np.std([1, 2, 6]))
  np.testing.assert_allclose(history.numeric[[0, 1, 2], 0].std(), 1, rtol=1e-6)
  assert np.isnan(history.numeric[3, 0])


def test_a_constant_number_has_deviation_one(fitted):
  encoders, history, _ = fitted(
    {**rows(["a", "b"]), "price": [0.1, 0.1]}, fields={"item": {}, "price": {"kind": "numeric"}}
  )
  assert encoders.numeric["price"].std == 1.0
  np.testing.assert_allclose(history.numeric, 0, atol=1e-7)


def test_encoders_are_in_config_order(fitted):
  fields = {"b": {"column": "item"}, "n": {"kind": "numeric"}, "a": {"column": "item", "kind": "hash", "size": 9}}
  encoders, _, _ = fitted({**rows(["a", "b"]), "n": [1, 2]}, fields=fields)
  assert list(encoders.categorical) == ["b", "a"]


def test_encoders_survive_saving(fitted, tmp_path):
  fields = {"a/b c": {"column": "item"}, "hashed": {"column": "item", "kind": "hash"}, "price": {"kind": "numeric"}}
  fields |= {"both": {"column": "item", "min_count": 2, "buckets": 3}}
  encoders, _, _ = fitted({**rows(["a", "b", "b"]), "price": [1, 2, 4]}, fields=fields)
  encoders.save(tmp_path / "encoders")
  loaded = Encoders.load(tmp_path / "encoders")
  assert list(loaded.categorical) == ["a/b c", "hashed", "both"]
  assert loaded.categorical["a/b c"].buckets == 0 and loaded.categorical["both"].buckets == 3
  assert [loaded.categorical["both"].code(v) for v in "bax"] == [encoders.categorical["both"].code(v) for v in "bax"]
  assert loaded.categorical["a/b c"].values == ["b", "a"]
  assert loaded.categorical["a/b c"].counts.tolist() == [2, 1]
  assert loaded.categorical["hashed"] == encoders.categorical["hashed"]
  assert loaded.numeric == encoders.numeric


def test_encoders_of_labels_survive_saving(tmp_path):
  labels = {"segment": Classes(("b", "a"), (3, 1)), "income": Numeric(2.5, 1.5)}
  Encoders({}, {}, labels).save(tmp_path)
  assert Encoders.load(tmp_path).labels == labels


@pytest.mark.parametrize("encoding", ["standardise", "log1p"])
def test_a_raw_number_is_encoded_as_in_events(fitted, encoding):
  price = [0.1, -2.3, 7.7, 1e6, 4.0]
  encoders, history, _ = fitted(
    {**rows(list("abcde")), "price": price}, fields={"item": {}, "price": {"kind": "numeric", "encoding": encoding}}
  )
  got = [encoders.numeric["price"].encode(p, encoding) for p in price]
  np.testing.assert_array_equal(np.array(got), history.numeric[:, 0])


def test_loading_from_an_empty_directory_is_an_error(tmp_path):
  with pytest.raises(DataError, match=r"holds no encoders"):
    Encoders.load(tmp_path)


def test_a_vocabulary_codes_values_in_python_as_in_the_database():
  encoder = Vocabulary(["x", "y"], np.array([3, 1]))
  assert [encoder.code(v) for v in ("x", "y", "z", None)] == [2, 3, UNKNOWN, ABSENT]


def test_hashes_of_more_buckets_than_a_table_has_rows_are_several_fields(fitted, monkeypatch):
  monkeypatch.setattr(hashing, "MOST_ROWS", 6)
  values = [f"v{i}" for i in range(40)]
  fields = config.hash_fields("item", 15, hashes=2)
  assert list(fields) == ["item", "item_1", "item_2", "item_again", "item_again_1", "item_again_2"]
  encoders, history, report = fitted(rows(values), fields={**fields, "word": {"column": "item"}})
  assert [encoders.categorical[n].n_codes for n in fields] == [7] * 6
  lower, upper = history.codes[:, :3], history.codes[:, 3:6]
  for codes, half in ((lower, "lower"), (upper, "upper")):
    assert ((codes > 0).sum(axis=1) == 1).all()  # a row in one of the tables
    bucket = [_bucket(v, 15, half) for v in values]
    assert [int(c.argmax()) for c in codes] == [b // 5 for b in bucket]
    assert [int(c.max()) for c in codes] == [FIRST_VALUE + b % 5 for b in bucket]
  assert len({tuple(c) for c in history.codes[:, :6]}) > len({tuple(c) for c in lower})  # two hashes tell more apart
  counted = sum(report[n]["values"] for n in ("item", "item_1", "item_2"))
  assert counted == 40 and report["item"]["colliding"] > 0
  for column, encoder in enumerate(encoders.categorical.values()):
    assert [encoder.code(v) for v in values] == history.codes[:, column].tolist()
  assert encoders.categorical["item"].code(None) == ABSENT


def test_parts_of_a_hash_are_saved(tmp_path):
  kept = {"a": Hashing(5, 1, 3, "upper"), "b": Hashing(7)}
  Encoders(kept, {}).save(tmp_path)
  assert Encoders.load(tmp_path).categorical == kept
  assert '"b": {\n   "kind": "hash",\n   "buckets": 7\n  }' in (tmp_path / "encoders.json").read_text()


def test_a_trillion_buckets_are_tables_of_int32():
  fields = config.hash_fields("item", 10**12, column="item_id", sources=("visits",))
  assert len(fields) == 470 and all(f["size"] < 2**31 - 2**24 and f["column"] == "item_id" for f in fields.values())
  assert sum(f["size"] for f in fields.values()) >= 10**12
  for wrong in ({"size": 0}, {"size": 5, "hashes": 3}):
    with pytest.raises(ConfigError, match="size at least 1, hashes 1 or 2"):
      config.hash_fields("item", **wrong)


def test_the_frequent_users_can_have_rows_of_their_own(fitted):
  """A field over the column of the users: rare ones are out of vocabulary, unless they are hashed."""
  encoders, history, _ = fitted(
    rows(["a", "b", "c"]), fields={"item": {}, "member": {"column": "user", "min_count": 3}}
  )
  assert encoders.categorical["member"].values == ["a"]
  assert history.codes[:, 1].tolist() == [FIRST_VALUE] * 3


def test_fields_that_share_a_vocabulary_have_the_same_codes(fitted):
  columns = rows(["a", "b", "b"], seen=["b", "c", None])
  encoders, history, report = fitted(columns, fields={"seen": {"shares": "item"}, "item": {}})
  assert encoders.categorical["seen"] is encoders.categorical["item"]
  assert encoders.categorical["item"].values == ["b", "a"]
  assert history.codes.tolist() == [[2, 3], [UNKNOWN, 2], [ABSENT, 2]]
  assert report["seen"]["oov_training"] == 0.5 and report["item"]["oov_training"] == 0.0


@pytest.mark.parametrize(
  "seen, message",
  [
    ({"shares": "thing"}, "shares='thing' is not a vocabulary field; did you mean 'things'"),
    ({"shares": "seen"}, "shares='seen' must have a vocabulary of its own"),
    ({"shares": "things", "min_count": 3}, "min_count=3 has no meaning with shares='things'"),
    ({"kind": "hash", "shares": "things"}, "shares='things' has no meaning with kind='hash'"),
  ],
)
def test_what_cannot_be_shared_is_an_error(make_data, seen, message):
  with pytest.raises(ConfigError, match=message):
    make_data("e.parquet", fields={"seen": seen, "things": {}})
