"""Estimates the seconds of a step from a program's counts: for products, for memory and for networks.

The times are bounds by published rates, not measurements. They leave out latency and the remaining work of a device.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from supermoe_jax.plan.chips import Chip, Topology
from supermoe_jax.plan.collectives import Collective

# Collectives on rings, and how many times a device sends its share of the other devices' parts.
_RINGS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}


# Stands for the mesh axis of traffic between slices.
SLICES = "slices"


class Reach(NamedTuple):
  """Extent of a group of devices over slices or nodes, and over the torus within a slice.

  Attributes:
    inside: devices of the group in one slice or node.
    parts: slices or nodes that it spans.
    longest: on a torus, the devices of the longest dimension that it spans in a slice.
    dimensions: number of dimensions that it spans in a slice.
    closed: whether each of these dimensions closes to a ring.
  """

  inside: int
  parts: int
  longest: int = 1
  dimensions: int = 0
  closed: bool = False


class Traffic(NamedTuple):
  """Sums over the collectives of one kind along the same mesh axes.

  Attributes:
    kind: kind of the collectives.
    axes: mesh axes along which they run.
    times: executions in a step.
    bytes: bytes that a device puts in (for an all-gather: gets), over all executions.
    largest: bytes of the largest collective.
    sent: bytes that a device sends.
    seconds: time inside a slice or node.
    network_seconds: time between slices or nodes.
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
  """Adds up collectives by kind and mesh axes, most bytes sent first. For CPUs the seconds are 0."""
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
  """Returns the mesh axes along which the places of a group differ."""
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
  """Returns the seconds of a collective inside a slice or node, and between them.

  Rings use every dimension that a group spans, in both directions where it closes. The middle of the longest dimension
  bounds an all-to-all: the messages of a chip take k / 4 hops on average in a ring of k chips, k / 3 in a line. On the
  slower network between slices, a collective on rings sends each device's share of its slice's data; all others send
  their data as it is.
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
  """Seconds of a step on a device by resource, if each resource had the device to itself."""

  products: float
  memory: float
  links: float
  network: float

  @property
  def bound(self) -> str:
    """Returns the resource that takes longest."""
    return max(self._asdict().items(), key=lambda item: item[1])[0]

  @property
  def step(self) -> float:
    """Returns the seconds of a step in which all else overlaps with the slowest resource."""
    return max(self)

  @property
  def alone(self) -> float:
    """Returns the seconds of a step in which nothing overlaps."""
    return math.fsum(self)


def step_times(flops: float, moved: float, found: Sequence[Traffic], chip: Chip) -> Times:
  """Returns the times of a step from one device's `flops` and bytes `moved` to and from memory."""
  links, network = sum(t.seconds for t in found), sum(t.network_seconds for t in found)
  return Times(flops / chip.flops, moved / chip.memory_rate, links, network)


def as_dict(row: Traffic) -> dict[str, Any]:
  """Returns the row as a dict for JSON."""
  return {**row._asdict(), "axes": list(row.axes)}
