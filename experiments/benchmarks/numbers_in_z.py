"""Whether z holds a user's basic numbers, on the Complete Journey: recency, baskets and spend, read by a linear model.

    supermoe embed --workdir RUN --as-of 2017-10-01 2017-11-01 --views
    python experiments/benchmarks/numbers_in_z.py RUN/embeddings [RUN/embeddings …] --out FILE

The targets come straight from the raw tables: days since the last basket, and the number of baskets and the spend of
the last 7, 28 and 84 days and of all days, each as log1p. A ridge regression on standardised inputs, with a strength
for each target that folds over the fitted rows choose, is fitted on the households' rows of 2017-10-01 and scored by R²
on those of 2017-11-01. It reads z alone, at length 1, and all views. Embeddings without views are z, as the encoder
gives it. Several directories are seeds of one config: the table has the mean, the least and the greatest R². A target
below .9 is marked. FILE gets the figures of each directory as JSON.
"""

import argparse
import json
import pathlib

import duckdb
import numpy as np
from probe_complete_journey import FIT, SCORE, tables_folder
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from supermoe_jax.embeddings.embedding_files import read_embedding_manifest
from supermoe_jax.embeddings.views import STATE
from supermoe_jax.probing.vectors import UserVectors, read_vectors

WINDOWS = {"7 days": 7, "28 days": 28, "84 days": 84, "all": 100_000}
STRENGTHS = np.logspace(-2, 4, 13)
FOLDS = 5
WANTED = 0.9  # R²

# By target, the log1p of each household's number at each day.
Targets = dict[str, np.ndarray]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("embeddings", type=pathlib.Path, nargs="+", help="directories of 'supermoe embed', one a seed")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file for the figures")
  args = parser.parse_args()
  users, days, targets = basic_numbers()
  found = {str(path): scores(path, users, days, targets) for path in args.embeddings}
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps({"fitted": FIT, "scored": SCORE, "r2": found}, indent=1) + "\n")
  print(markdown(list(found.values())))


def basic_numbers() -> tuple[np.ndarray, np.ndarray, Targets]:
  """Returns the users, the days and the targets of all households with a basket before the day."""
  con = duckdb.connect()
  columns = ["min(ago) AS recency"]
  for name, days in WINDOWS.items():
    columns.append(f'count(DISTINCT basket_id) FILTER (ago <= {days}) AS "baskets, {name}"')
    columns.append(f'coalesce(sum(sales_value) FILTER (ago <= {days}), 0) AS "spend, {name}"')
  rows = con.execute(
    "WITH known AS (SELECT household_id, day, basket_id, sales_value, "
    "date_diff('second', transaction_timestamp, day) / 86400.0 AS ago "
    f"FROM '{tables_folder() / 'transactions.parquet'}', "
    f"(VALUES (TIMESTAMP '{FIT}'), (TIMESTAMP '{SCORE}')) days(day) WHERE transaction_timestamp < day) "
    f"SELECT household_id::VARCHAR AS user, day, {', '.join(columns)} FROM known "
    "GROUP BY household_id, day ORDER BY household_id, day"
  ).fetchnumpy()
  users, days = np.asarray(rows.pop("user"), object), np.asarray(rows.pop("day"), "datetime64[us]")
  return users, days, {name: np.log1p(np.asarray(values, np.float64)) for name, values in rows.items()}


def scores(path: pathlib.Path, users: np.ndarray, days: np.ndarray, targets: Targets) -> dict[str, dict[str, float]]:
  """Returns the R² of each target, from z and, if the directory has views, from all of them."""
  vectors = {"z": read_vectors("z", path)}
  if read_embedding_manifest(path).get("views"):
    vectors = {"z": read_vectors("z", path, views=(STATE,)), "all views": vectors["z"]}
  return {name: linear_scores(of, users, days, targets) for name, of in vectors.items()}


def linear_scores(vectors: UserVectors, users: np.ndarray, days: np.ndarray, targets: Targets) -> dict[str, float]:
  """Returns the R² of each target: ridge regressions fitted on the first day and scored on the second."""
  place = vectors.find(users, days.astype(np.int64))
  fit, asked = ((days == np.datetime64(day)) & (place >= 0) for day in (FIT, SCORE))
  assert fit.any() and asked.any(), f"{vectors.about.get('directory')}: embed --as-of {FIT} {SCORE}"
  x, out = vectors.x.astype(np.float64), {}  # in float32 the weakest strengths are ill-conditioned
  for name, y in targets.items():
    model = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS, cv=FOLDS)).fit(x[place[fit]], y[fit])
    out[name] = float(r2_score(y[asked], model.predict(x[place[asked]])))
  return out


def markdown(found: list[dict[str, dict[str, float]]]) -> str:
  """Returns the table of R², a row a target; of several directories the mean and, in brackets, the range."""
  names = list(found[0])
  lines = [f"| log1p of | {' | '.join(f'{n}, R²' for n in names)} |", "|---" * (1 + len(names)) + "|"]
  for target in found[0][names[0]]:
    cells = []
    for name in names:
      values = [of[name][target] for of in found]
      span = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
      mark = "" if np.mean(values) >= WANTED else f", below {WANTED:g}"
      cells.append(f"{np.mean(values):.3f}{span}{mark}")
    lines.append(f"| {target} | {' | '.join(cells)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
