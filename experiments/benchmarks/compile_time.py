"""How long XLA compiles a training step of a shallow and of a deep model; the blocks are scanned, so it is the same.

    python experiments/benchmarks/compile_time.py [--layers 4 24] [--rounds 3] [--json FILE]

Forward and backward pass of the encoder's stack (width 128, 8 experts in every second block, 16 rows of 264
positions), compiled afresh A B A B …; medians.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from supermoe_jax.layers.attention import visibility
from supermoe_jax.layers.moe import Mlp, MoE
from supermoe_jax.layers.transformer import Block, Context, Stack

B, L, S, D = 16, 256, 8, 128


def block(place: int, rngs: nnx.Rngs) -> Block:
  feed_forward = MoE(D, 2 * D, 8, 2, rngs=rngs) if place == 1 else Mlp(D, 4 * D, rngs=rngs)
  return Block(D, 4, feed_forward, rngs=rngs)


def compile_seconds(layers: int) -> float:
  graph, state = nnx.split(nnx.eval_shape(lambda: Stack(block, layers, 2, rngs=nnx.Rngs(0))))
  visible, position = visibility(jnp.ones((B, L), int), jnp.ones((B, S), int), jnp.full((B, S), L))
  context = Context(position, position.astype(jnp.float32), visible, jnp.ones((B, L + S), bool))

  def loss(state: nnx.State, x: jax.Array) -> jax.Array:
    out = nnx.merge(graph, state)(x, context)
    return jnp.sum(out.x**2) + jnp.sum(out.experts.aux.balance_loss)

  begun = time.perf_counter()
  jax.jit(jax.value_and_grad(loss)).lower(state, jax.ShapeDtypeStruct((B, L + S, D), jnp.float32)).compile()
  return time.perf_counter() - begun


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--layers", type=int, nargs=2, default=(4, 24))
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--json", type=pathlib.Path)
  arguments = parser.parse_args()
  if min(*arguments.layers, arguments.rounds) < 1:
    parser.error("--layers and --rounds must be positive")
  if arguments.json and not arguments.json.parent.is_dir():
    parser.error(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
  compile_seconds(2)  # what JAX does once
  seconds: dict[int, list[float]] = {n: [] for n in arguments.layers}
  for _ in range(arguments.rounds):
    for layers in arguments.layers:
      seconds[layers].append(compile_seconds(layers))
      jax.clear_caches()
  medians = {n: statistics.median(s) for n, s in seconds.items()}
  few, many = arguments.layers
  ratio = medians[many] / medians[few]
  print(f"{few} layers {medians[few]:.2f} s, {many} layers {medians[many]:.2f} s: {ratio:.2f} times")
  if arguments.json:
    arguments.json.write_text(json.dumps({"seconds": medians, "ratio": ratio}, indent=1) + "\n")


if __name__ == "__main__":
  main()
