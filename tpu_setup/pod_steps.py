"""What a check of a pod has the devices do: products, collectives, and a training step.

Bandwidth is as NCCL tests have it (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md). Of n devices each holds a buffer
of S bytes, and a collective takes t seconds:

    algorithm bandwidth = S / t
    bus bandwidth       = S / t · 2 (n - 1) / n   of an all-reduce
                        = S / t · (n - 1) / n     of an all-to-all

Of a perfect collective the latter is what a device sends a second, whatever n is, and can be compared with what its
links are built for. It is 0 of one device, which has nothing to send. t is that of the slowest host, and of one of
`CHAINED` collectives in one program, so that starting it counts little.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import pathlib
import statistics as statistics_lib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supermoe_jax import config, device_mesh
from supermoe_jax.data.dataset import training_batches
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.preparation import prepare
from supermoe_jax.simulation.latent_users import Simulation
from supermoe_jax.simulation.simulator import simulate, simulation_config
from supermoe_jax.training import task_statistics
from supermoe_jax.training.step import compiled_program, create_state, place_on_mesh

OPERATIONS = ("all-reduce", "all-to-all")

# Collectives that a program makes one after the other when it is timed.
CHAINED = 4

# Seconds that the timed repetitions of one collective may take together, within the fewest and the most of them.
BUDGET, FEWEST, MOST = 5.0, 3, 20

# Buffers of S bytes that a device has at a time: the data, the result, and two in the loop; on a CPU those of the host
# beside them, which makes and compares the numbers.
BUFFERS = 8

_SIDE = 512
_BY_DEVICE, _BY_PLACE = 1_000_003, 7_919

# ------------------------------------------------------------------------------------------------------------- devices


def describe() -> dict[str, Any]:
  """What JAX says of the devices; `memory` and `free` are bytes of one of this host's."""
  local = jax.local_devices()
  found = [device.memory_stats() or {} for device in local]
  page = os.sysconf("SC_PAGE_SIZE")
  memory = [f.get("bytes_limit", page * os.sysconf("SC_PHYS_PAGES") // len(local)) for f in found]
  free = [m - f["bytes_in_use"] if "bytes_in_use" in f else None for m, f in zip(memory, found)]
  host = page * os.sysconf("SC_AVPHYS_PAGES") // len(local)
  return {
    "platform": local[0].platform,
    "kinds": sorted({d.device_kind for d in local}),
    "local": len(local),
    "all": jax.device_count(),
    "processes": jax.process_count(),
    "memory": min(memory),
    "free": min(host if f is None else f for f in free),
  }


@functools.cache
def _factors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Two matrices of 0 … 7 and the weight of each place of their product."""
  i, k = np.indices((_SIDE, _SIDE))
  return (5 * i + 3 * k + i * k) % 8, (i + 7 * k + i * k // 3) % 8, (31 * i + 17 * k) % 251 + 1


def checksum_wanted() -> int:
  """What `checksum` must return, by whole numbers of the host."""
  a, b, weight = _factors()
  product = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
  return int(np.sum(product * weight).astype(np.int32))


@jax.jit
def _checksum(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
  # Exact in bfloat16 with sums in float32: products are at most 49, and their sums less than 2²⁴.
  product = jnp.dot(a, b, preferred_element_type=jnp.float32).astype(jnp.int32)
  return jnp.sum(product * weight)


def checksum(device: jax.Device) -> int:
  """Multiplies two matrices on a device and sums the product up, by weights of its places, modulo 2³²."""
  a, b, weight = _factors()
  on_device = jax.device_put((a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), weight.astype(np.int32)), device)
  return int(_checksum(*on_device))


# --------------------------------------------------------------------------------------------------------- collectives


def sizes_that_fit(wanted: Sequence[float], free: int) -> list[int]:
  """The sizes in bytes, of those `wanted` in MiB, that devices with `free` bytes have room for; one at least."""
  asked = sorted(int(s * 2**20) for s in wanted)
  return [s for s in asked if s * BUFFERS <= free] or asked[:1]


def algorithm_bandwidth(size: int, seconds: float) -> float:
  """GB/s a device; see the module."""
  return size / seconds / 1e9


def bus_bandwidth(operation: str, size: int, devices: int, seconds: float) -> float:
  """GB/s a device; see the module."""
  factor = {"all-reduce": 2, "all-to-all": 1}[operation] * (devices - 1) / devices
  return algorithm_bandwidth(size, seconds) * factor


class Collective:
  """A collective over all `devices`, on a buffer of about `size` bytes each; `size` is then what they have."""

  def __init__(self, operation: str, devices: Sequence[jax.Device], size: int):
    """Describes it; nothing is computed."""
    n = len(devices)
    part = max(1, size // 4 // n)
    self.operation, self.size, self._n, self._part = operation, 4 * n * part, n, part
    self._mesh, self._order = Mesh(np.array(devices), ("device",)), {d: i for i, d in enumerate(devices)}

  @functools.cached_property
  def _data(self) -> jax.Array:
    """int32 `[n, S/4]`: each number says by which device it was made, and for which place."""
    shape = self._n, self._n * self._part
    layout = NamedSharding(self._mesh, PartitionSpec("device"))

    def made(where: Any) -> np.ndarray:
      return self._number(where[0].start or 0, self._places())

    return jax.make_array_from_callback(shape, layout, made)

  @functools.cached_property
  def _program(self) -> Callable[[jax.Array, int], jax.Array]:
    def once(_: jax.Array, x: jax.Array) -> jax.Array:
      if self.operation == "all-reduce":
        return jax.lax.psum(x, "device")
      return jax.lax.all_to_all(x.reshape(self._n, -1), "device", 0, 0, tiled=True).reshape(1, -1)

    def several(x: jax.Array, times: jax.Array) -> jax.Array:
      return jax.lax.fori_loop(0, times, once, x)

    by_device, same = PartitionSpec("device"), PartitionSpec()
    mapped = jax.shard_map(several, mesh=self._mesh, in_specs=(by_device, same), out_specs=by_device, check_vma=False)
    return jax.jit(mapped)

  def wrong(self) -> list[str]:
    """Does the collective once; returns this host's devices whose result is not exactly what it must be."""
    found, at = self._program(self._data, 1), self._places()
    named = []
    for shard in found.addressable_shards:
      if self.operation == "all-reduce":
        wanted = self._number(self._n * (self._n - 1) // 2, self._n * at)
      else:
        wanted = self._number(at // self._part, self._order[shard.device] * self._part + at % self._part)
      if not np.array_equal(np.asarray(shard.data), wanted):
        named.append(str(shard.device))
    return named

  def seconds(self, repetitions: int) -> float:
    """The median time of one collective, as this host sees it."""
    took = []
    for _ in range(repetitions):
      start = time.perf_counter()
      self._program(self._data, CHAINED).block_until_ready()
      took.append((time.perf_counter() - start) / CHAINED)
    return statistics_lib.median(took)

  def _places(self) -> np.ndarray:
    return np.arange(self._n * self._part, dtype=np.int64)

  def _number(self, device: int | np.ndarray, places: np.ndarray) -> np.ndarray:
    """What a device has for each place; sums of it too are modulo 2³²."""
    return (device * _BY_DEVICE + places * _BY_PLACE).astype(np.int32)[None]


def repetitions(one: float) -> int:
  """How often a collective that takes `one` second is timed."""
  return min(MOST, max(FEWEST, int(BUDGET / (one * CHAINED))))


# ------------------------------------------------------------------------------------------------------- training step


def mesh_sizes(devices: int, slices: int) -> config.Mesh:
  """A mesh over all devices with experts over up to 8 of them, and two or more along `data` if there are four."""
  expert = next(e for e in (8, 4, 2, 1) if devices // slices % e == 0 and (devices // e >= 2 or devices < 4))
  return config.Mesh(devices // expert, expert, 1, slices)


def tiny(folder: pathlib.Path, sizes: config.Mesh) -> config.Config:
  """Simulates and prepares users in `folder`, the same on every host, and returns the config of a tiny model."""
  simulation = Simulation(users=200, groups=(3,), items=64, events=(8, 16))
  simulate(simulation, folder / "log")
  raw = simulation_config(folder / "log")
  raw["data"]["memory"] = "256MB"
  raw["model"] = {
    "d_model": 16, "layers": 1, "moe_every": 1, "heads": 2, "experts": 8, "d_expert": 16, "max_events": 16,
  }  # fmt: skip
  mesh = {"data": sizes.data, "expert": sizes.expert, "tensor": sizes.tensor, "slices": sizes.slices}
  rows = sizes.data * sizes.expert
  raw["train"] = {"batch_rows": rows * math.ceil(16 / rows), "snapshots_per_row": 2, "mesh": mesh}
  cfg = config.resolve(raw)
  with contextlib.redirect_stderr(io.StringIO()):
    prepare.prepare(cfg)
  return cfg


class Training:
  """Steps of a tiny model on a mesh over all devices, its experts and the rows of its table spread over them."""

  def __init__(self) -> None:
    """Prepares the data in a directory of this host's own, which is gone afterwards."""
    self.sizes = mesh_sizes(jax.device_count(), device_mesh.slices(jax.devices()))
    self._mesh = device_mesh.make_mesh(self.sizes)
    with tempfile.TemporaryDirectory() as folder:
      self._cfg = tiny(pathlib.Path(folder), self.sizes)
      dataset = Dataset(self._cfg.data.path)
      self.dataset, self._schema = dataset.manifest["encoding_hash"], dataset.schema
      shard = device_mesh.host_rows(self._mesh, self._cfg.train.batch_rows)
      stream = iter(training_batches.training_batches(dataset, self._cfg, shard=shard))
      self._batches = [next(stream), next(stream)]
      drawn = training_batches.training_batches(dataset, self._cfg)
      self._measured = task_statistics.measure_tasks(
        self._cfg.active_tasks, dataset.schema.outputs, drawn, 4
      ).statistics
      stream.close()

  def run(self) -> dict[str, Any]:
    """Makes two steps; returns their losses, and how long each took: the first one compiles."""
    said: dict[str, Any] = {"dataset": self.dataset, "losses": [], "seconds": []}
    with jax.set_mesh(self._mesh):
      _, state = create_state(self._cfg, self._schema, self._mesh)
      step = compiled_program(self._cfg, self._schema, self._mesh).step
      constants = jax.tree.map(np.float32, self._measured)
      everywhere = jax.device_put(constants, NamedSharding(self._mesh, PartitionSpec()))
      for batch in self._batches:
        placed = jax.block_until_ready((state, place_on_mesh(batch, self._mesh)))[1]
        start = time.perf_counter()
        state, metrics = step(state, placed, everywhere)
        said["losses"].append(float(metrics.loss))
        said["seconds"].append(time.perf_counter() - start)
    return said
