"""How much of a training row is padding, and how fast are batches made? With one user a row, and packed.

    python experiments/benchmarks/batches.py runs/complete_journey/dataset
    … --config.train.snapshots_per_row=16 --config.train.workers=2    settings other than those it was prepared with
    … --json FILE    all figures

Tokens are events and snapshots that are real. Batches are timed alone: `first` are those of a dataset just opened,
whose records are read and decoded (to pack them, all were read before: `plan`), `again` come an epoch later, or after
--warm batches, when what fits into memory is kept. Beside them stands the training step of the same config, on one
batch over and over. The pipeline keeps up where it makes more tokens a second than the step consumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import pathlib
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from moe_layer import machine

from supermoe_jax import config, device_mesh
from supermoe_jax.batch import Batch
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.training import task_statistics
from supermoe_jax.training.step import compiled_program, create_state, place_on_mesh


def tokens(batch: Batch) -> int:
  return int(batch.features.length.sum() + batch.features.query_valid.sum())


def measure(path: pathlib.Path, cfg: config.Config, n_batches: int, warm: int, steps: int) -> dict[str, Any]:
  """The figures of a config on a dataset."""
  dataset = Dataset(path)
  start = time.perf_counter()
  batches = training_batches.training_batches(dataset, cfg, workers=cfg.train.workers)
  plan_seconds = time.perf_counter() - start
  if batches.description:
    print(batches.description)
  stream = iter(batches)
  epoch = -(-stream.get_state()["rows_of_an_epoch"] // cfg.train.batch_rows)
  first = _rate(stream, n_batches)
  for _ in range(min(warm, epoch)):
    next(stream)
  again = _rate(stream, n_batches)
  made = [next(stream) for _ in range(n_batches)]
  stream.close()
  features = [b.features for b in made]
  return {
    "packing": cfg.train.packing,
    "workers": cfg.train.workers,
    "padding_share": float(np.mean([f.segment == 0 for f in features])),
    "empty_snapshots": float(np.mean([f.query_segment == 0 for f in features])),
    "users_a_row": float(np.mean([f.segment.max(axis=1) for f in features])),
    "tokens_a_batch": float(np.mean([tokens(b) for b in made])),
    "plan_seconds": plan_seconds,
    "first_tokens_per_second": first,
    "again_tokens_per_second": again,
    **_step(cfg, dataset, made, steps),
  }


def _rate(stream: Any, n: int) -> float:
  """Tokens a second of the next `n` batches."""
  start = time.perf_counter()
  total = sum(tokens(next(stream)) for _ in range(n))
  return total / (time.perf_counter() - start)


def _step(cfg: config.Config, dataset: Dataset, made: list[Batch], steps: int) -> dict[str, Any]:
  """The median of the training step's time on one batch."""
  mesh = device_mesh.make_mesh(cfg.train.mesh)
  measured = task_statistics.measure_tasks(cfg.active_tasks, dataset.schema.outputs, made, len(made)).statistics
  constants = jax.device_put(measured, NamedSharding(mesh, PartitionSpec()))
  _, state = create_state(cfg, dataset.schema, mesh)
  step, seconds = compiled_program(cfg, dataset.schema, mesh).step, []
  with jax.set_mesh(mesh):
    batch = place_on_mesh(made[0], mesh)
    for _ in range(steps + 1):  # the first one compiles
      start = time.perf_counter()
      state, metrics = step(state, batch, constants)
      jax.block_until_ready(metrics)
      seconds.append(time.perf_counter() - start)
  median = float(np.median(seconds[1:]))
  return {"step_ms": 1e3 * median, "step_tokens_per_second": tokens(made[0]) / median}


def table(rows: list[dict[str, Any]]) -> str:
  """One line a case."""
  lines = [
    f"{'':8}{'users a row':>12}{'padding':>9}{'no snapshot':>13}{'plan':>9}{'tokens/s first':>16}{'again':>10}"
    f"{'training step':>22}"
  ]
  for r in rows:
    lines.append(
      f"{'packed' if r['packing'] else 'alone':8}{r['users_a_row']:>12.2f}{r['padding_share']:>9.1%}"
      f"{r['empty_snapshots']:>13.1%}{r['plan_seconds']:>7.1f} s{r['first_tokens_per_second']:>16,.0f}"
      f"{r['again_tokens_per_second']:>10,.0f}"
      f"{r['step_ms']:>9,.0f} ms{r['step_tokens_per_second']:>10,.0f}"
    )
  return "\n".join(lines)


def main() -> None:
  logging.basicConfig(format="%(message)s", force=True)  # the import of Orbax has given the root logger a handler
  logging.getLogger("supermoe_jax").setLevel(logging.INFO)
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("dataset", type=pathlib.Path, help="a prepared dataset's directory")
  parser.add_argument("--batches", type=int, default=40, help="batches that are timed")
  parser.add_argument("--warm", type=int, default=400, help="most batches before those that come again")
  parser.add_argument("--steps", type=int, default=7, help="training steps that are timed")
  parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
  args, overrides = parser.parse_known_args()
  if min(args.batches, args.warm, args.steps) < 1:
    parser.error("--batches, --warm and --steps must be at least 1")
  if args.json:
    try:
      args.json.open("a").close()
    except OSError as error:
      parser.error(f"--json {args.json} cannot be written: {error.strerror}")
  cfg = config.override(Dataset(args.dataset).config, overrides)
  here, rows = machine(), []
  print(f"{here['device']} × {here['devices']}, {here['cores']} cores, JAX {here['jax']}")
  for packed in (False, True):
    case = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, packing=packed))
    rows.append(measure(args.dataset, case, args.batches, args.warm, args.steps))
  print(table(rows))
  if args.json:
    args.json.write_text(json.dumps({"machine": here, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
  main()
