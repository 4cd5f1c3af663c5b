"""Trains a run: reads batches, makes steps, and writes checkpoints and metrics; the same call resumes a stopped run."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.batch import Batch
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.dataset.resumable_stream import StreamPosition
from supermoe_jax.data.dataset.supervision import count_spaces
from supermoe_jax.data.dataset.windows import stack
from supermoe_jax.distributed import processes
from supermoe_jax.distributed.heartbeat import Heartbeat
from supermoe_jax.errors import ConfigError, RunError, Stopped
from supermoe_jax.models import parameters
from supermoe_jax.training import task_statistics
from supermoe_jax.training.checkpoints.checkpoint import Checkpoints, CheckpointWriter, code_hash, versions
from supermoe_jax.training.monitoring import utilisation
from supermoe_jax.training.monitoring.metrics_log import MetricsLog
from supermoe_jax.training.monitoring.profiler import Profiler
from supermoe_jax.training.run_directory import check_directory, check_encoding, claim_directory
from supermoe_jax.training.step import TrainState, abstract_state, compiled_program, create_state, place_on_mesh
from supermoe_jax.training.stopping import Signals, save_batch
from supermoe_jax.training.task_losses import TaskStatistics
from supermoe_jax.training.task_statistics import Measured

logger = processes.first_process_only(logging.getLogger(__name__))

# Rows on which label rates and constant losses are measured.
MEASURED_ROWS = 1024

# Disk errors that a user can mend.
DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)

# More rows are measured until each task has met this many labels, or all of its labels if it has fewer.
MEASURED_LABELS = 200


class Validator(Protocol):
  """A judge of checkpoints while a run trains; see `evaluation.validation.Validation`."""

  def resume(self, step: int) -> None:
    """Prepares for a run that starts or resumes at `step`."""

  def due(self, step: int) -> bool:
    """Returns whether the checkpoint of `step` is still to be judged."""

  def validate(self, step: int, variables: nnx.State, statistics: dict[str, TaskStatistics]) -> dict[str, Any]:
    """Judges a checkpoint and returns its `score` and the metrics of all `tasks`."""

  def best(self) -> Sequence[int]:
    """Returns the steps of the checkpoints to keep, the best first."""

  def stopped(self) -> Collection[str]:
    """Returns the tasks that no longer pull on the encoder."""

  def ended(self) -> bool:
    """Returns whether the last validation has ended the training."""


# Makes a run's validator from the config, the dataset, the run directory, the mesh, and whether to show a bar.
MakeValidator = Callable[[config.Config, Dataset, pathlib.Path, Mesh, bool], Validator]


def train(
  cfg: config.Config,
  workdir: pathlib.Path,
  *,
  validation: MakeValidator | None = None,
  place: processes.Place | None = None,
  progress: bool = True,
  profile: bool = False,
) -> int:
  """Trains for `cfg.train.steps` and returns the last step; resumes from the newest whole checkpoint of `workdir`.

  On the same mesh a run that was cut anywhere and resumed equals an uninterrupted run bit for bit: its parameters, the
  order of its data, and its rows of `metrics.jsonl` except `speed`.

  Args:
    cfg: the config.
    workdir: the run directory.
    validation: makes the validator, which judges checkpoints while the run trains:
      `evaluation.validation.validation_of(cfg)`; needed if `cfg.train.validate.every` is set, or `cfg.train.steps` is
      "auto".
    place: this process' place among several, which all call this with the same config and directory; None: it is alone.
    progress: whether to show a bar on a terminal, and to log the metrics elsewhere.
    profile: whether to write a trace of a few steps to `workdir/profile`, for TensorBoard, XProf or Perfetto.

  Raises:
    ConfigError: the run is validated while it trains, and `validation` is missing.
    DataError: there is no dataset, or it was prepared from another config.
    RunError: `workdir` cannot be a run directory or holds a run of another config, or a run cannot go on; the message
      gives the reason.
    Stopped: a signal asked the run to stop; the run is saved.
  """
  check_directory(workdir)
  dataset = Dataset(cfg.data.path)
  dataset.check_matches(cfg)
  if _validates(cfg) and validation is None:
    setting = "steps='auto'" if cfg.train.steps == "auto" else f"validate.every={cfg.train.validate.every}"
    raise ConfigError(
      f"config.train.{setting} needs train(..., validation=validation_of(cfg)), from "
      "supermoe_jax.evaluation.validation."
    )
  version = {**versions(), "code": code_hash()}
  facts = {"config": config.to_dict(cfg), "dataset": dataset.manifest["encoding_hash"], "version": version}
  signals = Signals(several=place is not None)
  heartbeat = Heartbeat(workdir, place, facts, hang_seconds=cfg.train.hang_seconds, stop=lambda: signals.got)
  with signals, heartbeat:
    processes.initialize(place)
    signals.joined()
    around = RunContext(heartbeat, signals, progress)
    try:
      with Profiler(workdir / "profile" if profile and processes.is_first() else None) as profiler:
        return _train(cfg, dataset, workdir, validation, around, profiler)
    except Stopped:
      processes.leave()
      raise
    except OSError as error:
      if error.errno not in DISKS:
        raise
      raise RunError(
        f"{workdir}: {error}. The checkpoints that are there are whole: see to the disk, and give the command again."
      ) from error


class RunContext(NamedTuple):
  """The heartbeat and the stop signals of a run, and whether it shows its progress."""

  heartbeat: Heartbeat
  signals: Signals
  progress: bool


def _train(
  cfg: config.Config,
  dataset: Dataset,
  workdir: pathlib.Path,
  make_validator: MakeValidator | None,
  around: RunContext,
  profiler: Profiler,
) -> int:
  heartbeat, signals, progress = around
  mesh = device_mesh.make_mesh(cfg.train.mesh)
  problem = ""
  try:
    if processes.is_first():
      claim_directory(workdir, cfg)
      check_encoding(workdir, dataset, create=True)
  except (RunError, ConfigError, OSError) as error:
    problem = str(error)
  for _, theirs in processes.gather_text(problem):  # all processes end, or none
    if theirs:
      raise RunError(theirs)
  shard = device_mesh.host_rows(mesh, cfg.train.batch_rows)
  batches = training_batches.training_batches(dataset, cfg, shard=shard, workers=cfg.train.workers)
  if batches.description:
    logger.info(batches.description)
  stream, ends = iter(batches), config.round_ends(cfg.train.steps)
  last, of = ends[-1], "" if cfg.train.steps == "auto" else f" of {cfg.train.steps}"
  about = {"config": config.to_dict(cfg)}
  validator: Validator | None = None
  if make_validator is not None and _validates(cfg):
    validator = make_validator(cfg, dataset, workdir, mesh, progress)
  with (
    contextlib.closing(stream),
    jax.set_mesh(mesh),
    CheckpointWriter(workdir, cfg.train, about, validator.best if validator else tuple) as writer,
  ):
    checkpoints = Checkpoints(workdir)
    found = checkpoints.restore(abstract_state(cfg, dataset.schema, mesh))
    step, waiting = 0, list[Any]()
    if found is None:
      statistics, answers, _ = _measure(dataset, cfg)
      _, state = create_state(cfg, dataset.schema, mesh, answers, _followers(dataset, cfg))
    else:
      state, position, statistics, waiting, before = found
      step = int(state.step)
      stream.set_state(position)
      logger.info(f"resuming {workdir} at step {step}{of}")
      _report_versions(before)
      writer.set_aside(checkpoints.damaged)
    if validator is not None:
      validator.resume(step)
    if (step >= last or _ended(validator)) and not (validator is not None and validator.due(step)):
      logger.info(f"{workdir} is already trained to step {step}")
      return step
    for name, size in sharding.replicated(mesh, state.model).items():
      logger.warning(f"{name} ({size / 2**20:.1f} MiB) lies whole on every device: it does not divide over the mesh")
    do_step = compiled_program(cfg, dataset.schema, mesh).step
    begun, several = step, cfg.train.steps_per_call
    count = parameters.count_parameters(state.model, cfg.model.experts_per_token / cfg.model.experts)
    flops = utilisation.flops_a_token(cfg.model, count)
    with MetricsLog(workdir, step, cfg, progress, waiting, flops) as log:
      _validate(validator, step, state, statistics, log)  # a run that was cut before a validation makes up for it
      constants = _place_constants(statistics, validator, mesh)
      while step < last and not _ended(validator):
        with log.taking_input():
          taken = [next(stream) for _ in range(several)]
        profiler.before(step - begun, state)
        placed = place_on_mesh(stack(taken) if several > 1 else taken[0], mesh, stacked=several > 1)
        with jax.transfer_guard("disallow"):  # only the batch above travels between host and device
          state, metrics = do_step(state, placed, constants)
        step += several
        heartbeat.progress(step)
        row = log.add(step, metrics)
        if row is not None:
          writer.check()
          if row["skipped"]:
            _check_skipped(row["skipped"], int(jax.device_get(state.skipped)), stream, cfg, workdir)
        stopped = signals.asked(range(step - several + 1, step + 1))
        if stopped or step % cfg.train.checkpoint_every == 0 or step in ends:
          heartbeat.rest()  # writing may take long, and must not look like a step that hangs
          _check_finite(state, workdir, step)
          writer.save(step, state, stream.get_state(), statistics, log.waiting())
        if stopped and step < last:
          writer.wait()
          raise Stopped(f"{stopped}: {workdir} is saved at step {step}{of}; the same command goes on")
        if _validate(validator, step, state, statistics, log):
          constants = _place_constants(statistics, validator, mesh)
  return step


def _followers(dataset: Dataset, cfg: config.Config) -> dict[str, Any]:
  """Returns what heads remember of followers, by task; the counting is loaded only by a config that names it."""
  asked = [cast(config.NextEvent, task) for task in cfg.active_views.values() if task.answer == "catalogue"]
  if not any(task.memory for task in asked):
    return {}
  return importlib.import_module("supermoe_jax.training.memory_counts").count_followers(dataset, cfg)


def _validate(
  validator: Validator | None, step: int, state: TrainState, statistics: dict[str, TaskStatistics], log: MetricsLog
) -> bool:
  """Validates the checkpoint of `step` and logs its scores, if that is due; returns whether it was."""
  if validator is None or not validator.due(step):
    return False
  row = validator.validate(step, state.model, statistics)
  values = {f"validation/{n}/{m}": value for n, found in row["tasks"].items() for m, value in found.items()}
  log.scalars(step, {"validation/score": row["score"], **values})
  log.begin()
  return True


def _validates(cfg: config.Config) -> bool:
  return cfg.train.validate.every > 0 or cfg.train.steps == "auto"


def _ended(validator: Validator | None) -> bool:
  return validator is not None and validator.ended()


def _place_constants(statistics: Mapping[str, TaskStatistics], validator: Validator | None, mesh: Mesh) -> Any:
  """Returns the tasks' constants on the mesh; tasks that the validator has stopped do not pull."""
  stopped = validator.stopped() if validator else ()
  now = {n: s._replace(gradient_scale=0.0 if n in stopped else 1.0) for n, s in statistics.items()}
  return jax.device_put(jax.tree.map(np.float32, now), NamedSharding(mesh, PartitionSpec()))


def _report_versions(before: Mapping[str, str]) -> None:
  now = versions()
  changed = [f"{n} {v} → {now.get(n, 'none')}" for n, v in before.items() if now.get(n) != v]
  if changed:
    logger.info(
      f"note: since the checkpoint was written {', '.join(changed)}; the last bits of what follows may be others"
    )


def _check_skipped(
  steps: Sequence[int],
  total: int,
  stream: StreamPosition[Batch],
  cfg: config.Config,
  workdir: pathlib.Path,
) -> None:
  """Warns of skipped steps; raises RunError, and saves the last skipped batch, if there are too many of them."""
  most = cfg.train.nonfinite_steps
  logger.warning(
    f"the loss or gradients of step {', '.join(map(str, steps))} are not finite: skipped, {total} by now; "
    f"more than config.train.nonfinite_steps={most} stop the run"
  )
  if total <= most:
    return
  file = workdir / "nonfinite" / f"step_{steps[-1]}_process_{jax.process_index()}.npz"
  save_batch(file, stream.again(steps[-1] - 1))
  raise RunError(
    f"{workdir}: {total} steps had a loss or gradients that are not finite, more than config.train.nonfinite_steps="
    f"{most}. They changed nothing. The batch of step {steps[-1]} is kept in {file}: look for values in it that are "
    "not finite, or too large. Train again in another --workdir, with a lower config.train.learning_rate or clip_norm."
  )


@jax.jit
def _all_finite(model: nnx.State) -> jax.Array:
  return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(model)]))


def _check_finite(state: TrainState, workdir: pathlib.Path, step: int) -> None:
  """Raises RunError if parameters are not finite, so that they do not replace a good checkpoint."""
  if not bool(_all_finite(state.model)):
    raise RunError(
      f"{workdir}: the parameters are no longer finite at step {step}; nothing was saved, and the checkpoints before "
      "it are kept. Train again in another --workdir with a lower config.train.learning_rate or clip_norm."
    )


def _measure(dataset: Dataset, cfg: config.Config) -> Measured:
  """Measures the tasks' constants on rows drawn as in training, with another seed; reads more rows for rare labels.

  Raises:
    RunError: no active task has a training label.
  """
  known = {n: dataset.manifest["labels"][n]["train"] for n in cfg.active_views}
  if known and not any(count["known"] for count in known.values()):
    raise RunError(f"no active task has a training label; see 'labels' in {dataset.path}/manifest.json.")
  for name, task in cfg.active_views.items():
    if isinstance(task, config.FutureAmount) and task.loss != "log1p" and known[name]["negative"]:
      raise ConfigError(
        f"config.tasks.{name}.loss={task.loss!r}: {known[name]['negative']:,} of {known[name]['known']:,} training "
        "labels are negative amounts; set loss='log1p', which takes them."
      )
  stream = training_batches.training_batches(dataset, cfg, seed=cfg.train.seed + 1)
  n_batches = max(1, MEASURED_ROWS // cfg.train.batch_rows)
  wanted = {n: min(count["known"], MEASURED_LABELS) for n, count in known.items()}
  measured = task_statistics.measure_tasks(cfg.active_tasks, dataset.schema.outputs, stream, n_batches, wanted)
  statistics = measured.statistics
  for name, found in count_spaces(dataset, cfg).items():
    space = cfg.active_views[name].sample_space
    logger.info(
      f"task {name}: of {found.labels:,} labels at the training snapshots of {found.users:,} users "
      f"{found.inside:,} lie in its sample space {space!r}, {found.outside:,} outside; where that is not known, "
      f"{found.unknown:,}, they are left out"
    )
  for name, share in measured.full_moments.items():
    most = cfg.active_views[name].values_of_a_moment(dataset.tie_rate, cfg.data.split.mode)
    logger.info(
      f"task {name}: any value of the next moment is right ({dataset.tie_rate:.1%} of the prepared events share "
      f"user and time with another); {share:.1%} of its moments have {most} values (most_values) or more, and further "
      "ones are left out"
    )
  for name, count in known.items():
    if not count["known"]:
      logger.warning(f"task {name} has no training label and contributes nothing")
    elif not statistics[name].rate:
      waited = task_statistics.LONGEST * n_batches
      logger.warning(f"no label of task {name} was met in {waited} batches; it contributes nothing")
  for name in cfg.active_tasks.keys() - known.keys():
    if not statistics[name].rate:
      logger.warning(f"no user has a history that is long enough for task {name}; it contributes nothing")
  return measured
