"""The training loop: batches in, checkpoints and metrics out; the same call again goes on where the last one
stopped."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import time as clock
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tensorboardX import SummaryWriter
from tqdm import tqdm

from supermoe_jax import atomic, config, sharding
from supermoe_jax.data import batches
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.data.targets import count_spaces
from supermoe_jax.training import statistics as statistics_lib
from supermoe_jax.training import tables
from supermoe_jax.training.checkpoint import Checkpoints, RunError
from supermoe_jax.training.statistics import TaskStatistics
from supermoe_jax.training.step import StepMetrics, TrainState, compiled, create_state, place

# Rows that label rates and constant losses are measured on.
MEASURED_ROWS = 1024

# Labels of each task that are waited for, if it has as many.
MEASURED_LABELS = 200


def train(
  cfg: config.Config, workdir: pathlib.Path, *, say: Callable[[str], None] = print, progress: bool = True
) -> int:
  """Trains to `cfg.train.steps` and returns the last step; resumes from the newest checkpoint of `workdir`.

  `progress` shows a bar on a terminal, and tells the metrics elsewhere.

  Raises:
    DataError: there is no dataset, or it was prepared from another config.
    RunError: `workdir` holds a run of another config.
  """
  dataset = Dataset(cfg.data.path)
  dataset.check_matches(cfg)
  mesh = sharding.make_mesh(cfg.train.mesh)
  _claim(workdir, cfg)
  check_encoding(workdir, dataset, create=True)
  _, state = create_state(cfg, dataset.schema, mesh)
  stream = iter(batches.training(dataset, cfg, workers=cfg.train.workers, say=say))
  with contextlib.closing(stream), Checkpoints(workdir, cfg.train) as checkpoints, jax.set_mesh(mesh):
    step = checkpoints.latest
    if step is None:
      step = 0
      statistics = _measure(dataset, cfg, say)
    else:
      state, position, statistics = checkpoints.restore(step, state)
      stream.set_state(position)
      say(f"resuming {workdir} at step {step} of {cfg.train.steps}")
    if step >= cfg.train.steps:
      say(f"{workdir} is already trained to step {step}")
      return step
    for name, size in sharding.replicated(mesh, state.model).items():
      say(f"warning: {name} ({size / 2**20:.1f} MiB) lies whole on every device: it does not divide over the mesh")
    do_step = compiled(cfg, dataset.schema, mesh).step
    constants = jax.device_put(statistics, NamedSharding(mesh, PartitionSpec()))
    with _Log(workdir, step, cfg, say if progress else None) as log:
      while step < cfg.train.steps:
        state, metrics = do_step(state, place(next(stream), mesh), constants)
        step += 1
        log.add(step, metrics)
        if step % cfg.train.checkpoint_every == 0 or step == cfg.train.steps:
          log.flush(step)
          _check_finite(state, workdir, step)
          checkpoints.save(step, state, stream.get_state(), statistics)
  return step


@jax.jit
def _all_finite(model: nnx.State) -> jax.Array:
  return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(model)]))


def _check_finite(state: TrainState, workdir: pathlib.Path, step: int) -> None:
  """Stops before parameters that are no longer finite take the place of a good checkpoint."""
  if not bool(_all_finite(state.model)):
    raise RunError(
      f"{workdir}: the parameters are no longer finite at step {step}; nothing was saved, and the checkpoints before "
      "it are kept. Train again in another --workdir with a lower config.train.learning_rate or clip_norm."
    )


def _measure(dataset: Dataset, cfg: config.Config, say: Callable[[str], None]) -> dict[str, TaskStatistics]:
  """Measures label rates on rows drawn as in training, but not the same ones; rare labels are waited for."""
  known = {n: dataset.manifest["labels"][n]["train"] for n in cfg.active_views}
  if known and not any(count["known"] for count in known.values()):
    raise RunError(f"no active task has a training label; see 'labels' in {dataset.path}/manifest.json.")
  stream = batches.training(dataset, cfg, seed=cfg.train.seed + 1)
  n_batches = max(1, MEASURED_ROWS // cfg.train.batch_rows)
  wanted = {n: min(count["known"], MEASURED_LABELS) for n, count in known.items()}
  statistics = statistics_lib.measure(cfg.active_tasks, dataset.schema.outputs, stream, n_batches, wanted)
  for name, found in count_spaces(dataset, cfg).items():
    space = cfg.active_views[name].sample_space
    say(
      f"task {name}: of {found.labels:,} labels at the training snapshots of {found.users:,} users "
      f"{found.inside:,} lie in its sample space {space!r}, {found.outside:,} outside; where that is not known, "
      f"{found.unknown:,}, they are left out"
    )
  for name, count in known.items():
    if not count["known"]:
      say(f"warning: task {name} has no training label and contributes nothing")
    elif not statistics[name].rate:
      waited = statistics_lib.LONGEST * n_batches
      say(f"warning: no label of task {name} was met in {waited} batches; it contributes nothing")
  for name in cfg.active_tasks.keys() - known.keys():
    if not statistics[name].rate:
      say(f"warning: no user has a history that is long enough for task {name}; it contributes nothing")
  return statistics


def _claim(workdir: pathlib.Path, cfg: config.Config) -> None:
  """Makes `workdir` this config's run directory, or checks that it is."""
  file = workdir / "config.json"
  if not file.is_file():
    workdir.mkdir(parents=True, exist_ok=True)
    config.save(cfg, file)
    return
  old, new = config.to_dict(config.load_json(file)), config.to_dict(cfg)
  for whole in (old, new):
    del whole["train"]["mesh"], whole["train"]["workers"]  # a run may go on on other devices, with other processes
  if old != new:
    changed = config.differences(old, new)
    raise RunError(
      f"{workdir} holds a run of another config ({'; '.join(changed[:4])}). Name another --workdir, or delete this one."
    )


def check_encoding(workdir: pathlib.Path, dataset: Dataset, *, create: bool = False) -> None:
  """Makes sure that a run meets the encoding of events that it was trained with; `create` notes that of a new run.

  An encoding that has grown since, by `supermoe append`, is the same to what was there: codes only follow.

  Raises:
    RunError: the dataset was prepared again, and its vocabularies or statistics came out otherwise.
  """
  file, manifest = workdir / "encoding.json", dataset.manifest
  if create and not file.is_file():
    file.write_text(json.dumps({"encoding_hash": manifest["encoding_hash"]}) + "\n")
  known = {manifest["encoding_hash"], *(a["encoding_before"] for a in manifest.get("appends", ()))}
  if json.loads(file.read_text())["encoding_hash"] not in known:
    raise RunError(
      f"{dataset.path} was prepared again since {workdir} was trained, and its vocabularies or statistics are others: "
      "the run's parameters do not fit them. Train again in another --workdir."
    )


class _Log:
  """Collects step metrics and writes them every `log_every` steps: progress bar, `metrics.jsonl`, TensorBoard.

  Metrics stay on the device until then, so that logging does not stop the device.
  """

  def __init__(self, workdir: pathlib.Path, step: int, cfg: config.Config, say: Callable[[str], None] | None):
    self._path, self._every, self._say = workdir / "metrics.jsonl", cfg.train.log_every, say
    _keep_until(self._path, step)
    self._waiting: list[StepMetrics] = []
    self._since = clock.monotonic()
    self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
    self._terminal = sys.stderr.isatty()
    self._bar = tqdm(
      total=cfg.train.steps,
      initial=step,
      desc="training",
      unit=" steps",
      dynamic_ncols=True,
      disable=not self._terminal or say is None,
    )
    self._steps = cfg.train.steps
    self._warned: set[tuple[str, str]] = set()

  def __enter__(self) -> _Log:
    return self

  def __exit__(self, *unused: object) -> None:
    self._bar.close()
    self._board.close()

  def add(self, step: int, metrics: StepMetrics) -> None:
    """Takes the metrics of `step`."""
    self._waiting.append(metrics)
    if step % self._every == 0:
      self.flush(step)

  def flush(self, step: int) -> None:
    """Writes what has come in since the last time."""
    if not self._waiting:
      return
    row = summarise(jax.device_get(self._waiting))
    now = clock.monotonic()
    row = {"step": step, **row, "events_per_second": round(row.pop("events") / (now - self._since), 1)}
    steps = len(self._waiting)
    self._waiting, self._since = [], now
    with self._path.open("a") as file:
      file.write(json.dumps(row) + "\n")
    self._warn(row["tables"])
    for name, value in _scalars(row):
      self._board.add_scalar(name, value, step)
    tasks = " ".join(f"{n}={v['loss']:.3f}" for n, v in row["tasks"].items() if v["loss"] is not None)
    experts = f"load max {max(map(max, row['load'])):.2f} drop {row['dropped_share']:.1%}" if row["load"] else ""
    line = f"{row['events_per_second'] / 1000:.1f}k events/s loss {row['loss']:.3f} [{tasks}] {experts}"
    self._bar.update(steps)
    self._bar.set_postfix_str(line)
    if not self._terminal and self._say is not None:
      self._say(f"step {step}/{self._steps} {line}")

  def _warn(self, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Tells, once a table, of rows that could not learn."""
    reasons = {
      "lost": "gradients found no room on their way to the rows' devices; raise config.train.tables.cells",
      "out_of_range": "codes are no rows of it, and were read as absent; the dataset does not fit the model",
    }
    for name, found in counts.items():
      for kind, reason in reasons.items():
        if found[kind] and (name, kind) not in self._warned and self._say is not None:
          self._warned.add((name, kind))
          self._say(f"warning: table {name}: {found[kind]:,} {reason}")


def _keep_until(path: pathlib.Path, step: int) -> None:
  """Drops rows after `step` (written after the checkpoint that a run resumes from), and a row that was cut."""
  if not path.is_file():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      break
    if row["step"] <= step:
      kept.append(line + "\n")
  atomic.write(path, "".join(kept))


def summarise(steps: Sequence[StepMetrics]) -> dict[str, Any]:
  """Turns steps' metrics into one row: sums first, ratios last. A task without a label has the loss None."""

  def mean(values: Sequence[Any]) -> float:
    return float(np.mean([float(v) for v in values]))

  tasks = {}
  for name in steps[0].tasks:
    total, weight = (sum(float(getattr(s.tasks[name], part)) for s in steps) for part in ("total", "weight"))
    tasks[name] = {"loss": total / weight if weight else None, "weight": weight}
  routed, dropped = (
    sum(int(np.sum(getattr(s, part))) + int(getattr(s, f"slice_{part}")) for s in steps)
    for part in ("routed", "dropped")
  )
  return {
    "loss": mean([s.loss for s in steps]),
    "tasks": tasks,
    "weights": {n: round(mean([s.weights[n] for s in steps]), 5) for n in steps[0].weights},
    "balance_loss": mean([s.balance_loss for s in steps]),
    "z_loss": mean([s.z_loss for s in steps]),
    "load": np.round(np.mean([s.load for s in steps], axis=0), 4).tolist(),
    "router_entropy": np.round(np.mean([s.entropy for s in steps], axis=0), 4).tolist(),
    "dropped_share": dropped / max(routed + dropped, 1),
    "task_dropped": {n: sum(int(s.task_dropped[n]) for s in steps) for n in steps[0].task_dropped},
    "events": (events := sum(int(s.events) for s in steps)),
    "padding_share": round(1 - events / sum(int(s.positions) for s in steps), 4),
    "gradient_norm": mean([s.gradient_norm for s in steps]),
    "learning_rate": float(steps[-1].learning_rate),
    "tables": {
      n: {part: sum(int(getattr(s.tables[n], part)) for s in steps) for part in tables.Counts._fields}
      for n in steps[0].tables
    },
  }


def _scalars(row: Mapping[str, Any]) -> list[tuple[str, float]]:
  out = [(f"train/{k}", row[k]) for k in ("loss", "balance_loss", "z_loss", "dropped_share", "gradient_norm")]
  out += [(f"train/{k}", row[k]) for k in ("learning_rate", "events_per_second", "padding_share")]
  out += [(f"task/{n}", v["loss"]) for n, v in row["tasks"].items() if v["loss"] is not None]
  out += [(f"weight/{n}", w) for n, w in row["weights"].items()]
  out += [(f"table_{kind}/{n}", float(v)) for n, counts in row["tables"].items() for kind, v in counts.items()]
  out += [(f"router_entropy/layer{i}", v) for i, v in enumerate(row["router_entropy"])]
  return out + [(f"load/layer{i}_expert{e}", v) for i, layer in enumerate(row["load"]) for e, v in enumerate(layer)]
