"""Shows which experts serve which tasks (by test snapshots) and which event types and values (by tokens)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from supermoe_jax.evaluation import event_experts
from supermoe_jax.report.figures import heat_maps
from supermoe_jax.report.figures.drawing import MOST_NAMED_EXPERTS, percent
from supermoe_jax.report.run_files import RunFiles
from supermoe_jax.report.task_sentences import sparse_blocks

# An event type or a value stands out for an expert if its tokens go there at least this many times as often as all
# tokens do. It must have at least `LEAST_TOKENS` tokens, since fewer would leave it to chance.
STANDS_OUT = 1.25
LEAST_TOKENS = 100
# The most event types and values that are named for an expert.
NAMED = 4


def by_task(run: RunFiles) -> dict[str, Any] | None:
  """Returns how each task's test snapshots were routed in each MoE layer, and its gate; None before evaluation."""
  if run.evaluation is None:
    return None
  model, load = run.cfg.model, run.evaluation.get("expert_load", {})
  some = {n: v for n, v in load.items() if v["snapshots"] and v["load"]}
  deepest = max((share for v in some.values() for layer in v["load"] for share in layer), default=1.0)
  layers = []
  for m, block in enumerate(sparse_blocks(model)):
    shares = {n: v["load"][m] for n, v in some.items() if len(v["load"]) > m}
    if shares:
      title = f"Block {block}: share of the choices, in percent"
      figure = heat_maps.heat_map(f"experts-{m}", title, list(shares), np.array(list(shares.values())), deepest)
      layers.append({"block": block, "figure": figure, "shares": shares})
  gates = {n: v["gate"] for n, v in load.items() if v["snapshots"] and v.get("gate")}
  mixed = max((share for v in gates.values() for share in v), default=1.0)
  return {
    "layers": layers,
    "gate": heat_maps.heat_map(
      "gates", "Gate of each task, in percent", list(gates), np.array(list(gates.values())), mixed
    )
    if gates
    else None,
    "gates": gates,
    "tokens": model.conditioning == "token",
    "snapshots": {n: v["snapshots"] for n, v in load.items() if v["snapshots"]},
    "even": 1 / model.experts,
    "deepest": deepest,
    "wide": model.experts > MOST_NAMED_EXPERTS,
  }


def by_event(run: RunFiles) -> dict[str, Any] | None:
  """Returns the event types and values that each layer's experts serve; None if they were not counted."""
  found = (run.evaluation or {}).get("event_experts")
  if not found:
    return None
  parts = [("event type", found["sources"]), *found["fields"].items()]
  layers = []
  for m, block in enumerate(sparse_blocks(run.cfg.model)):
    overall = np.array(found["overall"][m], np.float64)
    groups = [_group(f"events-{m}-{i}", what, rows, overall, m) for i, (what, rows) in enumerate(parts)]
    layers.append({"block": block, "groups": groups, "words": _standing_out(parts, overall, m)})
  return {
    "snapshots": found["snapshots"],
    "tokens": found["tokens"],
    "unnamed": found["unnamed"],
    "layers": layers,
    "stands_out": STANDS_OUT,
    "least": LEAST_TOKENS,
    "experts": run.cfg.model.experts,
    "wide": run.cfg.model.experts > MOST_NAMED_EXPERTS,
  }


def _group(name: str, what: str, rows: Sequence[Mapping[str, Any]], overall: np.ndarray, layer: int) -> dict[str, Any]:
  """Returns heat maps and a table of one field, or of the event types: shares of each expert's tokens, and lifts."""
  choices = np.array([r["choices"][layer] for r in rows], np.float64)
  share = choices / np.maximum(overall, 1)
  lift = np.array([event_experts.expert_lift(r, overall, layer) for r in rows])
  names = [str(r["name"]) for r in rows]
  most = float(share.max(initial=0.0)) or 1.0
  pictures = [
    heat_maps.heat_map(f"{name}-share", f"{what}: percent of the expert's tokens", names, share, most),
    heat_maps.lift_map(f"{name}-lift", f"{what}: times its usual share", names, lift),
  ]
  table = [(n, r["tokens"], list(zip(s, v))) for n, r, s, v in zip(names, rows, share, lift)]
  return {"what": what, "pictures": pictures, "table": table}


def _standing_out(
  parts: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], overall: np.ndarray, layer: int
) -> list[tuple[int, str]]:
  """Returns for each expert a sentence on the event types and values that go there more often than others."""
  lifts = [
    (what, row["name"], event_experts.expert_lift(row, overall, layer))
    for what, rows in parts
    for row in rows
    if row["tokens"] >= LEAST_TOKENS
  ]
  out = []
  for e, share in enumerate(overall / max(overall.sum(), 1)):
    there = sorted(((v[e], what, name) for what, name, v in lifts if v[e] >= STANDS_OUT), reverse=True)[:NAMED]
    told = ", ".join(f"{what} {name} ({times:.1f} times)" for times, what, name in there)
    out.append((e, f"{percent(float(share))} of all choices; {told or 'no event type or value stands out'}."))
  return out
