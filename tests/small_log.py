"""A small generated event log, and a config over it that trains in seconds."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_log(folder: pathlib.Path, users: int = 40, seed: int = 0) -> None:
  """Writes visits and purchases of a few months, and a user table; interests differ, so that there is something to
  learn."""
  rng = np.random.default_rng(seed)
  visits: list[tuple] = []
  buys: list[tuple] = []
  for user in range(users):
    n = int(rng.integers(3, 60))
    times = np.datetime64("2024-01-01") + np.sort(rng.integers(0, 170 * 86_400, n)).astype("timedelta64[s]")
    taste = rng.dirichlet(np.full(12, 0.3))
    for time in times:
      visits.append((user, time, f"page{rng.choice(12, p=taste)}", rng.choice(["web", "app"]), rng.lognormal()))
      if rng.random() < 0.2 * taste.max():
        buys.append((user, time + np.timedelta64(60, "s"), float(rng.lognormal(2))))
  names = ("user", "time", "page", "device", "seconds")
  pq.write_table(pa.table(dict(zip(names, map(list, zip(*visits))))), folder / "visits.parquet")
  pq.write_table(pa.table(dict(zip(("user", "time", "amount"), map(list, zip(*buys))))), folder / "buys.parquet")
  known = list(range(0, users, 2))
  pq.write_table(
    pa.table({"user": known, "plan": [["free", "paid"][u % 4 // 2] for u in known]}), folder / "users.parquet"
  )


def raw_config(folder: pathlib.Path) -> dict:
  """A config over `write_log`'s files, small enough to train in seconds."""
  return {
    "data": {
      "path": str(folder / "dataset"),
      "sources": {
        "visits": {"files": [str(folder / "visits.parquet")], "user": "user", "time": "time"},
        "buys": {"files": [str(folder / "buys.parquet")], "user": "user", "time": "time"},
      },
      "fields": {
        "page": {"sources": ["visits"]},
        "device": {"sources": ["visits"], "kind": "hash", "size": 16},
        "seconds": {"sources": ["visits"], "kind": "numeric", "encoding": "log1p"},
        "amount": {"sources": ["buys"], "kind": "numeric"},
      },
      "users": {"files": [str(folder / "users.parquet")], "user": "user"},
      "split": {"train_end": "2024-05-01", "validation": ["2024-05-02"], "test": ["2024-05-20"]},
      "aggregates": {"top_values": 4, "fields": ["page"]},
    },
    "tasks": {
      "next_page": {"kind": "next_event", "field": "page"},
      "quiet": {"kind": "future_event", "source": "visits", "horizon_days": 14.0, "negate": True},
      "pages": {"kind": "future_values", "field": "page", "top": 5, "horizon_days": 14.0},
      "paid": {"kind": "user_label", "column": "plan", "positive": ["paid"]},
    },
    "model": {
      "d_model": 16,
      "d_hidden": 32,
      "d_expert": 16,
      "experts": 4,
      "max_events": 24,
      "heads": 2,
      "dropout": 0.1,
    },
    "train": {
      "steps": 12,
      "warmup_steps": 2,
      "batch_rows": 8,
      "snapshots_per_row": 4,
      "checkpoint_every": 4,
      "log_every": 2,
    },
    "evaluate": {"batch_rows": 16},
  }
