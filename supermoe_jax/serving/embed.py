"""User embeddings as of any time: a directory of Parquet parts with a manifest.

    part-*.parquet  user_id, as_of, embedding (fixed-size list of float32), n_events, last_event_time
    manifest.json   the run, its step, the counts, the config's hash

Parts are written into a directory of another name, the manifest last; then it is renamed. A directory under the
embeddings' own name is whole.
"""

from __future__ import annotations

import collections
import json
import pathlib
import shutil
import time as clock
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from supermoe_jax import config
from supermoe_jax.data import batches
from supermoe_jax.data.batches import Question
from supermoe_jax.data.events import DataError
from supermoe_jax.data.labels import iso
from supermoe_jax.training.run import Run


def embed(
  run: Run, as_of: Sequence[str], out: pathlib.Path, *, overwrite: bool = False, rows_per_part: int = 100_000
) -> dict[str, Any]:
  """Writes one row a user and time, of every user with an event before it, and returns the manifest.

  Raises:
    ConfigError: a time cannot be read or is named twice.
    DataError: `out` is in the way, or the disk is full.
  """
  times = [config.parse_time(t, "--as-of") for t in as_of]
  if len(set(times)) < len(times):
    raise config.ConfigError(f"--as-of {' '.join(as_of)} names a time twice.")
  whole = (out / "manifest.json").is_file()
  if out.exists() and not (overwrite and whole) and any(out.iterdir()):
    remedy = "name another --out, or add --overwrite" if whole else "it holds no embeddings; name another --out"
    raise DataError(f"{out} exists and is not overwritten; {remedy}.")
  work = out.with_name(out.name + ".incomplete")
  shutil.rmtree(work, ignore_errors=True)
  try:
    work.mkdir(parents=True)
    manifest = _write(run, times, work, rows_per_part)
    shutil.rmtree(out, ignore_errors=True)
    work.replace(out)
  except OSError as error:
    raise DataError(f"writing embeddings to {out} failed: {error}; nothing was kept.") from error
  finally:
    shutil.rmtree(work, ignore_errors=True)
  return manifest


def _write(run: Run, times: Sequence[int], work: pathlib.Path, rows_per_part: int) -> dict[str, Any]:
  begun = clock.monotonic()
  counts: collections.Counter[str] = collections.Counter()
  waiting: list[tuple[list[Question], np.ndarray]] = []
  rows = parts = 0
  with tqdm(total=len(run.dataset) * len(times), desc="embedding", unit=" rows", mininterval=1) as bar:
    for batch in batches.questions(run.dataset, run.cfg, times=times):
      n = len(batch.questions)
      waiting.append((batch.questions, np.asarray(run.answer(batch.features).z)[:n]))
      counts.update(iso(q.time) for q in batch.questions)
      rows += n
      bar.update(n)
      if sum(len(q) for q, _ in waiting) >= rows_per_part:
        _write_part(run, waiting, work / f"part-{parts:05d}.parquet")
        waiting, parts = [], parts + 1
  if waiting:
    _write_part(run, waiting, work / f"part-{parts:05d}.parquet")
    parts += 1
  users = len(run.dataset)
  last = run.dataset.manifest["last_event_microseconds"]
  manifest = {
    "run": str(run.workdir),
    "step": run.step,
    "config_hash": run.cfg.hash(),
    "data_hash": run.dataset.manifest["data_hash"],
    "width": run.cfg.model.d_model,
    "parts": parts,
    "rows": rows,
    "as_of": {
      iso(t): {"rows": counts[iso(t)], "users_without_events_before": users - counts[iso(t)], "after_log_end": t > last}
      for t in times
    },
    "seconds": round(clock.monotonic() - begun, 1),
  }
  (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
  return manifest


def _write_part(run: Run, waiting: Sequence[tuple[list[Question], np.ndarray]], file: pathlib.Path) -> None:
  questions = [q for part, _ in waiting for q in part]
  vectors = np.concatenate([v for _, v in waiting])
  table = pa.table(
    {
      "user_id": user_column([q.user_id for q in questions], run.dataset.manifest["user_type"]),
      "as_of": pa.array([q.time for q in questions], pa.timestamp("us")),
      "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), vectors.shape[1]),
      "n_events": pa.array([q.n_events for q in questions], pa.int64()),
      "last_event_time": pa.array([q.last_event for q in questions], pa.timestamp("us")),
    }
  )
  pq.write_table(table, file)


def user_column(users: Sequence[str], duckdb_type: str) -> pa.Array:
  """User ids in the type that the event log has them in: integers come back as integers, the rest as text."""
  if duckdb_type in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"):
    return pa.array([int(u) for u in users], pa.int64())
  return pa.array(users, pa.string())


def read(path: pathlib.Path) -> pa.Table:
  """Reads the parts of an embedding directory.

  Raises:
    DataError: `path` holds no whole set of embeddings.
  """
  file = path / "manifest.json"
  if not file.is_file():
    raise DataError(f"{path} holds no embeddings (no manifest.json); run 'supermoe embed' first.")
  parts = sorted(path.glob("part-*.parquet"))
  if len(parts) != json.loads(file.read_text())["parts"]:
    raise DataError(f"{path} holds {len(parts)} parts, its manifest names another number; embed again.")
  return pa.concat_tables([pq.read_table(p) for p in parts])
