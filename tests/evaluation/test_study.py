"""A study runs what is missing and nothing twice, tunes on validation only, and reports what it has."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator

import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.evaluation import study as study_lib
from supermoe_jax.evaluation import study_weights
from supermoe_jax.evaluation.seesaw import RunResult
from supermoe_jax.evaluation.study import StudyError, study
from supermoe_jax.training import loop

SMALL = [
  "--config.exclude_tasks=('next_page', 'paid')",
  "--config.model.layers=1",
  "--config.model.moe_every=1",
  "--config.train.steps=3",
  "--config.train.checkpoint_every=3",
]


@pytest.fixture(scope="module")
def planned(cfg: config.Config, dataset: Dataset) -> config.Config:
  """Two tasks, two seeds, two variants."""
  small = config.override(cfg, SMALL)
  raw = config.to_dict(small)
  raw["seesaw"] = {
    "seeds": [0, 1],
    "variants": {"tuned_static": [], "dense": ["model.moe_every=0", "train.weighting.method=equal"]},
    "static_candidates": 2,
  }
  return config.resolve(raw)


@pytest.fixture(scope="module", autouse=True)
def measured_on_little() -> Iterator[None]:
  """Label rates of a few batches are enough here; by default a rare label is waited for in each of the runs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "MEASURED_ROWS", 32)
    patch.setattr(loop, "MEASURED_LABELS", 4)
    yield


@pytest.fixture(scope="module")
def folder(planned: config.Config, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A finished study; do not change it."""
  path = tmp_path_factory.mktemp("study")
  study(planned, path, say=lambda _: None)
  return path


def results(folder: pathlib.Path) -> list[RunResult]:
  return [RunResult.from_json(json.loads(f.read_text())) for f in sorted((folder / "runs").glob("*.json"))]


@pytest.mark.slow
def test_a_study_leaves_a_report_of_every_variant_and_task(folder: pathlib.Path, planned: config.Config) -> None:
  report = json.loads((folder / "seesaw.json").read_text())
  assert list(report["variants"]) == ["tuned_static", "dense"]
  assert set(report["tasks"]) == {"pages", "quiet"} == set(report["single"])
  assert report["seeds"] == [0, 1] and report["words"]
  for variant in report["variants"].values():
    assert variant["parameters"] > variant["active_parameters"] > 0
    assert variant["weights"]["step"]
    assert variant["tasks"]["quiet"]["gain"]["low"] <= variant["tasks"]["quiet"]["gain"]["high"]
  assert set(report["references"].values()) == {"same"}
  page = (folder / "seesaw.html").read_text()
  assert "tuned_static" in page and "<svg" in page
  assert not [p for p in (folder / "runs").iterdir() if p.is_dir()]


@pytest.mark.slow
def test_the_same_call_runs_nothing_again_and_a_lost_run_only(
  folder: pathlib.Path, planned: config.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  done = []
  execute = study_lib.execute
  monkeypatch.setattr(study_lib, "execute", lambda group: done.extend(group) or execute(group))
  before = (folder / "seesaw.json").read_text()
  study(planned, folder, say=lambda _: None)
  assert done == [] and (folder / "seesaw.json").read_text() == before
  lost = next(f for f in (folder / "runs").glob("*.json") if json.loads(f.read_text())["variant"] == "dense")
  lost.unlink()
  study(planned, folder, say=lambda _: None)
  assert [run.file for run in done] == [lost]
  again = json.loads((folder / "seesaw.json").read_text())
  for variant in json.loads(before)["variants"]:  # one seed, one result: the lost run came out as it was
    one, other = (r["variants"][variant]["tasks"] for r in (json.loads(before), again))
    assert one == other


@pytest.mark.slow
def test_single_task_runs_know_one_task_and_variants_all(folder: pathlib.Path, planned: config.Config) -> None:
  runs = results(folder)
  assert {len(r.tasks) for r in runs if r.task} == {1}
  assert {tuple(r.tasks) for r in runs if not r.task} == {("pages", "quiet")}
  assert all(r.losses[t] is not None for r in runs for t in r.tasks)
  assert all(r.cosine["tasks"] == ["pages", "quiet"] for r in runs if not r.task)


@pytest.mark.slow
def test_a_tasks_reference_is_the_candidate_that_is_best_on_validation(
  folder: pathlib.Path, planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  one = next(r for r in results(folder) if r.task == "quiet")
  raw = config.to_dict(planned)
  raw["seesaw"]["single"] = {"same": [], "slow": ["train.learning_rate=0.1"], "dense": ["model.moe_every=0"]}
  course = study_lib._Study(config.resolve(raw), tmp_path, 1, (), print)
  scores = {"same": 0.6, "slow": 0.8, "dense": 0.7}
  known = {course.singles["quiet"][n].hash(): score for n, score in scores.items()}

  def made_up(job: study_lib._Job) -> list[RunResult]:
    tasks = {"quiet": {"validation": {"auc": known[job.cfg.hash()]}, "test": {"auc": 1 - known[job.cfg.hash()]}}}
    return [dataclasses.replace(one, tasks=tasks)]

  monkeypatch.setattr(course, "_results", made_up)
  assert course._best_single("quiet") == "slow"


@pytest.mark.slow
def test_seesaw_weights_refer_to_what_a_task_reaches_alone_on_validation(
  folder: pathlib.Path, planned: config.Config
) -> None:
  runs = {t: [r for r in results(folder) if r.task == t] for t in ("pages", "quiet")}
  cfg = config.override(planned, ["--config.train.weighting.method=seesaw"])
  known = study_weights.referred(cfg, runs).train.weighting.references
  for task, found in runs.items():
    reached = [r.tasks[task]["validation"]["log_loss"] / r.constants[task] for r in found]
    assert known[task] == pytest.approx(sum(reached) / len(reached), abs=1e-4)


def test_static_weights_are_searched_among_equal_ones_the_configs_own_and_random_ones(
  planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  weighted = config.override(planned, ["--config.tasks.quiet.weight=3.0", "--config.seesaw.static_candidates=4"])
  tried = []
  monkeypatch.setattr(
    study_lib._Study, "_execute", lambda self, what, jobs, *a, **k: tried.extend(jobs) if "tuning" in what else None
  )
  monkeypatch.setattr(study_lib.seesaw, "report", lambda *a, **k: {"words": []})
  monkeypatch.setattr(study_lib, "_write_pages", lambda *a: None)
  study(weighted, tmp_path / "s", say=lambda _: None)
  weights = [{n: job.cfg.tasks[n].weight for n in ("pages", "quiet")} for job in tried]
  assert len(weights) == 4 and weights[0] == {"pages": 1.0, "quiet": 1.0} and weights[1] == {"pages": 0.5, "quiet": 1.5}
  assert all(sum(w.values()) == pytest.approx(2, abs=1e-3) for w in weights)
  assert len({w["quiet"] for w in weights}) == 4


def test_a_variant_that_cannot_be_is_an_error_before_anything_runs(
  planned: config.Config, tmp_path: pathlib.Path
) -> None:
  for overrides, message in (
    (["model.moe_evry=0"], r"config\.seesaw\.variants\.bad: .*has no key 'moe_evry'.*did you mean 'moe_every'"),
    (["data.split.every_days=9.0"], r"variants\.bad changes what is prepared"),
  ):
    raw = config.to_dict(planned)
    raw["seesaw"]["variants"]["bad"] = overrides
    with pytest.raises(config.ConfigError, match=message):
      study(config.resolve(raw), tmp_path / "s")
  assert not (tmp_path / "s").exists()


def test_only_must_name_a_variant(planned: config.Config, tmp_path: pathlib.Path) -> None:
  with pytest.raises(config.ConfigError, match="--only: 'densse' matches no variant; did you mean 'dense'"):
    study(planned, tmp_path / "s", only=["densse"])


def test_a_failed_run_is_named_and_the_others_are_kept(
  folder: pathlib.Path, planned: config.Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  lost = [f for f in (copy / "runs").glob("*.json") if json.loads(f.read_text())["variant"] == "dense"]
  for file in lost:
    file.unlink()
  monkeypatch.setattr(study_lib, "execute", lambda group: ["RunError: no luck"] * len(group))
  with pytest.raises(StudyError, match=r"2 runs failed.*dense, seed 0: RunError: no luck"):
    study(planned, copy, say=lambda _: None)
  report = json.loads((copy / "seesaw.json").read_text())
  assert report["variants"]["tuned_static"]["mean_gain"]["mean"] is not None
  assert any("dense" in line for line in report["missing"])
