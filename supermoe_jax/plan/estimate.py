"""From a program's counts to seconds: which of products, memory and networks a step waits for.

These are bounds by published rates, not measurements: latency, and work that is left over on a device, are not in them.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from supermoe_jax.plan.chips import Chip, Topology
from supermoe_jax.plan.collectives import Collective

# Kinds of which a device sends its share of the others' parts once, or, of an all-reduce, twice.
_RINGS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}


# Stands for the axis of a mesh along which what crosses from slice to slice does.
SLICES = "slices"


class Reach(NamedTuple):
  """How the devices of a group reach each other.

  Attributes:
    inside: devices of the group in one slice or node.
    parts: slices or nodes that it spans.
    longest: of a torus, the devices of the longest dimension that it spans in a slice.
    dimensions: how many dimensions it spans there.
    closed: whether each of these closes to a ring.
  """

  inside: int
  parts: int
  longest: int = 1
  dimensions: int = 0
  closed: bool = False


class Traffic(NamedTuple):
  """The collectives of one kind over the same mesh axes.

  Attributes:
    kind: of the collective.
    axes: of the mesh, which it runs along.
    times: how many run in a step.
    bytes: of all, what a device puts in (of an all-gather: gets).
    largest: of the largest one.
    sent: bytes that a device sends.
    seconds: inside a slice or node.
    network_seconds: between them.
  """

  kind: str
  axes: tuple[str, ...]
  times: int
  bytes: int
  largest: int
  sent: float
  seconds: float
  network_seconds: float


def network_traffic(found: Sequence[Collective], mesh: Mesh, topology: Topology) -> list[Traffic]:
  """Adds up collectives by kind and mesh axes; those that send most come first. Of CPUs no seconds are told."""
  groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = collections.defaultdict(list)
  for one in found:
    groups[one.kind, (SLICES,) if one.network else _axes(one.groups[0], mesh)].append(one)
  out = []
  for (kind, axes), members in groups.items():
    reaches = [Reach(1, c.members) if c.network else _reach(c.groups[0], mesh, topology) for c in members]
    times = [_seconds(c, reach, topology.chip) for c, reach in zip(members, reaches)]
    out.append(
      Traffic(
        kind,
        axes,
        sum(c.times for c in members),
        sum(c.bytes * c.times for c in members),
        max(c.bytes for c in members),
        sum(c.sent for c in members),
        sum(inside for inside, _ in times),
        sum(across for _, across in times),
      )
    )
  return sorted(out, key=lambda t: -t.sent)


def _axes(group: Sequence[int], mesh: Mesh) -> tuple[str, ...]:
  """The mesh axes along which the places of a group differ."""
  places = [_unravel(place, mesh.devices.shape) for place in group]
  return tuple(name for i, name in enumerate(mesh.axis_names) if len({p[i] for p in places}) > 1)


def _unravel(place: int, shape: Sequence[int]) -> tuple[int, ...]:
  out = []
  for size in reversed(shape):
    place, at = divmod(place, size)
    out.append(at)
  return tuple(reversed(out))


def _reach(group: Sequence[int], mesh: Mesh, topology: Topology) -> Reach:
  devices = [mesh.devices.flat[place] for place in group]
  if not topology.tpu:
    node = topology.sizes[-1]
    parts = collections.Counter(d.id // node for d in devices)
    return Reach(max(parts.values()), len(parts))
  parts = collections.Counter(getattr(d, "slice_index", 0) for d in devices)
  inside = [d.coords for d in devices if getattr(d, "slice_index", 0) == next(iter(parts))]
  extents = [len(set(column)) for column in zip(*inside)]
  spanned = [(n, topology.sizes[i] if i < len(topology.sizes) else 1) for i, n in enumerate(extents) if n > 1]
  chip = topology.chip
  assert chip is not None
  closed = bool(spanned) and all(n == size and size % chip.wrap == 0 for n, size in spanned)
  return Reach(len(inside), len(parts), max((n for n, _ in spanned), default=1), len(spanned), closed)


def _seconds(one: Collective, reach: Reach, chip: Chip | None) -> tuple[float, float]:
  """Inside a slice or node, and between them.

  Rings use every dimension that a group spans, both ways where it closes. An all-to-all is bound by the middle of the
  longest dimension: the messages of a chip take k / 4 hops on average in a ring of k, k / 3 in a line. What crosses the
  slower network of a reduction is each device's share of what its slice has reduced; all else crosses as it is.
  """
  if chip is None:
    return 0.0, 0.0
  size, inside, across = one.bytes * one.times, 0.0, 0.0
  ways = (2 if reach.closed else 1) * max(1, reach.dimensions)
  share = (reach.inside - 1) / reach.inside
  beyond = (reach.parts - 1) / reach.parts
  if one.kind in _RINGS:
    inside = _RINGS[one.kind] * size * share / (chip.link * (ways if chip.wrap else 1))
    across = _RINGS[one.kind] * size / reach.inside * beyond / chip.network
  elif one.kind.endswith("all-to-all"):
    hops = reach.longest / (4 if reach.closed else 3) if chip.wrap else 1.0
    inside = size * share * max(1.0, hops) / (chip.link * (2 * max(1, reach.dimensions) if chip.wrap else 1))
    across = size * beyond / chip.network
  elif reach.parts > 1:
    across = size / chip.network
  else:
    inside = size / chip.link
  return inside, across


class Times(NamedTuple):
  """Seconds of a step on a device by what they go to, if each had the device to itself."""

  products: float
  memory: float
  links: float
  network: float

  @property
  def bound(self) -> str:
    """What takes longest."""
    return max(self._asdict().items(), key=lambda item: item[1])[0]

  @property
  def step(self) -> float:
    """Of a step, where all else goes on beside what takes longest."""
    return max(self)

  @property
  def alone(self) -> float:
    """Of a step in which nothing goes on beside anything."""
    return math.fsum(self)


def step_times(flops: float, moved: float, found: Sequence[Traffic], chip: Chip) -> Times:
  """The times of a step: `flops`, and bytes `moved` to and from memory, of one device."""
  links, network = sum(t.seconds for t in found), sum(t.network_seconds for t in found)
  return Times(flops / chip.flops, moved / chip.memory_rate, links, network)


def as_dict(row: Traffic) -> dict[str, Any]:
  """For JSON."""
  return {**row._asdict(), "axes": list(row.axes)}
