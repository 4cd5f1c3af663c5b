"""Counts the bytes that a run of a compiled program moves to and from a device's main memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from supermoe_jax.plan.collectives import COLLECTIVES
from supermoe_jax.plan.hlo import HloModule, Instruction, count_runs

# Instructions that name or place values, and move none.
_NO_TRAFFIC = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
  *("partition-id", "replica-id", "opt-barrier", "iota", "copy-done", "async-done", "async-update"),
  *(f"{name}-done" for name in COLLECTIVES),
}

# Instructions that read a part of their first operand, as large as their result; and instructions that write a part of
# it, as large as the operand at this index.
_PARTLY_READ = {"dynamic-slice", "gather", "slice"}
_PARTLY_WRITTEN = {"dynamic-update-slice": 1, "scatter": 2}


def memory_traffic(module: HloModule) -> int:
  """Returns the bytes that a run reads from and writes to a device's main memory, each fusion once.

  For an array that is only looked up or written in part (a table, say), that part counts. Values that stay in the
  chip's own memory do not count.
  """
  times = count_runs(module).times
  fused = {i.called().get("calls") for c in module.computations.values() for i in c.values() if i.opcode == "fusion"}
  total = 0
  for name, count in times.items():
    if name not in fused:
      computation = module.computations[name]
      total += count * sum(_moved(i, computation, module) for i in computation.values())
  return total


def _moved(instruction: Instruction, computation: Mapping[str, Instruction], module: HloModule) -> int:
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
  """Returns the bytes that a fusion reads of an operand."""
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
  """Returns the bytes that a fusion writes; for an operand changed in place, only the part that changes."""
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
