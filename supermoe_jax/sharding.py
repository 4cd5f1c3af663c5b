"""The device mesh and the one table that maps logical names to its axes.

Arrays are annotated with logical names only (`batch`, `expert`, `embed` …); nothing outside this file names a mesh
axis. One device is a 1×1×1 mesh, so there is no unsharded code path.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from supermoe_jax import config

AXES = ("data", "expert", "tensor")

# Logical name → mesh axis. Experts live on `expert`; the batch is spread over both other token-carrying axes.
RULES: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "expert"),
  "expert": "expert",
  "heads": "tensor",
  "mlp": "tensor",
  "rows": ("data", "expert", "tensor"),
  "embed": None,
}


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh of shape `data × expert × tensor`.

  Raises:
    ConfigError: fewer devices than the mesh needs.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = (sizes.data, sizes.expert, sizes.tensor)
  needed = int(np.prod(shape))
  if needed > len(devices):
    raise config.ConfigError(
      f"config.train.mesh needs {'×'.join(map(str, shape))} = {needed} devices, but JAX sees {len(devices)} "
      f"({devices[0].platform})."
    )
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed])


def spec(*names: str | None) -> PartitionSpec:
  """Returns the partition of an array whose dimensions carry these logical names.

  Raises:
    ValueError: an unknown name, or two names that map to one mesh axis.
  """
  used: list[str] = []
  entries: list[str | tuple[str, ...] | None] = []
  for name in names:
    if name is None:
      entries.append(None)
      continue
    if name not in RULES:
      raise ValueError(f"unknown logical name {name!r}{config.nearest(name, RULES)}")
    axes = RULES[name]
    entries.append(axes)
    used += [axes] if isinstance(axes, str) else list(axes or ())
  if len(used) != len(set(used)):
    raise ValueError(f"logical names {names} put one mesh axis on two dimensions: {used}")
  return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Asks XLA to lay `x` out by its logical names, when a mesh is set."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The layout of every array of a batch: rows over the batch axes."""
  return NamedSharding(mesh, spec("batch"))


def param(value: jax.Array, *names: str | None) -> nnx.Param:
  """A parameter that remembers its logical names; `shardings` reads them."""
  if value.ndim != len(names):
    raise ValueError(f"{len(names)} logical names for a parameter of shape {value.shape}")
  return nnx.Param(value, logical=names)


def shardings(mesh: Mesh, state: nnx.State) -> nnx.State:
  """Maps each variable of `state` to its layout on `mesh`; one without names, or that does not divide, is
  replicated."""

  def layout(variable: nnx.Variable) -> nnx.Variable:
    names = variable.get_metadata().get("logical")
    shape = variable.get_value().shape
    if names is None:
      return variable.replace(NamedSharding(mesh, PartitionSpec()))
    entries = []
    for size, axes in zip(shape, spec(*names)):
      ways = int(np.prod([mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes or ())]))
      entries.append(axes if size % ways == 0 else None)
    return variable.replace(NamedSharding(mesh, PartitionSpec(*entries)))

  return jax.tree.map(layout, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
