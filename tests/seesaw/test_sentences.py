"""What a study says in words and tables: never more than its rule allows."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supermoe_jax.seesaw import sentences
from tests.fixtures.seesaw_runs import BAD, GOOD, make, study


def test_words_claim_a_smaller_seesaw_where_it_is_shown():
  found = make(study({"tuned": BAD, "good": GOOD, "same": BAD}), labels={"churn": 9000, "basket": 9000})
  difference = found["variants"]["good"]["versus_tuned"]
  assert difference["reduces_seesaw"] and difference["harm"]["significant"]
  assert difference["harm"]["mean"] == pytest.approx(-np.mean([3.0, 3.2, 2.9]) / 2)
  assert found["variants"]["tuned"]["versus_tuned"] is None
  claims = [w for w in found["words"] if "reduces the seesaw" in w]
  assert len(claims) == 2 and all(w.startswith("good") for w in claims)
  assert any("not widened for their number" in w for w in found["words"])
  assert any(w.startswith("same: lost on 1 of 2 tasks (churn −3.03% (") for w in found["words"])
  assert not any("Few test labels" in w for w in found["words"])


def test_words_publish_a_negative_result():
  found = make(study({"tuned": GOOD, "bad": BAD}), labels={"churn": 120, "basket": 9000})
  assert found["words"][0].startswith("A negative result")
  assert "reduces the seesaw" not in " ".join(found["words"])
  assert any("rest on 3 seeds" in w for w in found["words"])
  assert any("churn has 120" in w and "basket" not in w for w in found["words"])
  assert found["variants"]["bad"]["lost"] == ["churn"] and found["variants"]["bad"]["gained"] == ["basket"]


def test_enough_seeds_need_no_warning():
  assert not any("Few seeds" in w for w in make(study({"tuned": BAD + BAD, "good": GOOD + GOOD}))["words"])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_words_never_claim_what_the_rule_forbids(data):
  """Whatever the numbers and whichever runs are there, a claim stands only beside a variant that may make it."""
  small = st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=2), min_size=1, max_size=3)
  gains = {v: data.draw(small) for v in ("tuned", "a", "b")}
  if data.draw(st.booleans()):
    gains["a"] = [[g + 5 for g in row] for row in gains["tuned"]]
  runs = study(gains)
  kept = [r for r in runs if data.draw(st.integers(0, 5)) or r.variant == "a"]
  found = make(kept, variants=["tuned", "a", "b"])
  for sentence in found["words"]:
    if re.search("reduces the seesaw", sentence, re.IGNORECASE):
      name = re.match(r"\w+", sentence)[0]
      difference = found["variants"][name]["versus_tuned"]
      assert difference["reduces_seesaw"]
      assert difference["harm"]["high"] < 0 < difference["worst_gain"]["low"]
      assert difference["mean_gain"]["mean"] >= 0
      assert not found["waiting"]


def test_no_claim_while_a_task_has_no_single_model_yet():
  runs = [r for r in study({"tuned": BAD, "good": GOOD}) if r.task != "basket"]
  found = make(runs)
  assert found["compared"] == ["churn"] and found["waiting"] == ["basket"]
  assert not found["variants"]["good"]["versus_tuned"]["reduces_seesaw"]
  assert "Still without scores to compare: basket" in found["words"][0]
  assert any("scores without a single-task score to compare with (seeds 0, 1, 2)" in m for m in found["missing"])
  assert found["variants"]["good"]["tasks"]["basket"]["score"]["mean"] is not None
  assert sentences.gains_table(found)[1][2].strip() == "–"


def test_a_study_that_has_only_begun():
  found = make([], variants=["tuned", "good"], tasks=["churn"], seeds=[0, 1])
  assert found["variants"]["good"]["mean_gain"]["mean"] is None
  assert "nothing to compare" in found["words"][0]
  assert found["missing"] == [
    "single churn: no run (seeds 0, 1).",
    "tuned: no run (seeds 0, 1).",
    "good: no run (seeds 0, 1).",
  ]
  assert sentences.gains_table(found)[1] == ["tuned", *["–"] * 8]


def test_without_tuned_weights_nothing_is_said_of_the_seesaw():
  found = make(study({"good": GOOD}), tuned="")
  assert found["variants"]["good"]["versus_tuned"] is None
  assert "Tuned static weights have no complete run" in found["words"][0]


def test_tables():
  found = make(study({"tuned": BAD, "good|v": GOOD}))
  rows = sentences.gains_table(found)
  assert rows[0] == [
    "variant",
    "churn",
    "basket",
    "Δm",
    "worst Δ",
    "H",
    "worst Δ by seed",
    "H by seed",
    "lost",
    "tries",
  ]
  assert rows[1][0] == "tuned" and rows[1][-2:] == ["1/2", "–"]
  assert rows[1][1] == "−3.03 ±0.38 ▼" and rows[1][2] == "+2.03 ±0.14 ▲"
  assert all(len(r) == 10 for r in rows)
  lines = sentences.gains_markdown(found).splitlines()
  assert lines[3].startswith("| good\\|v | ")
  assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]} == {11}
  assert "percent of what the single-task model has over a constant answer" in lines[-1]


def test_the_less_biased_harm_stands_first_and_the_text_says_why():
  """Losses and gains by chance that average out leave no harm of the mean gains, and harm in the mean over seeds."""
  found = make(study({"tuned": [[2.0, -2.0], [-2.0, 2.0], [1.0, -1.0], [-1.0, 1.0]]}))
  assert found["variants"]["tuned"]["harm"]["mean"] > 0.7 and found["variants"]["tuned"]["of_mean_gains"]["harm"] < 1e-9
  words = sentences.describe_variant(found, "tuned")
  assert "harm 0.00% of the mean gains, 0.75% (" in words and "which noise makes larger" in words
  rows = sentences.gains_table(found)
  row = dict(zip(rows[0], rows[1]))
  assert row["H"] == "0.00" and row["H by seed"].startswith("0.75")
  assert "noise makes worse" in sentences.gains_markdown(found)


def test_words_say_what_chance_alone_does_and_which_differences_are_no_larger():
  same = [[0.5, 2.0], [0.7, 1.8], [0.3, 2.2]]
  near = [[g - 0.1 for g in row] for row in same]
  again = [[0.9, 1.6], [0.5, 2.2], [0.1, 1.8]]
  runs = study({"tuned": same, "near": near, "far": BAD, "base": same, "null": again})
  found = make(runs, base="base", null="null")
  words = " ".join(found["words"])
  assert "What chance alone does: null is base trained again with other seeds" in words
  (within,) = [w for w in found["words"] if w.startswith("Not told from tuned by more than chance alone does")]
  assert "near" in within and "far" not in within
  assert "no larger than chance alone makes it" in sentences.describe_variant(found, "near")
  assert "its difference to base is chance alone" in sentences.describe_variant(found, "null")
  assert "of 3 variants none improves" in words  # the null variant is no candidate
  assert not any("how much chance alone does is unknown" in w for w in found["words"])
  without = make(study({"tuned": same, "near": near}))
  assert any("how much chance alone does is unknown" in w for w in without["words"])


def test_a_claim_that_chance_could_make_says_so():
  again = [[BAD[0][0] + 30, 2.0], [BAD[1][0] - 30, 2.1], [BAD[2][0], 2.0]]
  found = make(study({"tuned": BAD, "good": GOOD, "null": again}), base="tuned", null="null")
  (claim,) = [w for w in found["words"] if w.startswith("good reduces the seesaw")]
  assert "But null differs from tuned as much in harm" in claim


def test_the_number_of_tries_stands_in_the_table():
  found = make(study({"tuned": BAD, "good": GOOD}), tuning={"tuned": {"rate": 2.0, "tries": 27}})
  rows = sentences.gains_table(found)
  assert [r[-1] for r in rows] == ["tries", "27", "–"]
