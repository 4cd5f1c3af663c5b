"""Who buys within two weeks in RetailRocket's shop: frozen embeddings of several seeds against hand-made aggregates.

    supermoe inspect FOLDER/events_train.parquet --out proposed.py           # nothing in it is changed
    supermoe prepare --config proposed.py
    supermoe train --config proposed.py --workdir RUN --config.train.seed=0  # and 1, and 2
    supermoe embed --workdir RUN --as-of 2015-07-30 2015-08-24 --views
    python experiments/benchmarks/probe_retailrocket.py FOLDER RUN/embeddings [RUN/embeddings …]

Models are fitted on the first day, the end of the training period, and scored on the second, on all users with an event
before it. The 41 aggregates are counts of views, carts, purchases, items and days in six windows, and recency and
tenure. LightGBM and the logistic regression are those of `supermoe probe`. Printed are the AUC of each, the mean over
the seeds, and its difference to the aggregates with a 95 % interval by resampling users.
"""

import argparse
import pathlib

import duckdb
import numpy as np
from sklearn.metrics import roc_auc_score

from supermoe_jax import config
from supermoe_jax.probing import models
from supermoe_jax.probing.label_table import Label
from supermoe_jax.probing.vectors import UserVectors, read_vectors

FIT, SCORE, DAYS = "2015-07-30", "2015-08-24", 14
WINDOWS = (3, 7, 14, 28, 56, 1000)  # days
RESAMPLES = 1000


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("data", type=pathlib.Path, help="folder of events_train.parquet")
  parser.add_argument("embeddings", type=pathlib.Path, nargs="+", help="directories of 'supermoe embed', one a seed")
  parser.add_argument("--label", choices=("buys", "active"), default="buys", help="a purchase, or any event")
  args = parser.parse_args()
  rows = table(args.data)
  label = np.array(rows[args.label], np.float64)
  fit, asked = (np.flatnonzero(rows["day"] == np.datetime64(day)) for day in (FIT, SCORE))
  aggregates = np.stack([rows[n] for n in rows if n not in ("user", "day", "buys", "active")], axis=1)
  vectors = [of_rows(read_vectors("embeddings", path), rows) for path in args.embeddings]
  positive = int(label[asked].sum())
  print(
    f"{args.label}: models learn from {len(fit):,} users. They are scored on {len(asked):,}; {positive} have the label"
  )
  draws = np.random.default_rng(0).integers(0, len(asked), (RESAMPLES, len(asked)))
  for name, model in (("lightgbm", models.boosted), ("logistic", models.logistic)):
    own = Label(args.label, "binary", label, ("0", "1"))
    base, *seeds = (model(x.astype(np.float32), own, fit, asked, 0) for x in (aggregates, *vectors))
    y = label[asked]

    def lead(rows: np.ndarray, y: np.ndarray = y, base: np.ndarray = base, seeds: list[np.ndarray] = seeds) -> float:
      return float(np.mean([auc(y[rows], s[rows]) for s in seeds])) - auc(y[rows], base[rows])

    scores = [auc(y, s) for s in seeds]
    low, high = np.quantile([lead(rows) for rows in draws], (0.025, 0.975))
    each = ", ".join(f"{s:.4f}" for s in scores)
    print(f"  {name}: aggregates {auc(y, base):.4f}; embeddings {each}, mean {np.mean(scores):.4f}")
    print(f"    the mean leads by {lead(np.arange(len(y))):+.4f} ({low:+.4f} to {high:+.4f})")


def auc(label: np.ndarray, score: np.ndarray) -> float:
  """Returns the area under the curve."""
  return float(roc_auc_score(label, score))


def table(data: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns users, days, labels and aggregates, from the raw events."""
  con = duckdb.connect()
  con.execute(
    'CREATE TABLE events AS SELECT "user", item, behavior, make_timestamp(ts * 1000000) AS time '
    f"FROM '{data / 'events_train.parquet'}'"
  )
  con.execute(
    "CREATE TABLE known AS SELECT e.*, day, date_diff('second', time, day) / 86400.0 AS ago FROM events e, (VALUES "
    f"(TIMESTAMP '{FIT}'), (TIMESTAMP '{SCORE}')) days(day) WHERE time < day + INTERVAL {DAYS} day"
  )
  columns = {}
  for days in WINDOWS:
    inside = f"ago > 0 AND ago <= {days}"
    for behavior in ("view", "cart", "buy"):
      columns[f"{behavior}_{days}"] = f"count(*) FILTER (behavior = '{behavior}' AND {inside})"
    columns[f"items_{days}"] = f"count(DISTINCT item) FILTER ({inside})"
    columns[f"days_{days}"] = f"count(DISTINCT date_trunc('day', time)) FILTER ({inside})"
  for behavior in ("view", "cart", "buy"):
    columns[f"since_{behavior}"] = f"coalesce(min(ago) FILTER (behavior = '{behavior}' AND ago > 0), 1000)"
  columns |= {"recency": "min(ago) FILTER (ago > 0)", "tenure": "max(ago)"}
  listed = ", ".join(f"({query})::DOUBLE AS {name}" for name, query in columns.items())
  return con.execute(
    'SELECT "user"::VARCHAR AS "user", day, coalesce(bool_or(behavior = \'buy\') FILTER (ago <= 0), false) AS buys, '
    f'count(*) FILTER (ago <= 0) > 0 AS active, {listed} FROM known GROUP BY "user", day HAVING max(ago) > 0 '
    "ORDER BY ALL"
  ).fetchnumpy()


def of_rows(vectors: UserVectors, rows: dict[str, np.ndarray]) -> np.ndarray:
  """Returns the vector of each row, `[n, D]`."""
  times = np.array([config.parse_time(str(day), "day") for day in rows["day"]])
  place = vectors.find(rows["user"], times)
  assert (place >= 0).all(), "embed as of both days"
  return vectors.x[place]


if __name__ == "__main__":
  main()
