"""User attributes of MovieLens 1M from the films a user saw: features made by scikit-learn, judged by `supermoe probe`.

    python experiments/benchmarks/probe_movielens.py DATA_FOLDER --out FOLDER [--run WORKDIR] [options …]

DATA_FOLDER holds `sequences.parquet` (`user_id, movie_id, pos`) and `users.parquet` (`user_id, gender, age,
occupation`). A history is all but the user's last two events. Written to FOLDER:

    labels.parquet   gender, age35 (35 and over), student (occupation 4 or 10)
    svd.parquet      64 factors of a truncated SVD of the TF-IDF of the films, as a list column
    svd.json         what `supermoe probe --other svd=svd.parquet` says of them
    tfidf.json       a logistic regression on the TF-IDF itself: a sparse matrix of 3,400 columns, which no file holds
                     but the library's probes take

    views.parquet    with --run: the views of `supermoe embed --views` of the same histories, by a run of
                     experiments/movielens_1m.py with --config.exclude_tasks="('female','age_group','occupation')"

Neither TF-IDF nor SVD sees a label, and such a run none either. `supermoe probe` compares the views with the SVD.
Further options go to it.
"""

import argparse
import json
import pathlib
import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer

from supermoe_jax import cli
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.encoding.splits import VALIDATION
from supermoe_jax.embeddings.views import views_of
from supermoe_jax.probing import label_table, models
from supermoe_jax.probing import protocol as protocol_lib
from supermoe_jax.training.run import Run

FACTORS = 64
LEFT_OUT = 2  # a user's last events


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("data", type=pathlib.Path, help="folder with sequences.parquet and users.parquet")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for features, labels and figures")
  parser.add_argument("--run", type=pathlib.Path, help="a run whose views are probed")
  args, more = parser.parse_known_args()
  args.out.mkdir(parents=True, exist_ok=True)
  users, tfidf = features(args.data, args.out)
  write_labels(args.data, args.out)
  found = sparse(args.out, users, tfidf)
  (args.out / "tfidf.json").write_text(json.dumps(found, indent=1) + "\n")
  for name, figures in found.items():
    print(
      f"{name}: TF-IDF, logistic regression: AUC {figures['value']:.4f} [{figures['low']:.4f}, {figures['high']:.4f}]"
    )
  files = ["--other", f"svd={args.out / 'svd.parquet'}", "--labels", str(args.out / "labels.parquet")]
  if args.run is not None:
    write_views(args.run, args.out / "views.parquet")
    files += ["--embeddings", str(args.out / "views.parquet"), "--beside", "none"]
  return cli.main(["probe", *files, "--out", str(args.out / "svd.json"), *more])


def features(data: pathlib.Path, out: pathlib.Path) -> tuple[np.ndarray, csr_matrix]:
  """Writes the factors; returns the users and the TF-IDF of their films, a row a user."""
  seen = duckdb.sql(
    f"SELECT user_id, movie_id FROM '{data / 'sequences.parquet'}' "
    f"QUALIFY row_number() OVER (PARTITION BY user_id ORDER BY pos DESC) > {LEFT_OUT} ORDER BY ALL"
  ).fetchnumpy()
  users, row = np.unique(seen["user_id"], return_inverse=True)
  films, column = np.unique(seen["movie_id"], return_inverse=True)
  counts = csr_matrix((np.ones(len(row)), (row, column)), shape=(len(users), len(films)))
  tfidf = csr_matrix(TfidfTransformer().fit_transform(counts))
  factors = TruncatedSVD(FACTORS, random_state=0).fit_transform(tfidf).astype(np.float32)
  vectors = pa.FixedSizeListArray.from_arrays(pa.array(factors.reshape(-1)), FACTORS)
  pq.write_table(pa.table({"user_id": pa.array(users.astype(np.int64)), "factors": vectors}), out / "svd.parquet")
  return users, tfidf


def write_views(workdir: pathlib.Path, file: pathlib.Path) -> None:
  """Writes the views of a run at the validation snapshots, which see all but the last two events."""
  run = Run(workdir)
  layout, parts, users = views_of(run), [], []
  for batch in snapshot_batches.query_batches(run.dataset, run.cfg, split=VALIDATION):
    n = len(batch.questions)
    encoded = np.asarray(run.encode(batch.features, answers=True))[:n]
    parts.append(layout(encoded, batch.features.query_aggregates[:n, 0]))
    users += [int(q.user_id) for q in batch.questions]
  vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(parts).reshape(-1)), layout.width)
  pq.write_table(pa.table({"user_id": pa.array(users, pa.int64()), "views": vectors}), file)


def write_labels(data: pathlib.Path, out: pathlib.Path) -> None:
  duckdb.sql(
    f"COPY (SELECT user_id, gender, age >= 35 AS age35, occupation IN (4, 10) AS student FROM "
    f"'{data / 'users.parquet'}' ORDER BY 1) TO '{out / 'labels.parquet'}'"
  )


def sparse(out: pathlib.Path, users: np.ndarray, tfidf: csr_matrix) -> dict[str, dict[str, float | None]]:
  """AUC of a logistic regression on the TF-IDF, by the protocol of the command."""
  table = label_table.read_label_table(out / "labels.parquet")
  place = {str(u): i for i, u in enumerate(users)}
  known = np.array([u in place for u in table.users])
  rows = np.array([place[u] for u in table.users[known]])
  protocol = protocol_lib.Protocol()
  asked = {}
  for label in table.labels:
    own = label._replace(value=label.value[known])
    asked[label.name] = protocol_lib.predict_all(
      {"tfidf": tfidf[rows]},
      own,
      protocol_lib.ProbeRows(np.arange(len(rows))),
      {"logistic": models.logistic},
      protocol,
      models.default_threads(),
    )
  measured = protocol_lib.measure_predictions(asked, "tfidf", protocol)
  return {name: m.scores["tfidf"]["logistic"]["auc"]._asdict() for name, m in measured.items()}


if __name__ == "__main__":
  sys.exit(main())
