"""Each seed of a study tests another fold of the users of user labels."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import pytest

from supermoe_jax import config
from supermoe_jax.report.seesaw_page import write_study_files
from supermoe_jax.seesaw import study as study_lib
from supermoe_jax.seesaw import study_run
from supermoe_jax.seesaw.study import study
from supermoe_jax.seesaw.study_run import PlannedRun
from tests.fixtures.seesaw_plans import executed, made_up, with_plan


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
