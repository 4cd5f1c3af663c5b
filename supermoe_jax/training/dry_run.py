"""What a run would be, without a step of it: sizes, shapes and memory, from the compiled step."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from supermoe_jax import config, sharding
from supermoe_jax.data import batches
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.layers.table import TableRows
from supermoe_jax.models import parameters
from supermoe_jax.training.statistics import TaskStatistics
from supermoe_jax.training.step import abstract_state, compiled


def describe(cfg: config.Config) -> list[str]:
  """Returns lines that say what `supermoe train` would do with a config; nothing is written, and no state allocated.

  Raises:
    DataError: there is no dataset, or it was prepared from another config.
    ConfigError: the mesh needs devices that are not there.
  """
  dataset = Dataset(cfg.data.path)
  dataset.check_matches(cfg)
  train, mesh = cfg.train, sharding.make_mesh(cfg.train.mesh)
  said: list[str] = []
  stream = batches.training(dataset, cfg, say=said.append)
  batch = next(iter(stream))
  state = abstract_state(cfg, dataset.schema, mesh)
  several = (train.steps_per_call,) if train.steps_per_call > 1 else ()
  layout = sharding.batch_sharding(mesh, stacked=bool(several))
  inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*several, *x.shape), x.dtype, sharding=layout), batch)
  number = jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
  statistics = {name: TaskStatistics(number, number, number) for name in cfg.active_tasks}
  with jax.set_mesh(mesh):
    step = compiled(cfg, dataset.schema, mesh).step.lower(state, inputs, statistics).compile()
  count = parameters.count(state.model, cfg.model.experts_per_token / cfg.model.experts)
  rows, events = batch.features.segment.shape
  snapshots = batch.features.query_valid.shape[1]
  epoch = stream.state(0)["rows_of_an_epoch"]
  devices = mesh.devices.size
  lines = [
    f"mesh: {' × '.join(f'{n} {s}' for n, s in mesh.shape.items())}; {devices} of {jax.device_count()} devices "
    f"({mesh.devices.flat[0].device_kind}), {jax.process_count()} process(es)",
    f"parameters: {count.total:,}, of which {count.tables:,} in tables; {count.active:,} are at work on a token",
    *(f"  table {line}" for line in _tables(state.model)),
    f"state (parameters, moments, what rows keep): {_size(_bytes(state))}, {_size(_bytes_a_device(state))} a device; "
    f"{train.checkpoints_kept + (train.validate.checkpoints_kept if train.validate.every else 0)} checkpoints of that "
    f"size are kept, one every {train.checkpoint_every:,} steps",
    f"a step: {rows:,} rows of {events} events and {snapshots} snapshots; {len(cfg.active_tasks)} tasks "
    f"({', '.join(cfg.active_tasks)})",
    f"data: {epoch:,} rows an epoch, so {epoch / rows:,.1f} steps; {train.steps:,} steps are "
    f"{train.steps * rows / epoch:,.1f} epochs",
    *(f"  {line}" for line in said),
    *_compiled(step),
  ]
  replicated = sharding.replicated(mesh, state.model)
  lines += [f"warning: {n} ({_size(s)}) lies whole on every device" for n, s in replicated.items()]
  return lines


def _compiled(step: Any) -> list[str]:
  memory, cost = step.memory_analysis(), step.cost_analysis() or {}
  out = []
  if memory is not None:
    out.append(
      f"memory of the compiled program a device: {_size(memory.argument_size_in_bytes)} of state and batch, which its "
      f"results take the place of ({_size(memory.alias_size_in_bytes)}), and {_size(memory.temp_size_in_bytes)} besides"
    )
  if cost.get("flops", 0) > 0:
    out.append(f"arithmetic of the compiled program a device: {cost['flops'] / 1e9:,.2f} GFLOP, as XLA counts")
  return out


def _tables(model: nnx.State) -> list[str]:
  out = []
  for _, variable in nnx.to_flat_state(nnx.filter_state(model, TableRows)):
    value, about = variable.get_value(), variable.get_metadata()
    out.append(
      f"{about['table']}: {about['size']:,} rows of {value.shape[-1]} {value.dtype.name}, {_size(_bytes(value))}"
    )
  return out


def _bytes(tree: Any) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _bytes_a_device(tree: Any) -> int:
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size(n: float) -> str:
  for unit in ("B", "KiB", "MiB", "GiB"):
    if n < 1024:
      return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
    n /= 1024
  return f"{n:.1f} TiB"
