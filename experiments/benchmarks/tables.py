"""What does a step of an embedding table cost as the table grows? Sparse updates beside optax' Adam on the whole table.

    python experiments/benchmarks/tables.py
    … --rows 100000 1000000     other sizes
    … --optimizer adam          instead of row-wise Adagrad
    … --json FILE               all figures

A step looks up 12,800 ids, width 64, takes the gradient of a loss of what came, and moves the rows: forward, backward
and update in one donated program. Every table lives in a process of its own, and the processes take their turns, A B C
…, so that all see the same machine. Ids fall by Zipf's law, as items do, or evenly over the whole table, which is the
worst for caches and makes every id a row of its own.

`peak` is the most memory that creating the table and training it took, as a multiple of table and accumulators: the
most that was allocated at a time, beyond what was before, and beyond `step`, the buffers that a step takes however
small the table is, as XLA counts them for 12,800 rows. `RSS` is the same as the system counts it (VmHWM), with what
malloc keeps of buffers that are free: some MiB, much beside a small table and nothing beside a large one.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing as mp
import os
import pathlib
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm

IDS, WIDTH, BATCH = 12_800, 64, 128
STEPS, ROUNDS, BATCHES = 10, 25, 20
SIZES = (100_000, 1_000_000, 10_000_000, 30_000_000)
ZIPF = 1.2  # frequencies of ids fall as rank^-1.2, as of items; ranks beyond the table are drawn evenly
DRAWS = ("zipf", "even")


def ids(size: int, draw: str, seed: int) -> Any:
  """`[128, 100]` codes, drawn by Zipf's law or evenly from the whole table, the worst that caches can meet."""
  import numpy as np

  rng = np.random.default_rng(seed)
  code, anywhere = rng.zipf(ZIPF, (BATCH, IDS // BATCH)) + 1, rng.integers(2, size, (BATCH, IDS // BATCH))
  return np.where((draw == "even") | (code >= size), anywhere, code).astype(np.int32)


class _MallInfo(ctypes.Structure):
  """glibc's mallinfo2."""

  _names = ("arena", "pieces", "fast", "maps", "mapped", "highest", "fast_free", "used", "free", "top")
  _fields_ = [(name, ctypes.c_size_t) for name in _names]


LIBC = ctypes.CDLL(None)
LIBC.mallinfo2.restype = _MallInfo


def allocated() -> int:
  """Bytes that this process has allocated and not freed; XLA:CPU's buffers come from malloc."""
  told = LIBC.mallinfo2()
  return told.used + told.mapped


def resident(line: str) -> int:
  """Bytes of memory that this process holds: "VmRSS" now, "VmHWM" at most since a `Peak` began."""
  (found,) = (x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith(line))
  return int(found.split()[1]) * 1024


class Peak:
  """What is taken inside `with`, at most and beyond what was before, bytes: `allocated` and `resident`.

  What is allocated is looked at ten times a millisecond, while a step takes some.
  """

  def __enter__(self) -> Peak:
    gc.collect()
    LIBC.malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    self._before = allocated(), resident("VmRSS")
    self._most, self._over = 0, threading.Event()
    self._watch = threading.Thread(target=self._look, daemon=True)
    self._watch.start()
    return self

  def _look(self) -> None:
    while not self._over.wait(1e-4):
      self._most = max(self._most, allocated())

  def __exit__(self, *_: object) -> None:
    self._over.set()
    self._watch.join()
    self.allocated, self.resident = self._most - self._before[0], resident("VmHWM") - self._before[1]


def serve(pipe: Connection, size: int, optimizer: str) -> None:
  """Builds a table, then runs `n` steps of a kind of ids whenever it is told so, and answers with seconds a step."""
  import jax
  import jax.numpy as jnp

  made = {draw: [jnp.asarray(ids(size, draw, seed)) for seed in range(BATCHES)] for draw in DRAWS}
  target = jax.random.normal(jax.random.key(0), (BATCH, IDS // BATCH, WIDTH))
  kind = dense if optimizer == "dense adam" else sparse
  create, program = (jax.jit(f, donate_argnums=n) for f, n in zip(kind(size, optimizer, target), ((), (0, 1))))
  told, state = {"step": buffers(kind, optimizer, target)}, []
  for _ in range(2):  # the first time compiles
    state.clear()
    with Peak() as peak:
      state = [*create()]
      for codes in made["even"]:
        *state[:], last = program(*state, codes)
        last.block_until_ready()
        time.sleep(0.01)  # XLA frees a step's buffers a little later; the next step would take its own beside them
  told |= {"peak": peak.allocated, "peak_resident": peak.resident}
  pipe.send(told | {"bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state))})
  at = 0
  while (asked := pipe.recv()) is not None:
    draw, n = asked
    begun = time.perf_counter()
    for _ in range(n):
      *state[:], last = program(*state, made[draw][at % BATCHES])
      at += 1
    last.block_until_ready()
    pipe.send((time.perf_counter() - begun) / n)


def buffers(kind: Callable[..., Any], optimizer: str, target: Any) -> int:
  """Bytes that a step takes beside its arguments and what becomes of them, for a table of as many rows as ids."""
  import jax

  create, step = kind(IDS, optimizer, target)
  program = jax.jit(step, donate_argnums=(0, 1)).lower(*jax.eval_shape(create), ids(IDS, "even", 0)).compile()
  asks = program.memory_analysis()
  return asks.temp_size_in_bytes + asks.output_size_in_bytes - asks.alias_size_in_bytes


def sparse(size: int, optimizer: str, target: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """`EmbeddingTable` and a row optimizer: what makes `rows, slots`, and a step `rows, slots, codes → …, loss`."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from supermoe_jax import config
  from supermoe_jax.layers import exchange, table
  from supermoe_jax.training import row_optimizers, table_step

  mover = row_optimizers.make_row_optimizer(config.Tables(optimizer=optimizer))

  def create() -> Any:
    rows = table.EmbeddingTable(size, WIDTH, rngs=nnx.Rngs(0)).rows.get_value()
    return rows, table_step.row_state(mover, rows, WIDTH)

  def step(rows: Any, slots: Any, codes: Any) -> Any:
    extent = exchange.Extent(size, rows.shape[1])
    asked, _ = table.distinct_codes(codes, extent)
    found = table.fetch(rows, asked, extent)

    def loss(vectors: Any) -> Any:
      return jnp.mean(jnp.square(table.look_up(table.Fetched(asked, vectors), codes, extent) - target))

    value, gradient = jax.value_and_grad(loss)(found.rows)
    touched = table.collect(rows, asked, gradient)
    rows, slots = table_step.move_rows(rows, slots, touched, table_step.MoveRule(mover, 0.05))
    return rows, slots, value

  return create, step


def dense(size: int, optimizer: str, target: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The same by a parameter like any other, and optax."""
  import jax
  import jax.numpy as jnp
  import optax

  adam = optax.adam(1e-3)

  def create() -> Any:
    rows = jax.random.normal(jax.random.key(0), (size, WIDTH)) * WIDTH**-0.5
    return rows, adam.init(rows)

  def step(rows: Any, moments: Any, codes: Any) -> Any:
    value, gradient = jax.value_and_grad(lambda rows: jnp.mean(jnp.square(rows[codes] - target)))(rows)
    updates, moments = adam.update(gradient, moments)
    return optax.apply_updates(rows, updates), moments, value

  return create, step


def free() -> int:
  """Bytes of memory that are free."""
  (line,) = (part for part in pathlib.Path("/proc/meminfo").read_text().splitlines() if part.startswith("MemAvailable"))
  return int(line.split()[1]) * 1024


def measure(cases: list[tuple[str, int]], rounds: int, steps: int) -> list[dict[str, Any]]:
  """Figures of each `(optimizer, rows)`, all measured in turn; a case that does not fit into memory says so."""
  spawn = mp.get_context("spawn")
  rows, running = [], []
  for optimizer, size in cases:
    numbers = {"dense adam": 4, "adam": 3}.get(optimizer, 1)  # of the table's size; the gradient is one
    row: dict[str, Any] = {"optimizer": optimizer, "rows": size}
    rows.append(row)
    if numbers * size * WIDTH * 4 * 1.15 > free():
      row["not_measured"] = "does not fit into memory"
      continue
    mine, other = spawn.Pipe()
    process = spawn.Process(target=serve, args=(other, size, optimizer), daemon=True)
    process.start()
    other.close()
    row |= mine.recv()
    row["seconds"] = {draw: [] for draw in DRAWS}
    running.append((mine, process, row))
  bar = tqdm(total=rounds * len(DRAWS) * len(running), unit=" turns")
  for i in range(rounds * len(DRAWS)):
    for pipe, _, row in running:
      draw = DRAWS[i % len(DRAWS)]
      pipe.send((draw, steps))
      row["seconds"][draw].append(pipe.recv())
      bar.update()
  bar.close()
  for pipe, process, row in running:
    pipe.send(None)
    process.join()
    for peak in ("peak", "peak_resident"):
      row[f"{peak}_ratio"] = (row[peak] - row["step"]) / row["bytes"]
  first = {row["optimizer"]: row["seconds"] for _, _, row in reversed(running)}
  for _, _, row in running:
    for draw, seconds in row["seconds"].items():
      row[f"{draw}_ms"] = 1e3 * statistics.median(seconds)
      row[f"{draw}_ratio"] = statistics.median(a / b for a, b in zip(seconds, first[row["optimizer"]][draw]))
  return rows


def table_of(rows: list[dict[str, Any]]) -> str:
  """The figures for people."""
  titles = f"{'ms, zipf':>10}{'ratio':>7}{'ms, even':>10}{'ratio':>7}{'MiB':>9}{'step':>6}{'peak':>7}{'RSS':>7}"
  lines = [f"{'optimizer':12}{'rows':>12}{titles}"]
  for row in rows:
    head = f"{row['optimizer']:12}{row['rows']:>12,}"
    if "not_measured" in row:
      lines.append(f"{head}  {row['not_measured']}")
      continue
    times = "".join(f"{row[f'{draw}_ms']:>10.2f}{row[f'{draw}_ratio']:>7.2f}" for draw in DRAWS)
    peaks = f"{row['peak_ratio']:>7.3f}{row['peak_resident_ratio']:>7.3f}"
    lines.append(f"{head}{times}{row['bytes'] / 2**20:>9.1f}{row['step'] / 2**20:>6.1f}{peaks}")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, nargs="+", default=SIZES)
  parser.add_argument("--optimizer", choices=("adagrad", "adam", "sgd"), default="adagrad")
  parser.add_argument("--rounds", type=int, default=ROUNDS)
  parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
  args = parser.parse_args()
  if args.json:
    try:
      args.json.open("a").close()
    except OSError as error:
      parser.error(f"--json {args.json} cannot be written: {error.strerror}")
  # As `make` has it: XLA's buffers come from malloc, and huge pages spare most of their page faults.
  os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
  # The dense ones come last: each of them needs four times its table.
  cases = [(args.optimizer, n) for n in args.rows] + [("dense adam", n) for n in args.rows if n <= 1_000_000]
  rows = measure(cases, args.rounds, STEPS)
  print(table_of(rows))
  if args.json:
    args.json.write_text(json.dumps({"ids": IDS, "width": WIDTH, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
  main()
