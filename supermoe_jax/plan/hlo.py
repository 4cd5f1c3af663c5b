"""Reading a compiled program: which collectives it has, how often each runs, and what it moves to and from memory.

XLA's own `cost_analysis` counts the body of a loop once, and tells nothing of collectives; the text of the optimised
program has both.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)

_BITS = {"pred": 8, "bf16": 16, "token": 0}  # others end in their bits: f32, s8, u4, f8e4m3fn

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_SHAPE = re.compile(r"(pred|token|[a-z]+\d+\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^{}]*)\}")

# They name or place values, and move none.
_NO_TRAFFIC = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
  *("partition-id", "replica-id", "opt-barrier", "iota", "copy-done", "async-done", "async-update"),
  *(f"{name}-done" for name in COLLECTIVES),
}

# What reads a part of its first operand, as large as its result; and what writes a part of it, as large as an operand.
_PARTLY_READ = {"dynamic-slice", "gather", "slice"}
_PARTLY_WRITTEN = {"dynamic-update-slice": 1, "scatter": 2}


class Shape(NamedTuple):
  """An array of a program. `tile` are the last dimensions that its layout fills up, such as (8, 128) on a TPU; `space`
  is the memory that holds it: 0 the device's main memory, others on the chip."""

  dtype: str
  dims: tuple[int, ...]
  order: tuple[int, ...]
  tile: tuple[int, ...]
  space: int

  @property
  def bytes(self) -> int:
    """Of the values alone."""
    return _bits(self.dtype) * math.prod(self.dims) // 8

  @property
  def padded(self) -> int:
    """What the array takes in memory, tiles filled up."""
    minor = [self.dims[i] for i in self.order] or [1]
    for i, size in enumerate(reversed(self.tile)):
      if i < len(minor):
        minor[i] = -(-minor[i] // size) * size
    return _bits(self.dtype) * math.prod(minor) // 8


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  found = re.match(r"[a-z]+(\d+)", dtype)
  return int(found[1]) if found else 32


def shapes(text: str) -> list[Shape]:
  """The arrays of a type, of which a tuple has several."""
  return [_shape(*found.groups()) for found in _SHAPE.finditer(text)]


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
  sizes = tuple(int(d.strip(" <=")) for d in dims.split(",") if d.strip())
  order, _, rest = (layout or "").partition(":")
  minor = tuple(int(i) for i in order.split(",") if i) or tuple(reversed(range(len(sizes))))
  tile = re.search(r"T\(([\d,]+)\)", rest)
  space = re.search(r"S\((\d+)\)", rest)
  sizes_of_tile = tuple(int(t) for t in tile[1].split(",")) if tile else ()
  return Shape(dtype, sizes, minor, sizes_of_tile, int(space[1]) if space else 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation.

  `type` is its result's, `rest` what follows its operands; those of a parameter or constant are its number or value.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  root: bool

  @functools.cached_property
  def shapes(self) -> list[Shape]:
    """Its results."""
    return shapes(self.type)

  @property
  def op_name(self) -> str:
    """What it was in the source: of an argument its path."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
    return found[1].replace("\\'", "'") if found else ""

  def called(self) -> dict[str, str]:
    """The computations that it runs, by the attribute that names them."""
    out: dict[str, str] = dict(_CALLED.findall(self.rest))
    for i, name in enumerate(n.strip(" %") for found in _BRANCHES.findall(self.rest) for n in found.split(",")):
      out[f"branch {i}"] = name
    return out


class Module(NamedTuple):
  """A program: its computations by name, and the one where it begins."""

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str


def parse(text: str) -> Module:
  """Reads a compiled program as XLA prints it."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = "", dict[str, Instruction]()
  for line in text.splitlines():
    if line.endswith("{") and (head := _COMPUTATION.match(line)):
      current = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif " = " in line and line.startswith("  "):
      instruction = _instruction(line.strip())
      if instruction is not None:
        current[instruction.name] = instruction
  return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
  root = line.startswith("ROOT ")
  name, _, right = line.removeprefix("ROOT ").partition(" = ")
  end = _closing(right) if right.startswith("(") else right.find(" ")
  kind, rest = right[:end], right[end:].lstrip()
  opcode, bracket, rest = rest.partition("(")
  if not bracket or not re.fullmatch(r"[\w\-]+", opcode):
    return None
  inside = rest[: _closing("(" + rest) - 2]
  literal = opcode in ("parameter", "constant")
  operands = (inside,) if literal else tuple(re.findall(r"%([\w.\-]+)", inside))
  return Instruction(name.lstrip("%"), kind, opcode, operands, rest[len(inside) + 1 :], root)


def _closing(text: str) -> int:
  """The place behind the bracket that closes the one that `text` begins with."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return i + 1
  return len(text)


class Runs(NamedTuple):
  """How often computations run, and which loops say nothing of their length, which are taken to run once."""

  times: Mapping[str, int]
  unknown: tuple[str, ...]


def runs(module: Module) -> Runs:
  """How often each computation runs in a run of the program; a loop's length is read from its condition.

  Of a conditional every branch counts.
  """
  times: dict[str, int] = {module.entry: 1}
  unknown: list[str] = []
  for name in _in_order(module):
    for instruction in module.computations[name].values():
      called = instruction.called()
      length = _length(instruction, module) if instruction.opcode == "while" else 1
      if length is None:
        unknown.append(instruction.op_name or instruction.name)
      for key, other in called.items():
        if other in module.computations and not _of_a_value(instruction, key):
          times[other] = times.get(other, 0) + times.get(name, 0) * (length or 1)
  return Runs(times, tuple(unknown))


def _of_a_value(instruction: Instruction, key: str) -> bool:
  """Whether what is called is what reduces or compares two values, which is no pass of its own."""
  return key == "to_apply" and instruction.opcode != "call"


def _in_order(module: Module) -> list[str]:
  """The computations that run, each after all that call it."""
  seen: set[str] = set()
  out: list[str] = []

  def visit(name: str) -> None:
    if name in seen or name not in module.computations:
      return
    seen.add(name)
    for instruction in module.computations[name].values():
      for other in instruction.called().values():
        visit(other)
    out.append(name)

  visit(module.entry)
  return out[::-1]


def _length(loop: Instruction, module: Module) -> int | None:
  """The number of passes of a loop that counts to a constant; None where it ends by what it finds."""
  known = re.search(r'known_trip_count[^{]*\{[^}]*?"?n"?\s*:\s*"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  condition = module.computations.get(loop.called().get("condition", ""), {})
  bounds = [i for i in condition.values() if i.opcode == "constant" and re.match(r"[su]32\[\]", i.type)]
  return int(bounds[0].operands[0]) if len(bounds) == 1 else None


# --------------------------------------------------------------------------------------------------------- collectives


class Collective(NamedTuple):
  """A collective of a program.

  Attributes:
    kind: one of `COLLECTIVES`.
    bytes: of what a device puts in, or, of an all-gather, has in the end; one time.
    times: how often it runs in a step.
    groups: the devices that take part in it together, by their places in the mesh; empty where the text does not tell.
    source: what it was in the source.
    network: whether it is the part of one that goes from slice to slice, which XLA:TPU hands to the hosts.
  """

  kind: str
  bytes: int
  times: int
  groups: tuple[tuple[int, ...], ...]
  source: str
  network: bool = False

  @property
  def members(self) -> int:
    """Devices of a group."""
    return len(self.groups[0]) if self.groups else 1

  @property
  def sent(self) -> float:
    """Bytes that a device sends in a step, by the algorithm that sends least: rings, or each to each directly."""
    share = (self.members - 1) / self.members
    once = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.kind, share)
    return once * self.bytes * self.times


def collectives(module: Module, devices: int) -> list[Collective]:
  """The collectives of a program for so many devices.

  XLA:TPU lays one that it overlaps with other work out over several fusions, a chain of one name: it counts once.
  """
  times = runs(module).times
  out: list[Collective] = []
  chains: dict[str, int] = {}
  for name, count in times.items():
    for instruction in module.computations[name].values():
      kind = instruction.opcode.removesuffix("-start")
      handed = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
      if kind == "send" and handed and count:
        size = instruction.shapes[0].bytes
        out.append(Collective(handed[1].lower().replace("_", "-"), size, count, (), instruction.op_name, True))
      if kind not in COLLECTIVES or not count:
        continue
      chain = "chain_id" in instruction.rest and re.search(r"channel_id=(\d+)", instruction.rest)
      if chain and chains.setdefault(chain[1], len(out)) < len(out):
        continue
      groups = _groups(instruction.rest, devices)
      size = _payload(instruction, kind, len(groups[0]) if groups else 1)
      out.append(Collective(kind, size, count, groups, instruction.op_name))
  return [c for c in out if c.members > 1 or c.network]


def _payload(instruction: Instruction, kind: str, members: int) -> int:
  found = instruction.shapes
  if instruction.opcode in ("all-gather-start", "collective-permute-start"):  # operands, results, and their state
    data = [s for s in found if s.dims]
    found = data[len(data) // 2 :]
  return sum(s.bytes for s in found) * (members if kind == "reduce-scatter" else 1)


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """Reads the forms in which XLA writes groups of devices."""
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
  return (tuple(range(devices)),) if "replica_groups={}" in text else ()


def _iota(dims: str | None, order: str | None, count: int) -> np.ndarray:
  ids = np.arange(count)
  if not dims:
    return ids
  grid = ids.reshape([int(n) for n in dims.split(",")])
  return grid.transpose([int(n) for n in order.split(",")]) if order else grid


def _rows(grid: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(int(n) for n in row) for row in grid.reshape(-1, grid.shape[-1]))


def _connected(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
  """The devices that a permutation moves values between, round after round."""
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


# -------------------------------------------------------------------------------------------------------------- traffic


def traffic(module: Module) -> int:
  """Bytes that a run of the program reads from and writes to a device's main memory, each fusion once.

  Of what is only looked up or written in part (a table, say), that part counts. What stays in the chip's own memory
  does not.
  """
  times = runs(module).times
  fused = {i.called().get("calls") for c in module.computations.values() for i in c.values() if i.opcode == "fusion"}
  total = 0
  for name, count in times.items():
    if name not in fused:
      computation = module.computations[name]
      total += count * sum(_moved(i, computation, module) for i in computation.values())
  return total


def _moved(instruction: Instruction, computation: Mapping[str, Instruction], module: Module) -> int:
  if instruction.opcode in _NO_TRAFFIC or (instruction.opcode == "custom-call" and not instruction.operands):
    return 0
  operands = [computation[o] for o in instruction.operands if o in computation]
  inner = module.computations.get(instruction.called().get("calls", ""), {}) if instruction.opcode == "fusion" else {}
  if inner:
    read = [_read_of(i, operand, inner) for i, operand in enumerate(operands)]
    return sum(read) + _written_by(inner, instruction)
  if instruction.opcode in _PARTLY_READ:
    return 2 * _resident(instruction) + sum(map(_resident, operands[1:]))
  if instruction.opcode in _PARTLY_WRITTEN:
    part = operands[_PARTLY_WRITTEN[instruction.opcode] :][:1]
    return 2 * sum(map(_resident, part))
  return sum(map(_resident, operands)) + _resident(instruction)


def _resident(instruction: Instruction) -> int:
  return sum(s.padded for s in instruction.shapes if s.space == 0)


def _read_of(index: int, operand: Instruction, inner: Mapping[str, Instruction]) -> int:
  """What a fusion reads of an operand."""
  whole = _resident(operand)
  parameter = next((i for i in inner.values() if i.opcode == "parameter" and i.operands == (str(index),)), None)
  if not whole or parameter is None:
    return whole
  parts = 0
  for user in _users(parameter.name, inner):
    if user.opcode in _PARTLY_READ and user.operands[0] == parameter.name:
      parts += sum(s.padded for s in user.shapes)
    elif user.opcode not in _PARTLY_WRITTEN or user.operands[0] != parameter.name:
      return whole
  return min(parts, whole)


def _users(name: str, inner: Mapping[str, Instruction]) -> Iterator[Instruction]:
  return (i for i in inner.values() if i.opcode != "parameter" and name in i.operands)


def _written_by(inner: Mapping[str, Instruction], fusion: Instruction) -> int:
  """What a fusion writes: of an operand that is changed in place, the part that changes."""
  root = next((i for i in inner.values() if i.root), None)
  results = [root] if root is not None else []
  if root is not None and root.opcode == "tuple":
    results = [inner[o] for o in root.operands if o in inner]
  if len(results) != len(fusion.shapes):
    return _resident(fusion)
  total = 0
  for result, shape in zip(results, fusion.shapes):
    while result.opcode in ("bitcast", "copy", "convert") and result.operands and result.operands[0] in inner:
      result = inner[result.operands[0]]
    if shape.space:
      continue
    place = _PARTLY_WRITTEN.get(result.opcode)
    part = inner.get(result.operands[place]) if place is not None and place < len(result.operands) else None
    total += shape.padded if part is None else sum(s.padded for s in part.shapes)
  return total
