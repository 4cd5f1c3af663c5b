"""What each start and scale of training is worth: runs with one of them undone, against runs with all, over seeds.

    python experiments/benchmarks/starts.py experiments/complete_journey.py --out cj.jsonl --steps 150
    python experiments/benchmarks/starts.py experiments/movielens_1m.py:FOLDER --out ml.jsonl --steps 400
    python experiments/benchmarks/starts.py --table cj.jsonl ml.jsonl

Every variant is a process of its own, and every run a line of the file; the same command goes on after a stop. Further
arguments override the config. The table gives the mean difference of the main metrics, shipped minus undone, with a
95 % interval of Student's t over the seeds, which are paired. A positive difference is in favour of what is shipped;
where less is better the sign is turned.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from scipy import stats

from supermoe_jax import config

SHIPPED = "shipped"


def _heads_at_zero(cfg: config.Config) -> Iterator[None]:
  from supermoe_jax.training import loop

  create = loop.create_state
  with mock.patch.object(loop, "create_state", lambda cfg, schema, mesh, answers: create(cfg, schema, mesh)):
    yield


def _snapshots_at_zero(cfg: config.Config) -> Iterator[None]:
  from supermoe_jax.layers import event_embedding

  with mock.patch.object(event_embedding, "set_bias", lambda layer, value: None):
    yield


def _first_come(cfg: config.Config) -> Iterator[None]:
  from supermoe_jax.layers import expert_buffer

  rank = expert_buffer.rank_choices
  with mock.patch.object(
    expert_buffer, "rank_choices", lambda expert, valid, experts, urgent=None: rank(expert, valid, experts)
  ):
    yield


def _events_as_heavy_as_snapshots(cfg: config.Config) -> Iterator[None]:
  from supermoe_jax.training import task_statistics

  measure = task_statistics._statistics

  def alike(task: config.Task, sums: Any, rows: int, size: int) -> task_statistics.TaskStatistics:
    found = measure(task, sums, rows, size)
    return found._replace(rate=sums.weight / rows, snapshot_weight=1.0) if task.asks_at_events else found

  with mock.patch.object(task_statistics, "_statistics", alike):
    yield


def _rate_of_tables(cfg: config.Config, factor: float) -> list[str]:
  return [f"--config.train.tables.learning_rate={factor * cfg.train.tables.learning_rate}"]


# Each variant undoes one thing: by overrides of the config, or by a patch of the code.
OVERRIDES: dict[str, Callable[[config.Config], list[str]]] = {
  SHIPPED: lambda cfg: [],
  "bound of the gradients for all tasks together": lambda cfg: [
    f"--config.train.clip_norm={cfg.train.clip_norm / len(cfg.active_tasks)}"
  ],
  "simultaneous events in the order of the files": lambda cfg: [
    f"--config.tasks.{n}.ties=order" for n, t in cfg.active_tasks.items() if isinstance(t, config.NextEvent)
  ],
  "gaps in hours": lambda cfg: ["--config.model.time_unit=hours"],
  "a fifth of the rate of tables": lambda cfg: _rate_of_tables(cfg, 0.2),
  "five times the rate of tables": lambda cfg: _rate_of_tables(cfg, 5.0),
}
PATCHES: dict[str, Callable[[config.Config], Iterator[None]]] = {
  "heads start at 0": _heads_at_zero,
  "snapshots start at 0": _snapshots_at_zero,
  "drops in the order of rows": _first_come,
  "a snapshot weighs as much as an event": _events_as_heavy_as_snapshots,
}
VARIANTS = (*OVERRIDES, *PATCHES)


def run_once(file: str, overrides: list[str], variant: str, seed: int) -> dict[str, Any]:
  """Trains and evaluates one run; returns the main metrics of validation and test."""
  from supermoe_jax.data.preparation import prepare
  from supermoe_jax.evaluation import evaluate
  from supermoe_jax.training import loop
  from supermoe_jax.training.run import Run

  shipped = config.load(file, [*overrides, f"--config.train.seed={seed}"])
  cfg = config.override(shipped, OVERRIDES[variant](shipped)) if variant in OVERRIDES else shipped
  if not (pathlib.Path(cfg.data.path) / "manifest.json").exists():
    prepare.prepare(cfg)
  patch = contextlib.contextmanager(PATCHES[variant])(cfg) if variant in PATCHES else contextlib.nullcontext()
  with tempfile.TemporaryDirectory() as folder, patch:
    loop.train(cfg, pathlib.Path(folder))
    run = Run(folder)
    run.cfg = dataclasses.replace(run.cfg, tasks=shipped.tasks)  # all variants answer the same questions
    found = evaluate.evaluate(run, compare=False, progress=False, write=False)
  main = found["main_metric"]
  scores = {s: {n: t["metrics"][main[n]] for n, t in tasks.items()} for s, tasks in found["splits"].items()}
  return {"config": file, "variant": variant, "seed": seed, "metric": main, "scores": scores}


def table(rows: list[dict[str, Any]]) -> str:
  """Returns the differences of all configs in Markdown, on test."""
  from supermoe_jax.evaluation.metrics import improvement

  lines = ["| config | undone | task | metric | shipped | shipped − undone |", "|---|---|---|---|---|---|"]
  for file in dict.fromkeys(r["config"] for r in rows):
    by = {(r["variant"], r["seed"]): r for r in rows if r["config"] == file}
    for variant in [v for v in VARIANTS if v != SHIPPED]:
      seeds = [s for v, s in by if v == variant and (SHIPPED, s) in by]
      for task in by[variant, seeds[0]]["scores"]["test"] if seeds else ():
        metric = by[variant, seeds[0]]["metric"][task]
        own, undone = ([by[v, s]["scores"]["test"][task] for s in seeds] for v in (SHIPPED, variant))
        gain = np.array([improvement(metric, a, b) for a, b in zip(own, undone)])
        half = (
          stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else math.nan
        )
        name = pathlib.Path(file.partition(":")[0]).stem
        lines.append(
          f"| {name} | {variant} | {task} | {metric} | {np.mean(own):.4f} | {gain.mean():+.4f} ± {half:.4f} |"
        )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("config", nargs="?")
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--steps", type=int)
  parser.add_argument("--only", nargs="+", default=VARIANTS, choices=VARIANTS)
  parser.add_argument("--table", nargs="+", type=pathlib.Path)
  parser.add_argument("--one", nargs="+", metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
  arguments, overrides = parser.parse_known_args()
  if arguments.table:
    print(table([json.loads(line) for file in arguments.table for line in file.read_text().splitlines()]))
    return
  if not arguments.config or not arguments.out:
    parser.error("name a config and --out FILE, or --table FILE")
  if arguments.steps:
    overrides += [f"--config.train.{k}={arguments.steps}" for k in ("steps", "checkpoint_every")]
  if arguments.one:
    for seed in arguments.one[1:]:
      row = run_once(arguments.config, overrides, arguments.one[0], int(seed))
      with arguments.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return
  done = set()
  if arguments.out.exists():
    done = {(r["variant"], r["seed"]) for r in map(json.loads, arguments.out.read_text().splitlines())}
  for i, variant in enumerate(arguments.only):
    seeds = [str(s) for s in range(arguments.seeds) if (variant, s) not in done]
    print(f"{i + 1} of {len(arguments.only)}: {variant}, seeds {', '.join(seeds)}", file=sys.stderr, flush=True)
    if seeds:  # one process, so that the seeds share a program
      subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", variant, *seeds], check=True)
  print(table([json.loads(line) for line in arguments.out.read_text().splitlines()]))


if __name__ == "__main__":
  main()
