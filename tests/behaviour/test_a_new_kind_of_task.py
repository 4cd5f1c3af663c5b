"""A new kind of task is a class of settings and a class of labels, each in its registry; nothing else changes."""

import dataclasses
import pathlib
from typing import ClassVar

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.data.encoding.splits import TEST
from supermoe_jax.data.preparation import prepare
from supermoe_jax.data.tasks import KINDS, TaskKind, question
from supermoe_jax.data.tasks.labels import LabelInputs, Labels, TaskLabels, future_window
from supermoe_jax.evaluation import evaluate
from supermoe_jax.training import loop
from supermoe_jax.training.run import Run
from tests.fixtures.short_runs import ONE_BLOCK
from tests.fixtures.small_log import raw_config


@dataclasses.dataclass(frozen=True)
class BusyDays(config.LabelledTask):
  """Whether at least `events` events happen in [τ, τ + horizon_days)."""

  kind: ClassVar[str] = "busy"

  events: int = 3
  horizon_days: float = 7.0

  @property
  def answer(self) -> config.Answer:
    return "binary"

  @property
  def horizon(self) -> float | None:
    return self.horizon_days


class BusyDaysKind(TaskKind[BusyDays]):
  @classmethod
  def question(cls, task: BusyDays) -> str:
    return f"at least {task.events} events within {task.horizon_days:g} days"

  def label(self, inputs: LabelInputs) -> TaskLabels:
    assert inputs.times is not None
    start, stop, known = future_window(inputs.block, inputs.snapshots, inputs.times, self.task.horizon_days)
    return TaskLabels(Labels((stop - start >= self.task.events).astype(np.float32), known))


@pytest.mark.slow
def test_a_new_kind_is_prepared_trained_and_evaluated(
  log_folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(config.TASK_KINDS, BusyDays.kind, BusyDays)
  monkeypatch.setitem(KINDS, BusyDays.kind, BusyDaysKind)
  raw = raw_config(log_folder)
  raw["data"]["path"] = str(tmp_path / "dataset")
  raw["tasks"] = {"busy": {"kind": "busy", "events": 2}, "next_page": raw["tasks"]["next_page"]}
  raw["train"] |= {"steps": 2, "warmup_steps": 1, "checkpoint_every": 2}
  cfg = config.override(config.resolve(raw), ONE_BLOCK)
  assert config.resolve(config.to_dict(cfg)) == cfg and question(cfg.tasks["busy"]) == "at least 2 events within 7 days"
  prepare.prepare(cfg)

  dataset = Dataset(cfg.data.path)
  times, wanted = [dataset.history(dataset[i]).time for i in range(len(dataset))], 0
  for i, history in enumerate(times):
    record = dataset[i]
    for tau, known, label in zip(record["snapshot_time"], record["known_busy"], record["label_busy"], strict=True):
      after = np.sum((history >= tau) & (history < tau + 7 * config.MICROSECONDS_PER_DAY))
      assert not known or label == (after >= 2)
    wanted += int(np.sum(record["known_busy"][record["snapshot_split"] == TEST]))

  assert loop.train(cfg, tmp_path / "run") == 2
  found = evaluate.evaluate(Run(tmp_path / "run"), progress=False)
  assert found["splits"]["test"]["busy"]["labels"] == wanted and found["main_metric"]["busy"] == "auc"
