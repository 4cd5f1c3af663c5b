"""Finds the seesaw study near a run, and prepares its conclusion and its figure of gains for the run's report."""

from __future__ import annotations

import pathlib
from typing import Any

from supermoe_jax.report.figures import gains_figures
from supermoe_jax.report.run_files import RunFiles, read_json
from supermoe_jax.seesaw import compare, sentences


def study_places(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Returns the paths to look for a study: in the run, in its `seesaw` directory, and in the two directories above."""
  workdir = workdir.resolve()
  return [d / "seesaw.json" for d in (workdir, workdir / "seesaw", *workdir.parents[:2])]


def find_study(run: RunFiles) -> dict[str, Any] | None:
  """Returns the first study in `study_places`; None without one. Of a study of other tasks, data or versions only the
  place is named.

  Raises:
    DataError: its file is damaged.
  """
  for file in study_places(run.workdir):
    report = read_json(file)
    if report is None:
      continue
    out: dict[str, Any] = {"file": str(file), "page": str(file.with_suffix(".html")), "report": None}
    if set(report["tasks"]) != set(run.cfg.active_views):
      return {**out, "reason": f"it has other tasks ({', '.join(report['tasks'])})"}
    if report.get("format") != compare.FORMAT:
      return {**out, "reason": "another version made it, which measured gains otherwise"}
    if report.get("data_hash") not in (None, run.cfg.data_hash()):
      return {**out, "reason": "its data were prepared with another configuration"}
    drawn = any(v["tasks"][t]["gain"]["seeds"] for v in report["variants"].values() for t in report["tasks"])
    return {
      **out,
      "reason": "",
      "report": report,
      "conclusion": [*sentences.conclusion(report), *sentences.chance(report), *sentences.choice(report)],
      "warnings": sentences.warnings(report),
      "marks": sentences.MARKS,
      "unit": sentences.UNIT,
      "figure": gains_figures.draw_gains("seesaw-gains", report) if drawn else None,
    }
  return None
