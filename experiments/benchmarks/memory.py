"""What does a memory of a next-event head cost as the catalogue grows? Losses and rankings with it and without it.

    python experiments/benchmarks/memory.py
    … --items 10000 1000000     other sizes
    … --json FILE               all figures

`sampled` and `full` are a loss and its gradient by states and rows: 32 rows of 50 events and 4 snapshots, width 64, and
for `sampled` 1,024 drawn values. `rank` ranks 1,024 questions among all items. With a memory, the kinds `repeat` and
`follow` are looked up and counted within the same program. Programs take their turns, A B A B …; times are medians.
`rows` are the bytes of the followers, which a checkpoint holds too. `peak` is the most memory of the process (VmHWM)
after this size; sizes ascend.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from supermoe_jax.layers import catalogue
from supermoe_jax.layers.catalogue import Catalogue
from supermoe_jax.layers.catalogue_ranks import rank_codes
from supermoe_jax.layers.memory.head_memory import FOLLOWERS, FollowRows, FollowRule, HeadMemory
from supermoe_jax.training.sampled_softmax import draw_items, log_expected_count, sampled_softmax

ROWS, EVENTS, SNAPSHOTS, WIDTH, DRAWN, QUESTIONS = 32, 50, 4, 64, 1024, 1024
KINDS = ("repeat", "follow")
MOST_FULL = 100_000  # items; beyond, a full softmax is not what one trains with
CHUNK = 8192


class Histories(NamedTuple):
  """What a memory reads of rows, see `batch.Features`; they are arguments of the programs, else XLA folds them."""

  codes: jax.Array
  segment: jax.Array
  gap: jax.Array
  query_segment: jax.Array
  query_events: jax.Array


def make_rows(rows: int, snapshots: int, size: int, rng: np.random.Generator) -> Histories:
  """Returns rows of `EVENTS` events of one user each."""
  return Histories(
    codes=jnp.asarray(rng.integers(2, size, (rows, EVENTS, 1)), jnp.int32),
    segment=jnp.ones((rows, EVENTS), jnp.int32),
    gap=jnp.ones((rows, EVENTS), jnp.float32),
    query_segment=jnp.ones((rows, snapshots), jnp.int32),
    query_events=jnp.full((rows, snapshots), EVENTS, jnp.int32),
  )


def make_memory(size: int, rng: np.random.Generator) -> HeadMemory:
  """Returns a memory in which every value has as many followers as are kept."""
  memory = HeadMemory(KINDS, WIDTH, 0, size, rngs=nnx.Rngs(0))
  code = jnp.asarray(rng.integers(2, size, (size, FOLLOWERS)), jnp.int32)
  number = jnp.asarray(rng.random((size, FOLLOWERS)), jnp.float32)
  memory.fill(FollowRows(code, number, jnp.ones(size), jnp.ones(size), FollowRule()))
  return memory


def make_programs(items: int) -> tuple[dict[tuple[str, str], Callable[[], Any]], int]:
  """Returns a call for each measure, with a memory and without, and the bytes of the followers."""
  size, rng = items + 2, np.random.default_rng(0)
  memory, training = make_memory(size, rng), make_rows(ROWS, SNAPSHOTS, size, rng)
  graph, counts = nnx.split(memory)
  asked = make_rows(QUESTIONS, 1, size, rng)
  listed = Catalogue.of(jnp.asarray(rng.normal(size=(items, WIDTH)), jnp.float32) * WIDTH**-0.5)
  state = jnp.asarray(rng.normal(size=(ROWS, EVENTS + SNAPSHOTS, WIDTH + len(KINDS))), jnp.float32)
  question = jnp.asarray(rng.normal(size=(QUESTIONS, WIDTH + len(KINDS))), jnp.float32)
  target = jnp.asarray(rng.integers(2, size, state.shape[:2]), jnp.int32)
  drawn = draw_items("uniform", items, (DRAWN,), jax.random.key(0)) + 2
  log_count = log_expected_count("uniform", drawn, items, DRAWN)

  def remembered(counts: Any, training: Histories, remembers: bool) -> Any:
    return nnx.merge(graph, counts).counts(training, training=True) if remembers else ()

  def full(state: jax.Array, rows: jax.Array, counts: Any, training: Histories, *, remembers: bool) -> jax.Array:
    of = remembered(counts, training, remembers)
    return jnp.sum(catalogue.cross_entropy(state, target, listed._replace(rows=rows), CHUNK, of))

  def sampled(
    state: jax.Array, own: jax.Array, others: jax.Array, counts: Any, training: Histories, *, remembers: bool
  ) -> jax.Array:
    of = remembered(counts, training, remembers)
    return jnp.sum(sampled_softmax(state, own, target[..., None], others, drawn, log_count, of))

  def rank(question: jax.Array, rows: jax.Array, counts: Any, asked: Histories, *, remembers: bool) -> jax.Array:
    of: Any = ()
    if remembers:
      made = nnx.merge(graph, counts)
      of = made.at_snapshot([r.at(slice(EVENTS, None)) for r in made.counts(asked, training=False)])
    none = jnp.zeros((QUESTIONS, 1), jnp.int32)
    return rank_codes(question, 2 + none, none, listed._replace(rows=rows), CHUNK, of)

  vectors = listed.rows.reshape(-1, WIDTH)
  calls: dict[tuple[str, str], Callable[[], Any]] = {}
  for name, remembers in (("without", False), ("with", True)):
    s, q = (x if remembers else x[..., :WIDTH] for x in (state, question))
    ranked = jax.jit(functools.partial(rank, remembers=remembers))
    calls["rank", name] = functools.partial(ranked, q, listed.rows, counts, asked)
    by = jax.jit(jax.grad(functools.partial(sampled, remembers=remembers), argnums=(0, 1, 2)))
    own, others = vectors[target][..., None, :], vectors[drawn]
    calls["sampled", name] = functools.partial(by, s, own, others, counts, training)
    if items <= MOST_FULL:
      whole = jax.jit(jax.grad(functools.partial(full, remembers=remembers), argnums=(0, 1)))
      calls["full", name] = functools.partial(whole, s, listed.rows, counts, training)
  return calls, sum(x.nbytes for x in jax.tree.leaves(counts))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  found = []
  for items in sorted(args.items):
    calls, held = make_programs(items)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(args.rounds + 1):
      for key, call in calls.items():
        begun = time.perf_counter()
        jax.block_until_ready(call())
        if turn:  # the first one compiles
          times[key].append(time.perf_counter() - begun)
    median = {key: statistics.median(t) for key, t in times.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = {"items": items, "rows": held, "peak": peak}
    for measure in dict.fromkeys(m for m, _ in median):
      line[measure] = {name: median[measure, name] for name in ("without", "with")}
    found.append(line)
    shown = "; ".join(
      f"{m} {median[m, 'without']:.3f} s, with a memory {median[m, 'with']:.3f} s"
      for m in ("sampled", "full", "rank")
      if (m, "with") in median
    )
    print(f"{items:,} items: {shown}; rows {held / 2**20:,.0f} MiB; peak {peak / 2**30:.1f} GiB", flush=True)
  if args.json is not None:
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
