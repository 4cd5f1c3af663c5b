"""Formats the scores of a probe as a table and notes for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from supermoe_jax.evaluation.metrics import LOWER_IS_BETTER

# With more labels than this, each has one line with the best models instead of a line for each model.
MOST_WITH_A_LINE_A_MODEL = 12


def probe_table(result: Mapping[str, Any]) -> list[list[str]]:
  """Returns rows for `results_table.aligned_table`: label, its count, metric, model, judged vectors, comparisons.

  A comparison has its score, and Δ, the judged vectors' score less the comparison's over the same users. Judged scores
  and Δ have 95 % intervals.
  """
  judged = result["judged"]
  beside = [n for n in result["features"] if n != judged]
  heading = ["label", "asked", "metric", "model", judged]
  for name in beside:
    heading += [name, f"Δ to {name}"]
  rows = [heading]
  short = len(result["labels"]) > MOST_WITH_A_LINE_A_MODEL
  for name, found in result["labels"].items():
    rows += _label_rows(name, f"{found['asked']:,}", found, judged, beside, short)
  for name, found in result["means"].items():
    rows += _label_rows(name, f"{len(found['labels'])} labels", found, judged, beside, short=False)
  return rows


def _label_rows(
  name: str, asked: str, found: Mapping[str, Any], judged: str, beside: list[str], short: bool
) -> list[list[str]]:
  metric, best, scores = found["main_metric"], found["best_model"], found["scores"]
  models = list(scores[judged])
  lines = []
  shown = f"{metric} (lower is better)" if metric in LOWER_IS_BETTER else metric
  for model in [] if short else models:
    line = [name, asked, shown, model, interval_text(scores[judged][model][metric])]
    for other in beside:
      difference = found["differences"][other].get(model)
      line += [
        _number(scores[other].get(model, {}).get(metric, {}).get("value")),
        "–" if difference is None else interval_text(difference[metric], signed=True),
      ]
    lines.append(line)
  if short or (beside and len(models) > 1):
    line = [name, asked, shown, f"best: {best[judged]}", interval_text(scores[judged][best[judged]][metric])]
    for other in beside:
      value = scores[other][best[other]][metric]["value"]
      line += [
        f"{_number(value)} {best[other]}",
        interval_text(found["differences"][other]["best"][metric], signed=True),
      ]
    lines.append(line)
  return [lines[0], *(["", "", "", *line[3:]] for line in lines[1:])]


def interval_text(found: Mapping[str, Any], *, signed: bool = False) -> str:
  """Returns a value and its interval as text, such as "0.8000 [0.7900, 0.8100]"."""
  value = _number(found["value"], signed)
  if found["low"] is None:
    return value
  return f"{value} [{_number(found['low'], signed)}, {_number(found['high'], signed)}]"


def _number(value: float | None, signed: bool = False) -> str:
  if value is None:
    return "–"
  digits = ".4f" if abs(value) < 100 else ",.1f"
  return f"{value:{'+' if signed else ''}{digits}}".replace("-", "−")


def probe_notes(result: Mapping[str, Any]) -> list[str]:
  """Returns the lines below the table: the protocol, kinds of labels, and the users and rows that were left out."""
  protocol, counts, judged = result["protocol"], result["counts"], result["judged"]
  if protocol["temporal"]:
    how = f"fitted on all times but the last and scored on the last; {protocol['resamples']:,} resamples"
  else:
    how = f"{protocol['repeats']} x {protocol['folds']} folds of users"
  out = [f"{how}; intervals: {protocol['interval']}; seed {protocol['seed']}"]
  for name, found in result["labels"].items():
    kind = found["kind"]
    if kind == "binary":
      kind = f"binary, {found['classes'][1]!r} rather than {found['classes'][0]!r}"
      kind += f" ({found['asked_of_class'][found['classes'][1]]:,} of {found['asked']:,})"
    elif kind == "multiclass":
      kind = f"one of {len(found['classes'])} classes"
    if len(result["labels"]) <= MOST_WITH_A_LINE_A_MODEL or found["missing"]:
      missing = f"; {found['missing']:,} without a value are left out" if found["missing"] else ""
      out.append(f"  {name}: {kind}{missing}")
  for name, why in result["not_measured"].items():
    out.append(f"  {name}: not measured, {why}")
  out.append(
    f"{counts['users_probed']:,} users, {counts['rows_probed']:,} labels a column; of {counts['labelled_users']:,} "
    f"labelled users {counts['labelled_users_without_embedding']:,} have no row in {judged}, and of "
    f"{counts['embedded_users']:,} users there {counts['embedded_users_without_label']:,} have no label"
  )
  for words, key in (
    ("rows of labels repeat another row", "label_rows_repeated"),
    ("rows of labels have other times than --as-of", "label_rows_of_other_times"),
    (f"rows of labels have no row in {judged} for their user and time", "label_rows_without_embedding"),
  ):
    if counts[key]:
      out.append(f"  {counts[key]:,} {words}")
  for name, count in counts["label_rows_without"].items():
    if count:
      out.append(f"  {count:,} more are left out because {name} has no row for them")
  for name, about in result["features"].items():
    if said := {k: v for k, v in about.get("text", {}).items() if (k, v) != ("delimiter", ",")}:
      out.append(f"  {name}: {about['file']} was read with {', '.join(f'{k}={v!r}' for k, v in said.items())}")
    if about.get("columns_left_out"):
      out.append(f"  {name}: columns left out: {', '.join(about['columns_left_out'])}")
  return [*out, *result["notes"]]
