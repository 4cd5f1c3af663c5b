import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from supermoe_jax import cli, config
from supermoe_jax.data.dataset import snapshot_batches
from supermoe_jax.data.encoding.splits import SPLITS, TEST
from supermoe_jax.errors import ConfigError
from supermoe_jax.evaluation import evaluate, ranking_baselines, results_table
from supermoe_jax.training.run import Run
from tests.fixtures.small_log import raw_config, write_log


@pytest.fixture(scope="module")
def run(workdir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
  """A trained run in a directory of its own, into which it is evaluated."""
  copy = tmp_path_factory.mktemp("evaluated") / "run"
  shutil.copytree(workdir, copy)
  return Run(copy)


@pytest.fixture(scope="module")
def result(run: Run) -> dict:
  return evaluate.evaluate(run)


def test_every_task_has_its_metrics_and_baselines_in_both_splits(result: dict, run: Run) -> None:
  for split in ("validation", "test"):
    tasks = result["splits"][split]
    assert set(tasks) == set(run.cfg.active_views)
    own = {"own most frequent", "own most recent"}
    assert set(tasks["next_page"]["baselines"]) == {"most popular", "popular lately", "co-occurrence", *own}
    assert set(tasks["next_page"]["popular_lately"]) == {"days", "users"}
    assert set(tasks["quiet"]["baselines"]) == {"constant", "aggregates + logistic", "aggregates + boosted trees"}
    assert set(tasks["pages"]["baselines"]) == {"constant", "aggregates + logistic"}  # 5 values, 4 counted
    for name, task in tasks.items():
      both_classes = 0 < task.get("positive", 0.5) < 1
      assert (task["metrics"][result["main_metric"][name]] is not None) == both_classes
      assert task["labels"] > 0
  assert result["splits"]["test"]["quiet"]["metrics"]["auc"] is not None


def test_the_file_holds_what_is_returned(result: dict, run: Run) -> None:
  assert json.loads((run.workdir / "evaluation.json").read_text()) == json.loads(json.dumps(result))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_metric_equals_one_computed_by_hand(result: dict, run: Run, split: str) -> None:
  label, score = [], []
  for batch in snapshot_batches.query_batches(run.dataset, run.cfg, split=SPLITS[split]):
    out = np.asarray(run.answer(batch.features, batch.given).answers["quiet"])
    for row, question in enumerate(batch.questions):
      record = run.dataset[question.user]
      if record["known_quiet"][question.snapshot]:
        label.append(record["label_quiet"][question.snapshot])
        score.append(out[row])
  measured = result["splits"][split]["quiet"]
  assert measured["labels"] == len(label) == run.dataset.manifest["labels"]["quiet"][split]["known"]
  assert measured["positive"] == pytest.approx(np.mean(label))
  assert measured["metrics"]["auc"] == pytest.approx(roc_auc_score(label, score))


def test_what_a_user_has_seen_is_what_lies_before_the_question(run: Run) -> None:
  cfg = config.override(run.cfg, ["--config.tasks.next_page.exclude_seen=True"])
  column = run.dataset.schema.field("page")
  for batch in snapshot_batches.query_batches(run.dataset, cfg, split=TEST):
    assert len(batch.seen["next_page"]) == len(batch.questions)
    for question, seen in zip(batch.questions, batch.seen["next_page"]):
      assert set(seen) == set(run.dataset[question.user]["codes"][: question.n_events, column])


def test_loads_of_every_task_sum_to_one_per_layer(result: dict) -> None:
  for task in result["expert_load"].values():
    for layer in task["load"]:
      assert sum(layer) == pytest.approx(1 if task["snapshots"] else 0, abs=1e-3)


def test_the_table_shows_each_task_beside_its_baselines(result: dict) -> None:
  heading, *rows = results_table.results_table(result)
  assert heading[:4] == ["task", "labels", "metric", "supermoe"]
  assert {r[0] for r in rows} == {"next_page", "quiet", "pages", "paid"}
  assert len({len(r) for r in rows}) == 1
  assert "next_page" in results_table.aligned_table([heading, *rows])


def test_popularity_ranks_by_code_and_skips_what_was_seen() -> None:
  target = np.array([2, 5, 1, 6])
  assert ranking_baselines.popularity_ranks(target, None).tolist() == [1, 4, np.inf, 5]
  assert target.tolist() == [2, 5, 1, 6]
  seen = [np.array([3]), np.array([2, 3, 9]), np.array([], int), np.array([6])]
  assert ranking_baselines.popularity_ranks(target, seen).tolist() == [1, 2, np.inf, np.inf]


def test_own_frequency_ranks_by_own_counts_then_by_popularity(run: Run) -> None:
  user = next(i for i in range(len(run.dataset)) if len(run.dataset[i]["time"]) > 20)
  record = run.dataset[user]
  n = 15
  question = snapshot_batches.Query(user, record["user"], 0, 0, n, 0)
  counts = np.bincount(record["codes"][:n, 0], minlength=run.dataset.schema.categorical["page"])[2:]
  order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
  for place, item in enumerate(order, 1):
    frequent, _ = ranking_baselines.personal_ranks(run.dataset, "page", [question], np.array([item + 2]))
    assert frequent.tolist() == [place]
  assert ranking_baselines.personal_ranks(run.dataset, "page", [question], np.array([1]))[0].tolist() == [np.inf]


def test_the_table_and_its_words_say_what_could_not_be_measured() -> None:
  ranked = {"labels": 6, "values": 1, "metrics": {"ndcg@10": 1.0}, "baselines": {"most popular": {"ndcg@10": 1.0}}}
  one_class = {"labels": 40, "metrics": {"auc": None}, "baselines": {}}
  main = {"left": "auc", "lost": "auc", "next": "ndcg@10"}
  result = {"main_metric": main, "splits": {"validation": {}, "test": {"next": ranked, "left": one_class}}}
  assert results_table.results_table(result) == [
    ["task", "labels", "metric", "supermoe", "most popular"],
    ["left", "40", "auc", "–", "–"],
    ["lost", "0", "auc", "–", "–"],
    ["next", "6", "ndcg@10", "1.0000", "1.0000"],
  ]
  assert results_table.results_words(result) == [
    "without a label in test, so not measured there: lost",
    "next: its field has one value in training, so every answer ranks it first",
    "left: its 40 labels in test are all of one class, so there is no auc",
    "nothing is measured in validation",
  ]
  trees = {"aggregates + boosted trees": {"snapshots": 1234, "users": 300, "loss": "poisson"}}
  lines = {"aggregates + logistic": {"snapshots": 200, "users": 100}}
  amounts = {n: {**one_class, "metrics": {"auc": 0.6}, "fitted": f} for n, f in (("spend", trees), ("left", lines))}
  fitted = {"main_metric": {"spend": "auc", "left": "auc"}, "splits": {"test": amounts}}
  assert results_table.results_words(fitted) == [
    "the models on aggregates are fitted on training snapshots: spend 1,234 of 300 users, Poisson deviance; left 200 "
    "of 100 users"
  ]
  nothing = {"main_metric": {"left": "auc"}, "splits": {"test": {}}}
  assert results_table.results_table(nothing)[1:] == [["left", "0", "auc", "–"]]


def test_a_run_without_validation_snapshots_is_measured_on_test(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
  split = dataclasses.replace(run.cfg.data.split, validation=())
  cfg = dataclasses.replace(run.cfg, data=dataclasses.replace(run.cfg.data, split=split))
  monkeypatch.setattr(run, "cfg", cfg)
  found = evaluate.evaluate(run, compare=False, progress=False, splits=("validation", "test"), write=False)
  assert found["splits"]["validation"] == {} and set(found["splits"]["test"]) == set(cfg.active_views)


def test_a_config_without_test_snapshots_is_prepared_trained_evaluated_on_validation_and_reported(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  write_log(tmp_path, users=20)
  raw = raw_config(tmp_path)
  raw["data"]["split"]["test"] = []
  raw["tasks"] = {"quiet": raw["tasks"]["quiet"], "pages": raw["tasks"]["pages"]}
  raw["train"] |= {"steps": 4}
  script, workdir = tmp_path / "config.py", str(tmp_path / "run")
  script.write_text(f"import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({raw!r})\n")
  assert cli.main(["prepare", "--config", str(script)]) == 0
  assert cli.main(["train", "--config", str(script), "--workdir", workdir]) == 0
  capsys.readouterr()
  assert cli.main(["evaluate", "--workdir", workdir]) == 0
  said = capsys.readouterr().out
  assert "nothing is measured in test" in said and "scores on validation at step 4;" in said
  (pages,) = (line.split() for line in said.splitlines() if line.startswith("pages "))
  assert int(pages[1]) > 0
  found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  assert found["splits"]["test"] == {} and set(found["splits"]["validation"]) == {"quiet", "pages"}
  assert found["by_history"] == {} and found["event_experts"] is None and found["expert_load"] == {}
  assert cli.main(["report", "--workdir", workdir]) == 0
  page = (tmp_path / "run" / "report.html").read_text()
  assert "The config names no test snapshot" in page and "Every metric on the validation snapshots." in page
  run = Run(tmp_path / "run")
  split = dataclasses.replace(run.cfg.data.split, validation=())
  run.cfg = dataclasses.replace(run.cfg, data=dataclasses.replace(run.cfg.data, split=split))
  with pytest.raises(
    ConfigError, match=r"there is nothing to evaluate: .* no snapshot for validation or test\. Name a"
  ):
    evaluate.evaluate(run, compare=False, progress=False)
