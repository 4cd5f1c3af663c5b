"""A study runs what is missing and nothing twice, tunes on validation only, and reports what it has."""

import json
import pathlib

import pytest

from supermoe_jax import config
from supermoe_jax.data.dataset import Dataset
from supermoe_jax.evaluation import study as study_lib
from supermoe_jax.evaluation.seesaw import RunResult
from supermoe_jax.evaluation.study import StudyError, study

SMALL = [
  "--config.exclude_tasks=('next_page', 'pages')",
  "--config.train.steps=4",
  "--config.train.checkpoint_every=4",
]


@pytest.fixture(scope="module")
def planned(cfg: config.Config, dataset: Dataset) -> config.Config:
  """Two tasks, two seeds, three variants; two candidates for each single-task reference."""
  small = config.override(cfg, SMALL)
  raw = config.to_dict(small)
  raw["seesaw"] = {
    "seeds": [0, 1],
    "variants": {
      "tuned_static": [],
      "seesaw": ["train.weighting.method=seesaw"],
      "dense": ["model.moe_every=0", "train.weighting.method=equal"],
    },
    "single": {"same": [], "slower": ["train.learning_rate=0.0001"]},
    "static_candidates": 2,
  }
  return config.resolve(raw)


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
  assert list(report["variants"]) == ["tuned_static", "seesaw", "dense"]
  assert set(report["tasks"]) == {"paid", "quiet"} == set(report["single"])
  assert report["seeds"] == [0, 1] and report["words"]
  for variant in report["variants"].values():
    assert variant["parameters"] > variant["active_parameters"] > 0
    assert variant["weights"]["step"]
    assert variant["tasks"]["quiet"]["gain"]["low"] <= variant["tasks"]["quiet"]["gain"]["high"]
  assert set(report["references"].values()) <= {"same", "slower"}
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
  assert {tuple(r.tasks) for r in runs if not r.task} == {("paid", "quiet")}
  assert all(r.losses[t] is not None for r in runs for t in r.tasks)
  assert all(r.cosine["tasks"] == ["paid", "quiet"] for r in runs if not r.task)


@pytest.mark.slow
def test_seesaw_weights_refer_to_the_single_task_losses(folder: pathlib.Path, planned: config.Config) -> None:
  runs = results(folder)
  losses = {t: [r.losses[t] for r in runs if r.task == t] for t in ("paid", "quiet")}
  assert all(len(found) >= 2 for found in losses.values())
  referred = study_lib._referred(
    config.override(planned, ["--config.train.weighting.method=seesaw"]),
    {t: [r for r in runs if r.task == t] for t in losses},
  )
  for task, found in losses.items():
    assert referred.train.weighting.references[task] == pytest.approx(sum(found) / len(found), abs=1e-4)


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
  import shutil

  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  lost = [f for f in (copy / "runs").glob("*.json") if json.loads(f.read_text())["variant"] == "dense"]
  for file in lost:
    file.unlink()
  monkeypatch.setattr(study_lib, "execute", lambda group: ["RunError: no luck"] * len(group))
  with pytest.raises(StudyError, match=r"2 runs failed.*dense, seed 0: RunError: no luck"):
    study(planned, copy, say=lambda _: None)
  report = json.loads((copy / "seesaw.json").read_text())
  assert report["variants"]["seesaw"]["mean_gain"]["mean"] is not None
  assert any("dense" in line for line in report["missing"])
