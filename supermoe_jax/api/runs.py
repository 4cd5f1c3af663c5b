"""Trains a run, and evaluates, embeds and reports a trained run."""

from __future__ import annotations

import datetime
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from supermoe_jax import config
from supermoe_jax import progress as progress_lib
from supermoe_jax.api.embeddings import Embeddings
from supermoe_jax.embeddings import embed as embed_lib
from supermoe_jax.evaluation import evaluate as evaluate_lib
from supermoe_jax.evaluation import results_table
from supermoe_jax.evaluation.validation import validation_of
from supermoe_jax.report.page import write_report
from supermoe_jax.training import loop
from supermoe_jax.training import run as run_lib


class Evaluation:
  """The metrics of a run's tasks and of simple baselines.

  Attributes:
    result: the content of `evaluation.json`.
  """

  def __init__(self, result: Mapping[str, Any]):
    """Wraps the content of `evaluation.json`."""
    self.result = result

  def to_table(self) -> pa.Table:
    """Returns all metrics as a table: `split, task, labels, model, metric, value, main`.

    `model` is "supermoe" or a baseline; `main` marks the main metric of the task.
    """
    rows = []
    for split, tasks in self.result["splits"].items():
      for task, found in tasks.items():
        for model, metrics in {"supermoe": found["metrics"], **found["baselines"]}.items():
          for metric, value in metrics.items():
            rows.append(
              {
                "split": split,
                "task": task,
                "labels": found["labels"],
                "model": model,
                "metric": metric,
                "value": value,
                "main": metric == self.result["main_metric"][task],
              }
            )
    return pa.Table.from_pylist(rows, schema=_METRICS)

  def __repr__(self) -> str:
    split = results_table.shown_split(self.result)
    table = results_table.aligned_table(results_table.results_table(self.result, split))
    return "\n".join([table, *results_table.results_words(self.result, split)])


_METRICS = pa.schema(
  {
    "split": pa.string(),
    "task": pa.string(),
    "labels": pa.int64(),
    "model": pa.string(),
    "metric": pa.string(),
    "value": pa.float64(),
    "main": pa.bool_(),
  }
)


class Run(run_lib.Run):
  """A trained run: its config, dataset and parameters, at a checkpoint."""

  def evaluate(self, *, progress: bool = False) -> Evaluation:
    """Measures every task and its baselines on validation and test snapshots, and writes `evaluation.json`.

    Raises:
      ConfigError: a split that the config names has no snapshot.
    """
    with progress_lib.shown(progress):
      return Evaluation(evaluate_lib.evaluate(self, progress=progress))

  def embed(
    self,
    as_of: str | datetime.date | Sequence[str | datetime.date],
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    since: str | os.PathLike[str] | None = None,
    columns: Sequence[str] = (),
    dtype: str = "float32",
    views: bool = False,
    progress: bool = False,
  ) -> Embeddings:
    """Writes the embedding of every user with an event before a time.

    Args:
      as_of: a time such as "2024-06-01" (UTC), a date or a datetime, or several; "now", the end of the log; or "last",
        the moment after each user's own last event.
      out: the directory to write; by default `embeddings` in the run directory.
      overwrite: whether to replace existing embeddings.
      since: an earlier directory of this run's embeddings; only users with new events are computed.
      columns: columns of the user table to add to the rows.
      dtype: the dtype of the vectors in the files, float32 or float16.
      views: whether to write vectors of named views, each normalised: "state", the encoder's vector at length 1,
        "answers" of the tasks and, if the config has them, "aggregates", "counts" and "factors"; by default the
        encoder's vector alone.
      progress: whether to show a bar.

    Raises:
      ConfigError: a time or a column cannot be used.
      DataError: `out` holds something else, or the disk is full.
    """
    folder = self.workdir / "embeddings" if out is None else pathlib.Path(out)
    given = [as_of] if isinstance(as_of, str | datetime.date) else as_of
    times = [time.isoformat() if isinstance(time, datetime.date) else time for time in given]
    earlier = None if since is None else pathlib.Path(since)
    with progress_lib.shown(progress):
      embed_lib.embed(
        self, times, folder, overwrite=overwrite, since=earlier, columns=columns, dtype=dtype, views=views
      )
    return Embeddings(folder)

  def report(self) -> pathlib.Path:
    """Writes the run's page `report.html` and returns its path."""
    return write_report(self.workdir)

  def __repr__(self) -> str:
    tasks, steps = ", ".join(self.cfg.active_tasks), self.cfg.train.steps
    of = ", training stops by itself" if steps == "auto" else f" of {steps:,}"
    return (
      f"Run({str(self.workdir)!r}: step {self.step:,}{of}, {len(self.dataset):,} users, "
      f"width {self.cfg.model.d_model}, tasks {tasks})"
    )


def train(cfg: config.Config, workdir: str | os.PathLike[str], *, profile: bool = False, progress: bool = False) -> Run:
  """Trains for `cfg.train.steps` and returns the run; the same call resumes a stopped run.

  Args:
    cfg: the config; its dataset must be prepared.
    workdir: the run directory.
    profile: whether to write a trace of a few steps to `workdir/profile`.
    progress: whether to show a bar.

  Raises:
    ConfigError: `config.train.validate.metric` is not a metric of its task.
    DataError: there is no dataset, or it was prepared from another config.
    RunError: `workdir` holds a run of another config, or a run that cannot go on.
    Stopped: a signal asked the run to stop; the run is saved.
  """
  path = pathlib.Path(workdir)
  with progress_lib.shown(progress):
    loop.train(cfg, path, validation=validation_of(cfg), progress=progress, profile=profile)
  return Run(path)
