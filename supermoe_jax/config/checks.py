"""Rejects combinations of settings that can never work, before any file is read."""

from __future__ import annotations

from collections.abc import Mapping

from supermoe_jax.config.aggregate_checks import check_aggregates
from supermoe_jax.config.rounds import round_ends
from supermoe_jax.config.schema import MICROSECONDS_PER_DAY, MOST_ROWS, Config, Data, Field, Split, parse_time
from supermoe_jax.config.task_checks import check_study, check_tasks, check_user_folds, check_weighting
from supermoe_jax.config.task_checks import require as _require
from supermoe_jax.config.text_settings import check_text_format
from supermoe_jax.errors import nearest


def check_config(config: Config) -> None:
  """Raises ConfigError for combinations of settings that can never work; reads no file."""
  _check_data(config.data)
  check_tasks(config)
  _check_sizes(config)
  check_weighting(config)
  check_user_folds(config)
  check_study(config.seesaw)


def _check_data(data: Data) -> None:
  _require(bool(data.path), "config.data.path is empty: name the directory that the prepared dataset is written to.")
  _require(bool(data.sources), "config.data.sources is empty: name at least one source of events.")
  _require(bool(data.fields), "config.data.fields is empty: name at least one field of the events.")
  for name, source in data.sources.items():
    _require(bool(source.files), f"config.data.sources.{name}.files is empty: name at least one file.")
    check_text_format(f"config.data.sources.{name}", source)
    if source.items is not None:
      check_text_format(f"config.data.sources.{name}.items", source.items)
      _require(
        bool(source.items.file and source.items.key), f"config.data.sources.{name}.items needs both file and key."
      )
  for name, field in data.fields.items():
    for wanted in field.sources:
      _require(
        wanted in data.sources,
        f"config.data.fields.{name}.sources: no source named {wanted!r}{nearest(wanted, data.sources)}",
      )
    _require(field.size > 0, f"config.data.fields.{name}.size={field.size} must be positive.")
    _check_field(f"config.data.fields.{name}", field, data.fields)
    _require(
      field.table == "events" or data.users is not None,
      f"config.data.fields.{name}.table='users' needs config.data.users: name the file of the table of users.",
    )
  if data.users is not None:
    _require(bool(data.users.files), "config.data.users.files is empty: name the user table's file.")
    check_text_format("config.data.users", data.users)
  check_aggregates(data)
  _check_split(data.split)


# The most numbers of a vector; a longer list is most likely no vector.
_LONGEST_VECTOR = 1 << 16


def _check_vector(path: str, field: Field) -> None:
  plain = Field(kind="vector")
  _require(
    field.size != plain.size and field.size <= _LONGEST_VECTOR,
    f"{path}.size={field.size}: name the number of numbers in each of the vectors, up to {_LONGEST_VECTOR}, such as "
    "size=384.",
  )
  for key in ("min_count", "buckets", "shares", "encoding", "many", "part", "parts", "half"):
    value = getattr(field, key)
    _require(value == getattr(plain, key), f"{path}.{key}={value!r} has no meaning with kind='vector'; remove it.")
  _require(
    field.input, f"{path}.input=False: vectors are inputs only, so no task can ask about them; remove the field."
  )


def _check_field(path: str, field: Field, fields: Mapping[str, Field]) -> None:
  if field.kind == "vector":
    _check_vector(path, field)
  _require(field.buckets >= 0, f"{path}.buckets={field.buckets} must not be negative.")
  _require(
    not field.buckets or field.kind != "hash",
    f"{path}.buckets={field.buckets} has no meaning with kind='hash', whose buckets are `size`; remove it.",
  )
  _require(
    not field.buckets or field.kind != "numeric",
    f"{path}.buckets={field.buckets} has no meaning for numbers; remove it.",
  )
  _require(
    field.kind == "hash" or (field.part, field.parts, field.half) == (0, 1, "lower"),
    f"{path}: part, parts and half have no meaning with kind={field.kind!r}; remove them.",
  )
  _require(
    0 <= field.part < field.parts, f"{path}.part={field.part} must be at least 0 and less than parts={field.parts}."
  )
  _require(
    0 < field.size + field.buckets <= MOST_ROWS,
    f"{path}.size={field.size} (and buckets={field.buckets}) must lie in [1, {MOST_ROWS}], which a table can have; "
    "spread a larger hash over several fields with supermoe_jax.config.hash_fields.",
  )
  if field.shares:
    _check_shared(path, field, fields)
  _require(field.many >= 0, f"{path}.many={field.many} must not be negative.")
  _require(
    not field.many or field.kind != "numeric", f"{path}.many={field.many} has no meaning for numbers; remove it."
  )
  _require(bool(field.separator), f"{path}.separator is empty: name what stands between the values of a text.")


def _check_shared(path: str, field: Field, fields: Mapping[str, Field]) -> None:
  vocabularies = [n for n, f in fields.items() if f.kind == "vocabulary"]
  _require(
    field.kind == "vocabulary",
    f"{path}.shares={field.shares!r} has no meaning with kind={field.kind!r}; only vocabularies are shared.",
  )
  _require(
    field.shares in vocabularies,
    f"{path}.shares={field.shares!r} is not a vocabulary field{nearest(field.shares, vocabularies)}",
  )
  _require(
    not fields[field.shares].shares,
    f"{path}.shares={field.shares!r} must have a vocabulary of its own, but it shares that of "
    f"{fields[field.shares].shares!r}; name that one.",
  )
  plain = Field()
  for key in ("size", "min_count", "buckets"):
    value = getattr(field, key)
    _require(
      value == getattr(plain, key), f"{path}.{key}={value} has no meaning with shares={field.shares!r}; remove it."
    )


def _check_split(split: Split) -> None:
  shares = split.user_validation + split.user_test
  _require(
    split.user_validation >= 0 and split.user_test >= 0 and shares < 1,
    "config.data.split: user_validation + user_test must be in [0, 1).",
  )
  _require(
    split.min_events >= 1,
    f"config.data.split.min_events={split.min_events} must be at least 1: nothing is known of a user without events.",
  )
  if split.log_end:
    parse_time(split.log_end, "config.data.split.log_end")
  for key in _WITHOUT_MEANING.get(split.mode, ()):
    _require(not getattr(split, key), f"config.data.split.{key} has no meaning with mode={split.mode!r}; remove it.")
  if split.mode == "leave_one_out":
    _require(
      split.snapshots == "calendar",
      f"config.data.split.snapshots={split.snapshots!r} has no meaning with mode='leave_one_out', whose snapshots lie "
      "before each event; remove it.",
    )
    return
  _require(split.every_days > 0, f"config.data.split.every_days={split.every_days} must be positive.")
  _require(split.every_events > 0, f"config.data.split.every_events={split.every_events} must be positive.")
  if split.mode == "user":
    _check_user_split(split)
    return
  _require(
    bool(split.train_end),
    "config.data.split.train_end is empty: a temporal split needs the end of the training period.",
  )
  _require(split.gap_days >= 0, f"config.data.split.gap_days={split.gap_days} must not be negative.")
  gap = int(split.gap_days * MICROSECONDS_PER_DAY)
  train_end = parse_time(split.train_end, "config.data.split.train_end")
  if split.train_start:
    start = parse_time(split.train_start, "config.data.split.train_start")
    _require(
      start < train_end, f"config.data.split.train_start={split.train_start} is not before train_end={split.train_end}."
    )
  latest = train_end
  for key in ("validation", "test"):
    times = [parse_time(t, f"config.data.split.{key}") for t in getattr(split, key)]
    for text, time in zip(getattr(split, key), times):
      _require(time >= latest, f"config.data.split.{key}: {text} lies before the end of the period that precedes it.")
      _require(
        time >= latest + gap,
        f"config.data.split.{key}: {text} lies less than gap_days={split.gap_days:g} after the end of the period that "
        "precedes it; set it later, or lower config.data.split.gap_days.",
      )
    latest = max(times, default=latest)


# For each split mode, the settings that it does not read.
_WITHOUT_MEANING = {
  "leave_one_out": ("train_start", "train_end", "validation", "test", "log_end", "gap_days"),
  "user": ("train_end", "validation", "test", "gap_days"),
}


def _check_user_split(split: Split) -> None:
  for key in ("user_validation", "user_test"):
    _require(
      getattr(split, key) > 0,
      f"config.data.split.{key}={getattr(split, key)} leaves no user for {key.removeprefix('user_')}; with mode='user' "
      "it must be positive.",
    )
  if split.train_start:
    parse_time(split.train_start, "config.data.split.train_start")


def _check_sizes(config: Config) -> None:
  model, train, evaluate = config.model, config.train, config.evaluate
  ways = train.mesh.data * train.mesh.expert  # the mesh axes that shard the rows of a batch
  positive = {
    "model": (
      model,
      (
        "d_model",
        "layers",
        "heads",
        "d_hidden",
        "experts",
        "experts_per_token",
        "d_expert",
        "max_events",
        "capacity_factor",
      ),
    ),
    "train": (
      train,
      (
        "batch_rows",
        "snapshots_per_row",
        "learning_rate",
        "clip_norm",
        "accumulate",
        "steps_per_call",
        "checkpoint_every",
        "checkpoints_kept",
        "log_every",
      ),
    ),
    "train.tables": (train.tables, ("learning_rate", "cells")),
    "train.validate": (train.validate, ("checkpoints_kept",)),
    "train.mesh": (train.mesh, ("data", "expert", "tensor", "slices")),
    "evaluate": (evaluate, ("batch_rows", "catalogue_chunk")),
  }
  for section, (values, names) in positive.items():
    for name in names:
      _require(getattr(values, name) > 0, f"config.{section}.{name}={getattr(values, name)} must be positive.")
  last = round_ends(train.steps)[-1]
  _require(last > 0, f"config.train.steps={train.steps} must be positive.")
  spread = train.accumulate * train.mesh.data * train.mesh.expert
  _require(
    train.accumulate == 1 or (train.batch_rows % spread == 0 and train.norm == "rate"),
    f"config.train.accumulate={train.accumulate} needs norm='rate', by which the losses of parts add up to that of the "
    f"whole, and batch_rows={train.batch_rows} that divide by accumulate × the devices that share a batch ({spread}).",
  )
  for name in ("checkpoint_every", "log_every"):
    _require(
      getattr(train, name) % train.steps_per_call == 0,
      f"config.train.{name}={getattr(train, name)} must be a multiple of steps_per_call={train.steps_per_call}.",
    )
  first = round_ends(train.steps)[0]
  _require(
    first % train.steps_per_call == 0,
    f"config.train.steps={train.steps}"
    + (f" has a first round of {first} steps, which" if train.steps == "auto" else "")
    + f" must be a multiple of steps_per_call={train.steps_per_call}"
    + ("; 1, 5, 25 and 125 divide it." if train.steps == "auto" else "."),
  )
  _check_validation(config)
  for name in ("nonfinite_steps", "hang_seconds"):
    _require(getattr(train, name) >= 0, f"config.train.{name}={getattr(train, name)} must not be negative.")
  for name in ("weight_decay", "prior_updates"):
    _require(
      getattr(train.tables, name) >= 0,
      f"config.train.tables.{name}={getattr(train.tables, name)} must not be negative.",
    )
  _require(
    model.d_model % (2 * model.heads) == 0,
    f"config.model.d_model={model.d_model} must be a multiple of 2 × heads={2 * model.heads} (rotary positions).",
  )
  _require(
    model.experts_per_token <= model.experts,
    f"config.model.experts_per_token={model.experts_per_token} exceeds experts={model.experts}.",
  )
  _require(model.moe_every >= 0, f"config.model.moe_every={model.moe_every} must not be negative.")
  _require(
    model.moe_every <= model.layers,
    f"config.model.moe_every={model.moe_every} exceeds layers={model.layers}: no block would hold experts; "
    "write 0 to mean that.",
  )
  _require(
    not model.moe_every or model.experts % train.mesh.expert == 0,
    f"config.model.experts={model.experts} must be a multiple of train.mesh.expert={train.mesh.expert}.",
  )
  _require(
    not model.moe_every or model.d_expert % train.mesh.tensor == 0,
    f"config.model.d_expert={model.d_expert} must be a multiple of train.mesh.tensor={train.mesh.tensor}.",
  )
  _require(
    train.mesh.data % train.mesh.slices == 0,
    f"config.train.mesh.data={train.mesh.data} must be a multiple of slices={train.mesh.slices}.",
  )
  _require(model.shared_experts >= 0, f"config.model.shared_experts={model.shared_experts} must not be negative.")
  _require(0 <= model.router_jitter < 1, f"config.model.router_jitter={model.router_jitter} must be in [0, 1).")
  _require(train.workers >= 0, f"config.train.workers={train.workers} must not be negative.")
  _require(train.balance_rate >= 0, f"config.train.balance_rate={train.balance_rate} must not be negative.")
  for key in ("dropout", "value_dropout"):
    _require(0 <= getattr(model, key) < 1, f"config.model.{key}={getattr(model, key)} must be in [0, 1).")
  _require(
    train.warmup_steps < first,
    f"config.train.warmup_steps={train.warmup_steps} must be less than steps={train.steps}"
    + ("." if train.steps != "auto" else f", whose first round has {first} steps."),
  )
  _require(
    train.batch_rows % ways == 0,
    f"config.train.batch_rows={train.batch_rows} must be a multiple of mesh.data × mesh.expert={ways}.",
  )
  _require(
    evaluate.batch_rows % ways == 0,
    f"config.evaluate.batch_rows={evaluate.batch_rows} must be a multiple of train.mesh.data × mesh.expert={ways}.",
  )
  _require(
    bool(evaluate.cutoffs) and min(evaluate.cutoffs) > 0,
    f"config.evaluate.cutoffs={evaluate.cutoffs} must name at least one positive k.",
  )


def _check_validation(config: Config) -> None:
  train, validate = config.train, config.train.validate
  for name in ("every", "snapshots", "task_patience"):
    _require(
      getattr(validate, name) >= 0,
      f"config.train.validate.{name}={getattr(validate, name)} must not be negative.",
    )
  _require(
    train.steps != "auto" or config.data.split.has_snapshots("validation"),
    "config.train.steps='auto' stops by validation, but config.data.split.validation is empty; name at least one time "
    "there, or set a number of steps.",
  )
  _require(
    not validate.every or config.data.split.has_snapshots("validation"),
    f"config.train.validate.every={validate.every} needs validation snapshots, but config.data.split.validation is "
    "empty; name at least one time there, or set every=0.",
  )
  _require(
    validate.every % train.checkpoint_every == 0,
    f"config.train.validate.every={validate.every} must be a multiple of config.train.checkpoint_every="
    f"{train.checkpoint_every}: what is validated is a checkpoint.",
  )
  _require(
    not validate.task_patience or bool(validate.every) or train.steps == "auto",
    f"config.train.validate.task_patience={validate.task_patience} stops tasks by validation, but "
    "config.train.validate.every is 0: set the number of steps between validations.",
  )
  if validate.metric:
    task, _, metric = validate.metric.partition("/")
    _require(
      train.steps != "auto" or task in config.active_views or task not in config.labelled_tasks,
      f"config.train.validate.metric={validate.metric!r} says when training stops, but config.exclude_tasks leaves the "
      "task out; name a metric of another task.",
    )
    _require(
      task in config.labelled_tasks and bool(metric),
      f"config.train.validate.metric={validate.metric!r} must be task/metric, of a task with labels"
      f"{nearest(task, config.labelled_tasks)}",
    )
