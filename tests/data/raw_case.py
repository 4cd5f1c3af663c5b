"""Random small raw logs: what the rows say, and the files and the config that say it to `prepare`."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import hashlib
import json
import pathlib
import random
import zoneinfo
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from supermoe_jax import config
from supermoe_jax.data import prepare
from supermoe_jax.data.dataset import Dataset

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
DAY = 86_400_000_000
ZONES = ("UTC", "Europe/Berlin", "America/New_York")  # summer time began there on 2024-03-31 and on 2024-03-10
FORMATS = ("csv", "jsonl", "parquet")
ITEMS, CLICKS, PRICES = ("a", "b", "c", "d", "é"), ("yes", "no", "maybe"), (0.5, 1.0, 2.0, 3.25, -1.0)
TIERS = ("low", "mid", "high")
SHARES = {"user_validation": 0.3, "user_test": 0.3}


def moment(text: str) -> int:
  """Microseconds since 1970 UTC."""
  return (datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC) - EPOCH) // datetime.timedelta(
    microseconds=1
  )


def owner(user: str) -> str:
  """The split of a user, from the definition."""
  share = int.from_bytes(hashlib.md5(user.encode()).digest()[:8], "little") / 2**64
  if share < SHARES["user_test"]:
    return "test"
  return "validation" if share < SHARES["user_test"] + SHARES["user_validation"] else "train"


USERS = tuple(str(n) for n in range(1, 13))
TRAINING_USERS = [u for u in USERS if owner(u) == "train"]
ANCHORS = TRAINING_USERS[:2]  # they give every field, label and class a value in training, whatever is drawn
assert {owner(u) for u in USERS} == {"train", "validation", "test"}

# Where something begins or ends in the splits of the tests, and moments around them.
EDGES = (
  "2024-03-10T07:00",
  "2024-03-31T01:00",
  "2024-04-01",
  "2024-04-03T12:00",
  "2024-04-10",
  "2024-04-12",
  "2024-04-16",
)
INSTANTS = [moment(t) + shift for t in EDGES for shift in (-1, 0, 1, 3_600_000_000)]
FIRST, LAST = moment("2024-03-08T00:30"), moment("2024-04-20T06:00")


@dataclasses.dataclass(frozen=True)
class Row:
  """An event as its file has it; `zone` is the one that its text shows the time in."""

  source: str
  user: str
  time: int
  item: str | None = None
  click: str | None = None
  price: float | None = None
  zone: str | None = None


@dataclasses.dataclass(frozen=True)
class Case:
  """A raw log: rows in the order of the files, the user table, and how they are written."""

  views: tuple[Row, ...]
  buys: tuple[Row, ...]
  users: tuple[dict[str, Any], ...]
  formats: tuple[str, str, str]  # of views, buys and the user table
  zone: str | None = None  # of Parquet's times
  duplicates: str = "keep"
  encoding: str = "log1p"
  min_count: int = 2
  log_end: str = ""


def random_rows(rng: random.Random, source: str, n: int, users: Sequence[str] = USERS[:8]) -> list[Row]:
  """Rows in no order, many at equal times, some of them twice; the users beside the first eight have no events."""
  rows: list[Row] = []
  views = source == "views"
  for _ in range(n):
    user = rng.choice(users)
    time = rng.choice(INSTANTS) if rng.random() < 0.6 else FIRST + rng.randrange(61) * ((LAST - FIRST) // 60)
    if rows and rng.random() < 0.4:  # at the time of another, so that some moments hold many
      other = rng.choice(rows)
      user, time = other.user, other.time
    click, price = (rng.choice((None, *CLICKS)), rng.choice((None, *PRICES))) if views else (None, None)
    rows.append(Row(source, user, time, rng.choice((None, *ITEMS)), click, price, rng.choice((None, *ZONES))))
  for row in rng.sample(rows, n // 8):
    rows.insert(rng.randrange(len(rows)), row)
  return rows


def _anchors() -> list[Row]:
  """Each value twice and early, so that it is in every vocabulary; and the log's first and last event."""
  rows = []
  for i, user in enumerate(ANCHORS):
    for j, (item, click, price) in enumerate(
      (("a", "yes", 1.0), ("b", "no", 2.0), ("c", "yes", 3.25), ("a", "no", 0.5))
    ):
      rows.append(Row("views", user, FIRST + (4 * i + j) * 3_600_000_000, item, click, price))
    rows += [Row("views", user, LAST - i), Row("views", user, LAST)]
  return rows


def random_case(seed: int, views: int, buys: int, formats: tuple[str, str, str] = ("csv", "jsonl", "parquet")) -> Case:
  """A log of two sources and a table of users; some users are in one of them only."""
  rng = random.Random(seed)
  table = [
    {"user": u, "plan": ("paid", "free")[i], "tier": TIERS[i], "age": 30.0 + 9 * i, "town": "x", "height": 1.5}
    for i, u in enumerate(ANCHORS)
  ]
  for user in USERS:
    if user not in ANCHORS and rng.random() < 0.8:
      known = {"plan": (None, "free", "paid"), "tier": (None, *TIERS[:2], *TIERS), "age": (None, 18.0, 44.5, 71.0)}
      known |= {"town": (None, "x", "y", "z"), "height": (None, 1.5, 1.75, 2.0)}
      table.append({"user": user} | {k: rng.choice(v) for k, v in known.items()})
  rows = random_rows(rng, "views", views)
  at = rng.randrange(views + 1)
  bought = (Row("buys", ANCHORS[0], FIRST + 1, "b"), *random_rows(rng, "buys", buys))
  return Case((*rows[:at], *_anchors(), *rows[at:]), bought, tuple(table), formats)


@st.composite
def cases(draw: st.DrawFn) -> Case:
  """Random cases, written and read in random ways."""
  return dataclasses.replace(
    random_case(draw(st.integers(0, 99_999)), draw(st.integers(4, 60)), draw(st.integers(2, 25))),
    formats=draw(st.tuples(*[st.sampled_from(FORMATS)] * 3)),
    zone=draw(st.sampled_from((None, *ZONES))),
    duplicates=draw(st.sampled_from(("keep", "drop"))),
    encoding=draw(st.sampled_from(("log1p", "standardise"))),
    min_count=draw(st.sampled_from((1, 2))),
    log_end=draw(st.sampled_from(("", "2024-05-01"))),
  )


def _text(time: int, zone: str | None) -> str:
  utc = EPOCH + datetime.timedelta(microseconds=time)
  if zone is None:
    return utc.replace(tzinfo=None).isoformat(sep=" ")
  return utc.astimezone(zoneinfo.ZoneInfo(zone)).isoformat()


def _write(file: pathlib.Path, columns: dict[str, list[Any]]) -> None:
  if file.suffix == ".parquet":
    pq.write_table(pa.table(columns), file)
    return
  rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
  with file.open("w", newline="") as out:
    if file.suffix == ".jsonl":
      out.writelines(json.dumps(row) + "\n" for row in rows)
      return
    writer = csv.DictWriter(out, list(columns))
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)


def write_case(folder: pathlib.Path, case: Case) -> None:
  """Writes the files; the views are two files."""
  half = len(case.views) // 2
  for name, rows, format in (
    ("views-1", case.views[:half], case.formats[0]),
    ("views-2", case.views[half:], case.formats[0]),
    ("buys-1", case.buys, case.formats[1]),
  ):
    parquet = format == "parquet"
    times: Any = [_text(r.time, r.zone) for r in rows]
    if parquet:
      times = pa.array([r.time for r in rows], pa.timestamp("us", case.zone))
    columns: dict[str, Any] = {"user": [int(r.user) if parquet else r.user for r in rows], "time": times}
    columns["item"] = pa.array([r.item for r in rows], pa.string()) if parquet else [r.item for r in rows]
    if name != "buys-1":
      columns["click"] = pa.array([r.click for r in rows], pa.string()) if parquet else [r.click for r in rows]
      columns["price"] = pa.array([r.price for r in rows], pa.float64()) if parquet else [r.price for r in rows]
    _write(folder / f"{name}.{format}", columns)
  _write(folder / f"users.{case.formats[2]}", {k: [row[k] for row in case.users] for k in case.users[0]})


# ------------------------------------------------------------------------------------------ ways to split, and tasks

M = 2  # events that a snapshot of an event label asks about
AT_LEAST, TOP = 2.0, 3
EITHER = 4  # least count of the items that are not hashed, in the field of both kinds

FUTURE = {
  "bought": {"kind": "future_event", "source": "buys", "horizon_days": 4.0},
  "quiet": {"kind": "future_event", "source": "views", "horizon_days": 2.5, "negate": True},
  "items": {"kind": "future_values", "field": "item", "top": TOP, "horizon_days": 6.0},
}
FOLLOWING = {
  "next_item": {"kind": "next_event", "field": "item"},
  "click": {"kind": "event_label", "field": "click", "positive": ["yes"], "per_snapshot": M},
  "dear": {"kind": "event_label", "field": "price", "at_least": AT_LEAST, "per_snapshot": M},
  "price": {"kind": "event_label", "field": "price", "per_snapshot": M},
}
OF_USER = {
  "paid": {"kind": "user_label", "column": "plan", "positive": ["paid"]},
  "tier": {"kind": "user_label", "column": "tier", "type": "multiclass"},
  "age": {"kind": "user_label", "column": "age", "type": "regression"},
}
TEMPORAL = {"train_end": "2024-04-01", "validation": ["2024-04-03T12:00"], "test": ["2024-04-16", "2024-04-12"]}
GAP = {"gap_days": 2.0}

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  "calendar": ({**TEMPORAL, "every_days": 3.0}, {**FUTURE, **FOLLOWING, **OF_USER}),
  "gap": ({**TEMPORAL, **GAP, "every_days": 3.0, "min_events": 2}, {**FUTURE, **FOLLOWING, **OF_USER}),
  "every_events": ({**TEMPORAL, **GAP, "snapshots": "every_events", "every_events": 2}, FUTURE | FOLLOWING | OF_USER),
  "end": ({**TEMPORAL, "snapshots": "end", "train_start": "2024-03-10T07:00"}, FOLLOWING | OF_USER),
  "leave_one_out": ({"mode": "leave_one_out"}, FOLLOWING | OF_USER),
  "user": ({"mode": "user", "every_days": 4.0}, FUTURE | FOLLOWING | OF_USER),
  "user, every_events": (
    {"mode": "user", "snapshots": "every_events", "every_events": 3, "train_start": "2024-03-10T07:00"},
    FUTURE | FOLLOWING | OF_USER,
  ),
  "user, end": ({"mode": "user", "snapshots": "end"}, OF_USER),
}


def raw_config(folder: pathlib.Path, case: Case, way: str) -> dict[str, Any]:
  """The config that reads a case's files."""
  split, tasks = WAYS[way]
  who = {"user": "user", "time": "time"}
  if split.get("mode") != "leave_one_out":
    split = {"log_end": case.log_end, **split}
  return {
    "data": {
      "path": str(folder / "dataset"),
      "sources": {
        "views": {"files": [str(folder / f"views-*.{case.formats[0]}")], **who},
        "buys": {"files": [str(folder / f"buys-1.{case.formats[1]}")], **who},
      },
      "fields": {
        "item": {"min_count": case.min_count},
        "bucket": {"kind": "hash", "column": "item", "size": 3},
        "either": {"column": "item", "min_count": EITHER, "buckets": 2},
        "click": {"sources": ["views"], "input": False},
        "price": {"sources": ["views"], "kind": "numeric", "encoding": case.encoding},
        "town": {"table": "users"},
        "height": {"table": "users", "sources": ["buys"], "kind": "numeric"},
      },
      "users": {"files": [str(folder / f"users.{case.formats[2]}")], "user": "user"},
      "split": {**SHARES, **split},
      "duplicates": case.duplicates,
      "aggregates": {"windows_days": [2.0, 9.0], "top_values": 2, "fields": ["item"]},
    },
    "tasks": tasks,
  }


def prepared(folder: str | pathlib.Path, case: Case, way: str, name: str = "one") -> Dataset:
  """Writes the files of a case into a folder of this name, and prepares them."""
  path = pathlib.Path(folder) / name
  path.mkdir()
  write_case(path, case)
  cfg = config.resolve(raw_config(path, case, way))
  prepare.prepare(cfg, say=lambda text: None)
  return Dataset(cfg.data.path)
