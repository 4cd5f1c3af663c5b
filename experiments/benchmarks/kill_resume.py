"""Does a run that is killed, again and again, end as the one that never was?

    python experiments/benchmarks/kill_resume.py [--runs 50] [--signals 20] [--jobs 2] [--minutes 40] [--json FILE]

Users are simulated, a run is trained and evaluated without a cut, and then others of the same config, each killed with
SIGKILL up to three times and started again by the same command: while it starts, in a step, while a checkpoint is
being written, or in the evaluation. Each must end with the same bits: every array of the last checkpoint, optimizer
and data position included, every row of metrics.jsonl and validation.jsonl but for its speed, and evaluation.json.
Other runs are sent SIGTERM in a step at random: they must exit with code 75, and end with the same bits when the same
command is given again. Exit code 1 if anything else happens even once. A run that --minutes leave no time for is not
counted.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import logging
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from supermoe_jax import config, device_mesh
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare
from supermoe_jax.errors import ExitCode
from supermoe_jax.simulation.latent_users import SimulatedTask, Simulation
from supermoe_jax.simulation.simulator import simulate, simulation_config
from supermoe_jax.training.checkpoints.checkpoint import Checkpoints
from supermoe_jax.training.monitoring.metrics_log import read_rows
from supermoe_jax.training.step import create_state

STEPS = 120

PHASES = ("start", "step", "save", "evaluation")


def prepared(folder: pathlib.Path) -> pathlib.Path:
  """Simulates users, prepares them, and returns the file of a config that trains in seconds."""
  tasks = (SimulatedTask("a", 0), SimulatedTask("b", 1, label_rate=0.3))
  simulation = Simulation(users=400, groups=(3, 3), events=(16, 28), tasks=tasks)
  simulate(simulation, folder / "log")
  raw = simulation_config(folder / "log")
  raw["model"] = {
    "d_model": 16, "layers": 2, "heads": 2, "d_hidden": 32, "experts": 4, "d_expert": 16, "max_events": 28,
  }  # fmt: skip
  raw["train"] = {
    "steps": STEPS, "batch_rows": 16, "snapshots_per_row": 3, "checkpoint_every": 7, "log_every": 5, "warmup_steps": 5,
    "weighting": {"method": "famo"}, "tables": {"optimizer": "adam"}, "balance_rate": 0.001,
    "validate": {"every": 28, "snapshots": 100},
  }  # fmt: skip
  cfg = config.resolve(raw)
  prepare.prepare(cfg)
  file = folder / "config.py"
  file.write_text(f"import ml_collections\n\ndef get_config():\n  return ml_collections.ConfigDict({raw!r})\n")
  return file


class Command:
  """The two commands of a run, one after the other, as processes that can be killed."""

  def __init__(self, file: pathlib.Path, workdir: pathlib.Path, cache: pathlib.Path):
    self.workdir = workdir
    self._environment = {
      **os.environ,
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    self._train = ["train", "--config", str(file), "--workdir", str(workdir)]

  def start(self, verb: str) -> subprocess.Popen[bytes]:
    arguments = self._train if verb == "train" else ["evaluate", "--workdir", str(self.workdir)]
    log = (self.workdir.parent / f"{self.workdir.name}.log").open("ab")
    return subprocess.Popen(
      [sys.executable, "-m", "supermoe_jax", *arguments], stdout=log, stderr=log, env=self._environment
    )

  def finish(self) -> None:
    for verb in ("train", "evaluate"):
      if self.start(verb).wait():
        raise RuntimeError((self.workdir.parent / f"{self.workdir.name}.log").read_text()[-2000:])


def kill(command: Command, phase: str, rng: random.Random, seconds: dict[str, float]) -> str:
  """Starts the run and kills it in a phase; returns the phase that it was killed in, "none" if it ended before."""
  if phase == "evaluation":
    if command.start("train").wait():
      return "failed"
    process, moment = command.start("evaluate"), rng.uniform(0, seconds["evaluate"])
  else:
    process, moment = command.start("train"), rng.uniform(0, seconds["start"]) if phase == "start" else 0.0
  rows, wanted = command.workdir / "metrics.jsonl", rng.randrange(1, STEPS // 5)
  before, began = rows.read_bytes().count(b"\n") if rows.is_file() else 0, time.monotonic()
  while process.poll() is None:
    if phase in ("start", "evaluation"):
      due = time.monotonic() - began >= moment
    elif phase == "step":
      due = rows.is_file() and rows.read_bytes().count(b"\n") >= min(before + wanted, STEPS // 5 - 1)
      moment = rng.uniform(0, 0.2)
    else:
      due = any((command.workdir / "checkpoints").glob("*tmp*")) and rng.random() < 0.3
      moment = rng.uniform(0, 0.03)
    if due:
      if phase in ("step", "save"):
        time.sleep(moment)
      process.send_signal(signal.SIGKILL)
      break
    time.sleep(0.001)
  return phase if process.wait() == -signal.SIGKILL else "none"


def outcome(workdir: pathlib.Path, cfg: config.Config) -> dict[str, Any]:
  """All that a run leaves, comparable to the bit."""
  dataset = Dataset(cfg.data.path)
  _, fresh = create_state(cfg, dataset.schema, device_mesh.make_mesh(cfg.train.mesh))
  found = Checkpoints(workdir).restore(fresh)
  assert found is not None
  rows = {name: read_rows(workdir / f"{name}.jsonl") for name in ("metrics", "validation")}
  return {
    "arrays": [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found.state)],
    "position": found.position,
    "statistics": {n: list(s) for n, s in found.statistics.items()},
    **{name: [{k: v for k, v in row.items() if k != "speed"} for row in those] for name, those in rows.items()},
    "evaluation": {**json.loads((workdir / "evaluation.json").read_text()), "seconds": None},
  }


def one(command: Command, seed: int, seconds: dict[str, float]) -> list[str]:
  """Kills a run one to three times and lets it end; returns the phases it was killed in."""
  rng = random.Random(seed)
  # An evaluation comes last: what is killed after it has nothing left to train.
  phases = sorted((rng.choice(PHASES) for _ in range(rng.randint(1, 3))), key=lambda p: p == "evaluation")
  killed = [kill(command, phase, rng, seconds) for phase in phases]
  command.finish()
  return killed


class Signalled(NamedTuple):
  """What SIGTERM came to: the exit code, and the seconds from the signal to the exit."""

  code: int
  seconds: float


def signalled(command: Command, seed: int) -> Signalled:
  """Starts a run, sends it SIGTERM in a step at random, and lets it end by the same command."""
  rng, rows = random.Random(seed), command.workdir / "metrics.jsonl"
  process = command.start("train")
  while process.poll() is None and not rows.is_file():
    time.sleep(0.002)
  time.sleep(rng.uniform(0, 0.5))
  began = time.monotonic()
  process.send_signal(signal.SIGTERM)
  found = Signalled(process.wait(), time.monotonic() - began)
  command.finish()
  return found


def main() -> int:
  logging.basicConfig(format="%(message)s", force=True)  # the import of Orbax has given the root logger a handler
  logging.getLogger("supermoe_jax").setLevel(logging.INFO)  # of the root logger it would show Orbax's messages too
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--runs", type=int, default=50)
  parser.add_argument("--signals", type=int, default=20)
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--minutes", type=float, default=40.0)
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  end = time.monotonic() + 60 * args.minutes
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    file = prepared(folder)
    cfg = config.load(str(file), [])
    commands = [Command(file, folder / f"run{i}", folder / "cache") for i in range(args.runs)]
    uncut = Command(file, folder / "uncut", folder / "cache")
    uncut.finish()  # compiles
    wanted = outcome(uncut.workdir, cfg)
    timed, seconds = Command(file, folder / "timed", folder / "cache"), {}
    for verb in ("train", "evaluate"):
      began, process = time.monotonic(), timed.start(verb)
      while verb == "train" and not (timed.workdir / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.01)
      seconds["start"] = seconds.get("start", time.monotonic() - began)
      process.wait()
      seconds[verb] = time.monotonic() - began
    different: list[str] = []

    def differs(command: Command, how: str) -> None:
      mine = outcome(command.workdir, cfg)
      wrong = [part for part in wanted if mine[part] != wanted[part]]
      different.extend([f"{command.workdir.name}, {how}: {', '.join(wrong)}"] * bool(wrong))

    def in_time(do: Callable[..., Any], *arguments: Any) -> Any:
      return do(*arguments) if time.monotonic() < end else None

    killed, stopped, runs = collections.Counter[str](), list[Signalled](), 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool, tqdm(total=args.runs + args.signals) as bar:
      waiting = {pool.submit(in_time, one, c, i, seconds): c for i, c in enumerate(commands)}
      asked = [Command(file, folder / f"signal{i}", folder / "cache") for i in range(args.signals)]
      waiting |= {pool.submit(in_time, signalled, c, i): c for i, c in enumerate(asked)}
      for future in concurrent.futures.as_completed(waiting):
        found = future.result()
        bar.update()
        if isinstance(found, Signalled):
          stopped.append(found)
          differs(waiting[future], f"exit code {found.code}")
        elif found is not None:
          runs += 1
          killed.update(found)
          differs(waiting[future], f"killed in {', '.join(found)}")
  bad = len(different) + sum(s.code != ExitCode.RESUME for s in stopped)
  total = runs + len(stopped)
  in_phases = ", ".join(f"{killed[p]} in {p}" for p in PHASES)
  print(f"{total - len(different)} of {total} runs of {STEPS} steps ended with the bits of the one that was left alone")
  print(f"{runs} were killed {sum(killed[p] for p in PHASES)} times: {in_phases}")
  if stopped:
    times = [s.seconds for s in stopped]
    print(
      f"{sum(s.code == ExitCode.RESUME for s in stopped)} of {len(stopped)} runs with SIGTERM exited with "
      f"{ExitCode.RESUME}, "
      f"{statistics.median(times):.2f} s after it in the median, {max(times):.2f} s at most"
    )
  print(*different, sep="\n", end="\n" * bool(different))
  if args.json:
    figures = {
      "runs": runs,
      "killed": dict(killed),
      "signals": [s._asdict() for s in stopped],
      "different": different,
      "seconds": seconds,
    }
    args.json.write_text(json.dumps(figures, indent=1) + "\n")
  return int(bool(bad) or not total)


if __name__ == "__main__":
  raise SystemExit(main())
