"""The page of a study: one file, self-contained, escaped, with every task and variant, whole even when unfinished."""

from __future__ import annotations

import re
import xml.etree.ElementTree

import pytest

from supermoe_jax.report import seesaw_page
from supermoe_jax.report.figures import drawing, gains_figures
from supermoe_jax.report.figures.gains_figures import write_picture
from supermoe_jax.seesaw import compare, sentences
from tests.fixtures.html_page import Page, assert_self_contained
from tests.fixtures.seesaw_study import HOSTILE_TASK, HOSTILE_VARIANT, METRIC, VARIANTS, make, run, study

SECTIONS = ("words", "gains", "table", "variants", "alone", "measured")


def written(report, tmp_path):
  file = seesaw_page.write_study_page(report, tmp_path / "seesaw.html")
  assert file == tmp_path / "seesaw.html" and [p.name for p in tmp_path.iterdir()] == ["seesaw.html"]
  text = file.read_text()
  page = Page(text)
  assert page.open == []
  assert [a.get("id") for a in page.all("h2")] == list(SECTIONS)
  assert_self_contained(text, page, embedded=("#",))
  return text, page


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The report of a study, and its page."""
  report = make(study())
  return report, *written(report, tmp_path_factory.mktemp("whole"))


def test_a_whole_study(whole):
  report, text, page = whole
  for name in (*METRIC, *VARIANTS):
    assert page.text.count(name) >= 4
  assert HOSTILE_TASK not in text and HOSTILE_VARIANT not in text and "<i>" not in text
  assert "'--config.model.note=<i> '" in page.text  # quoted for a shell
  for sentence in sentences.report_sentences(report):
    assert sentence in page.text
  # gains, harm, shares; of two variants with traces: cosine, weights, two layers and a gate
  assert len(page.all("svg")) == 3 + 2 * 5
  for attributes in page.all("svg"):
    assert attributes["role"] == "img" and attributes["aria-label"]
  assert len(page.all("figure")) == len(page.all("figcaption")) == 3 + 2 * 2
  assert drawing.INK not in text and "currentColor" in text
  assert "What is missing" not in page.text
  assert page.text.count("percent of what the single-task model has over a constant answer") >= 3
  assert "a loss by chance counts in them, and a gain by chance does not" in page.text
  assert "1.2M" in page.text and "of seed 0 alone" in page.text
  # The words stand before the first picture, the picture before the table.
  assert text.index("A negative result") < text.index("<svg") < text.index("<table")


def test_losses_are_said_in_words_not_by_colour_alone(whole):
  report, _, page = whole
  marked = [a for a in page.all("span") if a.get("aria-label") in ("lost", "gained")]
  verdicts = [v["tasks"][t]["verdict"] for v in report["variants"].values() for t in METRIC]
  assert len(marked) == sum(v in ("lost", "gained") for v in verdicts) > 3


def test_a_study_that_has_only_begun(tmp_path):
  _, page = written(make([], tasks=list(METRIC), seeds=(0, 1)), tmp_path)
  assert not page.all("svg")
  assert "there is nothing to compare" in page.text and "What is missing: 6" in page.text
  for name in (*METRIC, *VARIANTS):
    assert name in page.text


def test_experts_of_a_task_without_test_snapshots_are_not_drawn(tmp_path):
  load = {"spend": {"snapshots": 0, "load": [[0.0, 0.0]]}, "churn": {"snapshots": 9, "load": [[0.125, 0.875]]}}
  runs = [run("tuned", 0, dict.fromkeys(METRIC, 0.5), expert_load=load)]
  _, page = written(make(runs, variants=("tuned",)), tmp_path)
  (svg,) = page.all("svg")
  assert "churn expert 1 (87.5%)" in svg["aria-label"] and "spend" not in svg["aria-label"]


def test_a_study_without_any_plan(tmp_path):
  _, page = written(compare.make_report([], variants=(), tuned="", overrides={}), tmp_path)
  assert "there is nothing to compare" in page.text and not page.all("svg")


def test_a_study_of_one_seed_and_one_run_missing(tmp_path):
  runs = [r for r in study(seeds=1) if r.task != "spend" and r.variant != "tuned"]
  _, page = written(make(runs, possible=None), tmp_path)
  assert "single spend: no run (seed 0)." in page.text and "tuned: no run (seed 0)." in page.text
  assert "share of the possible" not in page.text
  assert "reduces the seesaw" not in page.text


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_picture_stands_alone(tmp_path, kind):
  file = write_picture(make(study(variants=VARIANTS[:2]), variants=VARIANTS[:2]), tmp_path / f"gains.{kind}")
  content = file.read_bytes()
  assert [p.name for p in tmp_path.iterdir()] == [f"gains.{kind}"]
  if kind == "png":
    assert content.startswith(b"\x89PNG")
    return
  root = xml.etree.ElementTree.fromstring(content)
  assert root.tag.endswith("svg")
  text = "".join(root.itertext())
  assert "shared" in text and "churn" in text and HOSTILE_TASK in text
  assert drawing.INK.encode() not in content and b"currentColor" not in content
  assert b"#ffffff" in content and b"#24292f" in content  # its own background and a dark text on it


def test_a_picture_of_another_kind_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"\.svg or \.png"):
    write_picture(make(study()), tmp_path / "gains.gif")
  assert not list(tmp_path.iterdir())


def test_the_same_report_gives_the_same_picture(tmp_path):
  report = make(study(variants=("tuned",)), variants=("tuned",))
  first, second = (write_picture(report, tmp_path / f"{n}.svg").read_bytes() for n in "ab")
  assert first == second


def test_names_of_crowded_points_do_not_cover_each_other():
  """Ten variants in one place: every name stands somewhere else."""
  found = {"mean": 0.5, "low": None, "high": None, "seeds": 1}
  same = {"harm": found, "of_mean_gains": {"harm": 0.5}}
  variants = {f"variant_{i}": {**same, "mean_gain": {**found, "mean": i / 1000}} for i in range(10)}
  svg = gains_figures.draw_trade_off("t", {"variants": variants, "tuned": "variant_0"})
  root = xml.etree.ElementTree.fromstring(str(svg))
  places = {}
  for text in (t for t in root.iter() if t.tag.endswith("text")):
    if "variant_" in "".join(text.itertext()):
      at = re.search(r"translate\(([\d.]+) ([\d.]+)\)", text.get("transform", ""))
      x, y = (at[1], at[2]) if at else (text.get("x"), text.get("y"))
      places["".join(text.itertext()).strip()] = (float(x), float(y))
  assert len(places) == 10
  where = list(places.values())
  for i, (x, y) in enumerate(where):
    for u, v in where[:i]:
      assert abs(x - u) > 30 or abs(y - v) > 8
