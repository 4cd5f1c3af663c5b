"""Seconds of collectives and of a step, by numbers that can be checked by hand."""

import types
from typing import Any

import numpy as np
import pytest

from supermoe_jax.plan import estimate
from supermoe_jax.plan.chips import CHIPS
from supermoe_jax.plan.collectives import Collective

SIZE, TIMES = 8_000_000_000, 3
LINK, NETWORK = CHIPS["h100"].link, CHIPS["h100"].network


def one(kind: str, group: tuple[int, ...] = tuple(range(8))) -> Collective:
  return Collective(kind, SIZE, TIMES, (group,), "somewhere")


def gpus(a_node: int) -> tuple[Any, Any]:
  """A mesh of 2×4 GPUs, and what is asked of their topology."""
  devices = np.array([types.SimpleNamespace(id=i) for i in range(8)]).reshape(2, 4)
  mesh = types.SimpleNamespace(devices=devices, axis_names=("data", "expert"))
  return mesh, types.SimpleNamespace(chip=CHIPS["h100"], tpu=False, sizes=(8 // a_node, a_node))


@pytest.mark.parametrize(
  ("kind", "inside", "across"),
  [
    ("all-reduce", 2 * 3 / 4, 2 / 4 / 2),
    ("all-gather", 3 / 4, 1 / 4 / 2),
    ("reduce-scatter", 3 / 4, 1 / 4 / 2),
    ("all-to-all", 3 / 4, 1 / 2),
    ("collective-permute", 0, 1),
  ],
)
def test_a_collective_over_two_nodes_takes_the_time_of_its_links_and_of_the_network(
  kind: str, inside: float, across: float
) -> None:
  (found,) = estimate.network_traffic([one(kind)], *gpus(a_node=4))
  assert found.seconds == pytest.approx(TIMES * SIZE * inside / LINK)
  assert found.network_seconds == pytest.approx(TIMES * SIZE * across / NETWORK)


def test_within_a_node_nothing_crosses_the_network_and_axes_are_those_that_a_group_spans() -> None:
  mesh, node = gpus(a_node=8)
  found = estimate.network_traffic(
    [one("all-gather", (0, 4)), one("all-reduce", (4, 5, 6, 7)), one("all-reduce")], mesh, node
  )
  assert [(t.kind, t.axes) for t in found] == [
    ("all-reduce", ("data", "expert")),
    ("all-reduce", ("expert",)),
    ("all-gather", ("data",)),
  ]
  assert [t.network_seconds for t in found] == [0, 0, 0]
  shares = (2 * 7 / 8, 2 * 3 / 4, 1 / 2)
  assert [t.seconds for t in found] == pytest.approx([TIMES * SIZE * share / LINK for share in shares])
  assert [t.sent for t in found] == pytest.approx([TIMES * SIZE * share for share in shares])


@pytest.mark.parametrize(("length", "ways", "hops"), [(8, 1, 8 / 3), (16, 2, 16 / 4)])
def test_a_dimension_of_a_torus_is_a_line_until_it_closes_to_a_ring(length: int, ways: int, hops: float) -> None:
  devices = np.array([types.SimpleNamespace(id=i, coords=(i, 0), slice_index=0) for i in range(length)])
  mesh = types.SimpleNamespace(devices=devices, axis_names=("data",))
  topology, group = types.SimpleNamespace(chip=CHIPS["v5e"], tpu=True, sizes=(length, 1)), tuple(range(length))
  reduced, sent = (estimate.network_traffic([one(k, group)], mesh, topology)[0] for k in ("all-reduce", "all-to-all"))
  share, link = (length - 1) / length, CHIPS["v5e"].link
  assert reduced.seconds == pytest.approx(2 * TIMES * SIZE * share / (link * ways))
  assert sent.seconds == pytest.approx(TIMES * SIZE * share * hops / (2 * link))


def test_a_step_is_bound_by_what_takes_longest() -> None:
  chip, (found,) = CHIPS["h100"], estimate.network_traffic([one("all-reduce")], *gpus(a_node=4))
  times = estimate.step_times(chip.flops / 100, chip.memory_rate / 50, [found], chip)
  assert times[:2] == pytest.approx((0.01, 0.02)) and times[2:] == (found.seconds, found.network_seconds)
  assert times.bound == "network" and times.step == found.network_seconds
  assert times.alone == pytest.approx(sum(times))
