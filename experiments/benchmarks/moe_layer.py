"""How long does a sparse MoE layer take? Every dispatch strategy against a dense MLP of as many FLOPs.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/benchmarks/moe_layer.py
    … --quick    the verdict only
    … --peers    Hugging Face's Mixtral block and st-moe-pytorch too

Forward, and forward with the gradients of input and parameters, float32, D 128, hidden 512, K 2, capacity factor 1.25.
The MLP has K times the hidden units. All are measured in turn, and a ratio is the median of those within a round.

Takes 6 minutes on 2 cores (AMD EPYC, JAX 0.10.2; 45 s with --quick). Forward and backward of 8,192 tokens there, in ms:

                          E 4     E 16     E 64
    sorted                 65       78       80
    sorted, dropless       68       87      111
    one-hot by 1024       190      211      209
    one-hot             1,706    2,847      884
    dense                 121      462    1,994
    ragged                205      884    7,818
    the dense MLP          66

With gated experts at E 16: sorted 114, dropless 187; Mixtral's block 181 (grouped_mm) to 193 (a loop over experts);
st-moe-pytorch 223. PyTorch's dense MLP takes 136.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from supermoe_jax import config, device_mesh, sharding
from supermoe_jax.layers import dispatch
from supermoe_jax.layers.dispatch import Dispatched, Tokens
from supermoe_jax.layers.experts import Experts
from supermoe_jax.layers.moe import Mlp, MoE

TOKENS, EXPERTS, REFERENCE = (2048, 8192, 16384), (4, 16, 64), 8192
GROUP = 1024  # tokens that share a mask, in the cheaper of the one-hot rivals
# A case that takes longer than SLOW times the MLP gets fewer of the rounds, but at least FEWEST.
SLOW, FEWEST = 3, 2


class Size(NamedTuple):
  """N tokens in rows of `length`; E experts of `hidden` units on width D, of which each token visits K."""

  tokens: int
  experts: int
  d: int = 128
  hidden: int = 512
  k: int = 2
  length: int = 128
  capacity_factor: float = 1.25


class Case(NamedTuple):
  """What is timed: `forward()`, and `train()`, which returns the output and the gradients of input and parameters."""

  forward: Callable[[], Any]
  train: Callable[[], Any]
  temp_mib: float | None = None  # XLA's temporary buffers in `train`
  dropped: float | None = None  # share of the choices


def one_hot(tokens: Tokens, experts: Experts, capacity_factor: float | None, group: int | None = None) -> Dispatched:
  """The usual way: one-hot masks `[G, S, E, C]` carry the S tokens of each of G groups (None: one group) by einsum.

  Source: arXiv 2006.16668.
  """
  experts = experts.whole()
  n, k = tokens.expert.shape
  size = min(group or n, n)
  capacity = size if capacity_factor is None else min(math.ceil(capacity_factor * k * size / experts.total), size)
  x, weight = tokens.x.reshape(n // size, size, -1), tokens.weight.reshape(n // size, size, k)
  choice = jax.nn.one_hot(jnp.where(tokens.valid[:, None], tokens.expert, -1), experts.total)
  count = choice.reshape(n // size, size * k, experts.total)
  choice = choice.reshape(n // size, size, k, experts.total)
  rank = jnp.sum((jnp.cumsum(count, axis=1) - count).reshape(choice.shape) * choice, axis=-1).astype(jnp.int32)
  place = jax.nn.one_hot(rank, capacity)  # [G, S, K, C], 0 for ranks from C on
  mask = jnp.einsum("gske,gskc->gsec", choice, place).astype(x.dtype)
  combine = jnp.einsum("gsk,gske,gskc->gsec", weight, choice, place)
  buffer = jnp.einsum("gsec,gsd->egcd", mask, x)
  out = experts(buffer.reshape(experts.total, -1, x.shape[-1])).reshape(buffer.shape)
  y = jnp.einsum("gsec,egcd->gsd", combine, out, preferred_element_type=jnp.float32)
  return Dispatched(y.reshape(n, -1), tokens.valid[:, None] & (rank.reshape(n, k) < capacity))


def one_hot_groups(tokens: Tokens, experts: Experts, capacity_factor: float | None) -> Dispatched:
  return one_hot(tokens, experts, capacity_factor, GROUP)


RIVALS: dict[str, dispatch.Strategy] = {"one-hot": one_hot, f"one-hot by {GROUP}": one_hot_groups}
# What a row of a table is called, and the dispatch strategy behind it.
OTHERS = ("all_to_all", "gather", f"one-hot by {GROUP}", "one-hot", "dense", "ragged")
VARIANTS = {"sorted": "sorted", "sorted, dropless": "sorted"} | {name: name for name in OTHERS}


def why_not(variant: str, size: Size) -> str | None:
  """Says why a variant is not measured on the mesh in use; None if it is."""
  ways, cpu = sharding.ways("expert"), sharding.platform() == "cpu"
  if size.experts % ways:
    return f"{size.experts} experts do not divide by {ways} devices"
  if variant == "ragged" and cpu and ways > 1:
    return "XLA:CPU has no ragged all-to-all"
  if variant in ("dense", "ragged") and cpu and size.tokens * size.experts > 64 * REFERENCE:
    return "on CPU it costs E times the work"
  if variant == "one-hot" and cpu and size.tokens > REFERENCE:
    return "its masks take 10 GiB"
  return None


def inputs(size: Size) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns random tokens `[B, L, D]`, which of them are valid (all), and the gradient of a loss at the output."""
  shape = (size.tokens // size.length, size.length)
  x, cotangent = (jax.random.normal(jax.random.key(seed), (*shape, size.d)) for seed in (1, 2))
  return x, jnp.ones(shape, bool), cotangent


def case(variant: str, size: Size, mesh: jax.sharding.Mesh, activation: str = "gelu") -> Case:
  """Compiles a variant, or "mlp", on `mesh`, which is the one in use."""

  def make() -> nnx.Module:
    if variant == "mlp":
      return Mlp(size.d, size.k * size.hidden, activation=activation, rngs=nnx.Rngs(0))
    how: dict[str, Any] = {"dispatch": VARIANTS[variant], "activation": activation}
    return MoE(size.d, size.hidden, size.experts, size.k, capacity_factor=size.capacity_factor, **how, rngs=nnx.Rngs(0))

  def forward(state: nnx.State, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, Any, Any]:
    module: Any = nnx.merge(graph, state)
    if variant == "mlp":
      return module(x), 0.0, 0.0
    out = module(x, valid, dropless="dropless" in variant)
    regularisers = 0.01 * out.aux.balance_loss + 1e-3 * out.aux.z_loss
    return out.y, regularisers, out.stats.dropped / (out.stats.dropped + out.stats.routed)

  def train(state: nnx.State, x: jax.Array, valid: jax.Array, cotangent: jax.Array) -> Any:
    def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
      y, aux, _ = forward(state, x, valid)
      return jnp.vdot(y, cotangent) + aux, y  # y is returned, or XLA would leave out products that only y needs

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

  with mock.patch.dict(dispatch.STRATEGIES, RIVALS):
    graph, state = nnx.split(sharding.create(make, mesh))
    arguments = jax.device_put(inputs(size), sharding.batch_sharding(mesh))
    run = jax.jit(forward).lower(state, *arguments[:2]).compile()
    step = jax.jit(train).lower(state, *arguments).compile()
  memory = step.memory_analysis()
  return Case(
    lambda: jax.block_until_ready(run(state, *arguments[:2])),
    lambda: jax.block_until_ready(step(state, *arguments)),
    memory.temp_size_in_bytes / 2**20 if memory else None,
    None if variant == "mlp" else float(run(state, *arguments[:2])[2]),
  )


class Times:
  """Seconds of `forward` and `train` of each case, measured in turn, A B A B …, so that all see the same machine."""

  def __init__(self, cases: dict[str, Case], rounds: int, bar: tqdm, reference: str = "mlp"):
    self.cases, self.reference = cases, reference
    self.seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "train": []} for name in cases}
    first = {}
    for name, one in cases.items():
      bar.set_postfix_str(f"{name}, first call")
      one.forward()
      first[name] = _seconds(one.train)
    allowed = {n: max(FEWEST, round(rounds * min(1, SLOW * first[reference] / t))) for n, t in first.items()}
    for i in range(rounds):
      for name in cases:
        if i < allowed[name]:
          bar.set_postfix_str(f"{name}, round {i + 1} of {allowed[name]}")
          for kind, measured in self.seconds[name].items():
            measured.append(_seconds(getattr(cases[name], kind)))
          if allowed[name] < rounds:
            cases[reference].train()  # not timed: what runs after gigabytes were freed is slower
      bar.update()

  def ratio(self, name: str, other: str, kind: str = "train") -> float:
    """The median of the ratio within a round, over the rounds that have both."""
    return statistics.median(a / b for a, b in zip(self.seconds[name][kind], self.seconds[other][kind]))

  def row(self, name: str) -> dict[str, Any]:
    """A row of a table, as it goes to JSON."""
    out: dict[str, Any] = {"strategy": name, "rounds": len(self.seconds[name]["train"])}
    for kind, measured in self.seconds[name].items():
      out[f"{kind}_ms"] = 1e3 * statistics.median(measured)
      out[f"{kind}_ratio"] = self.ratio(name, self.reference, kind)
    return out | {"temp_mib": self.cases[name].temp_mib, "dropped": self.cases[name].dropped}


def _seconds(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def measure(size: Size, mesh: jax.sharding.Mesh, rounds: int, bar: tqdm) -> list[dict[str, Any]]:
  """Measures the MLP and the variants; returns a row for each, of one not measured with the reason."""
  with jax.set_mesh(mesh):
    same = ("all_to_all", "gather") if sharding.ways("expert") == 1 else ()  # as "sorted"
    reasons = {variant: why_not(variant, size) for variant in VARIANTS if variant not in same}
    cases = {}
    for variant in ("mlp", *(v for v, reason in reasons.items() if reason is None)):
      bar.set_postfix_str(f"{variant}, compiling")
      cases[variant] = case(variant, size, mesh)
    times = Times(cases, rounds, bar)
  rows = [times.row(name) for name in cases]
  rows += [{"strategy": v, "not_measured": reason} for v, reason in reasons.items() if reason]
  return [{"tokens": size.tokens, "experts": size.experts} | row for row in rows]


def verdict(mesh: jax.sharding.Mesh, rounds: int, bar: tqdm) -> list[dict[str, Any]]:
  """Measures what the targets speak of; returns a row for each that applies here."""

  def compiled(*wanted: tuple[str, int]) -> dict[str, Case]:
    sizes = {f"{variant} E {experts}": (variant, Size(REFERENCE, experts)) for variant, experts in wanted}
    return {name: case(*arguments, mesh) for name, arguments in sizes.items() if why_not(*arguments) is None}

  bar.set_postfix_str("compiling")
  with jax.set_mesh(mesh):
    grouped = 1 / 8 if sharding.platform() == "cpu" else None  # elsewhere ragged_dot is one kernel, not E products
    fast = {"mlp": case("mlp", Size(REFERENCE, 0), mesh)} | compiled(*(("sorted", e) for e in EXPERTS))
    slow = {"mlp": fast["mlp"]} | compiled(("sorted", 16), ("ragged", 16), *((rival, 16) for rival in RIVALS))
    # Apart, since gigabytes of buffers disturb what runs next.
    runs = Times(fast, rounds, bar), Times(slow, max(FEWEST, rounds // 3), bar)
  pairs = [("sorted E 16", "mlp", 1.35), ("sorted E 64", "sorted E 4", 1.3), ("sorted E 16", "ragged E 16", grouped)]
  pairs += [("sorted E 16", "one-hot E 16", 1 / 2), ("sorted E 16", f"one-hot by {GROUP} E 16", None)]
  one = mesh.size == 1  # the targets are for one device: on more, 'sorted' is not what one would choose
  rows = []
  for a, b, target in pairs:
    if times := next((t for t in runs if a in t.cases and b in t.cases), None):
      ms = {"case_ms": times.row(a)["train_ms"], "to_ms": times.row(b)["train_ms"]}
      rows.append({"case": a, "to": b, "ratio": times.ratio(a, b), "target": target if one else None} | ms)
  return rows


def keep_freed_memory() -> None:
  """Lets glibc keep what is freed, for all that is timed alike: a figure is the work, not the clearing of fresh pages.

  Without, a step of many experts meets 5 to 23 thousand page faults, by luck, since it returns larger gradients.
  """
  if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # as in malloc.h
    for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1)):
      libc.mallopt(parameter, value)


def machine() -> dict[str, Any]:
  device, kind = jax.devices()[0], jax.devices()[0].device_kind
  if device.platform == "cpu" and (info := pathlib.Path("/proc/cpuinfo")).exists():
    kind = next((s.split(":")[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")), kind)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  versions = {"jax": jax.__version__, "glibc_tunables": os.getenv("GLIBC_TUNABLES", "")}
  return {"device": kind, "devices": jax.device_count(), "cores": cores} | versions


def table(rows: list[dict[str, Any]]) -> str:
  lines = [f"{'':24}{'E':>3}{'forward':>13}{'+ backward':>13}{'ratio to MLP':>16}{'memory':>12}{'dropped':>9}"]
  for r in rows:
    if "not_measured" in r:
      lines.append(f"{r['strategy']:24}{r['experts']:>3}  not measured: {r['not_measured']}")
      continue
    memory = "" if r["temp_mib"] is None else f"{r['temp_mib']:,.0f} MiB"
    dropped = "" if r["dropped"] is None else f"{r['dropped']:.1%}"
    lines.append(
      f"{r['strategy']:24}{'' if r['strategy'] == 'mlp' else r['experts']:>3}{r['forward_ms']:>10,.1f} ms"
      f"{r['train_ms']:>10,.1f} ms{r['forward_ratio']:>9.2f}{r['train_ratio']:>7.2f}{memory:>12}{dropped:>9}"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
  parser.add_argument("--rounds", type=int, default=15, help="how often the verdict times a case; tables: a third")
  parser.add_argument("--quick", action="store_true", help=f"only the verdict, at {REFERENCE} tokens")
  parser.add_argument("--peers", action="store_true", help="also MoE layers of PyTorch libraries")
  args = parser.parse_args()
  if args.rounds < FEWEST:
    parser.error(f"--rounds {args.rounds} must be at least {FEWEST}")
  if args.peers:
    try:
      import moe_peers
    except ImportError as error:
      parser.error(f"--peers: {error}; pip install torch==2.13.0 transformers st-moe-pytorch")
  if args.json:
    try:
      args.json.open("a").close()
    except OSError as error:
      parser.error(f"--json {args.json} cannot be written: {error.strerror}")

  keep_freed_memory()  # before XLA starts its threads
  here = machine()
  found: dict[str, Any] = {"machine": here}
  print(f"{here['device']} × {here['devices']}, {here['cores']} cores, JAX {here['jax']}, {here['glibc_tunables']}")
  if jax.default_backend() == "cpu" and sys.platform == "linux" and "hugetlb" not in here["glibc_tunables"]:
    print("note: with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 much less time goes to page faults")
  mesh = device_mesh.make_mesh(config.Mesh(expert=jax.device_count()))
  few = max(FEWEST, args.rounds // 3)
  found["tables"] = []
  sizes = [] if args.quick else [Size(n, e) for n in TOKENS for e in EXPERTS]
  with tqdm(total=(len(sizes) + 1) * few + args.rounds * (1 + args.peers), leave=False, disable=None) as bar:
    for size in sizes:
      bar.set_description(f"{size.tokens} tokens, E {size.experts}")
      found["tables"] += measure(size, mesh, few, bar)
      if size.experts == EXPERTS[-1]:
        rows = [r for r in found["tables"] if r["tokens"] == size.tokens]
        bar.write(f"\n{size.tokens} tokens, all valid, to a new router, which drops few\n{table(rows)}")
    bar.set_description("verdict")
    found["verdict"] = verdict(mesh, args.rounds, bar)
    bar.write(f"\nverdict: forward + backward, {REFERENCE} tokens")
    for r in found["verdict"]:
      goal = "" if r["target"] is None else f", target ≤ {r['target']:.3g}"
      met = "" if r["target"] is None else ": met" if r["ratio"] <= r["target"] else ": missed"
      bar.write(f"{r['case']} {r['case_ms']:.1f} ms, {r['to']} {r['to_ms']:.1f} ms, ratio {r['ratio']:.3f}{goal}{met}")
    if args.peers:
      bar.set_description("peers")
      found["peers"] = moe_peers.measure(mesh, args.rounds, bar)
      bar.write(f"\ngated experts (SwiGLU; st-moe-pytorch: GEGLU), {REFERENCE} tokens\n{table(found['peers'])}")
  if args.json:
    args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()
