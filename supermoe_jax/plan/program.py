"""Compiles the real training step for devices that need not be there, without allocating a parameter."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supermoe_jax import config, sharding
from supermoe_jax.batch import Batch, Schema
from supermoe_jax.errors import ConfigError
from supermoe_jax.layers.table import TableRows
from supermoe_jax.plan import arithmetic, hlo, shapes
from supermoe_jax.plan.chips import Topology
from supermoe_jax.training.step import TrainState, abstract_state, compiled_program
from supermoe_jax.training.task_losses import TaskStatistics


class CompiledStep(NamedTuple):
  """Compiled training step.

  Attributes:
    state: shapes and layouts of the training state.
    inputs: shapes of all hosts' batch, and of the tasks' statistics.
    mesh: mesh of the devices that it is compiled for.
    flops: FLOPs of all products on all devices together; see `arithmetic.products`.
    executable: JAX' compiled program; None where it needs more memory than a device has.
    module: its parsed text; None likewise.
    needed: bytes that XLA would need on a device, if a device has fewer; otherwise 0.
    seconds: time that compiling took.
  """

  state: TrainState
  inputs: tuple[Batch, dict[str, TaskStatistics]]
  mesh: Mesh
  flops: float
  executable: Any
  module: hlo.HloModule | None
  needed: int
  seconds: float


# XLA's effort to make a program quick, from -1 to 1; a run is compiled with 0. Least effort compiles several times
# faster for TPUs.
LEAST_EFFORT = -1.0


def compile_step(
  cfg: config.Config, schema: Schema, mesh: Mesh, effort: float = 0.0, tie_rate: float = 0.0
) -> CompiledStep:
  """Compiles the training step of a config for the devices of a mesh, with the given `effort` of XLA.

  `tie_rate` is the dataset's, on which the number of values that answer a question about the next event can depend.
  """
  state = abstract_state(cfg, schema, mesh)
  several = (cfg.train.steps_per_call,) if cfg.train.steps_per_call > 1 else ()
  layout = sharding.batch_sharding(mesh, stacked=bool(several))
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*several, *x.shape), x.dtype, sharding=layout),
    shapes.batch_shapes(cfg, schema, tie_rate),
  )
  number = jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
  statistics = {name: TaskStatistics(*[number] * len(TaskStatistics._fields)) for name in cfg.active_tasks}
  begun = time.monotonic()
  with jax.set_mesh(mesh):
    traced = compiled_program(cfg, schema, mesh).step.trace(state, batch, statistics)
    flops = arithmetic.products(traced.jaxpr.jaxpr, mesh.size)
    try:
      executable = traced.lower().compile({"exec_time_optimization_effort": effort} if effort else None)
    except jax.errors.JaxRuntimeError as error:
      needed = _needed(str(error))
      if not needed:
        raise
      return CompiledStep(state, (batch, statistics), mesh, flops, None, None, needed, time.monotonic() - begun)
  module = hlo.parse_module(executable.as_text())
  return CompiledStep(state, (batch, statistics), mesh, flops, executable, module, 0, time.monotonic() - begun)


def _needed(message: str) -> int:
  """Returns the bytes that a program needs, from XLA's error for too little memory; 0 for any other error."""
  found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message) or re.search(
    r"memory required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM", message
  )
  return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2]))) if found else 0


def fitted_config(cfg: config.Config, topology: Topology) -> tuple[config.Config, list[str]]:
  """Returns the config with a mesh of all devices of a topology, and notes on what was changed for that.

  In the mesh only `data` and `slices` change; the batch stays the config's.

  Raises:
    ConfigError: the other axes do not divide the devices, or the mesh does not divide the batch.
  """
  mesh, said = cfg.train.mesh, []
  fixed = mesh.expert * mesh.tensor
  if topology.devices % fixed or (topology.devices // fixed) % topology.slices:
    raise ConfigError(
      f"--topology={topology}: config.train.mesh has expert × tensor = {fixed}, which does not divide the devices of a "
      f"slice ({topology.devices} devices, {topology.slices} slice(s)); set --config.train.mesh.expert and .tensor."
    )
  data = topology.devices // fixed
  wanted = dataclasses.replace(mesh, data=data, slices=topology.slices)
  if wanted != mesh:
    said.append(f"config.train.mesh.data={mesh.data} became {data}, to use all {topology.devices} devices")
  ways = data * mesh.expert
  for name, rows in (("train", cfg.train.batch_rows), ("evaluate", cfg.evaluate.batch_rows)):
    if rows % (ways * (cfg.train.accumulate if name == "train" else 1)):
      raise ConfigError(
        f"--topology={topology}: config.{name}.batch_rows={rows} must divide over the {ways} devices that share a "
        f"batch; set --config.{name}.batch_rows={max(1, round(rows / ways)) * ways}."
      )
  return config.override(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, mesh=wanted)), ()), said


def compile_devices(topology: Topology) -> Sequence[jax.Device]:
  """Returns devices to compile for. TPUs need not be there; this machine's CPUs stand in for GPUs and CPUs.

  Raises:
    ConfigError: XLA's compiler for TPUs is missing, or knows no such topology; JAX began with too few CPU devices.
  """
  if not topology.tpu:
    if topology.devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
      jax.config.update("jax_num_cpu_devices", topology.devices)
    found = jax.devices("cpu")
    if len(found) < topology.devices:
      raise ConfigError(
        f"--topology={topology}: JAX started with {len(found)} CPU devices; set "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices}."
      )
    return found[: topology.devices]
  from jax.experimental import topologies

  _point_to_libtpu()
  name = f"{topology.name}:{'x'.join(map(str, topology.sizes))}"
  several = {"num_slices": topology.slices} if topology.slices > 1 else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices
  except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
    raise ConfigError(f"--topology={topology}: XLA's compiler for TPUs rejects it: {error}") from error


# File that `pip install --target` installs the compiler to in this project; see the Makefile.
_BESIDE = pathlib.Path(sys.prefix) / "tpu" / "libtpu" / "libtpu.so"


def _point_to_libtpu() -> None:
  """Sets environment variables that locate the compiler and let it run without a TPU.

  Raises:
    ConfigError: the compiler is not installed.
  """
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else one process at a time, for the chips' sake
  if "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None:
    return
  if not _BESIDE.is_file():
    wanted = next(r.partition(";")[0] for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu"))
    raise ConfigError(
      "XLA's compiler for TPUs is missing. Install it next to the environment: pip install --no-deps --target "
      f"{_BESIDE.parent.parent} '{wanted}'; or name its libtpu.so in TPU_LIBRARY_PATH."
    )
  os.environ["TPU_LIBRARY_PATH"] = str(_BESIDE)


def array_leaves(state: TrainState) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the arrays of a state by their paths, as the compiled program names its arguments."""
  found, _ = jax.tree_util.tree_flatten_with_path(state)
  return {"state" + jax.tree_util.keystr(path): leaf for path, leaf in found}


def shard_bytes(leaf: Any) -> int:
  """Returns the bytes of an array that a device holds, without padding."""
  size = leaf.dtype.itemsize
  for n in leaf.sharding.shard_shape(leaf.shape):
    size *= n
  return size


def array_kinds(state: TrainState) -> dict[str, str]:
  """Returns each array's kind by its path: "tables", "experts" or "dense", "optimizer of" one of these, or "other"."""
  variables, _ = jax.tree_util.tree_flatten_with_path(state.model, is_leaf=lambda v: isinstance(v, nnx.Variable))
  model = {jax.tree_util.keystr(path): _kind(variable) for path, variable in variables}
  out = {}
  for path in array_leaves(state):
    owner = model.get(path[path.find("['") :].removesuffix(".value"), "dense")
    part = path.removeprefix("state.").partition("[")[0].partition(".")[0]
    out[path] = {"model": owner, "slots": "optimizer of tables", "optimizer": f"optimizer of {owner}"}.get(
      part, "other"
    )
  return out


def _kind(variable: nnx.Variable) -> str:
  if isinstance(variable, TableRows):
    return "tables"
  return "experts" if "expert" in (variable.get_metadata().get("logical") or ()) else "dense"
