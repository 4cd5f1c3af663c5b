"""A study runs what is missing and nothing twice, tunes on validation only, and reports what it has."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset.dataset import Dataset
from supermoe_jax.errors import ConfigError, StudyError
from supermoe_jax.evaluation import evaluate
from supermoe_jax.report.seesaw_page import write_study_files
from supermoe_jax.seesaw import cached_runs, study_run, study_weights
from supermoe_jax.seesaw import study as study_lib
from supermoe_jax.seesaw.cached_runs import RunGroup
from supermoe_jax.seesaw.run_result import RunResult
from supermoe_jax.seesaw.study import study
from supermoe_jax.seesaw.study_run import PlannedRun
from supermoe_jax.training import loop
from supermoe_jax.training.monitoring.metrics_log import read_rows
from supermoe_jax.training.run import Run
from tests.fixtures import seesaw_runs
from tests.fixtures.messages import messages

SMALL = [
  "--config.exclude_tasks=('next_page', 'paid')",
  "--config.model.layers=1",
  "--config.model.moe_every=1",
  "--config.train.steps=3",
  "--config.train.checkpoint_every=3",
]

Execute = Callable[[Sequence[PlannedRun]], list[str | None]]


@pytest.fixture(scope="module")
def planned(cfg: config.Config, dataset: Dataset) -> config.Config:
  """Two tasks, two seeds, two variants."""
  small = config.override(cfg, SMALL)
  raw = config.to_dict(small)
  raw["seesaw"] = {
    "seeds": [0, 1],
    "variants": {"tuned_static": [], "dense": ["model.moe_every=0", "train.weighting.method=equal"]},
    "static_candidates": 2,
    "rates": [1.0],
    "null": False,
  }
  return config.resolve(raw)


def made_up(group: Sequence[PlannedRun]) -> list[str | None]:
  """Leaves what runs of these configs could have left, drawn by each config's hash."""
  for run in group:
    cfg, tasks = run.cfg, list(run.cfg.active_views)
    rng = np.random.default_rng(int(cfg.hash(), 16))
    main = {t: evaluate.main_metric(cfg, task) for t, task in cfg.active_views.items()}
    found = {
      t: {s: {m: rng.uniform(0.64, 0.66), "log_loss": rng.uniform(0.3, 0.6)} for s in evaluate.EVALUATED_SPLITS}
      for t, m in main.items()
    }
    result = RunResult(
      variant=run.variant,
      task=run.task,
      seed=cfg.train.seed,
      config_hash=cfg.hash(),
      tasks=found,
      main_metric=main,
      constants=dict.fromkeys(tasks, 0.7),
      losses={t: rng.uniform(0.5, 1.0) for t in tasks},
      parameters=1000,
      active_parameters=900 if cfg.model.moe_every else 999,
      seconds=1.0,
      weights={"step": [1, 2, 3], **{t: [1.0, 1.1, 1.2] for t in tasks}},
      cosine={"tasks": tasks, "matrix": (0.5 + 0.5 * np.eye(len(tasks))).tolist()} if len(tasks) > 1 else None,
      expert_load={t: {"snapshots": 9, "load": [[0.25] * 4]} for t in tasks},
    )
    run.file.write_text(json.dumps(result.to_json()))
  return [None] * len(group)


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


@pytest.mark.parametrize(("metric", "best"), [("auc", "slow"), ("rmse", "same")])
def test_a_tasks_reference_is_the_candidate_that_is_best_on_validation(
  planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, metric: str, best: str
) -> None:
  raw = config.to_dict(planned)
  raw["seesaw"]["single"] = {"same": [], "slow": ["train.learning_rate=0.1"], "dense": ["model.moe_every=0"]}
  course = study_lib._Study(config.resolve(raw), tmp_path, 1, (), print)
  scores = {"same": 0.6, "slow": 0.8, "dense": 0.7}
  known = {course.singles["quiet"][n].hash(): score for n, score in scores.items()}

  def found(job: RunGroup) -> list[RunResult]:
    score = known[job.cfg.hash()]
    return [
      seesaw_runs.run(
        "single",
        0,
        {"quiet": 1 - score},
        "quiet",
        main_metric={"quiet": metric},
        tasks={"quiet": {"validation": {metric: score}, "test": {metric: 1 - score}}},
      )
    ]

  monkeypatch.setattr(course.runs, "results", found)
  monkeypatch.setattr(course.runs, "execute", lambda *a: None)
  chosen = course.tuning.references({"quiet": course.singles["quiet"]})["quiet"]
  assert chosen is not None and (chosen.candidate, chosen.tries) == (best, 3)


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


def test_static_weights_are_searched_among_equal_ones_the_configs_own_and_random_ones(
  planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  weighted = config.override(planned, ["--config.tasks.quiet.weight=3.0", "--config.seesaw.static_candidates=4"])
  tried = []
  monkeypatch.setattr(
    cached_runs.CachedRuns,
    "execute",
    lambda self, what, jobs, *a, **k: tried.extend(jobs) if "tuning static" in what else None,
  )
  monkeypatch.setattr(study_lib.compare, "make_report", lambda *a, **k: {"words": []})
  study(weighted, tmp_path / "s")
  weights = [{n: job.cfg.tasks[n].weight for n in ("pages", "quiet")} for job in tried]
  assert len(weights) == 4 and weights[0] == {"pages": 1.0, "quiet": 1.0} and weights[1] == {"pages": 0.5, "quiet": 1.5}
  assert all(sum(w.values()) == pytest.approx(2, abs=1e-3) for w in weights)
  assert len({w["quiet"] for w in weights}) == 4


def test_static_weights_are_those_that_are_best_on_validation(
  planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The more a config weighs `quiet`, the better its runs are on validation, and the worse on test."""

  def leave(group: Sequence[PlannedRun]) -> list[str | None]:
    for run in group:
      better = 0.0 if run.task else 0.01 * run.cfg.tasks["quiet"].weight
      made_up([run])
      result = json.loads(run.file.read_text())
      for task, metric in result["main_metric"].items():
        result["tasks"][task] = {"validation": {metric: 0.6 + better}, "test": {metric: 0.6 - better}}
      run.file.write_text(json.dumps(result))
    return [None] * len(group)

  monkeypatch.setattr(cached_runs, "execute", leave)
  several = config.override(planned, ["--config.seesaw.static_candidates=6"])
  with messages() as said:
    report = study(several, tmp_path / "s")
  drawn = [c.tasks["quiet"].weight for c in study_weights.weighted_configs(several, several.seesaw)]
  assert f"tasks.quiet.weight={max(drawn):g}" in report["variants"]["tuned_static"]["overrides"]
  assert max(drawn) > drawn[0] == 1.0
  assert report["variants"]["tuned_static"]["mean_gain"]["mean"] == pytest.approx(-100 * 0.01 * max(drawn) / 0.1)
  assert any(f"best of 6 on validation: pages={2 - max(drawn):g}, quiet={max(drawn):g}" in line for line in said)


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


def with_plan(planned: config.Config, **changes: Any) -> config.Config:
  raw = config.to_dict(planned)
  raw["seesaw"].update(changes)
  return config.resolve(raw)


def executed(monkeypatch: pytest.MonkeyPatch, execute: Execute = made_up) -> list[PlannedRun]:
  """Returns the list of runs that studies execute from now on."""
  done: list[PlannedRun] = []
  monkeypatch.setattr(cached_runs, "execute", lambda group: done.extend(group) or execute(group))
  return done


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


def test_every_variant_and_reference_tries_the_same_learning_rates_and_validation_chooses(
  planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Single-task models are best with half the rate, `dense` with twice the rate, and all others with their own."""
  own = planned.train.learning_rate

  def leave(group: Sequence[PlannedRun]) -> list[str | None]:
    for run in group:
      made_up([run])
      wanted = 0.5 if run.task else 2.0 if not run.cfg.model.moe_every else 1.0
      right = run.cfg.train.learning_rate == pytest.approx(own * wanted)
      result = json.loads(run.file.read_text())
      for task, metric in result["main_metric"].items():
        result["tasks"][task] = {
          s: {metric: 0.7 if right == (s == "validation") else 0.6} for s in ("validation", "test")
        }
      run.file.write_text(json.dumps(result))
    return [None] * len(group)

  done = executed(monkeypatch, leave)
  report = study(with_plan(planned, rates=[0.5, 1.0, 2.0], null=True), tmp_path / "s", publish=write_study_files)
  assert {t: a["tuning"] for t, a in report["single"].items()} == {
    t: {"rate": 0.5, "tries": 3} for t in report["tasks"]
  }
  tuning = {n: v["tuning"] for n, v in report["variants"].items()}
  assert tuning["dense"] == {"rate": 2.0, "tries": 3} and tuning["base"] == {"rate": 1.0, "tries": 3}
  # Tuned weights try two weightings more, of which the equal ones are the config's own and were tried before.
  assert tuning["tuned_static"] == {"rate": 1.0, "tries": 4}
  assert tuning["null"] == {"rate": 1.0, "tries": 0}
  tables = planned.train.tables.learning_rate
  expected = [f"train.learning_rate={2 * own:.9g}", f"train.tables.learning_rate={2 * tables:.9g}"]
  assert report["variants"]["dense"]["overrides"][-2:] == expected
  assert len({r.file for r in done}) == len(done)
  page = (tmp_path / "s" / "seesaw.html").read_text()
  assert ">tries<" in page and "keeps the one that is best on" in page
  final = [r.cfg for r in done if r.variant == "dense" and r.cfg.train.seed == 1]
  assert [(c.train.learning_rate, c.train.tables.learning_rate) for c in final] == [
    pytest.approx((2 * own, 2 * tables))
  ]


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


@pytest.fixture(scope="module")
def with_user_label(cfg: config.Config, planned: config.Config) -> config.Config:
  """The plan with a task about the table of users, whose users the seeds deal anew."""
  asked = dataclasses.replace(planned, exclude_tasks=("next_page",))
  return with_plan(asked, seeds=[3, 5, 7], user_folds=2, null=True, tuned="", variants={"plain": []})


def test_each_seed_tests_another_fold_of_the_labelled_users(
  with_user_label: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def leave(group: Sequence[PlannedRun]) -> list[str | None]:
    for run in group:
      made_up([run])
      result = json.loads(run.file.read_text())
      result["labels"] = {t: {"test": 10 + run.cfg.train.user_fold} for t in result["tasks"]}
      run.file.write_text(json.dumps(result))
    return [None] * len(group)

  done = executed(monkeypatch, leave)
  plan = with_user_label
  report = study(plan, tmp_path / "s", publish=write_study_files)
  folds = {(r.variant, r.task, r.cfg.train.seed): (r.cfg.train.user_fold, r.cfg.train.user_folds) for r in done}
  for task in report["tasks"]:
    assert [folds["single", task, s] for s in (3, 5, 7)] == [(0, 2), (1, 2), (0, 2)]
  assert [folds["plain", None, s] for s in (3, 5, 7)] == [(0, 2), (1, 2), (0, 2)]
  assert [folds["null", None, s] for s in (1003, 1005, 1007)] == [(0, 2), (1, 2), (0, 2)]
  assert {t: a["folds"] for t, a in report["tasks"].items()} == {"pages": None, "quiet": None, "paid": 2}
  assert report["tasks"]["paid"]["labels"] == 10 + 11  # each user once, though three seeds test
  assert any("paid has 21. Each seed tests other users" in w for w in report["words"])
  assert "paid: each seed tests other users, in 2 folds" in " ".join(
    (tmp_path / "s" / "seesaw.html").read_text().split()
  )


def test_folds_are_only_dealt_where_the_data_can(with_user_label: config.Config, planned: config.Config) -> None:
  assert study_lib.folded_tasks(with_user_label) == ["paid"]
  assert study_lib.folded_tasks(planned) == [] == study_lib.folded_tasks(with_plan(with_user_label, user_folds=0))
  by_user = dataclasses.replace(with_user_label.data.split, mode="user")
  other = dataclasses.replace(with_user_label, data=dataclasses.replace(with_user_label.data, split=by_user))
  assert study_lib.folded_tasks(other) == []


def test_runs_of_other_folds_are_asked_other_questions(with_user_label: config.Config) -> None:
  def in_fold(fold: int) -> config.Config:
    train = dataclasses.replace(with_user_label.train, user_folds=2, user_fold=fold)
    return dataclasses.replace(with_user_label, train=train)

  def asked(cfg: config.Config) -> set[str]:
    found = study_run._study_queries(cfg)["test"]
    return {q.user_id for b in found for q, known in zip(b.questions, b.labels["paid"].known) if known}

  one, other = asked(in_fold(0)), asked(in_fold(1))
  assert one and other and not one & other
