"""The seesaw study that lies at hand of a run: its conclusion and its picture of gains."""

from __future__ import annotations

import pathlib
from typing import Any

from supermoe_jax.report.figures import gains_figures
from supermoe_jax.report.run_files import RunFiles, read_json
from supermoe_jax.seesaw import sentences


def study_places(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Where a study of a run is looked for: in the run, in its `seesaw` directory, and in the two directories above."""
  workdir = workdir.resolve()
  return [d / "seesaw.json" for d in (workdir, workdir / "seesaw", *workdir.parents[:2])]


def find_study(run: RunFiles) -> dict[str, Any] | None:
  """The study that lies nearest; None where there is none. One of other tasks or data is named, but not shown.

  Raises:
    DataError: its file is damaged.
  """
  for file in study_places(run.workdir):
    report = read_json(file)
    if report is None:
      continue
    out: dict[str, Any] = {"file": str(file), "page": str(file.with_suffix(".html")), "report": None}
    if set(report["tasks"]) != set(run.cfg.active_views):
      return {**out, "reason": f"it is of other tasks ({', '.join(report['tasks'])})"}
    if report.get("data_hash") not in (None, run.cfg.data_hash()):
      return {**out, "reason": "it is of data that were prepared with another configuration"}
    drawn = any(v["tasks"][t]["gain"]["seeds"] for v in report["variants"].values() for t in report["tasks"])
    return {
      **out,
      "reason": "",
      "report": report,
      "conclusion": [*sentences.conclusion(report), *sentences.choice(report)],
      "warnings": sentences.warnings(report),
      "marks": sentences.MARKS,
      "figure": gains_figures.draw_gains("seesaw-gains", report) if drawn else None,
    }
  return None
