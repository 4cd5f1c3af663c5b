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
  zone: str | None  # of Parquet's times
  duplicates: str
  encoding: str
  min_count: int
  log_end: str


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


@st.composite
def cases(draw: st.DrawFn) -> Case:
  """A log of two sources and a table of users; some users are in one of them only."""
  rng = random.Random(draw(st.integers(0, 99_999)))
  table = [
    {"user": u, "plan": ("paid", "free")[i], "tier": TIERS[i], "age": 30.0 + 9 * i} for i, u in enumerate(ANCHORS)
  ]
  for user in USERS:
    if user not in ANCHORS and rng.random() < 0.8:
      known = {"plan": (None, "free", "paid"), "tier": (None, *TIERS[:2], *TIERS), "age": (None, 18.0, 44.5, 71.0)}
      table.append({"user": user} | {k: rng.choice(v) for k, v in known.items()})
  views = random_rows(rng, "views", draw(st.integers(4, 60)))
  at = rng.randrange(len(views) + 1)
  return Case(
    tuple(views[:at] + _anchors() + views[at:]),
    (Row("buys", ANCHORS[0], FIRST + 1, "b"), *random_rows(rng, "buys", draw(st.integers(2, 25)))),
    tuple(table),
    draw(st.tuples(*[st.sampled_from(FORMATS)] * 3)),
    draw(st.sampled_from((None, *ZONES))),
    draw(st.sampled_from(("keep", "drop"))),
    draw(st.sampled_from(("log1p", "standardise"))),
    draw(st.sampled_from((1, 2))),
    draw(st.sampled_from(("", "2024-05-01"))),
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


def raw_config(folder: pathlib.Path, case: Case, split: dict[str, Any], tasks: dict[str, Any]) -> dict[str, Any]:
  """The config that reads a case's files."""
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
        "click": {"sources": ["views"], "input": False},
        "price": {"sources": ["views"], "kind": "numeric", "encoding": case.encoding},
      },
      "users": {"files": [str(folder / f"users.{case.formats[2]}")], "user": "user"},
      "split": {**SHARES, **split},
      "duplicates": case.duplicates,
      "aggregates": {"windows_days": [2.0, 9.0], "top_values": 2, "fields": ["item"]},
    },
    "tasks": tasks,
  }
