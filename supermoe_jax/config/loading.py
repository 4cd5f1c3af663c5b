"""Builds a checked `Config` from `ml_collections` files, overrides and saved JSON."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from supermoe_jax import atomic_files
from supermoe_jax.config.checks import check_config
from supermoe_jax.config.schema import Config, Field, to_dict
from supermoe_jax.config.tasks import TASK_KINDS, NextEvent, Task
from supermoe_jax.errors import ConfigError, nearest

if TYPE_CHECKING:  # code that reads no config file, such as the exported encoder's loader, needs no ml_collections
  import ml_collections


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
  """Returns the differences of two nested mappings as lines `config.key: old → new`."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    keys = sorted(old.keys() | new.keys())
    return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}")]
  return [] if old == new else [f"{path}: {old!r} → {new!r}"]


def resolve(raw: Mapping[str, Any]) -> Config:
  """Returns a checked `Config` built from a nested mapping.

  Raises:
    ConfigError: an unknown key, a value of the wrong type, or an impossible combination.
  """
  config = _with_type_fields(_build(Config, raw, "config"))
  check_config(config)
  return config


def _with_type_fields(config: Config) -> Config:
  """Returns the config with a field for each source's column of types that no field reads."""
  data, fields = config.data, dict(config.data.fields)
  for name, source in data.sources.items():
    if source.type and not data.type_field(name):
      if source.type in fields:
        raise ConfigError(
          f"config.data.sources.{name}.type={source.type!r}: config.data.fields.{source.type} is another field; let a "
          f"vocabulary field without buckets read the column, such as {source.type}_type=dict(column={source.type!r})."
        )
      fields[source.type] = Field(sources=(name,))
  return dataclasses.replace(config, data=dataclasses.replace(data, fields=fields))


# Choices that version 0.1.0 had.
_REMOVED = {
  ("config.model.conditioning", "gate"): (
    "version 0.2.0 has no gates over the last experts, since they were worth no more than z itself. Set 'none', or "
    "read a run that has them with version 0.1.0."
  ),
  ("config.train.weighting.method", "dwa"): (
    "version 0.2.0 has no dynamic weight average, since its weights stayed within 4 % of equal ones. Set 'equal', or "
    "read a run that has it with version 0.1.0."
  ),
}


def _build(kind: Any, raw: Any, path: str) -> Any:
  origin = typing.get_origin(kind)
  if kind == Task:
    return _build_task(raw, path)
  if origin in (typing.Union, types.UnionType):  # Optional[X], or a number or a word
    inner = [a for a in typing.get_args(kind) if a is not type(None)]
    if len(inner) > 1:
      number, words = inner[0], typing.get_args(inner[1])
      if raw in words:
        return raw
      if not isinstance(raw, number) or isinstance(raw, bool):
        raise ConfigError(f"{path}={raw!r} must be of type {number.__name__}, or {' or '.join(map(repr, words))}.")
      return raw
    return None if raw is None else _build(inner[0], raw, path)
  if isinstance(kind, type) and dataclasses.is_dataclass(kind):
    if not isinstance(raw, Mapping):
      raise ConfigError(f"{path} must be a mapping of keys to values, not {raw!r}.")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in raw:
      if key not in names:
        raise ConfigError(f"{path}.{key}: unknown key{nearest(str(key), names)}")
    return kind(**{k: _build(hints[k], v, f"{path}.{k}") for k, v in raw.items()})
  if origin is Mapping:
    if not isinstance(raw, Mapping):
      raise ConfigError(f"{path} must be a mapping of names to settings, not {raw!r}.")
    return {str(k): _build(typing.get_args(kind)[1], v, f"{path}.{k}") for k, v in raw.items()}
  if origin is tuple:
    if isinstance(raw, str) or not isinstance(raw, Sequence):
      raw = [raw]
    return tuple(_build(typing.get_args(kind)[0], v, f"{path}[{i}]") for i, v in enumerate(raw))
  if origin is Literal:
    choices = typing.get_args(kind)
    for choice in choices:
      # An override gives the text "False" where the setting has a text by default.
      if raw == choice or (isinstance(choice, bool) and raw == str(choice)):
        return choice
    if why := _REMOVED.get((path, str(raw))):
      raise ConfigError(f"{path}={raw!r}: {why}")
    raise ConfigError(f"{path}={raw!r} is not a choice{nearest(str(raw), map(str, choices))}")
  if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
    return float(raw)
  if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
    raise ConfigError(f"{path}={raw!r} must be of type {kind.__name__}, not {type(raw).__name__}.")
  return raw


def _build_task(raw: Any, path: str) -> Task:
  if not isinstance(raw, Mapping) or "kind" not in raw:
    raise ConfigError(f"{path} must be a mapping with a 'kind'; valid kinds: {', '.join(sorted(TASK_KINDS))}.")
  raw = dict(raw)
  kind = raw.pop("kind")
  if kind not in TASK_KINDS:
    raise ConfigError(f"{path}.kind={kind!r} is not a task kind{nearest(str(kind), TASK_KINDS)}")
  return _build(TASK_KINDS[kind], raw, path)


def load(path: str, overrides: Sequence[str] = ()) -> Config:
  """Reads a config file with `read_config` and applies overrides such as `--config.train.steps=100`.

  Raises:
    ConfigError: the file or an override cannot be used; see `read_config`, `override` and `resolve`.
  """
  return override(_build(Config, read_config(path).to_dict(), "config"), overrides)


def read_config(path: str) -> ml_collections.ConfigDict:
  """Returns the `ConfigDict` of a config file's `get_config`; a config that extends another one starts from it.

  As with `ml_collections`, the text after a colon becomes the argument of `get_config`: `file.py:argument`.

  Raises:
    ConfigError: the file is missing, is no Python file, fails, or has no `get_config` that returns a `ConfigDict`.
  """
  import ml_collections

  _, ending, argument = path.partition(".py:")
  file = config_file(path)
  if file.is_dir():
    raise ConfigError(f"--config={path} is a directory; name a config file in it, such as {file / 'config.py'}.")
  if not file.is_file():
    siblings = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
    raise ConfigError(f"--config={path}: no such file as {file}{nearest(file.name, siblings)}")
  if file.suffix != ".py":
    raise ConfigError(
      f"--config={path}: a config is a Python file with a function get_config(), and its name ends in .py; 'supermoe "
      "inspect FILES --out config.py' writes one."
    )
  spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise ConfigError(f"{path} has no function get_config().")
    raw = module.get_config(argument) if ending else module.get_config()
  except ConfigError:
    raise
  except Exception as error:  # a user's file may raise anything; the traceback stays attached
    raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
  if not isinstance(raw, ml_collections.ConfigDict):
    raise ConfigError(f"{path}: get_config() must return an ml_collections.ConfigDict, not {type(raw).__name__}.")
  return raw


def config_file(path: str) -> pathlib.Path:
  """Returns the file of `--config`, whose text after a colon is the argument of `get_config`."""
  name, ending, _ = path.partition(".py:")
  return pathlib.Path(name + ".py" if ending else path)


def override(config: Config, overrides: Sequence[str]) -> Config:
  """Returns `config` with `--config.key=value` arguments applied, and checks the result.

  Raises:
    ConfigError: an override names no key, cannot be parsed, or gives an impossible combination.
  """
  if not overrides:
    return resolve(to_dict(config))
  import ml_collections
  from absl import flags
  from ml_collections import config_flags

  full = to_dict(config)
  for argument in overrides:
    key, equals, _ = argument.removeprefix("--config.").partition("=")
    if not equals:
      raise ConfigError(f"{argument}: write overrides as --config.key=value.")
    node: Any = full
    for depth, part in enumerate(key.split(".")):
      if not isinstance(node, Mapping) or part not in node:
        parents = ".".join(["config", *key.split(".")[:depth]])
        raise ConfigError(
          f"{argument}: {parents} has no key '{part}'{nearest(part, node if isinstance(node, Mapping) else ())}"
        )
      node = node[part]
    if node is None:
      raise ConfigError(f"{argument}: {key} is empty in the config file and can only be filled there.")
  overrides = _allow_words(full, overrides)
  values = flags.FlagValues()
  tuples = _map_lists(full, tuple)  # config_flags parses an override by the type of the value that it replaces
  arguments = ["supermoe", *overrides]
  try:
    holder = config_flags.DEFINE_config_dict(
      "config", ml_collections.ConfigDict(tuples), flag_values=values, sys_argv=arguments
    )
    values(arguments)
  except (flags.Error, ValueError, TypeError) as error:
    raise ConfigError(f"{' '.join(overrides)}: {error}") from None
  return resolve(holder.value.to_dict())


def _allow_words(full: dict[str, Any], overrides: Sequence[str]) -> list[str]:
  """Gives `train.steps` the type of its last override, number or word, by which it is parsed; drops earlier ones."""
  key = "--config.train.steps="
  given = [o for o in overrides if o.startswith(key)]
  if not given:
    return list(overrides)
  try:
    full["train"]["steps"] = int(given[-1].removeprefix(key), 0)
  except ValueError:
    full["train"]["steps"] = ""
  return [*(o for o in overrides if not o.startswith(key)), given[-1]]


def _map_lists(value: Any, kind: type) -> Any:
  if isinstance(value, dict):
    return {k: _map_lists(v, kind) for k, v in value.items()}
  return kind(_map_lists(v, kind) for v in value) if isinstance(value, (list, tuple)) else value


def save(config: Config, path: pathlib.Path) -> None:
  """Writes the resolved config as JSON."""
  atomic_files.write_file(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_json(path: pathlib.Path) -> Config:
  """Reads a config that `save` wrote.

  Raises:
    ConfigError: the file is missing, so the directory is not a run.
  """
  if not path.is_file():
    raise ConfigError(
      f"{path.parent} is not a run directory: it holds no {path.name}. "
      f"Run 'supermoe train --config … --workdir {path.parent}' first."
    )
  raw = json.loads(path.read_text())
  # Version 0.1.0 had no others, and did not name them.
  raw["model"].setdefault("time_unit", "hours")
  raw["model"].setdefault("aggregates", "token")
  raw["train"]["tables"].setdefault("prior_updates", 0.0)
  for task in raw["tasks"].values():
    if task["kind"] == NextEvent.kind:
      task.setdefault("ties", "order")
  # Settings of methods that version 0.1.0 had.
  for key in ("window", "temperature", "decay", "mu", "warmup_steps", "references"):
    raw["train"]["weighting"].pop(key, None)
  return resolve(raw)


def resolve_prepared(raw: Mapping[str, Any]) -> Config:
  """Resolves the config in a dataset's manifest; of the model and its training, which change no dataset, the defaults.

  So a dataset of an earlier version is read whatever models that version had.
  """
  return resolve({k: v for k, v in raw.items() if k not in ("model", "train", "seesaw")})
