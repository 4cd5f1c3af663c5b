"""Combines the manifest's counts of a dataset's earlier events with the counts of the new events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from supermoe_jax import config
from supermoe_jax.batch import ABSENT, FIRST_VALUE, UNKNOWN
from supermoe_jax.data.append import merge_histories
from supermoe_jax.data.encoding.vectors import Vectors
from supermoe_jax.data.encoding.vocabulary import Encoders, Vocabulary
from supermoe_jax.data.preparation import fitting
from supermoe_jax.data.preparation.event_log import EventLog
from supermoe_jax.data.preparation.log_statistics import sum_days
from supermoe_jax.data.preparation.record_counts import RecordCounts


class RepeatCounts:
  """Counts of new events that repeat earlier events.

  Attributes:
    by_source: source → the number of its repeats.
    nulls: field → the number of repeats without a value of the field, though their source carries the field.
    days: the number of repeats of each day, by the number of days since 1970.
  """

  def __init__(self, data: config.Data):
    self._data = data
    self.by_source = dict.fromkeys(data.sources, 0)
    self.nulls = dict.fromkeys(data.fields, 0)
    self.days: dict[int, int] = {}

  @property
  def total(self) -> int:
    """Returns the number of repeats of all sources."""
    return sum(self.by_source.values())

  def add(self, found: merge_histories.Repeats) -> None:
    """Adds repeats to the counts."""
    sources = list(self._data.sources)
    for index, name in enumerate(sources):
      self.by_source[name] += int(np.sum(found.source == index))
    days, counts = np.unique(found.time // config.MICROSECONDS_PER_DAY, return_counts=True)
    self.days = sum_days(self.days, dict(zip(days.tolist(), counts.tolist(), strict=True)))
    codes, numbers = iter(found.codes.T), iter(found.numeric.T)
    for name, field in self._data.fields.items():
      absent = np.isnan(next(numbers)) if field.kind == "numeric" else next(codes) == ABSENT
      carried = np.isin(found.source, [sources.index(s) for s in field.sources or sources])
      self.nulls[name] += int(np.sum(absent & carried))


def combined_reading(
  before: Mapping[str, Any], new: Mapping[str, Any], tally: RecordCounts, repeats: RepeatCounts, dropped: bool
) -> dict[str, Any]:
  """Returns the manifest's counts of reading for all files together; `dropped`: repeats were left out."""
  out = dict(before)
  for key in ("rows_read", "duplicate_rows"):
    out[key] = before[key] + new[key]
  out["duplicate_rows"] += repeats.total
  out["dropped"] = _summed(before["dropped"], new["dropped"])
  out["nulls"] = _summed(before["nulls"], new["nulls"])
  if dropped and repeats.total:
    out["dropped"] = _summed(out["dropped"], {"duplicate": repeats.total})
    out["nulls"] = {name: count - repeats.nulls[name] for name, count in out["nulls"].items()}
  out["events"] = out["rows_kept"] = tally.events
  out["users"], out["training_events"] = tally.users, tally.state["periods"]["training"]
  out["tie_rate"] = tally.state["tied"] / tally.events
  out["user_rows_dropped"] = new["user_rows_dropped"]
  words, more_words = before.get("null_words", {}), new["null_words"]
  out["null_words"] = {w: _summed(words.get(w, {}), more_words.get(w, {})) for w in {**words, **more_words}}
  out["sources"] = {}
  for name, source in before["sources"].items():
    more = new["sources"].get(name, {})
    merged: dict[str, Any] = {**_summed({k: v for k, v in source.items() if isinstance(v, int)}, more)}
    if "item_rows_dropped" in more:
      merged["item_rows_dropped"] = more["item_rows_dropped"]
    if dropped:
      merged["rows_kept"] -= repeats.by_source[name]
    merged["dropped"] = _summed(source["dropped"], more.get("dropped", {}))
    merged["files"] = {**source["files"], **more.get("files", {})}
    lacking, now = source.get("columns_missing", {}), more.get("columns_missing", {})
    merged["columns_missing"] = {f: [*lacking.get(f, []), *now.get(f, [])] for f in {**lacking, **now}}
    merged["empty_files"] = [*source["empty_files"], *more.get("empty_files", [])]
    out["sources"][name] = {key: merged[key] for key in (*source, *({"columns_missing"} - source.keys()))}
  return out


def _summed(one: Mapping[str, int], other: Mapping[str, Any]) -> dict[str, int]:
  extra = {key: value for key, value in other.items() if key not in one and isinstance(value, int)}
  return {**{key: value + other.get(key, 0) for key, value in one.items()}, **extra}


def combined_coverage(
  before: Mapping[str, Any],
  encoders: Encoders,
  covered: merge_histories.CodeCounts,
  log: EventLog,
  fields: Mapping[str, config.Field],
) -> dict[str, Any]:
  """Returns how well the encoders cover all events, from the coverage of the earlier events and the difference."""
  out = {}
  for name, encoder in encoders.categorical.items():
    facts = dict(before[name])
    if isinstance(encoder, Vocabulary):
      facts["codes"] = encoder.n_codes
      outside = np.ones(encoder.n_codes, bool)
      outside[FIRST_VALUE : FIRST_VALUE + len(encoder.values)] = outside[ABSENT] = False
      training = covered.training[name]
      for when, counts in (("training", training), ("after", covered.all[name] - training)):
        values = facts[f"values_{when}"] + int(counts[UNKNOWN:].sum())
        facts |= fitting.share_outside(when, values, facts[f"outside_{when}"] + int(counts[outside].sum()))
    if isinstance(encoder, Vectors):
      facts = fitting.vector_facts(encoder)
    if encoder.buckets and covered.training[name].any():
      facts |= {"values": None, "colliding": None}  # nothing records which values were hashed before
    if fields[name].many:
      facts["values_cut"] += log.facts.fields[name].cut
    out[name] = facts
  return out
