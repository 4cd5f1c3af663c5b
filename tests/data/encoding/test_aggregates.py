"""Sums, averages, trends, distinct values and conditions of aggregates, against a slow reference in plain Python."""

from __future__ import annotations

import calendar
import datetime
import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY as DAY
from supermoe_jax.data.check import check
from supermoe_jax.data.check.check import CheckError
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.aggregates import Aggregator, Amount, DistinctField, EventCount
from supermoe_jax.data.encoding.distinct_counts import distinct_between
from supermoe_jax.data.encoding.factors import Factors
from supermoe_jax.data.encoding.histories import UserBlock, UserHistory, end_to_end
from supermoe_jax.data.encoding.numeric import Numeric
from supermoe_jax.data.encoding.vocabulary import Encoders, Vocabulary
from supermoe_jax.data.format.schema import make_aggregator, make_schema
from supermoe_jax.data.preparation import prepare
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.plan import shapes
from tests.fixtures.small_log import raw_config, write_log

SPEND, GRAMS = Numeric(10.0, 4.0), Numeric(1.5, 0.5)


def dear(block: UserBlock) -> np.ndarray:
  return block.numeric[:, 0] > 0.5


AGGREGATOR = Aggregator(
  (2.0, 10.0),
  ("till",),
  {},
  {},
  {"spend": Amount(0, SPEND, "standardise"), "grams": Amount(1, GRAMS, "log1p")},
  ("spend", "grams"),
  ("grams",),
  ("spend", "grams"),
  {"shop": DistinctField((0,)), "labels": DistinctField((1, 2)), "spend": DistinctField((0,), numeric=True)},
  {"dear": EventCount("spend > 12", dear)},
  paces=True,
  habits=True,
)


@st.composite
def some_users(draw: st.DrawFn) -> list[UserHistory]:
  rng = np.random.default_rng(draw(st.integers(0, 99_999)))
  out = []
  for i, n in enumerate(draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))):
    time = np.sort(rng.integers(0, 30 * 4, n)) * (DAY // 4)
    numeric = np.where(rng.random((n, 2)) < 0.25, np.nan, rng.integers(-4, 5, (n, 2)) / 2).astype(np.float32)
    codes = rng.integers(0, 5, (n, 3)).astype(np.int32)
    out.append(UserHistory(f"u{i}", time, np.zeros(n, np.int32), codes, numeric, n))
  return out


def signed_log(x: float) -> float:
  return math.copysign(math.log1p(abs(x)), x)


def reference(user: UserHistory, time: int, n: int) -> dict[str, float]:
  """The aggregates of a user's first n events, event by event."""

  def raw(i: int, field: str) -> float | None:
    z = float(user.numeric[i, 0 if field == "spend" else 1])
    if math.isnan(z):
      return None
    if field == "spend":
      return z * 4.0 + 10.0
    log = z * 0.5 + 1.5
    return math.copysign(math.expm1(abs(log)), log)

  def numbers(field: str, since: float, until: float) -> list[float]:
    seen = [i for i in range(n) if since <= user.time[i] < until]
    return [x for x in (raw(i, field) for i in seen) if x is not None]

  out = {}
  for window, days in (("2d", 2), ("10d", 10), ("all", 10_000)):
    begin = time - days * DAY
    for field in ("spend", "grams"):
      inside = numbers(field, begin, time + 1)
      out[f"sum {field} {window}"] = signed_log(sum(inside))
      if field == "grams":
        out[f"average {field} {window}"] = signed_log(sum(inside) / len(inside) if inside else 0.0)
      if window != "all":
        whole = sum(numbers(field, -1, time + 1))
        share = min(days * DAY / (time - int(user.time[0])), 1) if time > user.time[0] else 1
        out[f"pace {field} {window}"] = signed_log(sum(inside)) - signed_log(whole * share)
        former = numbers(field, begin - days * DAY, begin)
        out[f"trend {field} {window}"] = signed_log(sum(inside)) - signed_log(sum(former))
    events = [i for i in range(n) if user.time[i] >= begin]
    if window != "all":
      of_times = [len({int(user.time[i]) for i in range(n) if user.time[i] >= since}) for since in (begin, -1)]
      out[f"pace moments {window}"] = math.log1p(of_times[0]) - math.log1p(of_times[1] * share)
    out[f"distinct shop {window}"] = math.log1p(len({int(user.codes[i, 0]) for i in events} - {0}))
    out[f"distinct labels {window}"] = math.log1p(len({int(c) for i in events for c in user.codes[i, 1:]} - {0}))
    spends = {float(user.numeric[i, 0]) for i in events if not math.isnan(user.numeric[i, 0])}
    out[f"distinct spend {window}"] = math.log1p(len(spends))
    if window != "2d":
      at = {datetime.datetime.fromtimestamp(int(user.time[i]) / 1e6, datetime.UTC) for i in events}
      for day in calendar.day_name:
        out[f"share of {day} {window}"] = sum(f"{t:%A}" == day for t in at) / max(len(at), 1)
      for hour in range(0, 24, 3):
        shares = sum(hour <= t.hour < hour + 3 for t in at) / max(len(at), 1)
        out[f"share of {hour:02d}-{hour + 3:02d}h {window}"] = shares
    out[f"count dear {window}"] = math.log1p(sum(float(user.numeric[i, 0]) > 0.5 for i in events))
  return out


@settings(max_examples=120, deadline=None)
@given(some_users(), st.integers(0, 10_000))
def test_statistics_of_windows_equal_a_plain_reference(users: list[UserHistory], seed: int) -> None:
  rng = np.random.default_rng(seed)
  owner = np.repeat(np.arange(len(users)), 3)
  n_events = np.array([int(rng.integers(1, len(users[i].time) + 1)) for i in owner])
  # The last visible event may share its time with an event that is not visible, as with leave one out.
  time = np.array([int(users[i].time[n - 1]) + int(rng.integers(0, 3 * DAY)) for i, n in zip(owner, n_events)])
  rows = AGGREGATOR(end_to_end(users), owner, time, n_events)
  assert rows.shape == (len(owner), len(AGGREGATOR.names)) and rows.dtype == np.float32
  for row, i, at, n in zip(rows, owner, time, n_events):
    got = dict(zip(AGGREGATOR.names, row.tolist()))
    wanted = reference(users[i], int(at), int(n))
    assert wanted.keys() == {
      k for k in got if k.split()[0] in ("sum", "average", "trend", "distinct", "count", "share", "pace")
    }
    for name, value in wanted.items():
      assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_trends_compare_a_window_with_the_one_before() -> None:
  raw = np.array([100.0, 7.0, 3.0, 20.0])  # 12, 9, 8 and 1 days before the snapshot
  numeric = SPEND.encode_all(raw)[:, None]
  time = np.array([0, 3, 4, 11]) * DAY
  user = UserHistory("u", time, np.zeros(4, np.int32), np.zeros((4, 0), np.int32), numeric, 4)
  of = Aggregator((5.0,), ("till",), {}, {}, {"spend": Amount(0, SPEND, "standardise")}, trends=("spend",))
  row = dict(zip(of.names, of(user.block, np.array([0]), np.array([12 * DAY]), np.array([4]))[0]))
  assert row["trend spend 5d"] == pytest.approx(math.log1p(20) - math.log1p(10), rel=1e-5)
  assert "trend spend all" not in row


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 99_999), st.integers(1, 60), st.integers(1, 3))
def test_distinct_values_of_ranges_are_counted_once(seed: int, n: int, many: int) -> None:
  rng = np.random.default_rng(seed)
  owner = np.sort(rng.integers(0, 4, n))
  codes = rng.integers(0, int(rng.integers(1, 9)), (n, many))
  user = rng.choice(owner, 30)
  first, last = np.searchsorted(owner, user), np.searchsorted(owner, user, side="right")
  stop = rng.integers(first, last + 1)
  starts = rng.integers(first, stop + 1, (2, 30))
  wanted = [[len(set(codes[a:b].ravel().tolist()) - {0}) for a, b in zip(row, stop)] for row in starts]
  assert distinct_between(codes, owner, starts, stop).tolist() == wanted


def test_an_aggregator_comes_back_from_json_and_from_that_of_an_earlier_version() -> None:
  asked = []

  def bind(name: str, where: str):
    asked.append((name, where))
    return dear

  saved = json.loads(json.dumps(AGGREGATOR.to_json()))
  assert Aggregator.from_json(saved, bind, {}) == AGGREGATOR and asked == [("dear", "spend > 12")]
  early = {k: saved[k] for k in ("windows_days", "sources", "numeric", "values")}
  assert Aggregator.from_json(early, bind, {}) == Aggregator((2.0, 10.0), ("till",), {}, {})


RICH = {
  "windows_days": [7.0],
  "sums": ["amount"],
  "means": ["seconds"],
  "trends": ["amount", "seconds"],
  "distinct": ["page", "device"],
  "conditions": {"slow": "seconds >= 2", "first_pages": "page in ('page0', 'page1')"},
}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
  folder = tmp_path_factory.mktemp("rich")
  write_log(folder)
  raw = raw_config(folder)
  raw["data"]["aggregates"] = RICH
  prepare.prepare(config.resolve(raw))
  return Dataset(folder / "dataset")


def test_a_prepared_dataset_has_them_and_check_derives_them_again(rich: Dataset) -> None:
  assert rich.aggregator is not None
  names = rich.aggregator.names
  assert {"sum amount 7d", "average seconds all", "trend seconds 7d", "distinct device 7d", "count slow all"} <= {
    *names
  }
  assert rich.schema.aggregates == len(names) == len(rich.aggregate_mean)
  assert shapes.largest_schema(rich.config).aggregates == len(names)
  varied = dict(zip(names, (rich.aggregate_scale < 1e30).tolist()))
  assert all(varied[n] for n in names if n.split()[0] in ("sum", "average", "trend", "distinct", "count"))
  check.check_dataset(rich.path)


@pytest.mark.parametrize("name", ["sum amount all", "trend seconds 7d", "distinct page 7d", "count slow 7d", "recency"])
def test_check_finds_a_wrong_aggregate(rich: Dataset, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
  right = Aggregator.__call__

  def wrong(self: Aggregator, *args: np.ndarray) -> np.ndarray:
    rows = right(self, *args)
    rows[-1, self.names.index(name)] += 0.01
    return rows

  monkeypatch.setattr(Aggregator, "__call__", wrong)
  with pytest.raises(CheckError, match=f"aggregate '{name}': .* holds .*, the raw files give"):
    check.check_dataset(rich.path)


def test_check_derives_lists_vectors_and_conditions_on_long_numbers_of_a_vocabulary(tmp_path: pathlib.Path) -> None:
  log, clock = tmp_path / "e.jsonl", datetime.datetime(2024, 1, 1)
  rows = [
    {
      "user": f"u{i % 7}",
      "at": str(clock + datetime.timedelta(hours=5 * i)),
      "sku": 1_234_567 + i % 5,
      "tags": "p|q" if i % 3 else "r",
      "look": f"{i}|1|0.5" if i % 4 else "",  # an empty text is no vector
    }
    for i in range(200)
  ]
  log.write_text("".join(json.dumps(row) + "\n" for row in rows))
  data = {
    "path": str(tmp_path / "dataset"),
    "sources": {"e": {"files": [str(log)], "user": "user", "time": "at"}},
    "fields": {"sku": {}, "tags": {"many": 2}, "look": {"kind": "vector", "size": 3}},
    "split": {"train_end": "2024-01-25", "test": ["2024-02-05"], "validation": ["2024-01-25"]},
    "aggregates": {"distinct": ["tags", "sku"], "conditions": {"one": "sku == 1234569"}},
  }
  prepare.prepare(config.resolve({"data": data, "tasks": {"next": {"kind": "next_event", "field": "sku"}}}))
  dataset = Dataset(tmp_path / "dataset")
  assert dataset.aggregator is not None and "distinct tags all" in dataset.aggregator.names
  check.check_dataset(dataset.path)


def test_a_misspelt_value_of_a_condition_is_an_error(tmp_path: pathlib.Path) -> None:
  write_log(tmp_path)
  raw = raw_config(tmp_path)
  raw["data"]["aggregates"]["conditions"] = {"odd": "page == 'page00'"}
  with pytest.raises(DataError, match=r"aggregates\.conditions\.odd: 'page00' never occurs .*did you mean 'page0'"):
    prepare.prepare(config.resolve(raw))


@pytest.mark.parametrize(
  ("chosen", "message"),
  [
    ({"sums": ["amont"]}, r"aggregates\.sums: 'amont' is not a numeric field; did you mean 'amount'"),
    ({"means": ["page"]}, r"aggregates\.means: 'page' is not a numeric field"),
    ({"trends": ["amount"], "windows_days": []}, r"aggregates\.trends=\('amount',\) needs windows to compare"),
    ({"sums": ["amount", "amount"]}, r"aggregates\.sums=.* names a field twice"),
    ({"sums": ["amount"], "enabled": False}, r"aggregates\.sums=.* has no meaning with enabled=False; remove it"),
    ({"sums": ["rank"]}, r"aggregates\.sums: 'rank' is encoded as quantiles.*rank_amount=dict\(column='seconds'"),
    ({"distinct": ["pge"]}, r"aggregates\.distinct: 'pge' is not a field; did you mean 'page'"),
    ({"distinct": ["town"]}, r"aggregates\.distinct: 'town' is of the table of users"),
    ({"distinct": ["secret"]}, r"aggregates\.distinct holds 'secret', which the model must not see"),
    ({"factors": ["pag"]}, r"aggregates\.factors: 'pag' is not a categorical field; did you mean 'page'"),
    ({"factors": ["amount"]}, r"aggregates\.factors: 'amount' is not a categorical field"),
    ({"factors": ["page", "page"]}, r"aggregates\.factors=.* names a field twice"),
    ({"factor_numbers": {"page": "seconds"}}, r"factors does not name 'page'; add it there"),
    (
      {"factors": ["page"], "factor_numbers": {"page": "secnds"}},
      r"page: 'secnds' is not a numeric field; did you mean",
    ),
    ({"factors": ["page"], "factor_size": 0}, r"aggregates\.factor_size=0 must be positive"),
    ({"factors": ["page"], "enabled": False}, r"aggregates\.factors=.* has no meaning with enabled=False"),
    ({"habits": True, "enabled": False}, r"aggregates\.habits=True has no meaning with enabled=False"),
    ({"paces": True, "enabled": False}, r"aggregates\.paces=True has no meaning with enabled=False"),
    ({"factors": ["secret"]}, r"aggregates\.factors holds 'secret', which the model must not see"),
    ({"conditions": {"a": "secret == 'x'"}}, r"conditions\.a holds 'secret', which the model must not see"),
    ({"conditions": {"a": " "}}, r"conditions\.a is empty; write it as in"),
    ({"conditions": {"a": "page > 3"}}, r"conditions\.a='page > 3': 'page' is a vocabulary field"),
    ({"conditions": {"a": "pages == 'x'"}}, r"conditions\.a=.*: 'pages' is not a field; did you mean 'page'"),
  ],
)
def test_impossible_aggregates_name_the_key_and_the_remedy(tmp_path: pathlib.Path, chosen: dict, message: str) -> None:
  raw = raw_config(tmp_path)
  raw["data"]["fields"] |= {
    "town": {"table": "users"},
    "secret": {"column": "device", "sources": ["visits"], "input": False},
    "rank": {"column": "seconds", "sources": ["visits"], "kind": "numeric", "encoding": "quantile"},
  }
  raw["data"]["aggregates"] = chosen
  with pytest.raises(ConfigError, match=message):
    config.resolve(raw)


def test_settings_that_are_not_used_change_no_hash(tmp_path: pathlib.Path) -> None:
  raw = raw_config(tmp_path)
  base = config.resolve(raw)
  for key, value in RICH.items():
    used = {**raw, "data": {**raw["data"], "aggregates": {**raw["data"]["aggregates"], key: value}}}
    assert config.resolve(used).data_hash() != base.data_hash(), key
  unset = {
    "sums": [],
    "means": [],
    "trends": [],
    "distinct": [],
    "conditions": {},
    "factors": [],
    "habits": False,
    "paces": False,
    "factor_numbers": {},
  }
  raw["data"]["aggregates"] |= unset
  assert config.resolve(raw).data_hash() == base.data_hash()
  shown = config.to_dict(base, later=False)["data"]["aggregates"]
  assert shown.keys() == {"enabled", "windows_days", "top_values", "fields"}


RICHER = {
  "sums": ("spend",),
  "trends": ("spend",),
  "distinct": ("q",),
  "factors": ("p", "q"),
  "habits": True,
  "paces": True,
}


@pytest.mark.parametrize("fields", [("p",), ("q", "p"), ("p", "p", "q")])
def test_the_schema_says_where_counts_of_values_and_factors_lie(fields: tuple[str, ...]) -> None:
  values = {"p": [f"p{i}" for i in range(12)], "q": ["q0", "q1"]}  # more and fewer than are counted
  shown = {"kind": "numeric", "input": False}, {"kind": "numeric"}, {"kind": "numeric", "table": "users"}
  data = {
    "path": "nowhere",
    "sources": {"visits": {"files": "visits.csv"}, "buys": {"files": "buys.csv"}},
    "fields": {"p": {}, "q": {}, "hidden": shown[0], "seen": shown[1], "age": shown[2], "spend": shown[1]},
    "users": {"files": "users.csv"},
    "aggregates": {"top_values": 5, "fields": fields, "windows_days": (2.0, 9.0), **RICHER, "factor_size": 2},
    "split": {"train_end": "2024-03-01", "validation": ("2024-03-01",), "test": ("2024-04-01",)},
  }
  cfg = config.resolve({"data": data, "tasks": {"next": {"kind": "next_event", "field": "p"}}})
  vocabularies = {n: Vocabulary(tuple(v), tuple(range(len(v), 0, -1))) for n, v in values.items()}
  encoders = Encoders(vocabularies, {n: Numeric(0.0, 1.0) for n in ("hidden", "seen", "age", "spend")}, {})
  encoders.factors.update({n: Factors(np.ones(9), np.ones((9, 2))) for n in "pq"})
  aggregator, schema = make_aggregator(cfg.data, encoders), make_schema(cfg, encoders)
  places = schema.value_counts
  assert aggregator is not None and list(places) == list(dict.fromkeys(fields))
  for field, place in places.items():
    counted = values[field][:5]
    assert place.values == len(counted) and place.windows == 3
    wanted = [f"{field} {value} {window}" for window in ("2d", "9d", "all") for value in counted]
    assert aggregator.names[place.columns] == wanted
  names = aggregator.names
  assert names[slice(*schema.factors)] == ["factor p 1", "factor p 2", "factor q 1", "factor q 2"]
  others = {*range(*schema.factors), *(i for place in places.values() for i in range(len(names))[place.columns])}
  assert schema.plain_aggregates == tuple(i for i in range(len(names)) if i not in others)
  assert {"recency", "share of Monday all", "distinct p"} <= {names[i] for i in schema.plain_aggregates}
