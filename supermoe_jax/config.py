"""Configuration: `ml_collections` files resolved into frozen dataclasses.

A config file defines `get_config() -> ml_collections.ConfigDict`. Only the keys that differ from the defaults below
need to stand in it. Everything is checked before any work begins; an unknown key is an error that names the nearest
valid one.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import fnmatch
import hashlib
import importlib.util
import json
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import ml_collections
from absl import flags
from ml_collections import config_flags

MICROSECONDS_PER_DAY = 86_400_000_000


class ConfigError(ValueError):
  """A configuration that cannot be used; the message names the key and the remedy."""


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns a hint such as `; did you mean 'steps'?` followed by nothing, or the list of valid names."""
  valid = sorted(str(v) for v in valid)
  close = difflib.get_close_matches(name, valid, n=1)
  if close:
    return f"; did you mean '{close[0]}'?"
  return f"; valid: {', '.join(valid)}" if valid else ""


# --------------------------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class ItemTable:
  """A table joined to the events of a source by `key`, such as product attributes."""

  file: str = ""
  key: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
  """One kind of event: files of one layout. The name of the source is the event's type."""

  files: tuple[str, ...] = ()  # paths or globs
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic"] = "auto"  # auto: by the file's ending
  user: str = "user_id"
  time: str = "timestamp"
  time_unit: Literal["auto", "s", "ms", "us"] = "auto"  # of numeric times; auto: seconds, checked for plausibility
  time_format: str = ""  # strptime format of textual times; empty: ISO 8601, without an offset read as UTC
  items: ItemTable | None = None


@dataclasses.dataclass(frozen=True)
class Field:
  """A value carried by events: the model's vocabulary of what happened."""

  kind: Literal["vocabulary", "hash", "numeric"] = "vocabulary"
  column: str = ""  # empty: the field's own name
  sources: tuple[str, ...] = ()  # empty: every source; elsewhere the field is absent, which is not out-of-vocabulary
  size: int = 100_000  # vocabulary: most values kept, by count in the training period; hash: buckets
  min_count: int = 1  # vocabulary: rarer values become out-of-vocabulary
  encoding: Literal["log1p", "standardise"] = "standardise"  # numeric: log1p is sign(x)·log(1+|x|), then standardised


@dataclasses.dataclass(frozen=True)
class UserTable:
  """Columns known of some users, such as demographics; the source of user labels."""

  files: tuple[str, ...] = ()
  format: Literal["auto", "parquet", "csv", "jsonl", "atomic"] = "auto"
  user: str = "user_id"


@dataclasses.dataclass(frozen=True)
class Split:
  """How time and users are divided into training, validation and test.

  `temporal`: snapshots at fixed times; the training period ends at `train_end`, and no training label window reaches
  past it. `leave_one_out`: the last event of each user is the test target, the last but one validation.
  """

  mode: Literal["temporal", "leave_one_out"] = "temporal"
  train_start: str = ""  # first training snapshot; empty: one `every_days` after the first event
  train_end: str = ""
  every_days: float = 7.0  # distance of training snapshots, counted back from train_end
  validation: tuple[str, ...] = ()
  test: tuple[str, ...] = ()
  log_end: str = ""  # the log is complete up to here; empty: the time of the last event
  min_events: int = 1  # a snapshot with fewer events before it is left out, and counted
  user_validation: float = 0.1  # share of users (by hash) whose user labels are held out for validation
  user_test: float = 0.2  # and for test


@dataclasses.dataclass(frozen=True)
class Aggregates:
  """Point-in-time counts given to every query token (`method.md` §7 style inputs); strictly before the snapshot."""

  enabled: bool = True
  windows_days: tuple[float, ...] = (1.0, 7.0, 28.0, 90.0)  # and always: the whole history
  top_values: int = 0  # most frequent values counted of each field in `fields`
  fields: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Data:
  """The event log and where its prepared form goes."""

  path: str = ""  # dataset directory
  sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
  users: UserTable | None = None
  split: Split = Split()
  aggregates: Aggregates = Aggregates()
  on_bad_rows: Literal["error", "drop"] = "error"  # rows without user or time, or with an unparsable value
  duplicates: Literal["keep", "drop"] = "keep"  # rows equal in user, time, source and every field
  memory: str = "2GB"  # DuckDB's budget; beyond it sorting spills to disk


# -------------------------------------------------------------------------------------------------------------- tasks


@dataclasses.dataclass(frozen=True)
class NextEvent:
  """The value of `field` in the next event that has one: softmax over its vocabulary, ranked in full."""

  kind: ClassVar[str] = "next_event"
  field: str = ""
  exclude_seen: bool = False  # evaluation: values already in the user's history cannot be recommended
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class FutureEvent:
  """Whether any event of `source` happens in [τ, τ + horizon_days); `negate` for "nothing happens" (churn)."""

  kind: ClassVar[str] = "future_event"
  source: str = ""
  horizon_days: float = 28.0
  negate: bool = False
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class FutureValues:
  """Which of the `top` most frequent values of `field` occur in [τ, τ + horizon_days): one binary label each."""

  kind: ClassVar[str] = "future_values"
  field: str = ""
  top: int = 50
  horizon_days: float = 28.0
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class UserLabel:
  """Whether the user table's `column` holds one of `positive`; users without a value have no label."""

  kind: ClassVar[str] = "user_label"
  column: str = ""
  positive: tuple[str, ...] = ()
  weight: float = 1.0


Task = NextEvent | FutureEvent | FutureValues | UserLabel
TASK_KINDS: dict[str, type] = {t.kind: t for t in (NextEvent, FutureEvent, FutureValues, UserLabel)}


# ----------------------------------------------------------------------------------------------------- model, training


@dataclasses.dataclass(frozen=True)
class Model:
  """Sizes of the encoder. L is `max_events`, D `d_model`, E `experts`, K `experts_per_token`."""

  d_model: int = 64
  layers: int = 2
  heads: int = 4
  d_hidden: int = 256  # of the dense blocks' MLP
  moe_every: int = 2  # every n-th block holds experts instead of an MLP; 0: none
  experts: int = 8
  experts_per_token: int = 2
  d_expert: int = 128
  capacity_factor: float = 1.25  # training only; evaluation and export never drop
  max_events: int = 256
  dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each mesh axis; 1×1×1 is one device."""

  data: int = 1
  expert: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Train:
  """Optimisation."""

  seed: int = 0
  steps: int = 1000
  batch_rows: int = 32
  snapshots_per_row: int = 8
  learning_rate: float = 1e-3
  warmup_steps: int = 50
  final_learning_rate: float = 0.02  # share of the peak that the cosine schedule ends on
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  balance_weight: float = 0.01
  z_weight: float = 1e-3
  checkpoint_every: int = 200
  checkpoints_kept: int = 2
  log_every: int = 20
  mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Evaluation and embedding."""

  batch_rows: int = 64
  cutoffs: tuple[int, ...] = (5, 10)  # k of HR@k and NDCG@k
  catalogue_chunk: int = 8192  # values scored at a time in full ranking


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  data: Data = Data()
  tasks: Mapping[str, Task] = dataclasses.field(default_factory=dict)
  exclude_tasks: tuple[str, ...] = ()  # names or globs of tasks that this run neither trains nor evaluates
  model: Model = Model()
  train: Train = Train()
  evaluate: Evaluate = Evaluate()

  @property
  def active_tasks(self) -> dict[str, Task]:
    """The tasks of this run, by name."""
    return {n: t for n, t in self.tasks.items() if not any(fnmatch.fnmatchcase(n, p) for p in self.exclude_tasks)}

  def data_identity(self) -> dict[str, Any]:
    """What preparation depends on: the data section (but for its path and memory) and all tasks' labels."""
    whole = to_dict(self)
    data = {k: v for k, v in whole["data"].items() if k not in ("path", "memory")}
    not_labels = ("weight", "exclude_seen")
    tasks = {n: {k: v for k, v in t.items() if k not in not_labels} for n, t in whole["tasks"].items()}
    return {"data": data, "tasks": tasks}

  def data_hash(self) -> str:
    """Identifies a preparation."""
    return _digest(self.data_identity())

  def hash(self) -> str:
    """Identifies the whole configuration."""
    return _digest(to_dict(self))


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------ resolving


def to_dict(value: Any) -> Any:
  """Turns resolved dataclasses into plain dicts, lists and scalars, ready for JSON."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    out = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"kind": value.kind, **out} if type(value) in TASK_KINDS.values() else out  # type: ignore[attr-defined]
  if isinstance(value, Mapping):
    return {k: to_dict(v) for k, v in value.items()}
  if isinstance(value, (tuple, list)):
    return [to_dict(v) for v in value]
  return value


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
  """Lists where two nested mappings differ, as `config.key: old → new`."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    keys = sorted(old.keys() | new.keys())
    return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}")]
  return [] if old == new else [f"{path}: {old!r} → {new!r}"]


def resolve(raw: Mapping[str, Any]) -> Config:
  """Turns a nested mapping into a checked `Config`.

  Raises:
    ConfigError: an unknown key, a value of the wrong type, or an impossible combination.
  """
  config = _build(Config, raw, "config")
  _check(config)
  return config


def _build(kind: Any, raw: Any, path: str) -> Any:
  origin = typing.get_origin(kind)
  if kind == Task:
    return _build_task(raw, path)
  if origin in (typing.Union, types.UnionType):  # Optional[X]
    inner = next(a for a in typing.get_args(kind) if a is not type(None))
    return None if raw is None else _build(inner, raw, path)
  if dataclasses.is_dataclass(kind):
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
    if raw not in typing.get_args(kind):
      raise ConfigError(f"{path}={raw!r} is not a choice{nearest(str(raw), typing.get_args(kind))}")
    return raw
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


def parse_time(text: str, path: str) -> int:
  """Returns microseconds since 1970-01-01 UTC of an ISO 8601 time; without an offset it is read as UTC."""
  try:
    moment = datetime.datetime.fromisoformat(text)
  except ValueError:
    raise ConfigError(f"{path}={text!r} is not a time; write it as 2017-10-01 or 2017-10-01T12:00:00.") from None
  if moment.tzinfo is None:
    moment = moment.replace(tzinfo=datetime.timezone.utc)
  epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
  return (moment - epoch) // datetime.timedelta(microseconds=1)


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def _check(config: Config) -> None:
  """Rejects combinations that can never work, before any file is read."""
  _check_data(config.data)
  _check_tasks(config)
  _check_sizes(config)


def _check_data(data: Data) -> None:
  _require(bool(data.path), "config.data.path is empty: name the directory that the prepared dataset is written to.")
  _require(bool(data.sources), "config.data.sources is empty: name at least one source of events.")
  _require(bool(data.fields), "config.data.fields is empty: name at least one field of the events.")
  for name, source in data.sources.items():
    _require(bool(source.files), f"config.data.sources.{name}.files is empty: name at least one file.")
    if source.items is not None:
      _require(bool(source.items.file and source.items.key), f"config.data.sources.{name}.items needs both file and key.")
  for name, field in data.fields.items():
    for source in field.sources:
      _require(
        source in data.sources,
        f"config.data.fields.{name}.sources: no source named {source!r}{nearest(source, data.sources)}",
      )
    _require(field.size > 0, f"config.data.fields.{name}.size={field.size} must be positive.")
  if data.users is not None:
    _require(bool(data.users.files), "config.data.users.files is empty: name the user table's file.")
  for name in data.aggregates.fields:
    _require(
      name in data.fields and data.fields[name].kind == "vocabulary",
      f"config.data.aggregates.fields: {name!r} is not a vocabulary field"
      f"{nearest(name, [n for n, f in data.fields.items() if f.kind == 'vocabulary'])}",
    )
  _check_split(data.split)


def _check_split(split: Split) -> None:
  shares = split.user_validation + split.user_test
  _require(0 <= split.user_validation and 0 <= split.user_test and shares < 1, "config.data.split: user_validation + user_test must be in [0, 1).")
  _require(split.min_events >= 1, f"config.data.split.min_events={split.min_events} must be at least 1: nothing is known of a user without events.")
  if split.mode == "leave_one_out":
    for key in ("train_start", "train_end", "validation", "test"):
      _require(not getattr(split, key), f"config.data.split.{key} has no meaning with mode='leave_one_out'; remove it.")
    return
  _require(bool(split.train_end), "config.data.split.train_end is empty: a temporal split needs the end of the training period.")
  _require(split.every_days > 0, f"config.data.split.every_days={split.every_days} must be positive.")
  train_end = parse_time(split.train_end, "config.data.split.train_end")
  if split.train_start:
    start = parse_time(split.train_start, "config.data.split.train_start")
    _require(start < train_end, f"config.data.split.train_start={split.train_start} is not before train_end={split.train_end}.")
  latest = train_end
  for key in ("validation", "test"):
    times = [parse_time(t, f"config.data.split.{key}") for t in getattr(split, key)]
    _require(bool(times), f"config.data.split.{key} is empty: name at least one snapshot time.")
    for text, time in zip(getattr(split, key), times):
      _require(time >= latest, f"config.data.split.{key}: {text} lies before the end of the period that precedes it.")
    latest = max(times)


def _check_tasks(config: Config) -> None:
  _require(bool(config.tasks), "config.tasks is empty: name at least one task.")
  for pattern in config.exclude_tasks:
    _require(
      any(fnmatch.fnmatchcase(n, pattern) for n in config.tasks),
      f"config.exclude_tasks: {pattern!r} matches no task{nearest(pattern, config.tasks)}",
    )
  _require(bool(config.active_tasks), "config.exclude_tasks leaves no task to train on.")
  data = config.data
  vocabularies = [n for n, f in data.fields.items() if f.kind == "vocabulary"]
  for name, task in config.tasks.items():
    path = f"config.tasks.{name}"
    _require(name.isidentifier(), f"{path}: a task's name must be a Python identifier.")
    _require(task.weight > 0, f"{path}.weight={task.weight} must be positive; use config.exclude_tasks to leave a task out.")
    if isinstance(task, (NextEvent, FutureValues)):
      _require(task.field in vocabularies, f"{path}.field={task.field!r} is not a vocabulary field{nearest(task.field, vocabularies)}")
    if isinstance(task, (FutureEvent, FutureValues)):
      _require(task.horizon_days > 0, f"{path}.horizon_days={task.horizon_days} must be positive.")
      _require(data.split.mode == "temporal", f"{path}: a task about the future needs config.data.split.mode='temporal'; leave_one_out has no calendar.")
    if isinstance(task, FutureEvent):
      _require(task.source in data.sources, f"{path}.source={task.source!r} is not a source{nearest(task.source, data.sources)}")
    if isinstance(task, FutureValues):
      _require(task.top > 0, f"{path}.top={task.top} must be positive.")
    if isinstance(task, UserLabel):
      _require(data.users is not None, f"{path}: a user label needs config.data.users.")
      _require(bool(task.column), f"{path}.column is empty: name the user table's column.")
      _require(bool(task.positive), f"{path}.positive is empty: name the values that count as positive.")


def _check_sizes(config: Config) -> None:
  model, train, evaluate = config.model, config.train, config.evaluate
  positive = {
    "model": (model, ("d_model", "layers", "heads", "d_hidden", "experts", "experts_per_token", "d_expert", "max_events", "capacity_factor")),
    "train": (train, ("steps", "batch_rows", "snapshots_per_row", "learning_rate", "clip_norm", "checkpoint_every", "checkpoints_kept", "log_every")),
    "train.mesh": (train.mesh, ("data", "expert", "tensor")),
    "evaluate": (evaluate, ("batch_rows", "catalogue_chunk")),
  }
  for section, (values, names) in positive.items():
    for name in names:
      _require(getattr(values, name) > 0, f"config.{section}.{name}={getattr(values, name)} must be positive.")
  _require(model.d_model % (2 * model.heads) == 0, f"config.model.d_model={model.d_model} must be a multiple of 2 × heads={2 * model.heads} (rotary positions).")
  _require(model.experts_per_token <= model.experts, f"config.model.experts_per_token={model.experts_per_token} exceeds experts={model.experts}.")
  _require(model.moe_every >= 0, f"config.model.moe_every={model.moe_every} must not be negative.")
  _require(model.moe_every <= model.layers, f"config.model.moe_every={model.moe_every} exceeds layers={model.layers}: no block would hold experts; write 0 to mean that.")
  _require(0 <= model.dropout < 1, f"config.model.dropout={model.dropout} must be in [0, 1).")
  _require(train.warmup_steps < train.steps, f"config.train.warmup_steps={train.warmup_steps} must be less than steps={train.steps}.")
  _require(train.batch_rows % train.mesh.data == 0, f"config.train.batch_rows={train.batch_rows} must be a multiple of mesh.data={train.mesh.data}.")
  _require(evaluate.batch_rows % train.mesh.data == 0, f"config.evaluate.batch_rows={evaluate.batch_rows} must be a multiple of train.mesh.data={train.mesh.data}.")


# -------------------------------------------------------------------------------------------------------------- loading


def load(path: str, overrides: Sequence[str] = ()) -> Config:
  """Reads a config file and applies overrides such as `--config.train.steps=100`.

  Raises:
    ConfigError: the file is missing or has no `get_config`, or what it returns cannot be used.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    siblings = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
    raise ConfigError(f"--config={path}: no such file{nearest(file.name, siblings)}")
  spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise ConfigError(f"{path} has no function get_config().")
    raw = module.get_config()
  except ConfigError:
    raise
  except Exception as error:  # whatever a user's file may raise; the traceback stays attached
    raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
  if not isinstance(raw, ml_collections.ConfigDict):
    raise ConfigError(f"{path}: get_config() must return an ml_collections.ConfigDict, not {type(raw).__name__}.")
  return override(_build(Config, raw.to_dict(), "config"), overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
  """Returns `config` with `--config.key=value` arguments applied and checked."""
  if not overrides:
    return resolve(to_dict(config))
  full = to_dict(config)
  for argument in overrides:
    key, equals, _ = argument.removeprefix("--config.").partition("=")
    if not equals:
      raise ConfigError(f"{argument}: write overrides as --config.key=value.")
    node: Any = full
    for depth, part in enumerate(key.split(".")):
      if not isinstance(node, Mapping) or part not in node:
        parents = ".".join(["config", *key.split(".")[:depth]])
        raise ConfigError(f"{argument}: {parents} has no key '{part}'{nearest(part, node if isinstance(node, Mapping) else ())}")
      node = node[part]
    if node is None:
      raise ConfigError(f"{argument}: {key} is empty in the config file and can only be filled there.")
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


def _map_lists(value: Any, kind: type) -> Any:
  if isinstance(value, dict):
    return {k: _map_lists(v, kind) for k, v in value.items()}
  return kind(_map_lists(v, kind) for v in value) if isinstance(value, (list, tuple)) else value


def save(config: Config, path: pathlib.Path) -> None:
  """Writes the resolved config as JSON."""
  path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load_json(path: pathlib.Path) -> Config:
  """Reads a config that `save` wrote.

  Raises:
    ConfigError: the file is missing: the directory is not a run.
  """
  if not path.is_file():
    raise ConfigError(f"{path.parent} is not a run directory: it holds no {path.name}. Run 'supermoe train --config … --workdir {path.parent}' first.")
  return resolve(json.loads(path.read_text()))
