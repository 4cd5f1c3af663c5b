"""Configuration: `ml_collections` files resolved into frozen dataclasses.

A config file defines `get_config() -> ml_collections.ConfigDict`. It names only the keys that differ from the defaults
in `schema`. Everything is checked before any work begins. An unknown key is an error that names the nearest valid key.

The modules that read and check config files (`loading`, `checks`) are imported at their first use, because a model that
is given a `Config` needs neither.
"""

from __future__ import annotations

import importlib
from typing import Any

from supermoe_jax.config.rounds import round_ends
from supermoe_jax.config.schema import (
  MICROSECONDS_PER_DAY,
  Config,
  Data,
  Evaluate,
  Field,
  Mesh,
  Model,
  Seesaw,
  Split,
  Tables,
  Train,
  Validate,
  Weighting,
  format_time,
  parse_time,
  to_dict,
)
from supermoe_jax.config.tables import Aggregates, ItemTable, Source, TextFormat, UserTable
from supermoe_jax.config.tasks import (
  TASK_KINDS,
  Answer,
  Contrast,
  DatedLabel,
  EventLabel,
  FutureAmount,
  FutureEvent,
  FutureValues,
  LabelledTask,
  NextEvent,
  Task,
  TimeToEvent,
  UserLabel,
)

# Functions imported at their first use, with their modules.
_LATER = {
  **dict.fromkeys(
    (
      "config_file",
      "differences",
      "load",
      "load_json",
      "override",
      "read_config",
      "resolve",
      "resolve_prepared",
      "save",
    ),
    "loading",
  ),
  "hash_fields": "hashing",
  "parse_sample_space": "tasks.condition",
}

__all__ = [
  "MICROSECONDS_PER_DAY",
  "TASK_KINDS",
  "Aggregates",
  "Answer",
  "Config",
  "Contrast",
  "Data",
  "DatedLabel",
  "Evaluate",
  "EventLabel",
  "Field",
  "FutureAmount",
  "FutureEvent",
  "FutureValues",
  "ItemTable",
  "LabelledTask",
  "Mesh",
  "Model",
  "NextEvent",
  "Seesaw",
  "Source",
  "Split",
  "Tables",
  "Task",
  "TextFormat",
  "TimeToEvent",
  "Train",
  "UserLabel",
  "UserTable",
  "Validate",
  "Weighting",
  "config_file",
  "differences",
  "format_time",
  "hash_fields",
  "load",
  "load_json",
  "override",
  "parse_sample_space",
  "parse_time",
  "read_config",
  "resolve",
  "resolve_prepared",
  "round_ends",
  "save",
  "to_dict",
]


def __getattr__(name: str) -> Any:
  if name not in _LATER:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
