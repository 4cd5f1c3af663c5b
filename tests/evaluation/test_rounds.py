"""Training that stops by itself: its schedule, what ends it, what is read afterwards, and how it resumes."""

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from supermoe_jax import cli, config, device_mesh
from supermoe_jax.config import rounds
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ConfigError, RunError
from supermoe_jax.evaluation import validation
from supermoe_jax.evaluation.validation import last_round, validation_of
from supermoe_jax.seesaw import study_run
from supermoe_jax.training import loop
from supermoe_jax.training.checkpoints.validated import best_checkpoint, usual_checkpoint, validation_rows
from supermoe_jax.training.monitoring.metrics_log import MetricsLog
from supermoe_jax.training.optimizer import schedule
from supermoe_jax.training.run import Run
from tests.fixtures.messages import messages

pytestmark = pytest.mark.usefixtures("compiled_afresh")

AUTO = "--config.train.steps=auto"
SCORES = (0.5, 0.6, 0.55)


@pytest.fixture(scope="module")
def short_rounds() -> Iterator[None]:
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rounds, "FIRST_ROUND", 4)
    yield


@pytest.fixture(scope="module")
def auto(cfg: config.Config, short_rounds: None) -> config.Config:
  return config.override(cfg, [AUTO, "--config.train.warmup_steps=2", "--config.train.checkpoints_kept=1"])


def trained(
  cfg: config.Config, folder: pathlib.Path, scores: tuple[float | None, ...] = SCORES
) -> tuple[int, list[str]]:
  left = iter(scores)
  with pytest.MonkeyPatch.context() as patch, messages() as said:
    patch.setattr(validation, "validation_score", lambda cfg, tasks: next(left))
    return loop.train(cfg, folder, validation=validation_of(cfg)), said


@pytest.fixture(scope="module")
def stopped(auto: config.Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A run whose second round, which ends at step 8, was the best, and that ended at step 16."""
  folder = tmp_path_factory.mktemp("auto") / "run"
  step, said = trained(auto, folder)
  assert step == 16
  assert "training ends at step 16: its score 0.5500 is not above 0.6000 at step 8, which other commands read" in said
  return folder


def test_every_round_is_a_cosine_and_only_the_first_has_a_warm_up(
  cfg: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(rounds, "FIRST_ROUND", 125)
  train = config.override(cfg, [AUTO, "--config.train.warmup_steps=50"]).train
  assert config.round_ends(train.steps) == (125, 250, 500, 1000, 2000, 4000)
  rate = jax.vmap(schedule(train))(np.arange(4000))
  peak, lowest = train.learning_rate, train.learning_rate * train.final_learning_rate
  np.testing.assert_allclose(rate[:51], peak * np.arange(51) / 50, rtol=1e-5)
  for begun, end in ((50, 125), (125, 250), (250, 500), (1000, 2000), (2000, 4000)):
    part = np.asarray(rate[begun:end])
    wanted = lowest + (peak - lowest) * (1 + np.cos(np.pi * np.arange(end - begun) / (end - begun))) / 2
    np.testing.assert_allclose(part, wanted, rtol=1e-4)


@pytest.mark.parametrize(
  ("scores", "end"),
  [
    ([], None),
    ([0.5], None),
    ([0.5, 0.6], None),
    ([0.5, 0.6, 0.6], 500),
    ([0.5, 0.4], 250),
    ([0.5, 0.5004], 250),
    ([0.5, 0.5006], None),
    ([-5000.0, -4999.0], 250),
    ([-0.0009, -0.0001], None),
    ([0.5, 0.6, None], 500),
    ([None, None, None], None),
    ([None, None, None, None], 1000),
    ([None, 0.4, 0.5], None),
    ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 4000),
  ],
)
def test_training_ends_with_the_first_round_that_gains_nothing(
  scores: list[float | None], end: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(rounds, "FIRST_ROUND", 125)
  between: list[dict[str, Any]] = [{"step": 130, "score": 0.9}]  # no round ends here
  rows = [{"step": s, "score": v} for s, v in zip(config.round_ends("auto"), scores)]
  assert last_round(rows) == last_round(between + rows) == end


def test_the_best_round_is_read_unless_another_checkpoint_is_named(
  stopped: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(stopped, folder)
  assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [8, 16]
  assert (Run(folder).step, Run(folder, 16).step, Run(folder, "newest").step) == (8, 16, 16)
  for named, step in (((), 8), (("--checkpoint", "newest"), 16), (("--checkpoint", "16"), 16)):
    assert cli.main(["evaluate", "--workdir", str(folder), *named]) == 0
    assert json.loads((folder / "evaluation.json").read_text())["step"] == step
    assert f"at step {step};" in capsys.readouterr().out


def test_the_best_checkpoint_is_a_round_s_end_whatever_was_reached_within_a_round(
  stopped: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(stopped, folder)
  shutil.copytree(folder / "checkpoints" / "16", folder / "checkpoints" / "14")
  rows = validation_rows(folder)
  within = {**rows[-1], "step": 14, "score": 0.9}
  file = folder / "validation.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], within, rows[-1]]))
  assert (usual_checkpoint(folder, "auto"), best_checkpoint(folder)) == (8, 8)
  file.write_text(json.dumps(within) + "\n")  # no round's end was validated yet
  assert (usual_checkpoint(folder, "auto"), best_checkpoint(folder)) == (None, 14)


def test_the_report_is_about_the_best_round(stopped: pathlib.Path, tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "run"
  shutil.copytree(stopped, folder)
  assert cli.main(["evaluate", "--workdir", str(folder)]) == 0
  assert cli.main(["report", "--workdir", str(folder)]) == 0
  page = (folder / "report.html").read_text()
  assert "step 16; step 8 is the best on validation" in page
  assert "to bring this up to date" not in page
  assert cli.main(["evaluate", "--workdir", str(folder), "--checkpoint", "newest"]) == 0
  assert cli.main(["report", "--workdir", str(folder)]) == 0
  assert "made at step 16, but step 8 is the best on validation" in (folder / "report.html").read_text()


def test_a_best_round_that_is_damaged_names_the_others(stopped: pathlib.Path, tmp_path: pathlib.Path) -> None:
  folder = tmp_path / "run"
  shutil.copytree(stopped, folder)
  for file in (folder / "checkpoints" / "8" / "model").rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:10])
  with pytest.raises(RunError, match=r"cannot be used \(8: .*Name another one with --checkpoint: 16\."):
    Run(folder)
  assert Run(folder, 16).step == 16


@pytest.mark.parametrize(
  ("scores", "reason"),
  [
    ((0.5, 0.6, 0.6), "its score 0.6000 is not above 0.6000 at step 8, which other commands read"),
    ((0.5, 0.6, None), "it has no score, unlike 0.6000 at step 8, which other commands read"),
    ((0.5, 0.6, 0.6001), "which is the best, but gains less than a thousandth over the rounds before"),
    ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), "the end of its last round, which is still the best"),
  ],
)
def test_the_log_says_why_training_ends(
  auto: config.Config, dataset: Dataset, tmp_path: pathlib.Path, scores: tuple[float | None, ...], reason: str
) -> None:
  ends = config.round_ends("auto")[: len(scores)]
  rows = [json.dumps({"step": s, "score": v, "tasks": {}}) + "\n" for s, v in zip(ends, scores)]
  (tmp_path / "validation.jsonl").write_text("".join(rows))
  judged = validation.Validation(auto, dataset, tmp_path, device_mesh.make_mesh(auto.train.mesh))
  judged.resume(ends[-1])
  assert judged.ended() and reason in judged.reason()


def test_without_a_validation_snapshot_there_is_no_score(
  auto: config.Config, dataset: Dataset, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(validation, "UNSCORED_STEPS", 4)
  monkeypatch.setitem(dataset.manifest["snapshots"], "validation", 0)
  monkeypatch.setattr(loop, "Dataset", lambda path: dataset)
  assert loop.train(auto, tmp_path / "run", validation=validation_of(auto)) == 4
  assert [row["score"] for row in validation_rows(tmp_path / "run")] == [None]


def test_a_number_of_steps_reads_the_newest_checkpoint(
  stopped: pathlib.Path, workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(workdir, folder)
  (folder / "validation.jsonl").write_text(json.dumps({"step": 1, "score": 9.0, "tasks": {}}) + "\n")
  assert Run(folder).step == 12


def test_a_run_that_has_ended_is_trained_no_further(
  stopped: pathlib.Path, auto: config.Config, tmp_path: pathlib.Path
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(stopped, folder)
  before = (folder / "validation.jsonl").read_bytes()
  step, said = trained(auto, folder, ())
  assert step == 16 and "already trained" in said[-1]
  assert (folder / "validation.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut_at", [8, 16])
def test_a_run_that_was_cut_at_the_end_of_a_round_ends_alike(
  stopped: pathlib.Path, auto: config.Config, tmp_path: pathlib.Path, cut_at: int
) -> None:
  folder, validate = tmp_path / "run", validation.Validation.validate

  def cut(self: validation.Validation, step: int, *rest: Any) -> Any:
    if step == cut_at:
      raise KeyboardInterrupt
    return validate(self, step, *rest)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(validation.Validation, "validate", cut)
    trained(auto, folder)
  step, _ = trained(auto, folder, SCORES[{8: 1, 16: 2}[cut_at] :])
  assert step == 16
  rows, wanted = ([{**r, "speed": None} for r in validation_rows(f)] for f in (folder, stopped))
  assert rows == wanted and [r["step"] for r in rows] == [4, 8, 16]
  for mine, whole in zip(*(jax.tree.leaves(Run(f, "newest").variables) for f in (folder, stopped)), strict=True):
    np.testing.assert_array_equal(mine, whole)


def test_a_run_that_was_cut_within_a_round_ends_alike(
  stopped: pathlib.Path, auto: config.Config, tmp_path: pathlib.Path
) -> None:
  folder, add = tmp_path / "run", MetricsLog.add
  saving = config.override(auto, ["--config.train.checkpoint_every=6"])

  def cut(self: MetricsLog, step: int, *rest: Any) -> Any:
    if step == 14:
      raise KeyboardInterrupt
    return add(self, step, *rest)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(MetricsLog, "add", cut)
    trained(saving, folder)
  assert Run(folder, "newest").step == 12
  assert trained(saving, folder, SCORES[2:])[0] == 16
  assert [(r["step"], r["score"]) for r in validation_rows(folder)] == list(zip((4, 8, 16), SCORES))
  for mine, whole in zip(*(jax.tree.leaves(Run(f, "newest").variables) for f in (folder, stopped)), strict=True):
    np.testing.assert_array_equal(mine, whole)


def test_without_a_score_training_goes_on_for_some_steps(
  auto: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(validation, "UNSCORED_STEPS", 8)
  step, said = trained(auto, tmp_path / "run", (None, None))
  assert step == 8
  reason = "training ends at step 8: no task has a value on validation, so nothing says how long to train"
  assert f"warning: {reason}" in said
  assert Run(tmp_path / "run").step == 8


def test_a_study_lets_its_runs_stop_by_themselves(
  auto: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  left, shown = iter(SCORES), []
  monkeypatch.setattr(validation, "validation_score", lambda cfg, tasks: next(left))
  monkeypatch.setattr(study_run, "Run", lambda workdir: shown.append(Run(workdir)) or shown[0])
  study_run.run_one(auto, tmp_path / "run", variant="all")
  assert shown[0].step == 8


def test_the_number_of_steps_and_the_word_replace_each_other(cfg: config.Config) -> None:
  word = config.override(cfg, [AUTO])
  assert word.train.steps == "auto"
  assert config.override(word, ["--config.train.steps=30"]).train.steps == 30
  assert config.override(cfg, ["--config.train.steps=30", "--config.train.steps=auto"]).train.steps == "auto"
  assert config.override(word, ["--config.train.steps=auto", "--config.train.steps=300"]).train.steps == 300
  assert config.override(cfg, ["--config.train.steps=1_000"]).train.steps == 1000
  assert word.hash() != cfg.hash()
  for wrong in ("never", "1.5", ""):
    with pytest.raises(ConfigError, match="steps"):
      config.override(cfg, [f"--config.train.steps={wrong}"])
  for raw in (1.5, True, None):
    with pytest.raises(ConfigError, match=r"config\.train\.steps"):
      config.resolve({**config.to_dict(cfg), "train": {**config.to_dict(cfg)["train"], "steps": raw}})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (["data.split.validation=()"], r"steps='auto' stops by validation, but .*validation is empty; name"),
    (["train.warmup_steps=125"], r"warmup_steps=125 must be less than steps=auto, whose first round has 125 steps"),
    (["train.steps_per_call=2"], r"steps=auto has a first round of 125 steps, which must be a multiple of .*call=2"),
  ],
)
def test_a_config_that_cannot_stop_by_itself_is_refused(
  cfg: config.Config, monkeypatch: pytest.MonkeyPatch, changes: list[str], message: str
) -> None:
  monkeypatch.setattr(rounds, "FIRST_ROUND", 125)
  with pytest.raises(ConfigError, match=message):
    config.override(cfg, [AUTO, "--config.train.warmup_steps=2", *(f"--config.{c}" for c in changes)])


def test_training_asks_for_its_validation(auto: config.Config, dataset: Dataset, tmp_path: pathlib.Path) -> None:
  with pytest.raises(
    ConfigError, match=r"config.train.steps='auto' needs train\(\.\.\., validation=validation_of\(cfg\)\)"
  ):
    loop.train(auto, tmp_path / "run")


def test_the_plan_of_a_run_says_its_most_steps(auto: config.Config, dataset: Dataset) -> None:
  from supermoe_jax.plan import dry_run

  said = "\n".join(dry_run.describe_run(auto))
  assert "at most 128 steps are" in said and "2 checkpoints of that size are kept" in said
