"""Maps logical names of dimensions to the axes of a device mesh, by one table; `device_mesh` makes the mesh.

Arrays are annotated with logical names only (`batch`, `expert`, `embed` …); nothing outside this file names a mesh
axis. One device is a 1×1×1 mesh, so there is no unsharded code path. Layers used alone, with no mesh set, find every
name on one device too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from supermoe_jax.errors import nearest

AXES = ("data", "expert", "tensor")

# Logical name → mesh axes. Experts live on `expert`; the batch is spread over both token-carrying axes.
RULES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "expert"),
  "expert": ("expert",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "rows": ("data", "expert", "tensor"),
  "sites": ("tensor",),  # of a row that several devices share
  "embed": (),
}

# Bytes above which a parameter should not lie whole on every device.
LARGE = 1 << 20

M = TypeVar("M", bound=nnx.Module)


def axes(*names: str | None) -> tuple[str, ...]:
  """Returns the axes of the mesh in use that these logical names are spread over; none when no mesh is set.

  Raises:
    ValueError: an unknown name, or two names that map to one mesh axis.
  """
  present = jax.sharding.get_abstract_mesh().axis_names
  return tuple(a for entry in _entries(names) for a in entry if a in present)


def ways(*names: str | None) -> int:
  """Returns the number of devices that these logical names are spread over on the mesh in use; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[a] for a in axes(*names))


def platform() -> str:
  """Returns the platform of the mesh in use, such as "cpu" or "tpu"; without a mesh, JAX' default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def index(name: str) -> jax.Array | int:
  """Returns this device's index among the devices that `name` is spread over; for use inside `on_shards`."""
  return jax.lax.axis_index(axes(name)) if axes(name) else 0


def spec(*names: str | None) -> PartitionSpec:
  """Returns the partition of an array whose dimensions have these logical names.

  Raises:
    ValueError: an unknown name, or two names that map to one mesh axis.
  """
  return PartitionSpec(*(_entry(e) for e in _entries(names)))


def _entries(names: Sequence[str | None]) -> list[tuple[str, ...]]:
  for name in names:
    if name is not None and name not in RULES:
      raise ValueError(f"unknown logical name {name!r}{nearest(name, RULES)}")
  entries = [RULES[name] if name else () for name in names]
  used = [a for entry in entries for a in entry]
  if len(used) != len(set(used)):
    raise ValueError(f"logical names {tuple(names)} put one mesh axis on two dimensions: {used}")
  return entries


def _entry(mesh_axes: Sequence[str]) -> str | tuple[str, ...] | None:
  return tuple(mesh_axes) if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None


def _spec_in_use(names: Sequence[str | None]) -> PartitionSpec:
  """Returns `spec` on the mesh in use, which may lack some of the axes."""
  return _spec_on(jax.sharding.get_abstract_mesh().axis_names, names)


def _specs_in_use(names: Any) -> Any:
  """Returns `_spec_in_use` of a tuple of names, or of each such tuple in a dict."""
  return {k: _spec_in_use(n) for k, n in names.items()} if isinstance(names, dict) else _spec_in_use(names)


def _spec_on(present: Sequence[str], names: Sequence[str | None]) -> PartitionSpec:
  return PartitionSpec(*(_entry([a for a in e if a in present]) for e in _entries(names)))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Lays `x` out by its logical names when a mesh is set: a request where axes are Auto, a type where Explicit."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not axes(*names):
    return x
  if AxisType.Explicit in mesh.axis_types:
    return jax.sharding.reshard(x, _spec_in_use(names))
  return jax.lax.with_sharding_constraint(x, _spec_in_use(names))


def on_shards(function: Callable[..., Any], inputs: Sequence[Any], outputs: Any, *arguments: Any) -> Any:
  """Calls `function` on each device's part of `arguments`, or on whole `arguments` without a mesh that has our axes.

  Args:
    function: sees its own shards, and may use collectives over `axes(name)`.
    inputs: for each argument a tuple of logical names, or a dict of such tuples for a dict of arrays.
    outputs: the same for the result of `function`; for several results, a tuple of such entries.
    *arguments: arrays, or dicts of arrays.

  Raises:
    ValueError: a dimension does not divide by the number of devices that it is spread over.
  """
  known = set(AXES) & set(jax.sharding.get_abstract_mesh().axis_names)
  if not known:
    return function(*arguments)
  placed: list[Any] = []
  for names, argument in zip(inputs, arguments, strict=True):
    if isinstance(names, dict):
      placed.append({k: constrain(_divisible(argument[k], names[k]), *names[k]) for k in argument})
    else:
      placed.append(constrain(_divisible(argument, names), *names))
  several = bool(outputs) and isinstance(outputs[0], (tuple, dict))
  in_specs = tuple(map(_specs_in_use, inputs))
  out_specs = tuple(map(_specs_in_use, outputs)) if several else _specs_in_use(outputs)
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=known)(*placed)


def _divisible(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
  for i, (size, name) in enumerate(zip(x.shape, names, strict=True)):
    if size % ways(name):
      raise ValueError(
        f"dimension {i} ({name}) of an array of shape {x.shape} is spread over {ways(name)} devices "
        f"({' × '.join(axes(name))}) and must be a multiple of that."
      )
  return x


def batch_sharding(mesh: Mesh, *, stacked: bool = False) -> NamedSharding:
  """Returns the layout of every array of a batch: rows, the second dimension if `stacked`, over the batch axes."""
  return NamedSharding(mesh, _spec_on(mesh.axis_names, (None, "batch") if stacked else ("batch",)))


def param(value: jax.Array, *names: str | None) -> nnx.Param:
  """Returns a parameter that stores its logical names; `shardings` reads them.

  Raises:
    ValueError: there are not as many names as dimensions.
  """
  if value.ndim != len(names):
    raise ValueError(f"{len(names)} logical names for a parameter of shape {value.shape}")
  return nnx.Param(value, logical=names)


def linear(
  n_in: int,
  n_out: int,
  *,
  rngs: nnx.Rngs,
  names: tuple[str | None, str | None] = ("embed", None),
  bias: bool = True,
  zero: bool = False,
  dtype: jnp.dtype | None = None,
) -> nnx.Linear:
  """Returns `nnx.Linear(n_in, n_out)` whose kernel `[n_in, n_out]` stores the logical `names` of its dimensions.

  With `zero` the kernel starts at 0: an input that never varies in training then has no effect. `dtype` is the dtype of
  the computation (None: from input and parameters); parameters are float32.
  """
  return nnx.Linear(
    n_in,
    n_out,
    use_bias=bias,
    dtype=dtype,
    kernel_init=nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal(),
    kernel_metadata={"logical": names},
    bias_metadata={"logical": names[1:]},
    rngs=rngs,
  )


def set_bias(layer: nnx.Linear, value: jax.Array) -> None:
  """Sets the bias of a linear map to `value [n_out]`."""
  assert layer.bias is not None
  layer.bias[...] = value


def stacked(state: nnx.State) -> nnx.State:
  """Returns `state` with one more logical name in front of each variable's names, for a dimension of layers."""

  def add(variable: nnx.Variable) -> nnx.Variable:
    names = variable.get_metadata().get("logical")
    if names is not None:
      variable.set_metadata(logical=(None, *names))
    return variable

  return jax.tree.map(add, state, is_leaf=_is_variable)


def shardings(mesh: Mesh, state: nnx.State) -> nnx.State:
  """Maps each variable of `state` to its layout on `mesh`; a dimension that does not divide stays whole.

  `replicated` lists the large parameters that lie whole on every device for this reason.
  """

  def layout(variable: nnx.Variable) -> nnx.Variable:
    names = variable.get_metadata().get("logical") or ()
    shape = variable.get_value().shape
    divides = [
      name if size % math.prod(mesh.shape.get(a, 1) for a in mesh_axes) == 0 else None
      for name, size, mesh_axes in zip(names, shape, _entries(names))
    ]
    return variable.replace(NamedSharding(mesh, _spec_on(mesh.axis_names, divides)))

  return jax.tree.map(layout, state, is_leaf=_is_variable)


def replicated(mesh: Mesh, state: nnx.State, larger_than: int = LARGE) -> dict[str, int]:
  """Returns the parameters of more than `larger_than` bytes that every device of `mesh` holds whole, with their bytes.

  The result is empty on one device.
  """
  if mesh.size == 1:
    return {}
  out = {}
  layouts = nnx.to_flat_state(shardings(mesh, state))
  for (path, variable), (_, layout) in zip(nnx.to_flat_state(state), layouts, strict=True):
    value = variable.get_value()
    size = math.prod(value.shape) * np.dtype(value.dtype).itemsize
    if size > larger_than and layout.get_value().is_fully_replicated:
      out[".".join(map(str, path))] = size
  return out


def create(make: Callable[[], M], mesh: Mesh) -> M:
  """Returns `make()` with every variable created in its place on `mesh`; no device or host holds all of it."""
  graph, abstract = nnx.split(nnx.eval_shape(make))
  with jax.set_mesh(mesh):
    state = jax.jit(lambda: nnx.state(make()), out_shardings=shardings(mesh, abstract))()
  return nnx.merge(graph, state)


def _is_variable(value: Any) -> bool:
  return isinstance(value, nnx.Variable)
