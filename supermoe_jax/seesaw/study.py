"""Runs a seesaw study: single-task references and variants of a config, over seeds; each finished run is cached.

WORKDIR/runs/*.json     the result of each run, named by the hash of its config and data; not run again if it exists
WORKDIR/seesaw.json     the report, rewritten as runs finish
WORKDIR/seesaw.html     the report with pictures, written by the command
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import logging
import pathlib
import time as clock
from collections.abc import Callable, Mapping, Sequence

from supermoe_jax import atomic_files, config
from supermoe_jax.config.task_checks import can_fold_users
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ConfigError, StudyError, nearest
from supermoe_jax.seesaw import compare, sentences
from supermoe_jax.seesaw.cached_runs import CachedRuns, RunGroup
from supermoe_jax.seesaw.run_result import SINGLE, RunResult
from supermoe_jax.seesaw.tuning import Choice, Tuning
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

# The variants that show what chance alone does: a config without overrides, and the same one with other seeds.
BASE, NULL = "base", "null"
NULL_OFFSET = 1000


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
    ConfigError: a variant is no valid config, needs other data or sets train.user_folds, or a pattern in `only` matches
      no variant.
    DataError: there is no dataset, or it was prepared from another config.
    RunError: `workdir` cannot be a directory of runs.
    StudyError: runs failed; the results of the others are kept, and the same call runs only the missing ones.
  """
  return _Study(cfg, workdir, jobs, only, publish).run()


class _Study:
  """A study in progress: `run` tunes the references, runs them, tunes the variants and runs them."""

  def __init__(
    self,
    cfg: config.Config,
    workdir: pathlib.Path,
    jobs: int,
    only: Sequence[str],
    publish: Callable[[sentences.Report, pathlib.Path], object],
  ):
    self.cfg, self.workdir, self._publish = cfg, workdir, publish
    self.plan = cfg.seesaw
    _check_deals_no_users("config", cfg)
    check_directory(workdir)
    if not cfg.data.split.has_snapshots("validation"):
      raise ConfigError("a study chooses by validation, but config.data.split.validation is empty; name a time there.")
    if not cfg.data.split.has_snapshots("test"):
      raise ConfigError("a study compares runs on test, but config.data.split.test is empty; name a time there.")
    dataset = Dataset(cfg.data.path)
    dataset.check_matches(cfg)
    self._manifest = dataset.manifest
    self.tasks = list(cfg.active_views)
    listed, self.base = planned_variants(self.plan)
    known = [*listed, *([NULL] if self.base else [])]
    for pattern in only:
      if not fnmatch.filter(known, pattern):
        raise ConfigError(f"--only: {pattern!r} matches no variant{nearest(pattern, known)}")

    def asked(name: str) -> bool:
      return not only or any(fnmatch.fnmatchcase(name, p) for p in only)

    self.null = NULL if self.base and asked(NULL) else ""
    # The null variant is of no use without the variant that it repeats.
    names = [n for n in listed if asked(n) or (self.null and n == self.base)]
    self.variants = {n: self._varied(f"config.seesaw.variants.{n}", cfg, listed[n]) for n in names}
    self.overrides = {n: list(listed[n]) for n in names}
    candidates = dict(self.plan.single) or {"same": ()}
    self.singles = {
      task: {n: self._single(f"config.seesaw.single.{n}", task, o) for n, o in candidates.items()}
      for task in self.tasks
    }
    (workdir / "runs").mkdir(parents=True, exist_ok=True)
    self.folded = folded_tasks(cfg)
    folds = self.plan.user_folds if self.folded else 0
    self.runs = CachedRuns(workdir, dataset.manifest["encoding_hash"], jobs, folds)
    self.folds = dict.fromkeys(self.folded, folds)
    self.tuning = Tuning(self.runs, self.plan, self.folds)

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
    _check_deals_no_users(path, varied)
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
    seeds, begun = self.plan.seeds, clock.monotonic()
    alone = self.tuning.references(self.singles)
    chosen = {t: c for t, c in alone.items() if c is not None}
    groups = {t: RunGroup(SINGLE, t, c.cfg, seeds) for t, c in chosen.items()}
    self.runs.execute("references", list(groups.values()))
    references = {t: self.runs.results(g) for t, g in groups.items()}
    choices = self._tuned(references)
    jobs = self._groups({n: c.cfg for n, c in choices.items()})

    def report() -> sentences.Report:
      return self._report(references, alone, choices, jobs)

    self.runs.execute("variants", jobs, report)
    found = report()
    self._publish(found, self.workdir)
    logger.info(f"study of {len(jobs)} variants and {len(seeds)} seeds: {clock.monotonic() - begun:.0f} s")
    if failed := self.runs.failed:
      raise StudyError(
        f"{len(failed)} runs failed, the others are kept: {'; '.join(failed[:3])}. The same command runs what is "
        "missing."
      )
    return found

  def _tuned(self, references: Mapping[str, Sequence[RunResult]]) -> dict[str, Choice]:
    """Returns the tuned configuration of each variant, and adds what changed to its overrides."""
    choices = self.tuning.variants(self.variants, references)
    for name, choice in choices.items():
      self.overrides[name] += choice.overrides(self.variants[name])
    if (name := self.plan.tuned) in choices:
      choices[name] = self.tuning.static_weights(name, choices[name], references)
      tasks = choices[name].cfg.active_tasks
      self.overrides[name] += [f"tasks.{n}.weight={t.weight:g}" for n, t in tasks.items()]
    return choices

  def _groups(self, cfgs: Mapping[str, config.Config]) -> list[RunGroup]:
    """Returns the runs of each variant; the null variant's are the base's with other seeds."""
    seeds = self.plan.seeds
    jobs = [RunGroup(name, None, cfg, seeds) for name, cfg in cfgs.items()]
    if self.null:
      offset = next(o for o in itertools.count(NULL_OFFSET, NULL_OFFSET) if not {s + o for s in seeds} & set(seeds))
      jobs.append(RunGroup(self.null, None, cfgs[self.base], seeds, offset))
    return jobs

  def _report(
    self,
    references: Mapping[str, Sequence[RunResult]],
    alone: Mapping[str, Choice | None],
    choices: Mapping[str, Choice],
    jobs: Sequence[RunGroup],
  ) -> sentences.Report:
    runs = [r for results in references.values() for r in results]
    runs += [r for job in jobs for r in self.runs.results(job)]
    labels = {t: self._manifest["labels"][t]["test"]["known"] for t in self.tasks}
    # Seeds beyond the number of folds test the same users again.
    tested = {t: references.get(t, ())[: self.plan.user_folds] for t in self.folded}
    labels |= {t: sum(r.labels.get(t, {}).get("test", 0) for r in of) for t, of in tested.items()}
    overrides = dict(self.overrides)
    tuning = {n: {"rate": c.rate, "tries": c.tries} for n, c in choices.items()}
    if self.null:  # it has the choice of its base and made none
      overrides[self.null], tuning[self.null] = overrides[self.base], {**tuning[self.base], "tries": 0}
    report = compare.make_report(
      runs,
      variants=[job.variant for job in jobs],
      tuned=self.plan.tuned if self.plan.tuned in self.variants else "",
      base=self.base if self.null else "",
      null=self.null,
      overrides=overrides,
      possible=_possible(pathlib.Path(self.cfg.data.path)),
      labels=labels,
      folds=self.folds,
      seeds=self.plan.seeds,
      references={t: c.candidate if c else None for t, c in alone.items()},
      tuning=tuning,
      single_tuning={t: {"rate": c.rate, "tries": c.tries} for t, c in alone.items() if c},
    )
    report["data_hash"] = self.cfg.data_hash()
    file = self.workdir / "seesaw.json"
    atomic_files.write_file(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _check_deals_no_users(path: str, cfg: config.Config) -> None:
  """Raises ConfigError if the config at `path` chooses a fold of users, which the study does for each seed."""
  if cfg.train.user_folds:
    raise ConfigError(
      f"{path} sets train.user_folds={cfg.train.user_folds}, but a study deals the users of each seed; remove it, and "
      "set config.seesaw.user_folds instead."
    )


def folded_tasks(cfg: config.Config) -> list[str]:
  """Returns the active tasks whose users each seed deals anew; none if the data cannot, or the plan has no folds."""
  if not cfg.seesaw.user_folds or not can_fold_users(cfg):
    return []
  return [n for n, t in cfg.active_views.items() if t.user_column]


def planned_variants(plan: config.Seesaw) -> tuple[dict[str, tuple[str, ...]], str]:
  """Returns the overrides of each variant of a study but the null variant, and the name of the variant it repeats.

  That is the first variant without overrides whose weights are not tuned; if there is none, it is added as `base`. The
  name is empty if the plan asks for no null variant.
  """
  listed = dict(plan.variants) or dict(STANDARD)
  if not plan.null:
    return listed, ""
  plain = next((n for n, overrides in listed.items() if not overrides and n != plan.tuned), "")
  if not plain:
    names = itertools.chain([BASE], (f"{BASE}_{i}" for i in itertools.count(2)))
    plain = next(n for n in names if n not in listed)
    listed[plain] = ()
  return listed, plain


def _possible(dataset: pathlib.Path) -> dict[str, dict[str, float]] | None:
  """Returns the simulator's best possible and constant scores, from `possible.json` next to the dataset, or None."""
  file = dataset.parent / "possible.json"
  return json.loads(file.read_text()) if file.is_file() else None
