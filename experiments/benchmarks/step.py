"""Where does the time of a training step go, and what do experts cost?

    supermoe prepare --config experiments/complete_journey.py
    python experiments/benchmarks/step.py --config experiments/complete_journey.py [--rounds 8] [--json FILE]

Three programs of one config take turns on the same batches, round after round: the model as it is, the same without
views of the tasks (`conditioning="none"`), and a dense one, whose blocks all have an MLP of as many hidden units as the
experts that a token visits, so that the arithmetic of a token is equal. Then a run is trained as `supermoe train` does,
for the share of its time in which the device has nothing to do and waits for input. Figures are medians over rounds;
ratios are taken within a round.

The share of the machine's arithmetic is that of products of 2,048 × 2,048 matrices, measured in between; what is
counted is what XLA counts in the compiled step, products and all else. The last table is a trace of the first program:
the time of XLA's own threads by kind of operation.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import itertools
import json
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from supermoe_jax import config, device_mesh
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.training import loop, task_statistics
from supermoe_jax.training.step import compiled_program, create_state, place_on_mesh

STEPS = 5  # of a program's turn


def variants(cfg: config.Config) -> dict[str, config.Config]:
  """The programs that take turns."""
  model = cfg.model
  hidden = (model.experts_per_token + model.shared_experts) * model.d_expert
  none = "--config.model.conditioning=none"
  dense = [none, "--config.model.moe_every=0", f"--config.model.d_hidden={hidden}"]
  return {"as configured": cfg, "no views": config.override(cfg, [none]), "dense": config.override(cfg, dense)}


class Program:
  """A compiled step with its state, which makes a turn of a few steps."""

  def __init__(self, cfg: config.Config, dataset: Dataset, taken: list[Any]):
    self._mesh = device_mesh.make_mesh(cfg.train.mesh)
    _, self._state = create_state(cfg, dataset.schema, self._mesh)
    measured = task_statistics.measure_tasks(cfg.active_tasks, dataset.schema.outputs, taken, len(taken)).statistics
    self._constants = jax.tree.map(jnp.float32, measured)
    self._batches = [place_on_mesh(batch, self._mesh) for batch in taken]
    with jax.set_mesh(self._mesh):
      lowered = compiled_program(cfg, dataset.schema, self._mesh).step.lower(
        self._state, self._batches[0], self._constants
      )
      self._step = lowered.compile()
    cost = self._step.cost_analysis() or {}
    self.flops, self.bytes = float(cost.get("flops", 0)), float(cost.get("bytes accessed", 0))

  def turn(self) -> float:
    """Seconds a step."""
    begun = time.perf_counter()
    for batch in itertools.islice(itertools.cycle(self._batches), STEPS):
      self._state, _ = self._step(self._state, batch, self._constants)
    jax.block_until_ready(self._state)
    return (time.perf_counter() - begun) / STEPS


def products(n: int = 2048) -> Callable[[], float]:
  """Measures FLOP/s of products of n × n float32 matrices."""
  x = jnp.ones((n, n), jnp.float32)
  multiply = jax.jit(lambda x: x @ x)
  multiply(x).block_until_ready()

  def measure() -> float:
    begun = time.perf_counter()
    for _ in range(4):
      multiply(x).block_until_ready()
    return 4 * 2 * n**3 / (time.perf_counter() - begun)

  return measure


def operations(program: Program) -> list[tuple[str, float]]:
  """The share of the time of XLA's threads in a turn by kind of operation, the greatest first."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      program.turn()
    (file,) = pathlib.Path(folder).rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
  spent = collections.Counter[str]()
  for event in events:
    if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
      spent[re.sub(r"[.\d]+$", "", event["args"]["hlo_op"])] += event["dur"]
  total = sum(spent.values())
  return [(name, time_ / total) for name, time_ in spent.most_common(12)]


def input_wait(cfg: config.Config, steps: int = 60) -> dict[str, float]:
  """What a run's own log says of its speed, after the first row."""
  short = config.override(cfg, [f"--config.train.steps={steps}", "--config.train.log_every=20"])
  with tempfile.TemporaryDirectory() as folder:
    loop.train(short, pathlib.Path(folder) / "run", progress=False)
    rows = [json.loads(line) for line in (pathlib.Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
  return {k: statistics.median(r["speed"][k] for r in rows[1:]) for k in ("input_wait_share", "step_ms")}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True)
  parser.add_argument("--rounds", type=int, default=8)
  parser.add_argument("--json", type=pathlib.Path)
  args, overrides = parser.parse_known_args()
  cfg = config.override(config.load(args.config, overrides), ["--config.train.steps_per_call=1"])
  dataset = Dataset(cfg.data.path)
  taken = list(itertools.islice(training_batches.training_batches(dataset, cfg), STEPS))
  programs = {name: Program(c, dataset, taken) for name, c in variants(cfg).items()}
  peak = products()
  for program in programs.values():
    program.turn()
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  peaks = []
  for _ in range(args.rounds):
    for name, program in programs.items():
      seconds[name].append(program.turn())
    peaks.append(peak())
  top = statistics.median(peaks)
  print(f"products of 2,048 × 2,048: {top / 1e9:,.0f} GFLOP/s")
  print(f"{'program':<14} {'ms a step':>9} {'÷ dense':>8} {'GFLOP':>7} {'GB':>6} {'of peak':>8}")
  rows = []
  for name, program in programs.items():
    median = statistics.median(seconds[name])
    ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["dense"]))
    share = program.flops / median / top
    rows.append({"program": name, "ms": 1e3 * median, "ratio": ratio, "flops": program.flops, "share": share})
    counted = f"{program.flops / 1e9:>7.1f} {program.bytes / 1e9:>6.2f} {share:>8.1%}"
    print(f"{name:<14} {1e3 * median:>9.1f} {ratio:>8.3f} {counted}")
  by_kind = operations(programs["as configured"])
  print("as configured, time by kind of operation: " + ", ".join(f"{name} {s:.1%}" for name, s in by_kind))
  run = input_wait(cfg)
  print(f"as supermoe train: {run['step_ms']:.1f} ms a step, {run['input_wait_share']:.2%} of it waiting for input")
  if args.json:
    figures = {"peak_flops": top, "rows": rows, "operations": by_kind, "run": run}
    args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
  main()
