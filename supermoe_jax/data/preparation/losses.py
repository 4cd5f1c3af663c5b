"""Finds all that preparation or an append dropped, cut, did not join or does not know, from the manifest's counts.

What is alarming is a warning: it stands in the manifest and at the head of a run's report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from supermoe_jax import config
from supermoe_jax.data.encoding.numeric import MOST_DEVIATIONS
from supermoe_jax.data.format.stray_rows import StrayTimes
from supermoe_jax.data.preparation.outlying_numbers import clipped_text, hiding_text
from supermoe_jax.data.preparation.stray_times import describe_stray_times

# Shares from which a loss is alarming. Files of a sound export hold next to no unusable rows, so a twentieth means that
# a column is read wrongly.
DROPPED = 0.05
# A file that was delivered twice, among five, makes such a share of repeated rows.
REPEATED = 0.2
# Tables of items and users are seldom complete. But one that misses half of what it should describe most likely has
# another key, and a vocabulary that misses half of the values describes little.
UNMATCHED = 0.5


class LogLoss(NamedTuple):
  """A sentence on something that is lost, without a full stop; and whether it is alarming."""

  text: str
  alarming: bool = False


def find_losses(manifest: Mapping[str, Any]) -> Iterator[LogLoss]:
  """Yields the losses of a whole dataset.

  `manifest` is the dataset's, with or without its warnings. What an earlier version did not count is left out.
  """
  cfg = manifest["config"]
  yield from reading_losses(manifest["reading"], cfg["data"])
  yield from _stray_losses(manifest)
  yield from _snapshot_losses(manifest, cfg["data"]["split"]["min_events"])
  yield from _length_losses(manifest, cfg["model"]["max_events"])
  yield from _user_losses(manifest["user_table"])
  for name, field in manifest["fields"].items():
    yield from _field_losses(name, field, cfg["data"])
  for name, clipped in manifest.get("clipped_numbers", {}).items():
    yield LogLoss(clipped_text(name, clipped), True)
  for name, hiding in manifest.get("hiding_numbers", {}).items():
    yield LogLoss(hiding_text(name, hiding), True)


def reading_losses(reading: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[LogLoss]:
  """Yields the losses of reading event files.

  `reading` are counts as of `log_statistics.log_counts`, of a dataset or of the files of an append; `data` is the data
  section of the config as JSON.
  """
  for name, source in reading["sources"].items():
    if empty := source["empty_files"]:
      files = len(empty) + len(source["files"])
      yield LogLoss(
        f"source {name}: {_of(len(empty), files, 'files')} {_are(len(empty))} empty: {', '.join(empty[:3])}"
      )
    rows, dropped = source["rows_read"], sum(source["dropped"].values())
    if dropped:
      reasons = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in source["dropped"].items())
      yield LogLoss(
        f"source {name}: {_of(dropped, rows, 'rows')} cannot be used and {_were(dropped)} dropped ({reasons})",
        dropped > DROPPED * rows,
      )
    if missing := source.get("items_missing"):
      table = data["sources"][name]["items"]["file"]
      yield LogLoss(
        f"source {name}: {_of(missing, rows - dropped, 'events')} {_have(missing)} no row in the item table {table}; "
        "its fields are absent there",
        missing > UNMATCHED * (rows - dropped),
      )
    if missing := source.get("users_missing"):
      yield LogLoss(
        f"source {name}: {_of(missing, rows - dropped, 'events')} {_are(missing)} of users without a row in "
        "config.data.users; its fields are absent there",
        missing > UNMATCHED * (rows - dropped),
      )
    if dropped := source.get("item_rows_dropped"):
      yield LogLoss(f"source {name}: {dropped:,} rows of the item table cannot be used and were dropped", True)
  if dropped := reading["user_rows_dropped"]:
    yield LogLoss(f"{dropped:,} rows of config.data.users cannot be used and were dropped", True)
  if repeats := reading["duplicate_rows"]:
    usable = reading["rows_read"] - sum(n for reason, n in reading["dropped"].items() if reason != "duplicate")
    fate = (
      "were dropped" if "duplicate" in reading["dropped"] else "were kept (config.data.duplicates='drop' drops them)"
    )
    yield LogLoss(
      f"{_of(repeats, usable, 'usable rows')} repeat an earlier row in user, time, source and every field, and {fate}",
      repeats >= REPEATED * usable,
    )
  for name, absent in reading["nulls"].items():
    if absent:
      carriers = data["fields"][name]["sources"] or reading["sources"]
      events = sum(reading["sources"][source]["rows_kept"] for source in carriers if source in reading["sources"])
      yield LogLoss(f"field {name}: {_of(absent, events, 'events')} {_have(absent)} no value")


def _split(manifest: Mapping[str, Any]) -> config.Split:
  settings = manifest["config"]["data"]["split"].items()
  values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings}
  return config.Split(**values)


def _stray_losses(manifest: Mapping[str, Any]) -> Iterator[LogLoss]:
  if manifest.get("stray_times") is not None:
    split = _split(manifest)
    strays = StrayTimes.from_json(manifest["stray_times"])
    yield from (LogLoss(*found) for found in describe_stray_times(strays, split, manifest["events"]))


def _snapshot_losses(manifest: Mapping[str, Any], min_events: int) -> Iterator[LogLoss]:
  split = _split(manifest)
  measured = [name for name in ("validation", "test") if split.has_snapshots(name)]
  if "validation" not in measured:
    only = "test only" if measured else "nothing"
    yield LogLoss(
      f"config.data.split.validation is empty: no checkpoint is chosen by validation, and evaluate measures {only}"
    )
  if "test" not in measured:
    only = "validation only" if measured else "nothing"
    yield LogLoss(f"config.data.split.test is empty: evaluate measures {only}")
  users = manifest["users"]
  early, repeated = manifest["snapshots_with_too_few_events"], manifest["repeated_snapshots"]
  snapshots = sum(manifest["snapshots"].values()) + early + repeated
  if early:
    fewer = "no event" if min_events == 1 else f"fewer than {min_events} events"
    yield LogLoss(f"{_of(early, snapshots, 'snapshots')} {_have(early)} {fewer} before them and were left out")
  if repeated:
    yield LogLoss(
      f"{_of(repeated, snapshots, 'snapshots')} lie at the time of another one (events of equal time) and were left out"
    )
  if without := manifest["users_without_training_events"]:
    yield LogLoss(f"{_of(without, users, 'users')} {_have(without)} no event in training", without > UNMATCHED * users)
  if without := manifest["users_without_snapshot"]:
    yield LogLoss(
      f"{_of(without, users, 'users')} {_have(without)} no snapshot: nothing is asked about them",
      without > UNMATCHED * users,
    )


def _length_losses(manifest: Mapping[str, Any], most: int) -> Iterator[LogLoss]:
  lengths = manifest["tally"]["lengths"]
  if longer := sum(users for length, users in lengths.items() if int(length) > most):
    yield LogLoss(
      f"{_of(longer, manifest['users'], 'users')} {_have(longer)} more events than config.model.max_events={most}; the "
      "model sees the last ones before a snapshot"
    )


def _user_losses(table: Mapping[str, Any]) -> Iterator[LogLoss]:
  without, labelled = table["labelled_users_without_events"], table.get("labelled_users", 0)
  if without and labelled:
    yield LogLoss(
      f"{_of(without, labelled, 'labelled users')} of config.data.users {_have(without)} no event; their labels are "
      "not used",
      without > UNMATCHED * labelled,
    )
  for task, count in table.get("user_labels", {}).items():
    rows = sum(count.get(key, 0) for key in ("labelled", "unseen_class", "dropped", "without_value"))
    if empty := count.get("without_value"):
      yield LogLoss(
        f"task {task}: {_of(empty, rows, 'users')} of config.data.users {_have(empty)} no value, so no label"
      )
    if unseen := count.get("unseen_class"):
      yield LogLoss(
        f"task {task}: {_of(unseen, rows, 'users')} {_have(unseen)} a class that no training user has; they have no "
        "label",
        unseen > UNMATCHED * rows,
      )
    if clipped := count.get("clipped"):
      yield LogLoss(
        f"task {task}: the values of {_of(clipped, rows, 'users')} lie more than {MOST_DEVIATIONS:,.0f} deviations "
        "from the mean of training and were clipped to there",
        True,
      )
    if dropped := count.get("dropped"):
      yield LogLoss(
        f"task {task}: the values of {_of(dropped, rows, 'users')} are no numbers; they have no label",
        dropped > DROPPED * rows,
      )


def _field_losses(name: str, field: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[LogLoss]:
  by_user = data["split"]["mode"] == "user"
  if share := field["oov_training"]:
    yield LogLoss(
      f"field {name}: {share:.2%} of the values in training are out of vocabulary (size, min_count)", share > UNMATCHED
    )
  if share := field["oov_after"]:
    where = "of other users were unseen in training" if by_user else "after the training period were unseen in it"
    yield LogLoss(f"field {name}: {share:.2%} of the values {where}", share > UNMATCHED)
  if field.get("colliding"):
    yield LogLoss(
      f"field {name}: {field['colliding']:.2%} of the {field['values']:,} hashed values share their code with others"
    )
  if clipped := field.get("clipped"):
    yield LogLoss(
      f"field {name}: {clipped:,} vectors hold numbers beyond {MOST_DEVIATIONS:,.0f} times the scale of training, "
      "which were clipped to there",
      True,
    )
  if cut := field.get("values_cut"):
    yield LogLoss(f"field {name}: {cut:,} values of lists longer than {data['fields'][name]['many']} were cut off")


def _of(count: int, total: int, what: str) -> str:
  """Returns such as "3 of 12 rows (25.0%)"; a share that would read 0.0% or 100.0% gets more digits."""
  share = count / total
  digits = 1 if share in (0, 1) or 0.0005 <= share < 0.9995 else 4
  return f"{count:,} of {total:,} {what} ({share:.{digits}%})"


def _are(count: int) -> str:
  return "is" if count == 1 else "are"


def _were(count: int) -> str:
  return "was" if count == 1 else "were"


def _have(count: int) -> str:
  return "has" if count == 1 else "have"
