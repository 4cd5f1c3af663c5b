"""Finds look-alike audiences: the users most like a list of seeds, and measures how well this finds held-out seeds.

Every seed is held out once. In turn a fifth of the seeds is put among the other users, and the rest of the seeds looks
for them. The share of held-out seeds among the first N users is measured. Lift is this share divided by the share that
N random users would find.

Shapes: n users, s seeds, D the width of an embedding.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from supermoe_jax import atomic_files, config
from supermoe_jax.config.tables import PLAIN_TEXT
from supermoe_jax.config.text_settings import setting_text
from supermoe_jax.data.reading import field_sql, readers, value_sql
from supermoe_jax.data.reading.readers import TableFile
from supermoe_jax.data.reading.text_files import clean_copies, text_lines
from supermoe_jax.data.reading.text_files.text_layout import DataInHeaderError
from supermoe_jax.embeddings import selection as selection_lib
from supermoe_jax.embeddings.exact_neighbors import unit_vectors
from supermoe_jax.errors import ConfigError, DataError, nearest
from supermoe_jax.evaluation import intervals, probes
from supermoe_jax.progress import ProgressBar

METHODS = ("logistic", "centroid")
FOLDS = 5
# Fewest seeds: of fewer, a fold would hold out fewer than two, and the lift would mean little.
LEAST = 10
# Most other users that a regression is fitted on; of more, a sample of this size is drawn.
OTHERS = 100_000


@dataclasses.dataclass(frozen=True)
class Seeds:
  """Seeds that a file names.

  Attributes:
    rows: int64 `[s]`, rows of the seeds that have an embedding, each once, sorted.
    named: number of ids in the file, without empty ones.
    empty: number of lines or rows without an id.
    repeated: number of ids that repeat an earlier one.
    unknown: number of distinct ids without an embedding.
    examples: the first few ids without an embedding.
  """

  rows: np.ndarray
  named: int
  empty: int
  repeated: int
  unknown: int
  examples: list[str]


def read_seeds(file: pathlib.Path, users: pa.Array, text: config.TextFormat = PLAIN_TEXT) -> Seeds:
  """Reads seeds from a table (the column `user_id`, or the only one) or text (`.txt`, one id a line).

  A list without a header, of one column, keeps its first id: it is known by being a number, or a user.

  Args:
    file: the file: Parquet, CSV, JSON lines or text.
    users: the ids that have an embedding.
    text: how the table is written.

  Raises:
    DataError: the file cannot be read, has no such column, or names fewer than `LEAST` users that have an embedding.
    ConfigError: a setting of `text` has no meaning for the file's format.
  """
  finder = selection_lib.UserFinder(users)
  named = [id.strip() if id is not None else "" for id in _ids(file, finder, text)]
  there = [t for t in named if t]
  distinct = list(dict.fromkeys(there))
  found = finder.rows(pa.array(distinct, pa.large_string()))
  unknown = [u for u, row in zip(distinct, found) if row < 0]
  rows = np.unique(found[found >= 0])
  if len(rows) < LEAST:
    some = f" (unknown: {', '.join(unknown[: selection_lib.NAMED])} …)" if unknown else ""
    raise DataError(
      f"{file} names {len(rows)} users that have an embedding, of {len(distinct):,} ids{some}; the search and its "
      f"measurement need at least {LEAST}."
    )
  return Seeds(
    rows, len(there), len(named) - len(there), len(there) - len(distinct), len(unknown), unknown[: selection_lib.NAMED]
  )


def _ids(file: pathlib.Path, finder: selection_lib.UserFinder, text: config.TextFormat) -> Sequence[str | None]:
  if not file.is_file():
    raise DataError(f"{file}: no such file.")
  con = readers.connect()
  try:
    if file.suffix == ".txt":
      return file.read_text().splitlines()
    if not text_lines.unpacked_name(file.name).endswith((".parquet", ".csv", ".tsv", ".jsonl")):
      raise DataError(f"{file}: seeds are read from .parquet, .csv, .jsonl or .txt; rename or convert it.")
    table = _open_list(con, file, finder, text)
    if "user_id" not in table.columns and len(table.columns) > 1:
      table.require("user_id", "the seeds' column")
    column = "user_id" if "user_id" in table.columns else next(iter(table.columns))
    field_sql.check_ids(con, table, column, "the seeds")
    with clean_copies.readable(con, table) as (good, _), readers.naming(file, table.format):
      id = value_sql.text_sql("id", table.columns[column])
      return [i for (i,) in con.execute(f"SELECT {id} FROM ({good.select({'id': column})})").fetchall()]
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"{file} cannot be read ({error}).") from error
  finally:
    con.close()


def _open_list(
  con: duckdb.DuckDBPyConnection, file: pathlib.Path, finder: selection_lib.UserFinder, text: config.TextFormat
) -> TableFile:
  """Opens a table of seeds. The first line of a single column is an id if it is a number or the id of a user."""
  without_header = dataclasses.replace(text, header=False, columns=("user_id",))
  guessed = text.header == "auto" and not text.columns
  try:
    table = readers.open_table(con, file, "auto", ("user_id",), text)
  except DataInHeaderError as error:
    if len(error.first) > 1 or not guessed:
      raise
    return readers.open_table(con, file, "auto", (), without_header)
  if guessed and table.format in readers.DELIMITED and "user_id" not in table.columns:
    names = [name.strip() for name in table.columns]
    known = finder.rows(pa.array(names, pa.large_string())) >= 0
    if known.any() and len(names) > 1:
      raise DataError(
        f"{file}: the first line names the user {names[int(known.argmax())]!r}, so it is data, not the names of "
        f"columns; set {setting_text('', 'header', False)} {setting_text('', 'columns', ...)} with the names of its "
        f"{len(names)} columns; one of them must be user_id."
      )
    if known.any():
      return readers.open_table(con, file, "auto", (), without_header)
  return table


def seed_scores(method: str, vectors: np.ndarray, seeds: np.ndarray, seed: int = 0) -> np.ndarray:
  """Returns how similar each of `vectors [n, D]` is to the rows `seeds`: float `[n]`; scores of seeds mean nothing.

  "logistic" is the log-odds of a regression of seeds against others. "centroid" is the cosine with the mean direction
  of the seeds, after each of the D numbers is standardised over all users.

  Raises:
    ConfigError: an unknown method.
  """
  if method == "logistic":
    others = np.setdiff1d(np.arange(len(vectors)), seeds)
    if len(others) > OTHERS:
      others = np.random.default_rng(seed).choice(others, OTHERS, replace=False)
    rows = np.concatenate([seeds, others])
    model = probes.logistic_pipeline(vectors).fit(vectors[rows], np.arange(len(rows)) < len(seeds))
    return np.asarray(model.decision_function(vectors))
  if method == "centroid":
    spread = vectors.std(axis=0)
    # Otherwise the direction that all users share, and numbers that vary most, would hide what the seeds share.
    alike = unit_vectors((vectors - vectors.mean(axis=0)) / np.where(spread > 0, spread, 1))[0]
    return np.asarray(alike @ alike[seeds].mean(axis=0))
  raise ConfigError(f"--method={method!r}{nearest(method, METHODS)}.")


def seed_lift(method: str, vectors: np.ndarray, seeds: np.ndarray, size: int, seed: int = 0) -> dict[str, Any]:
  """Measures how many held-out seeds an audience of `size` finds.

  Returns:
    `found` out of `held_out`, the `share` with Wilson's 95 % interval, the `random_share` that a random audience finds,
    and the quotients `lift`, `lift_low`, `lift_high`.
  """
  order = np.random.default_rng(seed).permutation(seeds)
  found = 0
  random = 0.0
  for fold in ProgressBar(range(FOLDS), desc="held-out seeds", unit=" folds", mininterval=1):
    held = order[fold::FOLDS]
    told = np.setdiff1d(seeds, held)
    score = seed_scores(method, vectors, told, seed)
    candidates = np.setdiff1d(np.arange(len(vectors)), told)
    found += int(np.isin(most_similar(score, candidates, size), held).sum())
    random += len(held) * min(size / len(candidates), 1.0)
  share, chance = found / len(seeds), random / len(seeds)
  low, high = intervals.wilson(found, len(seeds))
  return {
    "found": found,
    "held_out": len(seeds),
    "share": share,
    "share_low": low,
    "share_high": high,
    "random_share": chance,
    "lift": share / chance,
    "lift_low": low / chance,
    "lift_high": high / chance,
  }


def most_similar(score: np.ndarray, candidates: np.ndarray, size: int) -> np.ndarray:
  """Returns the `size` of the rows `candidates` with the largest `score [n]`, largest first; ties in row order."""
  return candidates[np.lexsort((candidates, -score[candidates]))[:size]]


def audience(
  path: pathlib.Path,
  seeds_file: pathlib.Path,
  size: int,
  out: pathlib.Path,
  *,
  method: str = METHODS[0],
  as_of: str | None = None,
  seed: int = 0,
  text: config.TextFormat = PLAIN_TEXT,
) -> dict[str, Any]:
  """Writes the `size` users that are most like the seeds to a Parquet file: `user_id`, `score`, `rank`.

  `text` says how the file of seeds is written.

  Returns:
    The settings, the counts of seeds and the lift; the file's metadata holds the same under the key `supermoe`.

  Raises:
    ConfigError: an unknown method, an unusable `out`, or a size that leaves nobody out.
    DataError: embeddings or seeds cannot be used (see `selection.select_rows` and `read_seeds`), or writing failed.
  """
  if method not in METHODS:
    raise ConfigError(f"--method={method!r}{nearest(method, METHODS)}.")
  if out.suffix != ".parquet":
    raise ConfigError(f"--out {out} must end in .parquet.")
  if not out.parent.is_dir():
    raise ConfigError(f"{out}: there is no directory {out.parent}; make it first.")
  selection = selection_lib.select_rows(path, as_of)
  seeds = read_seeds(seeds_file, selection.users, text)
  others = len(selection) - len(seeds.rows)
  if not 1 <= size < others:
    raise ConfigError(f"--size={size} must lie between 1 and {others - 1:,}: there are {others:,} other users.")
  vectors = selection.all_vectors()
  report = {
    "embeddings": str(path),
    "time": selection.time(),
    "method": method,
    "size": size,
    "users": len(selection),
    "seeds": len(seeds.rows),
    "seeds_named": seeds.named,
    "seeds_empty": seeds.empty,
    "seeds_repeated": seeds.repeated,
    "seeds_unknown": seeds.unknown,
    "unknown_examples": seeds.examples,
    **seed_lift(method, vectors, seeds.rows, size, seed),
  }
  score = seed_scores(method, vectors, seeds.rows, seed)
  rows = most_similar(score, np.setdiff1d(np.arange(len(vectors)), seeds.rows), size)
  table = pa.table(
    {
      "user_id": selection.users.take(pa.array(rows)),
      "score": pa.array(score[rows].astype(np.float64)),
      "rank": pa.array(np.arange(1, size + 1)),
    }
  ).replace_schema_metadata({"supermoe": json.dumps(report)})
  try:
    with atomic_files.replacing_file(out) as part:
      pq.write_table(table, part)
  except OSError as error:
    raise DataError(f"writing {out} failed: {error}; nothing was kept.") from error
  return report


def audience_summary(report: dict[str, Any]) -> list[str]:
  """Returns lines that summarise the seeds and the lift of an audience."""
  lines = [
    f"{report['seeds']:,} seeds among {report['users']:,} users, {report['time']}; {report['seeds_unknown']:,} ids "
    f"without an embedding, {report['seeds_repeated']:,} repeated, {report['seeds_empty']:,} empty"
  ]
  if report["unknown_examples"]:
    lines.append(f"  without an embedding, such as: {', '.join(report['unknown_examples'])}")
  lines.append(
    f"lift {report['lift']:.2f} at {report['size']:,} (95 %: {report['lift_low']:.2f} to {report['lift_high']:.2f}): "
    f"of {report['held_out']:,} seeds, each held out once, {report['found']:,} were found, {report['share']:.1%} "
    f"against {report['random_share']:.1%} at random ({report['method']})"
  )
  return lines
