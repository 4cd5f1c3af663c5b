"""Conditions on whole moments, against plain Python over raw decimal amounts, from the block to the verbs."""

from __future__ import annotations

import datetime
import operator
import pathlib
import pickle
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.config import MICROSECONDS_PER_DAY as DAY
from supermoe_jax.data.append import append
from supermoe_jax.data.check import check
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.histories import UserBlock
from supermoe_jax.data.encoding.numeric import Numeric, Quantile
from supermoe_jax.data.encoding.vocabulary import Encoders, Vocabulary
from supermoe_jax.data.preparation import prepare
from supermoe_jax.data.tasks.event_condition import event_condition
from tests.fixtures.basket_log import Line, moment_of, random_lines, raw_config, write_lines

OPERATORS = {
  "==": operator.eq,
  "!=": operator.ne,
  "<": operator.lt,
  "<=": operator.le,
  ">": operator.gt,
  ">=": operator.ge,
}
AMOUNTS = [None, "0.1", "0.2", "0.3", "20", "30", "-20", "49.99", "1234.56"]
ENCODERS = Encoders({"thing": Vocabulary(["a", "b"], np.array([2, 1]))}, {"worth": Numeric(17.3, 41.9)}, {})


def _data(encoding: str) -> config.Data:
  return config.Data(
    sources={"left": config.Source(files=("l",)), "right": config.Source(files=("r",))},
    fields={"thing": config.Field(), "worth": config.Field(kind="numeric", encoding=encoding)},
  )


@st.composite
def logs(draw: st.DrawFn, encoding: str) -> tuple[list[tuple], UserBlock]:
  """Raw events (user, time, source, worth) with many ties, sources at one time in any order, and their block."""
  event = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 1), st.sampled_from(AMOUNTS))
  raw = sorted(draw(st.lists(event, min_size=1, max_size=25)), key=lambda e: e[:2])
  users, numeric = sorted({e[0] for e in raw}), ENCODERS.numeric["worth"]
  return raw, UserBlock(
    [f"u{u}" for u in users],
    np.append(0, np.cumsum([sum(e[0] == u for e in raw) for u in users])),
    np.array([e[1] * DAY for e in raw]),
    np.array([e[2] for e in raw], np.int32),
    np.array([[2 + i % 2] for i in range(len(raw))], np.int32),
    np.array([[np.nan if e[3] is None else numeric.encode(float(e[3]), encoding)] for e in raw], np.float32),
    np.zeros(len(users), np.int64),
  )


def _holds(function: str, symbol: str, constant: str, amounts: list[str | None]) -> bool:
  """Whether a moment with these amounts fulfils a comparison, in exact decimals."""
  numbers = [Decimal(a) for a in amounts if a is not None]
  if function == "count":
    return bool(OPERATORS[symbol](len(amounts), Decimal(constant)))
  if not numbers:
    return False
  if function == "mean":  # the sum, so that no division rounds
    return bool(OPERATORS[symbol](sum(numbers), Decimal(constant) * len(numbers)))
  value = {"sum": sum, "max": max, "min": min}[function](numbers)
  return bool(OPERATORS[symbol](value, Decimal(constant)))


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(["standardise", "log1p"]), st.sampled_from(["sum", "mean", "max", "min", "count"]))
def test_a_moment_is_compared_exactly(data: st.DataObject, encoding: str, function: str) -> None:
  raw, block = data.draw(logs(encoding))
  symbol = data.draw(st.sampled_from(sorted(OPERATORS)))
  constant = data.draw(st.sampled_from(["0.3", "0.2", "50", "10", "2", "0", "-20", "1284.55", "20.1"]))
  call = "count()" if function == "count" else f"{function}(worth)"
  text = f"{call} {symbol} {constant}"
  bound = pickle.loads(pickle.dumps(event_condition("t", text, "", _data(encoding), ENCODERS)))
  wanted = [_holds(function, symbol, constant, [o[3] for o in raw if o[:3] == e[:3]]) for e in raw]
  assert bound(block).tolist() == wanted
  alone = [bound(block.history(u)).tolist() for u in range(len(block.users))]
  assert [x for user in alone for x in user] == wanted


def test_a_quantile_keeps_the_order_that_the_largest_number_of_a_moment_needs() -> None:
  encoder = Quantile.of([0.1, 20.0, 49.99], [0.2, 0.5, 0.8])
  encoders = Encoders(ENCODERS.categorical, {"worth": encoder}, {})
  worth = [0.3, 49.99, 20.0, np.nan]
  block = UserBlock(
    ["u"],
    np.array([0, 4]),
    np.array([0, 0, 1, 2]),
    np.zeros(4, np.int32),
    np.full((4, 1), 2, np.int32),
    np.array([[encoder.encode(w)] for w in worth], np.float32),
    np.zeros(1, np.int64),
  )
  for text, wanted in (
    ("max(worth) > 20", [True, True, False, False]),
    ("min(worth) == 20", [False, False, True, False]),
  ):
    bound = event_condition("t", text, "", _data("quantile"), encoders)
    assert bound is not None and bound(block).tolist() == wanted


def test_a_moment_joins_with_comparisons_of_the_event_itself() -> None:
  block = UserBlock(
    ["u"],
    np.array([0, 4]),
    np.array([0, 0, 1, 1]),
    np.zeros(4, np.int32),
    np.array([[2], [3], [2], [3]], np.int32),
    np.array([[ENCODERS.numeric["worth"].encode(w)] for w in (20.0, 30.0, 20.0, 20.0)], np.float32),
    np.zeros(1, np.int64),
  )
  for text, wanted in (
    ("thing == 'a' and sum(worth) >= 50", [True, False, False, False]),
    ("not sum(worth) >= 50", [False, False, True, True]),
    ("40 <= sum(worth) < 50 or worth == 30", [False, True, True, True]),
  ):
    bound = event_condition("t", text, "", _data("standardise"), ENCODERS)
    assert bound is not None and bound(block).tolist() == wanted


# ------------------------------------------------------------------------------------------------------- the verbs

HORIZON = 20.0


def _big(lines: list[Line], line: Line) -> bool:
  """Whether the basket of a line is of at least 50."""
  return sum((x.paid for x in moment_of(lines, line) if x.paid is not None), Decimal(0)) >= 50


def _tasks() -> dict[str, Any]:
  where = {"where": "sum(paid) >= 50", "horizon_days": HORIZON}
  return {
    "next_big": {"kind": "next_event", "field": "article", "where": "sum(paid) >= 50"},
    "much": {"kind": "event_label", "field": "paid", "at_least": 20.0, "where": "count() >= 2", "per_snapshot": 3},
    "big": {"kind": "future_event", "source": "tills", **where},
    "none": {"kind": "future_event", "negate": True, **where},
    "wares": {"kind": "future_values", "field": "article", "top": 3, **where},
    "baskets": {"kind": "future_amount", "of": "moments", **where},
    "spend": {"kind": "future_amount", "field": "paid", **where},
    "dear": {"kind": "future_event", "where": "mean(paid) == 50 or max(paid) > 120", "horizon_days": HORIZON},
  }


def _labels(dataset: Dataset) -> dict[tuple[str, int], dict[str, Any]]:
  out: dict[tuple[str, int], dict[str, Any]] = {}
  for i in range(len(dataset)):
    record = dataset[i]
    for s, time in enumerate(record["snapshot_time"].tolist()):
      out[record["user"], time] = {
        n: (record[f"known_{n}"][s].tolist(), record[f"label_{n}"][s].tolist()) for n in dataset.config.labelled_tasks
      }
  return out


@pytest.mark.parametrize("encoding", ["standardise", "log1p"])
def test_labels_of_a_prepared_dataset_equal_plain_python(tmp_path: pathlib.Path, encoding: str) -> None:
  lines = random_lines(5)
  write_lines(tmp_path, lines[::2], "1")  # most baskets lie in two files
  write_lines(tmp_path, lines[1::2], "2")
  prepare.prepare(config.resolve(raw_config(tmp_path, _tasks(), encoding)))
  found, both = _labels(Dataset(tmp_path / "dataset")), set()
  epoch = datetime.datetime(1970, 1, 1)
  for (client, time), labels in found.items():
    begin = epoch + datetime.timedelta(microseconds=time)
    end = begin + datetime.timedelta(days=HORIZON)
    inside = [x for x in lines if x.client == client and begin <= x.at < end]
    big = [x for x in inside if _big(lines, x)]
    wanted = {
      "big": any(x.source == "tills" for x in big),
      "none": not big,
      "baskets": len({x.at for x in big}),
      "spend": float(sum(x.paid or 0 for x in big)),
    }
    for name, value in wanted.items():
      known, label = labels[name]
      if known:
        assert label == pytest.approx(float(value), rel=1e-5, abs=1e-4), (client, begin, name)
        both.add((name, bool(value)))
  assert both >= {(n, v) for n in ("big", "none", "baskets", "spend") for v in (True, False)}
  compared = check.check_dataset(tmp_path / "dataset")
  assert all(n.labels > 5 for n in compared.values())


def test_aggregates_count_the_events_of_moments_as_plain_python_does(tmp_path: pathlib.Path) -> None:
  lines = random_lines(6)
  write_lines(tmp_path, lines)
  raw = raw_config(tmp_path, {"big": _tasks()["big"]})
  raw["data"]["aggregates"] = {
    "windows_days": [30.0],
    "conditions": {"big": "sum(paid) >= 50", "several": "count() >= 2"},
  }
  prepare.prepare(config.resolve(raw))
  dataset = Dataset(tmp_path / "dataset")
  assert dataset.aggregator is not None
  column, counts = dataset.aggregator.names.index("count big 30d"), set()
  epoch = datetime.datetime(1970, 1, 1)
  for index in range(len(dataset)):
    record = dataset[index]
    time, seen = record["snapshot_time"], record["snapshot_events"]
    rows = dataset.aggregator(dataset.history(record).block, np.zeros(len(time), np.int64), time, seen)
    for at, row in zip(time.tolist(), rows, strict=True):
      end = epoch + datetime.timedelta(microseconds=at)
      window = [x for x in lines if x.client == record["user"] and end - datetime.timedelta(days=30) <= x.at < end]
      wanted = sum(_big(lines, x) for x in window)
      assert row[column] == pytest.approx(np.log1p(wanted), abs=1e-6)
      counts.add(wanted)
  assert len(counts) > 2
  check.check_dataset(tmp_path / "dataset")


def test_lines_that_an_append_adds_to_an_earlier_basket_count_with_it(tmp_path: pathlib.Path) -> None:
  lines = random_lines(8)
  late = [x for x in lines if x.client in ("c2", "c3", "c4") and x.paid is not None][::3]
  early = [x for x in lines if x not in late]
  assert any(_big(lines, x) and not _big(early, x) for x in early)
  folders = tmp_path / "whole", tmp_path / "grown"
  for folder in folders:
    folder.mkdir()
  write_lines(folders[0], early, "1")
  write_lines(folders[0], late, "2")
  write_lines(folders[1], early, "1")
  prepare.prepare(config.resolve(raw_config(folders[1], _tasks())))
  before = _labels(Dataset(folders[1] / "dataset"))
  files = write_lines(folders[1], late, "2")
  append.append(folders[1] / "dataset", {source: [file] for source, file in files.items()})
  grown = _labels(Dataset(folders[1] / "dataset"))
  # The statistics that standardise numbers stay those of the early lines; yes and no, and counts, do not depend on it.
  prepare.prepare(config.resolve(raw_config(folders[0], _tasks())))
  whole = _labels(Dataset(folders[0] / "dataset"))
  names = ("big", "none", "baskets", "dear")
  assert {k: {n: v[n] for n in names} for k, v in grown.items()} == {
    k: {n: v[n] for n in names} for k, v in whole.items()
  }
  assert any(before[k]["baskets"] != v["baskets"] for k, v in grown.items() if k in before)
  check.check_dataset(folders[1] / "dataset")
