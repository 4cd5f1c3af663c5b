"""Lists the collectives of a compiled program: their kinds, how often each runs, and between which devices."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from supermoe_jax.plan.hlo import HloModule, Instruction, count_runs

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)


class Collective(NamedTuple):
  """Collective operation of a program.

  Attributes:
    kind: one of `COLLECTIVES`.
    bytes: bytes that a device puts in or, for an all-gather, has in the end; in one execution.
    times: executions in a step.
    groups: the groups of devices that take part together, as places in the mesh; groups of slices with `network`.
    source: its name in the source program.
    network: True for the part of a collective between slices, which XLA:TPU hands to the hosts.
  """

  kind: str
  bytes: int
  times: int
  groups: tuple[tuple[int, ...], ...]
  source: str
  network: bool = False

  @property
  def members(self) -> int:
    """Returns the number of devices, or slices, in a group."""
    return len(self.groups[0])

  @property
  def sent(self) -> float:
    """Returns the bytes that a device sends in a step, by the algorithm that sends least: rings, or direct messages."""
    share = (self.members - 1) / self.members
    once = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.kind, share)
    return once * self.bytes * self.times


def read_collectives(module: HloModule, devices: int, slices: int = 1) -> list[Collective]:
  """Returns the collectives of a program for `devices` devices in `slices` slices.

  XLA:TPU splits a collective that it overlaps with other work into several fusions, a chain of one name. The chain
  counts once.
  """
  times = count_runs(module).times
  out: list[Collective] = []
  chains: dict[str, int] = {}
  for name, count in times.items():
    for instruction in module.computations[name].values():
      kind = instruction.opcode.removesuffix("-start")
      handed = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
      if kind == "send" and handed:
        kind, size = handed[1].lower().replace("_", "-"), instruction.shapes[0].bytes
        size *= slices if kind == "all-gather" else 1
        out.append(Collective(kind, size, count, (tuple(range(slices)),), instruction.op_name, network=True))
        continue
      if kind not in COLLECTIVES:
        continue
      chain = "chain_id" in instruction.rest and re.search(r"channel_id=(\d+)", instruction.rest)
      if chain and chains.setdefault(chain[1], len(out)) < len(out):
        continue
      groups = _groups(instruction.rest, devices)
      size = _payload(instruction, kind, len(groups[0]))
      out.append(Collective(kind, size, count, groups, instruction.op_name))
  return [c for c in out if c.members > 1]


def _payload(instruction: Instruction, kind: str, members: int) -> int:
  found = instruction.shapes
  if instruction.opcode in ("all-gather-start", "collective-permute-start"):  # holds operands, results, and their state
    data = [s for s in found if s.dims]
    found = data[len(data) // 2 :]
  return sum(s.bytes for s in found) * (members if kind == "reduce-scatter" else 1)


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """Reads groups of devices in any of the forms in which XLA writes them."""
  mesh = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]*)\](?:T\(([\d,]*)\))?\))? \{([^}]*)\}", text
  )
  if mesh:
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])]
    ids = _iota(mesh[2], mesh[3], math.prod(size for _, size in axes))
    chosen = re.findall(r"'([^']+)'", mesh[4])
    grid = ids.reshape([size for _, size in axes])
    last = [i for i, (name, _) in enumerate(axes) if name in chosen]
    first = [i for i in range(len(axes)) if i not in last]
    return _rows(grid.transpose(first + last).reshape(-1, math.prod(axes[i][1] for i in last)))
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  if iota:
    sizes = [int(n) for n in iota[1].split(",")]
    return _rows(_iota(iota[2], iota[3], math.prod(sizes)).reshape(sizes))
  lists = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text)
  if lists:
    return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", lists[1]))
  pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text)
  if pairs:
    return _connected([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
  if "replica_groups={}" in text:
    return (tuple(range(devices)),)
  raise ValueError(f"this version of JAX writes groups of devices in an unknown form: {text[:200]}")


def _iota(dims: str | None, order: str | None, count: int) -> np.ndarray:
  ids = np.arange(count)
  if not dims:
    return ids
  grid = ids.reshape([int(n) for n in dims.split(",")])
  return grid.transpose([int(n) for n in order.split(",")]) if order else grid


def _rows(grid: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(int(n) for n in row) for row in grid.reshape(-1, grid.shape[-1]))


def _connected(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
  """Returns the groups of devices that the pairs of a permutation connect, directly or through other pairs."""
  group = {d: d for pair in pairs for d in pair}

  def top(d: int) -> int:
    while group[d] != d:
      d = group[d]
    return d

  for a, b in pairs:
    group[top(a)] = top(b)
  found: dict[int, list[int]] = {}
  for d in sorted(group):
    found.setdefault(top(d), []).append(d)
  return tuple(map(tuple, found.values()))
