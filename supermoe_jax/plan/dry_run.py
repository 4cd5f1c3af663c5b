"""Describes a run without running a step of it: sizes, shapes and memory, from the compiled step."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ConfigError
from supermoe_jax.layers.table import TableRows
from supermoe_jax.models import parameters
from supermoe_jax.plan import program
from supermoe_jax.plan.render import bytes_text


def describe_run(cfg: config.Config) -> list[str]:
  """Returns lines that describe what `supermoe train` would do with a config; writes nothing and allocates no state.

  Raises:
    DataError: there is no dataset, or it was prepared from another config.
    ConfigError: the mesh needs devices that are not there, or the step needs more memory than a device has.
  """
  dataset = Dataset(cfg.data.path)
  dataset.check_matches(cfg)
  train, mesh = cfg.train, device_mesh.make_mesh(cfg.train.mesh)
  stream = training_batches.training_batches(dataset, cfg)
  found = program.compile_step(cfg, dataset.schema, mesh, tie_rate=dataset.tie_rate)
  if found.module is None:
    raise ConfigError(
      f"the step needs {bytes_text(found.needed)} of each device's memory, which is more than it has; 'supermoe "
      "plan' shows what takes the memory."
    )
  count = parameters.count_parameters(found.state.model, cfg.model.experts_per_token / cfg.model.experts)
  rows, epoch, devices = train.batch_rows, stream.state(0)["rows_of_an_epoch"], mesh.devices.size
  leaves = program.array_leaves(found.state).values()
  steps = config.round_ends(train.steps)[-1]
  best = train.validate.checkpoints_kept if train.validate.every or train.steps == "auto" else 0
  lines = [
    f"mesh: {' × '.join(f'{n} {s}' for n, s in mesh.shape.items())}; {devices} of {jax.device_count()} devices "
    f"({mesh.devices.flat[0].device_kind}), {jax.process_count()} process(es)",
    f"parameters: {count.total:,}, {count.tables:,} of them in tables; a token uses {count.active:,}",
    *(f"  table {line}" for line in _tables(found.state.model)),
    f"state (parameters and optimizer state): {bytes_text(sum(map(_bytes, leaves)))}, "
    f"{bytes_text(sum(map(program.shard_bytes, leaves)))} a device; "
    f"{train.checkpoints_kept + best} checkpoints of that "
    f"size are kept, one every {train.checkpoint_every:,} steps",
    f"a step: {rows:,} rows of {cfg.model.max_events} events and {train.snapshots_per_row} snapshots; "
    f"{len(cfg.active_tasks)} tasks ({', '.join(cfg.active_tasks)})",
    f"data: {epoch:,} rows an epoch, so {epoch / rows:,.1f} steps; "
    f"{'at most ' if train.steps == 'auto' else ''}{steps:,} steps are {steps * rows / epoch:,.1f} epochs",
    *([f"  {stream.description}"] if stream.description else []),
    *_compiled(found),
  ]
  replicated = sharding.replicated(mesh, found.state.model)
  return lines + [f"warning: {n} ({bytes_text(s)}) is replicated on every device" for n, s in replicated.items()]


def _compiled(found: program.CompiledStep) -> list[str]:
  memory = found.executable.memory_analysis()
  flops = found.flops / found.mesh.size
  return [
    f"memory of the compiled program a device: {bytes_text(memory.argument_size_in_bytes)} of state and batch, of "
    f"which the results reuse {bytes_text(memory.alias_size_in_bytes)}, and {bytes_text(memory.temp_size_in_bytes)} of "
    "temporaries",
    f"matrix products of a step a device: {flops / 1e9:,.2f} GFLOP",
  ]


def _tables(model: nnx.State) -> list[str]:
  out = []
  for _, variable in nnx.to_flat_state(nnx.filter_state(model, TableRows)):
    value, about = variable.get_value(), variable.get_metadata()
    out.append(
      f"{about['table']}: {about['size']:,} rows of {about['width']} {value.dtype.name}, {bytes_text(_bytes(value))}"
    )
  return out


def _bytes(leaf: Any) -> int:
  return math.prod(leaf.shape) * leaf.dtype.itemsize
