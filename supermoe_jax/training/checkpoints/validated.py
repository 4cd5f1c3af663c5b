"""Finds the checkpoints of a run that were best on validation."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from supermoe_jax import config
from supermoe_jax.errors import RunError
from supermoe_jax.training.checkpoints.checkpoint import Checkpoints
from supermoe_jax.training.monitoring.metrics_log import read_rows

# The file of a run directory with a row for each validation: its `step`, `score` and the metrics of all `tasks`.
VALIDATION = "validation.jsonl"


def validation_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns all rows of a run directory; none if the run was not validated while it trained."""
  return read_rows(workdir / VALIDATION)


def best_steps(rows: Sequence[Mapping[str, Any]], steps: int | Literal["auto"] = 0) -> list[int]:
  """Returns the steps of rows that have a score, the best first; of equal scores the earlier step first.

  Where `config.train.steps` is "auto" only ends of rounds count: between them the learning rate is high.
  """
  ends = config.round_ends("auto") if steps == "auto" else [r["step"] for r in rows]
  scored = [r for r in rows if r["score"] is not None and r["step"] in ends]
  return [r["step"] for r in sorted(scored, key=lambda r: (-r["score"], r["step"]))]


def best_checkpoint(workdir: pathlib.Path) -> int:
  """Returns the step of the checkpoint that was best on validation, among the checkpoints that still exist.

  Where `config.train.steps` is "auto" another checkpoint than a round's end counts only while no round's end exists.

  Raises:
    ConfigError: `workdir` is not a run directory.
    RunError: no checkpoint that exists was validated.
  """
  rows, steps = validation_rows(workdir), config.load_json(workdir / "config.json").train.steps
  found = _existing(workdir, best_steps(rows, steps)) or _existing(workdir, best_steps(rows))
  if not found:
    raise RunError(
      f"{workdir} has no validated checkpoint; train with config.train.validate.every or steps='auto', or name "
      "--checkpoint newest."
    )
  return found[0]


def usual_checkpoint(workdir: pathlib.Path, steps: int | Literal["auto"]) -> int | None:
  """Returns the step of the checkpoint that is read where none is named; None: the newest.

  It is the best round's end of a run whose training stops by itself (`config.train.steps` is "auto"), once one was
  validated.
  """
  if steps != "auto":
    return None
  return next(iter(_existing(workdir, best_steps(validation_rows(workdir), steps))), None)


def _existing(workdir: pathlib.Path, steps: Sequence[int]) -> list[int]:
  there = set(Checkpoints(workdir).steps)
  return [step for step in steps if step in there]
