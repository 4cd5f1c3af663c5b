"""Defines how an exported encoder reads raw events: its sources, columns and fields, as in `preprocessing.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from supermoe_jax.serving.json_values import ColumnKind, TimeKind


@dataclasses.dataclass(frozen=True)
class SourceSpec:
  """Rules for reading the events of a source.

  Attributes:
    time: the column of the time.
    time_kind: how times are written.
    columns: the kind of each column that a field of the source reads, including columns of its table of items.
    fields: the column of each field that its events carry.
    user_fields: the part of `fields` that the table of users gives.
    item_key: the column by which its table of items is joined; empty without a table.
    joined: the columns that the table of items gives if an event does not hold them.
  """

  time: str
  time_kind: TimeKind
  columns: Mapping[str, ColumnKind]
  fields: Mapping[str, str]
  user_fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  item_key: str = ""
  joined: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FieldSpec:
  """Rules for reading the values of a field; see `config.Field`."""

  numeric: bool
  log1p: bool = False
  many: int = 0
  separator: str = "|"
  vector: int = 0  # the number of numbers of a vector; 0: another kind of field


@dataclasses.dataclass(frozen=True)
class PreprocessingSpec:
  """The settings in `preprocessing.json`, except encoders and aggregates.

  Attributes:
    max_events: most events of a row; the last ones are taken.
    sources: sources in the order of the config.
    fields: fields in the order of the config.
    user_columns: the kind of each column of the table of users that a field reads.
    extra_columns: the field of each extra column of the codes.
    hidden_codes: see `windows.Encoding`.
    hidden_numeric: see `windows.Encoding`.
    drop_duplicates: whether an event that repeats another event is left out, as in preparation.
  """

  max_events: int
  sources: Mapping[str, SourceSpec]
  fields: Mapping[str, FieldSpec]
  user_columns: Mapping[str, ColumnKind]
  extra_columns: tuple[str, ...]
  hidden_codes: tuple[int, ...]
  hidden_numeric: tuple[int, ...]
  drop_duplicates: bool


def spec_from_json(saved: Mapping[str, Any]) -> PreprocessingSpec:
  """Returns a spec from the JSON form of its `dataclasses.asdict`."""

  def kinds(of: Mapping[str, Any]) -> dict[str, ColumnKind]:
    return {c: ColumnKind(**{**kind, "nulls": tuple(kind.get("nulls", ()))}) for c, kind in of.items()}

  def source(of: Mapping[str, Any]) -> SourceSpec:
    changed = {"time_kind": TimeKind(**of["time_kind"]), "columns": kinds(of["columns"]), "joined": tuple(of["joined"])}
    return SourceSpec(**{**of, **changed})

  saved = dict(saved)
  if "further" in saved:  # the name of `extra_columns` in exports of version 0.1
    saved["extra_columns"] = saved.pop("further")
  parts = {
    "sources": {n: source(s) for n, s in saved["sources"].items()},
    "fields": {n: FieldSpec(**f) for n, f in saved["fields"].items()},
    "user_columns": kinds(saved["user_columns"]),
    **{k: tuple(saved[k]) for k in ("extra_columns", "hidden_codes", "hidden_numeric")},
  }
  return PreprocessingSpec(**{**saved, **parts})
