"""Reads the files of a run directory for its report; all of them but the config may be missing."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

from supermoe_jax import config
from supermoe_jax.data.dataset import dataset
from supermoe_jax.errors import DataError
from supermoe_jax.training.checkpoints import validated
from supermoe_jax.training.monitoring.metrics_log import read_rows


class RunFiles(NamedTuple):
  """The contents of a run directory; None or an empty list stands for a missing file."""

  workdir: pathlib.Path
  cfg: config.Config
  rows: list[dict[str, Any]]
  validation: list[dict[str, Any]]
  evaluation: dict[str, Any] | None
  manifest: dict[str, Any] | None
  embeddings: dict[str, Any] | None

  @property
  def same_data(self) -> bool:
    """Returns whether the dataset exists and was prepared as this run's config asks."""
    if self.manifest is None or self.manifest.get("data_hash") == self.cfg.data_hash():
      return self.manifest is not None
    wanted = self.cfg.data_identity()
    return "config" in self.manifest and dataset.dataset_identity(self.manifest, wanted, appended=False) == wanted

  @property
  def best(self) -> int | None:
    """Returns the step of the best round of a training that stops by itself; None for others, and before any."""
    steps = self.cfg.train.steps
    return next(iter(validated.best_steps(self.validation, steps)), None) if steps == "auto" else None

  @property
  def step(self) -> int:
    """Returns the last step in the evaluation, the embeddings and the metrics log; 0 without any."""
    parts = (self.evaluation, self.embeddings, self.rows[-1] if self.rows else None)
    return max((int(p["step"]) for p in parts if p), default=0)


def read_run(workdir: pathlib.Path) -> RunFiles:
  """Reads a run directory.

  Raises:
    ConfigError: `workdir` is not a run directory.
    DataError: a file of the run is damaged.
  """
  cfg = config.load_json(workdir / "config.json")
  return RunFiles(
    workdir,
    cfg,
    read_rows(workdir / "metrics.jsonl"),
    validated.validation_rows(workdir),
    read_json(workdir / "evaluation.json"),
    read_json(pathlib.Path(cfg.data.path) / "manifest.json"),
    read_json(workdir / "embeddings" / "manifest.json"),
  )


def read_json(file: pathlib.Path) -> dict[str, Any] | None:
  """Reads a JSON file of the run; returns None if it does not exist.

  Raises:
    DataError: it is damaged.
  """
  if not file.is_file():
    return None
  try:
    found: dict[str, Any] = json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise DataError(f"{file} is damaged ({error}); delete it and run the command that made it again.") from None
  return found
