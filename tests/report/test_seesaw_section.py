"""The study beside a run: found where it may lie, shown only where it is of the same tasks and data."""

from __future__ import annotations

import json

import pytest

from supermoe_jax import config
from supermoe_jax.report import run_files, seesaw_section
from tests.fixtures.grids import quick_few
from tests.fixtures.report_run import make_config
from tests.fixtures.seesaw_study import make, study


@pytest.fixture
def run(tmp_path):
  """A run directory two levels down."""
  cfg = make_config(tmp_path)
  workdir = tmp_path / "study" / "models" / "run"
  workdir.mkdir(parents=True)
  config.save(cfg, workdir / "config.json")
  return run_files.read_run(workdir)


def found_study(run, **more) -> str:
  metric = dict.fromkeys(run.cfg.active_views, "auc")
  return json.dumps({**make(study(metric=metric), labels={}, possible={}), **more})


@pytest.mark.parametrize("place", quick_few(["seesaw", "../.."], [".", "seesaw", "..", "../.."]))
def test_a_study_is_found_in_the_run_and_above_it(run, place) -> None:
  folder = run.workdir / place
  folder.mkdir(exist_ok=True)
  (folder / "seesaw.json").write_text(found_study(run, data_hash=run.cfg.data_hash()))
  found = seesaw_section.find_study(run)
  assert found is not None and found["reason"] == "" and found["figure"]
  assert found["file"] == str((folder / "seesaw.json").resolve())
  assert found["conclusion"]


def test_without_a_study_there_is_none(run) -> None:
  assert seesaw_section.find_study(run) is None


def test_a_study_of_other_tasks_or_data_is_named_but_not_shown(run) -> None:
  file = run.workdir / "seesaw.json"
  file.write_text(found_study(run, data_hash="other"))
  found = seesaw_section.find_study(run)
  assert found is not None and found["report"] is None and "prepared with another configuration" in found["reason"]
  file.write_text(found_study(run, format=1))
  found = seesaw_section.find_study(run)
  assert found is not None and found["report"] is None and "another version" in found["reason"]
  file.write_text(json.dumps(make(study())))
  found = seesaw_section.find_study(run)
  assert found is not None and found["report"] is None and "other tasks" in found["reason"]
