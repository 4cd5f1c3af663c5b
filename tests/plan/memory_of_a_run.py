"""Plans a step for eight CPU devices, then makes real ones, and prints both memories: what each allocates at most."""

import os
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ["JAX_PLATFORMS"] = "cpu"

import importlib.util
import json
import pathlib
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from small_log import raw_config, write_log

from supermoe_jax import config, sharding
from supermoe_jax.data import batches, prepare
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.plan import chips, plan, program
from supermoe_jax.training import step
from supermoe_jax.training.statistics import TaskStatistics

file = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks" / "tables.py"
spec = importlib.util.spec_from_file_location("tables_benchmark", file)
assert spec is not None and spec.loader is not None
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

folder = pathlib.Path(sys.argv[1])
write_log(folder)
raw = raw_config(folder)
raw["data"]["fields"]["device"]["size"] = 60_000
raw["model"] |= {"d_model": 64, "d_expert": 256, "experts": 8}
raw["train"] |= {"batch_rows": 32, "mesh": {"expert": 2}}
raw["evaluate"] = {"batch_rows": 32}
cfg = config.resolve(raw)
prepare.prepare(cfg)
topology = chips.topology("cpu:8")
planned = plan.plan(cfg, topology)

cfg, _ = program.fitted(cfg, topology)
dataset, mesh = Dataset(cfg.data.path), sharding.make_mesh(cfg.train.mesh)
made = iter(batches.training(dataset, cfg))
host = [next(made) for _ in range(3)]
made.close()
statistics = {n: TaskStatistics(*np.ones(3, np.float32)) for n in cfg.active_tasks}
constants = jax.device_put(statistics, NamedSharding(mesh, PartitionSpec()))
with jax.set_mesh(mesh):
  run = step.compiled(cfg, dataset.schema, mesh).step
  _, state = step.create_state(cfg, dataset.schema, mesh)
  state, _ = run(state, step.place(host[0], mesh), constants)  # compiles
  jax.block_until_ready(state)
  del state
  time.sleep(0.2)
  with benchmark.Peak() as peak:
    _, state = step.create_state(cfg, dataset.schema, mesh)
    for batch in host:
      state, metrics = run(state, step.place(batch, mesh), constants)
      jax.block_until_ready((state, metrics))
      time.sleep(0.05)
memory = planned["memory"]
wanted = 8 * (memory["total"] - memory["program"])
print(json.dumps({"planned": wanted, "measured": peak.allocated, "parts": memory}))
