"""Event files with a label of every kind, and the config that reads them."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

M = 3  # events that a snapshot of an event label asks about
SEGMENTS = ("one", "two", "three")


def write_files(folder: pathlib.Path, users: int = 30) -> None:
  """Items shown, with clicks and ratings of some, searches in between that have neither, and a table of most users."""
  rng = np.random.default_rng(5)
  shows: list[tuple] = []
  searches: list[tuple] = []
  for user in range(users):
    for second in np.sort(rng.integers(0, 150 * 86_400, int(rng.integers(3, 40)))):
      time = np.datetime64("2024-01-01") + np.timedelta64(int(second), "s")
      if rng.random() < 0.3:
        searches.append((user, time))
        continue
      click = [None, "yes", "no", "no"][int(rng.integers(4))]
      rating = float(rng.integers(1, 6)) if rng.random() < 0.7 else None
      shows.append((user, time, f"item{rng.integers(6)}", click, rating))
  names = ("user", "time", "item", "click", "rating")
  pq.write_table(pa.table(dict(zip(names, map(list, zip(*shows))))), folder / "shows.parquet")
  pq.write_table(pa.table(dict(zip(("user", "time"), map(list, zip(*searches))))), folder / "searches.parquet")
  known = list(range(0, users, 3)) + list(range(1, users, 3))
  table = {
    "user": known,
    "plan": [["free", "paid"][u % 2] for u in known],
    "segment": [SEGMENTS[u % 7 % 3] for u in known],
    "age": [20.0 + u for u in known],
  }
  pq.write_table(pa.table(table), folder / "users.parquet")


def raw_config(folder: pathlib.Path) -> dict[str, Any]:
  who = {"user": "user", "time": "time"}
  return {
    "data": {
      "path": str(folder / "dataset"),
      "sources": {
        "shows": {"files": [str(folder / "shows.parquet")], **who},
        "searches": {"files": [str(folder / "searches.parquet")], **who},
      },
      "fields": {
        "click": {"sources": ["shows"], "input": False},
        "item": {"sources": ["shows"]},
        "rating": {"sources": ["shows"], "kind": "numeric", "encoding": "log1p", "input": False},
        "shown": {"sources": ["shows"], "kind": "numeric", "column": "rating"},
      },
      "users": {"files": [str(folder / "users.parquet")], "user": "user"},
      "split": {
        "train_end": "2024-04-15",
        "validation": ["2024-04-16"],
        "test": ["2024-05-05"],
        "every_days": 12.0,
        "user_validation": 0.2,
      },
      "aggregates": {"top_values": 2, "fields": ["item"]},
    },
    "tasks": {
      "next_item": {"kind": "next_event", "field": "item", "in_space_weight": 2.0},
      "click": {"kind": "event_label", "field": "click", "positive": ["yes"], "given": ["item"], "per_snapshot": M},
      "good": {
        "kind": "event_label",
        "field": "rating",
        "at_least": 4.0,
        "per_snapshot": M,
        "sample_space": "click == 1",
        "out_space_weight": 0.25,
      },
      "rating": {"kind": "event_label", "field": "rating", "per_snapshot": M, "sample_space": "good == 1"},
      "high": {
        "kind": "event_label",
        "field": "click",
        "positive": ["no"],
        "per_snapshot": M,
        "sample_space": "rating >= 3",
      },
      "quiet": {"kind": "future_event", "source": "shows", "horizon_days": 20.0, "negate": True},
      "items": {
        "kind": "future_values",
        "field": "item",
        "top": 4,
        "horizon_days": 10.0,
        "sample_space": "paid != 1",
        "in_space_weight": 2.0,
      },
      "paid": {"kind": "user_label", "column": "plan", "positive": ["paid"]},
      "segment": {"kind": "user_label", "column": "segment", "type": "multiclass", "sample_space": "quiet == 0"},
      "age": {"kind": "user_label", "column": "age", "type": "regression"},
      "young": {"kind": "user_label", "column": "plan", "positive": ["free"], "sample_space": "age < 35"},
      "same": {"kind": "contrast", "slice_events": 9, "least_events": 3},
    },
    "model": {"d_model": 16, "heads": 2, "d_hidden": 16, "d_expert": 16, "experts": 4, "max_events": 16},
    "train": {"steps": 4, "warmup_steps": 1, "batch_rows": 8, "snapshots_per_row": 8},
    "evaluate": {"batch_rows": 16},
  }
