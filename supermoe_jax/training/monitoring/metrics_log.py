"""Logs the metrics of a training run to `metrics.jsonl`, TensorBoard, and a bar on a terminal or lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import resource
import sys
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from supermoe_jax import atomic_files, config
from supermoe_jax.distributed import processes
from supermoe_jax.progress import ProgressBar
from supermoe_jax.training import table_step
from supermoe_jax.training.monitoring import utilisation
from supermoe_jax.training.step_metrics import StepMetrics
from supermoe_jax.training.task_losses import TaskLoss

logger = processes.first_process_only(logging.getLogger(__name__))

# The part of a row of `metrics.jsonl` that depends on the machine; the rest is the same if a run was cut and resumed.
SPEED = "speed"


class MetricsLog:
  """A log that collects the metrics of steps and writes a row every `log_every` steps.

  Metrics stay on the device until then, so that logging does not stop the device. Rows cover the same steps whether or
  not a run was cut between two of them: the checkpoint holds the metrics that are not written yet (`waiting`).
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    step: int,
    cfg: config.Config,
    progress: bool,
    waiting: Sequence[Any] = (),
    flops: float = 0.0,
  ):
    """Opens the log of a run at `step`, whose checkpoint held `waiting`; without `progress` it only writes files.

    Only the first of several hosts writes files and messages. `flops` is the model's FLOPs for a token in training.
    """
    mesh, self._flops = cfg.train.mesh, flops
    self._devices = mesh.data * mesh.expert * mesh.tensor
    self._path, self._every = workdir / "metrics.jsonl", cfg.train.log_every
    self._ends = config.round_ends(cfg.train.steps)
    self._waiting: list[StepMetrics] = [_read(each) for each in waiting]
    self._rows, self._compiled = cfg.train.batch_rows, False
    self._last: jax.Array | None = None  # the loss of the last step that was begun
    self._warned: set[tuple[str, str]] = set()
    self._progress = progress
    self._terminal = sys.stderr.isatty()
    self._board: SummaryWriter | None = None
    if processes.is_first():
      truncate_rows(self._path, step)
      self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
    self._bar = ProgressBar(
      total=self._ends[-1],
      initial=step,
      desc="training",
      unit=" steps",
      dynamic_ncols=True,
      disable=not (self._terminal and progress and processes.is_first()),
    )
    self.begin()

  def __enter__(self) -> MetricsLog:
    return self

  def __exit__(self, *unused: object) -> None:
    self._bar.close()
    if self._board is not None:
      self._board.close()

  def begin(self) -> None:
    """Starts the clock: the next row's speed covers the steps from here on."""
    self._since, self._input, self._timed = clock.monotonic(), 0.0, 0

  @contextlib.contextmanager
  def taking_input(self) -> Iterator[None]:
    """Times the block that takes a batch; the time counts as input wait unless the device was busy throughout.

    If the previous step ended within the block, all of the time counts, since the moment of its end is not known.
    """
    asked = clock.monotonic()
    yield
    if self._last is None or self._last.is_ready():  # type: ignore[attr-defined]  # every array has it; the type lacks it
      self._input += clock.monotonic() - asked

  def add(self, step: int, metrics: StepMetrics) -> dict[str, Any] | None:
    """Adds the metrics of `step`, or of all steps of the call that ended with it; returns the row if it wrote one."""
    several = len(metrics.loss) if np.ndim(metrics.loss) else 1
    self._waiting.append(metrics)
    self._last = metrics.loss
    self._bar.update(several)
    self._timed += several
    if not self._compiled:  # the first step of a process compiles
      jax.block_until_ready(metrics.loss)
      self._compiled = True
      self.begin()
    return self._write(step) if step % self._every == 0 or step in self._ends else None

  def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
    """Writes further numbers to TensorBoard."""
    if self._board is not None:
      for name, value in values.items():
        if value is not None:
          self._board.add_scalar(name, value, step)

  def waiting(self) -> list[Any]:
    """Returns the metrics of the steps that are in no row yet, as JSON values."""
    return [_written(m) for m in self._fetched()]

  def _write(self, step: int) -> dict[str, Any]:
    steps = self._fetched()
    row = {"step": step, **summarise_steps(steps, self._rows, step)}
    share = self._timed / len(steps)
    row[SPEED] = self._speed(row["events"] * share, row["snapshots"] * share)
    self._waiting = []
    self.begin()
    self._warn(row["tables"])
    if self._board is not None:
      with self._path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    self.scalars(step, _scalars(row))
    line = _line(row)
    self._bar.set_postfix_str(line)
    if not self._terminal and self._progress:
      of = "/" if len(self._ends) == 1 else " of at most "
      logger.info(f"step {step}{of}{self._ends[-1]} {line}")
    return row

  def _fetched(self) -> list[StepMetrics]:
    """Returns the metrics of every waiting step, on the host."""
    out: list[StepMetrics] = []
    for metrics in jax.device_get(self._waiting):
      several = range(len(metrics.loss)) if np.ndim(metrics.loss) else ()
      out += [jax.tree.map(lambda x, i=i: x[i], metrics) for i in several] or [metrics]
    return out

  def _speed(self, events: float, snapshots: float) -> dict[str, float | None]:
    seconds = clock.monotonic() - self._since
    if not self._timed:
      return dict.fromkeys(("events_per_second", "step_ms", "input_wait_share", "memory_gib", "flops_utilisation"))
    return {
      "events_per_second": round(events / seconds, 1),
      "step_ms": round(1000 * seconds / self._timed, 3),
      "input_wait_share": round(self._input / seconds, 4),
      "memory_gib": memory_gib(),
      "flops_utilisation": utilisation.peak_share(self._flops * (events + snapshots), seconds, self._devices),
    }

  def _warn(self, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Warns of rows that could not learn, once for each table and reason."""
    reasons = {
      "lost": "gradients found no room on their way to the rows' devices; raise config.train.tables.cells",
      "out_of_range": "codes are no rows of it, and were read as absent; the dataset does not fit the model",
    }
    for name, found in counts.items():
      for kind, reason in reasons.items():
        if found[kind] and (name, kind) not in self._warned and self._progress:
          self._warned.add((name, kind))
          logger.warning(f"table {name}: {found[kind]:,} {reason}")


def memory_gib() -> float | None:
  """Returns the peak memory of this host's fullest device, or of this process on CPU, in GiB; None if not known."""
  found = [d.memory_stats() for d in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in found if s and "peak_bytes_in_use" in s]
  if peaks:
    return round(max(peaks) / 2**30, 3)
  if jax.default_backend() != "cpu":
    return None
  unit = 1 if sys.platform == "darwin" else 1024
  return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def _line(row: Mapping[str, Any]) -> str:
  tasks = " ".join(f"{n}={v['loss']:.3f}" for n, v in row["tasks"].items() if v["loss"] is not None)
  speed = row[SPEED]
  parts = [f"{speed['events_per_second'] / 1000:.1f}k events/s"] if speed["events_per_second"] else []
  parts.append("no finite loss" if row["loss"] is None else f"loss {row['loss']:.3f} [{tasks}]")
  if row["load"]:
    parts.append(f"load max {max(map(max, row['load'])):.2f} drop {row['dropped_share']:.1%}")
  if (speed["input_wait_share"] or 0) > 0.1:
    parts.append(f"waits for input {speed['input_wait_share']:.0%}")
  if row["skipped"]:
    parts.append(f"skipped {len(row['skipped'])}")
  return " ".join(parts)


def truncate_rows(path: pathlib.Path, step: int) -> None:
  """Drops rows after `step` (written after the checkpoint that a run resumes from), and a row that was cut."""
  if path.is_file():
    atomic_files.write_file(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step))


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of a file with one JSON object a line, up to an incomplete row; none without a file."""
  rows = []
  for line in path.read_text().splitlines() if path.is_file() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def _written(metrics: StepMetrics) -> Any:
  return jax.tree.map(lambda x: np.asarray(x).tolist(), metrics._asdict())


def _read(saved: Any) -> StepMetrics:
  """Rebuilds the metrics that `_written` saved; JSON keeps every digit of a number, and makes a list of a tuple."""
  return StepMetrics(
    **{
      **saved,
      "tasks": {n: TaskLoss(*t) for n, t in saved["tasks"].items()},
      "tables": {n: table_step.TableCounts(*c) for n, c in saved["tables"].items()},
    }
  )


def summarise_steps(steps: Sequence[StepMetrics], batch_rows: int, last: int) -> dict[str, Any]:
  """Turns the metrics of steps of `batch_rows` rows, up to step `last`, into one row: sums first, ratios last.

  A task without a label has the loss None. `skipped` lists the steps that were skipped since their loss or gradient was
  not finite. They are left out of losses, weights and norms, which are None if every step was skipped.
  """
  kept = [s for s in steps if not int(s.skipped)]

  def mean(values: Sequence[Any]) -> float | None:
    return float(np.mean([float(v) for v in values])) if values else None

  tasks = {}
  for name in steps[0].tasks:
    total, weight = (sum(float(getattr(s.tasks[name], part)) for s in kept) for part in ("total", "weight"))
    tasks[name] = {
      "loss": total / weight if weight else None,
      "weight": weight,
      "labels_per_row": round(weight / (batch_rows * len(kept)), 6) if kept else None,
    }
  routed, dropped = (
    sum(int(np.sum(getattr(s, part))) + int(getattr(s, f"slice_{part}")) for s in steps)
    for part in ("routed", "dropped")
  )
  weights = {n: mean([s.weights[n] for s in kept]) for n in steps[0].weights}
  return {
    "loss": mean([s.loss for s in kept]),
    "tasks": tasks,
    "weights": {n: None if w is None else round(w, 5) for n, w in weights.items()},
    "balance_loss": mean([s.balance_loss for s in kept]),
    "z_loss": mean([s.z_loss for s in kept]),
    "load": _mean([s.load for s in steps]),
    "router_entropy": _mean([s.entropy for s in steps]),
    "dropped_share": dropped / max(routed + dropped, 1),
    "task_dropped": {n: sum(int(s.task_dropped[n]) for s in steps) for n in steps[0].task_dropped},
    "snapshots": sum(int(s.snapshots) for s in steps),
    "events": (events := sum(int(s.events) for s in steps)),
    "padding_share": round(1 - events / sum(int(s.positions) for s in steps), 4),
    "gradient_norm": mean([s.gradient_norm for s in kept]),
    "learning_rate": float(steps[-1].learning_rate),
    "skipped": [last - len(steps) + 1 + i for i, s in enumerate(steps) if int(s.skipped)],
    "tables": {
      n: {part: sum(int(getattr(s.tables[n], part)) for s in steps) for part in table_step.TableCounts._fields}
      for n in steps[0].tables
    },
  }


def _mean(values: Sequence[Any]) -> list[Any]:
  """Returns the mean of arrays, to four digits; without experts the arrays are empty, and the mean is []."""
  if not np.size(values[0]):
    return []
  return list(np.mean(np.array([np.asarray(v, np.float64) for v in values]), axis=0).round(4).tolist())


def _scalars(row: Mapping[str, Any]) -> dict[str, float | None]:
  names = ("loss", "balance_loss", "z_loss", "dropped_share", "gradient_norm", "learning_rate", "padding_share")
  out: list[tuple[str, float | None]] = [(f"train/{k}", row[k]) for k in names]
  out.append(("train/skipped", len(row["skipped"])))
  out += [(f"speed/{k}", v) for k, v in row[SPEED].items()]
  for name, task in row["tasks"].items():
    out += [(f"task/{name}", task["loss"]), (f"labels_per_row/{name}", task["labels_per_row"])]
  out += [(f"weight/{n}", w) for n, w in row["weights"].items()]
  out += [(f"table_{kind}/{n}", float(v)) for n, counts in row["tables"].items() for kind, v in counts.items()]
  out += [(f"router_entropy/layer{i}", v) for i, v in enumerate(row["router_entropy"])]
  out += [(f"load/layer{i}_expert{e}", v) for i, layer in enumerate(row["load"]) for e, v in enumerate(layer)]
  return dict(out)
