"""An event log with a column of every kind, as files of several formats and as a client would send the same rows."""

import datetime
import decimal
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

START = datetime.datetime(2024, 1, 1)
USERS = [f"u{i}" for i in range(12)]


def write(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Writes the files, and returns each user's JSON."""
  rng = np.random.default_rng(3)
  users: dict[str, dict[str, Any]] = {u: {"events": {"clicks": [], "orders": [], "views": []}} for u in USERS}

  def moments(n: int) -> list[datetime.datetime]:
    # In whole hours, so that times tie within and between sources.
    return [START + datetime.timedelta(hours=int(h), microseconds=int(h) % 3) for h in rng.integers(0, 24 * 90, n)]

  n = 400
  clicks = {
    "user": rng.choice(USERS, n).tolist(),
    "at": moments(n),
    "page": rng.choice(["", "a", " b ", "ü\u00a0", "x" * 300, None, "rare"], n, p=[0.1, 0.3, 0.2, 0.2, 0.1, 0.09, 0.01])
    .astype(object)
    .tolist(),
    "store": rng.choice([1, -7, 9_007_199_254_740_993, None], n).tolist(),
    "code": rng.choice([5.0, 2.5, -0.0, 1e300, 1e-7, None], n).tolist(),
    "size": rng.choice([0.1, 3.0, 1e10], n).astype(np.float32),
    "cost": [decimal.Decimal(int(c)) / 100 for c in rng.integers(-500, 500, n)],
    "flag": rng.choice([True, False, None], n).tolist(),
    "day": [datetime.date(2024, 1, int(d)) for d in rng.integers(1, 29, n)],
    "seen": [START + datetime.timedelta(microseconds=int(u)) for u in rng.choice([0, 500_000, 123_456], n)],
    "tags": [rng.choice(["p", "q ", "", "r"], int(k)).tolist() if k < 5 else None for k in rng.integers(0, 6, n)],
    "ratio": rng.choice([0.5, -3.25, 1e6, float("nan"), None], n).tolist(),
    "item": rng.integers(0, 8, n).tolist(),
  }
  types = {"size": pa.float32(), "cost": pa.decimal128(10, 2), "store": pa.int64(), "code": pa.float64()}
  seen = {"seen": pa.timestamp("us", tz="UTC"), "at": pa.timestamp("us"), "ratio": pa.float64()}
  table = pa.table({k: pa.array(v, ({**types, **seen}).get(k)) for k, v in clicks.items()})
  pq.write_table(table, folder / "clicks.parquet")
  for row in table.to_pylist():
    users[row.pop("user")]["events"]["clicks"].append({k: _json(v) for k, v in row.items()})

  items = {
    "item": [0, 1, 2, 3, 4, 5],  # 6 and 7 are not there
    "brand": ["x", "y", "x", None, "", "z"],
    "weight": [1.0, 2.0, None, -4.0, 100.0, 1.0],
    "labels": [["l", "m", "n"], [], None, ["m"], ["l"], ["n", "l"]],
  }
  pq.write_table(pa.table(items), folder / "items.parquet")

  lines = ["user,ms,amount,kind,tags"]
  for user, at in zip(rng.choice(USERS, 200), moments(200)):
    ms = str(int(at.replace(tzinfo=datetime.UTC).timestamp() * 1000))
    amount, kind = rng.choice(["1.5", " 2e1 ", "", "nan", "-7"]), rng.choice(["01", "1", "1.0", "true"])
    tags = rng.choice(["p|q", " q | r ", "", "|"])
    lines.append(f"{user},{ms},{amount},{kind},{tags}")
    event = {"ms": int(ms) if len(lines) % 2 else ms, "amount": str(amount), "kind": str(kind), "tags": str(tags)}
    users[str(user)]["events"]["orders"].append(event)
  (folder / "orders.csv").write_text("\n".join(lines) + "\n")

  lines = []
  for user, at in zip(rng.choice(USERS, 200), moments(200)):
    event = {
      "t": at.isoformat() + rng.choice(["", "Z", "+02:00"]),
      "kind": rng.choice(np.array([1, 1.0, 2.50, 1e16, True, "1", "", None], object)),
      "tags": [["p", 1, 2.50, None, " q "], '["r"]', "p|q", "[p", 7, []][int(rng.integers(6))],
      "amount": [3, 0.25, "4", None][int(rng.integers(4))],
    }
    lines.append(json.dumps({"user": user, **event}))
    users[str(user)]["events"]["views"].append(json.loads(json.dumps(event)))
  (folder / "views.jsonl").write_text("\n".join(lines) + "\n")

  known = [{"user": u, "country": ["DE", "FR", None][i % 3], "score": [1.5, None][i % 2]} for i, u in enumerate(USERS)]
  (folder / "users.jsonl").write_text("\n".join(json.dumps(row) for row in known[:-2]) + "\n")
  for row in known[:-2]:
    users[row.pop("user")]["user"] = row
  return users


def _json(value: Any) -> Any:
  if isinstance(value, decimal.Decimal):
    return str(value)
  if isinstance(value, datetime.date):
    return value.isoformat()
  return value


def raw_config(folder: pathlib.Path, **data: Any) -> dict[str, Any]:
  clicks = ["clicks"]
  return {
    "data": {
      "path": str(folder / "dataset"),
      "sources": {
        "clicks": {
          "files": [str(folder / "clicks.parquet")],
          "user": "user",
          "time": "at",
          "items": {"file": str(folder / "items.parquet"), "key": "item"},
        },
        "orders": {"files": [str(folder / "orders.csv")], "user": "user", "time": "ms", "time_unit": "ms"},
        "views": {"files": [str(folder / "views.jsonl")], "user": "user", "time": "t"},
      },
      "fields": {
        "page": {"sources": clicks, "min_count": 8},
        "page_again": {"column": "page", "sources": clicks, "size": 2, "buckets": 5},
        "store": {"sources": clicks},
        "code": {"sources": clicks},
        "size": {"sources": clicks},
        "cost": {"sources": clicks},
        "flag": {"sources": clicks},
        "day": {"sources": clicks, "kind": "hash", "size": 11},
        "seen": {"sources": clicks},
        "ratio": {"sources": clicks, "kind": "numeric", "encoding": "quantile"},
        "length": {"column": "size", "sources": clicks, "kind": "numeric", "encoding": "log1p"},
        "on": {"column": "flag", "sources": clicks, "kind": "numeric"},
        "price": {"column": "cost", "sources": clicks, "kind": "numeric"},
        "item": {"sources": clicks, "kind": "hash", "size": 5, "parts": 2, "part": 1, "half": "upper"},
        "brand": {"sources": clicks},
        "weight": {"sources": clicks, "kind": "numeric", "encoding": "log1p"},
        "labels": {"sources": clicks, "many": 2},
        "tags": {"many": 2},
        "kind": {"sources": ["orders", "views"]},
        "kind_of_views": {"column": "kind", "sources": ["views"], "shares": "kind"},
        "amount": {"sources": ["orders", "views"], "kind": "numeric", "encoding": "log1p"},
        "secret": {"column": "kind", "sources": ["orders"], "input": False},
        "country": {"table": "users"},
        "score": {"table": "users", "kind": "numeric"},
      },
      "users": {"files": [str(folder / "users.jsonl")], "user": "user"},
      "split": {"train_end": "2024-03-01", "validation": ["2024-03-02"], "test": ["2024-03-20"]},
      "aggregates": {"top_values": 3, "fields": ["page", "kind"]},
      **data,
    },
    "tasks": {"quiet": {"kind": "future_event", "source": "clicks", "horizon_days": 7.0, "negate": True}},
    "model": {"max_events": 32},
  }
