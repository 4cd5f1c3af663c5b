"""One of two processes that embed the users of a run together; it prints the numbers of the parts that it writes."""

import pathlib

import pyarrow as pa
import two_processes

if __name__ == "__main__":
  workdir, out, *days = two_processes.join()
  from supermoe_jax import hosts
  from supermoe_jax.serving import embed, part_files
  from supermoe_jax.training.run import Run

  write = part_files.write

  def told(work: pathlib.Path, number: int, *tables: pa.Table) -> None:
    print("wrote", number)
    write(work, number, *tables)

  part_files.write = told
  embed.embed(Run(workdir), days, pathlib.Path(out), rows_per_part=32)
  hosts.leave()
