"""Formats a plan as text for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PARTS = {
  "tables": "tables' rows",
  "optimizer of tables": "their optimizer state",
  "experts": "experts",
  "optimizer of experts": "their moments",
  "dense": "other parameters",
  "optimizer of dense": "their moments",
  "other": "step, keys, weights",
  "batch": "batch",
}

_BOUNDS = {"products": "products", "memory": "memory", "links": "links between chips", "network": "network"}


def plan_text(plan: Mapping[str, Any]) -> list[str]:
  """Returns a plan as lines of text."""
  memory, parameters, chip = plan["memory"], plan["parameters"], plan["chip"]
  mesh = " × ".join(f"{n} {s}" for n, s in plan["mesh"].items())
  out = [
    f"{plan['topology']['name']}: {plan['topology']['devices']:,} devices, mesh {mesh}"
    + (f"; {chip['kind']}, {bytes_text(chip['memory'])} of memory each" if chip else ""),
    *(f"note: {note}" for note in plan["notes"]),
    "",
    f"parameters  {parameters['total']:>22,}",
    *(f"  {name:<10}{parameters[name]:>22,}" for name in ("tables", "experts", "dense")),
    f"  {'active':<10}{parameters['active']:>22,}  on a token",
    "",
    "memory of a device",
    *(f"  {_PARTS[name]:<22}{bytes_text(n):>12}" for name, n in _in_order(memory["parts"])),
  ]
  if memory["temporary"] is None:
    out.append(f"  {'total, by XLA':<22}{bytes_text(memory['total']):>12}")
  else:
    rows = {
      "padding to tiles": memory["padding"],
      "arguments not read": -memory["not_read"],
      "temporaries": memory["temporary"],
      "new results": memory["outputs"],
      "the program": memory["program"],
    }
    out += [f"  {name:<22}{bytes_text(n):>12}" for name, n in rows.items() if n]
    out.append(f"  {'total':<22}{bytes_text(memory['total']):>12}")
    out += [
      f"    {name}: {bytes_text(n)} of padding"
      for name, n in memory["padded_most"].items()
      if n > memory["total"] / 100
    ]
  if plan["fits"] is not None:
    share = memory["total"] / chip["memory"]
    verdict = "fits" if plan["fits"] else "does not fit"
    out += ["", f"{verdict}: {bytes_text(memory['total'])} of {bytes_text(chip['memory'])}, {share:.0%}"]
    out += [f"  try {line}" for line in plan["remedies"]]
  if "collectives" in plan:
    out += ["", *_work(plan)]
  out += [f"warning: {name} ({bytes_text(n)}) is replicated on every device" for name, n in plan["replicated"].items()]
  return [*out, f"compiled in {plan['compile_seconds']:.0f} s"]


def _in_order(parts: Mapping[str, int]) -> list[tuple[str, int]]:
  return [(name, parts[name]) for name in _PARTS if parts.get(name)]


def _work(plan: Mapping[str, Any]) -> list[str]:
  out = [
    f"a step of {plan['tokens']:,} tokens, on a device: {plan['flops'] / 1e12:,.3f} TFLOP of matrix products, "
    f"{bytes_text(plan['memory_traffic'])} to and from memory",
    f"  {'collective':<22}{'along':<26}{'times':>6}{'bytes':>12}{'largest':>12}{'sent':>12}{'ms':>9}",
  ]
  for row in plan["collectives"]:
    time = 1e3 * (row["seconds"] + row["network_seconds"])
    along = " × ".join(row["axes"])
    out.append(
      f"  {row['kind']:<22}{along:<26}{row['times']:>6}{bytes_text(row['bytes']):>12}{bytes_text(row['largest']):>12}"
      f"{bytes_text(row['sent']):>12}" + (f"{time:>9.3f}" if plan["chip"] else f"{'–':>9}")
    )
  if plan["loops_of_unknown_length"]:
    out.append(f"  {plan['loops_of_unknown_length']} loops of unknown length (rounds of an exchange) count once")
  if "seconds" in plan:
    s = plan["seconds"]
    each = ", ".join(f"{_BOUNDS[n]} {1e3 * s[n]:.2f} ms" for n in _BOUNDS)
    out += [
      "",
      f"estimate by published rates: {each}",
      f"  bound by {_BOUNDS[s['bound']]}: {1e3 * s['step']:.2f} ms a step if everything overlaps "
      f"({1e3 * s['alone']:.2f} ms if nothing does), {plan['tokens_per_second']:,.0f} tokens/s, MFU {plan['mfu']:.1%}",
    ]
  return out


def bytes_text(n: float) -> str:
  """Returns a number of bytes as text, such as "7.8 GiB"."""
  sign, n = "-" if n < 0 else "", abs(n)
  for unit in ("B", "KiB", "MiB", "GiB"):
    if n < 1024:
      return f"{sign}{n:.0f} {unit}" if unit == "B" else f"{sign}{n:.1f} {unit}"
    n /= 1024
  return f"{sign}{n:.1f} TiB"
