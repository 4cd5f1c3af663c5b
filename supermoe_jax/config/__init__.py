"""Configuration: `ml_collections` files resolved into frozen dataclasses.

A config file defines `get_config() -> ml_collections.ConfigDict`. Only the keys that differ from the defaults of
`schema` need to stand in it. Everything is checked before any work begins; an unknown key is an error that names the
nearest valid one.
"""

from supermoe_jax.config.loading import differences, load, load_json, override, resolve, save
from supermoe_jax.config.schema import (
  MICROSECONDS_PER_DAY,
  TASK_KINDS,
  Aggregates,
  Config,
  ConfigError,
  Data,
  Evaluate,
  Field,
  FutureEvent,
  FutureValues,
  ItemTable,
  Mesh,
  Model,
  NextEvent,
  Source,
  Split,
  Task,
  Train,
  UserLabel,
  UserTable,
  nearest,
  parse_time,
  to_dict,
)

__all__ = [
  "MICROSECONDS_PER_DAY",
  "TASK_KINDS",
  "Aggregates",
  "Config",
  "ConfigError",
  "Data",
  "Evaluate",
  "Field",
  "FutureEvent",
  "FutureValues",
  "ItemTable",
  "Mesh",
  "Model",
  "NextEvent",
  "Source",
  "Split",
  "Task",
  "Train",
  "UserLabel",
  "UserTable",
  "differences",
  "load",
  "load_json",
  "nearest",
  "override",
  "parse_time",
  "resolve",
  "save",
  "to_dict",
]
