"""What preparation makes of event files, the exported preprocessing makes of the same rows as JSON."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset import windows
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare
from supermoe_jax.errors import DataError
from supermoe_jax.serving.export import make_preprocessing
from supermoe_jax.serving.preprocessing import InputError, Preprocessing
from tests.fixtures import column_types_log

LATE = config.parse_time("2030-01-01", "")
DAY = config.parse_time("2024-03-02", "")
LENGTH = 32


@pytest.fixture(scope="module", params=["keep", "drop"])
def case(
  request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Dataset, Preprocessing, dict[str, Any]]:
  """A dataset of every kind of column, its exported preprocessing read back from disk, and each user's JSON."""
  folder = tmp_path_factory.mktemp("every")
  users = column_types_log.write(folder)
  prepare.prepare(config.resolve(column_types_log.raw_config(folder, duplicates=request.param)))
  dataset = Dataset(folder / "dataset")
  (folder / "saved").mkdir()
  make_preprocessing(dataset, LENGTH).save(folder / "saved")
  return dataset, Preprocessing.load(folder / "saved"), json.loads(json.dumps(users))


def test_every_kind_of_column_is_read_as_in_the_event_files(case: tuple[Dataset, Preprocessing, dict]) -> None:
  dataset, preprocessing, users = case
  assert len(dataset) == len(users)
  for index in range(len(dataset)):
    wanted = dataset.history(dataset[index])
    found, counts = preprocessing.history(users[wanted.user], LATE)
    assert counts.used == len(wanted.time) and not counts.ignored
    np.testing.assert_array_equal(found.time, wanted.time)
    np.testing.assert_array_equal(found.source, wanted.source)
    for column, name in enumerate([*dataset.schema.categorical, *dataset.schema.extra_columns]):
      np.testing.assert_array_equal(found.codes[:, column], wanted.codes[:, column], err_msg=name)
    np.testing.assert_allclose(found.numeric, wanted.numeric, rtol=1e-6, atol=1e-7)


def test_a_row_is_that_of_the_dataset(case: tuple[Dataset, Preprocessing, dict]) -> None:
  dataset, preprocessing, users = case
  time = np.array([DAY])
  for index in range(len(dataset)):
    whole = dataset.history(dataset[index])
    n = np.searchsorted(whole.time, time).astype(np.int32)
    start = max(0, int(n[0]) - LENGTH)
    wanted = windows.window(dataset, whole, start, int(n[0]), time, n, LENGTH, 1)
    history, counts = preprocessing.history(users[whole.user], DAY)
    assert (counts.used, counts.ignored) == (n[0], len(whole.time) - n[0])
    for name, a, b in zip(wanted._fields, preprocessing.row(history, DAY, LENGTH), wanted):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
      assert a.dtype == b.dtype, name


def test_what_is_out_of_vocabulary_cut_or_missing_is_counted(case: tuple[Dataset, Preprocessing, dict]) -> None:
  _, preprocessing, _ = case
  clicks = [
    {"at": "2024-02-01", "page": "never seen", "tags": ["p", "new", "q", "r"], "item": 7},
    {"at": "2024-02-01", "page": "a", "item": 0},
  ]
  _, counts = preprocessing.history({"events": {"clicks": clicks}}, DAY)
  assert counts.unknown == {"page": 1, "tags": 1} and counts.items_missing == 1
  assert counts.cut == {"tags": 2, "labels": 1}


def test_an_event_without_its_items_fields_has_them_from_the_table_of_items(
  case: tuple[Dataset, Preprocessing, dict],
) -> None:
  dataset, preprocessing, _ = case
  brand, weight = list(dataset.schema.categorical).index("brand"), dataset.schema.numeric.index("weight")

  def read(**values: Any) -> tuple[int, float]:
    history, _ = preprocessing.history({"events": {"clicks": [{"at": "2024-02-01", **values}]}}, DAY)
    return int(history.codes[0, brand]), float(history.numeric[0, weight])

  code = dataset.encoders.categorical["brand"].code
  assert read(item=1) == (code("y"), read(weight=2.0)[1])
  assert read(item=1, brand="z")[0] == code("z")  # what the event says itself goes first
  assert read(item=1, brand=None)[0] == 0 == read(item=99)[0] == read()[0]


def test_duplicates_are_dropped_if_preparation_drops_them(case: tuple[Dataset, Preprocessing, dict]) -> None:
  dataset, preprocessing, _ = case
  event = {"at": "2024-02-01", "page": "a", "item": 0, "ratio": None}
  other = {"at": "2024-02-01", "page": "a", "item": 2, "brand": "x", "weight": 1.0, "labels": ["l", "m", "n"]}
  _, counts = preprocessing.history({"events": {"clicks": [event, dict(event), {**event, "page": "b"}, other]}}, DAY)
  assert counts.duplicates == (1 if dataset.config.data.duplicates == "drop" else 0)
  assert counts.used + counts.duplicates == 4


@pytest.mark.parametrize(
  ("user", "message"),
  [
    ({"event": {}}, "unknown key 'event'; did you mean 'events'"),
    ({}, "events: it must be an object"),
    ({"events": []}, "events: it must be an object"),
    ({"events": {"click": []}}, "events: there is no source 'click'; did you mean 'clicks'"),
    ({"events": {"clicks": {}}}, "events.clicks: it must be a list of events"),
    ({"events": {"clicks": [5]}}, "events.clicks.0: it must be an object of columns"),
    ({"events": {"clicks": [{"at": "2024-01-01", "pages": "a"}]}}, "clicks.0: unknown column 'pages'; did you mean"),
    ({"events": {"clicks": [{"page": "a"}]}}, "clicks.0.at: the time is missing; it should be a time: ISO 8601"),
    ({"events": {"clicks": [{"at": "soon"}]}}, "clicks.0.at: 'soon' is not a time"),
    ({"events": {"clicks": [{"at": 1700000000}]}}, "clicks.0.at: 1700000000 is not a time: ISO 8601"),
    ({"events": {"orders": [{"ms": True}]}}, "orders.0.ms: True is not a number of ms since 1970"),
    ({"events": {"orders": [{"ms": 1e300}]}}, "orders.0.ms: 1e[+]300 is a time before the year 1 or after"),
    ({"events": {"orders": [{"ms": 5, "amount": "much"}]}}, "orders.0.amount: 'much' is not a number"),
    ({"events": {"orders": [{"ms": 5, "kind": 1.5}]}}, "orders.0.kind: 1.5 is not text .write a fraction"),
    ({"events": {"clicks": [{"at": "2024-01-01", "store": 1.5}]}}, "clicks.0.store: 1.5 is not a whole number"),
    ({"events": {"clicks": [{"at": "2024-01-01", "cost": "x"}]}}, "clicks.0.cost: 'x' is not a number with at most 2"),
    ({"events": {"clicks": [{"at": "2024-01-01", "flag": "yes"}]}}, "clicks.0.flag: 'yes' is not true or false"),
    ({"events": {"clicks": [{"at": "2024-01-01", "day": "x"}]}}, "clicks.0.day: 'x' is not a date"),
    ({"events": {"clicks": [{"at": "2024-01-01", "tags": "p"}]}}, "clicks.0.tags: 'p' is not a list"),
    (
      {"events": {"clicks": [{"at": "2024-01-01", "tags": [["p"]]}]}},
      "clicks.0.tags: .* is not a list of plain values",
    ),
    ({"events": {"clicks": [{"at": "2024-01-01", "ratio": float("inf")}]}}, "clicks.0.ratio: inf is not a finite"),
    ({"events": {}, "user": {"land": "DE"}}, "user: unknown column 'land'"),
    ({"events": {}, "user": {"score": "high"}}, "user.score: 'high' is not a number"),
  ],
)
def test_what_cannot_be_read_is_named_with_its_place_and_remedy(
  user: dict, message: str, case: tuple[Dataset, Preprocessing, dict]
) -> None:
  with pytest.raises(InputError, match=message):
    case[1].history(user, LATE)


def test_export_needs_the_event_files(case: tuple[Dataset, Preprocessing, dict], tmp_path: pathlib.Path) -> None:
  dataset, _, _ = case
  file = pathlib.Path(dataset.config.data.sources["orders"].files[0])
  away = file.rename(tmp_path / "away.csv")
  try:
    with pytest.raises(DataError, match="orders"):
      make_preprocessing(dataset, LENGTH)
  finally:
    away.rename(file)


def test_a_dialect_of_the_files_is_read_in_requests_too(tmp_path: pathlib.Path) -> None:
  start, hour = 1_704_067_200 * 10**9, 3_600 * 10**9
  items = [f"i{i % 7}" if i % 5 else "\\N" for i in range(400)]
  spent = [f"{i},5" if i % 4 else "NULL" for i in range(400)]
  rows = [(f"c{i % 9}", start + i * hour, items[i], spent[i]) for i in range(400)]
  (tmp_path / "log.csv").write_text("".join(";".join(map(str, row)) + "\n" for row in rows))
  source = {"files": [str(tmp_path / "log.csv")], "user": "client", "time": "moment", "time_unit": "ns", "decimal": ","}
  source |= {"header": False, "columns": ["client", "moment", "article", "spent"], "null_values": ["NULL", "\\N"]}
  raw = {
    "data": {
      "path": str(tmp_path / "dataset"),
      "sources": {"log": source},
      "fields": {"article": {}, "spent": {"kind": "numeric"}},
      "split": {"train_end": "2024-01-12", "validation": ["2024-01-12"], "test": ["2024-01-15"]},
    },
    "tasks": {"next": {"kind": "next_event", "field": "article"}},
  }
  prepare.prepare(config.resolve(raw))
  dataset = Dataset(tmp_path / "dataset")
  (tmp_path / "saved").mkdir()
  make_preprocessing(dataset, LENGTH).save(tmp_path / "saved")
  preprocessing = Preprocessing.load(tmp_path / "saved")
  for index in range(len(dataset)):
    wanted = dataset.history(dataset[index])
    events = [dict(zip(("moment", "article", "spent"), row[1:], strict=True)) for row in rows if row[0] == wanted.user]
    found, _ = preprocessing.history({"events": {"log": events}}, LATE)
    np.testing.assert_array_equal(found.time, wanted.time)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_allclose(found.numeric, wanted.numeric, rtol=1e-6)
