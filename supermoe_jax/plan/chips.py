"""What accelerators can do, and how they are wired: the facts that estimates rest on."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

from supermoe_jax import config

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    kind: as JAX names it.
    flops: dense bfloat16 products, FLOP/s.
    memory: bytes of main memory (HBM) that programs may use.
    memory_rate: bytes/s of it.
    link: bytes/s of one link to a neighbour, one way; of a GPU all its links to the other GPUs of its node together.
    wrap: the length from which a dimension of a TPU's torus closes to a ring; lengths are multiples of it. 0: a GPU.
    network: bytes/s of a device to other slices or nodes, one way: its share of its host's.
    source: of these.
  """

  kind: str
  flops: float
  memory: int
  memory_rate: float
  link: float
  wrap: int
  network: float
  source: str


_TPU = "cloud.google.com/tpu/docs"
_BOOK = "jax-ml.github.io/scaling-book/tpus (links one way; 25 GB/s of network a host)"

# Memory is what XLA lets a program have, which is a little less than what is sold.
CHIPS = {
  "v4": Chip("TPU v4", 275e12, 31 * GIB, 1.2e12, 4.5e10, 4, 2.5e10 / 4, f"{_TPU}/v4; {_BOOK}"),
  "v5e": Chip("TPU v5 lite", 197e12, int(15.75 * GIB), 8.19e11, 5e10, 16, 2.5e10 / 8, f"{_TPU}/v5e; {_BOOK}"),
  "v5p": Chip("TPU v5", 459e12, int(95.7 * GIB), 2.765e12, 1e11, 4, 2.5e10 / 4, f"{_TPU}/v5p; {_BOOK}"),
  "v6e": Chip("TPU v6 lite", 918e12, int(31.25 * GIB), 1.638e12, 1e11, 16, 2.5e10 / 8, f"{_TPU}/v6e; {_BOOK}"),
  "a100": Chip(
    "NVIDIA A100", 312e12, 79 * GIB, 2.039e12, 3e11, 0, 2.5e10, "NVIDIA A100 80 GB SXM data sheet; 200 Gb/s"
  ),
  "h100": Chip("NVIDIA H100", 989e12, 79 * GIB, 3.35e12, 4.5e11, 0, 5e10, "NVIDIA H100 SXM data sheet; 400 Gb/s"),
  "h200": Chip("NVIDIA H200", 989e12, 140 * GIB, 4.8e12, 4.5e11, 0, 5e10, "NVIDIA H200 SXM data sheet; 400 Gb/s"),
  "b200": Chip("NVIDIA B200", 2250e12, 178 * GIB, 8e12, 9e11, 0, 5e10, "NVIDIA B200 SXM data sheet; 400 Gb/s"),
}


class Topology(NamedTuple):
  """Devices and how they lie: `sizes` of a TPU's torus, of GPUs `(nodes, GPUs of a node)`, of CPUs `(devices,)`."""

  name: str
  sizes: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self) -> Chip | None:
    """Of CPUs None."""
    return CHIPS.get(self.name)

  @property
  def tpu(self) -> bool:
    """Whether it is one of TPUs, for which programs can be compiled here."""
    return self.chip is not None and self.chip.wrap > 0

  @property
  def devices(self) -> int:
    """Of all slices."""
    return math.prod(self.sizes) * self.slices

  def __str__(self) -> str:
    text = f"{self.name}:{'x'.join(map(str, self.sizes))}"
    return f"{self.slices} × {text}" if self.slices > 1 else text


def topology(text: str, slices: int = 1) -> Topology:
  """Reads `v5e:16x16`, `v5p:4x4x8`, `h100:8x8` (nodes x GPUs) or `cpu:8`.

  Raises:
    ConfigError: it names no known chip, or sizes that such chips do not have.
  """
  name, _, sizes = text.partition(":")
  if name != "cpu" and name not in CHIPS:
    raise config.ConfigError(f"--topology={text}: no such chip as {name!r}{config.nearest(name, [*CHIPS, 'cpu'])}")
  dimensions = {"cpu": 1, "v4": 3, "v5p": 3}.get(name, 2)
  example = {1: "8", 2: "16x16" if name in ("v5e", "v6e") else "8x8", 3: "4x4x8"}[dimensions]
  if not re.fullmatch(r"\d+(x\d+)*", sizes) or sizes.count("x") + 1 != dimensions or "0" in sizes.split("x"):
    raise config.ConfigError(f"--topology={text}: write the sizes of {name} as {name}:{example}.")
  found = Topology(name, tuple(int(n) for n in sizes.split("x")), slices)
  if slices < 1 or (slices > 1 and not found.tpu):
    raise config.ConfigError(
      f"--slices={slices}: slices are of TPUs, at least 1; the nodes of GPUs stand in --topology."
    )
  return found
