"""One of two processes that together form a mesh of 8 devices and train a table, as one process does."""

import numpy as np
import table_case
import two_processes

from supermoe_jax import config, sharding

if __name__ == "__main__":
  two_processes.join()
  compared = 0
  for sizes in ((8, 1, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(config.Mesh(*sizes))
    for name in ("adagrad", "adam"):
      made = table_case.batches(0, table_case.STEPS, table_case.SIZE)
      wanted, counts = table_case.reference(table_case.SIZE, table_case.OPTIMIZERS[name], made)
      rows, seen = table_case.run(mesh, table_case.SIZE, table_case.OPTIMIZERS[name], made)
      np.testing.assert_allclose(rows, wanted, atol=1e-6)
      np.testing.assert_array_equal(seen[:, 1], counts[:, 1])
      compared += 1
  print(f"{compared} comparisons equal")
