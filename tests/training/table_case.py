"""Steps of a table alone, on any mesh, and the same by plain NumPy over the whole table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from supermoe_jax import sharding
from supermoe_jax.layers import exchange, table
from supermoe_jax.layers.table import EmbeddingTable, Fetched, Layout
from supermoe_jax.training import tables
from supermoe_jax.training.row_optimizers import LazyAdam, RowAdagrad, RowOptimizer, Sgd

WIDTH, SIZE, STEPS = 4, 37, 50
RATE, DECAY = 0.1, 0.01


def created(size: int, mesh: jax.sharding.Mesh, dtype: str = "float32", platform: str = "cpu") -> EmbeddingTable:
  """A table of `size` rows, in its place on a mesh, laid out as for a platform."""
  layout = Layout(mesh.size, dtype=dtype, platform=platform)
  make = lambda: EmbeddingTable(size, WIDTH, layout=layout, rngs=nnx.Rngs(3))  # noqa: E731
  return sharding.create(make, mesh)


@functools.lru_cache
def stepper(mesh: jax.sharding.Mesh, size: int, optimizer: RowOptimizer, cells: float, stochastic: bool = False):
  """A jitted `(rows, slots, codes [B, n], targets [B, n, D], step) → (rows, slots, norm², counts)`, donated."""

  def step(rows, slots, codes, targets, number):
    extent = exchange.Extent(size, rows.shape[1] * rows.shape[2] // WIDTH)
    place, outside = table.distinct(codes, extent)
    found = table.fetch(rows, place, extent, cells)

    def loss(vectors):
      y = table.look_up(Fetched(place, vectors), codes, extent)
      return jnp.sum(jnp.sin(y) * targets)

    gradient = jax.grad(loss)(found.rows)
    touched = table.collect(rows, place, gradient, cells)
    key = jax.random.fold_in(jax.random.key(1), number) if stochastic else None
    rule = tables.Rule(optimizer, RATE, scale=0.5, decay=DECAY, key=key)
    norm = tables.square_norm({"": touched})
    rows, slots = tables.apply(rows, slots, touched, rule)
    return rows, slots, norm, jnp.sum(outside), jnp.sum(touched.lost)

  return jax.jit(step, donate_argnums=(0, 1))


def batches(seed: int, steps: int, size: int, rows: int = 8, n: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
  """Codes, some absent, some out of range and many repeated, and what the loss multiplies their rows by."""
  rng = np.random.default_rng(seed)
  out = []
  for _ in range(steps):
    codes = np.minimum(rng.zipf(1.3, (rows, n)) - 1, size + 2).astype(np.int32)
    codes = np.where(rng.random((rows, n)) < 0.5, rng.integers(-1, size, (rows, n)), codes).astype(np.int32)
    out.append((codes, rng.normal(size=(rows, n, WIDTH)).astype(np.float32)))
  return out


def run(mesh, size, optimizer, made, cells=8.0, dtype="float32", stochastic=False, stripes=None, platform="cpu"):
  """All steps on a mesh: the rows in natural order, norms², codes out of range and gradients lost."""
  rows = created(size, mesh, dtype, platform).rows.get_value()
  with jax.set_mesh(mesh):
    if stripes is not None:  # other ones than a table of this size has by itself
      flat = np.zeros((-(-size // stripes) * stripes, WIDTH), np.float32)
      flat[:size] = np.asarray(rows).reshape(-1, WIDTH)[:size]
      where = jax.sharding.NamedSharding(mesh, sharding.spec(None, "rows", None))
      rows = jax.device_put(flat.reshape(-1, stripes, WIDTH), where)
    layout = jax.sharding.NamedSharding(mesh, sharding.spec(None, "rows"))
    slots = jax.tree.map(lambda s: jax.device_put(s, layout), tables.slots(optimizer, rows, WIDTH))
    step = stepper(mesh, size, optimizer, cells, stochastic)
    seen = []
    for number, (codes, targets) in enumerate(made):
      where = sharding.batch_sharding(mesh)
      codes, targets = jax.device_put((codes, targets), where)
      rows, slots, *counts = step(rows, slots, codes, targets, number)
      seen.append([float(c) for c in counts])
    whole = jax.jit(lambda r: r, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))(rows)
  natural = np.asarray(whole.addressable_data(0).astype(jnp.float32)).reshape(-1, WIDTH)[:size]
  return natural, np.array(seen).reshape(-1, 3)


def reference(size: int, optimizer: RowOptimizer, made) -> tuple[np.ndarray, np.ndarray]:
  """The same over the whole table in float64: every gradient in one array, every rule written out again."""
  layer = EmbeddingTable(size, WIDTH, rngs=nnx.Rngs(3))
  rows = np.asarray(layer.natural(), np.float64)
  total, mean, square, steps = np.zeros(size), np.zeros_like(rows), np.zeros_like(rows), np.zeros(size)
  seen = []
  for codes, targets in made:
    flat, gradient = codes.reshape(-1), np.zeros_like(rows)
    inside = (flat > 0) & (flat < size)
    np.add.at(gradient, flat[inside], np.cos(rows[flat[inside]]) * targets.reshape(-1, WIDTH)[inside])
    norm, outside = np.sum(gradient**2), np.sum((flat < 0) | (flat >= size))
    t = np.unique(flat[inside])
    g = 0.5 * gradient[t]
    if isinstance(optimizer, RowAdagrad):
      total[t] += np.mean(g**2, axis=1)
      move = g / (np.sqrt(total[t]) + 1e-8)[:, None]
    elif isinstance(optimizer, LazyAdam):
      steps[t] += 1
      mean[t] = 0.9 * mean[t] + 0.1 * g
      square[t] = 0.999 * square[t] + 0.001 * g**2
      n = steps[t][:, None]
      move = mean[t] / (1 - 0.9**n) / (np.sqrt(square[t] / (1 - 0.999**n)) + 1e-8)
    else:
      assert isinstance(optimizer, Sgd)
      move = g
    rows[t] -= RATE * move + RATE * DECAY * rows[t]
    seen.append((norm, outside))
  return rows, np.array(seen).reshape(-1, 2)


OPTIMIZERS = {"adagrad": RowAdagrad(), "adam": LazyAdam(), "sgd": Sgd()}
