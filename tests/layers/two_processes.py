"""One of two processes that together form a mesh of 8 devices and compare every strategy with the dense oracle."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import oracle

from supermoe_jax import config, sharding

if __name__ == "__main__":
  port, process = sys.argv[1:]
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
  assert len(jax.devices()) == 8
  assert len(jax.local_devices()) == 4
  compared = 0
  for sizes in ((1, 8, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(config.Mesh(*sizes))
    for name in ("sorted", "all_to_all") if sizes[1] == 8 else ("all_to_all", "gather"):
      answer = oracle.on_mesh(mesh, name)
      for case in oracle.CASES:
        oracle.assert_equal(answer(case), oracle.on_one_device()(case))
        compared += 1
  print(f"{compared} comparisons equal")
