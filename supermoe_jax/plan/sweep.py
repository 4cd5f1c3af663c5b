"""Plans how a step scales from few devices to many: compiles the same program for each topology."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from supermoe_jax import config
from supermoe_jax.plan.chips import Topology
from supermoe_jax.plan.plan import plan_step
from supermoe_jax.plan.program import LEAST_EFFORT, fitted_config
from supermoe_jax.plan.render import bytes_text
from supermoe_jax.progress import ProgressBar

# Where the number of rows stays constant, by kind of scaling.
_WHERE = {"weak": "on each device", "strong": "on all devices together"}


def sweep_topologies(
  cfg: config.Config, topologies: Sequence[Topology], scaling: str = "weak", effort: float = LEAST_EFFORT
) -> dict[str, Any]:
  """Plans a config on each topology. Weak scaling keeps the batch of a device, strong scaling the whole batch.

  Weak scaling takes a device's batch from the config's own mesh. `expert` becomes the largest divisor that the config's
  `expert` and the topology's devices have in common.

  Raises:
    ConfigError: as `plan_step`; the whole batch does not divide over the devices of a topology.
  """
  mesh = cfg.train.mesh
  rows = max(1, round(cfg.train.batch_rows / (mesh.data * mesh.expert)))
  asked = []
  for topology in sorted(topologies, key=lambda t: t.devices):
    expert = math.gcd(mesh.expert, topology.devices // mesh.tensor)
    ways = topology.devices // mesh.tensor
    train = dataclasses.replace(
      cfg.train,
      batch_rows=rows * ways if scaling == "weak" else cfg.train.batch_rows,
      mesh=dataclasses.replace(mesh, data=ways // expert, expert=expert, slices=topology.slices),
    )
    evaluate = dataclasses.replace(cfg.evaluate, batch_rows=ways)
    wanted = dataclasses.replace(cfg, train=train, evaluate=evaluate)
    fitted_config(wanted, topology)  # raises now for a topology that cannot be, before any is compiled
    asked.append((wanted, topology))
  bar = ProgressBar(asked, unit=" topologies", desc="compiling")
  plans = [plan_step(wanted, topology, effort) for wanted, topology in bar]
  return {"scaling": scaling, "rows": rows if scaling == "weak" else cfg.train.batch_rows, "plans": plans}


def efficiency(found: Mapping[str, Any]) -> dict[str, float]:
  """Returns each timed topology's tokens per second and device, as a share of the first one's."""
  timed = [p for p in found["plans"] if "seconds" in p]
  each = {p["topology"]["name"]: p["tokens_per_second"] / p["topology"]["devices"] for p in timed}
  return {name: value / next(iter(each.values())) for name, value in each.items()}


def bytes_sent(found: Mapping[str, Any]) -> float:
  """Returns the bytes that a device sends in a step, over all collectives."""
  return math.fsum(row["sent"] for row in found.get("collectives", ()))


def sweep_table(found: Mapping[str, Any]) -> list[str]:
  """Returns the lines of a table of the sweep; efficiency is relative to the first topology that has times."""
  titles = f"{'memory':>11}{'fits':>6}{'sent':>12}{'ms a step':>11}{'efficiency':>12}"
  head = f"{'topology':<18}{'devices':>8}{'mesh':>12}{titles}"
  out = [f"{found['scaling']} scaling: {found['rows']:,} rows of the batch {_WHERE[found['scaling']]}", head]
  share = efficiency(found)
  for p in found["plans"]:
    mesh = "×".join(str(n) for n in p["mesh"].values())
    row = f"{p['topology']['name']:<18}{p['topology']['devices']:>8,}{mesh:>12}{bytes_text(p['memory']['total']):>11}"
    row += f"{ {True: 'yes', False: 'no', None: '–'}[p['fits']]:>6}"
    if "collectives" in p:
      row += f"{bytes_text(bytes_sent(p)):>12}"
    if "seconds" in p:
      row += f"{1e3 * p['seconds']['step']:>11.2f}{share[p['topology']['name']]:>12.0%}"
    out.append(row)
  return out


def draw_sweep(found: Mapping[str, Any], file: pathlib.Path) -> None:
  """Draws bytes sent and memory of a device, and the estimated efficiency, over the number of devices into `file`."""
  plans = [p for p in found["plans"] if "collectives" in p]
  devices = [p["topology"]["devices"] for p in plans]
  with matplotlib.rc_context({"svg.hashsalt": "sweep", "font.size": 9}):
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    sending, memory, speed = figure.subplots(1, 3)
    kinds = sorted({row["kind"] for p in plans for row in p["collectives"]})
    below = [0.0] * len(plans)
    for kind in kinds:
      top = [
        b + sum(row["sent"] for row in p["collectives"] if row["kind"] == kind) / 2**20 for b, p in zip(below, plans)
      ]
      sending.fill_between(devices, below, top, label=kind, linewidth=0)
      below = top
    sending.set(title="MiB that a device sends a step", ylim=(0, None))
    sending.legend(fontsize=7, loc="lower right")
    taken = [p["memory"]["total"] / 2**30 for p in plans]
    memory.plot(devices, taken, marker="o")
    memory.set(title="GiB of a device's memory", ylim=(0, 1.1 * max(taken, default=1)))
    share = efficiency(found)
    timed = [p["topology"] for p in plans if "seconds" in p]
    speed.plot([t["devices"] for t in timed], [share[t["name"]] for t in timed], marker="o")
    speed.set(title="efficiency, by published rates", ylim=(0, 1.1 * max(share.values(), default=1)))
    for axes in (sending, memory, speed):
      axes.set_xscale("log", base=2)
      axes.set_xticks(devices, [f"{n:,}" for n in devices])
      axes.minorticks_off()
      axes.set_xlabel("devices")
      axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
