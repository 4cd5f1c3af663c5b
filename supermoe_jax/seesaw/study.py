"""Runs a seesaw study: single-task references and variants of a config, over seeds; each finished run is cached.

WORKDIR/runs/*.json     the result of each run, named by the hash of its config and data; not run again if it exists
WORKDIR/seesaw.json     the report, rewritten as runs finish
WORKDIR/seesaw.html     the report with pictures, written by the command
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fnmatch
import hashlib
import json
import logging
import multiprocessing
import os
import pathlib
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from supermoe_jax import atomic_files, config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ConfigError, StudyError, nearest
from supermoe_jax.evaluation.metrics import LOWER_IS_BETTER
from supermoe_jax.progress import ProgressBar
from supermoe_jax.seesaw import compare, sentences, study_weights
from supermoe_jax.seesaw.run_result import SINGLE, RunResult
from supermoe_jax.seesaw.study_run import PlannedRun, end_with, execute
from supermoe_jax.training.run_directory import check_directory

logger = logging.getLogger(__name__)

# The variants of a study whose config names none, as overrides of that config.
STANDARD: dict[str, tuple[str, ...]] = {
  "shared_bottom": ("model.moe_every=0",),
  "mmoe": ("model.moe_every=0", "model.conditioning=mmoe"),
  "ple": ("model.moe_every=0", "model.conditioning=ple"),
  "tuned_static": (),
  "equal": ("train.weighting.method=equal",),
  "seesaw": ("train.weighting.method=seesaw",),
  "token": ("model.conditioning=token",),
}

# Endings of overrides to weightings that start from the tasks' own weights.
_PRIORS = ("=static", "=seesaw")

# Random static weightings that are run with all seeds.
FINALISTS = 3

# Time between two looks for finished runs.
POLL_SECONDS = 1.0

# Version of run results, part of their hash: increase it when a run measures something else.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class _RunGroup:
  """Runs of one config over seeds, which share one compilation."""

  variant: str
  task: str | None
  cfg: config.Config
  seeds: tuple[int, ...]

  def seeded(self) -> Iterator[tuple[int, config.Config]]:
    """Yields each seed with its config."""
    for seed in self.seeds:
      yield seed, dataclasses.replace(self.cfg, train=dataclasses.replace(self.cfg.train, seed=seed))


def study(
  cfg: config.Config,
  workdir: pathlib.Path,
  *,
  jobs: int = 1,
  only: Sequence[str] = (),
  publish: Callable[[sentences.Report, pathlib.Path], object] = lambda report, workdir: None,
) -> sentences.Report:
  """Runs the missing runs of the study in `cfg.seesaw`; returns the report and writes it as `seesaw.json`.

  Args:
    cfg: the config that the variants change.
    workdir: the study's directory.
    jobs: processes that train in parallel.
    only: names or globs of the variants to run; empty: all.
    publish: called with the report and `workdir` at the end, even if runs failed; such as
      `report.seesaw_page.write_study_files`.

  Raises:
    ConfigError: a variant is no valid config or needs other data, or a pattern in `only` matches no variant.
    DataError: there is no dataset, or it was prepared from another config.
    RunError: `workdir` cannot be a directory of runs.
    StudyError: runs failed; the results of the others are kept, and the same call runs only the missing ones.
  """
  return _Study(cfg, workdir, jobs, only, publish).run()


class _Study:
  """A study in progress: `run` tunes the references, runs them, tunes static weights and runs the variants."""

  def __init__(
    self,
    cfg: config.Config,
    workdir: pathlib.Path,
    jobs: int,
    only: Sequence[str],
    publish: Callable[[sentences.Report, pathlib.Path], object],
  ):
    self.cfg, self.workdir, self.jobs, self._publish = cfg, workdir, jobs, publish
    self.plan = cfg.seesaw
    check_directory(workdir)
    if not cfg.data.split.has_snapshots("validation"):
      raise ConfigError("a study chooses by validation, but config.data.split.validation is empty; name a time there.")
    if not cfg.data.split.has_snapshots("test"):
      raise ConfigError("a study compares runs on test, but config.data.split.test is empty; name a time there.")
    dataset = Dataset(cfg.data.path)
    dataset.check_matches(cfg)
    self._encoding = dataset.manifest["encoding_hash"]
    self._manifest = dataset.manifest
    self.tasks = list(cfg.active_views)
    listed = dict(self.plan.variants) or STANDARD
    for pattern in only:
      if not fnmatch.filter(listed, pattern):
        raise ConfigError(f"--only: {pattern!r} matches no variant{nearest(pattern, listed)}")
    names = [n for n in listed if not only or any(fnmatch.fnmatchcase(n, p) for p in only)]
    self.variants = {n: self._varied(f"config.seesaw.variants.{n}", cfg, listed[n]) for n in names}
    self.overrides = {n: list(listed[n]) for n in names}
    candidates = dict(self.plan.single) or {"same": ()}
    self.singles = {
      task: {n: self._single(f"config.seesaw.single.{n}", task, o) for n, o in candidates.items()}
      for task in self.tasks
    }
    (workdir / "runs").mkdir(parents=True, exist_ok=True)
    self._failed: list[str] = []

  def _varied(self, path: str, cfg: config.Config, overrides: Sequence[str]) -> config.Config:
    if any(o.startswith("train.weighting.method=") and not o.endswith(_PRIORS) for o in overrides):
      # This weighting takes no prior weights, so the config's are set to 1.
      cfg = dataclasses.replace(cfg, tasks={n: dataclasses.replace(t, weight=1.0) for n, t in cfg.tasks.items()})
    try:
      varied = config.override(cfg, [f"--config.{o}" for o in overrides])
    except ConfigError as error:
      raise ConfigError(f"{path}: {error}") from None
    if varied.data_hash() != cfg.data_hash() or varied.data.path != cfg.data.path:
      raise ConfigError(f"{path} changes the prepared data; a study has one dataset.")
    return dataclasses.replace(varied, seesaw=config.Seesaw())

  def _single(self, path: str, task: str, overrides: Sequence[str]) -> config.Config:
    others = tuple(n for n in self.cfg.tasks if n != task)
    weighing = dataclasses.replace(self.cfg.train.weighting, method="equal")
    tasks = {n: dataclasses.replace(t, weight=1.0) for n, t in self.cfg.tasks.items()}
    train = dataclasses.replace(self.cfg.train, weighting=weighing)
    alone = dataclasses.replace(self.cfg, tasks=tasks, exclude_tasks=others, train=train)
    return self._varied(path, alone, overrides)

  # ------------------------------------------------------------------------------------------------------------ stages

  def run(self) -> sentences.Report:
    seeds, first = self.plan.seeds, self.plan.seeds[:1]
    begun = clock.monotonic()
    several = {t: c for t, c in self.singles.items() if len(c) > 1}
    self._execute(
      "tuning references", [_RunGroup(SINGLE, t, c, first) for t, cs in several.items() for c in cs.values()]
    )
    chosen = {t: self._best_single(t) for t in self.tasks}
    self._execute("references", [_RunGroup(SINGLE, t, self.singles[t][n], seeds) for t, n in chosen.items() if n])
    references = {t: self._results(_RunGroup(SINGLE, t, self.singles[t][n], seeds)) for t, n in chosen.items() if n}
    if self.plan.tuned in self.variants:
      self.variants[self.plan.tuned] = self._tuned_static(references)
    jobs = [_RunGroup(name, None, cfg, seeds) for name, cfg in self.variants.items()]
    self._execute("variants", jobs, lambda: self._report(references, chosen))
    report = self._report(references, chosen)
    self._publish(report, self.workdir)
    logger.info(f"study of {len(self.variants)} variants and {len(seeds)} seeds: {clock.monotonic() - begun:.0f} s")
    if self._failed:
      raise StudyError(
        f"{len(self._failed)} runs failed, the others are kept: {'; '.join(self._failed[:3])}. The same command runs "
        "what is missing."
      )
    return report

  def _best_single(self, task: str) -> str | None:
    candidates = self.singles[task]
    if len(candidates) == 1:
      return next(iter(candidates))
    scores = {}
    for name, cfg in candidates.items():
      for result in self._results(_RunGroup(SINGLE, task, cfg, self.plan.seeds[:1])):
        score = result.score(task, "validation")
        if score is not None:
          scores[name] = -score if result.main_metric[task] in LOWER_IS_BETTER else score
    return max(scores, key=lambda n: scores[n]) if scores else None

  def _tuned_static(self, references: Mapping[str, Sequence[RunResult]]) -> config.Config:
    """Returns the tuned variant's config with the static weights that are best on validation.

    The first seed tries equal weights, the config's own, and random ones. All seeds then run the equal weights, the
    config's own and the `FINALISTS` random ones with the highest mean gain. They are compared like variants.
    """
    base = self.variants[self.plan.tuned]
    names = list(base.active_tasks)
    candidates = {f"weights {i}": c for i, c in enumerate(study_weights.weighted_configs(base, self.plan))}
    first = {n: _RunGroup(n, None, c, self.plan.seeds[:1]) for n, c in candidates.items()}
    self._execute("tuning static weights", list(first.values()), together=True)
    alone = {t: r[0] for t, r in references.items() if r}
    scores = {
      n: study_weights.mean_validation_gain(result, alone) for n, job in first.items() for result in self._results(job)
    }
    fixed = len(study_weights.fixed_weights(base))
    others = sorted((n for n in list(candidates)[fixed:] if n in scores), key=lambda n: -scores[n])
    final = {
      n: _RunGroup(n, None, candidates[n], self.plan.seeds) for n in (*list(candidates)[:fixed], *others[:FINALISTS])
    }
    self._execute("the best static weights", list(final.values()), together=True)
    runs = [r for results in references.values() for r in results]
    runs += [r for job in final.values() for r in self._results(job)]
    best = candidates[compare.on_validation(runs, list(final))["best"] or "weights 0"]
    told = ", ".join(f"{n}={best.tasks[n].weight:g}" for n in names)
    logger.info(f"static weights of {self.plan.tuned}, best of {len(scores)} on validation: {told}")
    self.overrides[self.plan.tuned] += [f"tasks.{n}.weight={best.tasks[n].weight:g}" for n in names]
    return best

  def _report(
    self, references: Mapping[str, Sequence[RunResult]], chosen: Mapping[str, str | None]
  ) -> sentences.Report:
    runs = [r for results in references.values() for r in results]
    for name, cfg in self.variants.items():
      runs += self._results(_RunGroup(name, None, cfg, self.plan.seeds))
    labels = {t: self._manifest["labels"][t]["test"]["known"] for t in self.tasks}
    report = compare.make_report(
      runs,
      variants=list(self.variants),
      tuned=self.plan.tuned if self.plan.tuned in self.variants else "",
      overrides=self.overrides,
      possible=_possible(pathlib.Path(self.cfg.data.path)),
      labels=labels,
      seeds=self.plan.seeds,
      references=chosen,
    )
    report["data_hash"] = self.cfg.data_hash()
    file = self.workdir / "seesaw.json"
    atomic_files.write_file(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report

  # ----------------------------------------------------------------------------------------------------------- running

  def _file(self, cfg: config.Config) -> pathlib.Path:
    return self.workdir / "runs" / f"{_identity(cfg, self._encoding)}.json"

  def _results(self, job: _RunGroup) -> list[RunResult]:
    """Returns the results of the job's finished runs, in the order of the seeds."""
    files = [(seed, self._file(cfg)) for seed, cfg in job.seeded()]
    found = [(seed, RunResult.from_json(json.loads(f.read_text()))) for seed, f in files if f.is_file()]
    return [dataclasses.replace(r, variant=job.variant, task=job.task) for _, r in found]

  def _execute(
    self, what: str, jobs: Sequence[_RunGroup], after: Callable[[], Any] | None = None, *, together: bool = False
  ) -> None:
    """Runs the missing seeds of jobs and calls `after` after each run.

    With `together`, jobs differ in numbers only: each process takes several jobs and compiles once.
    """
    work = []
    for job in jobs:
      missing = [(seed, self._file(c), c) for seed, c in job.seeded() if not self._file(c).is_file()]
      if missing:
        work.append((job, missing))
    total = sum(len(m) for _, m in work)
    if not total:
      return
    logger.info(f"{what}: {total} runs")
    groups = [work[i :: self.jobs] for i in range(self.jobs)] if together else [[w] for w in work]
    planned = [
      [PlannedRun(job.variant, job.task, c, file) for job, missing in group for _, file, c in missing]
      for group in groups
      if group
    ]
    with ProgressBar(total=total, desc=what, unit=" runs", dynamic_ncols=True) as bar:
      for line, n in self._parallel(planned):
        bar.update(n)
        bar.write(line)
        if after is not None:
          after()

  def _parallel(self, planned: Sequence[list[PlannedRun]]) -> Iterator[tuple[str, int]]:
    """Executes groups of runs in the study's processes; yields for each finished run a line and the number 1."""
    if self.jobs == 1:
      for group in planned:
        for run in group:
          yield self._tell(run, *execute([run]))
      return
    context = multiprocessing.get_context("spawn")
    limit = _ThreadLimit(self.jobs, self.workdir / "compiled")
    with limit, concurrent.futures.ProcessPoolExecutor(self.jobs, context, end_with, (os.getpid(),)) as pool:
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
      self._failed.append(f"{run.name}: {error}")
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


def _identity(cfg: config.Config, encoding: str) -> str:
  """Returns the name of a run's result: a hash of everything that it depends on, without the path of its data."""
  whole = config.to_dict(dataclasses.replace(cfg, seesaw=config.Seesaw()))
  whole["data"].pop("path")
  inactive = [n for n in whole["tasks"] if n not in cfg.active_tasks]
  for name in inactive:
    whole["tasks"].pop(name)
  whole.pop("exclude_tasks")
  text = json.dumps([FORMAT, encoding, whole], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _possible(dataset: pathlib.Path) -> dict[str, dict[str, float]] | None:
  """Returns the simulator's best possible and constant scores, from `possible.json` next to the dataset, or None."""
  file = dataset.parent / "possible.json"
  return json.loads(file.read_text()) if file.is_file() else None
