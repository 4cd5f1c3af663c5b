"""A trillion parameters: 1.01 billion rows of width 1,024 in four tables, and 64 experts, for 256 chips.

    supermoe plan --config experiments/pod_1t.py --topology v5e:16x16

The events are those of a large shop: what was searched for, seen and bought. Values are hashed, since no vocabulary of
so many is worth counting: an item by two hashes, so that two items share both rows about never, a query by one. Each
chip takes 16,384 tokens a step, so that an exchange between 1,024 chips still has more ids than chips in every cell.

`files` are the log's, of any length; the plan asks for no data.
"""

import ml_collections

from supermoe_jax import config

ROWS_A_CHIP, EVENTS = 32, 504


def get_config(files: str = "events/*.parquet") -> ml_collections.ConfigDict:
  data = {
    "path": "runs/pod_1t/dataset",
    "sources": {"events": {"files": files}},
    "fields": {
      **config.hash_fields("item", 2**28, hashes=2, column="item_id"),
      **config.hash_fields("query", 7 * 2**26),
      "category": {"size": 200_000},
      "price": {"kind": "numeric", "encoding": "log1p"},
    },
    "split": {"train_end": "2025-10-01", "validation": ("2025-10-01",), "test": ("2025-11-01",)},
  }
  tasks = {
    "next_category": {"kind": "next_event", "field": "category", "softmax": "sampled", "negatives": 8192},
    "churn": {"kind": "future_event", "source": "events", "horizon_days": 28.0, "negate": True},
    "categories": {"kind": "future_values", "field": "category", "top": 200, "horizon_days": 28.0},
  }
  model = {
    "d_model": 1024,
    "layers": 8,
    "heads": 16,
    "d_hidden": 4096,
    "moe_every": 2,
    "experts": 64,
    "experts_per_token": 2,
    "d_expert": 2048,
    "activation": "swiglu",
    "dispatch": "all_to_all",
    "dtype": "bfloat16",
    "remat": "full",
    "max_events": EVENTS,
  }
  train = {
    "steps": 100_000,
    "batch_rows": 256 * ROWS_A_CHIP,
    "snapshots_per_row": 8,
    "packing": True,
    "learning_rate": 3e-4,
    "warmup_steps": 2000,
    "balance_rate": 1e-3,
    "tables": {"dtype": "bfloat16"},
    "mesh": {"data": 16, "expert": 16},
  }
  return ml_collections.ConfigDict(
    {"data": data, "tasks": tasks, "model": model, "train": train, "evaluate": {"batch_rows": 1024}}
  )
