"""Lowers an encoder to StableHLO for a fixed shape, with the parameters as arguments, and opens such programs.

A program is stored as the portable StableHLO that `jax.export` makes, and the few facts needed to call it. (JAX's own
serialisation of a program needs another package, flatbuffers.) To open a program, an empty function of the same shapes
is exported, and the stored StableHLO replaces its body.

Shapes: B rows, L events, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from supermoe_jax.batch import Features
from supermoe_jax.errors import DataError

# Platforms that each program is lowered for.
PLATFORMS = ("cpu", "cuda", "tpu")

Parameters = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ProgramSignature:
  """Facts needed to call a program.

  Attributes:
    batch: B.
    events: L.
    platforms: platforms that it is lowered for.
    calling_convention: version of the calling convention of `jax.export`.
    kept: positions of the flattened arguments that it takes; it does not use the others.
    global_constants: whether it takes the platform as an argument, and must be refined.
  """

  batch: int
  events: int
  platforms: tuple[str, ...]
  calling_convention: int
  kept: tuple[int, ...]
  global_constants: bool


def argument_shapes(parameters: Parameters, row: Features, batch: int) -> tuple[Any, ...]:
  """Returns the shapes of a program's arguments: of the parameters, and of `batch` rows such as `row`."""
  features = tuple(jax.ShapeDtypeStruct((batch, *part.shape), part.dtype) for part in row)
  return {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in parameters.items()}, features


def lower_program(
  function: Callable[[Parameters, tuple[Any, ...]], jax.Array], parameters: Parameters, row: Features, batch: int
) -> tuple[ProgramSignature, bytes]:
  """Lowers `function(parameters, features) → [B, D]` for rows such as `row [L, …]`; returns facts and StableHLO."""
  lowered = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*argument_shapes(parameters, row, batch))
  facts = ProgramSignature(
    batch,
    len(row.segment),
    tuple(lowered.platforms),
    lowered.calling_convention_version,
    tuple(lowered.module_kept_var_idx),
    lowered.uses_global_constants,
  )
  return facts, bytes(lowered.mlir_module_serialized)


def open_program(
  facts: ProgramSignature, stablehlo: bytes, parameters: Parameters, row: Features, width: int
) -> jax.export.Exported:
  """Returns the stored program in the form of `jax.export`.

  Raises:
    DataError: the installed JAX cannot call the program.
  """
  low = jax.export.minimum_supported_calling_convention_version
  high = jax.export.maximum_supported_calling_convention_version
  if not low <= facts.calling_convention <= high:
    raise DataError(
      f"the program's calling convention is {facts.calling_convention}, and JAX {jax.__version__} knows {low} to "
      f"{high}; export again with a JAX of about this version."
    )

  def encode(parameters: Parameters, features: tuple[Any, ...]) -> jax.Array:
    del parameters, features
    return jnp.zeros((facts.batch, width), jnp.float32)

  empty = jax.export.export(jax.jit(encode), platforms=facts.platforms)(*argument_shapes(parameters, row, facts.batch))
  return dataclasses.replace(
    empty,
    mlir_module_serialized=stablehlo,
    calling_convention_version=facts.calling_convention,
    module_kept_var_idx=facts.kept,
    uses_global_constants=facts.global_constants,
  )


def storable(parameter: np.ndarray) -> np.ndarray:
  """Returns a parameter in a form that NumPy can write: its bits if NumPy does not know the type."""
  return parameter if parameter.dtype.kind in "fiub" else parameter.view(f"u{parameter.dtype.itemsize}")
