"""Validation while a run trains: its rows, the checkpoints that it keeps, and that it changes nothing else."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from supermoe_jax import cli, config, device_mesh
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ConfigError, RunError
from supermoe_jax.evaluation import evaluate, validation
from supermoe_jax.evaluation.validation import Validation
from supermoe_jax.training import loop
from supermoe_jax.training.checkpoints.validated import VALIDATION, best_checkpoint, best_steps, validation_rows
from supermoe_jax.training.run import Run
from tests.fixtures.grids import quick_few
from tests.fixtures.messages import messages
from tests.fixtures.small_log import every_task_config

pytestmark = pytest.mark.usefixtures("compiled_afresh")

SNAPSHOTS = 40


@pytest.fixture(scope="module")
def validated_cfg(cfg: config.Config) -> config.Config:
  about = {"every": 4, "snapshots": SNAPSHOTS}
  changes = [f"--config.train.validate.{name}={value}" for name, value in about.items()]
  return config.override(cfg, ["--config.train.checkpoint_every=2", "--config.train.checkpoints_kept=1", *changes])


@pytest.fixture(scope="module")
def validated(
  validated_cfg: config.Config, dataset: Dataset, compiled_afresh: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, list[str]]:
  """A run that got worse and worse, and what it said."""
  folder = tmp_path_factory.mktemp("validated") / "run"
  with pytest.MonkeyPatch.context() as patch, messages() as said:
    patch.setattr(validation, "validation_score", worse_and_worse())
    loop.train(validated_cfg, folder, validation=validation.validation_of(validated_cfg))
  return folder, said


def worse_and_worse() -> Any:
  scores = iter(range(10, 0, -1))
  return lambda cfg, tasks: float(next(scores))


def without_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  return [{k: v for k, v in row.items() if k != "speed"} for row in rows]


def test_a_run_that_is_validated_learns_the_same(
  validated: tuple[pathlib.Path, list[str]], workdir: pathlib.Path
) -> None:
  for mine, wanted in zip(*(jax.tree.leaves(Run(w).variables) for w in (validated[0], workdir)), strict=True):
    np.testing.assert_array_equal(mine, wanted)


def test_a_row_is_what_evaluation_finds_at_its_step(validated: tuple[pathlib.Path, list[str]]) -> None:
  folder, said = validated
  rows = validation_rows(folder)
  assert [r["step"] for r in rows] == [4, 8, 12]
  for row in (rows[0], rows[-1]):
    run = Run(folder, row["step"])
    found = evaluate.evaluate(run, compare=False, progress=False, splits=("validation",), write=False, most=SNAPSHOTS)
    assert row["tasks"] == {n: t["metrics"] for n, t in found["splits"]["validation"].items()}
    assert any(t["labels"] for t in found["splits"]["validation"].values())
  assert [line for line in said if line.startswith("validation at step 4: score 10.0000 (the best so far); ")]
  assert not any("best so far" in line for line in said if line.startswith("validation at step 8"))


def test_the_best_checkpoints_are_kept_beside_the_newest(
  validated: tuple[pathlib.Path, list[str]], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(validated[0], folder)
  assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [4, 12]
  assert best_checkpoint(folder) == 4
  assert cli.main(["evaluate", "--workdir", str(folder), "--checkpoint", "best"]) == 0
  assert json.loads((folder / "evaluation.json").read_text())["step"] == 4
  assert "scores at step 4;" in capsys.readouterr().out


@pytest.mark.parametrize("cut", quick_few(["within"], ["before", "within"]))
def test_a_run_that_is_cut_at_its_validation_ends_with_the_same_rows(
  validated: tuple[pathlib.Path, list[str]],
  validated_cfg: config.Config,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  cut: str,
) -> None:
  whole, folder, scores = validated[0], tmp_path / "run", worse_and_worse()

  def cut_at_8(self: Validation, step: int, *rest: Any) -> Any:
    if step == 8 and cut == "before":
      raise KeyboardInterrupt
    found = validate(self, step, *rest)
    if step == 8:
      lines = (folder / VALIDATION).read_text()
      (folder / VALIDATION).write_text(lines[:-20])  # the row was being written
      raise KeyboardInterrupt
    return found

  validate = Validation.validate
  with monkeypatch.context() as patch:
    patch.setattr(validation, "validation_score", scores)
    patch.setattr(Validation, "validate", cut_at_8)
    with pytest.raises(KeyboardInterrupt):
      loop.train(validated_cfg, folder, validation=validation.validation_of(validated_cfg))
  again = iter([9.0, 8.0])
  monkeypatch.setattr(validation, "validation_score", lambda cfg, tasks: next(again))
  loop.train(validated_cfg, folder, validation=validation.validation_of(validated_cfg))
  assert without_speed(validation_rows(folder)) == without_speed(validation_rows(whole))


def rows_of(scores: list[float | None]) -> list[dict[str, Any]]:
  return [{"step": 100 * (i + 1), "tasks": {"quiet": {"auc": score}}} for i, score in enumerate(scores)]


def test_a_task_stops_when_its_best_is_long_ago_and_stays_so(cfg: config.Config) -> None:
  def stopped(patience: int, *scores: float | None) -> dict[str, int]:
    change = f"--config.train.validate.task_patience={patience}"
    asked = config.override(cfg, ["--config.train.validate.every=4", change]) if patience else cfg
    return validation.stopped_tasks(asked, rows_of(list(scores)))

  rising, falling = (0.5, 0.6, 0.7, 0.8), (0.8, 0.7, 0.6)
  assert stopped(2, *rising) == {} == stopped(0, *falling) == stopped(3, *falling)
  assert stopped(2, *falling) == {"quiet": 100}
  assert stopped(2, 0.7, 0.8, 0.7, 0.7, 0.9) == {"quiet": 200}  # what it reaches later does not count
  assert stopped(2, 0.8, 0.7, 0.9, 0.8) == {}
  assert stopped(2, 0.8, None, None, 0.7) == {}  # a validation without a score says nothing
  assert stopped(2, 0.8, 0.8, 0.8) == {"quiet": 100}


def test_a_run_with_a_stopped_task_says_so_and_ends_alike_however_it_is_cut(
  validated: tuple[pathlib.Path, list[str]],
  validated_cfg: config.Config,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  patient = config.override(validated_cfg, ["--config.train.validate.task_patience=1"])

  def stops_at_4(cfg: config.Config, rows: list[dict[str, Any]]) -> dict[str, int]:
    return {"quiet": 2} if any(r["step"] == 4 for r in rows) else {}

  monkeypatch.setattr(validation, "stopped_tasks", stops_at_4)

  def trained(folder: pathlib.Path) -> None:
    loop.train(patient, folder, validation=validation.validation_of(patient))

  with messages() as said:
    trained(tmp_path / "whole")
  (line,) = [s for s in said if s.startswith("task quiet:")]
  assert "was best at step 2; from step 4 on its loss moves its head only" in line

  validate = Validation.validate
  with monkeypatch.context() as patch:

    def cut_at_8(self: Validation, step: int, *rest: Any) -> Any:
      if step == 8:
        raise KeyboardInterrupt
      return validate(self, step, *rest)

    patch.setattr(Validation, "validate", cut_at_8)
    with pytest.raises(KeyboardInterrupt):
      trained(tmp_path / "cut")
  trained(tmp_path / "cut")
  ends = [jax.tree.leaves(Run(w).variables) for w in (tmp_path / "whole", tmp_path / "cut", validated[0])]
  for mine, wanted in zip(ends[1], ends[0], strict=True):
    np.testing.assert_array_equal(mine, wanted)
  assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(ends[0], ends[2], strict=True))


def test_what_cannot_be_opened_says_what_is_there(
  validated: tuple[pathlib.Path, list[str]], workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  folder, _ = validated
  with pytest.raises(RunError, match=r"holds no checkpoint 8; there are 12, 4\."):
    Run(folder, 8)
  with pytest.raises(RunError, match=r"no validated checkpoint.*config\.train\.validate\.every"):
    best_checkpoint(workdir)
  assert cli.main(["evaluate", "--workdir", str(folder), "--checkpoint", "first"]) == 1
  assert "--checkpoint=first must be newest, best or a step" in capsys.readouterr().err


def test_a_run_validated_at_its_end_is_left_alone(
  validated: tuple[pathlib.Path, list[str]], validated_cfg: config.Config, tmp_path: pathlib.Path
) -> None:
  copy = tmp_path / "run"
  shutil.copytree(validated[0], copy)
  before = (copy / VALIDATION).read_bytes()
  with messages() as said:
    loop.train(validated_cfg, copy, validation=validation.validation_of(validated_cfg))
  assert "already trained" in said[-1] and (copy / VALIDATION).read_bytes() == before


def test_of_equal_scores_the_earlier_checkpoint_is_the_better_and_one_without_a_score_is_none() -> None:
  scores = {4: 0.5, 8: 0.5, 12: None, 16: 0.7, 20: -1.0}
  assert best_steps([{"step": s, "score": v} for s, v in scores.items()]) == [16, 4, 8, 20]


def test_a_run_is_validated_every_so_many_steps_and_at_its_end(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  def due(every: int, *done: int) -> list[int]:
    asked = config.override(cfg, [f"--config.train.validate.every={every}"])
    found = Validation(asked, dataset, tmp_path, device_mesh.make_mesh(cfg.train.mesh))
    (tmp_path / VALIDATION).write_text("".join(json.dumps({"step": s, "score": 0.0}) + "\n" for s in done))
    found.resume(12)
    return [step for step in range(13) if found.due(step)]

  assert due(8) == [8, 12] and due(4) == [4, 8, 12] and due(0) == []
  assert due(8, 8) == [12] and due(8, 8, 12) == []


def test_the_score_is_the_mean_of_main_metrics_or_the_one_that_is_named(tmp_path: pathlib.Path) -> None:
  cfg = config.resolve(every_task_config(tmp_path))
  tasks: dict[str, Any] = {
    "bought": {"labels": 300, "positive": 0.25, "metrics": {"auc": 0.75, "log_loss": 0.5}},
    "age": {"labels": 25, "metrics": {"rmse": 12.0, "r2": 0.25}},
  }
  assert {evaluate.main_metric(cfg, cfg.active_views[name]) for name in tasks} == {"auc", "rmse"}
  balanced = 4 * 300 * 0.25 * 0.75
  assert validation.validation_score(cfg, tasks) == pytest.approx(
    (balanced**0.5 * 0.75 + 5 * 0.25) / (balanced**0.5 + 5)
  )
  rare: dict[str, Any] = {"days_to_buy": {"labels": 5000, "observed": 0.002, "metrics": {"concordance": 0.9}}}
  weight = (2 * 10) ** 0.5  # of ten events
  assert validation.validation_score(cfg, {"age": tasks["age"]} | rare) == pytest.approx(
    (5 * 0.25 + weight * 0.9) / (5 + weight)
  )
  unknown: dict[str, Any] = {"bought": {"labels": 3, "positive": 0.0, "metrics": {"auc": None}}}
  assert validation.validation_score(cfg, tasks | unknown) == 0.25
  assert validation.validation_score(cfg, unknown) is None
  named = config.override(cfg, ["--config.train.validate.metric=bought/log_loss"])
  assert validation.validation_score(named, tasks) == -0.5
  assert validation.validation_score(named, {}) is None


def test_a_metric_that_a_task_has_not_is_refused_before_the_first_step(
  cfg: config.Config, dataset: Dataset, tmp_path: pathlib.Path
) -> None:
  wrong = config.override(cfg, ["--config.train.validate.metric=quiet/hr@10"])
  with pytest.raises(ConfigError, match=r"metrics of quiet are auc, average_precision, ece, log_loss\."):
    validation.validation_of(wrong)
  with pytest.raises(ConfigError, match=r"every=4 needs train\(\.\.\., validation=validation_of\(cfg\)\)"):
    loop.train(config.override(cfg, ["--config.train.validate.every=4"]), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_every_form_of_answer_names_its_metrics(tmp_path: pathlib.Path) -> None:
  cfg = config.resolve(every_task_config(tmp_path))
  for name, task in cfg.labelled_tasks.items():
    assert evaluate.main_metric(cfg, task) in evaluate.metric_names(cfg, task), name


@pytest.mark.parametrize(
  ("change", "problem"),
  [
    ("every=3", r"validate\.every=3 must be a multiple of config\.train\.checkpoint_every=4"),
    ("snapshots=-1", r"validate\.snapshots=-1 must not be negative"),
    ("metric=auc", r"validate\.metric='auc' must be task/metric"),
    ("checkpoints_kept=0", r"validate\.checkpoints_kept=0 must be positive"),
    ("task_patience=-1", r"validate\.task_patience=-1 must not be negative"),
    ("task_patience=2", r"task_patience=2 stops tasks by validation, but config\.train\.validate\.every is 0"),
  ],
)
def test_settings_that_cannot_work_are_refused(cfg: config.Config, change: str, problem: str) -> None:
  with pytest.raises(ConfigError, match=problem):
    config.override(cfg, [f"--config.train.validate.{change}"])
