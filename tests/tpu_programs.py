"""Compiles programs for TPU topologies, without a TPU, and prints one line of JSON about them."""

import collections
import json
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding

from supermoe_jax import config, sharding
from supermoe_jax.layers import exchange, table
from supermoe_jax.layers.attention import Attention, Visibility
from supermoe_jax.layers.moe import MoE
from supermoe_jax.training import tables
from supermoe_jax.training.row_optimizers import RowAdagrad

# What makes a program quick is left out: it takes most of the time, and changes none of the collectives asked for here.
LEAST = {"exec_time_optimization_effort": -1.0}

COLLECTIVES = r"\b(all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute)(?:-start)?\("


def moe_collectives(dispatch: str, axis_type: AxisType, devices: list, *, dropless: bool = False) -> dict[str, int]:
  """Collectives of an MoE layer's forward and backward pass on a 2×4×2 mesh, by kind."""
  mesh = sharding.make_mesh(config.Mesh(2, 4, 2), devices, axis_type)
  make = lambda: MoE(256, 512, 16, 2, dispatch=dispatch, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))  # noqa: E731
  graph, abstract = nnx.split(nnx.eval_shape(make))
  layouts = sharding.shardings(mesh, abstract)
  state = jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), abstract, layouts)
  x = jax.ShapeDtypeStruct(
    (16, 512, 256), jnp.float32, sharding=NamedSharding(mesh, sharding.spec("batch", None, None))
  )
  valid = jax.ShapeDtypeStruct((16, 512), bool, sharding=NamedSharding(mesh, sharding.spec("batch", None)))

  def loss(state: nnx.State, x: jax.Array, valid: jax.Array):
    out = nnx.merge(graph, state)(x, valid, dropless=dropless)
    return jnp.sum(out.y**2) + out.aux.balance_loss, out.stats

  with jax.set_mesh(mesh):
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(state, x, valid).compile(LEAST)
  return collections.Counter(re.findall(COLLECTIVES, program.as_text()))


def attention_collectives(length: int, devices: list) -> dict[str, int]:
  """Collectives of attention's forward and backward pass with heads over 4 devices and rows over 4, by kind."""
  mesh = sharding.make_mesh(config.Mesh(data=4, tensor=4), devices)
  graph, abstract = nnx.split(nnx.eval_shape(lambda: Attention(512, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
  layouts = sharding.shardings(mesh, abstract)
  state = jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), abstract, layouts)
  where = NamedSharding(mesh, sharding.spec("batch"))
  x = jax.ShapeDtypeStruct((16, length, 512), jnp.float32, sharding=where)
  time = jax.ShapeDtypeStruct((16, length), jnp.float32, sharding=where)
  count = jax.ShapeDtypeStruct((16, length), jnp.int32, sharding=where)

  def loss(state: nnx.State, x: jax.Array, time: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    return jnp.sum(nnx.merge(graph, state)(x, end - start, time, Visibility(start, end)) ** 2)

  with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x, time, count, count).compile(LEAST)
  return collections.Counter(re.findall(COLLECTIVES, program.as_text()))


def table_step(rows: int, ids: int, devices: list) -> dict[str, int]:
  """A step of a table of bfloat16 rows of width 128, 512 rows of `ids` ids a batch: collectives, and bytes a device."""
  mesh = sharding.make_mesh(config.Mesh(data=4, expert=2, tensor=2), devices)
  adagrad, where = RowAdagrad(), NamedSharding(mesh, sharding.spec(None, "rows"))
  m = exchange.stripes(rows, mesh.size)
  table_ = jax.ShapeDtypeStruct((rows // m, m, 128), jnp.bfloat16, sharding=where)
  slots = {"sum": jax.ShapeDtypeStruct((rows // m, m), jnp.float32, sharding=where)}
  codes = jax.ShapeDtypeStruct((512, ids), jnp.int32, sharding=sharding.batch_sharding(mesh))

  def step(rows_: jax.Array, slots: dict[str, jax.Array], codes: jax.Array):
    extent = exchange.Extent(rows, m)
    asked, _ = table.distinct(codes, extent)
    found = table.fetch(rows_, asked, extent)
    gradient = jax.grad(lambda v: jnp.sum(table.look_up(table.Fetched(asked, v), codes, extent) ** 2))(found.rows)
    rule = tables.Rule(adagrad, 0.1, key=jax.random.key(0))
    return tables.apply(rows_, slots, table.collect(rows_, asked, gradient), rule)

  with jax.set_mesh(mesh):
    program = jax.jit(step, donate_argnums=(0, 1)).lower(table_, slots, codes).compile(LEAST)
  memory = program.memory_analysis()
  kept = {"arguments": memory.argument_size_in_bytes, "aliased": memory.alias_size_in_bytes}
  return {**collections.Counter(re.findall(COLLECTIVES, program.as_text())), **kept, "temp": memory.temp_size_in_bytes}


def slices_by_data_index() -> list[list[int]]:
  """Which slices the devices at each place of the data axis belong to, of two slices."""
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=2).devices
  mesh = sharding.make_mesh(config.Mesh(data=4, expert=2, tensor=2, slices=2), devices)
  return [sorted({d.slice_index for d in row.flat}) for row in mesh.devices]


if __name__ == "__main__":
  pod = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
  found: dict = {
    f"{name} {axis_type.name}": moe_collectives(name, axis_type, pod)
    for name in ("ragged", "all_to_all")
    for axis_type in (AxisType.Auto, AxisType.Explicit)
  }
  found["dropless"] = moe_collectives("auto", AxisType.Auto, pod, dropless=True)
  for length in (264, 2048):
    found[f"attention {length}"] = attention_collectives(length, pod)
  found["table"] = table_step(1 << 29, 64, pod)
  found["slices by data index"] = slices_by_data_index()
  print(json.dumps(found))
