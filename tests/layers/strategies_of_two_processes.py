"""One of two processes that together form a mesh of 8 devices and compare every strategy with the dense oracle."""

import oracle
import two_processes

from supermoe_jax import config, sharding

if __name__ == "__main__":
  two_processes.join()
  compared = 0
  for sizes in ((1, 8, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(config.Mesh(*sizes))
    for name in ("sorted", "all_to_all") if sizes[1] == 8 else ("all_to_all", "gather"):
      answer = oracle.on_mesh(mesh, name)
      for case in oracle.CASES:
        oracle.assert_equal(answer(case), oracle.on_one_device()(case))
        compared += 1
  print(f"{compared} comparisons equal")
