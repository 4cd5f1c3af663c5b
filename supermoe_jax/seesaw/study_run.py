"""Trains and evaluates one run of a study, and reduces it to the result that the study keeps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
import threading
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from supermoe_jax import atomic_files, config
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.snapshot_batches import QueryBatch
from supermoe_jax.data.encoding.splits import SPLITS
from supermoe_jax.evaluation import evaluate
from supermoe_jax.evaluation.metrics import Metrics
from supermoe_jax.evaluation.validation import validation_of
from supermoe_jax.models import parameters
from supermoe_jax.seesaw import constant_scores, gradient_cosines
from supermoe_jax.seesaw.run_result import RunResult
from supermoe_jax.training import loop
from supermoe_jax.training.monitoring.metrics_log import read_rows
from supermoe_jax.training.run import Run

# A run's final loss is the mean over this many rows at the end of its metrics log.
FINAL_ROWS = 3


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """A run to do: its `variant` (and `task`, for a single-task reference), its config, and the file of its result."""

  variant: str
  task: str | None
  cfg: config.Config
  file: pathlib.Path

  @property
  def name(self) -> str:
    """Returns variant, task and seed in words."""
    return f"{self.variant}{f' {self.task}' if self.task else ''}, seed {self.cfg.train.seed}"


def end_with(parent: int) -> None:
  """Starts a thread that ends this process soon after its `parent` has ended: nobody would collect its results.

  This also works if the parent was killed.
  """

  def watch() -> None:
    while os.getppid() == parent:
      clock.sleep(1)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def execute(group: Sequence[PlannedRun]) -> list[str | None]:
  """Runs each run of a group and writes its result; returns for each an error message, or None."""
  out: list[str | None] = []
  for planned in group:
    try:
      result = run_one(planned.cfg, planned.file.with_suffix(""), variant=planned.variant, task=planned.task)
      atomic_files.write_file(planned.file, json.dumps(result.to_json(), ensure_ascii=False) + "\n")
      out.append(None)
    except Exception as error:  # one failed run must not stop the study, which reports it and fails at its end
      out.append(f"{type(error).__name__}: {error}")
  return out


def run_one(cfg: config.Config, workdir: pathlib.Path, *, variant: str, task: str | None = None) -> RunResult:
  """Trains and evaluates one config in `workdir`, which is removed afterwards; an interrupted run is resumed."""
  begun = clock.monotonic()
  validated = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, validate=_validation_that_stops(cfg)))
  with _without_messages():
    loop.train(validated, workdir, validation=validation_of(validated), progress=False)
  run = Run(workdir)
  found = evaluate.evaluate(run, compare=False, progress=False, write=False, asked=_study_queries(cfg))
  rows = read_rows(workdir / "metrics.jsonl")
  model = cfg.model
  counted = parameters.count_parameters(run.variables, model.experts_per_token / model.experts)
  result = RunResult(
    variant=variant,
    task=task,
    seed=cfg.train.seed,
    config_hash=cfg.hash(),
    tasks={t: {s: found["splits"][s].get(t, {}).get("metrics", {}) for s in found["splits"]} for t in cfg.active_views},
    main_metric=found["main_metric"],
    constants={t: run.statistics[t].constant_loss for t in cfg.active_tasks},
    losses={t: _final_loss(rows, t, run.statistics[t].constant_loss) for t in cfg.active_tasks},
    parameters=counted.total,
    active_parameters=counted.active,
    seconds=round(clock.monotonic() - begun, 1),
    weights={"step": [r["step"] for r in rows], **{t: [r["weights"][t] for r in rows] for t in cfg.active_tasks}},
    cosine=gradient_cosines.gradient_cosines(run) if len(cfg.active_views) > 1 else None,
    expert_load=found["expert_load"],
    labels={t: {s: found["splits"][s].get(t, {}).get("labels", 0) for s in found["splits"]} for t in cfg.active_views},
    constant_scores=constant_scores.main_scores(_popularity(cfg), found["main_metric"]),
  )
  shutil.rmtree(workdir)
  return result


def _validation_that_stops(cfg: config.Config) -> config.Validate:
  """Returns the validation during training that changes a run of `cfg`; else none.

  It is the one that stops tasks, or the training. It has no metric to choose a checkpoint by, since single-task models
  do not have every task. Of a run with a number of steps a study keeps and evaluates the newest checkpoint.
  """
  given = cfg.train.validate
  if cfg.train.steps == "auto":
    return dataclasses.replace(given, metric="")
  if not given.task_patience:
    return config.Validate()
  return config.Validate(every=given.every, snapshots=given.snapshots, task_patience=given.task_patience)


@contextlib.contextmanager
def _without_messages() -> Iterator[None]:
  """Drops the messages of the package within the block: a study says only which runs it does and how they ended."""
  logger = logging.getLogger("supermoe_jax")
  level = logger.level
  logger.setLevel(logging.CRITICAL + 1)
  try:
    yield
  finally:
    logger.setLevel(level)


def _study_queries(cfg: config.Config) -> Mapping[str, Sequence[QueryBatch]]:
  """Returns the query batches of validation and test for all tasks; all runs of a process share them."""
  return _cached_queries(_QueryKey(dataclasses.replace(cfg, exclude_tasks=())))


def _popularity(cfg: config.Config) -> Mapping[str, Mapping[str, Metrics]]:
  """Returns the metrics of the most popular values by split and ranking task; all runs of a process share them."""
  return _cached_popularity(_QueryKey(dataclasses.replace(cfg, exclude_tasks=())), cfg.evaluate.cutoffs)


class _QueryKey:
  """A cache key for query batches; equal for configs with the same queries."""

  def __init__(self, cfg: config.Config):
    self.cfg = cfg
    tasks = {n: config.to_dict(dataclasses.replace(t, weight=1.0)) for n, t in cfg.tasks.items()}
    folds = [cfg.train.user_folds, cfg.train.user_fold]
    given = [cfg.data.path, tasks, cfg.model.max_events, cfg.evaluate.batch_rows, folds]
    self._same = json.dumps(given, sort_keys=True)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _QueryKey) and self._same == other._same

  def __hash__(self) -> int:
    return hash(self._same)


@functools.lru_cache(maxsize=1)
def _cached_queries(asked: _QueryKey) -> Mapping[str, Sequence[QueryBatch]]:
  dataset = Dataset(asked.cfg.data.path)
  splits = ("validation", "test")
  return {s: list(snapshot_batches.query_batches(dataset, asked.cfg, split=SPLITS[s])) for s in splits}


@functools.lru_cache(maxsize=1)
def _cached_popularity(asked: _QueryKey, cutoffs: tuple[int, ...]) -> Mapping[str, Mapping[str, Metrics]]:
  cfg = dataclasses.replace(asked.cfg, evaluate=dataclasses.replace(asked.cfg.evaluate, cutoffs=cutoffs))
  return {s: constant_scores.popularity_scores(cfg, b) for s, b in _cached_queries(asked).items()}


def _final_loss(rows: Sequence[Mapping[str, Any]], task: str, constant_loss: float) -> float | None:
  """Returns the mean loss a label, over `constant_loss`, in the task's last `FINAL_ROWS` rows; None without any."""
  seen = [r["tasks"][task] for r in rows if r["tasks"][task]["weight"]][-FINAL_ROWS:]
  weight = sum(s["weight"] for s in seen)
  return sum(s["loss"] * s["weight"] for s in seen) / weight / constant_loss if weight else None
