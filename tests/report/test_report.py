"""The report: one page, self-contained, escaped, and whole even where parts of the run are missing."""

from __future__ import annotations

import json
import pathlib
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from supermoe_jax import config, report
from supermoe_jax.errors import ConfigError, DataError
from supermoe_jax.report import page as report_page
from supermoe_jax.report import run_files, task_sentences, user_map_section
from supermoe_jax.report.figures import curves, drawing, heat_maps, user_maps
from tests.fixtures.html_page import Page, assert_self_contained
from tests.fixtures.report_run import (
  HOSTILE,
  NOVEMBER,
  SPLITS,
  make_config,
  make_dataset,
  make_embeddings,
  make_evaluation,
  make_metrics,
  make_validation,
  write_json,
)

SECTIONS = (
  *("results", "metrics", "seesaw", "data", "training", "history", "calibration", "experts", "events", "map"),
  *("neighbours", "config"),
)


def begun(folder: pathlib.Path, **options) -> config.Config:
  """Makes a run directory, `folder / "run"`, that holds nothing but its config."""
  cfg = make_config(folder, **options)
  (folder / "run").mkdir()
  config.save(cfg, folder / "run" / "config.json")
  return cfg


@pytest.fixture
def cfg(tmp_path) -> config.Config:
  """The config of the run directory `tmp_path / "run"`, which holds nothing else."""
  return begun(tmp_path)


def written(workdir: pathlib.Path) -> tuple[str, Page]:
  file = report.write_report(workdir)
  assert file == workdir / "report.html"
  assert [p.name for p in workdir.glob("*.incomplete")] == []
  text = file.read_text()
  page = Page(text)
  assert page.open == []
  assert [a.get("id") for a in page.all("h2")] == list(SECTIONS)
  assert_self_contained(text, page)
  return text, page


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[str, Page]:
  """The page of a run with all its parts."""
  folder = tmp_path_factory.mktemp("whole")
  cfg, run = begun(folder), folder / "run"
  make_dataset(cfg)
  make_metrics(cfg, run)
  make_evaluation(cfg, run)
  make_embeddings(cfg, run)
  return written(run)


def test_a_whole_run(whole):
  text, page = whole
  assert HOSTILE not in text and "&lt;b&gt;x&lt;/b&gt;" in text and HOSTILE in page.text
  assert "supermoe evaluate" not in page.text and "supermoe embed" not in page.text
  assert "ahead of its best baseline on 1 of 2" in page.text
  assert "By the intervals it is ahead beyond chance on churn." in page.text
  assert "0.700 to 0.875" in page.text and "+0.013 to +0.087" in page.text and "▲ ahead" in page.text
  assert "+0.0500" in page.text and "−0.0500" in page.text  # churn ahead, following behind
  assert "Without any label in the test split, and so without a row: young" in page.text
  assert "12.5%" in page.text and "null user: 5" in page.text and "task young has no label in test & more" in page.text
  assert "6.25% positive" in page.text  # basket: 10 positive of 40 labels of 4 values
  assert "All 40 users" in page.text
  # scores, 4 + 4 curves, load, dropped, balance, history, calibration, heat map, 4 of events, map by events
  assert len(page.all("svg")) == 20
  for attributes in page.all("svg"):
    assert attributes["role"] == "img" and attributes["aria-label"]
  assert len(page.all("figure")) == len(page.all("figcaption")) == 10
  assert drawing.INK not in text and "currentColor" in text


def test_experts_are_described_by_the_events_that_they_serve_more_than_others(whole):
  _, page = whole
  text = " ".join(page.text.split())
  assert "Expert 0: 40% of all choices; item <i>milk</i> (1.4 times)." in text  # 55% where it has 40% of all
  assert "Expert 1: 20% of all choices; no event type or value stands out." in text  # "rare" has too few tokens
  assert "Expert 2: 20% of all choices; no event type or value stands out." in text
  assert "Expert 3: 20% of all choices; item <i>milk</i> (1.3 times)." in text
  assert "the values are kept as hashes" in text


def test_amounts_stand_beside_the_calibration(tmp_path, cfg):
  bins = [
    {"labels": 20, "least": 0.0, "most": 5.0, "predicted": 2.5, "observed": 3.5},
    {"labels": 20, "least": 5.0, "most": 4000.0, "predicted": 1250.0, "observed": 1500.0},
  ]
  make_evaluation(cfg, tmp_path / "run", deciles={HOSTILE: {"labels": 40, "error": None, "bins": bins}})
  text, page = written(tmp_path / "run")
  assert HOSTILE not in text and "1,250 predicted, 1,500 observed" in text
  assert "<td>5</td><td>4,000</td><td>20</td><td>1,250</td><td>1,500</td>" in text
  assert "Whether probabilities" not in page.text and "Error by deciles" in page.text


def test_groups_of_histories_without_a_value_are_named_as_such(whole):
  text, page = whole
  assert "<td>20</td><td>19</td><td>25%</td><td>0.7500<br>" in text and "0.625 to 0.812" in text
  assert "16 or more events" in text and "<td>20</td><td>19</td><td>25%</td><td>–</td>" in text
  spoken = [a["aria-label"] for a in page.all("svg")]
  assert "churn: auc by events before (and users): 4–15 (19) 0.75." in spoken


def test_an_older_evaluation_still_gives_a_page_that_names_the_command(tmp_path, cfg):
  make_evaluation(cfg, tmp_path / "run", whole=False)
  _, page = written(tmp_path / "run")
  assert "ahead of its best baseline on 1 of 2" in page.text
  assert page.text.count("supermoe evaluate") == 4  # intervals, length of history, calibration, experts by event


def test_a_run_that_was_validated_while_it_trained(tmp_path, cfg):
  run = tmp_path / "run"
  make_dataset(cfg)
  make_metrics(cfg, run)
  make_validation(run)
  _, page = written(run)
  labels = [a["aria-label"] for a in page.all("svg")]
  assert (
    len(labels) == 4 + 4 + 3 + 1 + 4
  )  # curves of the run and of tasks, three of experts, the score, one of each task
  assert "Score: 0.3 at step 30, 0.6 at step 60." in labels
  assert any(label.startswith("following: ndcg@10: 0.125 at step 30") for label in labels)
  assert "basket: mean_auc: no value." in labels
  assert "the mean of these metrics" in page.text and "Validation while training" in page.text


def test_every_kind_of_task_is_put_in_words(tmp_path):
  task = {
    "click": config.EventLabel(field="clicked", positive=("yes",), given=("item", "place"), per_snapshot=5),
    "long": config.EventLabel(field="seconds", at_least=30.0),
    "rating": config.EventLabel(field="stars"),
    "plan": config.UserLabel(column="plan", type="multiclass"),
    "age": config.UserLabel(column="age", type="regression"),
    "alike": config.Contrast(slice_events=32),
    "buy": config.FutureEvent(source="sales", sample_space="quiet == 1", out_space_weight=0.25),
  }
  said = {n: task_sentences.task_question(t) for n, t in task.items()}
  assert said["click"] == (
    "whether clicked of the next event is yes, given its item, place; asked of the 5 events after a snapshot"
  )
  assert "seconds of the next event is at least 30;" in said["long"]
  assert said["rating"].startswith("the number stars of the next event")
  assert said["plan"] == "which value plan has"
  assert said["age"].startswith("the number age")
  assert "two slices of up to 32 events" in said["alike"] and "without a metric" in said["alike"]
  assert said["buy"] == (
    "any event of sales within 28 days, where quiet == 1 (in training with weight 1, elsewhere with 0.25)"
  )


EVERY_KIND = {
  "age": {"kind": "user_label", "column": "age", "type": "regression"},
  "alike": {"kind": "contrast"},
  "bought": {"kind": "event_label", "field": "item", "positive": ["a"], "sample_space": "cheap == 1"},
  "cheap": {"kind": "event_label", "field": "price", "at_least": 1.0, "given": ["item"]},
  "plan": {"kind": "user_label", "column": "plan", "type": "multiclass"},
}


def test_a_run_of_the_other_kinds(tmp_path):
  """Weights over time, gates, errors of which less is better, and labels of classes and numbers."""
  cfg = make_config(tmp_path, tasks=EVERY_KIND, conditioning="mmoe")
  run = tmp_path / "run"
  run.mkdir()
  config.save(cfg, run / "config.json")
  make_dataset(cfg)
  file = pathlib.Path(cfg.data.path) / "manifest.json"
  manifest = json.loads(file.read_text())
  yes = {"known": 40, "positive": 10}
  labels = {"bought": yes, "cheap": yes, "plan": {"known": 8, "classes": {"free": 6, "paid": 2, "old": 0}}}
  labels["age"] = {"known": 8, "mean": -0.125, "std": 1.5}
  write_json(file, {**manifest, "labels": {n: dict.fromkeys(SPLITS, v) for n, v in labels.items()}})
  make_metrics(cfg, run, weights={"age": 0.5, "plan": 1.5})

  def scored(metric, own, constant):
    return {"labels": 600, "metrics": {metric: own, "ece": 0.1}, "baselines": {"constant": {metric: constant}}}

  tasks = {
    "age": scored("rmse", 0.75, 1.0),
    "bought": scored("auc", 0.75, 0.5),
    "cheap": scored("auc", 0.25, 0.5),
    "plan": {**scored("auc", None, 0.5), "classes": 3},
  }
  gates = {n: [0.5, 0.25, 0.125, 0.125] for n in tasks}
  load = {n: {"snapshots": 10, "load": [[0.25] * 4], "gate": g} for n, g in gates.items()}
  main = {n: next(iter(t["metrics"])) for n, t in tasks.items()}
  splits = {"validation": tasks, "test": tasks}
  make_evaluation(cfg, run, whole=False, splits=splits, main_metric=main, expert_load=load)
  text, page = written(run)

  assert "ahead of its best baseline on 2 of 3" in page.text
  assert "Of rmse less is better, of every other main metric more" in page.text
  assert re.search(r'class="better">−0\.2500', text)  # the error fell by that
  assert re.search(r'class="worse">−0\.2500', text)  # the area of "cheap"
  assert "Trained without labels, and so without a metric: alike" in page.text
  assert "Each task reads a view of the user representation that an MMoE layer makes" in page.text
  assert "2 classes, 75% free" in page.text and "−0.125 ± 1.5" in page.text
  assert "600 labels of 3 classes" in page.text
  assert "Weight of age" in page.text
  spoken = [a["aria-label"] or "" for a in page.all("svg")]
  assert "Weight of each task; at the end age 0.5, plan 1.5." in spoken
  assert any(s.startswith("Gate of each task, in percent. Most used: age expert 0 (50%)") for s in spoken)
  assert "further left is better" in text and "further right is better" in text
  assert "the task's own tokens" not in page.text


def test_a_recurrent_model_is_called_one(tmp_path):
  cfg, run = begun(tmp_path, encoder="gru", conditioning="mmoe"), tmp_path / "run"
  make_metrics(cfg, run, steps=(20,))
  _, page = written(run)
  text = " ".join(page.text.split())
  assert "a recurrent network of 2 layers of gated units (GRU) and width 8, over the last" in text
  assert "It has no expert layers. Each task reads a view of the user representation that an MMoE layer makes." in text


def test_a_run_that_has_only_begun(tmp_path, cfg):
  _, page = written(tmp_path / "run")
  for command in ("prepare --config CONFIG", "train --config CONFIG", "evaluate", "embed"):
    assert f"supermoe {command}" in page.text
  assert f"supermoe embed --workdir {tmp_path / 'run'} --as-of 2017-11-01" in page.text
  assert not page.all("svg")


def test_a_run_that_was_embedded_but_not_evaluated(tmp_path, cfg):
  make_dataset(cfg)
  make_embeddings(cfg, tmp_path / "run", users=4)
  _, page = written(tmp_path / "run")
  assert "supermoe evaluate" in page.text and "supermoe embed" not in page.text
  assert "too few, or too much alike" in page.text


def test_a_model_without_experts_that_was_evaluated_but_not_embedded(tmp_path):
  cfg, run = begun(tmp_path, moe_every=0), tmp_path / "run"
  make_dataset(cfg)
  make_metrics(cfg, run, steps=(20,))
  make_evaluation(cfg, run)
  _, page = written(run)
  assert page.text.count("has no expert layers") == 4
  assert "supermoe evaluate" not in page.text and "supermoe embed" in page.text
  assert "too few, or too much alike" not in page.text


def test_warnings_of_preparation_stand_at_the_head(tmp_path, cfg):
  make_dataset(cfg)
  text, page = written(tmp_path / "run")
  assert "Preparation warned: task young has no label in test &amp; more." in text.partition("<section")[0]
  assert "Preparation gave 1 warning, at the head of this page." in page.text


def test_parts_of_different_runs_are_told_apart(tmp_path, cfg):
  run = tmp_path / "run"
  make_metrics(cfg, run)
  make_evaluation(cfg, run, step=20, config_hash="other")
  make_dataset(make_config(tmp_path, d_model=16))
  notes = " ".join(report_page._notes(run_files.read_run(run)))
  assert "The evaluation shown here was made at step 20, but the run has reached step 60" in notes
  assert "made with another config" in notes
  assert "prepared with another configuration" not in notes  # the width is not the data's business
  manifest = pathlib.Path(cfg.data.path) / "manifest.json"
  write_json(manifest, {**json.loads(manifest.read_text()), "data_hash": "other"})
  (run / "metrics.jsonl").unlink()
  (run / "evaluation.json").unlink()
  assert "prepared with another configuration" in written(run)[1].text


def test_errors(tmp_path, cfg):
  with pytest.raises(ConfigError, match="not a run directory"):
    report.write_report(tmp_path / "elsewhere")
  run = tmp_path / "run"
  (run / "evaluation.json").write_text("{")
  with pytest.raises(DataError, match=r"evaluation\.json is damaged"):
    report.write_report(run)
  assert not (run / "report.html").exists()


def test_the_count_of_parameters_is_the_models_own(cfg, tmp_path):
  make_dataset(cfg)
  count = report_page._parameters(run_files.read_run(tmp_path / "run"))
  assert count is not None
  d, hidden = 8, 16
  assert count["tables"] == (12 + 22) * d
  assert count["rest"] - count["active"] == (4 - 2) * (2 * d * hidden + hidden + d)
  assert count["total"] == count["tables"] + count["rest"]


def test_labels_to_colour_by(cfg):
  """Churn at the test snapshot nearest to the map; a user label from any snapshot where its user has it known."""

  def record(user, churn, known, young):
    return {
      "user": user,
      "snapshot_time": np.array([NOVEMBER - 10, NOVEMBER, NOVEMBER]),
      "snapshot_split": np.array([0, 2, 1]),
      "label_churn": np.array([1 - churn, churn, 1 - churn], np.uint8),
      "known_churn": np.array([1, known, 1], np.uint8),
      "label_young": np.array([young, 1 - young, 1 - young], np.uint8),
      "known_young": np.array([1, 0, 0], np.uint8),
    }

  records = [record("a", 1, 1, 0), record("b", 0, 1, 1), record("c", 1, 0, 1)]
  picked = user_map_section.pick_labels(cfg, records, NOVEMBER + 5)
  assert list(picked) == ["churn", "young"]
  assert picked["churn"][0] == {"a": 1, "b": 0}
  assert picked["young"][0] == {"a": 0, "b": 1, "c": 1}
  assert "2017-11-01" in picked["churn"][1]
  assert user_map_section.pick_labels(cfg, records[:1], NOVEMBER) == {}  # one class only: no colours


def test_figures_are_well_formed_and_their_names_are_text():
  place = np.random.default_rng(0).normal(size=(30, 2))
  label = np.where(place[:, 0] > 0, 1.0, 0.0)
  label[:5] = np.nan
  drawn = [
    curves.draw_curve("a", "loss of $x$ & <b>", range(1000), [float("nan")] * 500 + [1.0] * 500),
    heat_maps.heat_map("b", "<many>", ["t"], np.full((1, 40), 1 / 40), 0.5),
    curves.draw_load_over_time("c", "one row", [5], np.array([[0.5, 0.5]])),
    user_maps.map_by_label("d", 'a "label"', place, label),
    user_maps.map_by_count("e", "events", place, np.ones(30)),
  ]
  for svg in drawn:
    root = xml.etree.ElementTree.fromstring(str(svg))
    assert root.get("role") == "img"
    assert len(svg) < 600_000
  assert "loss of $x$ &amp; &lt;b&gt;" in drawn[0]
  assert "20 yes" not in drawn[3] and "a &#34;label&#34;: " in drawn[3]


@pytest.mark.parametrize(
  ("value", "text"),
  [(0.0, "0"), (0.25, "0.25"), (999.6, "1,000"), (1234, "1,234"), (9999, "9,999"), (12345, "12.3k"), (999_999, "1M")],
)
def test_numbers(value, text):
  assert drawing.number(value) == text


def test_the_rows_of_a_table_of_dated_labels_are_counted(cfg, tmp_path):
  make_dataset(cfg)
  file = pathlib.Path(cfg.data.path) / "manifest.json"
  manifest = json.loads(file.read_text())
  assert "dated labels" not in written(tmp_path / "run")[0]
  manifest["dated_labels"] = {"churn": {"files": {"one.csv": 1000, "two.csv": 200}}}
  file.write_text(json.dumps(manifest))
  text, _ = written(tmp_path / "run")
  assert "The table of dated labels of churn has 1,200 rows; 120 of them give a label." in text
