"""Compiles an exported program for a chip of TPU, without one, and prints one line of JSON about it.

Arguments: the encoder's directory, B, L.
"""

import json
import sys

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from supermoe_jax.serving import loader, program

# What makes a program quick is left out: it takes most of the time.
LEAST = {"exec_time_optimization_effort": -1.0}


def main(path: str, batch: int, length: int) -> None:
  with jax.default_device(jax.devices("cpu")[0]):
    encoder = loader.load(path)
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  chip = SingleDeviceSharding(topology.devices[0])
  shapes = program.shapes(encoder.parameters, encoder.padding[length], batch)
  placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=chip), shapes)
  compiled = jax.jit(encoder.programs[batch, length].call).lower(*placed).compile(LEAST)
  (out,) = jax.tree.leaves(compiled.out_info)
  print(json.dumps({"shape": out.shape, "platform": topology.devices[0].platform}))


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
