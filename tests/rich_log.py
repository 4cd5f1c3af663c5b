"""The small log with more known of its users, and a config with a task of every kind."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from small_log import raw_config, write_log


def write_rich_log(folder: pathlib.Path, users: int = 40) -> None:
  """Writes `small_log`'s files; users have a plan, a tier of three and an age, each known of some."""
  write_log(folder, users)
  rng = np.random.default_rng(1)
  known = list(range(0, users, 2))
  pq.write_table(
    pa.table(
      {
        "user": known,
        "plan": [["free", "paid"][u % 4 // 2] for u in known],
        "tier": [["low", "mid", "high"][u % 3] if u % 5 else None for u in known],
        "age": [float(rng.normal(40, 9)) if u % 6 else None for u in known],
      }
    ),
    folder / "users.parquet",
  )


def rich_config(folder: pathlib.Path) -> dict:
  """A config over these files with a task of every kind, a sample space, and a contrast."""
  raw = raw_config(folder)
  raw["data"]["fields"]["kind"] = {"column": "device", "sources": ["visits"], "input": False}
  raw["tasks"] |= {
    "sampled": {"kind": "next_event", "field": "page", "softmax": "sampled", "negatives": 6},
    "long": {"kind": "event_label", "field": "seconds", "at_least": 1.0, "given": ["page"], "per_snapshot": 3},
    "app": {
      "kind": "event_label",
      "field": "kind",
      "positive": ["app"],
      "per_snapshot": 2,
    },
    "spent": {"kind": "event_label", "field": "amount", "per_snapshot": 2},
    "bought": {"kind": "future_event", "source": "buys", "horizon_days": 14.0, "sample_space": "quiet == 0"},
    "tier": {"kind": "user_label", "column": "tier", "type": "multiclass"},
    "age": {"kind": "user_label", "column": "age", "type": "regression"},
    "alike": {"kind": "contrast", "slice_events": 8, "least_events": 2},
  }
  return raw
