"""Counts the floating-point operations of a step's products, in the program before XLA rewrites it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend import core


def products(jaxpr: core.Jaxpr, devices: int = 1) -> float:
  """Returns the FLOPs of all products of a program, two for each multiply and add, on all devices together.

  Recomputation in the backward pass counts. A loop of unknown length counts one pass, and a conditional counts its most
  expensive branch. XLA's own count has a loop's body once only, however often it runs.

  Args:
    jaxpr: the program.
    devices: number of devices of the mesh; each device runs the body of a `shard_map`.
  """
  return sum(_of(equation, devices) for equation in jaxpr.eqns)


def _of(equation: Any, devices: int) -> float:
  name, parameters = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = parameters["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
  if name in ("ragged_dot", "ragged_dot_general"):
    rows, width = equation.invars[0].aval.shape[-2:]
    return 2.0 * rows * width * equation.invars[1].aval.shape[-1]
  if name == "cond":
    return max(products(branch.jaxpr, devices) for branch in parameters["branches"])
  inside = sum(products(inner, devices) for inner in _inner(parameters))
  if name == "scan":
    return parameters["length"] * inside
  return inside * devices if name == "shard_map" else inside


def _inner(parameters: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
  for value in jax.tree.leaves(
    list(parameters.values()), is_leaf=lambda v: isinstance(v, (core.Jaxpr, core.ClosedJaxpr))
  ):
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value
