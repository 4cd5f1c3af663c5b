"""Describes a dataset in a few lines of text, from its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from supermoe_jax import config
from supermoe_jax.batch import FIRST_VALUE
from supermoe_jax.data.dataset.dataset import prepared_tie_rate
from supermoe_jax.data.preparation import losses

SHOWN_CLASSES = 5  # number of classes shown for a task
SHOWN_FILES = 3  # number of new files of dated labels shown after an append


def dataset_summary(manifest: Mapping[str, Any]) -> str:
  """Returns a few lines on the content of a prepared dataset and its peculiarities."""
  lengths, reading = manifest["lengths"], manifest["reading"]
  lines = [
    f"{manifest['users']:,} users, {manifest['events']:,} events from {manifest['log']['first']} to "
    f"{manifest['log']['last']} (median {lengths['p50']:.0f} a user, at most {lengths['p100']:.0f}); "
    f"{reading['tie_rate']:.1%} share user and time",
    "snapshots: " + ", ".join(f"{n:,} {split}" for split, n in manifest["snapshots"].items()),
  ]
  for task, splits in manifest["labels"].items():
    lines.append(f"  {task}: " + ", ".join(_label_text(split, count) for split, count in splits.items()))
  for task in _tasks_about_moments(manifest):
    lines.append(
      f"  {task}: any value of the next moment is right ({prepared_tie_rate(manifest):.1%} of the prepared events "
      "share user and time with another)"
    )
  for task, count in manifest.get("dated_labels", {}).items():
    known = sum(of_split["known"] for of_split in manifest["labels"][task].values())
    lines += [f"  {task}: {text}" for text in dated_rows_text(count, known)]
  lines += _missing_columns(manifest)
  lines += _vector_lines(manifest)
  lines += _loss_lines(losses.find_losses(manifest), manifest["warnings"])
  lines += [f"warning: {w}" for w in manifest["warnings"]]
  lines.append(f"prepared in {manifest['seconds']:.0f} s: {manifest['config']['data']['path']}")
  return "\n".join(lines)


def dated_rows_text(count: Mapping[str, Any], known: int) -> list[str]:
  """Returns lines on the rows of a table of dated labels that give none of the `known` labels; none if all rows do.

  `count` is the task's entry of `DatedLabels.counts`.
  """
  rows, few = sum(count["files"].values()), sum(count["placed"].values()) - known
  reasons = {
    **{f"dropped ({reason.replace('_', ' ')})": n for reason, n in count["dropped"].items()},
    "without a value": count["without_value"],
    "of users without events": count["of_users_without_events"],
    "outside the periods of the split": count["outside_periods"],
    "known only after the period of their time (delay_days)": count["known_too_late"],
    "with a class that no training row has": count.get("unseen_class", 0),
    "with too few events before them": few,
  }
  said = [f"{n:,} {reason}" for reason, n in reasons.items() if n]
  lines = [f"{sum(reasons.values()):,} of {rows:,} rows give no label: {', '.join(said)}"] if said else []
  if repeated := count["repeated"]:
    lines.append(
      f"{repeated:,} row{'s repeat' if repeated > 1 else ' repeats'} the user and time of an earlier row and "
      f"{'were' if repeated > 1 else 'was'} left out; at {count['contradicting']:,} "
      "of these moments the labels differ, and the first row's label counts"
    )
  return lines


def _missing_columns(manifest: Mapping[str, Any]) -> list[str]:
  """Returns a line for each field and source with files that lack the field's column."""
  lines = []
  for name, source in manifest["reading"].get("sources", {}).items():
    for field, files in source.get("columns_missing", {}).items():
      rows = sum(source["files"][file] for file in files)
      lines.append(
        f"field {field}: absent in {rows:,} of {source['rows_read']:,} rows of {name}, whose "
        f"{f'{len(files)} files lack' if len(files) > 1 else 'file lacks'} its column, such as {files[0]}"
      )
  return lines


def _vector_lines(manifest: Mapping[str, Any]) -> list[str]:
  """Returns a line for each field of vectors on its table; `losses` counts events without one."""
  return [
    f"field {name}: {facts['codes'] - FIRST_VALUE:,} different vectors of {facts['size']:,} numbers, divided by their "
    f"scale {facts['scale']:.3g}"
    for name, facts in manifest["fields"].items()
    if facts.get("kind") == "vector"
  ]


def _loss_lines(found: Iterable[losses.LogLoss], warnings: Sequence[str]) -> list[str]:
  """Returns a line for each loss that is none of the `warnings`, which have lines of their own."""
  return [loss.text for loss in found if loss.text not in warnings]


def _tasks_about_moments(manifest: Mapping[str, Any]) -> list[str]:
  """Returns the names of the tasks for which simultaneous events are a set."""
  rate, split_mode = prepared_tie_rate(manifest), manifest["config"]["data"]["split"]["mode"]
  tasks = {n: t for n, t in manifest["config"]["tasks"].items() if t["kind"] == config.NextEvent.kind}
  asked = {n: config.NextEvent(field=t["field"], ties=t.get("ties", "order")) for n, t in tasks.items()}
  return [n for n, task in asked.items() if task.values_of_a_moment(rate, split_mode)]


def _label_text(split: str, count: Mapping[str, Any]) -> str:
  text = f"{split} {count['known']:,} known"
  if "classes" in count:
    return f"{text} ({', '.join(f'{n:,} {value}' for value, n in list(count['classes'].items())[:SHOWN_CLASSES])})"
  if "zero" in count:
    zero = f", {count['zero'] / count['known']:.1%} zero" if count["known"] else ""
    negative = f", {count['negative']:,} negative" if count["negative"] else ""
    return (
      f"{text} (mean {count['mean']:.3g}, deviation {count['std']:.3g}{zero}{negative})" if count["known"] else text
    )
  if "mean" in count:
    return f"{text} (mean {count['mean']:.3g}, deviation {count['std']:.3g}, standardised)" if count["known"] else text
  kind = next(k for k in count if k != "known")
  return f"{text} ({count[kind]:,} {kind.replace('_', ' ')})"


def append_summary(manifest: Mapping[str, Any]) -> str:
  """Returns a few lines on the changes of the last append."""
  last, reading = manifest["appends"][-1], manifest["reading"]
  held = sum(manifest["shards"].values())
  touched, others = last["users_with_new_events"], last["users_with_other_labels"]
  lines = [
    f"{last['events']:,} events appended: {touched:,} users rewritten, {last['new_users']:,} of them new; "
    f"{manifest['users'] - touched - others:,} left unchanged"
  ]
  if others:
    lines.append(f"{others:,} users without new events were rewritten, because more of their labels are known now")
  if repeats := last["repeats_of_earlier_events"]:
    dropped = "and were left out" if "duplicate" in reading["dropped"] else "and were kept (config.data.duplicates)"
    lines.append(f"{repeats:,} events repeat earlier ones {dropped}")
  if empty := last.get("empty_files"):
    lines.append(f"{len(empty):,} file{'s' if len(empty) > 1 else ''} without a row passed over, such as {empty[0]}")
  for name, files in last["beyond_patterns"].items():
    if files:
      lines.append(
        f"config.data.sources.{name}.files must also match {', '.join(files)}; otherwise train refuses this dataset"
      )
  for name, values in last["vocabularies"].items():
    if values["added"]:
      shown = ", ".join(map(repr, values["first"][:SHOWN_CLASSES])) + (", …" if values["added"] > SHOWN_CLASSES else "")
      lines.append(f"field {name}: {values['added']:,} new values have a code now ({shown}); retrain models for them")
    if values["left_out"]:
      lines.append(f"field {name}: {values['left_out']:,} new values of training stay out of vocabulary")
  lines += [f"field {name}: {n:,} new vectors" for name, n in last.get("new_vectors", {}).items()]
  if files := last.get("label_files"):
    shown = ", ".join(files[:SHOWN_FILES]) + (", …" if len(files) > SHOWN_FILES else "")
    lines.append(f"dated labels were read from {len(files):,} new file{'s' if len(files) > 1 else ''}: {shown}")
  for task, count in manifest.get("dated_labels", {}).items():
    known = sum(of_split["known"] for of_split in manifest["labels"][task].values())
    lines += [f"{task}: {text}" for text in dated_rows_text(count, known)]
  lines += _missing_columns(manifest)
  for loss in losses.reading_losses(last["reading"], manifest["config"]["data"]) if "reading" in last else ():
    lines.append(("warning: " if loss.alarming else "") + f"of the new files, {loss.text}")
  lines += [f"warning: {w}" for w in manifest["warnings"]]
  if held > 2 * manifest["users"]:
    lines.append(f"of {held:,} records {held - manifest['users']:,} are out of date; preparing again frees their space")
  lines.append(
    f"{manifest['users']:,} users, {manifest['events']:,} events up to {manifest['log']['last']}; "
    f"appended in {manifest['seconds']:.0f} s"
  )
  return "\n".join(lines)
