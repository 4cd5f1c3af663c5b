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
import time as clock
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from supermoe_jax import config
from supermoe_jax.data import batches, replace
from supermoe_jax.data.batches import Question
from supermoe_jax.data.events import DataError
from supermoe_jax.data.labels import iso
from supermoe_jax.serving.embeddings import KIND
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
  replace.check_replaceable(out, KIND, ("manifest.json", "part-*.parquet"))
  if out.exists() and any(out.iterdir()) and not overwrite:
    raise DataError(f"{out} holds embeddings and is not overwritten; name another --out, or add --overwrite.")
  try:
    with replace.replacing(out) as work:
      return _write(run, times, work, rows_per_part)
  except OSError as error:
    raise DataError(f"writing embeddings to {out} failed: {error}; nothing was kept.") from error


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
  if waiting or not parts:  # a time before every event gives one part without rows, of the same columns
    _write_part(run, waiting, work / f"part-{parts:05d}.parquet")
    parts += 1
  users = len(run.dataset)
  last = run.dataset.manifest["last_event_microseconds"]
  manifest = {
    "kind": KIND,
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
  width = run.cfg.model.d_model
  vectors = np.concatenate([np.zeros((0, width), np.float32), *(v for _, v in waiting)])
  table = pa.table(
    {
      "user_id": user_column([q.user_id for q in questions], run.dataset.manifest["user_type"]),
      "as_of": pa.array([q.time for q in questions], pa.timestamp("us")),
      "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), width),
      "n_events": pa.array([q.n_events for q in questions], pa.int64()),
      "last_event_time": pa.array([q.last_event for q in questions], pa.timestamp("us")),
    }
  )
  pq.write_table(table, file)


def user_column(users: Sequence[str], user_type: str) -> pa.Array:
  """User ids as the event log has them: as int64 where every one is an integer there, else as text."""
  return pa.array([int(u) for u in users], pa.int64()) if user_type == "integer" else pa.array(users, pa.string())
