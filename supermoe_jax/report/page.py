"""Writes the report of a run: one self-contained HTML page, made from the files of the run directory.

Every part except the config may be missing; its section then names the command that makes the part.
"""

from __future__ import annotations

import datetime
import json
import math
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from supermoe_jax import atomic_files, config, environment
from supermoe_jax.batch import Schema
from supermoe_jax.data.format.schema import schema_of_sizes
from supermoe_jax.evaluation.metrics import LOWER_IS_BETTER
from supermoe_jax.models import parameters
from supermoe_jax.report import (
  experts_section,
  neighbors_section,
  rendering,
  results_section,
  seesaw_section,
  task_sentences,
  training_section,
  user_map_section,
)
from supermoe_jax.report.figures.drawing import number, percent
from supermoe_jax.report.run_files import RunFiles, read_run
from supermoe_jax.seesaw import sentences
from supermoe_jax.training.step import abstract_model

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "supermoe_jax")


def write_report(workdir: pathlib.Path) -> pathlib.Path:
  """Writes `WORKDIR/report.html` and returns its path.

  Raises:
    ConfigError: `workdir` is not a run directory.
    DataError: a file of the run is damaged.
  """
  workdir = pathlib.Path(workdir)
  run = read_run(workdir)
  page = rendering.render_template("report.html.jinja", _page(run), _FILTERS)
  file = workdir / "report.html"
  atomic_files.write_file(file, page)
  return file


def _page(run: RunFiles) -> dict[str, Any]:
  where = shlex.quote(str(run.workdir))
  test = run.cfg.data.split.test
  return {
    "title": run.workdir.resolve().name,
    "workdir": str(run.workdir),
    "run": run,
    "commands": {
      "prepare": "supermoe prepare --config CONFIG",
      "train": f"supermoe train --config CONFIG --workdir {where}",
      "evaluate": f"supermoe evaluate --workdir {where}",
      "embed": f"supermoe embed --workdir {where} --as-of {test[-1] if test else 'TIME'}",
      "seesaw": f"supermoe seesaw --config CONFIG --workdir {shlex.quote(str(run.workdir / 'seesaw'))}",
    },
    "notes": list(_notes(run)),
    "parameters": _parameters(run),
    "views": task_sentences.views_sentence(run.cfg.model),
    "tasks": {n: task_sentences.task_question(t) for n, t in run.cfg.active_tasks.items()},
    "headline": results_section.headline_section(run),
    "metrics": results_section.metric_tables(run),
    "lower_is_better": LOWER_IS_BETTER,
    "seesaw": seesaw_section.find_study(run),
    "label_shares": results_section.label_shares(run),
    "training": training_section.training_section(run),
    "history": results_section.history_section(run),
    "calibration": results_section.calibration_section(run),
    "deciles": results_section.decile_section(run),
    "experts": experts_section.by_task(run),
    "events": experts_section.by_event(run),
    "map": user_map_section.embedding_map(run),
    "neighbours": neighbors_section.neighbors_section(run),
    "config_text": json.dumps(config.to_dict(run.cfg), indent=2, ensure_ascii=False),
    "versions": environment.installed(PACKAGES),
    "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
  }


def _notes(run: RunFiles) -> Iterator[str]:
  """Yields the warnings of preparation, and a note for each part that does not belong to the run's other parts."""
  if run.manifest is not None and not run.same_data:
    yield (
      f"The dataset at {run.cfg.data.path} was prepared with another configuration than this run's; the data facts "
      "below describe the present dataset, not the one that the run was trained on."
    )
  yield from (f"Preparation warned: {warning}." for warning in (run.manifest or {}).get("warnings", ()))
  parts = (
    ("The evaluation shown here was", run.evaluation, "evaluate"),
    ("The embeddings shown here were", run.embeddings, "embed --overwrite"),
  )
  for what, part, verb in parts:
    if part is None:
      continue
    again = f"run 'supermoe {verb}' again to bring this up to date."
    if run.best is not None and part["step"] != run.best:
      yield f"{what} made at step {part['step']:,}, but step {run.best:,} is the best on validation; {again}"
    elif run.best is None and part["step"] < run.step:
      yield f"{what} made at step {part['step']:,}, but the run has reached step {run.step:,}; {again}"
    if part.get("config_hash") not in (None, run.cfg.hash()):
      yield f"{what} made with another config than the one in this directory; {again}"


def _score(value: float | None, *, signed: bool = False, digits: int = 4) -> str:
  """Returns a metric as text, with a true minus sign; a missing value is a dash."""
  if value is None or not math.isfinite(value):
    return "–"
  return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def _between(interval: Sequence[float] | None, *, signed: bool = False) -> str:
  """Returns an interval as text; a missing interval is a dash."""
  return "–" if interval is None else " to ".join(_score(end, signed=signed, digits=3) for end in interval)


_FILTERS = {"number": number, "percent": percent, "score": _score, "between": _between, "cell": sentences.cell}


def _parameters(run: RunFiles) -> dict[str, int] | None:
  """Returns the counts of the model's parameters, without allocating the model; None without the run's dataset."""
  if run.manifest is None or not run.same_data:
    return None
  model, schema = run.cfg.model, _schema(run.cfg, run.manifest)
  _, variables = abstract_model(run.cfg, schema)
  found = parameters.count_parameters(variables, model.experts_per_token / model.experts)
  return {**found._asdict(), "rest": found.total - found.tables}


def _schema(cfg: config.Config, manifest: Mapping[str, Any]) -> Schema:
  """Returns the sizes of a dataset from its manifest."""
  codes = {n: f["codes"] for n, f in manifest["fields"].items() if "codes" in f}
  counts = {n: splits["train"] for n, splits in manifest["labels"].items()}
  classes = {n: len(count["classes"]) for n, count in counts.items() if "classes" in count}
  return schema_of_sizes(cfg, codes, classes, len(manifest["aggregates"]["mean"]))
