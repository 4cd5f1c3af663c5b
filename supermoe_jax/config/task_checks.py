"""Rejects tasks, weightings and studies that can never work, before any file is read."""

from __future__ import annotations

import fnmatch

from supermoe_jax.config.kind_checks import check_kind, require
from supermoe_jax.config.schema import Config, Seesaw
from supermoe_jax.config.tasks import LabelledTask
from supermoe_jax.config.tasks.condition import parse_sample_space
from supermoe_jax.errors import nearest


def check_tasks(config: Config) -> None:
  """Raises ConfigError for a task, active or not, that can never work."""
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
    check_kind(task, path, config)
  for name, labelled in config.labelled_tasks.items():
    _check_sample_space(f"config.tasks.{name}", name, labelled, config)


def _check_sample_space(path: str, name: str, task: LabelledTask, config: Config) -> None:
  require(
    task.in_space_weight > 0 and task.out_space_weight >= 0,
    f"{path}: in_space_weight={task.in_space_weight} must be positive, out_space_weight={task.out_space_weight} not "
    "negative.",
  )
  if not task.sample_space:
    return
  space = parse_sample_space(task.sample_space, f"{path}.sample_space")
  assert space is not None
  others = [n for n, t in config.labelled_tasks.items() if n != name]
  require(
    space.task in others,
    f"{path}.sample_space: {space.task!r} is not another task with labels{nearest(space.task, others)}",
  )
  other = config.labelled_tasks[space.task]
  require(
    other.answer in ("binary", "multiclass", "regression"),
    f"{path}.sample_space: task {space.task} has no single label to compare; name a binary one.",
  )
  require(
    task.about_events == other.about_events and task.answer != "catalogue",
    f"{path}.sample_space: {name} and {space.task} ask at different samples (events, or snapshots).",
  )
  require(
    task.asks_at_rows == other.asks_at_rows,
    f"{path}.sample_space: a dated label is known at the times of its own rows, where no other kind of task has a "
    f"label, so {name} and {space.task} never have a label at one snapshot; remove it.",
  )


def check_weighting(config: Config) -> None:
  """Raises ConfigError for a weighting of the losses, or a conditioning of the heads, that can never work."""
  weighting, model, train = config.train.weighting, config.model, config.train
  path = "config.train.weighting"
  tasks = config.active_tasks
  if weighting.method not in ("static", "seesaw"):
    for name, task in tasks.items():
      require(
        task.weight == 1.0,
        f"config.tasks.{name}.weight has no effect with {path}.method={weighting.method!r}; remove it.",
      )
  for key in ("learning_rate", "c"):
    require(getattr(weighting, key) > 0, f"{path}.{key}={getattr(weighting, key)} must be positive.")
  require(weighting.labels_exponent >= 0, f"{path}.labels_exponent={weighting.labels_exponent} must not be negative.")
  require(0 < weighting.gradient_decay < 1, f"{path}.gradient_decay={weighting.gradient_decay} must be in (0, 1).")
  require(
    weighting.method != "seesaw" or train.norm == "rate",
    f"{path}.method='seesaw' needs config.train.norm='rate', by which it knows the gradient of a batch; "
    f"norm={train.norm!r} divides otherwise.",
  )
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


def check_user_folds(config: Config) -> None:
  """Raises ConfigError for folds of users that the dataset cannot give."""
  train, path = config.train, "config.train.user_folds"
  if not train.user_folds:
    require(train.user_fold == 0, f"config.train.user_fold={train.user_fold} needs {path}: name the number of folds.")
    return
  require(
    train.user_folds >= 2, f"{path}={train.user_folds} must be at least 2, or 0 for the dataset's own test users."
  )
  require(
    0 <= train.user_fold < train.user_folds,
    f"config.train.user_fold={train.user_fold} must lie in [0, {train.user_folds}), which {path} allows.",
  )
  require(
    can_fold_users(config),
    f"{path}={train.user_folds} needs a split of another mode than 'user', which fits vocabularies on its training "
    "users, and no task of kind 'dated_label', whose snapshots hold no user labels; set it to 0.",
  )


def can_fold_users(config: Config) -> bool:
  """Returns whether runs of this data can deal the users of user labels anew without another preparation."""
  return config.data.split.mode != "user" and not any(t.asks_at_rows for t in config.labelled_tasks.values())


def check_study(study: Seesaw) -> None:
  """Raises ConfigError for a `supermoe seesaw` study that can never work.

  The variants are checked when their configs are made.
  """
  path = "config.seesaw"
  require(len(study.seeds) >= 2, f"{path}.seeds={study.seeds}: an interval needs at least two seeds.")
  require(len(set(study.seeds)) == len(study.seeds), f"{path}.seeds={study.seeds} names a seed twice.")
  require(
    bool(study.rates) and min(study.rates) > 0 and len(set(study.rates)) == len(study.rates),
    f"{path}.rates={study.rates}: name at least one factor of the learning rates, each positive and named once.",
  )
  require(
    study.user_folds == 0 or study.user_folds >= 2,
    f"{path}.user_folds={study.user_folds} must be at least 2, or 0 for the dataset's own test users.",
  )
  require(
    not study.null or "null" not in study.variants,
    f"{path}.variants.null: the config trained again with other seeds has this name; choose another one, or set "
    "null=False.",
  )
  require(study.static_candidates > 0, f"{path}.static_candidates={study.static_candidates} must be positive.")
  require(study.static_spread > 1, f"{path}.static_spread={study.static_spread} must be more than 1.")
  require(
    not study.tuned or not study.variants or study.tuned in study.variants,
    f"{path}.tuned={study.tuned!r} is not a variant; name the one whose static weights are tuned, or '' for none"
    f"{nearest(study.tuned, study.variants)}",
  )
