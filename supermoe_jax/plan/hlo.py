"""Reads a compiled program as XLA prints it: its computations, and how often each runs.

XLA's own `cost_analysis` counts the body of a loop once and leaves out collectives; the text has both. `collectives`
and `traffic` build on this module.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "token": 0}  # other names hold their bits: f32, s8, u4, f8e4m3fn

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_SHAPE = re.compile(r"(pred|token|[a-z]+\d+\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^{}]*)\}")


class Shape(NamedTuple):
  """Array of a program.

  `tile` holds the last dimensions that its layout fills up, such as (8, 128) on a TPU. `space` is the memory that holds
  the array: 0 is the device's main memory, others are on the chip.
  """

  dtype: str
  dims: tuple[int, ...]
  order: tuple[int, ...]
  tile: tuple[int, ...]
  space: int

  @property
  def bytes(self) -> int:
    """Returns the bytes of the values alone."""
    return _bits(self.dtype) * math.prod(self.dims) // 8

  @property
  def padded(self) -> int:
    """Returns the bytes that the array takes in memory, with tiles filled up."""
    minor = [self.dims[i] for i in self.order] or [1]
    for i, size in enumerate(reversed(self.tile)):
      if i < len(minor):
        minor[i] = -(-minor[i] // size) * size
    return _bits(self.dtype) * math.prod(minor) // 8


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  return int("".join(re.findall(r"^[a-z]+(\d+)", dtype)))


def parse_shapes(text: str) -> list[Shape]:
  """Returns the arrays of a type; a tuple type has several."""
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
  """Line of a computation.

  `type` is its result's type and `rest` the text after its operands. A parameter's or constant's `operands` hold its
  number or value.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  root: bool

  @functools.cached_property
  def shapes(self) -> list[Shape]:
    """Returns the arrays of its result."""
    return parse_shapes(self.type)

  @property
  def op_name(self) -> str:
    """Returns its name in the source program, for an argument its path."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
    return found[1].replace("\\'", "'") if found else ""

  def called(self) -> dict[str, str]:
    """Returns the computations that it runs, by the attribute that names them."""
    out: dict[str, str] = dict(_CALLED.findall(self.rest))
    for i, name in enumerate(n.strip(" %") for found in _BRANCHES.findall(self.rest) for n in found.split(",")):
      out[f"branch {i}"] = name
    return out


class HloModule(NamedTuple):
  """Program: its computations by name, and the name of the one where it begins."""

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str


def parse_module(text: str) -> HloModule:
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
  return HloModule(computations, entry)


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
  """Returns the index after the bracket that closes the one at the start of `text`."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return i + 1
  return len(text)


class Runs(NamedTuple):
  """Number of runs of each computation, and the loops of unknown length, which are taken to run once."""

  times: Mapping[str, int]
  unknown: tuple[str, ...]


def count_runs(module: HloModule) -> Runs:
  """Returns how often each computation runs in a run of the program.

  A loop's length is read from XLA's annotation or the loop's condition. Every branch of a conditional counts.
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
  """Returns whether the called computation only reduces or compares two values, so that it is no pass of its own."""
  return key == "to_apply" and instruction.opcode != "call"


def _in_order(module: HloModule) -> list[str]:
  """Returns the computations that run, each after all computations that call it."""
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


def _length(loop: Instruction, module: HloModule) -> int | None:
  """Returns the number of passes of a loop that counts to a constant; None if the loop's data decides."""
  known = re.search(r'known_trip_count[^{]*\{[^}]*?"?n"?\s*:\s*"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  condition = module.computations.get(loop.called().get("condition", ""), {})
  bounds = [i for i in condition.values() if i.opcode == "constant" and re.match(r"[su]32\[\]", i.type)]
  return int(bounds[0].operands[0]) if len(bounds) == 1 else None
