"""A small state with a table, whose every number is its own, on any mesh."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from supermoe_jax import config, sharding
from supermoe_jax.layers.heads import NextValueHead
from supermoe_jax.layers.table import EmbeddingTable, Layout
from supermoe_jax.training import tables
from supermoe_jax.training.row_optimizers import LazyAdam
from supermoe_jax.training.step import TrainState

D = 4


class Model(nnx.Module):
  def __init__(self, size: int, d: int, layout: Layout, seed: int):
    rngs = nnx.Rngs(seed)
    self.items = EmbeddingTable(size, d, name="items", layout=layout, rngs=rngs)
    self.head = NextValueHead(d, self.items, rngs=rngs)


def state(size: int, sizes: tuple[int, int, int], seed: int, d: int = D, platform: str = "cpu") -> TrainState:
  """A state whose every number is its own, on a mesh, its table laid out as for a platform."""
  mesh = sharding.make_mesh(config.Mesh(*sizes))
  layout = Layout(mesh.size, platform=platform)
  model = nnx.state(sharding.create(lambda: Model(size, d, layout, seed), mesh))
  rows = model["items"]["rows"].get_value()
  where = jax.sharding.NamedSharding(mesh, sharding.spec(None, "rows"))
  slots = {k: jax.device_put(s + seed, where) for k, s in tables.slots(LazyAdam(), rows, d).items()}
  bias = model["head"]["bias"]
  if seed:
    natural = jnp.arange(bias.get_value().size, dtype=jnp.float32).reshape(bias.get_value().shape)
    bias.set_value(jax.device_put(natural, bias.get_value().sharding))
  params = nnx.filter_state(model, nnx.Param)
  moments = jax.jit(optax.adam(1.0).init, out_shardings=None)(params)
  mu = jax.tree.map(lambda m, p: jax.device_put(p + 0.0, p.sharding), moments[0].mu, params)
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  moments = (moments[0]._replace(mu=mu, nu=mu, count=jax.device_put(moments[0].count, where)), moments[1])
  step, key = jax.device_put((jnp.int32(seed), jax.random.PRNGKey(seed)), where)
  return TrainState(step, step, model, moments, {"items": slots}, {}, key)
