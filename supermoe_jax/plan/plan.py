"""Plans a training step for `supermoe plan`: what the step takes on a topology, and whether it fits."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
from typing import Any

import jax

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.batch import Schema
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.format.integrity import MANIFEST
from supermoe_jax.models import parameters
from supermoe_jax.plan import collectives, estimate, hlo, program, shapes, traffic
from supermoe_jax.plan.chips import Topology
from supermoe_jax.plan.remedies import remedies
from supermoe_jax.training.monitoring import utilisation

_ESTIMATED = "XLA:CPU stands in for the compiler of these devices: arguments are exact, all else is an estimate"


def schema_of(cfg: config.Config) -> tuple[Schema, float, str]:
  """Returns the schema of the config's dataset, or the largest that the config allows; its `tie_rate`; and a note.

  Without a dataset the tie rate is 0, so that `ties="auto"` is planned as one value a question.

  Raises:
    DataError: there is a dataset, and it was prepared from another config.
  """
  path = pathlib.Path(cfg.data.path)
  if (path / MANIFEST).is_file():
    dataset = Dataset(path)
    dataset.check_matches(cfg)
    return dataset.schema, dataset.tie_rate, f"sizes are those of the dataset {path}"
  return shapes.largest_schema(cfg), 0.0, f"{path} holds no dataset yet: sizes are the largest that the config allows"


def plan_step(cfg: config.Config, topology: Topology, effort: float = program.LEAST_EFFORT) -> dict[str, Any]:
  """Compiles the training step of a config for a topology and returns what it takes; see `render.plan_text`.

  `effort` is XLA:TPU's effort to make the program quick, from -1 to 1. A run uses 0, which compiles for several times
  as long.

  Raises:
    ConfigError: the mesh or the batch does not divide over the devices, or XLA cannot compile for them.
    DataError: the dataset was prepared from another config.
  """
  cfg, notes = program.fitted_config(cfg, topology)
  schema, tie_rate, about = schema_of(cfg)
  mesh = device_mesh.make_mesh(cfg.train.mesh, program.compile_devices(topology))
  effort = effort if topology.tpu else 0.0  # other backends compile quickly
  compiled = program.compile_step(cfg, schema, mesh, effort, tie_rate)
  chip = topology.chip
  notes = [about, *notes]
  if not topology.tpu:
    notes.append(_ESTIMATED)
  elif effort:
    notes.append(
      f"compiled with effort {effort:g} from -1 to 1; a run uses 0, which may need less traffic and memory (--effort 0)"
    )
  count = parameters.count_parameters(compiled.state.model, cfg.model.experts_per_token / cfg.model.experts)
  memory = _memory(compiled)
  tokens = _tokens(cfg)
  result: dict[str, Any] = {
    "config_hash": cfg.hash(),
    "topology": {"name": str(topology), "devices": topology.devices, "slices": topology.slices},
    "chip": {**dataclasses.asdict(chip), "flops": chip.flops} if chip else None,
    "mesh": dict(mesh.shape),
    "notes": notes,
    "parameters": {
      "total": count.total,
      "tables": count.tables,
      "experts": _parameters(compiled, "experts"),
      "dense": count.total - count.tables - _parameters(compiled, "experts"),
      "active": count.active,
    },
    "memory": memory,
    "tokens": tokens,
    "flops": compiled.flops / topology.devices,
    "compile_seconds": round(compiled.seconds, 1),
  }
  limit = chip.memory if chip else None
  result["fits"] = None if limit is None else memory["total"] <= limit
  if compiled.module is not None:
    result |= _work(compiled, topology, result["flops"], tokens, utilisation.flops_a_token(cfg.model, count))
  result["remedies"] = remedies(cfg, result, topology) if result["fits"] is False else []
  result["replicated"] = sharding.replicated(mesh, compiled.state.model)
  return result


def _parameters(compiled: program.CompiledStep, kind: str) -> int:
  kinds, leaves = program.array_kinds(compiled.state), program.array_leaves(compiled.state)
  return sum(math.prod(leaves[p].shape) for p, k in kinds.items() if k == kind)


def _tokens(cfg: config.Config) -> int:
  """Returns the tokens of a step (of all steps of a call): events, snapshots, and task tokens."""
  own = len(cfg.active_views) if cfg.model.conditioning == "token" else 0
  row = cfg.model.max_events + cfg.train.snapshots_per_row * (1 + own)
  return cfg.train.batch_rows * row * cfg.train.steps_per_call


def _memory(compiled: program.CompiledStep) -> dict[str, Any]:
  """Returns the memory that the step takes on a device, in bytes."""
  leaves, kinds = program.array_leaves(compiled.state), program.array_kinds(compiled.state)
  parts: dict[str, int] = collections.defaultdict(int)
  for path, leaf in leaves.items():
    parts[kinds[path]] += program.shard_bytes(leaf)
  for leaf in jax.tree.leaves(compiled.inputs):
    parts["batch"] += program.shard_bytes(leaf)
  kept = sum(parts.values())
  if compiled.module is None:
    return {"parts": dict(parts), "padding": None, "temporary": None, "total": compiled.needed}
  told = compiled.executable.memory_analysis()
  new = told.output_size_in_bytes - told.alias_size_in_bytes
  padded = _padding(compiled)
  return {
    "parts": dict(parts),
    "arguments": told.argument_size_in_bytes,
    "padding": sum(padded.values()),
    "padded_most": dict(sorted(padded.items(), key=lambda item: -item[1])[:5]),
    "not_read": kept + sum(padded.values()) - told.argument_size_in_bytes,
    "temporary": told.temp_size_in_bytes,
    "outputs": new,
    "program": told.generated_code_size_in_bytes,
    "total": told.argument_size_in_bytes + told.temp_size_in_bytes + new + told.generated_code_size_in_bytes,
  }


def _padding(compiled: program.CompiledStep) -> dict[str, int]:
  """Returns the bytes by which tiles of the device's memory make each argument larger."""
  module = compiled.module
  assert module is not None
  out = {}
  for instruction in module.computations[module.entry].values():
    if instruction.opcode == "parameter":
      extra = sum(s.padded - s.bytes for s in instruction.shapes)
      if extra:
        out[instruction.op_name or instruction.name] = extra
  return out


def _work(
  compiled: program.CompiledStep, topology: Topology, flops: float, tokens: int, flops_a_token: float
) -> dict[str, Any]:
  module, mesh = compiled.module, compiled.mesh
  assert module is not None
  moved = traffic.memory_traffic(module)
  found = estimate.network_traffic(collectives.read_collectives(module, mesh.size, topology.slices), mesh, topology)
  out: dict[str, Any] = {
    "memory_traffic": moved,
    "collectives": [estimate.as_dict(t) for t in found],
    "loops_of_unknown_length": len(hlo.count_runs(module).unknown),
  }
  chip = topology.chip
  if chip is not None:
    times = estimate.step_times(flops, moved, found, chip)
    out["seconds"] = {**times._asdict(), "step": times.step, "alone": times.alone, "bound": times.bound}
    out["tokens_per_second"] = tokens / times.step
    out["mfu"] = tokens * flops_a_token / (times.step * topology.devices * chip.flops)
  return out
