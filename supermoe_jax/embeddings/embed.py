"""Writes user embeddings as of any time: a directory of Parquet parts with a manifest.

    part-*.parquet    user_id, as_of, embedding, n_events, last_event_time, user columns; see `part_files`
    absent-*.parquet  user_id, as_of, first_event_time, of users without an event before a time
    manifest.json     the run, its step, the counts, the hashes of its config and data

A part covers a fixed number of users, in the dataset's order. Only this order decides which users share a batch, so
the bytes of a part do not depend on when it is written and by which process. Parts are written into a directory with a
temporary name, each whole or not at all, and the manifest last. Then the directory is renamed. After a kill, the same
command continues where it stopped.
"""

from __future__ import annotations

import collections
import json
import logging
import pathlib
import shutil
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from supermoe_jax import atomic_files, config, device_mesh
from supermoe_jax.config import format_time
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.snapshot_batches import Query, QueryBatch, QueryReader
from supermoe_jax.distributed import processes
from supermoe_jax.embeddings import embedding_files, part_files, user_columns
from supermoe_jax.embeddings.embedding_files import KIND
from supermoe_jax.embeddings.incremental import EarlierEmbeddings, ReusedRows
from supermoe_jax.embeddings.part_files import RowStyle
from supermoe_jax.embeddings.views import Views, views_of
from supermoe_jax.errors import ConfigError, DataError, RunError
from supermoe_jax.progress import ProgressBar
from supermoe_jax.training.run import Run

logger = logging.getLogger(__name__)

ROWS_PER_PART = 32_768

# File that states which set of embeddings an unfinished directory holds.
UNFINISHED = "unfinished.json"


def parse_times(as_of: Sequence[str], run: Run) -> dict[str, int | None]:
  """Returns the times to embed at, in microseconds, by their names in the manifest.

  `now` is the end of the log. `last` is just after each user's own last event; its time is None here.

  Raises:
    ConfigError: a time cannot be read or is named twice.
  """
  out: dict[str, int | None] = {}
  for text in as_of:
    if text == "last":
      name, time = text, None
    else:
      time = _end(run) if text == "now" else config.parse_time(text, "--as-of")
      name = format_time(time)
    if name in out:
      raise ConfigError(f"--as-of {' '.join(as_of)} names a time twice.")
    out[name] = time
  return out


def _end(run: Run) -> int:
  """Returns the end of the log: the first moment at which all of its events, stray ones aside, are past."""
  return max(run.dataset.manifest["observed_until_microseconds"], run.dataset.last_usual_event + 1)


def embed(
  run: Run,
  as_of: Sequence[str],
  out: pathlib.Path,
  *,
  overwrite: bool = False,
  since: pathlib.Path | None = None,
  columns: Sequence[str] = (),
  dtype: str = "float32",
  views: bool = False,
  rows_per_part: int = ROWS_PER_PART,
) -> dict[str, Any]:
  """Writes one row for each time and user with an event before that time, and returns the manifest.

  Each of several processes writes the parts of the users whose rows its devices hold. All of them must reach `out`.

  Args:
    run: the run whose parameters embed.
    as_of: times, `now` or `last`; see `parse_times`.
    out: the directory to write.
    overwrite: whether to replace embeddings in `out`.
    since: an earlier set of this run's embeddings, or a run directory with one: only users whose events have changed
      since are computed.
    columns: columns of the user table to carry along.
    dtype: float32 or float16, the type of the vectors in the files.
    views: whether vectors hold the views of module `views`; without, they are z.
    rows_per_part: about how many rows share a file.

  Raises:
    ConfigError: a time or a column cannot be used, or the earlier embeddings are of another kind.
    DataError: `out` cannot be replaced, the disk is full, or the earlier embeddings are not whole.
    RunError: the parameters give a vector that is not finite.
  """
  times = parse_times(as_of, run)
  if dtype not in part_files.TYPES:
    raise ConfigError(f"--dtype={dtype} must be one of {', '.join(part_files.TYPES)}.")
  user_columns.check_columns(run.cfg, columns)
  atomic_files.check_replaceable(out, KIND, part_files.NAMES)
  if out.exists() and any(out.iterdir()) and not overwrite:
    raise DataError(f"{out} holds embeddings and is not overwritten; name another --out, or add --overwrite.")
  if since is not None and not (since / "manifest.json").is_file() and (since / "embeddings").is_dir():
    since = since / "embeddings"
  layout = views_of(run) if views else None
  job = _EmbeddingJob(run, times, columns, dtype, layout, max(1, rows_per_part // len(times)), since)
  try:
    if not processes.is_first():
      processes.meet("the directory is there")
      work = out.with_name(out.name + ".incomplete")
      return job.finish(work, job.write(work))
    with atomic_files.replacing_directory(out, resume=job.can_go_on) as work:
      job.begin(work)
      processes.meet("the directory is there")
      return job.finish(work, job.write(work))
  except OSError as error:
    raise DataError(
      f"writing embeddings to {out} failed: {error}; finished parts are kept, and the same command resumes from them."
    ) from error


class _Timing(NamedTuple):
  """Seconds that this process spent compiling, waiting for the encoder, and in all."""

  compiling: float = 0.0
  encoding: float = 0.0
  whole: float = 0.0


class _EmbeddingJob:
  """One set of embeddings while it is written."""

  def __init__(
    self,
    run: Run,
    times: Mapping[str, int | None],
    columns: Sequence[str],
    dtype: str,
    views: Views | None,
    users_per_part: int,
    since: pathlib.Path | None,
  ):
    self._run, self._times, self._columns, self._users_per_part = run, dict(times), tuple(columns), users_per_part
    manifest = run.dataset.manifest
    self._views = views
    width = run.cfg.model.d_model if views is None else views.width
    self._style = RowStyle(manifest["user_type"] == "integer", width, dtype)
    self._about: dict[str, Any] = {
      "kind": KIND,
      "run": str(run.workdir),
      "step": run.step,
      "config_hash": run.cfg.hash(),
      "data_hash": run.cfg.data_hash(),
      "dataset": {"digest": manifest["digest"], "records": run.dataset.records},
      "width": width,
      "dtype": dtype,
      "columns": list(columns),
      **({} if views is None else {"views": views.about()}),
    }
    self._earlier: EarlierEmbeddings | None = None
    if since is not None:
      earlier = EarlierEmbeddings(since, run, self._about, self._style)
      there = {name: of["microseconds"] for name, of in earlier.manifest["as_of"].items()}
      if there == self._times:
        self._earlier = earlier
      else:
        logger.info(
          f"--since {since} holds embeddings as of {', '.join(there)}, not {', '.join(self._times)}. An embedding "
          "depends on the time since the last event, so all users are computed. To reuse users without new events, "
          "name embeddings as of the same times, or use --as-of last for both."
        )
    self._since = str(since) if self._earlier else None
    # Which rows of a batch this process holds. The first of the processes that hold the same rows writes them.
    self._own, self._ways = device_mesh.host_rows(run.mesh, run.cfg.evaluate.batch_rows)
    owners = _of_all(np.array([self._own]))[:, 0]
    self._writes = int(np.flatnonzero(owners == self._own)[0]) == jax.process_index()
    self._lengths = snapshot_batches.worthwhile_lengths(
      run.dataset, run.cfg.model.max_events, list(self._times.values())
    )
    self._compiled: set[tuple[int, ...]] = set()
    self._busy = _Timing()

  @property
  def _part_count(self) -> int:
    return max(1, -(-len(self._run.dataset) // self._users_per_part))

  def _identity(self) -> dict[str, Any]:
    """Returns the settings that an unfinished directory must share to be continued."""
    earlier = self._earlier.manifest if self._earlier else {}
    times = {name: str(time) for name, time in self._times.items()}
    return {
      **self._about,
      "times": times,
      "users_per_part": self._users_per_part,
      "since": [self._since, earlier.get("dataset")],
      "lengths": list(self._lengths),
      "mesh": {"ways": self._ways},
    }

  def can_go_on(self, work: pathlib.Path) -> bool:
    """Returns whether `work` holds this same set, left unfinished by an earlier command."""
    try:
      return json.loads((work / UNFINISHED).read_text()) == self._identity()
    except (OSError, ValueError):
      return False

  def begin(self, work: pathlib.Path) -> None:
    """Prepares the directory for all processes."""
    if not (work / UNFINISHED).is_file():
      if self._columns:
        user_columns.sort_columns(self._run.cfg, self._run.dataset, self._columns, work, self._users_per_part)
      atomic_files.write_file(work / UNFINISHED, json.dumps(self._identity()) + "\n")
    for left in work.glob("*.part"):  # a kill cut these files off
      left.unlink()

  def write(self, work: pathlib.Path) -> dict[str, int]:
    """Writes the missing parts and returns, over all processes, the numbers of users computed, kept and resumed."""
    begun = clock.monotonic()
    there = {n for n in range(self._part_count) if (work / part_files.part_name(n)).is_file()}
    processes.meet("who has looked what is there")
    counts: collections.Counter[str] = collections.Counter()
    rounds = range(0, self._part_count, self._ways)
    # Processes go through a round of parts together. If a part is missing, its whole round is written anew, so that
    # batches are the same as without the interruption.
    todo = [first for first in rounds if not there.issuperset(range(first, min(first + self._ways, self._part_count)))]
    users = sum(len(self._users_of(first + self._own)) for first in rounds)
    left = sum(len(self._users_of(first + self._own)) for first in todo)
    style: dict[str, Any] = {"desc": "embedding", "unit": " users", "unit_scale": True, "mininterval": 1}
    with ProgressBar(total=users, initial=users - left, disable=not processes.is_first(), **style) as bar:
      for first in todo:
        counts += self._write_part(work, first + self._own, bar)
    self._busy = self._busy._replace(whole=clock.monotonic() - begun)
    totals = _of_all(np.array([counts["computed"] * self._writes, counts["kept"] * self._writes, users - left])).sum(0)
    return dict(zip(("computed", "kept", "resumed"), totals.tolist()))

  def _users_of(self, part: int) -> range:
    start = part * self._users_per_part
    return range(min(start, len(self._run.dataset)), min(start + self._users_per_part, len(self._run.dataset)))

  def _write_part(self, work: pathlib.Path, part: int, bar: ProgressBar) -> collections.Counter[str]:
    """Writes one part. A process without users in a round still joins the batches of the others."""
    users = self._users_of(part)
    kept: ReusedRows | None = None
    if self._earlier is not None and len(users):
      kept = self._earlier.take(users.start, users.stop, list(self._times.values()))
      bar.update(len(users) - len(kept.compute))
    asked = np.arange(users.start, users.stop) if kept is None else kept.compute
    reader = QueryReader(
      self._run.dataset,
      self._run.cfg,
      grain.MapDataset.source(asked),
      times=list(self._times.values()),
      row_lengths=self._lengths,
    )
    found: list[Query] = []
    vectors = [np.zeros((0, self._style.width), np.float32)]
    for batch, z in self._encoded(reader, bar):
      n = len(batch.questions)
      found += batch.questions
      # `z` and `batch` are both of this process' rows: those of the questions, and padding behind them.
      vectors.append(z[:n] if self._views is None else self._views(z[:n], batch.features.query_aggregates[:n, 0]))
    done = collections.Counter(computed=len(asked), kept=len(users) - len(asked))
    if not self._writes or not len(users):
      return done
    z = np.concatenate(vectors)
    self._check(found, z)
    tables, owners = [part_files.embedding_rows(found, z, self._style)], [np.array([q.user for q in found], np.int64)]
    missing = [part_files.absent_rows(reader.absent, self._style)]
    missing_owners = [np.array([a.user for a in reader.absent], np.int64)]
    if kept is not None:
      tables, owners = [*tables, kept.table], [*owners, kept.user]
      missing, missing_owners = [*missing, kept.absent], [*missing_owners, kept.missing]
    table, user = part_files.in_order(tables, owners)
    if self._columns:
      carried = user_columns.read_user_columns(work, users.start, users.stop).take(user - users.start)
      for name in self._columns:
        table = table.append_column(name, carried[name])
    part_files.write_part(work, part, table, part_files.in_order(missing, missing_owners)[0])
    return done

  def _check(self, found: Sequence[Query], z: np.ndarray) -> None:
    """Raises RunError if a vector is not finite in the type of the files."""
    with np.errstate(over="ignore"):
      bad = np.flatnonzero(~np.isfinite(z.astype(self._style.dtype)).all(axis=1))
    if len(bad):
      largest = float(np.abs(z[bad[0]]).max())
      raise RunError(
        f"the embedding of user {found[bad[0]].user_id!r} is not finite as {self._style.dtype} (largest absolute value "
        f"{largest:g}; {len(bad)} such rows). Use --dtype float32, or another --checkpoint if float32 does not help."
      )

  def _encoded(self, reader: QueryReader, bar: ProgressBar) -> Iterator[tuple[QueryBatch, np.ndarray]]:
    """Yields the batches of this process with their vectors; prepares the next batch while one is encoded."""
    running: tuple[QueryBatch, jax.Array] | None = None
    read = 0
    while True:
      reader.fill()
      length = snapshot_batches.next_length(reader.lengths, _of_all(reader.waiting()))
      if length is None:
        break
      batch = reader.take(length)
      z = self._start(batch)
      if running is not None:
        yield self._ended(*running)
      bar.update(reader.read - read)
      read, running = reader.read, (batch, z)
    bar.update(reader.read - read)
    if running is not None:
      yield self._ended(*running)

  def _start(self, batch: QueryBatch) -> jax.Array:
    """Hands a batch to the devices. Only compiling takes enough time to be counted."""
    begun, shape = clock.monotonic(), batch.features.segment.shape
    z = self._run.encode(batch.features, answers=self._views is not None)
    if shape not in self._compiled:
      self._compiled.add(shape)
      self._busy = self._busy._replace(compiling=self._busy.compiling + clock.monotonic() - begun)
    return z

  def _ended(self, batch: QueryBatch, z: jax.Array) -> tuple[QueryBatch, np.ndarray]:
    """Waits for a batch, and returns it with the vectors of this process' rows."""
    begun = clock.monotonic()
    whole = processes.whole(z)
    self._busy = self._busy._replace(encoding=self._busy.encoding + clock.monotonic() - begun)
    rows = len(batch.features.segment)
    return batch, whole[self._own * rows : (self._own + 1) * rows]

  def finish(self, work: pathlib.Path, done: Mapping[str, int]) -> dict[str, Any]:
    """Writes the manifest once all processes have written their parts, and deletes the files for resuming."""
    processes.meet("all parts are written")
    absent: collections.Counter[int] = collections.Counter()
    for file in sorted(work.glob("absent-*.parquet")):
      for time in embedding_files.read_embedding_file(file, ["as_of"])["as_of"].cast("int64").to_pylist():
        absent[time] += 1
    users = len(self._run.dataset)
    times: dict[str, dict[str, Any]] = {
      name: {
        "microseconds": time,
        "rows": users if time is None else users - absent[time],
        "users_without_events_before": 0 if time is None else absent[time],
        "after_log_end": time is not None and time > _end(self._run),
      }
      for name, time in self._times.items()
    }
    manifest = {
      **self._about,
      "parts": self._part_count,
      "rows": sum(t["rows"] for t in times.values()),
      "as_of": times,
      "users": {"computed": done["computed"], "kept": done["kept"], "done_before": done["resumed"]},
      "since": self._since,
      "seconds": {name: round(value, 1) for name, value in self._busy._asdict().items()},
    }
    if processes.is_first():
      atomic_files.write_file(work / "manifest.json", json.dumps(manifest, indent=1) + "\n")
      (work / user_columns.FILE).unlink(missing_ok=True)
      shutil.rmtree(work / user_columns.SPILL, ignore_errors=True)
      (work / UNFINISHED).unlink()
    return manifest


def _of_all(mine: np.ndarray) -> np.ndarray:
  """Returns the arrays of all processes, one a row; all processes must call this."""
  return mine[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(mine))
