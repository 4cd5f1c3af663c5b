"""Runs the models of a study: in parallel, each once, with its result cached by the hash of its config and data.

WORKDIR/runs/*.json     the result of each run
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from supermoe_jax import config
from supermoe_jax.errors import StudyError
from supermoe_jax.progress import ProgressBar
from supermoe_jax.seesaw.run_result import RunResult
from supermoe_jax.seesaw.study_run import PlannedRun, end_with, execute

logger = logging.getLogger(__name__)

# Time between two looks for finished runs.
POLL_SECONDS = 1.0

# Version of run results, part of their hash: increase it when a run measures something else.
FORMAT = 3


@dataclasses.dataclass(frozen=True)
class RunGroup:
  """Runs of one config over seeds, which share one compilation.

  Attributes:
    variant: the variant's name; `SINGLE` for a single-task reference.
    task: the task of a single-task reference; None for a variant.
    cfg: the config.
    seeds: the study's first seeds, or all of them.
    offset: added to each seed in training; the results count as those of `seeds`.
  """

  variant: str
  task: str | None
  cfg: config.Config
  seeds: tuple[int, ...]
  offset: int = 0

  def seeded(self, user_folds: int = 0) -> Iterator[tuple[int, config.Config]]:
    """Yields each seed with its config; with `user_folds` each seed has the next fold of users."""
    for i, seed in enumerate(self.seeds):
      fold = i % user_folds if user_folds else 0
      train = dataclasses.replace(self.cfg.train, seed=seed + self.offset, user_folds=user_folds, user_fold=fold)
      yield seed, dataclasses.replace(self.cfg, train=train)


class CachedRuns:
  """The runs of a study's directory.

  Attributes:
    failed: a message for each run that failed.
  """

  def __init__(self, workdir: pathlib.Path, encoding: str, jobs: int, user_folds: int = 0):
    """Keeps results in a directory and runs what is missing.

    Args:
      workdir: the study's directory.
      encoding: the hash of the dataset's encoding.
      jobs: processes that train in parallel.
      user_folds: the number of folds of users that the seeds go through; 0 for the dataset's own test users.
    """
    self.failed: list[str] = []
    self._user_folds = user_folds
    self._workdir, self._encoding, self._jobs = workdir, encoding, jobs

  def file(self, cfg: config.Config) -> pathlib.Path:
    """Returns the file of a run's result; runs of equal configs share it."""
    return self._workdir / "runs" / f"{identity(cfg, self._encoding)}.json"

  def results(self, job: RunGroup) -> list[RunResult]:
    """Returns the results of the job's finished runs, in the order of the seeds."""
    files = [(seed, self.file(cfg)) for seed, cfg in job.seeded(self._user_folds)]
    found = [(seed, RunResult.from_json(json.loads(f.read_text()))) for seed, f in files if f.is_file()]
    return [dataclasses.replace(r, variant=job.variant, task=job.task, seed=seed) for seed, r in found]

  def execute(
    self, what: str, jobs: Sequence[RunGroup], after: Callable[[], Any] | None = None, *, together: bool = False
  ) -> None:
    """Runs the missing seeds of jobs, runs of equal configs once, and calls `after` after each run.

    With `together`, jobs differ in numbers only: each process takes several jobs and compiles once.
    """
    work: list[list[PlannedRun]] = []
    planned: set[pathlib.Path] = set()
    for job in jobs:
      runs = [PlannedRun(job.variant, job.task, c, self.file(c)) for _, c in job.seeded(self._user_folds)]
      missing = [run for run in runs if run.file not in planned and not run.file.is_file()]
      planned |= {run.file for run in missing}
      if missing:
        work.append(missing)
    total = len(planned)
    if not total:
      return
    logger.info(f"{what}: {total} runs")
    groups = work
    if together:
      groups = [list(itertools.chain.from_iterable(work[i :: self._jobs])) for i in range(self._jobs)]
    with ProgressBar(total=total, desc=what, unit=" runs", dynamic_ncols=True) as bar:
      for line, n in self._parallel([g for g in groups if g]):
        bar.update(n)
        bar.write(line)
        if after is not None:
          after()

  def _parallel(self, planned: Sequence[list[PlannedRun]]) -> Iterator[tuple[str, int]]:
    """Executes groups of runs in the study's processes; yields for each finished run a line and the number 1."""
    if self._jobs == 1:
      for group in planned:
        for run in group:
          yield self._tell(run, *execute([run]))
      return
    context = multiprocessing.get_context("spawn")
    limit = _ThreadLimit(self._jobs, self._workdir / "compiled")
    with limit, concurrent.futures.ProcessPoolExecutor(self._jobs, context, end_with, (os.getpid(),)) as pool:
      futures = {pool.submit(execute, group): group for group in planned}
      try:
        yield from self._as_they_end(futures)
      except concurrent.futures.process.BrokenProcessPool as error:
        raise StudyError(
          f"a process of the study was killed (out of memory?): {error} The runs that ended are kept; the same "
          "command runs what is missing, with a smaller --jobs if memory is short."
        ) from error

  def _as_they_end(
    self, futures: dict[concurrent.futures.Future[list[str | None]], list[PlannedRun]]
  ) -> Iterator[tuple[str, int]]:
    """Yields a line for each run as soon as its result file exists, long before its group has ended."""
    told: set[pathlib.Path] = set()
    while futures:
      done, _ = concurrent.futures.wait(futures, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
      for run in [r for group in futures.values() for r in group if r.file not in told and r.file.is_file()]:
        told.add(run.file)
        yield self._tell(run, None)
      for future in done:
        for run, error in zip(futures.pop(future), future.result()):
          if error is not None:
            yield self._tell(run, error)

  def _tell(self, run: PlannedRun, error: str | None) -> tuple[str, int]:
    if error is not None:
      self.failed.append(f"{run.name}: {error}")
      return f"  {run.name}: failed: {error}", 1
    result = RunResult.from_json(json.loads(run.file.read_text()))
    scores = {t: result.score(t, "validation") for t in result.tasks}
    told = " ".join(f"{t}={s:.4f}" for t, s in scores.items() if s is not None)
    return f"  {run.name}: {told} (validation, {result.seconds:.0f} s)", 1


class _ThreadLimit:
  """A context that sets environment variables for the processes started in it, and restores them afterwards.

  Each process gets its share of the cores instead of competing for all, and all share one compilation cache.
  """

  def __init__(self, jobs: int, cache: pathlib.Path):
    threads = max(1, (os.cpu_count() or 1) // jobs)
    several = "true" if threads > 1 else "false"
    flags = f"--xla_cpu_multi_thread_eigen={several} intra_op_parallelism_threads={threads}"
    self._values = {
      "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
      "OMP_NUM_THREADS": str(threads),
      "OPENBLAS_NUM_THREADS": str(threads),
      "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache.absolute())),
    }

  def __enter__(self) -> None:
    self._old = {n: os.environ.get(n) for n in self._values}
    os.environ.update(self._values)

  def __exit__(self, *unused: object) -> None:
    for name, value in self._old.items():
      if value is None:
        os.environ.pop(name, None)
      else:
        os.environ[name] = value


def identity(cfg: config.Config, encoding: str) -> str:
  """Returns the name of a run's result: a hash of everything that it depends on, without the path of its data."""
  whole = config.to_dict(dataclasses.replace(cfg, seesaw=config.Seesaw()))
  whole["data"].pop("path")
  inactive = [n for n in whole["tasks"] if n not in cfg.active_tasks]
  for name in inactive:
    whole["tasks"].pop(name)
  whole.pop("exclude_tasks")
  text = json.dumps([FORMAT, encoding, whole], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
