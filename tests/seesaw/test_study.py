"""A study runs what is missing and nothing twice, tunes on validation only, and reports what it has."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.errors import ConfigError, StudyError
from supermoe_jax.evaluation import evaluate
from supermoe_jax.report.seesaw_page import write_study_files
from supermoe_jax.seesaw import cached_runs, study_run
from supermoe_jax.seesaw import study as study_lib
from supermoe_jax.seesaw.run_result import RunResult
from supermoe_jax.seesaw.study import study
from supermoe_jax.seesaw.study_run import PlannedRun
from supermoe_jax.training import loop
from supermoe_jax.training.monitoring.metrics_log import read_rows
from supermoe_jax.training.run import Run
from tests.fixtures.seesaw_plans import Execute, executed, made_up, with_plan


def trained(group: Sequence[PlannedRun]) -> list[str | None]:
  """Trains and evaluates runs; label rates of a few batches are enough here, by default a rare label is waited for."""
  with pytest.MonkeyPatch.context() as patch:  # no longer than that: what all tests share may be made meanwhile
    patch.setattr(loop, "MEASURED_ROWS", 32)
    patch.setattr(loop, "MEASURED_LABELS", 4)
    return study_run.execute(group)


@pytest.fixture(scope="module", params=[made_up, pytest.param(trained, marks=[pytest.mark.nightly, pytest.mark.slow])])
def execute(request: pytest.FixtureRequest) -> Iterator[Execute]:
  """What executes a study's runs: they are made up, or trained and evaluated."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cached_runs, "execute", request.param)
    yield request.param


@pytest.fixture(scope="module")
def folder(execute: Execute, planned: config.Config, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A finished study; do not change it."""
  path = tmp_path_factory.mktemp("study")
  study(planned, path, publish=write_study_files)
  return path


def results(folder: pathlib.Path) -> list[RunResult]:
  return [RunResult.from_json(json.loads(f.read_text())) for f in sorted((folder / "runs").glob("*.json"))]


def test_a_run_leaves_what_evaluation_finds_and_nothing_else(
  cfg: config.Config, workdir: pathlib.Path, run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The run was trained before, so that no training program is compiled: a run that was cut at its end goes on."""
  rows = read_rows(workdir / "metrics.jsonl")
  shutil.copytree(workdir, tmp_path / "one")
  trained: list[config.Config] = []
  train = loop.train

  def watched(cfg: config.Config, *arguments: Any, **options: Any) -> int:
    trained.append(cfg)
    return train(cfg, *arguments, **options)

  monkeypatch.setattr(study_run.loop, "train", watched)
  validated = config.override(cfg, ["--config.train.validate.every=4"])
  planned = PlannedRun("dense", None, validated, tmp_path / "one.json")
  assert study_run.execute([planned]) == [None]
  assert trained == [cfg]  # not validated while it trains
  assert [p.name for p in tmp_path.iterdir()] == ["one.json"]
  result = RunResult.from_json(json.loads(planned.file.read_text()))
  assert (result.variant, result.task, result.seed, result.config_hash) == ("dense", None, 0, validated.hash())

  found = evaluate.evaluate(run, compare=False, progress=False, write=False)
  assert result.main_metric == found["main_metric"] and result.expert_load == found["expert_load"]
  assert found["splits"]["validation"]["pages"] != found["splits"]["test"]["pages"]
  for task in cfg.active_views:
    assert result.tasks[task] == {s: tasks.get(task, {}).get("metrics", {}) for s, tasks in found["splits"].items()}
    constant = run.statistics[task].constant_loss
    assert result.constants[task] == constant
    last = [r["tasks"][task] for r in rows if r["tasks"][task]["weight"]][-3:]
    summed = sum(t["loss"] * t["weight"] for t in last) / sum(t["weight"] for t in last)
    assert result.losses[task] == pytest.approx(summed / constant)
    assert result.weights is not None and result.weights[task] == [r["weights"][task] for r in rows]
  assert result.weights is not None and result.weights["step"] == [2, 4, 6, 8, 10, 12]
  ranked = {n for n, t in cfg.active_views.items() if t.answer == "catalogue"}
  assert set(result.constant_scores) == ranked and all(result.constant(n) is not None for n in cfg.active_views)
  assert result.parameters > result.active_parameters > 0.5 * result.parameters
  assert result.cosine is not None and result.cosine["tasks"] == list(cfg.active_views)
  matrix = np.array(result.cosine["matrix"], float)
  known = np.isfinite(matrix)
  np.testing.assert_array_equal(matrix[known], matrix.T[known])
  assert np.diagonal(matrix) == pytest.approx(1, abs=1e-3) and np.abs(matrix[known]).max() < 1.001
  assert np.abs(matrix - np.eye(len(matrix)))[known].max() > 0.01  # tasks are not orthogonal


class _Watched(Exception):
  """Ends a run where its training would begin."""


@pytest.mark.parametrize("patience", [0, 2])
def test_tasks_stop_in_a_study_as_in_any_other_run(
  cfg: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
  begun: list[tuple[config.Config, Any]] = []

  def watched(cfg: config.Config, *arguments: Any, validation: Any = None, **options: Any) -> int:
    begun.append((cfg, validation))
    raise _Watched

  monkeypatch.setattr(study_run.loop, "train", watched)
  asked = ["every=4", "snapshots=3", f"task_patience={patience}", "checkpoints_kept=2"]
  stopping = config.override(cfg, [f"--config.train.validate.{a}" for a in asked])
  with pytest.raises(_Watched):
    study_run.run_one(stopping, tmp_path / "one", variant="stopping")
  ((trained, validation),) = begun
  wanted = config.Validate(every=4, snapshots=3, task_patience=2) if patience else config.Validate()
  assert trained.train == dataclasses.replace(stopping.train, validate=wanted)
  assert validation is not None


def test_a_run_that_stops_by_itself_is_validated_without_a_metric_of_one_task(
  cfg: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  begun: list[config.Config] = []

  def watched(cfg: config.Config, *arguments: Any, **options: Any) -> int:
    begun.append(cfg)
    raise _Watched

  monkeypatch.setattr(study_run.loop, "train", watched)
  task = next(iter(cfg.labelled_tasks))
  asked = [
    "--config.train.steps=auto",
    f"--config.train.validate.metric={task}/auc",
    "--config.train.validate.snapshots=3",
  ]
  with pytest.raises(_Watched):
    study_run.run_one(config.override(cfg, asked), tmp_path / "one", variant="stopping")
  assert begun[0].train.steps == "auto"
  assert begun[0].train.validate == config.Validate(snapshots=3)


def test_a_run_that_fails_is_told_and_the_next_is_done(
  planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def run_one(cfg: config.Config, *arguments: Any, **options: Any) -> RunResult:
    if cfg.train.seed == 0:
      raise ValueError("no luck")
    made_up([PlannedRun("dense", None, cfg, tmp_path / "made_up.json")])
    return RunResult.from_json(json.loads((tmp_path / "made_up.json").read_text()))

  monkeypatch.setattr(study_run, "run_one", run_one)
  runs = [
    PlannedRun("dense", None, config.override(planned, [f"--config.train.seed={s}"]), tmp_path / f"{s}.json")
    for s in (0, 1)
  ]
  assert study_run.execute(runs) == ["ValueError: no luck", None]
  assert not runs[0].file.exists() and RunResult.from_json(json.loads(runs[1].file.read_text())).seed == 1


def test_a_study_leaves_a_report_of_every_variant_and_task(folder: pathlib.Path, planned: config.Config) -> None:
  report = json.loads((folder / "seesaw.json").read_text())
  assert list(report["variants"]) == ["tuned_static", "dense"]
  assert set(report["tasks"]) == {"pages", "quiet"} == set(report["single"])
  assert report["seeds"] == [0, 1] and report["words"]
  for variant in report["variants"].values():
    assert variant["parameters"] > variant["active_parameters"] > 0
    assert variant["weights"]["step"]
    assert variant["tasks"]["quiet"]["score"]["low"] <= variant["tasks"]["quiet"]["score"]["high"]
    # Single-task models of a few steps may be no better than a constant answer.
    gains = {t: variant["tasks"][t]["gain"] for t in report["compared"]}
    assert all(g["low"] <= g["high"] for g in gains.values())
  assert set(report["compared"]) | set(report["no_better"]) == set(report["tasks"])
  assert set(report["references"].values()) == {"same"}
  page = (folder / "seesaw.html").read_text()
  assert "tuned_static" in page and "<svg" in page
  assert not [p for p in (folder / "runs").iterdir() if p.is_dir()]


def test_the_same_call_runs_nothing_again_and_a_lost_run_only(
  folder: pathlib.Path,
  planned: config.Config,
  execute: Execute,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  done: list[PlannedRun] = []
  monkeypatch.setattr(cached_runs, "execute", lambda group: done.extend(group) or execute(group))
  copy = tmp_path / "study"
  shutil.copytree(folder, copy)
  before = (copy / "seesaw.json").read_text()
  study(planned, copy)
  assert done == [] and (copy / "seesaw.json").read_text() == before
  lost = next(f for f in (copy / "runs").glob("*.json") if json.loads(f.read_text())["variant"] == "dense")
  lost.unlink()
  study(planned, copy)
  assert [run.file for run in done] == [lost]
  again = json.loads((copy / "seesaw.json").read_text())
  for variant in json.loads(before)["variants"]:  # one seed, one result: the lost run came out as it was
    one, other = (r["variants"][variant]["tasks"] for r in (json.loads(before), again))
    assert one == other


def test_single_task_runs_know_one_task_and_variants_all(folder: pathlib.Path, planned: config.Config) -> None:
  runs = results(folder)
  assert {len(r.tasks) for r in runs if r.task} == {1}
  assert {tuple(r.tasks) for r in runs if not r.task} == {("pages", "quiet")}
  assert all(r.losses[t] is not None for r in runs for t in r.tasks)
  assert all(r.cosine["tasks"] == ["pages", "quiet"] for r in runs if not r.task)


def test_a_single_task_run_knows_neither_the_other_tasks_nor_their_weights(
  planned: config.Config, tmp_path: pathlib.Path
) -> None:
  changes = ["--config.tasks.quiet.weight=3.0", "--config.train.weighting.method=static"]
  course = study_lib._Study(config.override(planned, changes), tmp_path, 1, (), print)
  for task in ("pages", "quiet"):
    (alone,) = course.singles[task].values()
    assert {n: t.weight for n, t in alone.active_tasks.items()} == {task: 1.0}
    assert alone.train.weighting.method == "equal"
  weights = {v: {n: t.weight for n, t in c.active_tasks.items()} for v, c in course.variants.items()}
  assert weights == {"tuned_static": {"pages": 1.0, "quiet": 3.0}, "dense": {"pages": 1.0, "quiet": 1.0}}


def test_a_variant_that_cannot_be_is_an_error_before_anything_runs(
  planned: config.Config, tmp_path: pathlib.Path
) -> None:
  for overrides, message in (
    (["model.moe_evry=0"], r"config\.seesaw\.variants\.bad: .*has no key 'moe_evry'.*did you mean 'moe_every'"),
    (["data.split.every_days=9.0"], r"variants\.bad changes the prepared data"),
    (["train.user_folds=3"], r"variants\.bad sets train\.user_folds=3.* set config\.seesaw\.user_folds instead"),
  ):
    raw = config.to_dict(planned)
    raw["seesaw"]["variants"]["bad"] = overrides
    with pytest.raises(ConfigError, match=message):
      study(config.resolve(raw), tmp_path / "s")
  assert not (tmp_path / "s").exists()


def test_the_config_and_the_references_of_a_study_choose_no_fold_of_users(
  planned: config.Config, tmp_path: pathlib.Path
) -> None:
  with pytest.raises(ConfigError, match=r"config sets train\.user_folds=3.* set config\.seesaw\.user_folds instead"):
    study(config.override(planned, ["--config.train.user_folds=3"]), tmp_path / "s")
  alone = with_plan(planned, single={"folds": ["train.user_folds=3"]})
  with pytest.raises(ConfigError, match=r"config\.seesaw\.single\.folds sets train\.user_folds=3"):
    study(alone, tmp_path / "s")
  assert not (tmp_path / "s").exists()


def test_only_must_name_a_variant(planned: config.Config, tmp_path: pathlib.Path) -> None:
  with pytest.raises(ConfigError, match="--only: 'densse' matches no variant; did you mean 'dense'"):
    study(planned, tmp_path / "s", only=["densse"])


def test_a_failed_run_is_named_and_the_others_are_kept(
  folder: pathlib.Path, planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  lost = [f for f in (copy / "runs").glob("*.json") if json.loads(f.read_text())["variant"] == "dense"]
  for file in lost:
    file.unlink()
  monkeypatch.setattr(cached_runs, "execute", lambda group: ["RunError: no luck"] * len(group))
  with pytest.raises(StudyError, match=r"2 runs failed.*dense, seed 0: RunError: no luck"):
    study(planned, copy)
  report = json.loads((copy / "seesaw.json").read_text())
  assert report["variants"]["tuned_static"]["tasks"]["quiet"]["score"]["seeds"] == 2
  assert any("dense" in line for line in report["missing"])


def test_a_study_trains_the_config_again_with_other_seeds(
  planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  done = executed(monkeypatch)
  plan = with_plan(planned, null=True, tuned="", variants={"dense": planned.seesaw.variants["dense"]})
  report = study(plan, tmp_path / "s", publish=write_study_files)
  assert list(report["variants"]) == ["dense", "base", "null"]
  assert (report["base"], report["null"]) == ("base", "null")
  seeds = {n: sorted(r.cfg.train.seed for r in done if r.variant == n) for n in ("base", "null")}
  assert seeds == {"base": [0, 1], "null": [1000, 1001]}
  one, other = (next(r.cfg for r in done if r.variant == n) for n in ("base", "null"))
  assert dataclasses.replace(other, train=dataclasses.replace(other.train, seed=0)) == one
  assert report["variants"]["null"]["seeds"] == [0, 1]  # paired with the seeds of the study
  assert report["noise"]["mean_gain"]["seeds"] == 2 and report["noise"]["mean_gain"]["low"] is not None
  assert "What chance alone does" in (tmp_path / "s" / "seesaw.html").read_text()
  assert not [r for r in done if r.variant == "null" and r.task]


def test_the_null_variant_repeats_the_first_variant_without_overrides(planned: config.Config) -> None:
  plan = dataclasses.replace(planned.seesaw, null=True)
  named = dataclasses.replace(plan, variants={"tuned_static": (), "x": ("train.steps=1",), "plain": (), "last": ()})
  assert study_lib.planned_variants(named) == (dict(named.variants), "plain")
  listed, base = study_lib.planned_variants(plan)
  assert base == "base" and listed["base"] == () and list(listed) == [*plan.variants, "base"]
  assert study_lib.planned_variants(planned.seesaw) == (dict(planned.seesaw.variants), "")


def test_the_null_variant_can_be_asked_for_and_brings_the_variant_that_it_repeats(
  planned: config.Config, tmp_path: pathlib.Path
) -> None:
  course = study_lib._Study(with_plan(planned, null=True), tmp_path, 1, ["null"], print)
  assert (list(course.variants), course.null) == (["base"], "null")
  course = study_lib._Study(with_plan(planned, null=True), tmp_path, 1, ["dense"], print)
  assert (list(course.variants), course.null) == (["dense"], "")
  with pytest.raises(ConfigError, match="'null' matches no variant"):
    study_lib._Study(planned, tmp_path, 1, ["null"], print)


def test_with_one_rate_nothing_is_tried(
  planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  done = executed(monkeypatch)
  report = study(with_plan(planned, tuned="", rates=[1.0]), tmp_path / "s")
  assert len(done) == 2 * (2 + 2)  # seeds × (tasks + variants)
  assert {v["tuning"]["tries"] for v in report["variants"].values()} == {0}


def test_runs_of_equal_configs_are_done_once(
  planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  done = executed(monkeypatch)
  dense = ["model.moe_every=0", "train.weighting.method=equal"]
  plan = with_plan(planned, tuned="", variants={"one": dense, "other": dense})
  report = study(plan, tmp_path / "s")
  assert len({r.file for r in done}) == len(done) == 2 * (2 + 1)
  assert report["variants"]["one"]["tasks"] == report["variants"]["other"]["tasks"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rates": []}, "at least one factor"),
    ({"rates": [1.0, -1.0]}, "each positive"),
    ({"rates": [1.0, 1.0]}, "named once"),
    ({"null": True, "variants": {"null": [], "tuned_static": []}}, "set null=False"),
  ],
)
def test_a_plan_that_cannot_work_is_an_error(planned: config.Config, changes: dict[str, Any], message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    with_plan(planned, **changes)
