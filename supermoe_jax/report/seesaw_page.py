"""Writes the page of a seesaw study: one self-contained HTML file, made from the content of `seesaw.json`."""

from __future__ import annotations

import datetime
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from supermoe_jax import atomic_files
from supermoe_jax.report import rendering
from supermoe_jax.report.figures import gains_figures, heat_maps
from supermoe_jax.report.figures.drawing import number
from supermoe_jax.seesaw import sentences
from supermoe_jax.seesaw.sentences import Report


def write_study_files(report: Report, workdir: pathlib.Path) -> None:
  """Writes a study's page, its figure of gains and its table: `seesaw.html`, `seesaw.svg` and `seesaw.md`."""
  write_study_page(report, workdir / "seesaw.html")
  gains_figures.write_picture(report, workdir / "seesaw.svg")
  atomic_files.write_file(workdir / "seesaw.md", sentences.gains_markdown(report))


def write_study_page(report: Report, file: pathlib.Path) -> pathlib.Path:
  """Writes the page of `report`, the result of `seesaw.compare.make_report`, to `file`; returns its path.

  The study may be unfinished: the page names everything that is missing.
  """
  file = pathlib.Path(file)
  filters = {
    "number": number,
    "cell": sentences.cell,
    "interval": sentences.interval_in_sentence,
    "signed": sentences.signed,
  }
  filters |= {"score": _score, "share": _share, "count": _count}
  atomic_files.write_file(file, rendering.render_template("seesaw.html.jinja", _page(report, file), filters))
  return file


def _page(report: Report, file: pathlib.Path) -> dict[str, Any]:
  variants = report["variants"]
  drawn = any(v["tasks"][t]["gain"]["seeds"] for v in variants.values() for t in report["tasks"])
  judged = [v["tasks"][t]["verdict"] for v in variants.values() for t in report["compared"]]
  return {
    "title": file.resolve().parent.name,
    "report": report,
    "conclusion": [*sentences.conclusion(report), *sentences.chance(report), *sentences.choice(report)],
    "warnings": sentences.warnings(report),
    "sentences": {n: sentences.describe_variant(report, n).removeprefix(f"{n}: ") for n in variants},
    "marks": sentences.MARKS,
    "unit": sentences.UNIT,
    "few_seeds": sentences.FEW_SEEDS,
    "intervals": sum(v != "unknown" for v in judged),
    "gains": gains_figures.draw_gains("gains", report) if drawn else None,
    "trade_off": gains_figures.draw_trade_off("trade-off", report)
    if any(v["of_mean_gains"]["harm"] is not None and v["harm"]["seeds"] for v in variants.values())
    else None,
    "shares": gains_figures.draw_shares("shares", report) if _has_shares(report) else None,
    "details": {n: _details(f"v{i}", v) for i, (n, v) in enumerate(variants.items())},
    "commands": {n: _command(v["overrides"]) for n, v in variants.items()},
    "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
  }


def _has_shares(report: Report) -> bool:
  shares = (t["share_of_possible"] for v in report["variants"].values() for t in v["tasks"].values())
  return any(s is not None and s["seeds"] for s in shares)


def _details(name: str, variant: Mapping[str, Any]) -> dict[str, list[Markup]]:
  """Draws the figures of one variant: gradient cosines and weights, and the expert loads and gates of its tasks."""
  about, experts = [], []
  cosine, weights, loads = variant["cosine"], variant["weights"], variant["expert_load"]
  if cosine and cosine["tasks"]:
    title = "Cosine of the tasks' gradients"
    about.append(gains_figures.draw_cosines(f"{name}-cosine", title, cosine["tasks"], cosine["matrix"]))
  if weights and weights["step"] and len(weights) > 1:
    about.append(gains_figures.draw_weights(f"{name}-weights", "Weight of each task over the steps", weights))
  loads = {t: v for t, v in loads.items() if v.get("load") and v.get("snapshots", 1)}
  for m in range(min((len(v["load"]) for v in loads.values()), default=0)):
    shares = np.array([v["load"][m] for v in loads.values()], np.float64)
    most = float(shares.max()) or 1.0
    # Few experts make a narrow figure: the rest of the title is in the caption.
    experts.append(heat_maps.heat_map(f"{name}-load-{m}", f"MoE layer {m + 1}", list(loads), shares, most))
  gates = {t: v["gate"] for t, v in variant["expert_load"].items() if v.get("gate")}
  if gates:
    shares = np.array(list(gates.values()), np.float64)
    most = float(shares.max()) or 1.0
    experts.append(heat_maps.heat_map(f"{name}-gate", "Gate", list(gates), shares, most))
  return {"about": about, "experts": experts}


def _command(overrides: list[str]) -> str:
  """Returns the shell command that trains this variant once."""
  words = ["supermoe train --config CONFIG --workdir RUN", *(shlex.quote(f"--config.{o}") for o in overrides)]
  return " \\\n  ".join(words)


def _score(value: float | None) -> str:
  return "–" if value is None else f"{value:.4f}".replace("-", "−")


def _count(value: float | None) -> str:
  return "–" if value is None else f"{value:g}"


def _share(found: Mapping[str, Any] | None) -> str:
  """Formats a share of the possible in percent, with half the width of its interval."""
  if found is None or found["mean"] is None:
    return "–"
  half = "" if found["low"] is None else f" ±{50 * (found['high'] - found['low']):.1f}"
  return f"{100 * found['mean']:.1f}{half}%".replace("-", "−")
