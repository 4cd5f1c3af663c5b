"""Suggests changes for a step that does not fit: settings of the config, and the smallest topologies that hold it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from supermoe_jax import config
from supermoe_jax.plan.chips import CHIPS, GIB, Topology

# Available shapes of topologies, smallest first.
_SHAPES = {
  "v5e": ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
  "v6e": ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
  "v5p": (
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
    (4, 4, 4),
    (4, 4, 8),
    (4, 8, 8),
    (8, 8, 8),
    (8, 8, 16),
    (8, 16, 16),
  ),
}


def remedies(cfg: config.Config, found: Mapping[str, Any], topology: Topology) -> list[str]:
  """Returns the changes that may save memory on a device, largest savings first, then topologies that hold the step.

  Savings of state are calculated; savings of temporaries are rules of thumb. Plan again to be sure.
  """
  parts, chip = found["memory"]["parts"], topology.chip
  assert chip is not None
  kept = sum(parts.values())
  temporary = max(found["memory"]["total"] - kept, 0)
  return [
    f"{what}: may save about {spared / GIB:.1f} GiB" if spared else what
    for what, spared in sorted(_changes(cfg, parts, temporary), key=lambda change: -change[1])
  ] + list(_larger(cfg, found, topology, temporary))


def _changes(cfg: config.Config, parts: Mapping[str, int], temporary: float) -> Iterator[tuple[str, float]]:
  tables, train, model = parts.get("tables", 0), cfg.train, cfg.model
  if train.tables.dtype == "float32" and tables:
    yield "--config.train.tables.dtype=bfloat16", tables / 2
  if train.tables.optimizer == "adam" and tables:
    yield "--config.train.tables.optimizer=adagrad", parts.get("optimizer of tables", 0)
  if model.remat == "none":
    yield "--config.model.remat=full", 0.6 * temporary
  if model.dtype == "float32":
    yield "--config.model.dtype=bfloat16", 0.3 * temporary
  yield f"--config.train.accumulate={2 * train.accumulate}", 0.4 * temporary
  ways = train.mesh.data * train.mesh.expert
  if train.batch_rows >= 2 * ways:
    yield f"--config.train.batch_rows={train.batch_rows // 2}", 0.5 * temporary
  if model.experts > train.mesh.expert and not model.experts % (2 * train.mesh.expert):
    experts = parts.get("experts", 0) + parts.get("optimizer of experts", 0)
    yield f"--config.train.mesh.expert={2 * train.mesh.expert}", experts / 2


def _larger(cfg: config.Config, found: Mapping[str, Any], topology: Topology, temporary: float) -> Iterator[str]:
  """Yields the smallest shapes of this chip and of v5p in which the step fits, with the same batch on each device."""
  parts = found["memory"]["parts"]
  spread = (parts.get("tables", 0) + parts.get("optimizer of tables", 0)) * topology.devices
  rest = sum(parts.values()) - spread / topology.devices
  fixed = cfg.train.mesh.expert * cfg.train.mesh.tensor
  for name in dict.fromkeys((topology.name, "v5p")):
    for sizes in _SHAPES.get(name, ()):
      devices = math.prod(sizes)
      needed = spread / devices + rest + temporary
      if devices % fixed == 0 and needed <= CHIPS[name].memory:
        yield f"--topology={name}:{'x'.join(map(str, sizes))}: about {needed / GIB:.1f} GiB of its chips' memory"
        break
