"""Fields of many values: lists of which the first ones are kept."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import fitting, prepare, summary
from supermoe_jax.errors import ConfigError, DataError
from tests.fixtures.event_rows import ABSENT, JUNE_1, UNKNOWN, histories
from tests.fixtures.messages import messages

TAGS = [["p", "q", "p"], ["q"], None, [], ["r", "", "q", "p"]]
FIELDS = {"tags": {"many": 2}, "item": {}}


def columns(tags, **changes):
  n = len(tags)
  return {"user": ["a"] * n, "time": [JUNE_1 + i for i in range(n)], "item": ["x"] * n, "tags": tags, **changes}


@pytest.fixture
def encoded(make_data, open_log):
  """Reads events and returns the encoders, the only user's codes and the report of the fields."""

  def run(file, **changes):
    data = make_data(file, **{"fields": FIELDS, **changes})
    with open_log(data) as log:
      encoders = fitting.fit_encoders(log, data)
      (history,) = histories(log, encoders)
      return encoders, history.codes, fitting.coverage_of(log, encoders), log.counts

  return run


def as_text(tags, separator="|"):
  return [None if t is None else separator.join(t) for t in tags]


@pytest.mark.parametrize(
  ("name", "tags"),
  [
    ("e.parquet", TAGS),
    ("e.parquet", as_text(TAGS)),
    ("e.jsonl", TAGS),
    ("e.json", TAGS),
    ("e.jsonl", as_text(TAGS)),
    ("e.csv", as_text(TAGS)),
    ("e.csv", as_text(TAGS, " | ")),
    ("e.inter", as_text(TAGS)),
  ],
)
def test_the_first_values_of_a_list_are_kept_in_every_format(name, tags, write, encoded):
  encoders, codes, report, counts = encoded(write(name, columns(tags)))
  # Kept are p q, q, r q: in the order of the list, without what is empty.
  assert encoders.categorical["tags"].values == ["q", "p", "r"]
  assert encoders.categorical["tags"].counts.tolist() == [3, 1, 1]
  first, item, second = codes.T
  assert first.tolist() == [3, 2, ABSENT, ABSENT, 4]
  assert second.tolist() == [2, ABSENT, ABSENT, ABSENT, 2]
  assert item.tolist() == [2] * 5
  assert report["tags"]["values_cut"] == 2 and "values_cut" not in report["item"]
  assert counts["nulls"]["tags"] == 2


def test_another_separator_can_be_set(write, encoded):
  fields = {"tags": {"many": 2, "separator": ", "}, "item": {}}
  encoders, *_ = encoded(write("e.csv", columns(["a|b, c", "c"])), fields=fields)
  assert encoders.categorical["tags"].values == ["c", "a|b"]


@pytest.mark.parametrize("type", [pa.list_(pa.float64()), pa.list_(pa.float32(), 2)])
def test_lists_of_numbers_are_compared_as_text(type, write, encoded):
  numbers = pa.array([[1.0, 2.5], [1.0, None]], type)
  encoders, codes, *_ = encoded(write("e.parquet", pa.table(columns(numbers, user=["a"] * 2))))
  assert encoders.categorical["tags"].values == ["1", "2.5"]
  assert codes[:, 2].tolist() == [3, ABSENT]


def test_values_unseen_in_training_are_out_of_vocabulary_in_their_place(write, encoded):
  late = config.parse_time("2021-01-01", "") // 1_000_000
  table = columns([["p"], ["p", "q"], ["new", "p"]], time=[JUNE_1, late, late + 1])
  encoders, codes, report, _ = encoded(write("e.parquet", table))
  assert encoders.categorical["tags"].values == ["p"]
  assert codes[:, 0].tolist() == [2, 2, UNKNOWN] and codes[:, 2].tolist() == [ABSENT, UNKNOWN, 2]
  assert report["tags"]["oov_training"] == 0.0 and report["tags"]["oov_after"] == 0.5


def test_lists_can_be_hashed(write, encoded):
  fields = {"tags": {"many": 3, "kind": "hash", "size": 50}, "item": {}}
  encoders, codes, report, _ = encoded(write("e.parquet", columns([["p", "q"], ["q"]])), fields=fields)
  code = encoders.categorical["tags"].code
  assert codes[:, [0, 2, 3]].tolist() == [[code("p"), code("q"), ABSENT], [code("q"), ABSENT, ABSENT]]
  assert report["tags"]["values"] == 2 and report["tags"]["values_cut"] == 0


def test_values_of_lists_out_of_a_vocabulary_can_be_hashed(write, encoded):
  fields = {"tags": {"many": 2, "min_count": 2, "buckets": 50}, "item": {}}
  encoders, codes, report, _ = encoded(write("e.parquet", columns([["p", "q"], ["r", "p"], ["p"]])), fields=fields)
  tags = encoders.categorical["tags"]
  assert tags.values == ["p"] and min(tags.code("q"), tags.code("r")) >= 3
  assert codes[:, [0, 2]].tolist() == [[2, tags.code("q")], [tags.code("r"), 2], [2, ABSENT]]
  assert report["tags"]["values"] == 2 and report["tags"]["oov_training"] == 2 / 5


def test_lists_of_a_table_of_items_are_joined(tmp_path, write, encoded):
  (tmp_path / "items.json").write_text(json.dumps({"x": [7, 8, 9], "y": [8]}))
  log = write("e.csv", {"user": ["a"] * 3, "time": [JUNE_1 + i for i in range(3)], "item": ["x", "y", "z"]})
  fields = {"item": {}, "values": {"many": 2}}
  source = {"items": {"file": str(tmp_path / "items.json"), "key": "item"}}
  encoders, codes, report, _ = encoded(log, fields=fields, source=source)
  assert encoders.categorical["values"].values == ["8", "7"]
  assert codes[:, 1:].tolist() == [[3, 2], [2, ABSENT], [ABSENT, ABSENT]]
  assert report["values"]["values_cut"] == 1


def test_rows_that_differ_in_what_is_cut_are_no_duplicates(write, encoded):
  tags = [["p", "q", "r"], ["p", "q", "s"], ["p", "q", "r"]]
  *_, counts = encoded(write("e.parquet", columns(tags, time=[JUNE_1] * 3)))
  assert counts["duplicate_rows"] == 1


# ---------------------------------------------------------------------------------------------------------- a dataset


def dataset(tmp_path, write, **field):
  log = columns([["p", "q", "p"], ["q"], ["r", "q"], ["p"]] * 3, user=["a", "a", "b", "b"] * 3)
  raw = {
    "path": str(tmp_path / "dataset"),
    "sources": {"log": {"files": [str(write("e.parquet", log))], "user": "user", "time": "time"}},
    "fields": {"tags": {"many": 2, **field}, "item": {}},
    "split": {"mode": "leave_one_out"},
  }
  cfg = config.resolve({"data": raw, "tasks": {"next": {"kind": "next_event", "field": "item"}}})
  return prepare.prepare(cfg), Dataset(tmp_path / "dataset")


def test_a_dataset_holds_the_further_values_and_counts_those_cut(tmp_path, write):
  manifest, data = dataset(tmp_path, write)
  assert manifest["fields"]["tags"]["values_cut"] == 3
  assert "field tags: 3 values of lists longer than 2 were cut off" in summary.dataset_summary(manifest)
  assert data.schema.extra_columns == ("tags",) and data.schema.categorical == {"tags": 5, "item": 3}
  tags = data.encoders.categorical["tags"]
  expected = {"a": [["p", "q"], ["q", None]], "b": [["r", "q"], ["p", None]]}
  for record in (data[0], data[1]):
    wanted = [[tags.code(v) for v in values] for values in expected[record["user"]] * 3]
    assert record["codes"][:, [0, 2]].tolist() == wanted


@pytest.mark.parametrize("shown", [True, False])
def test_further_values_reach_the_model_only_if_the_field_is_an_input(shown, tmp_path, write):
  _, data = dataset(tmp_path, write, input=shown)
  assert data.hidden_codes == (() if shown else (0, 2))


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"fields": {"item": {"many": 2}}}, "config.tasks.next: 'item' holds lists, which are inputs only"),
    ({"fields": {"item": {}, "price": {"kind": "numeric", "many": 2}}}, "price.many=2 has no meaning for numbers"),
    ({"fields": {"item": {}, "tags": {"many": -1}}}, "tags.many=-1 must not be negative"),
    ({"fields": {"item": {}, "tags": {"many": 1, "separator": ""}}}, "tags.separator is empty"),
    (
      {"fields": {"item": {}, "tags": {"many": 1}}, "aggregates": {"top_values": 2, "fields": ["tags"]}},
      "config.data.aggregates.fields: 'tags' holds lists",
    ),
  ],
)
def test_what_lists_cannot_be_used_for_is_an_error(changes, says, make_data):
  with pytest.raises(ConfigError, match=says):
    make_data("e.csv", **changes)


@pytest.mark.parametrize(
  "task", [{"field": "tags", "positive": ["p"]}, {"field": "item", "positive": ["x"], "given": ["tags"]}]
)
def test_an_event_label_asks_and_is_given_single_values(task, make_data):
  data = config.to_dict(make_data("e.csv", fields={"item": {}, "tags": {"many": 2}}))
  with pytest.raises(ConfigError, match=r"config\.tasks\.label: 'tags' holds lists"):
    config.resolve({"data": data, "tasks": {"label": {"kind": "event_label", **task}}})


def test_lists_of_recbole_are_separated_by_spaces(write, encoded):
  file = write("e.inter", columns(as_text(TAGS, " ")))
  file.write_text(file.read_text().replace("tags:token", "tags:token_seq"))
  with pytest.raises(DataError, match=r"column 'tags' .*set config\.data\.fields\.tags\.separator=' '"):
    encoded(file)
  fields = {"tags": {"many": 2, "separator": " "}, "item": {}}
  assert encoded(file, fields=fields)[0].categorical["tags"].values == ["q", "p", "r"]
  with messages() as said:
    assert encoded(file, fields={"tags": {}, "item": {}})[0].categorical["tags"].values == ["p q p", "q", "r  q p"]
  assert any("'tags'" in text and "each list is read as one value" in text for text in said)
