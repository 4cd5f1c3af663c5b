"""Describes accelerators and how they are wired: the published numbers that estimates rest on."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

from supermoe_jax.errors import ConfigError, nearest
from supermoe_jax.training.monitoring import utilisation

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Accelerator: one device with its memory and its networks.

  Attributes:
    kind: the device's name in JAX.
    memory: bytes of main memory (HBM) that a program may have.
    memory_rate: bytes/s of main memory.
    link: bytes/s of one link to a neighbour, one way; for a GPU, all its links to the other GPUs of its node together.
    wrap: the length from which a dimension of a TPU's torus closes to a ring; ring lengths are multiples of it. 0 for a
      GPU.
    network: bytes/s of a device to other slices or nodes, one way: its share of its host's network.
    source: source of these numbers.
  """

  kind: str
  memory: int
  memory_rate: float
  link: float
  wrap: int
  network: float
  source: str

  @property
  def flops(self) -> float:
    """Returns FLOP/s of dense bfloat16 products."""
    found = utilisation.peak_flops(self.kind)
    assert found is not None, self.kind
    return found


_TPU = "memory as XLA:TPU allows, its rate by cloud.google.com/tpu/docs"
_BOOK = "links (one way) and network (25 GB/s a host) by jax-ml.github.io/scaling-book/tpus"

CHIPS = {
  "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 8.19e11, 5e10, 16, 2.5e10 / 8, f"{_TPU}/v5e; {_BOOK}"),
  "v5p": Chip("TPU v5", int(95.74 * GIB), 2.765e12, 1e11, 4, 2.5e10 / 4, f"{_TPU}/v5p; {_BOOK}"),
  "v6e": Chip("TPU v6 lite", int(31.25 * GIB), 1.638e12, 1e11, 16, 2.5e10 / 8, f"{_TPU}/v6e; {_BOOK}"),
  "a100": Chip("NVIDIA A100", 80 * 10**9, 2.039e12, 3e11, 0, 2.5e10, "data sheet of A100 80 GB SXM; 200 Gb/s a GPU"),
  "h100": Chip("NVIDIA H100", 80 * 10**9, 3.35e12, 4.5e11, 0, 5e10, "data sheet of H100 SXM; 400 Gb/s a GPU"),
  "h200": Chip("NVIDIA H200", 141 * 10**9, 4.8e12, 4.5e11, 0, 5e10, "data sheet of H200 SXM; 400 Gb/s a GPU"),
  "b200": Chip("NVIDIA B200", 180 * 10**9, 8e12, 9e11, 0, 5e10, "data sheet of HGX B200; 400 Gb/s a GPU"),
}


class Topology(NamedTuple):
  """Arrangement of devices: `sizes` are a TPU torus' dimensions, `(nodes, GPUs of a node)`, or `(CPUs,)`."""

  name: str
  sizes: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self) -> Chip | None:
    """Returns the chip; None for CPUs."""
    return CHIPS.get(self.name)

  @property
  def tpu(self) -> bool:
    """Returns whether the chips are TPUs, for which programs can be compiled here."""
    return self.chip is not None and self.chip.wrap > 0

  @property
  def devices(self) -> int:
    """Returns the number of devices in all slices."""
    return math.prod(self.sizes) * self.slices

  def __str__(self) -> str:
    text = f"{self.name}:{'x'.join(map(str, self.sizes))}"
    return f"{self.slices} × {text}" if self.slices > 1 else text


def topology(text: str, slices: int = 1) -> Topology:
  """Reads `v5e:16x16`, `v5p:4x4x8`, `h100:8x8` (nodes x GPUs) or `cpu:8`.

  Raises:
    ConfigError: the chip is unknown, or such chips do not have these sizes or this number of slices.
  """
  name, _, sizes = text.partition(":")
  if name != "cpu" and name not in CHIPS:
    raise ConfigError(f"--topology={text}: no such chip as {name!r}{nearest(name, [*CHIPS, 'cpu'])}")
  dimensions = {"cpu": 1, "v5p": 3}.get(name, 2)
  example = {1: "8", 2: "16x16" if name in ("v5e", "v6e") else "8x8", 3: "4x4x8"}[dimensions]
  if not re.fullmatch(r"\d+(x\d+)*", sizes) or sizes.count("x") + 1 != dimensions or "0" in sizes.split("x"):
    raise ConfigError(f"--topology={text}: write the sizes of {name} as {name}:{example}.")
  found = Topology(name, tuple(int(n) for n in sizes.split("x")), slices)
  if slices < 1 or (slices > 1 and not found.tpu):
    raise ConfigError(f"--slices={slices}: only TPUs have slices, and at least 1; write nodes of GPUs in --topology.")
  return found
