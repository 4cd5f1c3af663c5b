"""Writes the seesaw report for people: in sentences, as a table for the terminal, and in Markdown.

`compare.make_report` has decided which claims are justified; this module only puts them into words.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from supermoe_jax.seesaw.gains import Estimate

# With fewer seeds or test labels than this, a warning is written.
FEW_SEEDS = 5
FEW_LABELS = 500
# The unit of gains, in words.
UNIT = "percent of what the single-task model has over a constant answer"
MARKS = {"lost": "▼", "gained": "▲"}

# The content of seesaw.json; see `compare.make_report`.
Report = dict[str, Any]


def signed(value: float | None, *, plus: bool = True) -> str:
  """Formats percents or points with two digits and a typographic minus; zero has no sign, None is a dash."""
  if value is None:
    return "–"
  text = f"{value:{'+' if plus else ''}.2f}"
  return (text if float(text) else "0.00").replace("-", "−")


def interval_in_sentence(found: Estimate, *, unit: str = "", plus: bool = True) -> str:
  """Formats an estimate for a sentence: "−2.10% (−3.00 to −1.20)"."""
  if found["mean"] is None:
    return "unknown"
  ends = [signed(found[k], plus=plus) for k in ("low", "high")]
  within = "one seed, no interval" if found["low"] is None else " to ".join(ends)
  return f"{signed(found['mean'], plus=plus)}{unit} ({within})"


# The summaries that variants are compared by, with their names in sentences.
_SUMMARIES = (("harm", "harm"), ("worst_gain", "worst gain"), ("mean_gain", "mean gain"))


def report_sentences(found: Report) -> list[str]:
  """Returns the report in sentences: the conclusion, chance, the choice, warnings, and a sentence on each variant."""
  return [
    *conclusion(found),
    *chance(found),
    *choice(found),
    *warnings(found),
    *(describe_variant(found, v) for v in found["variants"]),
  ]


def choice(found: Report) -> list[str]:
  """Returns a sentence on the variant that is best on validation, or nothing while there is none."""
  standing, best = found["validation"]["variants"], found["validation"]["best"]
  if best is None:
    return []
  lost, alike = standing[best]["lost"], found["validation"]["alike"]
  compared = len([n for n in standing if n != found["null"]])
  out = [
    f"On validation {best} is best: of {_count(compared, 'variant')} it loses on the fewest tasks "
    f"({', '.join(lost) or 'none'}), and of those that do its mean gain is highest, "
    f"{interval_in_sentence(standing[best]['mean_gain'], unit='%')}."
  ]
  if alike:
    out.append(
      f"The mean gain of {', '.join(alike)} on validation differs from that of {best} by no more than chance alone "
      "makes it, so the choice among them is arbitrary."
    )
  return out


def chance(found: Report) -> list[str]:
  """Returns sentences on what chance alone does, and on the variants whose differences are no larger than that."""
  noise, null, base, tuned = found["noise"], found["null"], found["base"], found["tuned"]
  if noise is None or not noise["harm"]["seeds"]:
    return []
  parts = [f"{what} by {interval_in_sentence(noise[key], unit=' points')}" for key, what in _SUMMARIES]
  index = interval_in_sentence(noise["seesaw_index"])
  out = [
    f"What chance alone does: {null} is {base} trained again with other seeds, and changes {', '.join(parts)} and the "
    f"seesaw index by {index}."
  ]
  differences = {n: v["versus_tuned"] for n, v in found["variants"].items() if v["versus_tuned"] and n != null}
  within = [n for n, d in differences.items() if all(d[key]["within_noise"] for key, _ in _SUMMARIES)]
  if within:
    out.append(f"Not told from {tuned} by more than chance alone does, in any summary: {', '.join(within)}.")
  return out


def conclusion(found: Report) -> list[str]:
  """Returns sentences on the variants that reduce the seesaw, or the negative result, and on variants that lost."""
  tuned, variants = found["tuned"], found["variants"]
  if not found["compared"]:
    if found["no_better"] and not found["waiting"]:
      named = ", ".join(found["no_better"])
      return [
        f"No single-task model is better than a constant answer beyond chance ({named}): there is nothing to measure "
        "gains by."
      ]
    return ["No task has both a single-task score and one in a shared model yet: there is nothing to compare."]
  judged = {n: v["versus_tuned"] for n, v in variants.items() if v["versus_tuned"] and n != found["null"]}
  judged = {n: v for n, v in judged.items() if v["harm"]["low"] is not None}
  out = []
  if tuned not in variants or not variants[tuned]["harm"]["seeds"]:
    out.append("Tuned static weights have no complete run, so nothing is said about whether the seesaw gets smaller.")
  elif found["waiting"]:
    out.append(f"Still without scores to compare: {', '.join(found['waiting'])}. No conclusion is drawn before that.")
  elif not judged:
    out.append(f"No variant shares two complete seeds with {tuned}, so no conclusion is drawn.")
  elif not any(v["reduces_seesaw"] for v in judged.values()):
    out.append(
      f"A negative result: of {_count(len(judged), 'variant')} none improves both harm and worst gain over tuned "
      f"static weights ({tuned}) with intervals that exclude 0 and a mean gain no lower."
    )
  for name, v in judged.items():
    if v["reduces_seesaw"]:
      out.append(
        f"{name} reduces the seesaw: against tuned static weights ({tuned}) harm changes by "
        f"{interval_in_sentence(v['harm'], unit=' points')}, the worst gain by "
        f"{interval_in_sentence(v['worst_gain'], unit=' points')} and the mean gain by "
        f"{interval_in_sentence(v['mean_gain'], unit=' points')}.{_doubt(v, found)}"
      )
  if len(judged) > 1 and any(v["reduces_seesaw"] for v in judged.values()):
    out.append(f"That is of {len(judged)} variants compared; the intervals are not widened for their number.")
  out.append(f"Gains are in {UNIT}.")
  if losing := {n: len(v["lost"]) for n, v in variants.items() if v["mean_gain"]["seeds"] > 1 and n != found["null"]}:
    out.append(
      f"Against models trained for one task alone, {sum(n > 0 for n in losing.values())} of "
      f"{_count(len(losing), 'variant')} lost on at least one of {_count(len(found['compared']), 'task')}."
    )
  return out


def warnings(found: Report) -> list[str]:
  """Returns sentences on reasons to trust the numbers less: few seeds, few test labels, gaps in the study."""
  out = []
  seeds = [v["tasks"][t]["gain"]["seeds"] for v in found["variants"].values() for t in found["compared"]]
  fewest = min((n for n in seeds if n), default=FEW_SEEDS)
  if fewest < FEW_SEEDS:
    only = "" if fewest == max(seeds) else "some of "
    out.append(
      f"Few seeds: {only}these estimates rest on {_count(fewest, 'seed')}. With fewer than {FEW_SEEDS} an interval is "
      "wide or none, and a difference that is not called one may well be there."
    )
  few = {t: a for t, a in found["tasks"].items() if a["labels"] is not None and a["labels"] < FEW_LABELS}
  if same := [f"{t} has {a['labels']:,}" for t, a in few.items() if not a["folds"]]:
    out.append(
      f"Few test labels: {', '.join(same)}. All seeds are scored on the same labels, so an interval over seeds does "
      "not cover variation between samples of labels."
    )
  if several := [f"{t} has {a['labels']:,}" for t, a in few.items() if a["folds"]]:
    out.append(
      f"Few test labels: {', '.join(several)}. Each seed tests other users, so an interval over seeds covers variation "
      "between samples of labels."
    )
  short = {t: a["folds"] for t, a in found["tasks"].items() if a["folds"] and a["folds"] > len(found["seeds"])}
  if short:
    out.append(
      f"Some users are not tested: {', '.join(short)} have {max(short.values())} folds of users and the study has "
      f"{_count(len(found['seeds']), 'seed')}. A seed tests one fold."
    )
  if found["noise"] is None and found["variants"]:
    out.append(
      "There is no null variant, a config trained again with other seeds: how much chance alone does is unknown."
    )
  if found["missing"]:
    out.append(
      f"The study has {_count(len(found['missing']), 'gap')}, each named under what is missing; every estimate says "
      "how many seeds it is made of."
    )
  return out


def describe_variant(found: Report, name: str) -> str:
  """Describes one variant: the tasks on which it lost and gained, and its difference to tuned static weights."""
  this = found["variants"][name]
  gains = {t: this["tasks"][t] for t in found["compared"] if this["tasks"][t]["gain"]["seeds"]}
  if not gains:
    return f"{name}: nothing to compare yet."
  out = f"{name}: "
  judged = [t for t, v in gains.items() if v["verdict"] != "unknown"]
  if judged:
    lost, gained = (
      f"{verb} on {len(this[verb]) or 'none'} of {_count(len(judged), 'task')}"
      + (
        " (" + "; ".join(f"{t} {interval_in_sentence(gains[t]['gain'], unit='%')}" for t in this[verb]) + ")"
        if this[verb]
        else ""
      )
      for verb in ("lost", "gained")
    )
    out += f"{lost}, {gained}"
  if unknown := [t for t in gains if t not in judged]:
    out += f"{', ' if judged else ''}no verdict from one seed on {', '.join(unknown)}"
  if this["mean_gain"]["seeds"]:
    out += f"; mean gain {interval_in_sentence(this['mean_gain'], unit='%')}, {_harm(this)}"
  return f"{out}. {_difference(found, name)}"


def _harm(this: dict[str, Any]) -> str:
  """Describes a variant's harm, first as it follows from the tasks' mean gains, and then as a mean over seeds."""
  by_seed = interval_in_sentence(this["harm"], unit="%", plus=False)
  less_biased = this["of_mean_gains"]["harm"]
  if less_biased is None:
    return f"harm {by_seed}"
  return (
    f"harm {signed(less_biased, plus=False)}% of the mean gains, {by_seed} in the mean over seeds, which noise makes "
    "larger: it counts every loss by chance and no gain by chance"
  )


def _difference(found: Report, name: str) -> str:
  if name == found["null"]:
    return f"This is {found['base']} trained again with other seeds: its difference to {found['base']} is chance alone."
  if name == found["tuned"]:
    return "These are the tuned static weights that the others are compared with."
  difference = found["variants"][name]["versus_tuned"]
  if difference is None or not difference["harm"]["seeds"]:
    return "There is no complete seed in common with tuned static weights."
  parts = []
  for key, what in _SUMMARIES:
    text = f"{what} {interval_in_sentence(difference[key], unit=' points')}"
    if difference[key]["low"] is not None:
      text += ", significant" if difference[key]["significant"] else ", not significant"
    if difference[key]["within_noise"]:
      text += ", no larger than chance alone makes it"
    parts.append(text)
  last = "It reduces the seesaw." if difference["reduces_seesaw"] else "A smaller seesaw is not shown."
  return f"Against {found['tuned']}: {'; '.join(parts)}. {last}"


def _doubt(difference: dict[str, Any], found: Report) -> str:
  """Returns a sentence on the parts of a claim that chance alone could make; empty if there is none."""
  within = [what for key, what in _SUMMARIES[:2] if difference[key]["within_noise"]]
  return f" But {found['null']} differs from {found['base']} as much in {' and '.join(within)}." if within else ""


def _count(n: int, what: str) -> str:
  return f"{n} {what}{'s' if n != 1 else ''}"


def cell(found: Estimate, *, mark: str = "", plus: bool = True) -> str:
  """Formats an estimate for a table: the mean, half the width of its interval, and a mark."""
  if found["mean"] is None:
    return "–"
  half = "" if found["low"] is None else f" ±{(found['high'] - found['low']) / 2:.2f}"
  return f"{signed(found['mean'], plus=plus)}{half}{f' {mark}' if mark else ''}"


def gains_table(found: Report) -> list[list[str]]:
  """Returns rows in percent; the first is the heading.

  The columns are the variant, Δ of each task, Δm, the worst Δ and the harm H of the tasks' mean gains, both as means
  over seeds, the number of tasks lost, and that of the configurations tried.
  """
  tasks = list(found["tasks"])
  rows = [["variant", *tasks, "Δm", "worst Δ", "H", "worst Δ by seed", "H by seed", "lost", "tries"]]
  for name, this in found["variants"].items():
    # A space replaces a missing mark, so that the numbers of a column align.
    gains = [cell(v["gain"], mark=MARKS.get(v["verdict"], " ")) for v in (this["tasks"][t] for t in tasks)]
    judged = sum(this["tasks"][t]["verdict"] != "unknown" for t in found["compared"])
    of_means = this["of_mean_gains"]
    summaries = [cell(this["mean_gain"]), signed(of_means["worst_gain"]), signed(of_means["harm"], plus=False)]
    summaries += [cell(this["worst_gain"]), cell(this["harm"], plus=False)]
    tries = this["tuning"]["tries"]
    counts = [f"{len(this['lost'])}/{judged}" if judged else "–", "–" if tries is None else str(tries)]
    rows.append([name, *gains, *summaries, *counts])
  return rows


def gains_markdown(found: Report) -> str:
  """Returns the table as Markdown, with a legend."""

  def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(c.strip().replace("|", "\\|") for c in cells) + " |"

  rows = gains_table(found)
  rule = line(["---", *["---:"] * (len(rows[0]) - 1)])
  legend = (
    f"Gain Δ over a model trained for the task alone, in {UNIT}, ± half of the 95 % t interval over "
    f"{_count(len(found['seeds']), 'seed')}, paired by seed. ▼ lost, ▲ gained: the interval excludes 0. Δm: mean over "
    "tasks. H: harm, the mean of max(0, −Δ) over tasks. Worst Δ and H are of the tasks' mean gains; by seed, they are "
    "means over seeds, which noise makes worse, because a loss by chance counts and a gain by chance does not. Tries: "
    "configurations that validation chose from."
  )
  return "\n".join([line(rows[0]), rule, *map(line, rows[1:]), "", legend, ""])
