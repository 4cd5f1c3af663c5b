"""Tasks, weightings and studies that can never work, rejected before any file is read."""

from __future__ import annotations

import fnmatch

from supermoe_jax.config.schema import Config, Data, Seesaw
from supermoe_jax.config.tasks import (
  Contrast,
  EventLabel,
  FutureEvent,
  FutureValues,
  LabelledTask,
  NextEvent,
  UserLabel,
  answer,
  parse_sample_space,
)
from supermoe_jax.errors import ConfigError, nearest


def require(condition: bool, message: str) -> None:
  """Raises ConfigError with the message unless the condition holds."""
  if not condition:
    raise ConfigError(message)


def check_tasks(config: Config) -> None:
  """Checks every task, active or not."""
  require(bool(config.tasks), "config.tasks is empty: name at least one task.")
  for pattern in config.exclude_tasks:
    require(
      any(fnmatch.fnmatchcase(n, pattern) for n in config.tasks),
      f"config.exclude_tasks: {pattern!r} matches no task{nearest(pattern, config.tasks)}",
    )
  require(bool(config.active_tasks), "config.exclude_tasks leaves no task to train on.")
  for name, task in config.tasks.items():
    path = f"config.tasks.{name}"
    require(name.isidentifier(), f"{path}: a task's name must be a Python identifier.")
    require(
      task.weight > 0, f"{path}.weight={task.weight} must be positive; use config.exclude_tasks to leave a task out."
    )
    if isinstance(task, Contrast):
      _check_contrast(path, task, config)
      continue
    _check_label(path, task, config.data)
    _check_sample_space(path, name, task, config)


def _check_contrast(path: str, task: Contrast, config: Config) -> None:
  require(
    1 <= task.least_events <= task.slice_events <= config.model.max_events,
    f"{path}: 1 ≤ least_events={task.least_events} ≤ slice_events={task.slice_events} ≤ "
    f"model.max_events={config.model.max_events} must hold.",
  )
  require(task.temperature > 0, f"{path}.temperature={task.temperature} must be positive.")


def _check_label(path: str, task: LabelledTask, data: Data) -> None:
  vocabularies = [n for n, f in data.fields.items() if f.kind == "vocabulary"]
  asked = [task.field] if isinstance(task, (NextEvent, FutureValues, EventLabel)) else []
  for name in [*asked, *(task.given if isinstance(task, EventLabel) else ())]:
    require(
      name not in data.fields or not data.fields[name].many,
      f"{path}: {name!r} holds lists, which are inputs only; a task needs a field of single values.",
    )
  for name in asked:
    require(
      name not in data.fields or data.fields[name].table == "events",
      f"{path}.field={name!r} is of the table of users (config.data.fields.{name}.table), the same at every event; ask "
      "about its column by a task of kind 'user_label'.",
    )
  if isinstance(task, (NextEvent, FutureValues)):
    require(
      task.field in vocabularies,
      f"{path}.field={task.field!r} is not a vocabulary field{nearest(task.field, vocabularies)}",
    )
  if isinstance(task, NextEvent):
    _require_no_buckets(path, task.field, data, "")
    require(data.fields[task.field].input, f"{path}.field={task.field!r} is no input, so it has no embeddings to rank.")
    require(task.negatives > 0, f"{path}.negatives={task.negatives} must be positive.")
  if isinstance(task, EventLabel):
    _check_event_label(path, task, data)
  if isinstance(task, (NextEvent, EventLabel)):
    require(
      data.split.mode != "user" or data.split.snapshots != "end",
      f"{path}: with config.data.split.snapshots='end' and mode='user' no event follows a snapshot, so nothing could "
      "be evaluated; set snapshots='every_events' or 'calendar', or leave the task out.",
    )
  if isinstance(task, (FutureEvent, FutureValues)):
    require(task.horizon_days > 0, f"{path}.horizon_days={task.horizon_days} must be positive.")
    require(
      data.split.mode != "leave_one_out",
      f"{path}: a task about the future needs config.data.split.mode='temporal' or 'user'; leave_one_out has no "
      "calendar.",
    )
    require(
      data.split.snapshots != "end",
      f"{path}: with config.data.split.snapshots='end' nothing follows a training snapshot, so that every answer about "
      "the future would be the same; set snapshots='every_events' or 'calendar', or leave the task out.",
    )
  if isinstance(task, FutureEvent):
    require(
      task.source in data.sources,
      f"{path}.source={task.source!r} is not a source{nearest(task.source, data.sources)}",
    )
  if isinstance(task, FutureValues):
    _require_no_buckets(path, task.field, data, " with input=False")
    require(task.top > 0, f"{path}.top={task.top} must be positive.")
  if isinstance(task, UserLabel):
    require(data.users is not None, f"{path}: a user label needs config.data.users.")
    require(bool(task.column), f"{path}.column is empty: name the user table's column.")
    for name, field in data.fields.items():
      require(
        field.table == "events" or not field.input or (field.column or name) != task.column,
        f"{path}.column={task.column!r} is also the column of the input config.data.fields.{name}, which would tell "
        f"the label; leave one of the two out, or set config.data.fields.{name}.input=False.",
      )
    require(
      bool(task.positive) or task.type != "binary",
      f"{path}.positive is empty: name the values that count as positive, or set type='multiclass' or 'regression'.",
    )
    require(
      not task.positive or task.type == "binary", f"{path}.positive has no meaning with type={task.type!r}; remove it."
    )


def _require_no_buckets(path: str, field: str, data: Data, settings: str) -> None:
  """A task asks for values, and a bucket is none; `settings` are those of a field that could be asked about instead."""
  require(
    not data.fields[field].buckets,
    f"{path}.field={field!r}: with config.data.fields.{field}.buckets={data.fields[field].buckets} values share codes, "
    f"so that a task cannot tell them apart; name a second field of the same column{settings} without buckets, such as "
    f"{field}_asked=dict(column={data.fields[field].column or field!r}{', input=False' if settings else ''}).",
  )


def _check_event_label(path: str, task: EventLabel, data: Data) -> None:
  require(task.field in data.fields, f"{path}.field={task.field!r} is not a field{nearest(task.field, data.fields)}")
  kind = data.fields[task.field].kind
  if task.positive:
    require(kind == "vocabulary", f"{path}.positive needs a vocabulary field; {task.field!r} is {kind}.")
    require(task.at_least is None, f"{path}: positive and at_least exclude each other; keep one.")
    _require_no_buckets(path, task.field, data, " with input=False")
  else:
    require(kind == "numeric", f"{path}: name the values of {task.field!r} that are positive; it is a {kind} field.")
  for name in task.given:
    require(name in data.fields, f"{path}.given: {name!r} is not a field{nearest(name, data.fields)}")
    require(data.fields[name].kind != "numeric", f"{path}.given: {name!r} is numeric; only categorical fields can be.")
    require(data.fields[name].input, f"{path}.given: {name!r} is no input, so it has no embeddings.")
    require(name != task.field, f"{path}.given holds {name!r}, the field that is asked for.")
  require(task.per_snapshot > 0, f"{path}.per_snapshot={task.per_snapshot} must be positive.")


def _check_sample_space(path: str, name: str, task: LabelledTask, config: Config) -> None:
  require(
    task.in_space_weight > 0 and task.out_space_weight >= 0,
    f"{path}: in_space_weight={task.in_space_weight} must be positive, out_space_weight={task.out_space_weight} not "
    "negative.",
  )
  if not task.sample_space:
    return
  space = parse_sample_space(task.sample_space)
  require(space is not None, f"{path}.sample_space={task.sample_space!r} cannot be read; write it as in 'click == 1'.")
  assert space is not None
  others = [n for n, t in config.labelled_tasks.items() if n != name]
  require(
    space.task in others,
    f"{path}.sample_space: {space.task!r} is not another task with labels{nearest(space.task, others)}",
  )
  other = config.labelled_tasks[space.task]
  require(
    answer(other) in ("binary", "multiclass", "regression"),
    f"{path}.sample_space: task {space.task} has no single label to compare; name a binary one.",
  )
  require(
    isinstance(task, EventLabel) == isinstance(other, EventLabel) and not isinstance(task, NextEvent),
    f"{path}.sample_space: {name} and {space.task} ask at different samples (events, or snapshots).",
  )


def check_weighting(config: Config) -> None:
  """Checks how the losses are weighed, and what the heads see."""
  weighting, model, train = config.train.weighting, config.model, config.train
  path = "config.train.weighting"
  tasks = config.active_tasks
  if weighting.method not in ("static", "seesaw"):
    for name, task in tasks.items():
      require(
        task.weight == 1.0,
        f"config.tasks.{name}.weight has no effect with {path}.method={weighting.method!r}; remove it.",
      )
  for name in weighting.references:
    require(name in config.tasks, f"{path}.references: {name!r} is not a task{nearest(name, config.tasks)}")
    require(weighting.references[name] > 0, f"{path}.references.{name} must be positive.")
  for key in ("learning_rate", "window", "temperature", "mu", "c", "warmup_steps"):
    require(getattr(weighting, key) > 0, f"{path}.{key}={getattr(weighting, key)} must be positive.")
  require(0 < weighting.decay < 1, f"{path}.decay={weighting.decay} must be in (0, 1).")
  if weighting.method in ("pcgrad", "cagrad"):
    require(
      model.conditioning in ("none", "mmoe", "ple"),
      f"{path}.method={weighting.method!r} needs one representation that all tasks read; with "
      f"config.model.conditioning={model.conditioning!r} each has its own.",
    )
  if model.encoder == "gru":
    require(
      model.conditioning in ("none", "mmoe", "ple"),
      f"config.model.conditioning={model.conditioning!r} needs encoder='transformer'.",
    )
  if model.conditioning == "gate":
    require(model.moe_every > 0, "config.model.conditioning='gate' needs experts: set model.moe_every.")
  require(
    model.task_ids == "true" or model.conditioning == "token",
    "config.model.task_ids='shuffled' has no meaning without conditioning='token'.",
  )
  require(train.task_information >= 0, f"config.train.task_information={train.task_information} must not be negative.")
  require(
    not train.task_information or (model.conditioning == "token" and model.moe_every > 0),
    "config.train.task_information needs conditioning='token' and experts: no router sees a task otherwise.",
  )
  for key in ("view_experts", "task_experts", "view_hidden", "ple_levels"):
    require(getattr(model, key) > 0, f"config.model.{key}={getattr(model, key)} must be positive.")


def check_study(study: Seesaw) -> None:
  """Checks what `supermoe seesaw` is asked to run; each variant is checked when its config is made."""
  path = "config.seesaw"
  require(len(study.seeds) >= 2, f"{path}.seeds={study.seeds}: an interval needs at least two seeds.")
  require(len(set(study.seeds)) == len(study.seeds), f"{path}.seeds={study.seeds} names a seed twice.")
  require(study.static_candidates > 0, f"{path}.static_candidates={study.static_candidates} must be positive.")
  require(study.static_spread > 1, f"{path}.static_spread={study.static_spread} must be more than 1.")
  require(
    not study.tuned or not study.variants or study.tuned in study.variants,
    f"{path}.tuned={study.tuned!r} is not a variant; name the one whose static weights are tuned, or '' for none"
    f"{nearest(study.tuned, study.variants)}",
  )
