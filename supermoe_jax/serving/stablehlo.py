"""An encoder lowered to StableHLO for a fixed shape, beside its parameters rather than around them.

A program is kept as the portable StableHLO that `jax.export` makes, and the few facts that calling it takes. (JAX' own
serialisation of the same needs another package, flatbuffers.) Opening it exports an empty function of the same shapes,
whose body the kept one takes the place of.

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

# What one artefact is lowered for.
PLATFORMS = ("cpu", "cuda", "tpu")

Parameters = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ProgramSignature:
  """What calling a program takes.

  Attributes:
    batch: B.
    events: L.
    platforms: what it is lowered for.
    calling_convention: the version of `jax.export`'s.
    kept: the places of the arguments, flattened, that it takes; the others are not used.
    global_constants: whether it takes the platform as an argument, and has to be refined.
  """

  batch: int
  events: int
  platforms: tuple[str, ...]
  calling_convention: int
  kept: tuple[int, ...]
  global_constants: bool


def argument_shapes(parameters: Parameters, row: Features, batch: int) -> tuple[Any, ...]:
  """The shapes of a program's arguments: of the parameters, and of `batch` rows such as `row`."""
  features = tuple(jax.ShapeDtypeStruct((batch, *part.shape), part.dtype) for part in row)
  return {n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in parameters.items()}, features


def lower_program(
  function: Callable[[Parameters, tuple[Any, ...]], jax.Array], parameters: Parameters, row: Features, batch: int
) -> tuple[ProgramSignature, bytes]:
  """Lowers `function(parameters, features) → [B, D]` for rows such as `row [L, …]`: its facts and its StableHLO."""
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
  """The program as `jax.export` has it.

  Raises:
    DataError: the JAX that is installed cannot call it.
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
  """A parameter as NumPy can write it: of a type that NumPy does not know, its bits."""
  return parameter if parameter.dtype.kind in "fiub" else parameter.view(f"u{parameter.dtype.itemsize}")
