"""Makes a mesh from the devices of one host, of several hosts or of several pods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from supermoe_jax.errors import ConfigError
from supermoe_jax.sharding import AXES, RULES, batch_sharding


class MeshShape(Protocol):
  """Sizes of a mesh: the devices along each axis, and the number of slices; `config.Mesh` is one."""

  @property
  def data(self) -> int:
    """Returns the number of devices along `data`. Rows of a batch are spread over these and those along `expert`."""

  @property
  def expert(self) -> int:
    """Returns the number of devices that experts are spread over."""

  @property
  def tensor(self) -> int:
    """Returns the number of devices that heads and hidden units are spread over."""

  @property
  def slices(self) -> int:
    """Returns the number of slices (pods joined by a data-centre network) that the devices lie in."""


class _Sizes(NamedTuple):
  data: int = 1
  expert: int = 1
  tensor: int = 1
  slices: int = 1


def make_mesh(
  sizes: MeshShape, devices: Sequence[jax.Device] | None = None, axis_type: AxisType = AxisType.Auto
) -> Mesh:
  """Returns a mesh of shape `data × expert × tensor`.

  With several slices (pods joined by a data-centre network) only `data` spans slices: gradients cross the slow network
  once per step; tokens and activations never do.

  Raises:
    ConfigError: there are fewer devices than the mesh needs; the mesh leaves out a process; or its devices do not lie
      in `sizes.slices` slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = (sizes.data, sizes.expert, sizes.tensor)
  needed = math.prod(shape)
  if needed > len(devices):
    raise ConfigError(
      f"config.train.mesh needs {'×'.join(map(str, shape))} = {needed} devices, but JAX sees {len(devices)} "
      f"({devices[0].platform})."
    )
  used = devices[:needed]
  if len({d.process_index for d in used}) < len({d.process_index for d in devices}):
    raise ConfigError(
      f"config.train.mesh has {'×'.join(map(str, shape))} = {needed} devices, but {len(devices)} belong to the "
      "processes of this run; let the mesh use all of them, or start fewer processes."
    )
  found = slices(used)
  if found != sizes.slices:
    raise ConfigError(
      f"config.train.mesh.slices={sizes.slices}, but its {needed} devices lie in {found} of the "
      f"{slices(devices)} slices that JAX sees ({len(devices)} devices)."
    )
  # A logical axis may take a part of a physical one: 8 experts on a 4×4 torus.
  if found == 1:
    grid = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
  else:
    within = (sizes.data // found, sizes.expert, sizes.tensor)
    grid = mesh_utils.create_hybrid_device_mesh(within, (found, 1, 1), used, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(axis_type,) * len(AXES))


def mesh_of_processes(sizes: MeshShape) -> Mesh:
  """Returns a mesh of this run's processes for a model trained on a mesh of other `sizes`.

  One process uses one device; several use all their devices. Experts and tensors stay divided as they were if that is
  possible; rows are spread over the rest.
  """
  if jax.process_count() == 1:
    return make_mesh(_Sizes(), jax.devices()[:1])
  devices = jax.devices()
  expert, tensor = sizes.expert, sizes.tensor
  if len(devices) % (expert * tensor):
    expert = tensor = 1
  return make_mesh(_Sizes(len(devices) // (expert * tensor), expert, tensor, slices(devices)), devices)


def slices(devices: Sequence[jax.Device]) -> int:
  """Returns the number of slices (pods joined by a data-centre network) that the devices lie in."""
  return len({getattr(d, "slice_index", 0) for d in devices})


def host_rows(mesh: Mesh, rows: int) -> tuple[int, int]:
  """Returns the part of every batch of `rows` that this process' devices hold, as `(index, count)`; (0, 1) alone.

  Processes have the same part if their devices hold the same rows and differ only in what they hold of each row.

  Raises:
    ConfigError: the rows do not divide over the devices, or the processes' parts overlap.
  """
  ways_ = math.prod(mesh.shape[a] for a in RULES["batch"])
  if rows % ways_:
    raise ConfigError(f"config.train.batch_rows={rows} must divide over the {ways_} devices that share a batch.")
  parts: dict[int, set[int]] = {}
  found: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((rows,))
  for device, (where, *_) in found.items():
    parts.setdefault(device.process_index, set()).add(where.start or 0)
  different = sorted({tuple(sorted(p)) for p in parts.values()})
  if sum(map(len, different)) != ways_ or len(set(map(len, different))) > 1:
    raise ConfigError(
      f"config.train.mesh={dict(mesh.shape)} gives processes rows that overlap in part; the number of devices of each "
      "process must be a multiple or a divisor of expert × tensor."
    )
  return different.index(tuple(sorted(parts[jax.process_index()]))), len(different)
