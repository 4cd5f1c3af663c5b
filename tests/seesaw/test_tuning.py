"""A study tunes every model on validation only."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import pytest

from supermoe_jax import config
from supermoe_jax.report.seesaw_page import write_study_files
from supermoe_jax.seesaw import cached_runs, study_weights
from supermoe_jax.seesaw import study as study_lib
from supermoe_jax.seesaw.cached_runs import RunGroup
from supermoe_jax.seesaw.run_result import RunResult
from supermoe_jax.seesaw.study import study
from supermoe_jax.seesaw.study_run import PlannedRun
from tests.fixtures import seesaw_runs
from tests.fixtures.messages import messages
from tests.fixtures.seesaw_plans import executed, made_up, with_plan


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
  # The tuned variant tries two more weightings. The equal ones are the config's own, which the rates tried already.
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
