"""What a check of a pod has the devices do: a wrong result is seen, and sizes and meshes fit what is there."""

import jax
import pytest

from supermoe_jax import config
from tests.fixtures.pod_checks import pod_steps


def test_a_mesh_has_all_devices_and_experts_over_two_where_it_can() -> None:
  found = {n: pod_steps.mesh_sizes(n, 1) for n in (1, 2, 3, 4, 8, 12, 16, 256)}
  assert all(m.data * m.expert * m.tensor == n for n, m in found.items())
  assert [m.expert for m in found.values()] == [1, 2, 1, 2, 4, 4, 8, 8]
  assert pod_steps.mesh_sizes(16, 2) == config.Mesh(2, 8, 1, 2)


def test_sizes_are_those_that_there_is_room_for() -> None:
  assert pod_steps.sizes_that_fit([64, 1], 1 << 30) == [1 << 20, 1 << 26]
  assert pod_steps.sizes_that_fit([1, 64], 1 << 24) == [1 << 20]
  assert pod_steps.sizes_that_fit([1, 64], 0) == [1 << 20]


def test_each_device_computes_what_it_must_and_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
  wanted = pod_steps.checksum_wanted()
  assert [pod_steps.checksum(d) for d in jax.local_devices()[:2]] == [wanted] * 2
  a, b, weight = pod_steps._factors()
  changed = a.copy()
  changed[100, 200] += 1
  monkeypatch.setattr(pod_steps, "_factors", lambda: (changed, b, weight))
  assert pod_steps.checksum(jax.local_devices()[0]) != wanted


@pytest.mark.parametrize("operation", pod_steps.OPERATIONS)
def test_a_collective_that_is_wrong_on_a_device_is_seen(operation: str) -> None:
  devices = jax.devices()[:3]
  collective = pod_steps.Collective(operation, devices, 1000)
  assert collective.size == 4 * 3 * (1000 // 12) and collective.wrong() == []
  program = collective._program
  collective.__dict__["_program"] = lambda x, times: program(x, times).at[1, 5].add(1)
  assert collective.wrong() == [str(devices[1])]
