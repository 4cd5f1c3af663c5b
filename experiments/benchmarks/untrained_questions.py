"""Questions that no task has asked, on the Complete Journey: frozen embeddings against hand-made aggregates.

    supermoe embed --workdir RUN --as-of 2017-10-01 2017-11-01 --views
    python experiments/benchmarks/untrained_questions.py RUN/embeddings --out FOLDER [options …]

Written to FOLDER, derived straight from the raw tables:

    questions.parquet    twelve yes or no questions about the 28 days from a day, a row a household and day.
                         `spends_more`: the household spends more than in the 28 days before. `spends_half`: it spends
                         half of that at most. `spends_300`: it spends 300 dollars or more. `comes_more`: it comes more
                         often. `new_store`: it visits a store for the first time. `new_categories`: it buys five
                         categories or more for the first time. `fuel`: it buys fuel. Five questions are about
                         households that come at all. `weekend`: most baskets are of weekends. `evening`: most baskets
                         are from 17 h on. `own_brand`: own brands get 35 % of the money. `discount`: discounts are
                         20 %. `many_stores`: it visits two stores or more.
    aggregates.parquet   by household and day, the 203 numbers that a team writes first: spend, baskets, lines,
                         discounts, own brand, stores, weekends, hours of 7, 28, 84 days and of all; recency, tenure,
                         the mean gap; counts of the 60 most frequent categories and 20 departments in 28 days and in
                         all

`supermoe probe` fits logistic regressions and LightGBM on 2017-10-01 and scores them on 2017-11-01; further options go
to it. The encoder of `experiments/complete_journey.py` is asked about categories, churn and coupons of 28 days, so all
twelve are new to it. The figures go to FOLDER/questions.json.
"""

import argparse
import pathlib
import sys

import duckdb
from probe_complete_journey import CATEGORIES, FIT, HORIZON, SCORE, tables_folder

from supermoe_jax import cli

DEPARTMENTS = 20
WINDOWS = (7, 28, 84, 100_000)  # days; the last is all


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("embeddings", help="directory that 'supermoe embed' wrote")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for questions, aggregates and figures")
  args, more = parser.parse_known_args()
  args.out.mkdir(parents=True, exist_ok=True)
  write_tables(args.out)
  return cli.main(
    [
      *("probe", "--embeddings", args.embeddings, "--other", f"hand={args.out / 'aggregates.parquet'}"),
      *("--labels", str(args.out / "questions.parquet"), "--user", "household_id", "--time", "day", "--temporal"),
      *("--beside", "none", "--out", str(args.out / "questions.json"), *more),
    ]
  )


def write_tables(folder: pathlib.Path) -> None:
  """Writes questions and aggregates of every household with a basket before the day."""
  con = duckdb.connect()
  tables = tables_folder()
  for name in ("transactions", "products"):
    con.execute(f"CREATE VIEW {name} AS FROM '{tables / name}.parquet'")
  con.execute(
    "CREATE TABLE lines AS SELECT household_id, basket_id, transaction_timestamp AS time, store_id, "
    "sales_value AS paid, retail_disc AS saved, product_category AS category, department, "
    "coalesce(brand = 'Private', false) AS own "
    "FROM transactions LEFT JOIN products USING (product_id)"
  )
  con.execute(
    f"CREATE TABLE asked AS SELECT DISTINCT household_id, day FROM lines, (VALUES (TIMESTAMP '{FIT}'), "
    f"(TIMESTAMP '{SCORE}')) days(day) WHERE time < day"
  )
  for what, most in (("category", CATEGORIES), ("department", DEPARTMENTS)):
    con.execute(
      f"CREATE TABLE top_{what} AS SELECT {what}, row_number() OVER (ORDER BY count(*) DESC, {what}) AS place "
      f"FROM lines WHERE {what} IS NOT NULL AND time < TIMESTAMP '{FIT}' GROUP BY {what} ORDER BY place LIMIT {most}"
    )
  con.execute(
    "CREATE TABLE known AS SELECT l.*, a.day, date_diff('second', l.time, a.day) / 86400.0 AS ago, "
    "c.place AS top_category, d.place AS top_department FROM asked a JOIN lines l USING (household_id) "
    "LEFT JOIN top_category c USING (category) "
    f"LEFT JOIN top_department d USING (department) WHERE l.time < a.day + INTERVAL {HORIZON}"
  )
  con.execute(f"COPY ({_questions()}) TO '{folder / 'questions.parquet'}'")
  con.execute(f"COPY ({_aggregates()}) TO '{folder / 'aggregates.parquet'}'")


def _questions() -> str:
  """Returns the query of the questions; a share of nothing is unknown."""
  later, before = "ago <= 0", "ago > 0 AND ago <= 28"

  def of(what: str, when: str) -> str:
    return f"coalesce({what} FILTER ({when}), 0)"

  def baskets(condition: str) -> str:
    return f"count(DISTINCT basket_id) FILTER ({later} AND {condition})"

  spent, spent_before = of("sum(paid)", later), of("sum(paid)", before)
  came, came_before = of("count(DISTINCT basket_id)", later), of("count(DISTINCT basket_id)", before)
  new = "len(list_filter({after}, lambda x: NOT list_contains({past}, x)))"

  def news(column: str) -> str:
    after = f"coalesce(list(DISTINCT {column}) FILTER ({later}), [])"
    return new.format(after=after, past=f"coalesce(list(DISTINCT {column}) FILTER (ago > 0), [])")

  questions = {
    "spends_more": f"{spent} > {spent_before}",
    "spends_half": f"{spent} <= {spent_before} / 2",
    "spends_300": f"{spent} >= 300",
    "comes_more": f"{came} > {came_before}",
    "new_store": f"{news('store_id')} > 0",
    "new_categories": f"{news('category')} >= 5",
    "fuel": f"coalesce(bool_or(department = 'FUEL') FILTER ({later}), false)",
    "weekend": f"{baskets('isodow(time) >= 6')} / nullif({came}, 0) > 0.5",
    "evening": f"{baskets('hour(time) >= 17')} / nullif({came}, 0) > 0.5",
    "own_brand": f"{of('sum(paid)', f'{later} AND own')} / nullif({spent}, 0) >= 0.35",
    "discount": f"sum(saved) FILTER ({later}) / nullif(sum(paid + saved) FILTER ({later}), 0) >= 0.2",
    "many_stores": f"nullif(count(DISTINCT store_id) FILTER ({later}), 0) >= 2",
  }
  columns = ", ".join(f"{condition} AS {name}" for name, condition in questions.items())
  return f"SELECT household_id, day, {columns} FROM known GROUP BY household_id, day ORDER BY household_id, day"


def _aggregates() -> str:
  """Returns the query of the aggregates."""
  columns = {}
  for days in WINDOWS:
    inside = f"ago <= {days}"
    baskets = f"count(DISTINCT basket_id) FILTER ({inside})"
    columns |= {
      f"spend_{days}": f"coalesce(sum(paid) FILTER ({inside}), 0)",
      f"baskets_{days}": baskets,
      f"lines_{days}": f"count(*) FILTER ({inside})",
      f"saved_{days}": f"coalesce(sum(saved) FILTER ({inside}), 0)",
      f"own_{days}": f"coalesce(sum(paid) FILTER ({inside} AND own), 0)",
      f"stores_{days}": f"count(DISTINCT store_id) FILTER ({inside})",
      f"categories_{days}": f"count(DISTINCT category) FILTER ({inside})",
      f"weekend_{days}": f"count(DISTINCT basket_id) FILTER ({inside} AND isodow(time) >= 6) / greatest({baskets}, 1)",
      f"evening_{days}": f"count(DISTINCT basket_id) FILTER ({inside} AND hour(time) >= 17) / greatest({baskets}, 1)",
      f"hour_{days}": f"coalesce(avg(hour(time)) FILTER ({inside}), 0)",
    }
  columns |= {
    "recency": "min(ago)",
    "tenure": "max(ago)",
    "gap": "(max(ago) - min(ago)) / greatest(count(DISTINCT basket_id) - 1, 1)",
  }
  for what, most in (("category", CATEGORIES), ("department", DEPARTMENTS)):
    for place in range(1, most + 1):
      columns[f"{what}_{place}_28"] = f"count(*) FILTER (top_{what} = {place} AND ago <= 28)"
      columns[f"{what}_{place}_all"] = f"count(*) FILTER (top_{what} = {place})"
  listed = ", ".join(f"({query})::FLOAT AS {name}" for name, query in columns.items())
  return (
    f"SELECT household_id AS user_id, day AS as_of, {listed} FROM known WHERE ago > 0 GROUP BY household_id, day "
    "ORDER BY household_id, day"
  )


if __name__ == "__main__":
  sys.exit(main())
