"""Rejects settings of each kind of task that can never work, before any file is read."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

from supermoe_jax.config.schema import MICROSECONDS_PER_DAY
from supermoe_jax.config.tasks.condition import Comparison, comparisons, parse_condition
from supermoe_jax.config.tasks.kinds import (
  Contrast,
  DatedLabel,
  EventLabel,
  FutureAmount,
  FutureEvent,
  FutureValues,
  NextEvent,
  TimeToEvent,
  UserLabel,
)
from supermoe_jax.config.tasks.task import Task
from supermoe_jax.config.text_settings import check_text_format
from supermoe_jax.errors import ConfigError, nearest

if TYPE_CHECKING:
  from supermoe_jax.config.schema import Config, Data


MEMORIES = ("repeat", "recent", "follow")  # kinds of `NextEvent.memory`, see `layers.memory`
AGGREGATES = "config.data.aggregates"  # the key of the settings that hold conditions too


@functools.singledispatch
def check_kind(task: Task, path: str, config: Config) -> None:
  """Raises ConfigError, with the key `path` in its message, for settings of a task that can never work.

  A kind without a registered check has nothing to check.
  """


@check_kind.register(NextEvent)
def _(task: NextEvent, path: str, config: Config) -> None:
  data = config.data
  require_vocabulary_field(path, task.field, data)
  require_no_buckets(path, task.field, data)
  require(data.fields[task.field].input, f"{path}.field={task.field!r} is no input, so it has no embeddings to rank.")
  require(task.negatives > 0, f"{path}.negatives={task.negatives} must be positive.")
  require(task.most_values > 0, f"{path}.most_values={task.most_values} must be positive.")
  for kind in task.memory:
    known = ", ".join(map(repr, MEMORIES))
    require(
      kind in MEMORIES, f"{path}.memory: {kind!r} is no kind of memory{nearest(kind, MEMORIES)}; there are {known}."
    )
  require(len(set(task.memory)) == len(task.memory), f"{path}.memory={task.memory} names a kind twice.")
  require(
    not (task.memory and task.where),
    f"{path}: memory counts all events, but where={task.where!r} asks about some of them; leave one of the two out.",
  )
  require_following_events(path, data)
  require_condition(path, task.where, data)


@check_kind.register(EventLabel)
def _(task: EventLabel, path: str, config: Config) -> None:
  data = config.data
  for name in (task.field, *task.given):
    require_single_values(path, name, data)
  require_event_field(path, task.field, data)
  require(task.field in data.fields, f"{path}.field={task.field!r} is not a field{nearest(task.field, data.fields)}")
  kind = data.fields[task.field].kind
  if task.positive:
    require(kind == "vocabulary", f"{path}.positive needs a vocabulary field; {task.field!r} is {kind}.")
    require(task.at_least is None, f"{path}: positive and at_least exclude each other; keep one.")
    require_no_buckets(path, task.field, data, " with input=False")
  else:
    require(kind == "numeric", f"{path}: name the values of {task.field!r} that are positive; it is a {kind} field.")
  for name in task.given:
    require(name in data.fields, f"{path}.given: {name!r} is not a field{nearest(name, data.fields)}")
    require(data.fields[name].kind != "numeric", f"{path}.given: {name!r} is numeric; only categorical fields can be.")
    require(data.fields[name].input, f"{path}.given: {name!r} is no input, so it has no embeddings.")
    require(name != task.field, f"{path}.given holds {name!r}, the field that is asked for.")
  require(task.per_snapshot > 0, f"{path}.per_snapshot={task.per_snapshot} must be positive.")
  require_following_events(path, data)
  require_condition(path, task.where, data)


@check_kind.register(FutureEvent)
def _(task: FutureEvent, path: str, config: Config) -> None:
  require_window(path, task.horizon_days, config.data)
  require_event_type(path, task.source, config.data)
  require_condition(path, task.where, config.data)


@check_kind.register(FutureValues)
def _(task: FutureValues, path: str, config: Config) -> None:
  data = config.data
  require_vocabulary_field(path, task.field, data)
  require_window(path, task.horizon_days, data)
  require_no_buckets(path, task.field, data, " with input=False")
  require(task.top > 0, f"{path}.top={task.top} must be positive.")
  require_condition(path, task.where, data)


@check_kind.register(FutureAmount)
def _(task: FutureAmount, path: str, config: Config) -> None:
  data = config.data
  require_window(path, task.horizon_days, data)
  require_event_type(path, task.source, data)
  require_condition(path, task.where, data)
  require(1 < task.power < 2, f"{path}.power={task.power} must lie between 1 and 2.")
  if task.of in ("count", "moments"):
    require(not task.field, f"{path}.field={task.field!r} has no meaning with of={task.of!r}; remove it.")
    return
  numeric = [n for n, f in data.fields.items() if f.kind == "numeric"]
  require(task.field in numeric, f"{path}.field={task.field!r} is not a numeric field{nearest(task.field, numeric)}")
  require_event_field(path, task.field, data)
  field = data.fields[task.field]
  require(
    field.encoding != "quantile",
    f"{path}.field={task.field!r}: a quantile keeps no amounts; set config.data.fields.{task.field}.encoding="
    f"'log1p', or name a second field, such as {task.field}_asked=dict(column={field.column or task.field!r}, "
    "kind='numeric', input=False).",
  )


@check_kind.register(TimeToEvent)
def _(task: TimeToEvent, path: str, config: Config) -> None:
  require_window(path, task.horizon_days, config.data)
  require_event_type(path, task.source, config.data)
  require_condition(path, task.where, config.data)
  require(task.intervals > 0, f"{path}.intervals={task.intervals} must be positive.")
  if task.edges_days:
    require(
      task.intervals == TimeToEvent.intervals,
      f"{path}.intervals={task.intervals} has no meaning with edges_days, which set the intervals; remove one of them.",
    )
    require(
      task.edges_days[-1] == task.horizon_days,
      f"{path}.edges_days must end at horizon_days={task.horizon_days:g}, not at {task.edges_days[-1]:g}; append "
      f"{task.horizon_days:g}, or set horizon_days={task.edges_days[-1]:g}.",
    )
  ends = [int(edge * MICROSECONDS_PER_DAY) for edge in (0.0, *task.edges)]
  require(
    all(one < other for one, other in itertools.pairwise(ends)),
    f"{path}.edges_days={task.edges_days} must be positive and ascend."
    if task.edges_days
    else f"{path}.intervals={task.intervals} are too many for horizon_days={task.horizon_days:g}; set fewer.",
  )


@check_kind.register(UserLabel)
def _(task: UserLabel, path: str, config: Config) -> None:
  require(config.data.users is not None, f"{path}: a user label needs config.data.users.")
  require(bool(task.column), f"{path}.column is empty: name the user table's column.")
  for name, field in config.data.fields.items():
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


@check_kind.register(DatedLabel)
def _(task: DatedLabel, path: str, config: Config) -> None:
  split = config.data.split
  require(bool(task.files), f"{path}.files is empty: name the files of the table of dated labels.")
  check_text_format(path, task)
  for key in ("user", "time", "column"):
    require(bool(getattr(task, key)), f"{path}.{key} is empty: name the column.")
  require(
    task.user != task.time and task.column not in (task.user, task.time),
    f"{path}: user={task.user!r}, time={task.time!r} and column={task.column!r} must be three columns.",
  )
  require(
    split.mode != "leave_one_out",
    f"{path}: a dated label needs config.data.split.mode='temporal' or 'user'; leave_one_out has no periods that a "
    "label's time could lie in.",
  )
  require(task.delay_days >= 0, f"{path}.delay_days={task.delay_days} must not be negative.")
  require(
    not task.positive or task.type == "binary", f"{path}.positive has no meaning with type={task.type!r}; remove it."
  )


@check_kind.register(Contrast)
def _(task: Contrast, path: str, config: Config) -> None:
  require(
    1 <= task.least_events <= task.slice_events <= config.model.max_events,
    f"{path}: 1 ≤ least_events={task.least_events} ≤ slice_events={task.slice_events} ≤ "
    f"model.max_events={config.model.max_events} must hold.",
  )
  require(task.temperature > 0, f"{path}.temperature={task.temperature} must be positive.")


# ------------------------------------------------------------------------------------------- checks that kinds share


def require(condition: bool, message: str) -> None:
  """Raises ConfigError with the message unless the condition holds."""
  if not condition:
    raise ConfigError(message)


def require_single_values(path: str, field: str, data: Data) -> None:
  """Raises ConfigError for a field of lists or vectors."""
  require(
    field not in data.fields or (not data.fields[field].many and data.fields[field].kind != "vector"),
    f"{path}: {field!r} holds lists, which are inputs only; a task needs a field of single values.",
  )


def require_event_field(path: str, field: str, data: Data) -> None:
  """Raises ConfigError for a field of the table of users."""
  require(
    field not in data.fields or data.fields[field].table == "events",
    f"{path}.field={field!r} is of the table of users (config.data.fields.{field}.table), the same at every event; ask "
    "about its column by a task of kind 'user_label'.",
  )


def require_vocabulary_field(path: str, field: str, data: Data) -> None:
  """Raises ConfigError unless `field` is a vocabulary field of events with single values."""
  require_single_values(path, field, data)
  require_event_field(path, field, data)
  vocabularies = [n for n, f in data.fields.items() if f.kind == "vocabulary"]
  require(field in vocabularies, f"{path}.field={field!r} is not a vocabulary field{nearest(field, vocabularies)}")


def require_no_buckets(path: str, field: str, data: Data, settings: str = "") -> None:
  """Raises ConfigError for a field with buckets, whose values share codes.

  `settings` is text for the message: the settings of a second field that the task could ask about instead.
  """
  require(
    not data.fields[field].buckets,
    f"{path}.field={field!r}: with config.data.fields.{field}.buckets={data.fields[field].buckets} values share codes, "
    f"so that a task cannot tell them apart; name a second field of the same column{settings} without buckets, such as "
    f"{field}_asked=dict(column={data.fields[field].column or field!r}{', input=False' if settings else ''}).",
  )


def require_following_events(path: str, data: Data) -> None:
  """Raises ConfigError where no event can follow an evaluated snapshot."""
  require(
    data.split.mode != "user" or data.split.snapshots != "end",
    f"{path}: with config.data.split.snapshots='end' and mode='user' no event follows a snapshot, so nothing could "
    "be evaluated; set snapshots='every_events' or 'calendar', or leave the task out.",
  )


def require_window(path: str, horizon_days: float, data: Data) -> None:
  """Raises ConfigError where no label can have a window after a snapshot."""
  require(horizon_days > 0, f"{path}.horizon_days={horizon_days} must be positive.")
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


def require_condition(path: str, where: str, data: Data) -> None:
  """Raises ConfigError for a condition that cannot be read, or that compares what cannot be compared."""
  if where:
    check_condition(f"{path}.where", where, data)


def check_condition(key: str, where: str, data: Data) -> None:
  """Raises ConfigError for the condition of the config key `key` as `require_condition` does."""
  unseen = "" if key.startswith(AGGREGATES) else ", input=False"  # aggregates are of inputs
  for compared in comparisons(parse_condition(where, key)):
    name = compared.field
    if compared.function:
      _require_function(key, where, compared, data, unseen or ", encoding='log1p'")
      continue
    require(name in data.fields, f"{key}={where!r}: {name!r} is not a field{nearest(name, data.fields)}")
    field = data.fields[name]
    lists = field.many or field.kind == "vector"
    require(not lists, f"{key}={where!r}: {name!r} holds lists; a condition compares single values.")
    text = any(isinstance(constant, str) for constant in compared.constants)
    if field.kind == "numeric":
      require(not text, f"{key}={where!r}: {name!r} is a numeric field; compare it with a number, without quotes.")
      continue
    require(
      field.kind == "vocabulary" and not field.buckets,
      f"{key}={where!r}: values of {name!r} share codes, so that a condition cannot tell them apart; name a second "
      f"field of the same column, such as {name}_asked=dict(column={field.column or name!r}{unseen}).",
    )
    require(
      compared.operator in ("==", "!=", "in", "not in"),
      f"{key}={where!r}: {name!r} is a vocabulary field, whose values have no order; compare it by ==, !=, in or not "
      "in.",
    )


def _require_function(key: str, where: str, compared: Comparison, data: Data, setting: str) -> None:
  """Raises ConfigError unless the data have whole moments, and numbers that the function can take."""
  function, name = compared.function, compared.field
  require(
    data.split.mode != "leave_one_out",
    f"{key}={where!r}: {function}({name}) is about all events of a moment, which config.data.split.mode="
    "'leave_one_out' tears apart; set mode='temporal' or 'user'.",
  )
  if function == "count":
    return
  numeric = [n for n, f in data.fields.items() if f.kind == "numeric"]
  require(
    name in numeric,
    f"{key}={where!r}: {function}({name}) needs a numeric field, and {name!r} is none{nearest(name, numeric)}",
  )
  field = data.fields[name]
  require(
    field.table == "events",
    f"{key}={where!r}: {name!r} is of the table of users (config.data.fields.{name}.table), the same at every event; "
    + ("leave it out." if key.startswith(AGGREGATES) else f"compare it without {function}()."),
  )
  require(
    field.encoding != "quantile" or function in ("max", "min"),
    f"{key}={where!r}: a quantile keeps no amounts to add; set config.data.fields.{name}.encoding='log1p', or name a "
    f"second field, such as {name}_asked=dict(column={field.column or name!r}, kind='numeric'{setting}).",
  )


def require_event_type(path: str, source: str, data: Data) -> None:
  """Raises ConfigError unless `source` names a source, may be a value of a source's column `type`, or is empty."""
  typed = [n for n, s in data.sources.items() if s.type]
  if not source or source in data.sources or len(typed) == 1:
    return
  name, dot, _ = source.partition(".")
  several = f"; write SOURCE.TYPE, where SOURCE is one of {', '.join(typed)}" if typed else ""
  require(
    bool(dot) and name in typed, f"{path}.source={source!r} is not a source{nearest(source, data.sources)}{several}"
  )
