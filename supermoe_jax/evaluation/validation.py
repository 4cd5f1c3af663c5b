"""Validates a run while it trains: it measures every task, finds the best checkpoints so far, and ends the training."""

from __future__ import annotations

import functools
import json
import logging
import math
import pathlib
import sys
import time as clock
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from supermoe_jax import config
from supermoe_jax.config.rounds import LEAST_GAIN
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.distributed import processes
from supermoe_jax.errors import ConfigError
from supermoe_jax.evaluation import evaluate, metrics
from supermoe_jax.training.checkpoints.checkpoint import RestoredModel
from supermoe_jax.training.checkpoints.validated import VALIDATION, best_steps, validation_rows
from supermoe_jax.training.monitoring.metrics_log import SPEED, truncate_rows
from supermoe_jax.training.run import Run
from supermoe_jax.training.step import abstract_model
from supermoe_jax.training.task_losses import TaskStatistics

logger = processes.first_process_only(logging.getLogger(__name__))

# Steps of a training that would stop by itself, where no task has a value on validation.
UNSCORED_STEPS = 1000


class Validation:
  """A validator of a run at some of its checkpoints, which writes a row of `validation.jsonl` each time.

  A checkpoint is written before it is validated, and validated before the next step. A run that was cut in between
  validates the checkpoint that it resumes from. So the rows do not depend on where a run was cut. Validation never
  changes the training, unless `task_patience` stops tasks, or `config.train.steps` is "auto".
  """

  def __init__(
    self,
    cfg: config.Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    mesh: Mesh,
    progress: bool = False,
  ):
    """Prepares to validate a run on `mesh`; `progress` shows a bar on a terminal."""
    self._cfg, self._dataset, self._workdir, self._mesh = cfg, dataset, workdir, mesh
    self._progress = progress and sys.stderr.isatty() and processes.is_first()
    self._rows: list[dict[str, Any]] = []

  @functools.cached_property
  def _graph(self) -> nnx.GraphDef:
    return abstract_model(self._cfg, self._dataset.schema, self._mesh.devices.flat[0].platform)[0]

  def resume(self, step: int) -> None:
    """Reads the rows of a run that resumes at `step`, and drops the rows of later steps."""
    if processes.is_first():
      truncate_rows(self._workdir / VALIDATION, step)
    self._rows = json.loads(processes.gather_text(json.dumps(validation_rows(self._workdir)))[0][1])

  def due(self, step: int) -> bool:
    """Returns whether the run is to be validated at `step`, and was not yet."""
    every, steps = self._cfg.train.validate.every, self._cfg.train.steps
    ends = config.round_ends(steps) if every or steps == "auto" else ()
    wanted = step > 0 and ((every > 0 and step % every == 0) or step in ends)
    return wanted and all(row["step"] != step for row in self._rows)

  def validate(self, step: int, variables: nnx.State, statistics: dict[str, TaskStatistics]) -> dict[str, Any]:
    """Measures the active tasks on validation snapshots; all hosts call this.

    Returns: the row that was written.
    """
    begun = clock.monotonic()
    model = RestoredModel(step, variables, statistics)
    run = Run.of(self._workdir, self._cfg, self._dataset, self._mesh, self._graph, model)
    found = self._measured(run)
    tasks = {n: t["metrics"] for n, t in found["splits"]["validation"].items()}
    reached = validation_score(self._cfg, found["splits"]["validation"])
    row = {"step": step, "score": reached, "tasks": tasks, SPEED: {"seconds": round(clock.monotonic() - begun, 1)}}
    before = self.stopped()
    self._rows.append(row)
    if processes.is_first():
      with (self._workdir / VALIDATION).open("a") as file:
        file.write(json.dumps(row) + "\n")
    main = ", ".join(f"{n} {m} {_cell(tasks[n][m])}" for n, m in found["main_metric"].items() if n in tasks)
    best = " (the best so far)" if step in self.best()[:1] else ""
    logger.info(f"validation at step {step}: score {_cell(reached)}{best}; {main}")
    for name, best_step in self.stopped().items():
      if name not in before:
        logger.info(
          f"task {name}: {found['main_metric'][name]} was best at step {best_step}; from step {step} on its loss moves "
          "its head only, and not the encoder (config.train.validate.task_patience="
          f"{self._cfg.train.validate.task_patience})"
        )
    if self.ended():
      logger.log(logging.INFO if self.best() else logging.WARNING, self.reason())
    elif len(self.stopped()) == len(self._cfg.active_tasks) > len(before):
      logger.warning(
        f"every task has stopped at step {step}: only heads learn from here on. Use --checkpoint best, and train for "
        "fewer steps (config.train.steps, or 'auto')."
      )
    return row

  def _measured(self, run: Run) -> dict[str, Any]:
    """Returns the result of `evaluate`; without a validation snapshot, that of no task."""
    if not self._dataset.manifest["snapshots"]["validation"]:
      return {"splits": {"validation": {}}, "main_metric": {}}
    most = self._cfg.train.validate.snapshots
    return evaluate.evaluate(
      run, compare=False, progress=self._progress, splits=("validation",), write=False, most=most
    )

  def best(self) -> list[int]:
    """Returns the steps of the best rows, the best first, at most `config.train.validate.checkpoints_kept`."""
    return best_steps(self._rows, self._cfg.train.steps)[: self._cfg.train.validate.checkpoints_kept]

  def ended(self) -> bool:
    """Returns whether the training has ended: only a training that stops by itself ends before its last step."""
    return self._cfg.train.steps == "auto" and last_round(self._rows) is not None

  def reason(self) -> str:
    """Returns why the training has ended, in a sentence."""
    last, best = self._rows[-1], self.best()
    ends = f"training ends at step {last['step']}"
    if not best:
      return f"{ends}: no task has a value on validation, so nothing says how long to train"
    if last["step"] != best[0]:
      score = next(row["score"] for row in self._rows if row["step"] == best[0])
      reached = "it has no score" if last["score"] is None else f"its score {_cell(last['score'])} is not above"
      at_best = f"{_cell(score)} at step {best[0]}"
      return f"{ends}: {reached}{', unlike' if last['score'] is None else ''} {at_best}, which other commands read"
    if last["step"] == config.round_ends("auto")[-1]:
      return f"{ends}, the end of its last round, which is still the best"
    return f"{ends}, which is the best, but gains less than a thousandth over the rounds before"

  def stopped(self) -> dict[str, int]:
    """Returns the tasks that no longer pull on the encoder, and the step at which each was best."""
    return stopped_tasks(self._cfg, self._rows)


def stopped_tasks(cfg: config.Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
  """Returns the tasks that have stopped by `rows` of `validation.jsonl`, and the step at which each was best.

  A task stops when its main metric was best `config.train.validate.task_patience` validations ago, and stays so.
  """
  patience = cfg.train.validate.task_patience
  out: dict[str, int] = {}
  for name, task in cfg.active_views.items() if patience else ():
    metric = evaluate.main_metric(cfg, task)
    best_step, best, since = 0, -math.inf, 0
    for row in rows:
      value = row["tasks"].get(name, {}).get(metric)
      if value is None or not math.isfinite(value):
        continue
      reached = metrics.improvement(metric, value, 0.0)
      best_step, best, since = (row["step"], reached, 0) if reached > best else (best_step, best, since + 1)
      if since >= patience:
        out[name] = best_step
        break
  return out


def last_round(rows: Sequence[Mapping[str, Any]]) -> int | None:
  """Returns the step at which a training that stops by itself has ended by `rows` of `validation.jsonl`, or None.

  It ends with the first round whose score does not exceed all earlier rounds' by the share `LEAST_GAIN` of it, or with
  the last round. Without any score it ends after `UNSCORED_STEPS`.
  """
  ends = config.round_ends("auto")
  scores = {row["step"]: row["score"] for row in rows}
  best: float | None = None
  for end in ends:
    if end not in scores:
      return None
    score = scores[end]
    if score is None:
      finished = best is not None or end >= UNSCORED_STEPS
    else:
      finished = best is not None and score < best + LEAST_GAIN * abs(best)
      best = score if best is None else max(best, score)
    if finished:
      return end
  return ends[-1]


def validation_score(cfg: config.Config, tasks: Mapping[str, Mapping[str, Any]]) -> float | None:
  """Returns the score of a checkpoint: `config.train.validate.metric`, or the weighted mean of the main metrics.

  More is better. `tasks` are the results of `evaluate`. For tasks that predict a number, R² replaces the root mean
  square error, which has a unit. A task weighs √n, as in Stouffer's sum of tests, where n is the number of its labels,
  for yes and no the size 4·n·p·(1 − p) of a balanced sample that says as much, and for times to an event twice the
  number of events, at most n: the noise of a task with few labels must not choose. Tasks without a value do not count;
  the score is None if no task has one.
  """
  asked = cfg.train.validate.metric
  if asked:
    name, metric = asked.split("/")
    value = tasks[name]["metrics"].get(metric) if name in tasks else None
    return None if value is None else metrics.improvement(metric, value, 0.0)
  total = weights = 0.0
  for name, found in tasks.items():
    main = evaluate.main_metric(cfg, cfg.active_views[name])
    value = found["metrics"].get("r2" if main == "rmse" else main)
    if value is not None:
      positive = found.get("positive", 0.5)
      weight = math.sqrt(found["labels"] * min(4 * positive * (1 - positive), 2 * found.get("observed", 0.5)))
      total, weights = total + weight * value, weights + weight
  return total / weights if weights else None


def validation_of(cfg: config.Config) -> type[Validation]:
  """Returns the class that makes the validator of a run of this config, for `training.loop.train`.

  Raises:
    ConfigError: `config.train.validate.metric`, which chooses the best checkpoint, is no metric of its task.
  """
  name, _, metric = cfg.train.validate.metric.partition("/")
  if metric and metric not in (known := evaluate.metric_names(cfg, cfg.labelled_tasks[name])):
    raise ConfigError(
      f"config.train.validate.metric={cfg.train.validate.metric!r}: the metrics of {name} are {', '.join(known)}."
    )
  return Validation


def _cell(value: float | None) -> str:
  return "–" if value is None else f"{value:.4f}"
